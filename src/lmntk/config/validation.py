"""Which settings go together: everything that can be refused before a file or a model is opened."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from lmntk.config import as_published
from lmntk.config.arguments import ActiveTrainer, DataArguments, ModelArguments, TrainingArguments
from lmntk.config.kernel_checks import (
    check_formula,
    check_kernel_parts,
    check_least_squares,
    check_linearised,
    check_number_type,
    check_projection,
    check_snapshots,
    refuse,
    to_two_classes,
)
from lmntk.config.old_arguments import IGNORED
from lmntk.config.prompt_settings import TASK_DEFAULTS, task_of
from lmntk.data.tasks import Task
from lmntk.errors import Bounds, FileError, SettingError, check_numbers
from lmntk.kernels.formulas import FORMULAS
from lmntk.prompts.demonstrations import DEMONSTRATION_BOUNDS
from lmntk.prompts.prompt_files import SOURCE_BOUNDS
from lmntk.prompts.render import LIMIT_BOUNDS
from lmntk.solvers import SOLVERS

BOUNDS = (
    Bounds("num_k", 1),
    Bounds("seed", 0, 2**32 - 1),
    Bounds("num_sample", 1),
    Bounds("lora_r", 1),
    Bounds("kernel_lora_rank", 1),
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
    """Refuse settings that cannot work, before anything expensive starts.

    Args:
        model: The arguments of the model.
        data: The arguments of the data.
        training: The arguments of the run.

    Raises:
        SettingError: Names the setting and the remedy.
        UsageError: The task is unknown, or its own data is not described well.
    """
    task = task_of(data, model.few_shot_type)
    _check_folder(training.output_dir, "output_dir", task.key)
    if training.save_logit:
        _check_folder(training.save_logit_dir or "", "save_logit_dir", task.key)
    check_numbers(BOUNDS, {**vars(model), **vars(data), **vars(training)})
    training.check_solver_settings()
    if training.kernel_lora_rank is not None and model.apply_lora:
        refuse(training, "kernel_lora_rank", "is for a model without adapters: leave it or `apply_lora` out")
    _check_classes(task, training)
    if training.active_trainer == ActiveTrainer.KERNEL:
        _check_kernel(task, training)
    else:
        for setting in ("load_kernels", "fine_tuned_model", "dry_run"):
            if getattr(training, setting) not in (None, False):
                refuse(training, setting, "works with `trainer=kernel` only: add that, or leave out `no_train`")
    check_number_type(training)
    _check_training(model, training)
    if _trains(training):
        check_snapshots(task, training)
    _check_demonstrations(model, data)
    if not (training.do_train or training.do_eval or training.do_predict or training.dry_run):
        raise SettingError("nothing to do: pass `do_train`, `do_eval` or `do_predict`", setting="do_train", value=False)
    if Path("log").is_dir():
        raise FileError(
            "./log is a folder, but runs append a line to a file of that name; work in another directory", path="log"
        )


class Condition(NamedTuple):
    """What some settings need to have an effect.

    Attributes:
        settings: The settings.
        needed: What they need, for a sentence.
        is_used: Returns whether a command, all its arguments as one namespace, has that.
    """

    settings: tuple[str, ...]
    needed: str
    is_used: Callable[[Any], bool]


def _active(*trainers: ActiveTrainer) -> Callable[[Any], bool]:
    return lambda given: given.active_trainer in trainers


def _fits_logistic_kernel(given: Any) -> bool:
    return given.active_trainer == ActiveTrainer.KERNEL and given.kernel_solver == "logistic"


_fine_tunes, _uses_kernel = _active(ActiveTrainer.STANDARD), _active(ActiveTrainer.KERNEL)
_trains = _active(ActiveTrainer.STANDARD, ActiveTrainer.LINEARISED)


def _makes_kernels(given: Any) -> bool:
    return _uses_kernel(given) or (_trains(given) and given.kernel_steps is not None)


CONDITIONS = (
    Condition(("f0_scaling",), "`adjust_for_init`", lambda given: given.adjust_for_init),
    Condition(
        ("select_by",),
        "candidates of the solver's settings, such as `kernel_regularization=auto`",
        lambda given: _uses_kernel(given) and len(given.solver_grid) > 1,
    ),
    Condition(("kernel_gamma", "kernel_lambda"), "`kernel_solver=asym`", lambda given: given.kernel_solver == "asym"),
    Condition(
        ("evaluate_during_training", "save_at_last", "resume_from_checkpoint"),
        "`trainer=standard` `do_train`",
        _fine_tunes,
    ),
    Condition(
        ("save_strategy", "save_steps", "save_total_limit"),
        "a trainer that saves a model, which `trainer=linearised` does not",
        lambda given: given.active_trainer != ActiveTrainer.LINEARISED or given.save_strategy == "no",
    ),
    Condition(
        ("l2_loss",),
        "`trainer=standard` or linearised, or `no_train`",
        _active(ActiveTrainer.STANDARD, ActiveTrainer.LINEARISED, ActiveTrainer.ZERO_SHOT),
    ),
    Condition(
        ("from_linearhead",),
        "`trainer=standard`, linearised or kernel, or `few_shot_type=finetune`",
        lambda given: _trains(given) or _uses_kernel(given) or given.few_shot_type == "finetune",
    ),
    Condition(
        ("kernel_formula", "kernel_memory_gb"), "`trainer=kernel`, or `kernel_steps` in training", _makes_kernels
    ),
    Condition(
        ("optimizer", "optimizer_variant", "fix_layers", "label_smoothing_factor", "kernel_steps"),
        "`trainer=standard` or linearised, and `do_train`",
        _trains,
    ),
    Condition(
        ("kernel_solver", "kernel_regularization", "kernel_engine", "projection_width", "projection_seed",
         "projection_check", "projection_tolerance", "lstsq_method", "cg_tolerance",
         "kernel_per_layer", "kernel_parts",
         "kernel_lora_rank", "kernel_lora_targets", "kernel_variance", "exclude_embeddings",
         "exclude_head", "only_biases", "exclude_first_layers", "adjust_for_init", "overwrite_kernels"),
        "`trainer=kernel`",
        _uses_kernel,
    ),
    Condition(("kernel_influence",), "`trainer=kernel`", _uses_kernel),
    Condition(
        ("eval_steps",),
        "`evaluate_during_training` or `eval_strategy=steps`",
        lambda given: given.evaluate_during_training or given.eval_strategy == "steps",
    ),
    Condition(
        ("label_smoothing_factor",), "cross entropy, which `l2_loss` replaces", lambda given: not given.l2_loss
    ),
    Condition(
        ("linear_head_halved", "linear_head_order"),
        "`trainer=linearhead` or `from_linearhead`",
        lambda given: given.active_trainer == ActiveTrainer.LINEARHEAD or given.from_linearhead,
    ),
    Condition(
        ("flattened_targets",),
        "`trainer=kernel` `kernel_solver=logistic` or svc",
        lambda given: _uses_kernel(given) and given.kernel_solver in ("logistic", "svc"),
    ),
    Condition(
        ("plain_lbfgs",),
        "`kernel_solver=logistic` or a linear head",
        lambda given: (
            given.active_trainer == ActiveTrainer.LINEARHEAD or given.from_linearhead or _fits_logistic_kernel(given)
        ),
    ),
    Condition(("clip_frozen",), "`trainer=standard` `fix_layers`", lambda given: given.fix_layers > 0),
    Condition(("decay_head_norm",), "`trainer=standard` `weight_decay`", lambda given: given.weight_decay > 0),
    Condition(("truncate_demonstrations_only",), "`truncate_head`", lambda given: given.truncate_head),
    Condition(("overwrite_kernels",), "a command without `load_kernels`", lambda given: given.load_kernels is None),
    Condition(("save_logit",), "`do_predict`", lambda given: given.do_predict),
    Condition(
        ("save_logit_pairs",),
        "`save_logit` and `binary_classification`",
        lambda given: given.save_logit and given.binary_classification,
    ),
    Condition(("demo_filter_model", "demo_filter_rate"), "`demo_filter`", lambda given: given.demo_filter),
    Condition(("num_demo",), "`few_shot_type=prompt-demo`", lambda given: given.few_shot_type == "prompt-demo"),
    Condition(
        ("gpt3_in_context_num",),
        "`gpt3_in_context_head` or `gpt3_in_context_tail`",
        lambda given: given.gpt3_in_context_head or given.gpt3_in_context_tail,
    ),
)  # fmt: skip
"""The settings that have no effect on some commands."""


def unused_flags(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> list[str]:
    """Return a sentence for every setting that was given and has no effect on this command."""
    given = SimpleNamespace(active_trainer=training.active_trainer, solver_grid=training.solver_grid)
    defaults: dict[str, Any] = {}
    for group in (model, data, training):
        vars(given).update(vars(group))
        defaults |= {name: field.default for name, field in group.__dataclass_fields__.items()}
    unused = [
        f"`{setting}` has no effect without {row.needed}"
        for row in CONDITIONS
        if not row.is_used(given)
        for setting in row.settings
        if getattr(given, setting) != defaults[setting] and setting not in training.published_settings
    ]
    ignored = [f"`{name}` is ignored: {why}" for name, why in IGNORED.items() if getattr(given, name) is not None]
    return unused + ignored


def published_changes(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> list[str]:
    """Return a sentence for every setting that `as_published` changes for this command."""
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
    if training.binary_classification and task.regression:
        refuse(training, "binary_classification", f"needs classes, but {task.name} has scores; leave it out")
    if training.binary_classification and len(task.labels) != 2:
        has = f"but {task.name} has {len(task.labels)}"
        refuse(training, "binary_classification", f"needs two classes, {has}; leave it out")


def _check_kernel(task: Task, training: TrainingArguments) -> None:
    if task.regression:
        problem = f"predicts classes, but {task.name} is a regression task; take a task with classes"
        refuse(training, "trainer", problem)
    check_formula(task, training)
    one_logit, remedy = training.binary_classification, to_two_classes(task)
    is_asymmetric = FORMULAS[training.kernel_formula].is_asymmetric
    solver = SOLVERS[training.kernel_solver]
    if solver.needs_binary and not one_logit:
        others = ", ".join(name for name, other in SOLVERS.items() if not other.needs_binary)
        refuse(training, "kernel_solver", f"needs two classes: {remedy}, or take another ({others})")
    if solver.needs_asymmetric and not is_asymmetric:
        (formula,) = (name for name, row in FORMULAS.items() if row.is_asymmetric)
        problem = f"needs an asymmetric kernel: add `kernel_formula={formula}`, or take another solver"
        refuse(training, "kernel_solver", problem)
    if training.adjust_for_init and not solver.allows_f0:
        fitting = ", ".join(name for name, other in SOLVERS.items() if other.allows_f0)
        problem = f"does not work with `kernel_solver={training.kernel_solver}`, only with {fitting}"
        refuse(training, "adjust_for_init", problem)
    check_kernel_parts(training)
    check_projection(training)
    check_least_squares(training)
    training.check_selection(reads_dev=training.do_eval)
    if training.load_kernels is not None and not Path(training.load_kernels).is_dir():
        problem = "is not a folder: name an earlier run's output folder, or leave it out to compute the kernels"
        refuse(training, "load_kernels", problem)
    if training.fine_tuned_model is not None and not Path(training.fine_tuned_model).is_dir():
        refuse(training, "fine_tuned_model", "is not a folder: name the output folder of a fine-tuning")
    if training.fine_tuned_model is not None and training.load_kernels is not None:
        problem = "needs the model, and `load_kernels` opens none: leave one of the two out"
        refuse(training, "fine_tuned_model", problem)


def _check_training(model: ModelArguments, training: TrainingArguments) -> None:
    if training.optimizer_variant and training.optimizer != "sgd":
        refuse(training, "optimizer_variant", "needs plain SGD: add `optimizer=sgd`")
    if training.adafactor and training.optimizer == "sgd":
        refuse(training, "adafactor", "and `optimizer=sgd` exclude each other: leave one of them out")
    if training.save_logit and training.save_logit_dir is None:
        refuse(training, "save_logit", "needs `save_logit_dir`, the folder to write the logits to")
    for setting in ("lora_r", "lora_alpha"):
        draws = setting == "lora_alpha" and training.kernel_lora_rank is not None
        if getattr(model, setting) is not None and not (model.apply_lora or draws):
            refuse(model, setting, "configures LoRA: add `apply_lora`, or leave it out")
    if training.active_trainer == ActiveTrainer.LINEARISED:
        check_linearised(training)
    if _trains(training):
        _check_fine_tuning(model, training)


def _check_fine_tuning(model: ModelArguments, training: TrainingArguments) -> None:
    if training.max_steps != -1 and training.max_steps < 1:
        refuse(training, "max_steps", "is too small: give 1 or more, or -1 to train for `num_train_epochs`")
    if training.neftune_noise_alpha is not None:
        refuse(training, "neftune_noise_alpha", "does not work with the prompts of this program: leave it out")
    if training.sweep and (training.resume_from_checkpoint or "").lower() == "true":
        problem = "looks into the output folder, which is new with `sweep`: name the checkpoint"
        refuse(training, "resume_from_checkpoint", problem)
    if training.evaluate_during_training and not training.do_eval:
        refuse(training, "evaluate_during_training", "evaluates on dev: add `do_eval`, or leave it out")
    for arguments, setting in ((training, "random_model_init"), (model, "random_segment")):
        if model.apply_lora and getattr(arguments, setting) and training.save_strategy != "no":
            problem = (
                "with `apply_lora`: adapters are saved without the random weights that they belong to; leave one of "
                "the two out, or pass `save_strategy=no`"
            )
            refuse(arguments, setting, problem)
    for setting, evaluates in (
        ("eval_on_start", training.eval_on_start),
        ("eval_strategy", training.eval_strategy != "no"),
    ):
        if evaluates and not training.do_eval:
            refuse(training, setting, "evaluates on dev: add `do_eval`, or leave it out")
    folder = Path(training.output_dir)
    is_used = not training.sweep and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if is_used and not (training.overwrite_output_dir or training.resume_from_checkpoint):
        problem = (
            "is not empty: choose another folder or TAG, pass `overwrite_output_dir` to train anew there, or "
            "`resume_from_checkpoint=true` to continue from its last checkpoint"
        )
        refuse(training, "output_dir", problem)


def _check_demonstrations(model: ModelArguments, data: DataArguments) -> None:
    in_context = [name for name in ("gpt3_in_context_head", "gpt3_in_context_tail") if getattr(data, name)]
    if len(in_context) == 2:
        refuse(data, in_context[0], f"and `{in_context[1]}` exclude each other: leave one of them out")
    if data.demo_filter and data.demo_filter_model is None:
        problem = (
            "needs `demo_filter_model`, the name under which tools/get_sbert_embedding.py wrote sentence embeddings "
            "into `data_dir`"
        )
        refuse(data, "demo_filter", problem)
    asked = [*in_context, *(name for name in ("demo_filter", "double_demo") if getattr(data, name))]
    if asked and model.few_shot_type != "prompt-demo":
        problem = "is for prompts with demonstrations: pass `few_shot_type=prompt-demo`, or leave it out"
        refuse(data, asked[0], problem)
    if in_context and (data.template_path is not None and data.template_id is None):
        refuse(data, in_context[0], "takes one template: choose a line of `template_path` with `template_id`")


def _check_folder(path: str, setting: str, task_key: str) -> None:
    """Refuse a folder that results could not be written to, before they are computed."""
    folder = Path(path)

    def refuse_folder(problem: str) -> NoReturn:
        raise FileError(f"`{setting}={path}`: {problem}", path=path, setting=setting)

    existing = folder.absolute()
    # Path.exists raises where a name is too long.
    while not os.path.exists(existing) and existing != existing.parent:  # noqa: PTH110
        existing = existing.parent
    random = "0" * 32
    longest = folder.absolute() / f"train_tiles_{task_key}" / f".train_layer_kernels_{task_key}.json.{random}.tmp"
    name_length, path_length = os.pathconf(existing, "PC_NAME_MAX"), os.pathconf(existing, "PC_PATH_MAX")
    if len(os.fsencode(longest)) >= path_length or any(len(os.fsencode(name)) > name_length for name in longest.parts):
        refuse_folder(
            "the names of the files in it, which contain `task_name`, would be longer than the file system allows, "
            f"{name_length} bytes a name and {path_length} in all: choose a shorter name, or in run_fewshot.sh a "
            "shorter TAG, GRID_TAG or MODEL"
        )
    if not existing.is_dir():
        refuse_folder(f"{existing} is a file, not a folder; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        refuse_folder(f"{existing} cannot be written; choose another place")
