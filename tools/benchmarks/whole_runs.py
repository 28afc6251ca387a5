"""Whole programs as processes, in turn with those of another checkout, so that both meet the same load.

Each number is the median of several runs. A further run of a grid takes what the grid takes less what its first run
takes alone, divided by the number of the others.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.checkouts import Side, Usage, busy_processes, compare_kernels
from lmntk.data.examples import split_file
from lmntk.data.tasks import find_task
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.storage.atomic import write_atomically
from lmntk.storage.tables import format_table
from lmntk.storage.wording import duration, quantity

ROOT = Path(__file__).resolve().parents[2]
OURS, OTHER = "ours", "other"
NUM_BUSY = 2
MOST_SEEDS = 2
OTHER_SOLVERS = ("svr", "svc")
LMNTK = "import sys; from lmntk.commands.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Given:
    """What is run: a model on a k-shot folder, and the demo's model and data."""

    model: Path
    task_name: str
    data_dir: Path
    demo_model: Path
    demo_data: Path

    @property
    def k_and_seed(self) -> tuple[str, str]:
        """The two numbers in the name of the k-shot folder."""
        k, _, seed = self.data_dir.name.partition("-")
        return k, seed

    @property
    def seeds(self) -> list[str]:
        """The seed of the k-shot folder, and those of others beside it."""
        k, seed = self.k_and_seed
        others = sorted(path.name.partition("-")[2] for path in self.data_dir.parent.glob(f"{k}-*"))
        return [seed, *(other for other in others if other != seed)][:MOST_SEEDS]


def _run_command(side: Side, given: Given, output: Path, *flags: str | Path) -> list[str | Path]:
    k, seed = given.k_and_seed
    settings = [
        "--few_shot_type",
        "prompt",
        "--trainer",
        "kernel",
        "--num_k",
        k,
        "--seed",
        seed,
        "--overwrite_output_dir",
    ]
    work = ["--do_train", "--do_eval", "--do_predict", "--task_name", given.task_name]
    paths = ["--model_name_or_path", given.model, "--data_dir", given.data_dir, "--output_dir", output]
    return [sys.executable, side.root / "run.py", *settings, *work, *paths, *flags]


def measure_run(side: Side, given: Given) -> Usage:
    """Measure run.py: train, dev and test."""
    output = side.fresh("run")
    used = side.timed(_run_command(side, given, output, "--kernel_solver", "lstsq"))
    side.keep_kernels(output)
    return used


def measure_busy_run(side: Side, given: Given) -> Usage:
    """Measure the same while other processes compute."""
    with busy_processes(NUM_BUSY):
        return measure_run(side, given)


def measure_further_runs(side: Side, given: Given) -> Usage:
    """Measure each further run of a grid of seeds, formulas and solvers."""
    first: dict[str, Any] = {"SEED": given.seeds[0], "kernel_formula": "sgd", "kernel_solver": "lstsq"}
    all_formulas = first | {"SEED": given.seeds, "kernel_formula": ["sgd", "signgd"]}
    return _further(side, given, first, [all_formulas, first | {"kernel_solver": OTHER_SOLVERS[0]}])


def _stored_kernels(side: Side, given: Given) -> Path:
    output = side.work / "stored"
    if not output.is_dir():
        side.timed(_run_command(side, given, output, "--kernel_solver", "lstsq"))
    return output


def measure_solver(side: Side, given: Given) -> Usage:
    """Measure another solver on stored kernels, in a process of its own."""
    stored = _stored_kernels(side, given)
    flags = ["--load_kernels", stored, "--kernel_solver", OTHER_SOLVERS[0]]
    return side.timed(_run_command(side, given, side.fresh("solver"), *flags))


def measure_solver_in_grid(side: Side, given: Given) -> Usage:
    """Measure each further solver on stored kernels, in a grid."""
    stored = str(_stored_kernels(side, given))
    first: dict[str, Any] = {"SEED": given.seeds[0], "load_kernels": stored, "kernel_solver": "lstsq"}
    return _further(side, given, first, [first | {"kernel_solver": ["lstsq", *OTHER_SOLVERS]}])


def _further(side: Side, given: Given, first: dict[str, Any], grids: list[dict[str, Any]]) -> Usage:
    """Measure a grid of one run, then one of several, and return what each of the others takes."""
    alone, _ = _measure_grid(side, given, [first])
    together, runs = _measure_grid(side, given, grids)
    side.keep_kernels(side.root / "result")
    return together.further(alone, runs - 1)


