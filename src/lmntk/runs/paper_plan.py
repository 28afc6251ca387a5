"""The runs of the paper's protocol: the methods of each table, and where their results go.

A table is a file of examples/paper in the form of `lmntk.runs.grid`, one grid for each method, which TAG names. Several
values of `learning_rate` are chosen among on dev; LOAD_KERNELS_TAG names the method whose kernels another one shares.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lmntk.data.examples import split_file
from lmntk.data.tasks import TASKS, Task
from lmntk.errors import FileError
from lmntk.runs.behaviour_plan import Case
from lmntk.runs.case_run import CaseRun
from lmntk.runs.grid import DEFAULTS, Grid, base, read_grids
from lmntk.runs.script_run import hashes, weight_files

TABLES = ("main-table", "no-prompt", "subsets", "512-shot", "solvers")
"""The tables; each is a file of examples/paper."""

GRIDS = Path(__file__).resolve().parents[3] / "examples" / "paper"
"""The folder of the grids; only a checkout has it."""

TITLES = {
    "zero-shot": "zero-shot",
    "linear-head": "linear head",
    "sgd": "SGD fine-tuning",
    "kernel-sgd": "K(SGD)",
    "kernel-sgd-f0": "K(SGD) with f0",
    "adam": "Adam fine-tuning",
    "kernel-signgd": "K(SignGD)",
    "kernel-a-signgd": "K(A-SignGD), asym",
    "kernel-sgd-without-embeddings": "K(SGD) without embeddings",
    "kernel-sgd-without-head": "K(SGD) without head",
    "kernel-sgd-biases": "K(SGD), biases alone",
    "kernel-sgd-upper-layers": "K(SGD) without the first layers",
    "kernel-sgd-lora": "K(SGD) of LoRA",
    "kernel-sgd-logistic": "K(SGD), logistic",
    "kernel-sgd-svr": "K(SGD), svr",
    "kernel-sgd-svc": "K(SGD), svc",
}
"""What tables call a method."""

QUICK: dict[str, str] = {"max_steps": "50", "exclude_first_layers": "1"}
"""The settings of a quick run, for a model of two layers, in place of those of the same names."""

QUICK_RATES = {"sgd": ("1e-2", "1e-1"), "adam": ("1e-4", "1e-3")}
"""The learning rates of a quick run by optimizer."""

_SWITCHES = ("LOAD_KERNELS_TAG", "TAG", "TRAINER", "TYPE", "TASK", "SEED", "K", "MODEL", "NUM_GPU")


@dataclass(frozen=True, eq=False)
class Method:
    """A row of a table.

    Attributes:
        name: A key of `TITLES`.
        trainer: TRAINER of run_fewshot.sh.
        few_shot_type: TYPE of run_fewshot.sh.
        ks: The examples of each class.
        seeds: The seeds.
        tasks: The tasks.
        loads: The method whose kernels this one takes; empty for its own.
        rates: The learning rates to choose among; empty without training.
        settings: The other settings of run.py.
    """

    name: str
    trainer: str
    few_shot_type: str
    ks: tuple[int, ...]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    loads: str
    rates: tuple[str, ...]
    settings: Mapping[str, str | bool]

    @classmethod
    def of(cls, grid: Grid, path: Path, quick: bool) -> "Method":
        """Read the grid of a method.

        Raises:
            FileError: The grid lacks a variable, names an unknown method, or varies what is not chosen among.
        """

        def texts(name: str) -> tuple[str, ...]:
            return tuple(str(value) for value in grid.get(name, [DEFAULTS[name]]))

        (name,), rates = texts("TAG")[:1], grid.get("learning_rate", [])
        if name not in TITLES:
            raise FileError(f"{path}: there is no method '{name}'; there are {', '.join(TITLES)}", path=path)
        fixed = {key: values for key, values in grid.items() if key not in (*_SWITCHES, "learning_rate")}
        varying = next((key for key, values in fixed.items() if len(values) > 1), None)
        if varying is not None:
            sentence = f"{path}: `{varying}` of {name} has several values, but only learning rates are chosen among"
            raise FileError(sentence, path=path)
        settings = {key: values[0] for key, values in fixed.items() if values[0] is not None}
        if quick:
            settings |= {key: value for key, value in QUICK.items() if key in settings}
            rates = [*QUICK_RATES[str(settings["optimizer"])]] if rates else []
        return cls(
            name,
            texts("TRAINER")[0],
            texts("TYPE")[0],
            tuple(map(int, texts("K"))),
            tuple(map(int, texts("SEED"))),
            texts("TASK"),
            texts("LOAD_KERNELS_TAG")[0],
            tuple(map(str, rates)),
            settings,
        )

    @property
    def needs_two_classes(self) -> bool:
        """Whether the method is for two classes only."""
        return bool(self.settings.get("binary_classification"))


def read_methods(table: str, quick: bool = False) -> list[Method]:
    """Read the methods of a table.

    Args:
        table: One of `TABLES`.
        quick: Whether to take the settings of a quick run.

    Raises:
        FileError: The file is missing, as in an installed package, or does not hold grids of methods.
    """
    path = GRIDS / f"{table}.json"
    if not path.is_file():
        sentence = f"there is no {path}: the grids are part of a checkout of the source, not of an installed package"
        raise FileError(sentence, path=path)
    methods = [Method.of(grid, path, quick) for grid in read_grids(path)]
    for method in methods:
        if method.loads and method.loads not in [other.name for other in methods]:
            raise FileError(
                f"{path}: {method.name} takes the kernels of '{method.loads}', which is not there", path=path
            )
    return methods


@dataclass(frozen=True)
class PaperCell:
    """A method on one split.

    Attributes:
        method: The method.
        case: The task and its splits.
        k: The examples of each class.
        seed: The seed.
    """

    method: Method
    case: Case
    k: int
    seed: int


@dataclass(frozen=True, eq=False)
class PaperRun(CaseRun):
    """One of the runs.

    Attributes:
        plan: What all of them share.
        cell: What it is of.
        rate: The learning rate; empty without training.
        kernels: The folder whose kernels are taken; None to compute them, or without kernels.
        extra: Further settings, which those kernels need.
    """

    plan: "PaperPlan"
    cell: PaperCell
    rate: str = ""
    kernels: Path | None = None
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``SST-2 K=16, seed 13: SGD fine-tuning, learning rate 1e-3``."""
        rate = f", learning rate {self.rate}" if self.rate else ""
        return f"{self.cell.case.name} K={self.cell.k}, seed {self.cell.seed}: {self.kind}{rate}"

    @property
    def kind(self) -> str:
        """What the run does, for estimates."""
        return TITLES[self.cell.method.name]

    @property
    def trainer(self) -> str:
        """TRAINER of run_fewshot.sh."""
        return self.cell.method.trainer

    @property
    def folder(self) -> Path:
        """``output/CASE/TYPE-METHOD/K-SEED``."""
        method = self.cell.method
        name = f"{method.few_shot_type}-{method.name}" + (f"-lr={self.rate}" if self.rate else "")
        return self.plan.output / self.cell.case.name / name / self.split.name

    @property
    def few_shot_type(self) -> str:
        """TYPE of run_fewshot.sh."""
        return self.cell.method.few_shot_type

    @property
    def tag(self) -> str:
        """TAG of run_fewshot.sh."""
        return f"paper-{self.cell.method.name}"

    @property
    def flags(self) -> list[str]:
        """The settings as words."""
        settings: dict[str, str | bool] = {"disable_tqdm": "True", **self.cell.method.settings}
        settings |= {name: True for name in self.extra}
        settings |= {"learning_rate": self.rate} if self.rate else {}
        settings |= {"load_kernels": str(self.kernels)} if self.kernels else {}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]


