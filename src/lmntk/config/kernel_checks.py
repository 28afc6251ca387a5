"""Which settings go together with the kernels of a training and with its linearisation."""

import math
import numbers
from collections.abc import Iterator
from enum import Enum
from typing import Any, NoReturn

from lmntk.config.arguments import ActiveTrainer, TrainingArguments
from lmntk.data.tasks import Task
from lmntk.errors import SettingError, check_numbers
from lmntk.kernels.engines import ENGINES, ESTIMATES
from lmntk.kernels.formulas import FORMULAS
from lmntk.kernels.projection_check import DEFAULT_EXAMPLES, FEWEST_EXAMPLES
from lmntk.solvers.blocked import DEFAULT_TOLERANCE, TOLERANCE_BOUNDS


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


def check_kernel_parts(training: TrainingArguments) -> None:
    """Refuse parts of kernels, and kernels of adapters, that the other settings do not allow."""
    keys = training.part_keys
    if training.kernel_per_layer and keys != ("layer",):
        refuse(training, "kernel_per_layer", "keeps layers alone: leave it out beside `kernel_parts`")
    able = [name for name, engine in ENGINES.items() if engine.keeps_parts_apart]
    if training.kernel_engine not in ("auto", *able, *ESTIMATES):
        takes = f"`kernel_engine={training.kernel_engine}`, which takes all layers at once: take {' or '.join(able)}"
        for setting in ("kernel_per_layer", "kernel_parts", "kernel_lora_rank"):
            if getattr(training, setting):
                refuse(training, setting, f"does not work with {takes}")
    kept = "kernel_parts" if keys and keys != ("layer",) else "kernel_lora_rank"
    if training.load_kernels is not None and getattr(training, kept) is not None:
        problem = "needs the model, and `load_kernels` opens none: leave one of the two out"
        refuse(training, kept, problem)
    if training.kernel_lora_targets is not None and training.kernel_lora_rank is None:
        refuse(training, "kernel_lora_targets", "names layers of `kernel_lora_rank`: add it, or leave this out")
    targets = training.kernel_lora_targets
    if targets is not None and not any(word.strip() for word in targets.split(",")):
        refuse(training, "kernel_lora_targets", "names no layer: give names, or leave it out for all linear layers")
    if training.kernel_lora_rank is not None and training.only_biases:
        refuse(training, "kernel_lora_rank", "adapts weights, which `only_biases` leaves out: drop one of the two")


def check_number_type(training: TrainingArguments) -> None:
    """Refuse what numbers of 8 significant bits are too coarse for."""
    if training.kernel_dtype != "bfloat16":
        return
    trainer = training.active_trainer
    if trainer not in (ActiveTrainer.KERNEL, ActiveTrainer.ZERO_SHOT):
        problem = f"is for kernels: `trainer={trainer.value}` changes weights by less than their rounding; take float32"
        refuse(training, "kernel_dtype", problem)
    if trainer == ActiveTrainer.ZERO_SHOT:
        return
    for setting, problem in problems_of_number_type(training, "kernel_formula"):
        refuse(training, setting, problem)
    if training.fine_tuned_model is not None:
        problem = "has weights that differ by less than `kernel_dtype=bfloat16` rounds: take `kernel_dtype=float32`"
        refuse(training, "fine_tuned_model", problem)


def problems_of_number_type(given: Any, formula: str) -> Iterator[tuple[str, str]]:
    """Go through the settings of a kernel that bfloat16 is too coarse for.

    Args:
        given: Has `kernel_dtype`, `kernel_engine` and the formula.
        formula: The name of the setting of the formula.

    Yields:
        A setting, and what is wrong with it.
    """
    if given.kernel_dtype != "bfloat16":
        return
    if FORMULAS[getattr(given, formula)].signed:
        problem = "takes signs of gradients, of which `kernel_dtype=bfloat16` has one in some hundred wrong: take "
        yield formula, f"{problem}`kernel_dtype=float32`, or `{formula}=sgd`"
    if given.kernel_engine in ENGINES and not ENGINES[given.kernel_engine].multiplies_gradients:
        problem = (
            "adds products inside the model, which `kernel_dtype=bfloat16` rounds to 8 bits: take another engine, "
        )
        yield "kernel_engine", f"{problem}or `kernel_dtype=float32`"


def check_projection(training: TrainingArguments) -> None:
    """Refuse settings of a projection that nothing is projected with, and what a projection cannot keep."""
    for setting, problem in problems_of_projection(training, "kernel_formula"):
        refuse(training, setting, problem)
    if training.kernel_engine not in ESTIMATES:
        return
    if training.kernel_lora_rank is not None:
        problem = "needs the factors of every weight's gradient, which a projection does not keep: leave it out, or "
        refuse(training, "kernel_lora_rank", f"{problem}take another `kernel_engine`")
    if training.fine_tuned_model is not None:
        problem = "asks how far training moves the kernel, which an estimate's error would hide: take another "
        refuse(training, "fine_tuned_model", f"{problem}`kernel_engine`")