def _measure_grid(side: Side, given: Given, grids: list[dict[str, Any]]) -> tuple[Usage, int]:
    """Measure tools/run_grid.py from the start; return the number of its runs too."""
    shutil.rmtree(side.root / "result", ignore_errors=True)
    _link_data(side, given)
    k, _ = given.k_and_seed
    common = {"TAG": "whole-runs", "TASK": given.task_name, "K": k, "MODEL": str(given.model), "TRAINER": "kernel"}
    file = side.work / "grid.json"
    file.write_text(json.dumps([common | grid for grid in grids]), encoding="utf-8")
    used = side.timed([sys.executable, side.root / "tools" / "run_grid.py", "--grid", file])
    return used, len(list((side.root / "result").rglob("test_results_*.txt")))


def _link_data(side: Side, given: Given) -> None:
    """Put the k-shot folders where run_fewshot.sh looks for them."""
    folder = side.root / "data" / "k-shot-1k-test"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / given.task_name).is_symlink():
        (folder / given.task_name).symlink_to(given.data_dir.parent)


def measure_demo(side: Side, given: Given) -> Usage:
    """Measure the demo's runs, with its splits and its report; model and ratings are there."""
    data, program = side.fresh("data"), side.find("examples/demo/demo.py", "tools/demo.py")
    for folder in given.demo_data.iterdir():
        shutil.copytree(folder / "original", data / folder.name / "original")
    output = side.fresh("demo")
    paths = ["--model", given.demo_model, "--data_dir", data, "--output_dir", output]
    used = side.timed([sys.executable, program, *paths])
    side.keep_kernels(output)
    return used


def measure_help(side: Side, given: Given) -> Usage:
    """Measure `run.py --help`."""
    return side.timed([sys.executable, side.root / "run.py", "--help"])


def measure_lmntk_help(side: Side, given: Given) -> Usage | None:
    """Measure `lmntk --help`, where there is such a command."""
    if side.find("src/lmntk/commands/main.py") is None:
        return None
    return side.timed([sys.executable, "-c", LMNTK, "--help"])


@dataclass(frozen=True)
class WholeRun:
    """A program to measure.

    Attributes:
        purpose: What it does.
        measure: Runs it on one side.
        seconds: About how long one measurement takes on the two cores of a small machine.
        target: The ratio, or the seconds by the clock, to reach.
    """

    purpose: str
    measure: Callable[[Side, Given], Usage | None]
    seconds: float
    target: str = ""


WHOLE_RUNS = {
    "run": WholeRun("run.py: train, dev and test", measure_run, 15, "≤ 0.5×"),
    "busy": WholeRun(f"the same while {NUM_BUSY} processes compute", measure_busy_run, 50, "≤ 0.5×"),
    "grid": WholeRun("each further run of a grid", measure_further_runs, 60, "≤ 0.25×"),
    "solver": WholeRun("another solver on stored kernels", measure_solver, 10),
    "solver-grid": WholeRun("the same, each further one of a grid", measure_solver_in_grid, 25, "≤ 0.3 s"),
    "demo": WholeRun("the demo's 36 runs", measure_demo, 180, "≤ 0.3×"),
    "help": WholeRun("run.py --help", measure_help, 4, "≤ 2 s"),
    "lmntk-help": WholeRun("lmntk --help", measure_lmntk_help, 3, "≤ 2 s"),
}
"""What `--whole_runs` measures, by the words that `--jobs` takes."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of whole runs."""
    group = parser.add_argument_group("whole programs in place of engines, on --model and --data_dir")
    group.add_argument("--whole_runs", "--whole-runs", action="store_true", help="measure whole programs as processes")
    group.add_argument("--against", type=Path, metavar="CHECKOUT", help="the programs of that checkout too, in turn")
    group.add_argument("--jobs", nargs="+", choices=WHOLE_RUNS, help="which programs (default: all)")
    group.add_argument("--repeat", type=int, default=5, help="runs whose median counts (default 5)")
    model, data = ROOT / ".cache" / "demo" / "bert-tiny", ROOT / "data" / "demo"
    group.add_argument("--demo_model", type=Path, default=model, help="the model of the demo")
    group.add_argument("--demo_data", type=Path, default=data, help="the data of the demo")


