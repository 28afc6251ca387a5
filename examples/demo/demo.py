#!/usr/bin/env python3
"""The demo: a small model predicts the mood of tweets and film reviews from 16 examples a class, in nine ways.

These are: as it is, by a linear head, by four of its kernels, and fine-tuned with SGD, Adam and LoRA. The demo draws
the k-shot splits, starts `run_fewshot.sh` once for every task, method and seed, and prints one table of means over the
seeds, and another that says whether the kernel describes fine-tuning. The model and the sentences come from
`fetch_demo_assets.py`. `demo_causal.py` is another `Demo`.

A run is not started again if its results are there and the stamp beside them fits: a hash over its command, its split,
the model's files and the program. A run that was stopped goes on from the kernels and tiles that it kept. If the stamp
does not fit, the run's folder is deleted first. In the end a report shows some of the runs.

Every run takes the two classes as one logit, the difference of the label words: the asymmetric kernel needs that, and
the others do the same so that their numbers can be compared. All runs use the CPU, one core each, several at a time:
for so small a model more cores would mostly wait for each other. Those of a large model go one at a time, on all cores.
"""

import argparse
import functools
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import numpy as np

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.kshot import read_originals, write_splits
from lmntk.data.tasks import find_task
from lmntk.errors import FileError, UsageError
from lmntk.runs import processes
from lmntk.runs.gather import percent
from lmntk.runs.log import Trial, find_trials
from lmntk.runs.processes import LOG, STAMP, Progress, read_stamp, run_all
from lmntk.runs.script_run import ScriptRun, digest, hashes, weight_files
from lmntk.storage.run_results import append_log
from lmntk.storage.tables import format_table

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Method:
    """A way to predict: its name, run_fewshot.sh's TRAINER and run.py's flags."""

    name: str
    trainer: str
    flags: str


@dataclass(frozen=True)
class Demo:
    """What a demo shows of which model.

    Attributes:
        name: The name of its target in the Makefile, and of the folder of its results.
        purpose: What it does, in a sentence.
        model: The name of the model's folder.
        tasks: What is predicted.
        methods: How it is predicted.
        seeds: The seeds of the k-shot splits, and of the runs.
        flags: Flags of run.py that all methods share.
        alone: Whether each run has the machine for itself, and its messages are shown. Else several share it, a core
            each.
        reported: The methods that the report shows, of the first task and the last seed; none: all.
        described: What the closing table compares: the name of a row, a kernel, and a training that it is to describe.
    """

    name: str
    purpose: str
    model: str
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    flags: str = ""
    alone: bool = False
    reported: tuple[str, ...] = ()
    described: tuple[tuple[str, str, str], ...] = ()


