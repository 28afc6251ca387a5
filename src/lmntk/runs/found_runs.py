"""Runs that are there, made by whatever command: kernels and trainings of the same data belong together."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmntk.errors import DataError, FileError
from lmntk.runs.behaviour_plan import OPTIMIZERS
from lmntk.runs.learning_rate import ChosenRate, choose_rate, dev_score
from lmntk.runs.log import split_folder, task_of
from lmntk.storage.paths import RunPaths
from lmntk.storage.readers import read_json
from lmntk.storage.run_results import is_zero_shot
from lmntk.storage.training_snapshots import find_snapshots, read_snapshot

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
FORMULA_OF = {"sgd": "sgd", "signgd": "signgd", "adam": "signgd"}
"""The formula that stands for each optimizer."""

DEFINING = (
    "model_name_or_path", "few_shot_type", "template", "mapping", "binary_classification", "apply_lora", "lora_r",
    "lora_alpha", "from_linearhead", "fix_layers", "l2_loss", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "label_smoothing_factor",
)  # fmt: skip
"""The settings that trainings share which differ in their data, seed or learning rate at most."""


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
    def is_kernel(self) -> bool:
        """Whether it predicts with the kernel of a model as it is."""
        return self.record.get("trainer") == "kernel" and not self.record.get("fine_tuned_model")

    @property
    def is_training(self) -> bool:
        """Whether it fine-tuned a model, or took the snapshots of one that was saved."""
        if self.record.get("trainer") == "kernel":
            return bool(self.record.get("fine_tuned_model"))
        return self.record.get("trainer") == "standard" and not is_zero_shot(self.record)

    @functools.cached_property
    def snapshot(self) -> Mapping[str, Any]:
        """The description of its last snapshot; empty if it has none."""
        found = find_snapshots(self.paths)
        return read_snapshot(found[-1]).description if found else {}

    @property
    def training_settings(self) -> Mapping[str, Any]:
        """The settings of the training: those of the snapshots where they were taken of a saved model."""
        return {**self.record, **self.snapshot} if self.record.get("trainer") == "kernel" else self.record

    @property
    def definition(self) -> tuple[str, ...]:
        """The values of `DEFINING`."""
        return tuple(str(self.training_settings.get(name)) for name in DEFINING)

    @property
    def optimizer(self) -> str:
        """What trained it, a key of `OPTIMIZERS`."""
        given = {name: self.training_settings.get(name) or "" for name in ("optimizer", "optimizer_variant")}
        wanted = {name: {"optimizer_variant": "", **settings} for name, settings in OPTIMIZERS.items()}
        return next((name for name, settings in wanted.items() if settings == given), str(given["optimizer"]))

    @property
    def snapshot_formula(self) -> str | None:
        """The formula of its snapshots; None if it has none."""
        return str(self.snapshot.get("kernel_formula", "")) if self.snapshot else None

    @property
    def adjusts_for_f0(self) -> bool:
        """Whether it was to start from the untrained model's logits, even if the choice fell on leaving them out."""
        return bool(self.record.get("adjust_for_init"))

    @property
    def leaves_f0_out(self) -> bool:
        """Whether its predictions ignore the untrained model's logits."""
        return not self.adjusts_for_f0 or self.record.get("f0_scaling") == 0

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


KINDS: Mapping[str, tuple[str, Callable[[FoundRun], bool]]] = {
    "kernel_runs": ("of `trainer=kernel`", lambda run: run.is_kernel),
    "fine_tuned_runs": ("of fine-tuning (`trainer=standard`)", lambda run: run.is_training),
}
"""What each setting looks for."""


