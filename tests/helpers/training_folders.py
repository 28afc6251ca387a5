"""Folders such as a training with snapshots and a kernel run leave them, written without a run."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.data.tasks import TASKS
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import SplitSnapshot, TrainingSnapshot, write_snapshot

SETTINGS: Mapping[str, Any] = {
    "seed": 42,
    "data_dir": "data/k-shot-1k-test/SST-2/16-42",
    "model_name_or_path": "tiny",
    "few_shot_type": "prompt",
    "template": "*cls**sent_0*_It_was*mask*.*sep+*",
    "mapping": "{'0': 'terrible', '1': 'great'}",
    "binary_classification": False,
    "apply_lora": False,
    "kernel_formula": "sgd",
}
"""What the record of a run has."""

Logits = Sequence[Sequence[float]] | np.ndarray


def split_of(labels: Sequence[int] | np.ndarray, logits: Logits, linearised: Logits | None = None) -> SplitSnapshot:
    """A split with logits [X, C], and linearised ones, the same if not given."""
    f = np.array(logits, dtype=np.float64)
    linear = f if linearised is None else np.array(linearised, dtype=np.float64)
    return SplitSnapshot(np.array(labels), f, linear)


def logits_for(classes: Sequence[int] | np.ndarray, num_logits: int = 2) -> np.ndarray:
    """Logits [X, C] that predict some classes."""
    ids = np.array(classes)
    return 2.0 * ids[:, None] - 1 if num_logits == 1 else np.eye(num_logits)[ids]


def write_training(
    folder: Path,
    snapshots: Mapping[int, tuple[Mapping[str, SplitSnapshot], np.ndarray | None]],
    *,
    task: str = "sst-2",
    descriptions: Mapping[int, Mapping[str, Any]] | None = None,
    **record: Any,
) -> SavedRun:
    """Write a run with snapshots: the splits and the kernel of each step; the last step is the greatest."""
    _write_record(folder, task, {"trainer": "standard", "optimizer": "sgd", **SETTINGS, **record})
    for step, (splits, kernel) in snapshots.items():
        description = {"step": step, "last_step": max(snapshots), "task_name": task, "kernel_formula": "sgd"}
        description |= (descriptions or {}).get(step, {})
        write_snapshot(RunPaths(folder, task), TrainingSnapshot(step, splits, kernel, description))
    return only_run(folder, task)


def write_kernel_run(
    folder: Path,
    labels: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    *,
    task: str = "sst-2",
    split: str = "test",
    **record: Any,
) -> SavedRun:
    """Write a run of the kernel trainer with predictions of a split."""
    _write_record(folder, task, {"trainer": "kernel", **SETTINGS, **record})
    names = next(known.labels for known in TASKS.values() if known.key == task)
    with RunPaths(folder, task).predictions(split).open("w", encoding="utf-8", newline="") as file:
        rows = [[i, names[a], names[b]] for i, (a, b) in enumerate(zip(labels, predicted, strict=True))]
        csv.writer(file).writerows([["index", "label", "prediction"], *rows])
    return only_run(folder, task)


def only_run(folder: Path, task: str = "sst-2") -> SavedRun:
    """The run of a task in a folder."""
    (run,) = [run for run in read_runs(folder) if run.key == task]
    return run


def _write_record(folder: Path, task: str, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    RunPaths(folder, task).record().write_text(json.dumps(record), encoding="utf-8")