def measure_whole_runs(given: argparse.Namespace) -> None:
    """Measure programs, print a table, write JSON after each of them."""
    jobs = list(dict.fromkeys(given.jobs or WHOLE_RUNS))
    inputs = _check(given, jobs)
    number = 2 if given.against else 1
    seconds = sum(WHOLE_RUNS[job].seconds for job in jobs) * given.repeat * number
    where = f", in turn with those of {given.against}" if given.against else ""
    how = f"{quantity(given.repeat, 'run')} of each{where}; about {duration(seconds)} on two cores"
    print(f"{quantity(len(jobs), 'program')} ({', '.join(jobs)}), {how}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(jobs) * given.repeat * number, unit="run") as bar:
        sides = [Side.copy(OURS, ROOT, Path(folder))]
        if given.against:
            sides.append(Side.copy(OTHER, given.against.resolve(), Path(folder)))
        for job in jobs:
            rows.append(_measure_job(job, sides, inputs, given.repeat, bar))
            if given.json:
                text = json.dumps(rows, indent=2) + "\n"
                write_atomically(Path(given.json), lambda file, text=text: file.write(text.encode()))
    print(format_table(map(table_row, rows), "markdown", words=["job", "program", "kernels"]), end="")


def _check(given: argparse.Namespace, jobs: Sequence[str]) -> Given:
    """Raise an error for what cannot work, before minutes are spent."""
    check_numbers([Bounds("repeat", 1)], vars(given))
    if given.json is not None and not Path(given.json).resolve().parent.is_dir():
        raise UsageError(f"--json: there is no folder {Path(given.json).resolve().parent}")
    if {"run", "busy", "grid", "solver", "solver-grid"}.intersection(jobs):
        if given.model is None or given.data_dir is None:
            raise UsageError("--whole_runs needs --model and --data_dir, except for the demo and help texts (--jobs)")
        if not Path(given.model).is_dir():
            raise UsageError(f"--model: there is no folder {given.model}")
        for split in ("train", "dev", "test"):
            split_file(find_task(given.task_name), given.data_dir, split)
        k, _, seed = Path(given.data_dir).resolve().name.partition("-")
        if not (k.isdigit() and seed.isdigit()):
            raise UsageError(f"--data_dir {given.data_dir}: a k-shot folder has a name such as 16-42, of K and seed")
    if "demo" in jobs:
        for flag, path in (("--demo_model", given.demo_model), ("--demo_data", given.demo_data)):
            if not path.is_dir():
                raise UsageError(f"{flag}: there is no folder {path}: examples/demo/fetch_demo_assets.py makes it")
    paths = [Path(path or ".").resolve() for path in (given.model, given.data_dir, given.demo_model, given.demo_data)]
    return Given(paths[0], given.task_name, *paths[1:])


def _measure_job(job: str, sides: Sequence[Side], inputs: Given, repeat: int, bar: tqdm) -> dict[str, Any]:
    """Return what a job took on each side, each time; the sides take turns at going first."""
    found: dict[str, list[Usage | None]] = {side.name: [] for side in sides}
    for side in sides:
        side.kernels.clear()
    for number in range(repeat):
        for side in sides if number % 2 == 0 else reversed(sides):
            bar.set_description(f"{job}, {side.name}")
            found[side.name].append(WHOLE_RUNS[job].measure(side, inputs))
            bar.update()
    kernels = compare_kernels(*sides) if len(sides) == 2 else ""
    return summarize(job, {name: [used for used in usages if used] for name, usages in found.items()}, kernels)


def summarize(job: str, usages: dict[str, list[Usage]], kernels: str) -> dict[str, Any]:
    """Return the medians of a job and their ratios, ours divided by the other's.

    Args:
        job: A key of `WHOLE_RUNS`.
        usages: What each run took, by side; no runs where a side lacks the program.
        kernels: What `compare_kernels` found.
    """
    medians = {
        name: {what: statistics.median(getattr(used, what) for used in runs) for what in ("wall", "cpu")}
        for name, runs in usages.items()
        if runs
    }
    ratios = {}
    if OURS in medians and OTHER in medians:
        ratios = {what: medians[OURS][what] / medians[OTHER][what] for what in ("wall", "cpu")}
    runs = {name: [asdict(used) for used in usages[name]] for name in usages}
    program = WHOLE_RUNS[job].purpose
    return {"job": job, "program": program, "medians": medians, "ratios": ratios, "kernels": kernels, "runs": runs}


def table_row(row: dict[str, Any]) -> dict[str, str]:
    """Return a line of the table for what `summarize` returns."""
    cells = {"job": row["job"], "program": row["program"]}
    for what, title in (("wall", "seconds"), ("cpu", "CPU seconds")):
        for name, median in row["medians"].items():
            cells[f"{title}, {name}"] = f"{median[what]:.2f}"
        if what in row["ratios"]:
            cells[f"{title}, ratio"] = f"{row['ratios'][what]:.2f}"
    return cells | {"target": WHOLE_RUNS[row["job"]].target, "kernels": row["kernels"]}
