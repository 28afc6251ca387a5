"""The files a run leaves behind: kernels, logits, metrics and the log.

Every file but the log appears whole or not at all: it is written under another name in its folder, then renamed.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from lmntk.errors import UsageError
from lmntk.files import prepare_output_dir, read_json, write_atomically
from lmntk.tensor_files import plain, read_pair, read_tensor_file

LayerKernels = dict[str, Tensor]
"""What each layer adds to a kernel, by its name, from the input on: of the kernel's shape, and they sum to it."""

HASH_KEY = "kernel_sha256"
ROUNDING = 1e3  # so many units in the last place can the logits of another machine be off
LOGITS_HASH_KEY = "logits_sha256"
OF_THE_HEAD = ("from_linearhead", "linear_head_halved", "linear_head_order", "plain_lbfgs")
# What of a description is the same for all splits of a run; `task` is another for a second test set.
OF_ALL_SPLITS = (
    *("formula", "binary_classification", "parameters", "few_shot_type", "template", "mapping", "dtype"),
    *(*OF_THE_HEAD, "segments", "random_model_init", "lora", "demonstrations", "grad_dim", "weights_sha256"),
    *("config_sha256", "label_word_ids", "limits"),
)
OF_EACH_FILE = ("data_sha256", "tokens_sha256")
"""Hashes of a description by split."""
# Null, or left out, where it does not apply: descriptions of earlier versions do not have all of it.
OFF_BY_DEFAULT = (*OF_THE_HEAD, "segments", "random_model_init", "lora", "demonstrations")


def mode_and_task(split: str, task_key: str) -> tuple[str, str]:
    """Tell how a split is called in the names of files: ``"test:mnli-mm"`` of mnli is the test split of mnli-mm."""
    mode, _, other_task = split.partition(":")
    return mode, other_task or task_key


def kernel_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the kernel of the training examples and those of a split (see `mode_and_task`) lies."""
    return Path(directory) / "{}_kernels_{}.pt".format(*mode_and_task(split, task_key))


def layer_kernels_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the layers' parts of that kernel lie, if they are kept."""
    return Path(directory) / "{}_layer_kernels_{}.pt".format(*mode_and_task(split, task_key))


def layer_results_path(directory: str | Path, task_key: str) -> Path:
    """Where the table lies that says how each layer predicts alone."""
    return Path(directory) / f"layer_results_{task_key}.csv"


def description_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where that kernel's description lies."""
    return _description_of(kernel_path(directory, split, task_key))


def logits_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the logits of the untrained model lie."""
    return Path(directory) / "{}_logits_{}.pt".format(*mode_and_task(split, task_key))


def metrics_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the metrics of a split lie; those of dev are called ``eval``, as in LM-BFF."""
    mode, task = mode_and_task(split, task_key)
    return Path(directory) / f"{'eval' if mode == 'dev' else mode}_results_{task}.txt"


