"""Repeat the experiments of the paper: its methods and protocol, its rows and columns.

    lmntk reproduce main-table --model roberta-base --tasks SST-2 trec --seeds 13 42 --jobs 2
    lmntk reproduce solvers --quick
    lmntk reproduce main-table --model roberta-base --published numbers.csv --format markdown

The tables are main-table, no-prompt, subsets, 512-shot and solvers; examples/paper has the runs of each as a grid, a
method a grid. Rows are methods, columns tasks; a cell is the mean of the test metric in percent, with the standard
deviation over seeds. For each seed the solver's settings and the learning rates of fine-tuning are chosen on dev.

A task is a TASK, whose splits are in data/k-shot-1k-test/TASK, or NAME=FOLDER, where FOLDER/K-SEED hold the splits of
the task of the folder's own name. All is written below --output: the runs in TASK/METHOD/K-SEED, the table as
TABLE.txt, .md, .tex, .csv and .json, and TABLE-seeds.csv with what was chosen for every seed. Runs that are done are
not done again: a stopped command goes on. With roberta-base, kernels that tools/download_kernels.py has put into
result/ are used.

--published takes a CSV file with your numbers: table,task,k,method,mean,sd,seeds, in percent; method is a TAG of
examples/paper. --quick runs BERT-tiny on the demo's data, which `make demo` makes, with few seeds and short trainings.
"""

import argparse
import dataclasses
import functools
import signal
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from tqdm import tqdm

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import FileError, KernelMismatchError, SettingError
from lmntk.interrupts import Stopped
from lmntk.runs.behaviour_plan import Case
from lmntk.runs.grid import base
from lmntk.runs.paper_plan import TABLES, Method, PaperCell, PaperPlan, PaperRun, case_of, read_methods, task_of_case
from lmntk.runs.paper_table import (
    Key,
    Score,
    choices_table,
    format_scores,
    read_published,
    results_of,
    scores_of,
    unscored,
)
from lmntk.runs.processes import run_all
from lmntk.runs.progress import Bar
from lmntk.runs.run_hours import estimate, format_estimate, unmeasured
from lmntk.storage.atomic import write_text
from lmntk.storage.wording import quantity

RESUME = "what is done is kept; the same command goes on from there"
ENDINGS = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "json": "json"}
DEMO_TASKS, QUICK_SEEDS = ("tweets", "film-reviews"), (13, 42)
PUBLISHED_MODEL = "roberta-base"
NOT_PUBLISHED = frozenset({
    "exclude_embeddings", "exclude_head", "only_biases", "exclude_first_layers", "apply_lora", "kernel_per_layer",
})  # fmt: skip
"""The settings of kernels that were not published."""