# The learning rates are the best of a few on dev, mean over tasks and seeds: of 1e-3 to 3e-1 for SGD, 1e-5 to 3e-3 for
# Adam, 1e-4 to 3e-2 for LoRA.
TRAINING = "--per_device_train_batch_size 8 --max_steps 100 --save_strategy no"
# Snapshots of the first and last step, for the table of what the kernel describes.
SNAPSHOTS = "--kernel_steps 0,last --kernel_formula"
DEMO = Demo(
    name="demo",
    purpose="Predict the mood of tweets and film reviews in nine ways.",
    model="bert-tiny",
    tasks=("tweets", "film-reviews"),
    methods=(
        Method("zero-shot", "standard", "--no_train"),
        Method("linear-head", "linearhead", ""),
        Method("kernel-sgd", "kernel", "--kernel_formula sgd --kernel_solver lstsq"),
        Method("kernel-signgd", "kernel", "--kernel_formula signgd --kernel_solver lstsq"),
        Method("kernel-asymmetric", "kernel", "--kernel_formula asymmetric_signgd --kernel_solver asym"),
        Method("kernel-lora", "kernel", "--kernel_formula sgd --kernel_solver lstsq --apply_lora"),
        Method("tuning-sgd", "standard", f"--optimizer sgd --learning_rate 1e-2 {TRAINING} {SNAPSHOTS} sgd"),
        Method("tuning-adam", "standard", f"--optimizer adam --learning_rate 1e-3 {TRAINING} {SNAPSHOTS} signgd"),
        Method("tuning-lora", "standard", f"--optimizer adam --learning_rate 3e-3 --apply_lora {TRAINING}"),
    ),
    seeds=(13, 42),
    reported=("kernel-sgd", "kernel-signgd", "kernel-asymmetric", "tuning-adam"),
    described=(("sgd:sgd", "kernel-sgd", "tuning-sgd"), ("signgd:adam", "kernel-signgd", "tuning-adam")),
)
TASK_NAME = "mr"  # whose template and label words all tasks have
K = 16
MODE = "k-shot-1k-test"
# A run of the small model takes about 1 GB of memory.
RUNS_AT_A_TIME = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class DemoRun(ScriptRun):
    """One call of run_fewshot.sh: a task, a method and a seed of a demo."""

    runner: "DemoRunner"
    task: str
    method: Method
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.method.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.runner.output / self.task / self.method.name / f"{K}-{self.seed}"

    @property
    def directory(self) -> Path:
        return self.folder  # where the run appends its line to a log

    @property
    def split(self) -> Path:
        return self.runner.data / self.task / MODE / TASK_NAME / f"{K}-{self.seed}"

    @property
    def flags(self) -> list[str]:
        demo = self.runner.demo
        return [
            "--binary_classification",
            "--disable_tqdm",
            str(not demo.alone),
            *demo.flags.split(),
            *self.method.flags.split(),
        ]

    @property
    def variables(self) -> dict[str, str]:
        variables = {"TASK": TASK_NAME, "SEED": str(self.seed), "K": str(K), "MODEL": str(self.runner.model)}
        tag = f"{self.runner.demo.name}-{self.task}-{self.method.name}"
        return variables | {"TYPE": "prompt", "TRAINER": self.method.trainer, "TAG": tag, "NUM_GPU": "0"}

    @property
    def inputs(self) -> object:
        return self.runner.file_hashes

    def environment(self, jobs: int) -> dict[str, str]:
        threads = {} if self.runner.demo.alone else {"OMP_NUM_THREADS": "1"}
        # The model is local: no hub need be asked about it.
        return super().environment(1) | threads | {"HF_HUB_OFFLINE": "1"}

    def trial(self) -> Trial:
        """Return what the run found."""
        (trial,) = find_trials([self.record], TASK_NAME)
        return trial


