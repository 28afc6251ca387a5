"""The checkpoint folders of the stock trainer: which there are, and which files each lacks."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmntk.errors import FileError
from lmntk.models.checkpoints import ADAPTERS_FILE, WEIGHTS_FILE

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def optimizer_shape(state: Mapping[str, Any]) -> list[tuple[int, frozenset[str]]]:
    """Return the number of parameters and the names of the settings of each group in an optimizer's state."""
    return [(len(group["params"]), frozenset(group) - {"params", "initial_lr"}) for group in state["param_groups"]]


def missing_files(checkpoint: Path) -> list[str]:
    """Return the files that are missing or damaged in a checkpoint and without which training cannot continue."""
    missing = [name for name in (STATE_FILE, OPTIMIZER_FILE, SCHEDULER_FILE) if not (checkpoint / name).is_file()]
    if not any((checkpoint / name).is_file() for name in (WEIGHTS_FILE, ADAPTERS_FILE)):
        missing.append(WEIGHTS_FILE)
    if STATE_FILE not in missing:
        try:
            json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            missing.append(f"readable {STATE_FILE}")
    return missing


def recorded_step(checkpoint: Path) -> int:
    """Return the step that the state in a checkpoint records, whatever the folder is called."""
    return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders of the stock trainer, the earliest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint folder; 0 for any other folder."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return 0 if match is None else int(match[1])


@contextlib.contextmanager
def refusing_damaged_files(checkpoint: str | None, files: str) -> Iterator[None]:
    """Turn any error that torch raises over damaged files of a checkpoint into one sentence."""
    try:
        yield
    except Exception as error:  # damaged files make torch raise anything
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise FileError(
            f"`resume_from_checkpoint`: training cannot continue from {checkpoint}, its {files} do not fit or are "
            f"damaged ({reason}): give the settings of the run that wrote it (`optimizer`, `fix_layers`, "
            "`apply_lora`), or name another checkpoint",
            path=checkpoint,
        ) from error