def predictions_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the predictions of a split lie, example by example."""
    return Path(directory) / "{}_predictions_{}.csv".format(*mode_and_task(split, task_key))


def record_path(directory: str | Path, task_key: str) -> Path:
    """Where the arguments and metrics of the run lie, as in its line in the log."""
    return Path(directory) / f"run_{task_key}.json"


def tiles_path(directory: str | Path, split: str, task_key: str) -> Path:
    """Where the finished tiles of a kernel lie until it is there."""
    return Path(directory) / "{}_tiles_{}".format(*mode_and_task(split, task_key))


def ensemble_path(directory: str | Path, split: str, task_key: str, model_id: int, array_id: int) -> Path:
    """Where ``--save_logit`` puts the logits of a test set for `tools/ensemble.py`."""
    return Path(directory) / f"{mode_and_task(split, task_key)[1]}-{model_id}-{array_id}.npy"


def save_kernel(path: Path, kernel: Tensor, labels: Tensor, description: Mapping[str, Any]) -> None:
    """Write a kernel, and beside it the description of what it is.

    Wherever this is interrupted, a kernel file that exists stands beside its own description: the old kernel goes,
    the new description comes, and the new kernel appears last. The description holds the hash of the kernel's file too.

    Args:
        path: From `kernel_path`.
        kernel: [N, C, X, C] or [2, N, C, X, C], written in float64.
        labels: [X], class ids or -1 and +1.
        description: What JSON can hold.
    """

    def write(file: BinaryIO) -> None:
        hashing = _HashingWriter(file)
        torch.save((_own_storage(kernel.to(torch.float64)), _own_storage(labels)), cast(BinaryIO, hashing))
        path.unlink(missing_ok=True)
        _write_description(path, {**description, HASH_KEY: hashing.hexdigest()})

    write_atomically(path, write)


def load_kernel(path: Path) -> tuple[Tensor, Tensor]:
    """Read a kernel file of ours, or one in the same layout that has no description.

    Args:
        path: From `kernel_path`.

    Returns:
        The kernel, [N, C, X, C] or [2, N, C, X, C] in float64, and the labels, [X].

    Raises:
        UsageError: The file is missing, damaged or of another shape, or the description beside it belongs to another.
    """
    kernel, labels = read_pair(path, "kernel", "labels", torch.float64)
    described = read_description(path)
    if described is not None and described.get(HASH_KEY) != file_hash(path):
        raise UsageError(
            f"{path} is not the kernel that {_description_of(path).name} describes: "
            "give the command that made it again, with --overwrite_kernels, or remove the description if the kernel is "
            "right"
        )
    shape = list(kernel.shape)
    directions, rest = (shape[:1], shape[1:]) if kernel.ndim == 5 else ([], shape)
    if directions not in ([], [2]) or len(rest) != 4 or rest[1] != rest[3] or not kernel.numel():
        raise UsageError(
            f"{path} holds an array of shape {shape}, not a kernel [train examples, logits, examples, logits] "
            "with or without a leading 2: give the command that made it again, with --overwrite_kernels"
        )
    if list(labels.shape) != [rest[2]]:
        raise UsageError(
            f"{path} holds labels of shape {list(labels.shape)} for {rest[2]} examples: "
            "give the command that made it again, with --overwrite_kernels"
        )
    return kernel, labels


def save_layer_kernels(path: Path, layers: LayerKernels) -> None:
    """Write the layers' parts of a kernel, in float64.

    Args:
        path: From `layer_kernels_path`.
        layers: Of the kernel's shape each.
    """
    write_atomically(
        path, lambda file: torch.save({name: part.to(torch.float64) for name, part in layers.items()}, file)
    )


def load_layer_kernels(path: Path) -> LayerKernels:
    """Read what `save_layer_kernels` wrote.

    Raises:
        UsageError: The file is missing or damaged, or holds something else.
    """
    parts = read_tensor_file(
        path, "the layers' parts of a kernel", "--kernel_per_layer keeps them, with --overwrite_kernels"
    )
    whole = type(parts) is dict and parts and all(type(name) is str for name in parts)
    if not whole or not all(isinstance(part, Tensor) for part in parts.values()):
        raise UsageError(f"{path} does not hold kernels by the names of layers: remove it")
    numbers = {name: plain(part, path, f"the part of {name}", torch.float64) for name, part in parts.items()}
    if len({part.shape for part in numbers.values()}) > 1:
        raise UsageError(f"{path} does not hold kernels of one shape by the names of layers: remove it")
    return numbers


def read_description(path: Path) -> dict[str, Any] | None:
    """Read the description beside the kernel file `path`; None where there is none.

    Raises:
        UsageError: It is there, but no JSON object, or says something in a form that no description has.
    """
    description = _description_of(path)
    try:
        content = read_json(description)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{description} cannot be read ({error}): give the command that made the kernel again, with "
            "--overwrite_kernels"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{description} is no JSON object: give the command that made the kernel again, with --overwrite_kernels"
        )
    for key, fits in _FORMS.items():
        if content.get(key) is not None and not fits(content[key]):
            raise UsageError(
                f"{description} says of {key} what no description does: compute the kernel again with "
                "--overwrite_kernels"
            )
    return content


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and _texts(list(value.values()))


# The form of what is worked with, and not only compared.
_FORMS: dict[str, Callable[[Any], bool]] = {
    "formula": lambda value: isinstance(value, str),
    "task": lambda value: isinstance(value, str),
    "model": lambda value: isinstance(value, str),
    "template": lambda value: isinstance(value, str) or _texts(value) and len(value) > 0,
    "custom_columns": _texts,
    "labels": _texts,
    "mapping": _texts_by_name,
    "data_files": _texts_by_name,
    "data_sha256": _texts_by_name,
    "tokens_sha256": _texts_by_name,
    "limits": lambda value: isinstance(value, dict),
    "demonstrations": lambda value: isinstance(value, dict) and _is_count(value.get("draws", 1)),
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def kernel_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say in which respects a stored kernel is not the wanted one.

    Args:
        stored: A description read from disk.
        wanted: What defines the numbers of the kernel now wanted; other keys of `stored` do not count.

    Returns:
        Lines such as ``formula: stored sgd, now signgd``; none if the kernel can be used.
    """
    # Through JSON once, so that a tuple equals the list it was stored as.
    now = json.loads(json.dumps(wanted))
    return [line for key in now for line in _differences(key, stored.get(key), now[key])]


def check_one_run(train: Path, other: Path) -> None:
    """See that two kernels of a folder are of one run, as far as the descriptions beside them tell.

    Args:
        train: The kernel file of train.
        other: That of another split.

    Raises:
        UsageError: They are of different models, formulas or data; names in what they differ.
    """
    described = [read_description(path) for path in (train, other)]
    if None in described:
        return
    of_train, of_other = (
        {key: said[key] for key in OF_ALL_SPLITS if key in said}
        | {f"{key} of train": said[key]["train"] for key in OF_EACH_FILE if "train" in (said.get(key) or {})}
        for said in described
        if said is not None
    )
    differing = [key for key in of_train if key in of_other and of_train[key] != of_other[key]]
    if differing:
        raise UsageError(
            f"{other} and {train.name} beside it are not of one run: their descriptions differ in "
            f"{', '.join(differing)}; compute both by one command, with --overwrite_kernels"
        )


