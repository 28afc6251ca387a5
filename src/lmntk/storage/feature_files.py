"""Files of features: safetensors that are written and read row by row, and never held in memory.

The layout is that of safetensors: eight bytes with the header's length, the header in JSON, and the tensors. `labels`
and `logits` come first, then `features`. A file that is being written has another name, `.features_…partial`, and the
logits of rows that are not written yet are NaN there: the same command goes on from the rows that a killed one left.
Nothing here replaces the features of another command: `feature_differences` says how they differ, for the caller.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lmntk.errors import FileError, KernelMismatchError
from lmntk.storage.atomic import move_into_place, temporary_file
from lmntk.storage.kernel_metadata import SHARED_KEYS, kernel_differences

ALIGNMENT = 8
FEATURES, LOGITS, LABELS = "features", "logits", "labels"
PARTIAL_SUFFIX = ".partial"
LAYOUT, KERNEL = "layout", "kernel"
"""The metadata that are JSON."""

RECORDED = ("model", "lmntk")
"""The metadata that define no feature: how a command named the model, and the version of the program."""

SHARED = ("format", "width", "seed", "weights_sha256", LAYOUT)
"""The metadata in which all splits agree whose features belong together, besides `SHARED_KEYS` of their kernel."""

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureTable:
    """What a file of features holds, apart from the features.

    Attributes:
        labels: Class ids, or −1 and +1 with a single logit, int64 ``[N]``.
        num_logits: C.
        dimension: d.
        metadata: How the features were computed, and which columns belong to which part.
    """

    labels: NDArray[np.int64]
    num_logits: int
    dimension: int
    metadata: Mapping[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, C and d."""
        return len(self.labels), self.num_logits, self.dimension

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors."""
        n, c, d = self.shape
        return 8 * n + 4 * n * c * (1 + d)

    def header(self) -> bytes:
        """Return the beginning of the file, padded so that numbers are aligned."""
        content = {"__metadata__": dict(self.metadata), **self.tensors()}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return what the header says of the tensors."""
        n, c, d = self.shape
        ends = np.cumsum([8 * n, 4 * n * c, 4 * n * c * d]).tolist()
        return {
            LABELS: {"dtype": "I64", "shape": [n], "data_offsets": [0, ends[0]]},
            LOGITS: {"dtype": "F32", "shape": [n, c], "data_offsets": ends[:2]},
            FEATURES: {"dtype": "F32", "shape": [n, c, d], "data_offsets": ends[1:]},
        }


class FeatureWriter:
    """A file of features that is being written, row by row.

    Args:
        file: The file, which has its header, its labels and its logits, NaN where a row is missing.
        table: What it holds.
    """

    def __init__(self, file: BinaryIO, table: FeatureTable) -> None:
        n, c, d = table.shape
        self._descriptor = file.fileno()
        self._shape = n, c
        self._bytes_of_row = 4 * c, 4 * c * d
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        self._logits_at = 8 + length + 8 * n
        self._features_at = self._logits_at + 4 * n * c

    def missing(self) -> list[int]:
        """Return the rows that are not written yet, in increasing order."""
        n, c = self._shape
        held = os.pread(self._descriptor, 4 * n * c, self._logits_at)
        logits = np.frombuffer(held, "<f4").reshape(n, c)
        return [int(row) for row in np.flatnonzero(np.isnan(logits).any(axis=1))]

    def write(self, rows: Sequence[int], features: Rows, logits: Rows) -> None:
        """Write rows ``[B, C, d]`` and the untrained model's logits of them, ``[B, C]``, none of which is NaN."""
        of_logits, of_features = self._bytes_of_row
        for place, row in enumerate(rows):
            _write_at(self._descriptor, features[place], self._features_at + row * of_features)
            # Last, since it says that the row is there.
            _write_at(self._descriptor, logits[place], self._logits_at + row * of_logits)


def _write_at(descriptor: int, values: Rows, offset: int) -> None:
    left = memoryview(np.ascontiguousarray(values, "<f4").tobytes())
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def partial_path(path: Path) -> Path:
    """Return the name that a file has while it is written."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def is_written(path: Path, table: FeatureTable) -> bool:
    """Return whether a file holds these features: it begins as `table` says, which tells what they were made from."""
    return path.exists() and not feature_differences(path, table)


def bytes_to_write(path: Path, table: FeatureTable) -> int:
    """Return how much room on the disk a file of features still takes: none if it is written."""
    if is_written(path, table):
        return 0
    partial = partial_path(path)
    held = 512 * partial.stat().st_blocks if is_written(partial, table) else 0
    return max(0, len(table.header()) + table.num_bytes - held)


def feature_differences(path: Path, table: FeatureTable, same_split: bool = True) -> list[str]:
    """List how a file of features, which may be unfinished, differs from the wanted one.

    Args:
        path: The file.
        table: What is wanted.
        same_split: Whether the file is of the same split; of another one only what both share is compared.

    Returns:
        One phrase a difference; none if the file's features are the wanted ones, or go with them.
    """
    header = _read_header(path)
    if header is None:
        return ["it cannot be read"]
    stored, wanted = _compared(header.get("__metadata__", {})), _compared(table.metadata)
    if not same_split:
        stored, wanted = (
            {name: of_file.get(name) for name in SHARED}
            | {KERNEL: {key: value for key, value in of_file.get(KERNEL, {}).items() if key in SHARED_KEYS}}
            for of_file in (stored, wanted)
        )
    layouts = stored.pop(LAYOUT, None), wanted.pop(LAYOUT, None)
    differences = kernel_differences(stored, wanted)
    if layouts[0] != layouts[1] and not differences:
        shown = ("no columns" if not layout else f"{layout[-1][-1]} columns" for layout in layouts)
        differences = ["layout: stored {}, now {}".format(*shown)]
    if same_split and not differences:
        size = path.stat().st_size - (table.num_bytes + header[_LENGTH])
        if size or {name: header.get(name) for name in table.tensors()} != table.tensors():
            differences = ["its shape"]
        elif not _has_labels(path, table, header[_LENGTH]):
            differences = ["its labels"]
    return differences


_LENGTH = "length of the header"


def _read_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a file, and its length; None if there is none that can be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                return None
            content = json.loads(file.read(length))
    except (OSError, struct.error, ValueError, RecursionError):
        return None
    return content | {_LENGTH: 8 + length} if isinstance(content, dict) else None


def _compared(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata that define features, JSON as what it says."""
    found: dict[str, Any] = {name: value for name, value in metadata.items() if name not in RECORDED}
    for name in (LAYOUT, KERNEL):
        with contextlib.suppress(ValueError, TypeError):
            found[name] = json.loads(found.get(name, "{}"))
    return found


