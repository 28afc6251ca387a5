"""The error of projected kernels in files, and the width that an earlier command with the same tolerance has chosen."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmntk.config.arguments import TrainingArguments
from lmntk.errors import SettingError
from lmntk.storage import kernel_metadata
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.tile_store import stored_settings

logger = logging.getLogger(__name__)

TOLERANCE_KEY, CHECK_KEY, ERROR_KEY = "projection_tolerance", "projection_check", "projection_error"
"""The keys of the description of a kernel."""

ROUNDING = 1e-3
"""How far numbers with the four digits of a description may be from those that were compared before."""


def awaits_width(args: TrainingArguments) -> bool:
    """Return whether a tolerance is to choose the width, which is not known yet."""
    return args.projection_tolerance is not None and args.projection_width is None


def stored_width(cache: KernelCache, spec: Mapping[str, Any], args: TrainingArguments) -> int | None:
    """Return the width of the train kernel, or of its unfinished tiles, if the same tolerance has chosen it.

    Args:
        cache: The run's kernel files.
        spec: What defines the train kernel; its width does not count.
        args: The arguments of the run.

    Raises:
        SettingError: The kernels of another folder are to be loaded, and another tolerance has chosen their width.
        UsageError: The kernel is of another command, apart from its width.
    """
    path = cache.source_paths.kernel("train")
    stored = kernel_metadata.read_description(path) if path.exists() else None
    if stored is not None and _of_this_tolerance(stored, "", args):
        same_width = {**spec, "projection": stored["projection"]}
        if cache.find_reusable("train", same_width) is not None:
            return int(stored["projection"]["width"])
    if cache.load_dir is not None:
        width = ((stored or {}).get("projection") or {}).get("width")
        instead = "the `projection_width` of its description" if width is None else f"`projection_width={width}`"
        raise SettingError(
            f"`load_kernels`: {path} was not made with `projection_tolerance={args.projection_tolerance:g}`, this "
            f"`projection_seed` and this `projection_check`: give {instead} instead",
            setting="projection_tolerance",
            value=args.projection_tolerance,
        )
    begun = stored_settings(cache.paths.tiles("train"))
    if not _of_this_tolerance(begun, "--", args):
        return None
    differences = kernel_metadata.kernel_differences(begun, {**spec, "projection": begun["projection"]})
    return None if differences else int(begun["projection"]["width"])


def described_error(error: Mapping[str, Any], args: TrainingArguments, given_width: bool) -> dict[str, Any]:
    """Return what the description of an estimate says of its error, and of the tolerance if one chose its width."""
    tolerance = None if given_width else args.projection_tolerance
    found = {CHECK_KEY: args.projection_check, ERROR_KEY: dict(error)}
    return found | ({} if tolerance is None else {TOLERANCE_KEY: tolerance})


def check_stored_error(path: Path, args: TrainingArguments, given_width: bool) -> None:
    """Hold the error of a train kernel that is in a file against the command, as that of a new one would be.

    Args:
        path: The file.
        args: The arguments of the run.
        given_width: Whether the command has a width, which a tolerance beside it must find small enough.

    Raises:
        SettingError: The error is larger than the tolerance.
    """
    stored = kernel_metadata.read_description(path) or {}
    error, check = stored.get(ERROR_KEY), stored.get(CHECK_KEY)
    if args.projection is None or not isinstance(error, dict):
        return
    if check is not None and check != args.projection_check:
        said = "%s: its error was measured with `projection_check=%s`, and `overwrite_kernels=True` measures it anew"
        logger.warning(said, path, check)
    tolerance = args.projection_tolerance
    if tolerance is None or not given_width:
        return
    upper = max(error["own"], error["mean"] + error["std"])
    if upper > tolerance * (1 + ROUNDING):
        raise SettingError(
            f"`projection_width={args.projection_width}` is too small for `projection_tolerance={tolerance:g}`: the "
            f"relative error of the entries of {path} is {upper:.2g}; allow more, or "
            + (
                "take a larger width with `overwrite_kernels=True` or another `output_dir`"
                if args.load_kernels is None
                else "load kernels of a larger width"
            ),
            setting="projection_width",
            value=args.projection_width,
        )


def stored_error(path: Path) -> float | None:
    """Return the relative error of the entries of a kernel file, as its description has it; None if it has none."""
    error = (kernel_metadata.read_description(path) or {}).get(ERROR_KEY)
    return float(error["own"]) if isinstance(error, dict) and isinstance(error.get("own"), float) else None


def _of_this_tolerance(stored: Mapping[str, Any], prefix: str, args: TrainingArguments) -> bool:
    projection = stored.get("projection")
    if not isinstance(projection, dict) or type(projection.get("width")) is not int:
        return False
    asked = {TOLERANCE_KEY: args.projection_tolerance, CHECK_KEY: args.projection_check}
    same = all(stored.get(f"{prefix}{key}") == value for key, value in asked.items())
    return same and projection.get("seed") == args.projection_seed
