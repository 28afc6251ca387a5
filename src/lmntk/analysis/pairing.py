"""Whether two runs are of one data set, model and prompt, so that their numbers can stand side by side."""

import ast
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lmntk.analysis.saved_run import SavedRun
from lmntk.errors import KernelMismatchError

SHOWN = 60  # letters of a value in a sentence
DATA = ("data_dir", "data_sha256", "tokens_sha256")
"""The settings that differ among the seeds of a task."""
_NAMES = {"formula": "kernel_formula", "model": "model_name_or_path", "lora": "apply_lora"}
"""Settings by the keys that the description of a kernel has for them."""
_SETTINGS = (
    *("task_name", "data_dir", "data_sha256", "model_name_or_path", "few_shot_type", "template", "mapping"),
    *("tokens_sha256", "binary_classification", "apply_lora", "lora_r", "kernel_formula", "grad_dim", "weights_sha256"),
)


def check_pair(
    first: SavedRun,
    second: SavedRun,
    first_description: Mapping[str, Any],
    second_description: Mapping[str, Any],
    without: Collection[str] = (),
) -> None:
    """Check that two runs share data, model, prompt and parameters, as far as both record them.

    Args:
        first: A run, such as a training.
        second: Another one, such as that of the kernel.
        first_description: What the first run's snapshots or kernels record.
        second_description: The same of the second run.
        without: Settings that may differ, such as `DATA` for two seeds.

    Raises:
        KernelMismatchError: They differ; names the settings.
    """
    of_first, of_second = settings_of(first, first_description), settings_of(second, second_description)
    shared = [name for name in _SETTINGS if name in of_first and name in of_second and name not in without]
    if "weights_sha256" in shared:  # it says more than the name of a model, which may be a path
        shared = [name for name in shared if name != "model_name_or_path"]
    differing = [name for name in shared if of_first[name] != of_second[name]]
    if not differing:
        return
    name = differing[0]
    more = f", and in {', '.join(f'`{other}`' for other in differing[1:])}" if len(differing) > 1 else ""
    raise KernelMismatchError(
        f"{first.folder} and {second.folder} differ in `{name}` ({_shown(of_first[name])} and "
        f"{_shown(of_second[name])}){more}: give runs of one task, data, model and prompt",
        path=second.folder,
        differences=differing,
    )


def settings_of(run: SavedRun, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that make its numbers comparable to another's, in one spelling.

    Args:
        run: The run, whose record has its arguments.
        description: What its snapshots or kernels record; the record counts before it.
    """
    described = {_NAMES.get(key, key): value for key, value in description.items()}
    known = {**described, **run.record, "task_name": run.key}
    found = {
        name: _SPELLINGS.get(name, str)(known[name]) for name in _SETTINGS if known.get(name) not in (None, {}, [])
    }
    if not found.get("apply_lora"):
        found.pop("lora_r", None)
    return found


def _last_parts(path: Any) -> str:
    """The folder of the task and that of the split: the parts before them may differ from machine to machine."""
    return "/".join(Path(str(path)).parts[-2:])


def _of_train(value: Any) -> Any:
    return value.get("train") if isinstance(value, dict) else value


def _as_list(template: Any) -> list[str]:
    return [str(part) for part in template] if isinstance(template, list | tuple) else [str(template)]


def _as_words(mapping: Any) -> Any:
    try:
        words = ast.literal_eval(mapping) if isinstance(mapping, str) else mapping
        return {str(label): str(word) for label, word in words.items()}
    except (ValueError, SyntaxError, AttributeError, RecursionError, MemoryError):
        return mapping


_SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "data_dir": _last_parts,
    "model_name_or_path": lambda value: Path(str(value)).name,
    "template": _as_list,
    "mapping": _as_words,
    "binary_classification": bool,
    "apply_lora": bool,
    "data_sha256": _of_train,
    "tokens_sha256": _of_train,
}


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