def problems_of_projection(given: Any, formula: str) -> Iterator[tuple[str, str]]:
    """Go through the settings of a projection that nothing is projected with, and what a projection cannot keep.

    Args:
        given: Has `kernel_engine`, the settings of a projection and the formula.
        formula: The name of the setting of the formula.

    Yields:
        A setting, and what is wrong with it.
    """
    width, seed, check = given.projection_width, given.projection_seed, given.projection_check
    tolerance = given.projection_tolerance
    if given.kernel_engine not in ESTIMATES:
        defaults = {"projection_width": None, "projection_seed": 0}
        defaults |= {"projection_tolerance": None, "projection_check": DEFAULT_EXAMPLES}
        for setting, default in defaults.items():
            if getattr(given, setting) != default:
                yield setting, "is for `kernel_engine=projected`: add it, or leave this out"
        return
    if FORMULAS[getattr(given, formula)].signed:
        problem = "needs the sign of every number of a gradient, which a projection does not keep: take "
        yield formula, f"{problem}`{formula}=sgd`, or another `kernel_engine`"
    if width is not None and (not _is_whole(width) or width < 1):
        yield "projection_width", "keeps nothing of a gradient: take a whole number, 1 or more, such as 64"
    if not _is_whole(seed):
        yield "projection_seed", "is not a whole number: take one such as 0"
    if not _is_whole(check) or check < FEWEST_EXAMPLES:
        problem = "is too few: the error of an estimate is always measured, on 2 examples of each side or more"
        yield "projection_check", problem
    if tolerance is not None and not (isinstance(tolerance, numbers.Real) and 0 < float(tolerance) < math.inf):
        yield "projection_tolerance", "is not an error that an estimate reaches: take one such as 0.05"


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_snapshots(task: Task, training: TrainingArguments) -> None:
    """Refuse snapshots of a training that cannot have a kernel."""
    if training.snapshot_steps is None:
        return
    if task.regression:
        refuse(training, "kernel_steps", f"is for classes, but {task.name} is a regression task; leave it out")
    check_formula(task, training)


def check_least_squares(training: TrainingArguments) -> None:
    """Refuse what only `lstsq` has for another solver, and what only its direct method has for another method."""
    if training.kernel_influence and training.kernel_solver != "lstsq":
        problem = f"is for `kernel_solver=lstsq`, not {training.kernel_solver}: take it, or leave it out"
        refuse(training, "kernel_influence", problem)
    _check_variance(training)
    method = training.lstsq_method
    check_numbers([TOLERANCE_BOUNDS], vars(training))
    if training.cg_tolerance != DEFAULT_TOLERANCE and method != "cg":
        refuse(training, "cg_tolerance", "is for `lstsq_method=cg`: add it, or leave this out")
    if method in ("auto", "direct"):
        return
    if training.kernel_solver != "lstsq":
        problem = f"is for `kernel_solver=lstsq`, not {training.kernel_solver}: take it, or leave this out"
        refuse(training, "lstsq_method", problem)
    if FORMULAS[training.kernel_formula].is_asymmetric:
        formula = training.kernel_formula
        problem = f"needs a symmetric kernel: take `lstsq_method=direct`, or another formula than {formula}"
        refuse(training, "lstsq_method", problem)
    needs = "needs the eigenvectors of the kernel, which `lstsq_method={}` does not have: "
    for setting in ("kernel_variance", "kernel_influence"):
        if getattr(training, setting):
            refuse(training, setting, f"{needs.format(method)}take `lstsq_method=direct`, or leave it out")
    if training.select_by == "loo" and len(training.solver_grid) > 1:
        problem = f"{needs.format(method)}take `select_by=dev`, or `lstsq_method=direct`"
        refuse(training, "select_by", problem)


def _check_variance(training: TrainingArguments) -> None:
    """Refuse the variance of what is not a Gaussian process."""
    if not training.kernel_variance:
        return
    if training.kernel_solver != "lstsq":
        problem = f"is for `kernel_solver=lstsq`, not {training.kernel_solver}, which is not a Gaussian process: "
        refuse(training, "kernel_variance", f"{problem}take lstsq, or leave the variance out")
    if FORMULAS[training.kernel_formula].is_asymmetric:
        symmetric = " or ".join(name for name, row in FORMULAS.items() if not row.is_asymmetric)
        problem = "needs a symmetric kernel, as the covariance of a Gaussian process is: take `kernel_formula="
        refuse(training, "kernel_variance", f"{problem}{symmetric}`")


def check_linearised(training: TrainingArguments) -> None:
    """Refuse what training of the linearised model cannot do."""
    for setting in ("evaluate_during_training", "load_best_model_at_end", "resume_from_checkpoint"):
        if getattr(training, setting, None):
            refuse(training, setting, "needs saved models, and `trainer=linearised` saves none: leave it out")
    for setting in ("fp16", "bf16", "gradient_checkpointing", "clip_frozen"):
        if getattr(training, setting):
            refuse(training, setting, "does not work with `trainer=linearised`: leave it out")