def _has_labels(path: Path, table: FeatureTable, begin: int) -> bool:
    expected = np.asarray(table.labels, "<i8").tobytes()
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(len(expected)) == expected


@contextlib.contextmanager
def feature_writer(path: Path, table: FeatureTable) -> Iterator[FeatureWriter]:
    """Write a file of features: at the end, if no row is missing, it gets its name; else it stays for a later command.

    Args:
        path: The file to make.
        table: What it holds.

    Raises:
        KernelMismatchError: There are features of another command, finished or not, or a file that is something else.
        FileError: The file system refuses, or has too little room.
    """
    partial = partial_path(path)
    for own in (path, partial):
        if own.exists():
            refuse_others(own, feature_differences(own, table))
    try:
        if not partial.exists():
            _begin(partial, table)
        with partial.open("r+b") as file:
            writer = FeatureWriter(file, table)
            yield writer
            os.fsync(file.fileno())
            whole = not writer.missing()
        if whole:
            partial.replace(path)
    except OSError as error:
        raise FileError(
            f"cannot write {path} ({error.strerror}): make room, or free the path, and give the same command again; "
            "what was finished is kept",
            path=path,
        ) from error


def refuse_others(path: Path, differences: Sequence[str]) -> None:
    """Refuse to replace a file of other features.

    Args:
        path: The file.
        differences: How it differs, from `feature_differences`.

    Raises:
        KernelMismatchError: There are differences.
    """
    if differences:
        raise KernelMismatchError(
            f"{path} was made by another command ({'; '.join(differences)}): pass `overwrite=True` to replace its "
            "features, or another `output_dir` to keep both",
            path=path,
            differences=list(differences),
        )


def _begin(partial: Path, table: FeatureTable) -> None:
    """Make the file with NaN for logits, and zeros, which take no room on the disk yet, for features."""
    n, c, _ = table.shape
    with temporary_file(partial) as file:
        file.write(table.header())
        file.write(np.asarray(table.labels, "<i8").tobytes())
        file.write(np.full((n, c), np.nan, "<f4").tobytes())
        file.truncate(len(table.header()) + table.num_bytes)
        move_into_place(file, partial)


class StoredFeatures:
    """A file of features, memory-mapped: rows are read where they are asked for.

    Args:
        path: The file.

    Attributes:
        path: The file.
        shape: N, C and d.
        labels: Class ids, or −1 and +1 with a single logit, int64 ``[N]``.
        logits: The untrained model's, float32 ``[N, C]``.
        metadata: How the features were computed.

    Raises:
        FileError: The file is missing or damaged, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "numpy") as file:
                found = set(file.keys())
                if not {FEATURES, LOGITS, LABELS} <= found:
                    raise _unusable(path, f"holds {', '.join(sorted(found)) or 'nothing'}, not features")
                own = file.get_slice(FEATURES)
                if own.get_dtype() != "F32":
                    raise _unusable(path, f"holds features of another type than F32 ({own.get_dtype()})")
                self.shape: tuple[int, int, int] = tuple(own.get_shape())
                self.labels: NDArray[np.int64] = file.get_tensor(LABELS)
                self.logits: NDArray[np.float32] = file.get_tensor(LOGITS)
                self.metadata: dict[str, str] = file.metadata() or {}
        except FileNotFoundError as error:
            raise FileError(f"{path} does not exist: compute the features first", path=path) from error
        except (OSError, SafetensorError) as error:
            raise _unusable(path, f"cannot be read as features ({' '.join(str(error).split())})") from error
        if len(self.shape) != 3 or self.labels.shape != self.shape[:1] or self.logits.shape != self.shape[:2]:
            raise _unusable(path, "holds arrays that do not belong together")
        self._features: Rows = np.memmap(path, "<f4", "r", _offset(path, FEATURES), self.shape)

    def rows(self, start: int, stop: int) -> Rows:
        """Return the features of some consecutive examples, float32 ``[n, C, d]``, which are read as they are used."""
        return self._features[start:stop]

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """The first column of each part and the column after its last one, by name."""
        return {name: (start, stop) for name, start, stop in json.loads(self.metadata["layout"])}


def _offset(path: Path, name: str) -> int:
    """Return where the numbers of a tensor begin in a file of safetensors that was found to be whole."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length + int(json.loads(file.read(length))[name]["data_offsets"][0])


def _unusable(path: Path, reason: str) -> FileError:
    return FileError(f"{path} {reason}: compute the features again", path=path)
