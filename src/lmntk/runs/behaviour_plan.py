"""The runs that show whether the kernel describes fine-tuning: which there are, and where their results go.

For every task, K, seed and pair of a formula and an optimizer: the kernel, with and without the untrained logits f₀; a
training with each learning rate; and the training with the chosen one once more, with snapshots of its first and last
step. Kernels belong to a formula and trainings to an optimizer: pairs share them.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

from lmntk.data.examples import find_user_file
from lmntk.data.tasks import TASKS
from lmntk.errors import FileError, SettingError, UnknownNameError, suggest
from lmntk.runs.case_run import CaseRun
from lmntk.runs.grid import base
from lmntk.runs.script_run import hashes, weight_files
from lmntk.solvers import SOLVERS

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd"},
    "signgd": {"optimizer": "sgd", "optimizer_variant": "signgd"},
    "adam": {"optimizer": "adam"},
}
"""The settings of each optimizer."""

KERNELS: dict[str, dict[str, str]] = {
    "sgd": {"kernel_solver": "lstsq", "kernel_regularization": "auto"},
    "signgd": {"kernel_solver": "lstsq", "kernel_regularization": "auto"},
    "asymmetric_signgd": {"kernel_solver": "asym", "kernel_gamma": "auto"},
}
"""The settings of the kernel of each formula; those that are ``"auto"`` are chosen on dev."""

STEPS = "0,last"
"""The steps of a training that the table needs."""

_TASK_KEYS = {task.key: task for task in TASKS.values()}


@dataclass(frozen=True)
class Pair:
    """A kernel formula, and the optimizer that it is to describe."""

    formula: str
    optimizer: str

    @classmethod
    def parse(cls, text: str) -> "Pair":
        """Read ``formula:optimizer``.

        Raises:
            UnknownNameError: There is no such formula or optimizer.

        Examples:
            >>> Pair.parse("signgd:adam")
            Pair(formula='signgd', optimizer='adam')
        """
        formula, _, optimizer = text.partition(":")
        for name, options, kind in ((formula, KERNELS, "kernel formula"), (optimizer, OPTIMIZERS, "optimizer")):
            if name not in options:
                sentence = f"`pairs={text}`: {suggest(name, options, kind)}; a pair is formula:optimizer"
                raise UnknownNameError(sentence, name=name, kind=kind, options=[*options])
        return cls(formula, optimizer)

    def __str__(self) -> str:
        return f"{self.formula}:{self.optimizer}"


@dataclass(frozen=True)
class Case:
    """A task with its k-shot splits.

    Attributes:
        name: What to call it, which is also the name of its folder of runs.
        task: The name of the task.
        folder: The folder of the splits, ``K-SEED``.
    """

    name: str
    task: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read ``TASK``, or ``NAME=FOLDER`` where the folder's own name is that of the task.

        Raises:
            SettingError: The name cannot be that of a folder.
            FileError: The folder of the splits is missing.
        """
        name, equals, place = text.partition("=")
        if equals:
            folder = Path(place)
            task = folder.name
        else:
            known = _TASK_KEYS.get(name.lower())
            task = known.name if known else name
            folder = base() / "data" / "k-shot-1k-test" / (known.folder if known else name)
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            sentence = f"'{name}' of '{text}' becomes the name of a folder: use letters, digits, '-', '_' and '.'"
            raise SettingError(sentence, setting="cases", value=text)
        if not folder.is_dir():
            ways = "a case is a TASK of data/k-shot-1k-test, or NAME=FOLDER where FOLDER/K-SEED hold its splits"
            raise FileError(f"'{text}': there is no folder {folder}: {ways}", path=folder)
        return cls(name, task, folder.resolve())

    def split(self, k: int, seed: int) -> Path:
        """The folder of a split."""
        return self.folder / f"{k}-{seed}"

    def has_dev(self, k: int, seed: int) -> bool:
        """Whether a split has examples to choose settings by."""
        folder, task = self.split(k, seed), _TASK_KEYS.get(self.task.lower())
        if task is not None:
            return (folder / task.file_name("dev")).is_file()
        return find_user_file(folder, "dev") is not None


