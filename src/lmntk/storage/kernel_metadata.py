"""The description beside a kernel file: reading, writing and comparing what defines a kernel."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmntk.errors import FileError, KernelMismatchError
from lmntk.storage.atomic import write_text
from lmntk.storage.paths import description_of
from lmntk.storage.readers import read_json

HASH_KEY = "kernel_sha256"
LOGITS_HASH_KEY = "logits_sha256"
DIAGONAL_HASH_KEY = "diagonal_sha256"
HEAD_KEYS = ("from_linearhead", "linear_head_halved", "linear_head_order", "plain_lbfgs")
# Keys that all splits of a run share; `task` differs for a second test set.
SHARED_KEYS = (
    *("formula", "binary_classification", "parameters", "few_shot_type", "template", "mapping", "dtype"),
    *(*HEAD_KEYS, "segments", "random_model_init", "lora", "demonstrations", "grad_dim", "weights_sha256"),
    *("config_sha256", "label_word_ids", "limits", "projection"),
)
HASHES_BY_SPLIT = ("data_sha256", "tokens_sha256")
"""Hashes of a description by split."""
# Null or missing if they do not apply: earlier versions did not write all of them.
OFF_BY_DEFAULT = (*HEAD_KEYS, "segments", "random_model_init", "lora", "demonstrations", "projection")


def read_description(path: Path) -> dict[str, Any] | None:
    """Read the description beside a kernel file; None if there is none.

    Args:
        path: The kernel file.

    Raises:
        FileError: The description cannot be read, is not a JSON object, or holds a value of a wrong type.
    """
    description = description_of(path)

    def refusal(reason: str) -> FileError:
        remedy = "compute the kernel again with `overwrite_kernels=True`"
        return FileError(f"{description} {reason}: {remedy}", path=description)

    try:
        content = read_json(description)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise refusal(f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise refusal("is not a JSON object")
    for key, fits in _FORMS.items():
        if content.get(key) is not None and not fits(content[key]):
            raise refusal(f"has a value of the wrong type for {key}")
    return content


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and _texts(list(value.values()))


def _objects(value: dict[str, Any]) -> bool:
    """Whether what a description says of parts or adapters by name is an object."""
    return all(isinstance(value.get(key, {}), dict) for key in ("parameters", "matrices"))


# The types of the values that the program uses rather than only compares.
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
    "layers": _texts,
    "parts": lambda value: isinstance(value, dict) and _texts(value.get("keys", [])) and _objects(value),
    "lora_kernels": lambda value: isinstance(value, dict) and _objects(value),
    "demonstrations": lambda value: isinstance(value, dict) and _is_count(value.get("draws", 1)),
}


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def kernel_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List how a stored kernel differs from the wanted one.

    Args:
        stored: A description read from disk.
        wanted: What defines the numbers of the kernel now wanted; other keys of `stored` do not count.

    Returns:
        One phrase a difference; none if the kernel can be used.

    >>> kernel_differences({"formula": "sgd", "seconds": 3}, {"formula": "signgd"})
    ['formula: stored sgd, now signgd']
    """
    # JSON turns a tuple into the list that was stored.
    now = json.loads(json.dumps(wanted))
    return [line for key in now for line in _differences(key, *_estimate_in_words(key, stored.get(key), now[key]))]


def comparable_part(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the part of `wanted` that a loaded kernel's description can be compared with, and what cannot be.

    A description without a key of `wanted` comes from a version, or a run, that did not know it.
    """
    written = {*stored, *OFF_BY_DEFAULT}
    comparable = {name: value for name, value in wanted.items() if name in written}
    unchecked = [name for name in stored if name == "label_word_ids" and name not in wanted]
    limits = stored.get("limits") or {}
    if "max_seq_length" in limits and "max_seq_length" not in wanted["limits"]:
        unchecked.append("limits.max_seq_length")
        comparable["limits"] = {**wanted["limits"], "max_seq_length": limits["max_seq_length"]}
    for name in HASHES_BY_SPLIT:
        own, now = stored.get(name) or {}, wanted.get(name, {})
        missing = {mode: value for mode, value in own.items() if mode not in now}
        unchecked += [f"{name}.{mode}" for mode in missing]
        if own:
            comparable[name] = {**missing, **now}
    return comparable, unchecked


def check_one_run(train: Path, other: Path) -> None:
    """Check that two kernels of a folder belong to one run, as far as both have descriptions.

    Args:
        train: The kernel file of train.
        other: The kernel file of another split.

    Raises:
        KernelMismatchError: They belong to different models, formulas or data.
    """
    described = [read_description(path) for path in (train, other)]
    if None in described:
        return
    of_train, of_other = (
        {key: said[key] for key in SHARED_KEYS if key in said}
        | {f"{key} of train": said[key]["train"] for key in HASHES_BY_SPLIT if "train" in (said.get(key) or {})}
        for said in described
        if said is not None
    )
    differing = [key for key in of_train if key in of_other and of_train[key] != of_other[key]]
    if differing:
        raise KernelMismatchError(
            f"{other} and {train.name} beside it do not belong to one run: their descriptions differ in "
            f"{', '.join(differing)}; compute both by one command, with `overwrite_kernels=True`",
            path=other,
            differences=differing,
        )


def write_description(path: Path, description: Mapping[str, Any]) -> None:
    """Write the description beside the kernel file `path`."""
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(description_of(path), text + "\n")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _estimate_in_words(key: str, *values: Any) -> tuple[Any, ...]:
    """Return values with the settings of an estimate spelled out where the other kernel is exact."""
    if key != "projection" or sum(isinstance(value, dict) for value in values) != 1:
        return values
    spelled = "`kernel_engine=projected` `projection_width={width}` `projection_seed={seed}`"
    return tuple(
        spelled.format_map({"width": "?", "seed": "?"} | value) if value else "an exact kernel" for value in values
    )


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
