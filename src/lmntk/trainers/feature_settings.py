"""The settings of features: their own, and what they take over from a run; what they cannot follow is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lmntk.config.arguments import ActiveTrainer, TrainingArguments
from lmntk.config.record_arguments import Arguments, arguments_of_record
from lmntk.errors import FileError, SettingError
from lmntk.kernels import FORMULAS
from lmntk.kernels.engines import ESTIMATES
from lmntk.kernels.projection_check import FEWEST_EXAMPLES
from lmntk.storage.kernel_metadata import read_description

OF_SOLVING = ("adjust_for_init", "f0_scaling")
"""What the solution from features takes over from a run's solver."""

LEAVE_OUT = "leave it out"
WITHOUT_EFFECT = {
    "kernel_solver": "they are solved by least squares: leave it out, or predict with a kernel",
    "load_kernels": "it opens no model, which they need: leave it out",
    "overwrite_kernels": "`overwrite=True` replaces them",
    "kernel_variance": "leave it out, or predict with a kernel",
    "kernel_influence": "leave it out, or predict with a kernel",
    "select_by": "their regularization is chosen on dev: leave it out",
    **dict.fromkeys(("lstsq_method", "flattened_targets", "kernel_gamma", "kernel_lambda"), LEAVE_OUT),
    **dict.fromkeys(("kernel_per_layer", "kernel_parts", "kernel_lora_rank", "fine_tuned_model"), LEAVE_OUT),
    **dict.fromkeys(("kernel_steps", "save_logit", "sweep"), LEAVE_OUT),
}
"""The settings of a kernel run that have no effect on features, and what to do instead."""

TILES = {"train_tile": "per_device_train_batch_size", "x_tile": "per_device_eval_batch_size"}
"""Those of the tiles of a kernel, which features do not have, by the names that they have once they are read."""


@dataclass(frozen=True)
class FeatureSettings:
    """What features are asked for.

    Attributes:
        width: The width k of each side of a weight; None for what `projection_tolerance` chooses, or that of a
            projected run, or `FEATURE_WIDTH`.
        seed: The seed of the random matrices; None for that of a projected run, or 0.
        dimension: The numbers that features are hashed to; None for all columns of all parameters.
        check: The train examples on which the error is measured; None for `projection_check`.
        overwrite: Whether features of another command are replaced.
    """

    width: int | None = None
    seed: int | None = None
    dimension: int | None = None
    check: int | None = None
    overwrite: bool = False


def arguments_of_run(record: Mapping[str, Any], train_kernel: Path, data_dir: Path | None) -> Arguments:
    """Return the arguments of a finished run, which read the splits that the run has read, and adjust as it has.

    Raises:
        FileError: The run has no record.
    """
    if not record or read_description(train_kernel) is None:
        raise FileError(
            f"{train_kernel.parent} does not record the model and prompts of its kernel, so that no features can be "
            "computed: repeat the command that made it",
            path=train_kernel,
        )
    model, data, args = arguments_of_record(record, data_dir=None if data_dir is None else str(data_dir))
    own = {name: record[name] for name in OF_SOLVING if name in record}
    reads = {name: bool(record.get(name, True)) for name in ("do_eval", "do_predict")}
    return model, data, args.with_changes(**own, **reads)


def check_settings(args: TrainingArguments) -> None:
    """Refuse another trainer than the kernel's, formulas with signs, and settings that have no effect on features.

    Raises:
        SettingError: Names the setting and the way out.
    """
    if args.active_trainer != ActiveTrainer.KERNEL:
        raise SettingError(
            f"`trainer={args.trainer}`: features are those of a kernel: give `trainer=kernel`, and not `no_train`",
            setting="trainer",
            value=args.trainer,
        )
    if FORMULAS[args.kernel_formula].signed:
        raise SettingError(
            f"`kernel_formula={args.kernel_formula}` needs the sign of every number of a gradient, which a projection "
            "does not keep: take `kernel_formula=sgd`",
            setting="kernel_formula",
            value=args.kernel_formula,
        )
    if args.kernel_engine not in ("auto", *ESTIMATES):
        _refuse("kernel_engine", args.kernel_engine, f"they are computed in one way: {LEAVE_OUT}")
    for setting, remedy in WITHOUT_EFFECT.items():
        value, default = getattr(args, setting), args.__dataclass_fields__[setting].default
        if value != default and setting not in args.published_settings:
            _refuse(setting, value, remedy)
    for held, setting in TILES.items():
        if getattr(args, held) is not None:
            _refuse(setting, getattr(args, held), f"`kernel_memory_gb` bounds their memory: {LEAVE_OUT}")


def check_size(count: int) -> None:
    """Refuse a number of examples from which no error can be measured, as for kernels.

    Raises:
        SettingError: It is below 2.
    """
    if count < FEWEST_EXAMPLES:
        raise SettingError(
            f"`check={count}` is too few: the error of features is always measured, on 2 train examples or more",
            setting="check",
            value=count,
        )


def _refuse(setting: str, value: object, remedy: str) -> NoReturn:
    raise SettingError(f"`{setting}={value}` has no effect on features: {remedy}", setting=setting, value=value)
