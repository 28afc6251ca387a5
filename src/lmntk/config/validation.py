"""Which flags go together: everything that can be refused before a file or a model is opened."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from lmntk.config import as_published
from lmntk.config.arguments import DataArguments, ModelArguments, TrainingArguments
from lmntk.config.old_arguments import IGNORED
from lmntk.config.prompt_settings import TASK_DEFAULTS, task_of
from lmntk.data.tasks import Task
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels.formulas import FORMULAS
from lmntk.prompts.demonstrations import DEMONSTRATION_BOUNDS
from lmntk.prompts.prompt_files import SOURCE_BOUNDS
from lmntk.prompts.render import LIMIT_BOUNDS
from lmntk.solvers import SOLVERS
from lmntk.solvers.bounds import SOLVER_BOUNDS

BOUNDS = (
    Bounds("num_k", 1),
    Bounds("seed", 0, 2**32 - 1),
    Bounds("num_sample", 1),
    Bounds("lora_r", 1),
    Bounds("lora_alpha", 1),
    Bounds("fix_layers", 0),
    Bounds("learning_rate", 0),
    Bounds("weight_decay", 0),
    Bounds("max_grad_norm", 0),
    Bounds("num_train_epochs", 0, above=True),
    Bounds("gradient_accumulation_steps", 1),
    Bounds("eval_steps", 0, above=True),
    Bounds("label_smoothing_factor", 0, 1),
    *SOURCE_BOUNDS,
    *LIMIT_BOUNDS,
    *DEMONSTRATION_BOUNDS,
    Bounds("per_device_train_batch_size", 1, 10**9),
    Bounds("per_device_eval_batch_size", 1, 10**9),
    Bounds("exclude_first_layers", 0),
    Bounds("kernel_memory_gb", 0, above=True),
    *SOLVER_BOUNDS.values(),
    Bounds("adam_beta1", 0, 1),
    Bounds("adam_beta2", 0, 1),
    Bounds("adam_epsilon", 0),
    Bounds("warmup_steps", 0),
    Bounds("logging_steps", 0, above=True),
    Bounds("save_steps", 0, above=True),
    Bounds("eval_delay", 0),
    Bounds("eval_accumulation_steps", 1),
    Bounds("dataloader_num_workers", 0, 1000),  # each is a process
    Bounds("dataloader_prefetch_factor", 1),
    Bounds("data_seed", 0, 2**32 - 1),
)


def check_arguments(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Refuse what cannot work, before anything expensive starts.

    Args:
        model: The model's flags.
        data: The data's flags.
        training: The flags of the run.

    Raises:
        UsageError: One sentence that names the flag and the way out.
    """
    task = task_of(data, model.few_shot_type)
    _check_folder(Path(training.output_dir), "output_dir", task.key)
    if training.save_logit:
        _check_folder(Path(training.save_logit_dir or ""), "save_logit_dir", task.key)
    flags = {**vars(model), **vars(data), **vars(training)}
    check_numbers(BOUNDS, flags)
    _check_classes(task, training)
    if training.active_trainer == "kernel":
        _check_kernel(task, training)
    else:
        for flag, given in (("load_kernels", training.load_kernels is not None), ("dry_run", training.dry_run)):
            if given:
                raise UsageError(f"--{flag} works with --trainer kernel only: add that, or leave out --no_train")
    _check_training(model, training)
    _check_demonstrations(model, data)
    if not (training.do_train or training.do_eval or training.do_predict or training.dry_run):
        raise UsageError("nothing to do: pass --do_train, --do_eval or --do_predict")
    if Path("log").is_dir():
        raise UsageError("./log is a folder, but runs append a line to a file of that name; work in another directory")


class Idle(NamedTuple):
    """Flags that change nothing unless something else is asked for."""

    flags: tuple[str, ...]
    needed: str
    read: Callable[[Any], bool]  # of all flags, as one namespace