def find_runs(folders: Sequence[Path], setting: str) -> list[FoundRun]:
    """Find all runs of a kind in some folders, or below them.

    Args:
        folders: Folders of runs, or folders that hold such.
        setting: A key of `KINDS`, which gave them.

    Raises:
        FileError: A folder holds no record of a run, or of none of this kind.
    """
    kind, is_of_kind = KINDS[setting]
    runs: dict[Path, FoundRun] = {}
    for folder in folders:
        paths = sorted(folder.rglob("run_*.json"))
        if not paths:
            cause = "holds no record of a run (run_TASK.json)" if folder.is_dir() else "is not a folder"
            raise FileError(f"`{setting}={folder}` {cause}: give the folder of a run, or one above", path=folder)
        of_folder: dict[Path, FoundRun] = {}
        for path in paths:
            try:
                record = read_json(path)
            except (OSError, ValueError):
                record = None
            if not isinstance(record, dict):
                raise FileError(f"{path} is not a JSON object: remove it, or repeat the run", path=path)
            of_folder[path.resolve()] = FoundRun(path.parent, record)
        fitting = {path: run for path, run in of_folder.items() if is_of_kind(run)}
        if not fitting:
            there = " and ".join(dict.fromkeys(str(run.record.get("trainer")) for run in of_folder.values()))
            sentence = f"`{setting}={folder}` holds no run {kind}, but of {there}: give the folder of one, or one above"
            raise FileError(sentence, path=folder)
        runs = {**fitting, **runs}
    return list(runs.values())


def pair_runs(kernels: Sequence[FoundRun], trainings: Sequence[FoundRun]) -> list[FoundPair]:
    """Pair each training with the kernel of the same data, and of the formula of its snapshots or its optimizer.

    Of several trainings that differ in their learning rate alone, that with the best metric on dev counts.

    Args:
        kernels: Runs with predictions from kernels, with or without f₀.
        trainings: Runs of fine-tuning.

    Raises:
        DataError: A training has no kernel, or there are several kernels or trainings to choose from.
    """
    groups: dict[tuple[Any, ...], list[FoundRun]] = {}
    for training in trainings:
        formula = training.snapshot_formula or FORMULA_OF.get(training.optimizer, "sgd")
        groups.setdefault((training.data, formula, training.optimizer, training.definition), []).append(training)
    pairs = []
    for (data, formula, *_), group in groups.items():
        training, choice = _best(group)
        of_formula = [run for run in kernels if run.data == data and run.record.get("kernel_formula") == formula]
        with_f0 = _one_of([run for run in of_formula if run.adjusts_for_f0], training)
        kernel = _one_of([run for run in of_formula if not run.adjusts_for_f0], training)
        if kernel is None and with_f0 is not None and with_f0.leaves_f0_out:
            kernel, with_f0 = with_f0, None
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
    """Return the training whose learning rate is best on dev; of one rate, that with snapshots."""
    by_rate: dict[str, FoundRun] = {}
    for rate in dict.fromkeys(str(run.training_settings.get("learning_rate")) for run in group):
        of_rate = [run for run in group if str(run.training_settings.get("learning_rate")) == rate]
        with_snapshots = [run for run in of_rate if run.snapshot_formula is not None]
        fitting = with_snapshots or of_rate
        if len(fitting) > 1:
            both = " and ".join(str(run.folder) for run in fitting)
            sentence = f"{both} are trainings of the same data with the same learning rate: give one of them"
            raise DataError(sentence, paths=[run.folder for run in fitting])
        by_rate[rate] = fitting[0]
    if len(by_rate) == 1:
        return next(iter(by_rate.values())), None
    scores = {rate: dev_score(dict(run.record)) for rate, run in by_rate.items()}
    if all(math.isnan(score) for score in scores.values()):
        both = " and ".join(str(run.folder) for run in group)
        raise DataError(f"{both} have no metric on dev to choose by: give one of them", scores=scores)
    choice = choose_rate(scores)
    return by_rate[choice.rate], choice


def _one_of(fitting: Sequence[FoundRun], training: FoundRun) -> FoundRun | None:
    """Return the one kernel that belongs to a training, None if there is none."""
    if len(fitting) > 1:
        names = " and ".join(str(run.folder) for run in fitting)
        sentence = f"{names} are kernels of the same formula and data as {training.folder}: give one of them"
        raise DataError(sentence, paths=[run.folder for run in fitting])
    return fitting[0] if fitting else None


def _what(run: FoundRun) -> str:
    return str(run.record.get("kernel_formula")) + (" with f₀" if run.adjusts_for_f0 else "")


def k_and_seed(run: FoundRun) -> tuple[str, str]:
    """Return K and the seed of the data of a run, as the name of its split's folder has them."""
    return split_folder(dict(run.record))
