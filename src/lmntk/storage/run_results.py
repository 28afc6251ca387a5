"""What a run writes about itself: metrics, its record and its line in the log."""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmntk.errors import FileError
from lmntk.storage.atomic import as_bytes, write_text


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write ``key = value`` lines in the given order, numbers as Python writes them."""
    lines = "".join(f"{key} = {_plain_number(value)}\n" for key, value in metrics.items())
    write_text(Path(path), lines)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record, which `append_log` appends to the log, as a file."""
    text = json.dumps(_strict_json(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def append_log(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of strict JSON, safely while other processes append too.

    Args:
        path: The log file.
        record: The entry; paths and other objects become text, NaN and infinity null.

    Raises:
        FileError: The file system refuses.
    """
    line = as_bytes(json.dumps(_strict_json(record), ensure_ascii=False, allow_nan=False) + "\n")
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            # A process killed while it wrote must not spoil the next one's line.
            file.seek(max(0, size - 1))
            file.write((b"\n" if file.read(1) not in (b"", b"\n") else b"") + line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        message = f"cannot append to the log {path} ({error.strerror}): make room, or free the path"
        raise FileError(message, path=path) from error


def is_zero_shot(settings: Mapping[str, Any]) -> bool:
    """Return whether a run predicts with the model as it is.

    A kernel run without `do_train` still computes its kernel; only `no_train` makes it a zero-shot run.

    Args:
        settings: The run's `trainer`, `do_train` and `no_train`, as its arguments, record or log line have them; a
            setting that older logs lack counts as its default in a training run.

    Examples:
        >>> is_zero_shot({"trainer": "standard", "do_train": False})
        True
        >>> is_zero_shot({"trainer": "kernel", "do_train": False})
        False
    """
    does_not_train = settings.get("do_train") is False and settings.get("trainer") != "kernel"
    return bool(settings.get("no_train")) or does_not_train


def _plain_number(value: Any) -> Any:
    """A numpy or torch scalar as a Python number; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _strict_json(value: Any) -> Any:
    """What JSON can hold of a value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