IDLE = (
    Idle(("f0_scaling",), "--adjust_for_init", lambda given: given.adjust_for_init),
    Idle(("kernel_gamma", "kernel_lambda"), "--kernel_solver asym", lambda given: given.kernel_solver == "asym"),
    Idle(
        ("optimizer", "optimizer_variant", "fix_layers", "evaluate_during_training", "save_at_last"),
        "--trainer standard --do_train",
        lambda given: given.active_trainer == "standard",
    ),
    Idle(
        ("l2_loss",),
        "--trainer standard, or --no_train",
        lambda given: given.active_trainer in ("standard", "zero-shot"),
    ),
    Idle(
        ("from_linearhead",),
        "--trainer standard or kernel, or --few_shot_type finetune",
        lambda given: given.active_trainer in ("standard", "kernel") or given.few_shot_type == "finetune",
    ),
    Idle(
        (
            "kernel_formula",
            "kernel_solver",
            "kernel_regularization",
            "kernel_engine",
            "kernel_memory_gb",
            "kernel_per_layer",
            "exclude_embeddings",
            "exclude_head",
            "only_biases",
            "exclude_first_layers",
            "adjust_for_init",
            "overwrite_kernels",
        ),
        "--trainer kernel",
        lambda given: given.active_trainer == "kernel",
    ),  # fmt: skip
    Idle(
        ("resume_from_checkpoint", "label_smoothing_factor"),
        "--trainer standard --do_train",
        lambda given: given.active_trainer == "standard",
    ),
    Idle(
        ("eval_steps",),
        "--evaluate_during_training or --eval_strategy steps",
        lambda given: given.evaluate_during_training or given.eval_strategy == "steps",
    ),
    Idle(("label_smoothing_factor",), "cross entropy, in whose place is --l2_loss", lambda given: not given.l2_loss),
    Idle(
        ("linear_head_halved", "linear_head_order"),
        "--trainer linearhead or --from_linearhead",
        lambda given: given.active_trainer == "linearhead" or given.from_linearhead,
    ),
    Idle(
        ("flattened_targets",),
        "--trainer kernel --kernel_solver logistic or svc",
        lambda given: given.active_trainer == "kernel" and given.kernel_solver in ("logistic", "svc"),
    ),
    Idle(
        ("plain_lbfgs",),
        "--kernel_solver logistic or a linear head",
        lambda given: (
            given.active_trainer == "linearhead"
            or given.from_linearhead
            or (given.active_trainer == "kernel" and given.kernel_solver == "logistic")
        ),
    ),
    Idle(("clip_frozen",), "--trainer standard --fix_layers", lambda given: given.fix_layers > 0),
    Idle(("decay_head_norm",), "--trainer standard --weight_decay", lambda given: given.weight_decay > 0),
    Idle(("truncate_demonstrations_only",), "--truncate_head", lambda given: given.truncate_head),
    Idle(("overwrite_kernels",), "a command that has no --load_kernels", lambda given: given.load_kernels is None),
    Idle(("save_logit",), "--do_predict", lambda given: given.do_predict),
    Idle(
        ("save_logit_pairs",),
        "--save_logit and --binary_classification",
        lambda given: given.save_logit and given.binary_classification,
    ),
    Idle(("demo_filter_model", "demo_filter_rate"), "--demo_filter", lambda given: given.demo_filter),
    Idle(("num_demo",), "--few_shot_type prompt-demo", lambda given: given.few_shot_type == "prompt-demo"),
    Idle(
        ("gpt3_in_context_num",),
        "--gpt3_in_context_head or --gpt3_in_context_tail",
        lambda given: given.gpt3_in_context_head or given.gpt3_in_context_tail,
    ),
)


