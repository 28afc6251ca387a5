"""A training with snapshots in the folder of its run, read and checked."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.analysis.saved_run import SavedRun
from lmntk.analysis.statistics import Array
from lmntk.errors import FileError, NotFiniteError, SettingError
from lmntk.storage.training_snapshots import SplitSnapshot, TrainingSnapshot, find_snapshots, read_snapshot

REPEAT = "repeat the training with `kernel_steps=0,last`"

SAME_KERNEL = ("kernel_formula", "kernel_dtype", "parameters", "grad_dim")
"""What the kernels of one training have in common, by keys of a snapshot's description."""


@dataclass(frozen=True)
class Training:
    """The snapshots of a run; each is read when it is asked for.

    Attributes:
        run: The run.
        files: The file of each step, in the order of the steps; the first is step 0.
    """

    run: SavedRun
    files: Mapping[int, Path]

    @classmethod
    def of_run(cls, run: SavedRun) -> "Training":
        """Find the snapshots in the folder of a run.

        Raises:
            FileError: There are none, or none of step 0.
            SettingError: The run's task is a regression task.
        """
        if run.task is not None and run.task.regression:
            raise SettingError(
                f"{run.folder} is a run of {run.task.name}, a regression task: give runs of a task with classes",
                setting="task_name",
                value=run.task.name,
            )
        files = {int(path.name.removeprefix("step-").split("_")[0]): path for path in find_snapshots(run.paths)}
        if 0 not in files:
            what = "no snapshot of step 0" if files else "no snapshots of a training"
            raise FileError(f"{run.folder} holds {what}: {REPEAT}", path=run.folder)
        return cls(run, files)

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots, ascending."""
        return list(self.files)

    @functools.cached_property
    def first(self) -> TrainingSnapshot:
        """The snapshot of step 0."""
        return self.read(0)

    def read(self, step: int) -> TrainingSnapshot:
        """Read the snapshot of a step, and check its shapes and numbers.

        Raises:
            FileError: It is damaged, or its arrays do not belong together.
            NotFiniteError: It holds NaN or infinity.
        """
        path = self.files[step]
        found = read_snapshot(path)
        sound = found.step == step and isinstance(found.description, dict)
        if not sound or not all(map(_is_sound, found.splits.values())) or not _fits(found):
            raise FileError(f"{path} holds arrays that do not belong together: {REPEAT}", path=path)
        arrays = [array for split in found.splits.values() for array in (split.logits, split.linearised)]
        if not all(np.isfinite(array).all() for array in [*arrays, *([] if found.kernel is None else [found.kernel])]):
            remedy = "take a smaller `learning_rate`, and repeat the training"
            raise NotFiniteError(f"{path} holds NaN or infinity: {remedy}", path=path)
        return found

    def read_last(self) -> TrainingSnapshot:
        """Read the snapshot of the last step, T.

        Raises:
            FileError: There is none but that of step 0, or the training went on after it.
        """
        step = self.steps[-1]
        found = self.read(step)
        last = found.description.get("last_step", step)
        if step == 0 or last != step:
            went = f", but the training took {last} steps" if last != step else ""
            raise FileError(
                f"{self.run.folder} lacks the last snapshot: it ends with step {step}{went}: {REPEAT}",
                path=self.files[step],
            )
        return found

    def split(self, snapshot: TrainingSnapshot, split: str) -> SplitSnapshot:
        """Return the logits of a split, whose examples must be those of the first snapshot.

        Raises:
            FileError: The snapshot lacks the split, or it has other labels than the first.
        """
        path = self.files[snapshot.step]
        if split not in snapshot.splits:
            remedy = f"take one of {', '.join(snapshot.splits)}" if snapshot.splits else REPEAT
            raise FileError(f"{path} has no logits of {split}: {remedy}", path=path)
        found, first = snapshot.splits[split], self.first.splits.get(split)
        if first is None or not np.array_equal(found.labels, first.labels) or found.logits.shape != first.logits.shape:
            sentence = f"{path} and {self.files[0].name} beside it hold different examples of {split}: {REPEAT}"
            raise FileError(sentence, path=path)
        return found

    def kernel(self, snapshot: TrainingSnapshot) -> Array | None:
        """Return the kernel of a snapshot, which must be of the first one's kind and shape; None if it has none.

        Raises:
            FileError: The formula, the number type, the parameters or the shape differ.
        """
        first = self.first.kernel
        for name in () if snapshot.kernel is None else SAME_KERNEL:
            pair = snapshot.description.get(name), self.first.description.get(name)
            if None not in pair and pair[0] != pair[1]:
                path = self.files[snapshot.step]
                raise FileError(
                    f"{path} and {self.files[0].name} beside it hold kernels that differ in `{name}` ({pair[0]} and "
                    f"{pair[1]}): {REPEAT}",
                    path=path,
                )
        if snapshot.kernel is not None and first is not None and snapshot.kernel.shape != first.shape:
            path = self.files[snapshot.step]
            shapes = f"{list(snapshot.kernel.shape)} and {list(first.shape)}"
            raise FileError(
                f"{path} and {self.files[0].name} beside it hold kernels of shape {shapes}: {REPEAT}", path=path
            )
        return snapshot.kernel

    @property
    def description(self) -> Mapping[str, Any]:
        """The description of the first snapshot."""
        return self.first.description


def _is_sound(split: SplitSnapshot) -> bool:
    """Whether the arrays of a split have as many examples, at least one, and the classes of its logits."""
    labels, logits = split.labels, split.logits
    if labels.ndim != 1 or logits.ndim != 2 or logits.shape != split.linearised.shape or len(labels) != len(logits):
        return False
    return logits.size > 0 and labels.min() >= 0 and labels.max() < max(2, logits.shape[1])


def _fits(snapshot: TrainingSnapshot) -> bool:
    """Whether the kernel is one of train × train, with one row or several for each train example."""
    kernel = snapshot.kernel
    if kernel is None:
        return True
    directions, (rows, *rest) = kernel.shape[:-4], kernel.shape[-4:] if kernel.ndim in (4, 5) else (0,)
    if directions not in ((), (2,)) or len(rest) != 3 or rest != [rest[0], rows, rest[0]] or not rows:
        return False
    train = snapshot.splits.get("train")
    return train is None or (train.logits.shape[1] == rest[0] and rows % len(train.labels) == 0)
