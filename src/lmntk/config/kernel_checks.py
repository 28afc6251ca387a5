"""Which settings go together with the kernels of a training and with its linearisation."""

from enum import Enum
from typing import Any, NoReturn

from lmntk.config.arguments import TrainingArguments
from lmntk.data.tasks import Task
from lmntk.errors import SettingError
from lmntk.kernels.formulas import FORMULAS


def refuse(arguments: Any, setting: str, problem: str) -> NoReturn:
    """Raise the error that a setting has a problem; the sentence begins with the setting and its value."""
    value = getattr(arguments, setting)
    if isinstance(value, Enum):  # transformers makes some words enums
        value = value.value
    raise SettingError(f"`{setting}={value}` {problem}", setting=setting, value=value)


def to_two_classes(task: Task) -> str:
    """Return how a task gets one logit, for a sentence."""
    return "add `binary_classification`" if len(task.labels) == 2 else "take a task of two classes"


def check_formula(task: Task, training: TrainingArguments) -> None:
    """Refuse an asymmetric kernel of several logits."""
    if FORMULAS[training.kernel_formula].is_asymmetric and not training.binary_classification:
        others = ", ".join(name for name, row in FORMULAS.items() if not row.is_asymmetric)
        problem = f"needs `binary_classification`: {to_two_classes(task)}, or take another formula ({others})"
        refuse(training, "kernel_formula", problem)


def check_snapshots(task: Task, training: TrainingArguments) -> None:
    """Refuse snapshots of a training that cannot have a kernel."""
    if training.snapshot_steps is None:
        return
    if task.regression:
        refuse(training, "kernel_steps", f"is for classes, but {task.name} is a regression task; leave it out")
    check_formula(task, training)


def check_linearised(training: TrainingArguments) -> None:
    """Refuse what training of the linearised model cannot do."""
    for setting in ("evaluate_during_training", "load_best_model_at_end", "resume_from_checkpoint"):
        if getattr(training, setting, None):
            refuse(training, setting, "needs saved models, and `trainer=linearised` saves none: leave it out")
    for setting in ("fp16", "bf16", "gradient_checkpointing", "clip_frozen"):
        if getattr(training, setting):
            refuse(training, setting, "does not work with `trainer=linearised`: leave it out")