def make_parser() -> Parser:
    """Return the parser of the command line."""
    found = Parser(__doc__)
    add = found.add_argument
    add("table", choices=TABLES, help="which table")
    add("--model", help="folder of the model, or its name on the hub (roberta-base)")
    add("--tasks", nargs="+", metavar="TASK", help="TASK, or NAME=FOLDER (those of the grid)")
    add("--seeds", type=int, nargs="+", help="seeds of the splits and of the runs (those of the grid)")
    add("--k", type=int, nargs="+", help="training examples of each class (those of the grid)")
    add("--output", type=Path, help="all results go here (result/paper, or result/paper-quick)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    add("--quick", action="store_true", help="BERT-tiny on the demo's data, as a trial")
    add("--list", action="store_true", help="print the runs, and do none")
    add("--dry_run", action="store_true",
        help="say how many hours the runs take; does one of each kind of which none is there")  # fmt: skip
    add("--published", type=Path, metavar="FILE", help="CSV file with published numbers to stand beside ours")
    add("--format", choices=tuple(ENDINGS), default="text", help="how to print the table (text)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are missing, and write the table; return the exit status, 1 if a run failed."""
    return run_tool(make_parser(), _reproduce, argv, RESUME)


def _reproduce(given: argparse.Namespace) -> int:
    if given.jobs < 1:
        raise SettingError(f"`jobs` is {given.jobs}, but it must be 1 or more", setting="jobs", value=given.jobs)
    plan = make_plan(given)
    published = read_published(given.published, given.table, plan.cases) if given.published else {}
    plan.check()
    first, second = plan.phases()
    runs = [*first, *second]
    done = [run for run in runs if run.is_done()]
    todo = [run for run in runs if run not in done]
    trials: list[PaperRun] = []
    if given.list:
        print(*(f"{run}{'' if run in todo else ' (done)'}" for run in runs), sep="\n")
    elif given.dry_run:
        trials = unmeasured(done, todo)
    print(f"{quantity(len(runs), 'run')} below {plan.output}: {len(done)} done already, {len(todo)} to do")
    failures = []
    if trials:
        print(f"first one run of each kind of which none is there, {quantity(len(trials), 'run')}; they are kept")
        failures = _do(plan, trials, given.jobs)
        done = [run for run in runs if run.is_done()]
    if todo:
        print(format_estimate(estimate(done, [run for run in runs if run not in done]), given.jobs), end="", flush=True)
    if not (given.list or given.dry_run):
        failures = _do(plan, todo, given.jobs)
        _write(given, plan, published)
    if failures:
        print("missing:", *(f"  {run}\n    {problem}" for run, problem in failures), sep="\n")
    without = [] if given.list or given.dry_run else unscored(plan)
    if without:
        print("without a score:", *(f"  {run}\n    no score on test that is a number" for run in without), sep="\n")
    return 1 if failures else 0


def make_plan(given: argparse.Namespace) -> PaperPlan:
    """Return the runs of a command line.

    Raises:
        UsageError: The model, a task or its data is missing, or something is given twice.
    """
    methods = read_methods(given.table, given.quick)
    names = given.tasks or list(dict.fromkeys(task for method in methods for task in method.tasks))
    seeds = given.seeds or list(dict.fromkeys(seed for method in methods for seed in method.seeds))
    model, output = given.model or PUBLISHED_MODEL, given.output or Path("result/paper")
    if given.quick:
        names = given.tasks or [f"{task}={_of_demo(f'data/demo/{task}/k-shot-1k-test/mr')}" for task in DEMO_TASKS]
        seeds, output = given.seeds or [*QUICK_SEEDS], given.output or Path("result/paper-quick")
        model = given.model or str(_of_demo(".cache/demo/bert-tiny"))
    ks = given.k or list(dict.fromkeys(k for method in methods for k in method.ks))
    if given.quick and not given.k:
        ks = [16]
    cases = [case_of(name) for name in names]
    for values, setting in (([case.name for case in cases], "tasks"), (seeds, "seeds"), (ks, "k")):
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise SettingError(f"`{setting}` has {twice} twice: give each once", setting=setting, value=twice)
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    plan = PaperPlan(given.table, methods, cases, output.resolve(), model, seeds, ks, {})
    found = _downloaded(methods, cases, ks, seeds) if model == PUBLISHED_MODEL else {}
    # A run that was done before kernels were downloaded counts.
    new = {cell: files for cell, files in found.items() if not all(run.is_done() for run in plan.runs(cell).values())}
    return dataclasses.replace(plan, published=new)


def _of_demo(name: str) -> Path:
    path = base() / name
    if not path.is_dir():
        raise FileError(f"`quick` needs {path}, which is not there: `make demo` makes it", path=path)
    return path


def _downloaded(
    methods: Sequence[Method], cases: Sequence[Case], ks: Sequence[int], seeds: Sequence[int]
) -> dict[PaperCell, tuple[Path, tuple[str, ...]]]:
    """Find the downloaded kernels where tools/download_kernels.py puts them, with the settings that they need."""
    from lmntk.storage.kernel_files import load_kernel
    from lmntk.storage.paths import RunPaths

    @functools.cache  # several methods take the same kernels
    def num_logits(files: tuple[Path, ...]) -> int | None:
        try:
            return [load_kernel(file)[0].shape[-1] for file in files][0]
        except (FileError, KernelMismatchError) as error:
            print(f"the downloaded kernel is left out and computed: {error}", file=sys.stderr)
            return None

    found: dict[PaperCell, tuple[Path, tuple[str, ...]]] = {}
    for method, case, k, seed in product(methods, cases, ks, seeds):
        if method.trainer != "kernel" or NOT_PUBLISHED & method.settings.keys() or not _is_published(case):
            continue
        formula = method.settings["kernel_formula"]
        name = f"{case.task}-{PUBLISHED_MODEL}-{method.few_shot_type}-kernel-published-{formula}"
        paths = RunPaths((base() / "result" / name / f"{k}-{seed}").resolve(), case.task.lower())
        files = tuple(paths.kernel(split) for split in ("train", "dev", "test"))
        logits = num_logits(files) if all(path.is_file() for path in files) else None
        if logits is not None:
            extra = ("binary_classification",) if logits == 1 and not method.needs_two_classes else ()
            found[PaperCell(method, case, k, seed)] = Path(paths.folder), extra
    return found


def _is_published(case: Case) -> bool:
    """Whether a case has the published splits: one's own data may be in a folder of the same name."""
    task = task_of_case(case)
    return task is not None and case.folder.resolve() == (base() / "data" / "k-shot-1k-test" / task.folder).resolve()


def _do(plan: PaperPlan, runs: Sequence[PaperRun], jobs: int) -> list[tuple[PaperRun, str]]:
    """Do some runs, and before them those whose kernels they take; return what has failed."""
    failures: list[tuple[PaperRun, str]] = []
    first, second = plan.phases()
    needed = {run.kernels for run in runs}
    phases = [run for run in first if run.folder in needed or run in runs], [run for run in second if run in runs]
    todo = [[run for run in phase if not run.is_done()] for phase in phases]
    # Runs of one table differ in length: the mean over all says more than the last few.
    with tqdm(total=sum(map(len, todo)), unit="run", smoothing=0, disable=not any(todo)) as bar:
        for phase in todo:
            failed = {run.folder for run, _ in failures}
            failures += [(run, "the run that computes its kernel has failed") for run in phase if run.kernels in failed]
            outcome = run_all([run for run in phase if run.kernels not in failed], jobs, Bar(bar))
            failures += outcome.failures
            if outcome.signals:
                stop = Stopped(signal.Signals(outcome.signals[0]))
                every = [*first, *second]
                stop.kept_summary = f"{sum(run.is_done() for run in every)} of {len(every)} runs are done"
                raise stop
    return failures


def _write(given: argparse.Namespace, plan: PaperPlan, published: Mapping[Key, Score]) -> None:
    """Write the table in all forms, and print it in one."""
    results = results_of(plan)
    if not results:
        return
    scores = scores_of(results)
    tables = {form: format_scores(plan, scores, published, form) for form in ENDINGS}
    for form, ending in ENDINGS.items():
        write_text(plan.output / f"{plan.table}.{ending}", tables[form], make_folder=True)
    write_text(plan.output / f"{plan.table}-seeds.csv", choices_table(plan, results))
    ks, seeds = (" ".join(map(str, values)) for values in (plan.ks, plan.seeds))
    print(f"\n{plan.table}, {Path(plan.model).name}, K = {ks}: test metric in percent, mean (sd) over seeds {seeds}\n")
    print(tables[given.format], end="")
    used = len({folder for folder, _ in plan.published.values()})
    if used:
        print(f"downloaded kernels were used in {quantity(used, 'folder')}")
    endings = ", .".join(ENDINGS.values())
    print(f"\nthe table: {plan.output / plan.table}.{endings}; every seed: {plan.output / plan.table}-seeds.csv")
