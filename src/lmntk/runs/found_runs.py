"""Runs that are there, made by whatever command: kernels and trainings of the same data belong together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmntk.errors import DataError, FileError
from lmntk.runs.behaviour_plan import OPTIMIZERS
from lmntk.runs.learning_rate import ChosenRate, choose_rate, dev_score
from lmntk.runs.log import split_folder, task_of
from lmntk.storage.paths import RunPaths
from lmntk.storage.readers import read_json
from lmntk.storage.training_snapshots import find_snapshots, read_snapshot

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
FORMULA_OF = {"sgd": "sgd", "signgd": "signgd", "adam": "signgd"}
"""The formula that stands for each optimizer."""


@dataclass(frozen=True, eq=False)
class FoundRun:
    """A run that is there.

    Attributes:
        folder: Its folder.
        record: Its settings and metrics.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def paths(self) -> RunPaths:
        """The names of its files."""
        return RunPaths(self.folder, task_of(dict(self.record)))

    @property
    def data(self) -> tuple[str, Path]:
        """The task, and the folder of the split: absolute where it is there, else as it is recorded."""
        return task_of(dict(self.record)), self.place(str(self.record.get("data_dir", "")))

    @property
    def optimizer(self) -> str:
        """What trained it, a key of `OPTIMIZERS`."""
        given = {name: self.record.get(name) or "" for name in ("optimizer", "optimizer_variant")}
        wanted = {name: {"optimizer_variant": "", **settings} for name, settings in OPTIMIZERS.items()}
        return next((name for name, settings in wanted.items() if settings == given), str(given["optimizer"]))

    @property
    def snapshot_formula(self) -> str | None:
        """The formula of its snapshots; None if it has none."""
        found = find_snapshots(self.paths)
        return str(read_snapshot(found[-1]).description.get("kernel_formula", "")) if found else None

    @property
    def starts_from_f0(self) -> bool:
        """Whether its predictions start from the untrained model's logits."""
        return bool(self.record.get("adjust_for_init")) and self.record.get("f0_scaling") != 0

    def kernel_files(self) -> list[Path]:
        """Return the kernels that it has computed or loaded, with their descriptions and the untrained logits."""
        loaded = self.record.get("load_kernels")
        places = [self.folder, *([self.place(str(loaded))] if loaded else [])]
        names = (f"*_kernels_{self.paths.task_key}.*", f"*_logits_{self.paths.task_key}.pt")
        found = [path for place in places for name in names for path in sorted(place.glob(name))]
        return list({path.name: path for path in reversed(found)}.values())

    def place(self, recorded: str) -> Path:
        """Return a recorded folder, absolute where it is there.

        A relative path counts from the run's working directory: this one, or a folder above the run's.
        """
        places = (Path(), *self.folder.absolute().parents)
        found = next((place / recorded for place in places if (place / recorded).is_dir()), Path(recorded))
        return found.resolve() if found.is_dir() else found

    @property
    def has_weights(self) -> bool:
        """Whether it has saved its model."""
        return any((self.folder / name).is_file() for name in WEIGHTS)


@dataclass(frozen=True, eq=False)
class FoundPair:
    """A training and the kernels of the same data.

    Attributes:
        training: The training.
        kernel: The kernel of its formula.
        with_f0: The same around f₀; None if it is not there.
        choice: How the training was chosen among several with other learning rates; None if there was one.
    """

    training: FoundRun
    kernel: FoundRun
    with_f0: FoundRun | None
    choice: ChosenRate | None

    @property
    def formula(self) -> str:
        """The formula of the kernel."""
        return str(self.kernel.record.get("kernel_formula", ""))


