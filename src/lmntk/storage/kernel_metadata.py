"""The description beside a kernel file: what it holds, and whether it fits another command."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lmntk.errors import UsageError
from lmntk.storage.atomic import write_atomically
from lmntk.storage.paths import description_of
from lmntk.storage.readers import read_json

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


def read_description(path: Path) -> dict[str, Any] | None:
    """Read the description beside the kernel file `path`; None where there is none.

    Raises:
        UsageError: It is there, but no JSON object, or says something in a form that no description has.
    """
    description = description_of(path)
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


def _write_description(path: Path, description: Mapping[str, Any]) -> None:
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(description_of(path), lambda file: _write_text(file, text + "\n"))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(file: BinaryIO, text: str) -> None:
    file.write(_as_bytes(text))


def _as_bytes(text: str) -> bytes:
    r"""Text as UTF-8; of what is none, such as a byte of a folder's name, JSON's own escape: ``\udcff``."""
    return text.encode(errors="backslashreplace")


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
