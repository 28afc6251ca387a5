"""The runs that show whether re-solving a kernel predicts re-training: fine-tuning on halves of the train examples.

First the model is trained on all train examples with each learning rate; that with the best metric on dev then trains
it on every subset, with one seed or several.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmntk.data.examples import split_file
from lmntk.data.subsets import subset_files, write_new_files
from lmntk.data.tasks import Task
from lmntk.errors import SettingError
from lmntk.runs.behaviour_plan import OPTIMIZERS, Case
from lmntk.runs.script_run import ScriptRun, hashes, num_gpu, weight_files

OPTIMIZER_OF = {"sgd": "sgd", "signgd": "adam", "asymmetric_signgd": "adam"}
"""The optimizer that each formula stands for."""


@dataclass(frozen=True)
class TrainedData:
    """What a training is of, for `lmntk.runs.run_hours`.

    Attributes:
        case: The task, with the folder of its splits.
        k: The train examples of each class, at most.
    """

    case: Case
    k: int


@dataclass(frozen=True, eq=False)
class SubsetRun(ScriptRun):
    """A training on all train examples or on a subset.

    Attributes:
        plan: What all of them share.
        data: The folder of its split.
        name: The name of its folder.
        rate: The learning rate as it is written.
        seed: The seed of the training.
        k: The train examples of each class, at most.
    """

    plan: "ValidationPlan"
    data: Path
    name: str
    rate: str
    seed: int
    k: int

    kind = "training"
    trainer = "standard"

    def __str__(self) -> str:
        """``training sgd, learning rate 1e-3: subset-0-003-seed-42``."""
        return f"training {self.plan.optimizer}, learning rate {self.rate}: {self.name}"

    @property
    def folder(self) -> Path:
        """``output/OPTIMIZER-lr=…-steps=…-batch=…/NAME``."""
        plan = self.plan
        settings = f"{plan.optimizer}-lr={self.rate}-steps={plan.max_steps}-batch={plan.batch_size}"
        return plan.output / settings / self.name

    @property
    def split(self) -> Path:
        """The folder of the split."""
        return self.data

    @property
    def cell(self) -> TrainedData:
        """What the training is of."""
        return TrainedData(Case(self.plan.task.name, self.plan.task.name, self.plan.data.parent), self.k)

    @property
    def variables(self) -> dict[str, str]:
        """All variables of the script."""
        plan = self.plan
        return {
            "TASK": plan.task.name, "SEED": str(self.seed), "K": str(self.k), "MODEL": plan.model,
            "TYPE": plan.few_shot_type, "TRAINER": self.trainer, "TAG": "validation", "NUM_GPU": num_gpu(self.trainer),
        }  # fmt: skip

    @property
    def flags(self) -> list[str]:
        """The settings as words, and last those that the user gives to every training, which replace them."""
        plan = self.plan
        own = {
            "disable_tqdm": "True", **plan.settings, **OPTIMIZERS[plan.optimizer], "learning_rate": self.rate,
            "max_steps": str(plan.max_steps), "per_device_train_batch_size": str(plan.batch_size),
            "save_strategy": "no",
        }  # fmt: skip
        if not plan.has_dev:
            own["do_eval"] = "False"
        return [*(f"--{name}={value}" for name, value in own.items()), *plan.further]

    @property
    def inputs(self) -> object:
        """The hashes of the model's files."""
        return self.plan.model_hashes

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The splits that are there to be predicted."""
        return ("dev", "test") if self.plan.has_dev else ("test",)


@dataclass(frozen=True, eq=False)
class ValidationPlan:
    """All trainings of a validation.

    Attributes:
        output: Everything is written below this folder.
        model: A folder, or a name on the model hub.
        task: The task.
        few_shot_type: TYPE of run_fewshot.sh.
        data: The folder of the split with all train examples.
        has_dev: Whether it has dev examples.
        settings: The settings of the kernel's run that a training shares.
        subsets: Which train examples each subset keeps, ``[m, E]``.
        classes: The class ids of the train examples, ``[E]``.
        subset_seed: The seed that drew the subsets.
        optimizer: A key of `OPTIMIZERS`.
        rates: The learning rates to choose from, as they are written.
        max_steps: The steps of a training.
        batch_size: The examples of a step.
        seeds: The seeds of the trainings of a subset; the first one chooses the learning rate.
        further: Further words for run.py, given to every training.
    """

    output: Path
    model: str
    task: Task
    few_shot_type: str
    data: Path
    has_dev: bool
    settings: Mapping[str, str]
    subsets: NDArray[np.bool_]
    classes: NDArray[np.int64]
    subset_seed: int
    optimizer: str
    rates: Sequence[str]
    max_steps: int
    batch_size: int
    seeds: Sequence[int]
    further: Sequence[str] = field(default=())

    @functools.cached_property
    def model_hashes(self) -> dict[str, str]:
        """The hashes of the model's files; none for a name on the hub."""
        return hashes(weight_files(Path(self.model)))

    @property
    def searches(self) -> bool:
        """Whether there is a learning rate to choose."""
        return len(self.rates) > 1

    @functools.cached_property
    def choosing_runs(self) -> dict[str, SubsetRun]:
        """The training on all train examples with each learning rate; none if there is nothing to choose."""
        most = int(np.bincount(self.classes).max())
        rates = self.rates if self.searches else ()
        return {rate: SubsetRun(self, self.data, f"all-seed-{self.seeds[0]}", rate, self.seeds[0], most)
                for rate in rates}  # fmt: skip

    @functools.cache  # noqa: B019, a plan lives as long as the command
    def subset_runs(self, rate: str) -> list[list[SubsetRun]]:
        """Return the trainings of each subset with a learning rate, one for each seed."""
        runs = []
        for index, kept in enumerate(self.subsets):
            most = int(np.bincount(self.classes[kept]).max())
            name = f"subset-{self.subset_seed}-{index:03}"
            data = self.output / "subsets" / f"{self.subset_seed}-{index:03}"
            runs.append([SubsetRun(self, data, f"{name}-seed-{seed}", rate, seed, most) for seed in self.seeds])
        return runs

    def write_subsets(self) -> None:
        """Write the data of every subset, unless they are there.

        Raises:
            FileError: A file cannot be read or written, or the data of a subset are there and others.
        """
        train = split_file(self.task, self.data, "train")
        for kept, runs in zip(self.subsets, self.subset_runs(self.rates[0]), strict=True):
            files = subset_files(self.task, train, np.flatnonzero(kept).tolist())
            folder = runs[0].data
            if any(not (folder / name).is_file() or (folder / name).read_bytes() != files[name] for name in files):
                write_new_files(folder, files)

    def check_choice(self) -> None:
        """Check that a learning rate can be chosen.

        Raises:
            SettingError: There is no dev split to choose by.
        """
        if self.searches and not self.has_dev:
            rates = ", ".join(self.rates)
            sentence = f"{self.data} has no dev split to choose by: give `learning_rates` with one of {rates}"
            raise SettingError(sentence, setting="learning_rates", value=rates)

    def check_stale(self) -> None:
        """Check that no finished training would be lost; the data of the subsets are there.

        Raises:
            SettingError: Trainings of other settings or data are there.
        """
        of_subsets = (run for rate in self.rates for runs in self.subset_runs(rate) for run in runs)
        for run in (*self.choosing_runs.values(), *of_subsets):
            run.refuse_stale()