@dataclass(frozen=True)
class DemoRunner:
    """The runs of a demo: where it finds its model and data, and where it leaves its results."""

    demo: Demo
    model: Path
    data: Path
    output: Path

    @functools.cached_property
    def runs(self) -> list[DemoRun]:
        """All runs, in the order of the table."""
        points = itertools.product(self.demo.tasks, self.demo.methods, self.demo.seeds)
        return [DemoRun(self, *point) for point in points]

    @functools.cached_property
    def file_hashes(self) -> dict[str, str]:
        """The hashes of the model's files and of the program's."""
        program = [*(ROOT / "src" / "lmntk").rglob("*.py"), ROOT / "run.py", processes.RUN_SCRIPT]
        return hashes([*program, *weight_files(self.model)])

    def draw_splits(self) -> None:
        """Draw the k-shot splits of every task; they are the same every time."""
        for task in self.demo.tasks:
            originals = read_originals(find_task(TASK_NAME), self.data / task / "original")
            list(write_splits(originals, self.data / task, MODE, K, self.demo.seeds))

    def finish_runs(self) -> dict[DemoRun, Trial]:
        """Start the runs that are not done, some at a time; return what all found, in their order.

        Raises:
            UsageError: A run failed.
            Stopped: A signal arrived.
        """
        lines, todo = Lines(self.demo, len(self.runs)), [run for run in self.runs if not run.is_done()]
        for run in self.runs:
            if run not in todo:
                lines.report(run, "there already")
        _, failures, signals = run_all(todo, 1 if self.demo.alone else RUNS_AT_A_TIME, lines, stop_at_failure=True)
        for run, problem in failures:
            raise UsageError(f"{run}: {problem}", folder=run.folder)
        if signals:
            raise interrupts.Stopped(signal.Signals(signals[0]))
        return {run: run.trial() for run in self.runs}

    def write_log(self, trials: Iterable[Trial]) -> Path:
        """Write a log of all runs in place of what was there, which may be of another version."""
        log = self.output / "log"
        log.unlink(missing_ok=True)
        for trial in trials:
            append_log(log, trial.entry)
        return log

    def write_report(self) -> Path:
        """Write a page of pictures of some runs, unless one of the same runs is there; return where it is."""
        task, seed = self.demo.tasks[0], self.demo.seeds[-1]
        runs = [run for run in self.runs if (run.task, run.seed) == (task, seed)]
        shown = [run for run in runs if run.method.name in self.demo.reported] or runs
        folder = self.output / "report"
        stamp, page = digest([run.stamp for run in shown]), folder / "report.html"
        if read_stamp(folder) != stamp or not page.is_file():
            from lmntk.report import write_report  # here, since matplotlib takes seconds that --help need not wait

            page = write_report([run.folder for run in shown], folder)
            (folder / STAMP).write_text(stamp, encoding="utf-8")
        return page

    def asked_of_influence(self) -> Path | None:
        """The folder of a run whose kernel, with `lstsq`, tells of its train examples; None if no method is one."""
        task, seed = self.demo.tasks[0], self.demo.seeds[-1]
        of_one = (run for run in self.runs if (run.task, run.seed) == (task, seed) and run.method.name == "kernel-sgd")
        return next((run.folder for run in of_one), None)

    def describe(self) -> str | None:
        """Write the table of whether the kernel describes fine-tuning, and return it as text; None without rows."""
        runs = {(run.task, run.method.name, run.seed): run for run in self.runs}
        names = {method.name for method in self.demo.methods}
        described = [row for row in self.demo.described if names.issuperset(row[1:])]
        if not described:
            return None
        from lmntk.analysis.behaviour import Thresholds
        from lmntk.report.behaviour_files import SeedRuns, make_rows, write_table  # here, as in `write_report`

        points = itertools.product(self.demo.tasks, described, self.demo.seeds)
        seeds = [
            SeedRuns(
                f"{task} {name}",
                TASK_NAME,
                runs[task, training, seed].folder,
                runs[task, kernel, seed].folder,
            )
            for task, (name, kernel, training), seed in points
        ]
        rows, problems = make_rows(seeds, Thresholds(), "test")
        for error in problems.values():
            raise error
        return write_table(rows, Thresholds(), self.output)["text"]


class Lines(Progress[DemoRun]):
    """A line for each run that is done; where runs go alone, also what they print."""

    def __init__(self, demo: Demo, total: int) -> None:
        self._alone, self._total = demo.alone, total
        self._numbers, self._started, self._log = itertools.count(1), {}, None

    def started(self, run: DemoRun) -> None:
        self._started[run] = time.monotonic()
        if self._alone:
            print(f"\n{run}: its messages, which {run.folder / LOG} keeps too:", flush=True)
            self._log = (run.folder / LOG).open("rb")

    def waiting(self) -> None:
        if self._log:
            sys.stdout.buffer.write(self._log.read())
            sys.stdout.buffer.flush()

    def ended(self, run: DemoRun, problem: str | None) -> None:
        if self._log:
            self._log.close()
        self._log = None
        if problem is None:  # `finish_runs` reports the others
            self.report(run, f"{time.monotonic() - self._started[run]:.0f} s")

    def report(self, run: DemoRun, how: str) -> None:
        number = f"[{next(self._numbers):2}/{self._total}]"
        print(f"{number} {run}: test accuracy {run.trial().test:.1%} ({how})", flush=True)