def unused_flags(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> list[str]:
    """Return a sentence for every flag that was given and that nothing will read."""
    groups = (model, data, training)
    given = SimpleNamespace(active_trainer=training.active_trainer)
    defaults: dict[str, Any] = {}
    for group in groups:
        vars(given).update(vars(group))
        defaults |= {name: field.default for name, field in group.__dataclass_fields__.items()}
    return [
        f"--{flag} changes nothing without {row.needed}"
        for row in IDLE
        if not row.read(given)
        for flag in row.flags
        if getattr(given, flag) != defaults[flag] and flag not in training.published_settings
    ] + [f"--{flag} is ignored: {why}" for flag, why in IGNORED.items() if getattr(given, flag) is not None]


def published_changes(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> list[str]:
    """Return a sentence for every setting that ``--as_published`` changes for this command."""
    task = task_of(data, model.few_shot_type)
    given = SimpleNamespace(**vars(model), **vars(data), **vars(training))
    given.active_trainer = training.active_trainer
    given.regression, given.two_classes = task.regression, len(task.labels) == 2 and not task.regression
    given.row_fills = any(
        getattr(task, name) is not None and getattr(data, name) is None
        for name in TASK_DEFAULTS
        if name != "num_sample" or model.few_shot_type == "prompt-demo"
    )
    return as_published.changes(given)


def _check_classes(task: Task, training: TrainingArguments) -> None:
    if not training.binary_classification:
        return
    if task.regression:
        raise UsageError(f"--binary_classification: {task.name} has scores, not classes; leave the flag out")
    if len(task.labels) != 2:
        raise UsageError(
            f"--binary_classification needs two classes, but {task.name} has {len(task.labels)}; leave the flag out"
        )


def _check_kernel(task: Task, training: TrainingArguments) -> None:
    if task.regression:
        raise UsageError(
            f"--trainer kernel predicts classes, but {task.name} is a regression task; take a task with classes"
        )
    one_logit = training.binary_classification
    to_two_classes = "add --binary_classification" if len(task.labels) == 2 else "take a task of two classes"
    asymmetric = FORMULAS[training.kernel_formula].is_asymmetric
    if asymmetric and not one_logit:
        raise UsageError(
            f"--kernel_formula {training.kernel_formula} needs --binary_classification: {to_two_classes}, or take "
            f"another formula ({_names(name for name, row in FORMULAS.items() if not row.is_asymmetric)})"
        )
    solver, row = training.kernel_solver, SOLVERS[training.kernel_solver]
    if row.needs_binary and not one_logit:
        others = _names(name for name, other in SOLVERS.items() if not other.needs_binary)
        raise UsageError(f"--kernel_solver {solver} needs two classes: {to_two_classes}, or take another ({others})")
    if row.needs_asymmetric and not asymmetric:
        fitting = _names(name for name, formula in FORMULAS.items() if formula.is_asymmetric)
        raise UsageError(
            f"--kernel_solver {solver} needs an asymmetric kernel: add --kernel_formula {fitting}, or take another"
        )
    if training.adjust_for_init and not row.allows_f0:
        fitting = _names(name for name, other in SOLVERS.items() if other.allows_f0)
        raise UsageError(f"--adjust_for_init does not go with --kernel_solver {solver}, only with {fitting}")
    if training.kernel_per_layer and training.kernel_engine == "jvp":
        raise UsageError(
            "--kernel_per_layer does not go with --kernel_engine jvp, which meets all layers at once: take factored or "
            "jacobian"
        )
    if training.load_kernels is not None and not Path(training.load_kernels).is_dir():
        raise UsageError(
            f"--load_kernels {training.load_kernels}: there is no such folder; name an earlier run's output folder, "
            "or leave the flag out to compute the kernels"
        )


def _check_training(model: ModelArguments, training: TrainingArguments) -> None:
    if training.optimizer_variant and training.optimizer != "sgd":
        raise UsageError(f"--optimizer_variant {training.optimizer_variant} needs plain SGD: add --optimizer sgd")
    if training.adafactor and training.optimizer == "sgd":
        raise UsageError("--adafactor and --optimizer sgd exclude each other: leave one of them out")
    if training.save_logit and training.save_logit_dir is None:
        raise UsageError("--save_logit needs --save_logit_dir, the folder to write the logits to")
    for flag in ("lora_r", "lora_alpha"):
        if getattr(model, flag) is not None and not model.apply_lora:
            raise UsageError(f"--{flag} says how LoRA is applied: add --apply_lora, or leave the flag out")
    if training.active_trainer != "standard":
        return
    if training.max_steps != -1 and training.max_steps < 1:
        raise UsageError(f"--max_steps is {training.max_steps}, but it must be 1 or more; -1 leaves it to the epochs")
    if training.neftune_noise_alpha is not None:
        raise UsageError("--neftune_noise_alpha does not work with the prompts of this program: leave the flag out")
    if training.sweep and (training.resume_from_checkpoint or "").lower() == "true":
        raise UsageError(
            "--resume_from_checkpoint true looks into the output folder, which --sweep makes anew: name the checkpoint"
        )
    if training.evaluate_during_training and not training.do_eval:
        raise UsageError("--evaluate_during_training evaluates on dev: add --do_eval, or leave the flag out")
    drawn = [
        flag
        for flag in ("random_model_init", "random_segment")
        if getattr(training, flag, False) or getattr(model, flag, False)
    ]
    if model.apply_lora and drawn and training.save_strategy != "no":
        raise UsageError(
            f"--{drawn[0]} with --apply_lora: adapters are written without the random weights that they stand on; "
            "leave one of the flags out, or pass --save_strategy no"
        )
    if (training.eval_on_start or training.eval_strategy != "no") and not training.do_eval:
        raise UsageError("--eval_strategy and --eval_on_start evaluate on dev: add --do_eval, or leave them out")
    folder = Path(training.output_dir)
    used = not training.sweep and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if used and not (training.overwrite_output_dir or training.resume_from_checkpoint):
        raise UsageError(
            f"--output_dir {folder} is not empty: choose another folder or TAG, pass --overwrite_output_dir to train "
            "anew there, or --resume_from_checkpoint true to go on from its last checkpoint"
        )


def _check_demonstrations(model: ModelArguments, data: DataArguments) -> None:
    in_context = [
        f"--gpt3_in_context_{place}" for place in ("head", "tail") if getattr(data, f"gpt3_in_context_{place}")
    ]
    if len(in_context) == 2:
        raise UsageError(f"{' and '.join(in_context)} exclude each other: the examples stand on one side of the query")
    if data.demo_filter and data.demo_filter_model is None:
        raise UsageError(
            "--demo_filter needs --demo_filter_model, the name under which tools/get_sbert_embedding.py wrote sentence "
            "embeddings into --data_dir"
        )
    asked = [*in_context, *(f"--{flag}" for flag in ("demo_filter", "double_demo") if getattr(data, flag))]
    if asked and model.few_shot_type != "prompt-demo":
        raise UsageError(
            f"{asked[0]} is for prompts with demonstrations: pass --few_shot_type prompt-demo, or leave it out"
        )
    if in_context and (data.template_path is not None and data.template_id is None):
        raise UsageError(f"{in_context[0]} takes one template: pick a line of --template_path with --template_id")


def _check_folder(folder: Path, flag: str, task_key: str) -> None:
    """Find out now, not hours later, that results could not be written."""
    existing = folder.absolute()
    # Path.exists raises where a name is too long.
    while not os.path.exists(existing) and existing != existing.parent:  # noqa: PTH110
        existing = existing.parent
    random = "0" * 32
    longest = folder.absolute() / f"train_tiles_{task_key}" / f".train_layer_kernels_{task_key}.json.{random}.tmp"
    name_length, path_length = os.pathconf(existing, "PC_NAME_MAX"), os.pathconf(existing, "PC_PATH_MAX")
    if len(os.fsencode(longest)) >= path_length or any(len(os.fsencode(name)) > name_length for name in longest.parts):
        raise UsageError(
            f"--{flag} {folder}: with the files in it, whose names have --task_name in them, this is longer than the "
            f"file system allows, {name_length} bytes a name and {path_length} in all: choose a shorter one, or in "
            "run_fewshot.sh a shorter TAG, GRID_TAG or MODEL"
        )
    if not existing.is_dir():
        raise UsageError(f"--{flag} {folder}: {existing} is a file, not a folder; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--{flag} {folder}: {existing} cannot be written; choose another place")


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