@dataclass(frozen=True)
class PaperPlan:
    """All runs of a table.

    Attributes:
        table: One of `TABLES`.
        methods: Its methods.
        cases: The tasks.
        output: Everything is written below this folder.
        model: A folder, or a name on the model hub.
        seeds: The seeds.
        ks: The examples of each class.
        published: The folders of downloaded kernels and the settings that these need, by method, case, K and seed.
    """

    table: str
    methods: Sequence[Method]
    cases: Sequence[Case]
    output: Path
    model: str
    seeds: Sequence[int]
    ks: Sequence[int]
    published: Mapping[PaperCell, tuple[Path, tuple[str, ...]]]

    @functools.cached_property
    def model_hashes(self) -> dict[str, str]:
        """The hashes of the model's files; none for a name on the hub."""
        return hashes(weight_files(Path(self.model)))

    def cells(self) -> Iterator[PaperCell]:
        """Yield every method on every split that it is for."""
        for method, case, k, seed in product(self.methods, self.cases, self.ks, self.seeds):
            task = task_of_case(case)
            if not (method.needs_two_classes and task is not None and len(task.labels) != 2):
                yield PaperCell(method, case, k, seed)

    def runs(self, cell: PaperCell) -> dict[str, PaperRun]:
        """Return the runs of a cell by learning rate, ``""`` without training."""
        if cell not in self._runs:
            self._runs[cell] = self._runs_of(cell)
        return self._runs[cell]

    @functools.cached_property
    def _runs(self) -> dict[PaperCell, dict[str, PaperRun]]:
        return {}

    def _runs_of(self, cell: PaperCell) -> dict[str, PaperRun]:
        folder, extra = self.published.get(cell, (None, ()))
        if folder is None and cell.method.loads:
            owner = next(method for method in self.methods if method.name == cell.method.loads)
            (run,) = self.runs(PaperCell(owner, cell.case, cell.k, cell.seed)).values()
            folder, extra = run.kernels or run.folder, run.extra
        return {rate: PaperRun(self, cell, rate, folder, extra) for rate in cell.method.rates or ("",)}

    def phases(self) -> tuple[list[PaperRun], list[PaperRun]]:
        """Return the runs that need no other one, and those that take another one's kernels."""
        found: tuple[list[PaperRun], list[PaperRun]] = [], []
        for cell in self.cells():
            found[bool(cell.method.loads)].extend(self.runs(cell).values())
        return found

    def check(self) -> None:
        """Check that the splits are there, and that no finished run of other settings would be lost.

        Raises:
            MissingSplitError: A split is missing; says which command makes it.
            FileError: A split of a case that is not a known task is missing.
            SettingError: Runs of other settings are there.
        """
        for case, k, seed, split in product(self.cases, self.ks, self.seeds, ("train", "dev", "test")):
            task = task_of_case(case)
            if task is not None:
                split_file(task, case.split(k, seed), split)
            elif not case.has_dev(k, seed):
                folder = case.split(k, seed)
                raise FileError(f"{folder} has no dev file, by which settings are chosen: draw that split", path=folder)
        for phase in self.phases():
            for run in phase:
                run.refuse_stale()


def task_of_case(case: Case) -> Task | None:
    """Return the task of a case; None for one's own data."""
    return next((task for task in TASKS.values() if task.key == case.task.lower()), None)


def case_of(text: str) -> Case:
    """Read ``TASK``, or ``NAME=FOLDER``, as `Case.parse` does; the folder of a known task need not be there yet.

    Raises:
        SettingError: The name cannot be that of a folder.
        FileError: The folder of an unknown task is missing.
    """
    known = next((task for task in TASKS.values() if task.key == text.lower()), None)
    if known is None:
        return Case.parse(text)
    return Case(known.name, known.name, base() / "data" / "k-shot-1k-test" / known.folder)
