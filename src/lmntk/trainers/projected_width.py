"""The error of projected kernels in files, and the width that an earlier command with the same tolerance has chosen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmntk.config.arguments import TrainingArguments
from lmntk.errors import SettingError
from lmntk.storage import kernel_metadata
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.tile_store import stored_settings

TOLERANCE_KEY, ERROR_KEY = "projection_tolerance", "projection_error"
"""The keys of the description of a kernel."""


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
    if stored is not None and _of_this_tolerance(stored, TOLERANCE_KEY, args):
        same_width = {**spec, "projection": stored["projection"]}
        if cache.find_reusable("train", same_width) is not None:
            return int(stored["projection"]["width"])
    if cache.load_dir is not None:
        raise SettingError(
            f"`load_kernels`: {path} was not made with `projection_tolerance={args.projection_tolerance:g}` and this "
            "`projection_seed`: give the `projection_width` of its description instead",
            setting="projection_tolerance",
            value=args.projection_tolerance,
        )
    begun = stored_settings(cache.paths.tiles("train"))
    if not _of_this_tolerance(begun, f"--{TOLERANCE_KEY}", args):
        return None
    differences = kernel_metadata.kernel_differences(begun, {**spec, "projection": begun["projection"]})
    return None if differences else int(begun["projection"]["width"])


def described_error(error: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """Return what the description of an estimate says of its error, and of the tolerance if there is one."""
    tolerance = args.projection_tolerance
    return {ERROR_KEY: dict(error)} | ({} if tolerance is None else {TOLERANCE_KEY: tolerance})


def stored_error(path: Path) -> float | None:
    """Return the relative error of the entries of a kernel file, as its description has it; None if it has none."""
    error = (kernel_metadata.read_description(path) or {}).get(ERROR_KEY)
    return float(error["own"]) if isinstance(error, dict) and isinstance(error.get("own"), float) else None


def _of_this_tolerance(stored: Mapping[str, Any], key: str, args: TrainingArguments) -> bool:
    projection = stored.get("projection")
    if not isinstance(projection, dict) or type(projection.get("width")) is not int:
        return False
    return stored.get(key) == args.projection_tolerance and projection.get("seed") == args.projection_seed
