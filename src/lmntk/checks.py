"""Which flags go together: everything that can be refused before a file or a model is opened."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmntk.arguments import DataArguments, ModelArguments, TrainingArguments
from lmntk.errors import UsageError
from lmntk.kernels.formulas import FORMULAS
from lmntk.solvers import SOLVERS
from lmntk.tasks import Task, find_task


class NotYet(NamedTuple):
    """A flag of the frozen command line whose feature this version lacks, and the values that ask for it."""

    flag: str
    values: tuple[object, ...] | None  # None: any but the flag's default
    feature: str
    way_out: str = "leave the flag out"


_PROMPT = "pass --few_shot_type prompt"
_TRAIN = "fine-tuning, which it is for,"
_ZERO_SHOT = "pass --trainer kernel, or --no_train to evaluate the model as it is"

# The issue that brings a feature deletes its rows.
NOT_YET = (
    NotYet("trainer", ("standard",), "fine-tuning", _ZERO_SHOT),
    NotYet("trainer", ("linearhead",), "the linear head", _ZERO_SHOT),
    NotYet("few_shot_type", ("finetune",), "the classification head", _PROMPT),
    NotYet("few_shot_type", ("prompt-demo",), "prompting with demonstrations, the default,", _PROMPT),
    NotYet("from_linearhead", None, "the linear head"),
    NotYet("apply_lora", None, "LoRA"),
    NotYet("l2_loss", None, "training with the squared error"),
    NotYet("model_family", ("causal",), "the causal family", "take a masked language model"),
    NotYet("gguf_file", None, "reading GGUF files"),
    NotYet("demo_filter", None, "filtering demonstrations"),
    NotYet("double_demo", None, "prompting with demonstrations"),
    NotYet("gpt3_in_context_head", None, "in-context learning"),
    NotYet("gpt3_in_context_tail", None, "in-context learning"),
    NotYet("gpt3_in_context_num", None, "in-context learning"),
    NotYet("optimizer", None, _TRAIN),
    NotYet("optimizer_variant", None, _TRAIN),
    NotYet("fix_layers", None, _TRAIN),
    NotYet("evaluate_during_training", None, _TRAIN),
    NotYet("save_at_last", None, _TRAIN),
    NotYet("save_logit", None, "writing logits for ensembles"),
    NotYet("sweep", None, "a folder for each run of a sweep", "leave the flag out and give each run its own folder"),
)


class Bounds(NamedTuple):
    """The values that a number can take; None, where it is a flag's default, always passes."""

    flag: str
    least: float
    most: float = math.inf
    above: bool = False  # `least` itself is too little

    def hold(self, value: float) -> bool:
        """Whether a value is allowed; infinity and nan never are."""
        enough = value > self.least if self.above else value >= self.least
        return enough and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        """The allowed values, for a sentence."""
        if self.most < math.inf:
            return f"from {self.least} to {self.most}"
        return f"above {self.least}" if self.above else f"{self.least} or more"


BOUNDS = (
    Bounds("num_k", 1),
    Bounds("seed", 0, 2**32 - 1),
    Bounds("num_sample", 1),
    Bounds("top_n_template", 1),
    Bounds("max_seq_length", 1),
    Bounds("first_sent_limit", 1),
    Bounds("other_sent_limit", 1),
    Bounds("per_device_train_batch_size", 1),
    Bounds("per_device_eval_batch_size", 1),
    Bounds("exclude_first_layers", 0),
    Bounds("kernel_memory_gb", 0, above=True),
    Bounds("kernel_regularization", 0),
    Bounds("kernel_gamma", 0, above=True),
    Bounds("kernel_lambda", 0, 1),
    Bounds("f0_scaling", 0),
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
    task = find_task(data.task_name)
    flags = {**vars(model), **vars(data), **vars(training)}
    _check_bounds(flags)
    _check_classes(task, training)
    if task.regression and training.no_train:
        raise UsageError(
            f"--no_train: {task.name} is a regression task, and evaluating those is not available in this version yet; "
            "take a task with classes"
        )
    if training.trainer == "kernel" and not training.no_train:
        _check_kernel(task, training)
    else:
        for flag, given in (("load_kernels", training.load_kernels is not None), ("dry_run", training.dry_run)):
            if given:
                raise UsageError(f"--{flag} works with --trainer kernel only: add that, or leave out --no_train")
    if training.optimizer_variant and training.optimizer != "sgd":
        raise UsageError(f"--optimizer_variant {training.optimizer_variant} needs plain SGD: add --optimizer sgd")
    _check_availability((model, data, training), flags)
    if not (training.do_train or training.do_eval or training.do_predict or training.dry_run):
        raise UsageError("nothing to do: pass --do_train, --do_eval or --do_predict")
    _check_output_dir(Path(training.output_dir))


def _check_bounds(flags: Mapping[str, Any]) -> None:
    for bounds in BOUNDS:
        value = flags[bounds.flag]
        if value is not None and not bounds.hold(value):
            raise UsageError(f"--{bounds.flag} is {value}, but it must be {bounds}")


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
    asymmetric = FORMULAS[training.kernel_formula].two_directions
    if asymmetric and not one_logit:
        raise UsageError(
            f"--kernel_formula {training.kernel_formula} needs --binary_classification: {to_two_classes}, or take "
            f"another formula ({_names(name for name, row in FORMULAS.items() if not row.two_directions)})"
        )
    solver, row = training.kernel_solver, SOLVERS[training.kernel_solver]
    if row.needs_binary and not one_logit:
        others = _names(name for name, other in SOLVERS.items() if not other.needs_binary)
        raise UsageError(f"--kernel_solver {solver} needs two classes: {to_two_classes}, or take another ({others})")
    if row.needs_asymmetric and not asymmetric:
        fitting = _names(name for name, formula in FORMULAS.items() if formula.two_directions)
        raise UsageError(
            f"--kernel_solver {solver} needs an asymmetric kernel: add --kernel_formula {fitting}, or take another"
        )
    if training.adjust_for_init and not row.allows_f0:
        fitting = _names(name for name, other in SOLVERS.items() if other.allows_f0)
        raise UsageError(f"--adjust_for_init does not go with --kernel_solver {solver}, only with {fitting}")
    if training.load_kernels is not None and not Path(training.load_kernels).is_dir():
        raise UsageError(
            f"--load_kernels {training.load_kernels}: there is no such folder; name an earlier run's output folder, "
            "or leave the flag out to compute the kernels"
        )


def _check_availability(groups: tuple[Any, ...], flags: Mapping[str, Any]) -> None:
    defaults = {name: field.default for group in groups for name, field in group.__dataclass_fields__.items()}
    for flag, values, feature, way_out in NOT_YET:
        if flag == "trainer" and flags["no_train"]:
            continue  # then no trainer has anything to train
        value = flags[flag]
        if value != defaults[flag] if values is None else value in values:
            shown = f"--{flag}" if isinstance(value, bool) else f"--{flag} {value}"
            raise UsageError(f"{shown}: {feature} is not available in this version yet; {way_out}")


def _check_output_dir(folder: Path) -> None:
    """Find out now, not hours later, that results could not be written."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"--output_dir {folder}: {existing} is a file, not a folder; choose another place")
    if Path("log").is_dir():
        raise UsageError("./log is a folder, but runs append a line to a file of that name; work in another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir {folder}: {existing} cannot be written; choose another place")


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