@dataclass(frozen=True)
class Cell:
    """One training: a case, its K and seed, and a pair."""

    case: Case
    k: int
    seed: int
    pair: Pair

    @property
    def row(self) -> str:
        """The name of the row that the cell belongs to, with all other seeds."""
        return f"{self.case.name} K={self.k} {self.pair}"

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class BehaviourRun(CaseRun):
    """One of the runs.

    Attributes:
        plan: What all of them share.
        cell: What it is of; a kernel is of the first of the cells that share it.
        kind: What the run does, for messages and estimates: ``"kernel sgd"``.
        trainer: TRAINER of run_fewshot.sh.
        name: The name of its folder in that of its case.
        settings: The settings of run.py.
    """

    plan: "BehaviourPlan"
    cell: Cell
    kind: str
    trainer: str
    name: str
    settings: Mapping[str, str | bool]

    def __str__(self) -> str:
        """``tweets K=16, seed 13: kernel sgd``, in a training also the learning rate."""
        rate = self.settings.get("learning_rate")
        what = f"{self.kind}, learning rate {rate}" if rate else self.kind
        return f"{self.cell.case.name} K={self.cell.k}, seed {self.cell.seed}: {what}"

    @property
    def folder(self) -> Path:
        """``output/CASE/NAME/K-SEED``."""
        return self.plan.output / self.cell.case.name / self.name / self.split.name

    @property
    def tag(self) -> str:
        """TAG of run_fewshot.sh."""
        return f"behaviour-{self.cell.case.name}-{self.name}"

    @property
    def flags(self) -> list[str]:
        """The settings as words, and last those that the user gives to every run, which replace them."""
        own = {"disable_tqdm": "True", **self.settings}
        if "dev" not in self.evaluated:
            own["do_eval"] = "False"
        settings = [(name, value) for name, value in own.items() if self.plan.given(name) is None]
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings]
        return [*words, *self.plan.further]

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The splits that are there to be predicted."""
        return ("dev", "test") if self.cell.case.has_dev(self.cell.k, self.cell.seed) else ("test",)


@dataclass(frozen=True)
class BehaviourPlan:
    """All runs of a table.

    Attributes:
        output: Everything is written below this folder.
        model: A folder, or a name on the model hub.
        cases: The tasks.
        ks: The training examples of each class.
        seeds: The seeds of the k-shot splits, and of the runs.
        pairs: The formulas, each with the optimizer that it is to describe.
        rates: The learning rates of each optimizer as they are written.
        max_steps: The steps of a training.
        batch_size: The examples of a step.
        further: Further words for run.py, given to every run.
    """

    output: Path
    model: str
    cases: Sequence[Case]
    ks: Sequence[int]
    seeds: Sequence[int]
    pairs: Sequence[Pair]
    rates: Mapping[str, Sequence[str]]
    max_steps: int
    batch_size: int
    further: Sequence[str] = field(default=())

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """All trainings, row by row."""
        points = product(self.cases, self.ks, self.pairs, self.seeds)
        return [Cell(case, k, seed, pair) for case, k, pair, seed in points]

    @functools.cached_property
    def model_hashes(self) -> dict[str, str]:
        """The hashes of the model's files; none for a name on the hub."""
        return hashes(weight_files(Path(self.model)))

    @functools.cached_property
    def _runs(self) -> dict[Path, BehaviourRun]:
        return {}

    def kernel(self, cell: Cell) -> BehaviourRun:
        """The run that computes the kernel of a formula and predicts without f₀."""
        formula = cell.pair.formula
        return self._run(cell, f"kernel {formula}", "kernel", f"kernel-{formula}", self._of_kernel(formula))

    def with_f0(self, cell: Cell) -> BehaviourRun | None:
        """The run that predicts from the same kernel around f₀; None if the solver cannot."""
        formula = cell.pair.formula
        solver = self.given("kernel_solver") or KERNELS[formula]["kernel_solver"]
        if solver in SOLVERS and not SOLVERS[solver].allows_f0:
            return None
        settings = self._of_kernel(formula) | {"adjust_for_init": True, "f0_scaling": "auto"}
        settings["load_kernels"] = str(self.kernel(cell).folder)
        return self._run(cell, f"kernel {formula} with f₀", "kernel", f"kernel-{formula}-f0", settings)

    def training(self, cell: Cell, rate: str) -> BehaviourRun:
        """The training with one of the learning rates."""
        optimizer = cell.pair.optimizer
        name = f"training-{optimizer}-{self._length(rate)}"
        return self._run(cell, f"training {optimizer}", "standard", name, self._training_settings(optimizer, rate))

    def snapshots(self, cell: Cell, rate: str) -> BehaviourRun:
        """The same training with snapshots of its first and last step, kernels of the formula among them."""
        formula, optimizer = cell.pair.formula, cell.pair.optimizer
        settings = self._training_settings(optimizer, rate) | {"kernel_steps": STEPS, "kernel_formula": formula}
        name = f"snapshots-{formula}-{optimizer}-{self._length(rate)}"
        return self._run(cell, f"training {optimizer} with snapshots of {formula}", "standard", name, settings)

    def searches(self, cell: Cell) -> bool:
        """Whether there is a learning rate to choose."""
        return len(self.rates[cell.pair.optimizer]) > 1

    def first_runs(self) -> Iterator[BehaviourRun]:
        """Yield the runs that need no other: the kernels, and the trainings of a choice, each once."""
        found = dict[Path, BehaviourRun]()
        for cell in self.cells:
            rates = self.rates[cell.pair.optimizer] if self.searches(cell) else ()
            for run in (self.kernel(cell), *(self.training(cell, rate) for rate in rates)):
                found.setdefault(run.folder, run)
        yield from found.values()

    def second_runs(self, rates: Mapping[Cell, str]) -> Iterator[BehaviourRun]:
        """Yield the runs that need others, each once: predictions around f₀, and trainings with snapshots.

        Args:
            rates: The learning rate of each cell; the training of a cell that is missing is left out.
        """
        found = dict[Path, BehaviourRun]()
        for cell in self.cells:
            training = self.snapshots(cell, rates[cell]) if cell in rates else None
            for run in (self.with_f0(cell), training):
                if run is not None:
                    found.setdefault(run.folder, run)
        yield from found.values()

    def given(self, setting: str) -> str | None:
        """Return the value that the further words give a setting; None if they do not name it."""
        value = None
        for word, following in pairwise([*self.further, ""]):
            name, equals, text = word.partition("=")
            if word.startswith("--") and name[2:].replace("-", "_") == setting:
                value = text if equals else following
        return value

    def check(self) -> None:
        """Check that there are splits, what may be chosen without dev, and that no finished run would be lost.

        Raises:
            FileError: A split is missing.
            SettingError: A setting is missing, or runs of other settings are there.
        """
        for pair in self.pairs:
            if pair.formula == "asymmetric_signgd" and self.given("binary_classification") is None:
                sentence = f"the pair {pair} needs one logit: give `binary_classification` to all runs, after --"
                raise SettingError(sentence, setting="binary_classification")
        for case, k, seed in product(self.cases, self.ks, self.seeds):
            folder = case.split(k, seed)
            if not folder.is_dir():
                sentence = f"there is no split {folder}: draw it with `lmntk splits`, or leave out this K or this seed"
                raise FileError(sentence, path=folder)
            if not case.has_dev(k, seed):
                self._check_without_dev(folder)
        trainings = [self.snapshots(cell, rate) for cell in self.cells for rate in self.rates[cell.pair.optimizer]]
        for run in (*self.first_runs(), *self.second_runs({}), *trainings):
            run.refuse_stale()

    def _check_without_dev(self, folder: Path) -> None:
        """Refuse choices by dev where there is none."""
        missing = []
        for optimizer in dict.fromkeys(pair.optimizer for pair in self.pairs):
            if len(self.rates[optimizer]) > 1:
                missing.append(f"`learning_rates={optimizer}=…` with one of {', '.join(self.rates[optimizer])}")
        if self.given("select_by") != "loo":
            settings = (item for pair in self.pairs for item in KERNELS[pair.formula].items())
            names = {name for name, value in settings if value == "auto"} | {"f0_scaling"}
            unset = [name for name in sorted(names) if not _is_number(self.given(name))]
            if unset:
                missing.append("after --: " + ", ".join(f"`{name}` with one number" for name in unset))
        if missing:
            sentence = f"{folder} has no dev split to choose settings by: give {'; and '.join(missing)}"
            raise SettingError(sentence, setting="learning_rates", folder=folder)

    @staticmethod
    def _of_kernel(formula: str) -> dict[str, str | bool]:
        return {"kernel_formula": formula, **KERNELS[formula]}

    def _training_settings(self, optimizer: str, rate: str) -> dict[str, str | bool]:
        length = {"max_steps": str(self.max_steps), "per_device_train_batch_size": str(self.batch_size)}
        return {**OPTIMIZERS[optimizer], "learning_rate": rate, **length, "save_strategy": "no"}

    def _length(self, rate: str) -> str:
        return f"lr={rate}-steps={self.max_steps}-batch={self.batch_size}"

    def _run(self, cell: Cell, kind: str, trainer: str, name: str, settings: Mapping[str, str | bool]) -> BehaviourRun:
        run = BehaviourRun(self, cell, kind, trainer, name, settings)
        return self._runs.setdefault(run.folder, run)


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