def note_logits(kernel: Path, logits: Path | None) -> None:
    """Note in the description of a kernel which logits of the untrained model lie beside it; None: not known."""
    said = read_description(kernel)
    digest = None if logits is None else file_hash(logits)
    if said is not None and said.get(LOGITS_HASH_KEY) != digest:
        _write_description(kernel, {**said, LOGITS_HASH_KEY: digest})


def save_logits(path: Path, logits: Tensor, targets: Tensor) -> None:
    """Write logits [X, C] of the untrained model and the targets [X]."""
    write_atomically(path, lambda file: torch.save((_own_storage(logits), _own_storage(targets)), file))


def load_logits(path: Path) -> tuple[Tensor, Tensor]:
    """Read what `save_logits` wrote: logits [X, C] and targets [X].

    Raises:
        UsageError: The file is missing, damaged or of another shape, or holds NaN or infinity.
    """
    logits, targets = read_pair(path, "logits", "targets")
    if logits.ndim != 2 or list(targets.shape) != [len(logits)]:
        raise UsageError(
            f"{path} holds arrays of shape {list(logits.shape)} and {list(targets.shape)}, not logits [examples, "
            "logits] and targets [examples]: give the command that made it again, with --overwrite_kernels"
        )
    broken = ~torch.isfinite(logits).all(dim=1)
    if broken.any():
        raise UsageError(
            f"{path} holds NaN or infinity, first for example {int(broken.int().argmax())} (counted from 0): compute "
            "it again with --overwrite_kernels"
        )
    return logits, targets


def has_logits(path: Path, logits: Tensor, targets: Tensor) -> bool:
    """Whether a file holds these logits [X, C], up to rounding, and these targets [X]."""
    try:
        stored, labels = load_logits(path)
    except UsageError:
        return False
    if stored.shape != logits.shape or stored.dtype != logits.dtype or labels.tolist() != targets.tolist():
        return False
    return bool((stored - logits).norm() <= ROUNDING * torch.finfo(logits.dtype).eps * logits.norm())


def check_logits(path: Path, targets: Tensor, kernel: Path, labels: Tensor) -> bool:
    """See that logits of the untrained model are of the examples of a kernel beside them.

    Args:
        path: Where the logits are.
        targets: Their targets, [X].
        kernel: The kernel's file.
        labels: The kernel's labels, [X].

    Returns:
        Whether the kernel's description tells that they are of its run.

    Raises:
        UsageError: They are of other examples, or another run's.
    """
    if targets.tolist() != labels.tolist():
        raise UsageError(
            f"{path} has other targets than the labels of {kernel}: they are of other examples; compute both by one "
            "command, with --overwrite_kernels"
        )
    noted = (read_description(kernel) or {}).get(LOGITS_HASH_KEY)
    if noted is not None and noted != file_hash(path):
        raise UsageError(
            f"{path} is not what lay beside {kernel.name} when that was made, as its description tells: give the "
            "command that made the kernel again, without --load_kernels, which renews the logits"
        )
    return noted is not None


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as ``.npy``, its folder made where missing.

    Raises:
        UsageError: The file system refuses.
    """
    prepare_output_dir(path.parent, "--save_logit_dir")
    write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write ``key = value`` lines in the given order, numbers as Python writes them."""
    lines = "".join(f"{key} = {_plain_number(value)}\n" for key, value in metrics.items())
    write_atomically(path, lambda file: _write_text(file, lines))


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what `append_log` appends as a file of its own."""
    text = json.dumps(_strict_json(record), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda file: _write_text(file, text + "\n"))


def append_log(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of strict JSON, safely while other processes append too.

    Args:
        path: The log.
        record: Paths and other objects become text, NaN and infinity null.

    Raises:
        UsageError: The file system refuses.
    """
    line = _as_bytes(json.dumps(_strict_json(record), ensure_ascii=False, allow_nan=False) + "\n")
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
        raise UsageError(f"cannot append to the log {path} ({error.strerror}): make room, or clear the way") from error


class _HashingWriter:
    """Passes bytes on to a file and keeps their SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _write_description(path: Path, description: Mapping[str, Any]) -> None:
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(_description_of(path), lambda file: _write_text(file, text + "\n"))


def _description_of(path: Path) -> Path:
    return path.with_suffix(".json")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(file: BinaryIO, text: str) -> None:
    file.write(_as_bytes(text))


def _as_bytes(text: str) -> bytes:
    r"""Text as UTF-8; of what is none, such as a byte of a folder's name, JSON's own escape: ``\udcff``."""
    return text.encode(errors="backslashreplace")


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, alone in its memory: torch.save would write all of what a slice is a slice of."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()


def _differences(name: str, stored: Any, now: Any) -> Iterator[str]:
    """Compare two JSON values, key by key where both are objects."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in stored if key not in now)]:
            yield from _differences(f"{name}.{key}", stored.get(key), now.get(key))
    elif stored != now:
        shown = (_shown(value)[:8] if "sha256" in name else _shown(value) for value in (stored, now))
        yield "{}: stored {}, now {}".format(name, *shown)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