def find_runs(folders: Sequence[Path], setting: str) -> list[FoundRun]:
    """Find all runs in some folders, or below them.

    Args:
        folders: Folders of runs, or folders that hold such.
        setting: What gave them, for the error.

    Raises:
        FileError: A folder holds no record of a run.
    """
    runs: dict[Path, FoundRun] = {}
    for folder in folders:
        paths = sorted(folder.rglob("run_*.json"))
        if not paths:
            cause = "holds no record of a run (run_TASK.json)" if folder.is_dir() else "is not a folder"
            raise FileError(f"`{setting}={folder}` {cause}: give the folder of a run, or one above", path=folder)
        for path in paths:
            try:
                record = read_json(path)
            except (OSError, ValueError):
                record = None
            if not isinstance(record, dict):
                raise FileError(f"{path} is not a JSON object: remove it, or repeat the run", path=path)
            runs.setdefault(path.resolve(), FoundRun(path.parent, record))
    return list(runs.values())


def pair_runs(kernels: Sequence[FoundRun], trainings: Sequence[FoundRun]) -> list[FoundPair]:
    """Pair each training with the kernel of the same data, and of the formula of its snapshots or its optimizer.

    Of several trainings of the same data, formula and optimizer, that with the best metric on dev counts.

    Args:
        kernels: Runs with predictions from kernels, with or without f₀.
        trainings: Runs of fine-tuning.

    Raises:
        DataError: A training has no kernel, or there are several kernels or trainings to choose from.
    """
    groups: dict[tuple[Any, ...], list[FoundRun]] = {}
    for training in trainings:
        formula = training.snapshot_formula or FORMULA_OF.get(training.optimizer, "sgd")
        groups.setdefault((training.data, formula, training.optimizer), []).append(training)
    pairs = []
    for (data, formula, _), group in groups.items():
        training, choice = _best(group)
        kernel, with_f0 = (_kernel(kernels, training, data, formula, with_f0=f0) for f0 in (False, True))
        if kernel is None:
            there = ", ".join(f"{run.folder} ({_what(run)})" for run in kernels)
            sentence = (
                f"{training.folder} has no kernel of the formula {formula} and of its data {data[1]} in "
                f"`kernel_runs`, but {there}: compute it with `kernel_formula={formula}`"
            )
            raise DataError(sentence, path=training.folder, formula=formula)
        pairs.append(FoundPair(training, kernel, with_f0, choice))
    return pairs


def _best(group: Sequence[FoundRun]) -> tuple[FoundRun, ChosenRate | None]:
    if len(group) == 1:
        return group[0], None
    by_rate = {str(run.record.get("learning_rate")): run for run in group}
    if len(by_rate) < len(group):
        both = " and ".join(str(run.folder) for run in group)
        sentence = f"{both} are trainings of the same data with the same learning rate: give one of them"
        raise DataError(sentence, paths=[run.folder for run in group])
    scores = {rate: dev_score(dict(run.record)) for rate, run in by_rate.items()}
    if all(math.isnan(score) for score in scores.values()):
        both = " and ".join(str(run.folder) for run in group)
        raise DataError(f"{both} have no metric on dev to choose by: give one of them", scores=scores)
    choice = choose_rate(scores)
    return by_rate[choice.rate], choice


def _kernel(
    kernels: Sequence[FoundRun], training: FoundRun, data: tuple[str, Path], formula: str, *, with_f0: bool
) -> FoundRun | None:
    fitting = [
        run
        for run in kernels
        if run.data == data and run.record.get("kernel_formula") == formula and run.starts_from_f0 == with_f0
    ]
    if len(fitting) > 1:
        names = " and ".join(str(run.folder) for run in fitting)
        sentence = f"{names} are kernels of the same formula and data as {training.folder}: give one of them"
        raise DataError(sentence, paths=[run.folder for run in fitting])
    return fitting[0] if fitting else None


def _what(run: FoundRun) -> str:
    return str(run.record.get("kernel_formula")) + (" with f₀" if run.starts_from_f0 else "")


def k_and_seed(run: FoundRun) -> tuple[str, str]:
    """Return K and the seed of the data of a run, as the name of its split's folder has them."""
    return split_folder(dict(run.record))