def make_table(trials: Mapping[DemoRun, Trial]) -> str:
    """Return the results as a Markdown table, one row for each task and method, in percent.

    For several seeds they are means, and the last column has the standard deviation on test.
    """
    rows = []
    for task, method in dict.fromkeys((run.task, run.method) for run in trials):
        seeds = [trial for run, trial in trials.items() if (run.task, run.method) == (task, method)]
        dev, test = ([getattr(trial, split) for trial in seeds] for split in ("dev", "test"))
        row = {"task": task, "method": method.name, "dev": percent(np.mean(dev)), "test": percent(np.mean(test))}
        rows.append(row if len(seeds) == 1 else row | {"standard deviation": percent(np.std(test))})
    return format_table(rows, "markdown", words=("task", "method"))


def explain(demo: Demo) -> str:
    """Say what the numbers of the table are."""
    chance = "guessing is right half of the time."
    if len(demo.seeds) == 1:
        return f"Accuracies in percent, seed {demo.seeds[0]}; {chance}"
    seeds = " and ".join(map(str, demo.seeds))
    return f"Accuracies in percent, means over the seeds {seeds}, and the standard deviation\non test; {chance}"


DESCRIBED = """\
Does the kernel describe fine-tuning? It does where its predictions are nearly as good as those of fine-tuning (K/FT),
where the model linearised at its start gains what training gained (recovery), and where training hardly moves the
kernel (relative distance). SGD stands beside its own kernel, Adam beside that of SignGD."""


def show(demo: Demo, given: argparse.Namespace) -> None:
    """Draw the splits, do what is not done yet, print the table."""
    runner = DemoRunner(demo, given.model.resolve(), given.data_dir.resolve(), given.output_dir.resolve())
    for folder in (runner.model, *(runner.data / task for task in demo.tasks)):
        if not folder.is_dir():
            raise FileError(f"{folder} is missing: make {demo.name} fetches it", path=folder)
    runner.draw_splits()
    how = "one at a time, on all cores" if demo.alone else f"{RUNS_AT_A_TIME} at a time"
    print(f"{len(runner.runs)} runs, {how}; each prints a line when it is done.", flush=True)
    trials = runner.finish_runs()
    table = make_table(trials)
    (runner.output / "table.md").write_text(table, encoding="utf-8")
    tool = [sys.executable, str(ROOT / "tools" / "gather_result.py"), "--log", str(runner.write_log(trials.values()))]
    print(f"\n{explain(demo)}\n\n{table}\nThis table: {runner.output / 'table.md'}")
    print(f"What each run left: {runner.output / 'TASK' / 'METHOD' / f'{K}-SEED'}")
    print("The same numbers from the log:")
    print(f"  {shlex.join([*tool, '--format', 'markdown'])} --condition \"{{'task_name': '{TASK_NAME}'}}\"")
    if (asked := runner.asked_of_influence()) is not None:
        tool = [sys.executable, str(ROOT / "tools" / "kernel_influence.py"), str(asked)]
        print(f"Which train examples look mislabelled, help or hurt, by {asked.parent.name}, {asked.name}:")
        print(f"  {shlex.join(tool)}")
    print(f"Kernels to look at, of {demo.tasks[0]} and seed {demo.seeds[-1]}, in a browser:", flush=True)
    print(f"  {runner.write_report()}", flush=True)
    if (described := runner.describe()) is not None:
        print(f"\n{DESCRIBED}\n\n{described}")
        print(f"This table: {runner.output / 'behaviour'}.txt, .md, .tex, .csv, .json; its figure: behaviour.png")


def main(demo: Demo = DEMO, argv: list[str] | None = None) -> int:
    """Do a demo for the command line; return the exit status."""
    parser = Parser(description=demo.purpose)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/demo" / demo.model, help="folder of the model")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/demo", help="folder of the tasks")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "result" / demo.name, help="results go here")
    resume = "what is done is kept; the same command goes on from there"
    return run_tool(parser, lambda given: show(demo, given), argv, resume)


if __name__ == "__main__":
    sys.exit(main())
