#!/usr/bin/env python3
"""The demo: a small model predicts the mood of tweets and film reviews from 16 examples a class, in nine ways.

As it is, by a linear head, by four of its kernels, and fine-tuned with SGD, Adam and LoRA. Draws the k-shot splits with
`tools/generate_k_shot_data.py`, starts `run_fewshot.sh` once for every task, method and seed, and prints one table of
means over the seeds. The model and the sentences come from `fetch_demo_assets.py`. Another `Demo`, of another
model or other methods, works the same way: `examples/demo/demo_causal.py` has one.

A run is not started again if its results are there and the stamp beside them fits: a hash over its command, its split,
the model's files and the program. One that was stopped goes on from the kernels and tiles that it kept. Where the stamp
does not fit, the run's folder is deleted first. Each run has its folder as its working directory, where it appends its
line to a `log`; the demo's own `log` is those of all runs. In the end `tools/report.py` makes a page of some of them.

Every run takes the two classes as one logit, the difference of the label words: the asymmetric kernel needs that, and
the others do the same so that their numbers can be compared. All runs use the CPU, one core each, several at a time:
for so small a model more cores would mostly wait for each other. Those of a large model go one at a time, on all cores.
"""

import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import numpy as np

from lmntk.config.tool_parser import Parser, exit_status
from lmntk.errors import UsageError
from lmntk.runs.gather import percent
from lmntk.runs.log import Trial, find_trials, read_log

ROOT = Path(__file__).resolve().parents[2]
RUN_SCRIPT = ROOT / "run_fewshot.sh"
K_SHOT_TOOL = ROOT / "tools" / "generate_k_shot_data.py"
GATHER_TOOL = ROOT / "tools" / "gather_result.py"
REPORT_TOOL = ROOT / "tools" / "report.py"


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
        name: That of its target in the Makefile, and of the folder of its results.
        what: What it does, in a sentence.
        model: The name of the model's folder.
        tasks: What is predicted.
        methods: How.
        seeds: Of the k-shot splits, and of the runs.
        flags: Flags of run.py that all methods share.
        alone: Each run has the machine for itself, and what it says is shown meanwhile. Else several share it, a core
            each.
        reported: The methods that the report shows, of the first task and the last seed; none: all.
    """

    name: str
    what: str
    model: str
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    flags: str = ""
    alone: bool = False
    reported: tuple[str, ...] = ()

    @property
    def runs(self) -> list["Run"]:
        """All runs, in the order of the table."""
        return [Run(*point) for point in itertools.product(self.tasks, self.methods, self.seeds)]

    @property
    def runs_at_a_time(self) -> int:
        """How many runs share the machine."""
        return 1 if self.alone else RUNS_AT_A_TIME


# The learning rates are the best of a few on dev, mean over tasks and seeds: of 1e-3 to 3e-1 for SGD, 1e-5 to 3e-3 for
# Adam, 1e-4 to 3e-2 for LoRA.
TRAINING = "--per_device_train_batch_size 8 --max_steps 100 --save_strategy no"
DEMO = Demo(
    name="demo",
    what="Predict the mood of tweets and film reviews in nine ways.",
    model="bert-tiny",
    tasks=("tweets", "film-reviews"),
    methods=(
        Method("zero-shot", "standard", "--no_train"),
        Method("linear-head", "linearhead", ""),
        Method("kernel-sgd", "kernel", "--kernel_formula sgd --kernel_solver lstsq"),
        Method("kernel-signgd", "kernel", "--kernel_formula signgd --kernel_solver lstsq"),
        Method("kernel-asymmetric", "kernel", "--kernel_formula asymmetric_signgd --kernel_solver asym"),
        Method("kernel-lora", "kernel", "--kernel_formula sgd --kernel_solver lstsq --apply_lora"),
        Method("tuning-sgd", "standard", f"--optimizer sgd --learning_rate 1e-2 {TRAINING}"),
        Method("tuning-adam", "standard", f"--optimizer adam --learning_rate 1e-3 {TRAINING}"),
        Method("tuning-lora", "standard", f"--optimizer adam --learning_rate 3e-3 --apply_lora {TRAINING}"),
    ),
    seeds=(13, 42),
    reported=("kernel-sgd", "kernel-signgd", "kernel-asymmetric", "tuning-adam"),
)
TASK_NAME = "mr"  # whose template and label words all tasks have
K = 16
MODE = "k-shot-1k-test"
STAMP = "demo-stamp"
LOG = "log"
# A run of the small model takes about 1 GB of memory.
RUNS_AT_A_TIME = min(4, os.cpu_count() or 1)
# Settings of the caller's shell that would send run_fewshot.sh elsewhere.
FOREIGN_SETTINGS = ("GRID_TAG", "LOAD_KERNELS_TAG", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Run:
    """One call of run_fewshot.sh."""

    task: str
    method: Method
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.method.name}, seed {self.seed}"


@dataclass(frozen=True)
class Workshop:
    """Where the runs of a demo are done: where it finds its model and data and leaves its results."""

    demo: Demo
    model: Path
    data: Path
    output: Path

    def folder(self, run: Run) -> Path:
        """Return the output folder of a run."""
        return self.output / run.task / run.method.name / f"{K}-{run.seed}"

    def draw_splits(self, task: str) -> None:
        """Draw the k-shot splits of a task; the same files every time."""
        seeds = [str(seed) for seed in self.demo.seeds]
        command = [sys.executable, str(K_SHOT_TOOL), "--mode", MODE, "--k", str(K), "--task", TASK_NAME]
        command += ["--data_dir", str(self.data / task / "original"), "--output_dir", str(self.data / task)]
        command += ["--seed", *seeds]
        self._run(command, self.output / task / "k-shot.log", self.output, dict(os.environ))

    def finish(self, run: Run) -> tuple[Trial, str]:
        """Return what a run found, and how it came to be; start the run if no results are there that it would give."""
        folder, stamp = self.folder(run), self.stamp(run)
        trial = read_trial(folder) if read_stamp(folder) == stamp else None
        if trial is not None:
            return trial, "there already"
        if read_stamp(folder) != stamp and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).unlink(missing_ok=True)
        (folder / STAMP).write_text(stamp, encoding="utf-8")
        started = time.monotonic()
        self.start(run)
        trial = read_trial(folder)
        if trial is None:
            raise UsageError(f"the run ended well but left no complete results in {folder}")
        return trial, f"{time.monotonic() - started:.0f} s"

    def start(self, run: Run) -> None:
        """Start run_fewshot.sh and wait for it; `run.log` in the run's folder keeps what it prints."""
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN_SETTINGS}
        # The interpreter that runs this script has the dependencies. The model is local: ask no hub about it.
        environment |= {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", **self.settings(run)}
        if not self.demo.alone:
            environment["OMP_NUM_THREADS"] = "1"
        folder = self.folder(run)
        log = folder / "run.log"
        if self.demo.alone:
            print(f"\n{run}: what it says, which {log} keeps too:", flush=True)
        self._run(self.command(run), log, folder, environment, show=self.demo.alone)

    def command(self, run: Run) -> list[str]:
        """Return the words of a run's command."""
        command = ["bash", str(RUN_SCRIPT), "--data_dir", str(self.split(run))]
        command += ["--output_dir", str(self.folder(run)), "--binary_classification"]
        command += ["--disable_tqdm", str(not self.demo.alone)]
        return [*command, *self.demo.flags.split(), *run.method.flags.split()]

    def settings(self, run: Run) -> dict[str, str]:
        """Return the variables that run_fewshot.sh reads."""
        settings = {"TASK": TASK_NAME, "SEED": str(run.seed), "K": str(K), "MODEL": str(self.model), "TYPE": "prompt"}
        tag = f"{self.demo.name}-{run.task}-{run.method.name}"
        return settings | {"TRAINER": run.method.trainer, "TAG": tag, "NUM_GPU": "0"}

    def split(self, run: Run) -> Path:
        """Return the folder of a run's k-shot split."""
        return self.data / run.task / MODE / TASK_NAME / f"{K}-{run.seed}"

    def stamp(self, run: Run) -> str:
        """Hash all that a run's results depend on."""
        what = {"command": self.command(run), "settings": self.settings(run), **self._common}
        return hashlib.sha256(json.dumps(what | hashes(self.split(run).iterdir())).encode()).hexdigest()

    @functools.cached_property
    def _common(self) -> dict[str, str]:
        """The hashes of the model's files and of the program's."""
        program = [*(ROOT / "src" / "lmntk").rglob("*.py"), ROOT / "run.py", RUN_SCRIPT]
        model = [path for ending in ("safetensors", "bin", "gguf", "json") for path in self.model.glob(f"*.{ending}")]
        return hashes([*program, *model])

    def write_log(self, runs: Iterable[Run]) -> Path:
        """Write the lines of all runs into one log, and nothing that was there: it may be of another version."""
        log = self.output / LOG
        log.write_bytes(b"".join((self.folder(run) / LOG).read_bytes() for run in runs))
        return log

    def write_report(self) -> Path:
        """Write a page of pictures of some runs, unless one of the same runs is there; return where it is."""
        task, seed = self.demo.tasks[0], self.demo.seeds[-1]
        runs = [run for run in self.demo.runs if (run.task, run.seed) == (task, seed)]
        shown = [run for run in runs if run.method.name in self.demo.reported] or runs
        folder = self.output / "report"
        what = [self.stamp(run) for run in shown] + [REPORT_TOOL.read_text(encoding="utf-8")]
        stamp = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        page = folder / "report.html"
        if read_stamp(folder) != stamp or not page.is_file():
            from lmntk.report import (
                write_report,  # here, since torch and matplotlib take seconds that --help need not wait
            )

            page = write_report([self.folder(run) for run in shown], folder)
            (folder / STAMP).write_text(stamp, encoding="utf-8")
        return page

    def _run(
        self, command: Sequence[str], log: Path, where: Path, environment: dict[str, str], show: bool = False
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0}
        with (
            log.open("wb", buffering=0) as file,
            subprocess.Popen(command, env=environment, cwd=where, **streams) as process,
        ):
            while said := process.stdout.read(2**16):
                file.write(said)
                if show:
                    sys.stdout.buffer.write(said)
                    sys.stdout.buffer.flush()
        if process.returncode:
            last_lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise UsageError(
                f"{Path(command[1]).name} ended with status {process.returncode}; "
                f"all it said is in {log}, which ends so:\n" + "\n".join(f"    {line}" for line in last_lines)
            )


def read_trial(folder: Path) -> Trial | None:
    """Read what a run found from its line in the log; None when its results are not all there."""
    results = [folder / f"{split}_results_{TASK_NAME}.txt" for split in ("eval", "test")]
    if not all(path.is_file() for path in (*results, folder / LOG)):
        return None
    try:
        trials = find_trials(read_log(folder / LOG), TASK_NAME)
    except UsageError:  # it was cut
        return None
    return trials[-1] if trials else None


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its path, in the order of paths."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def read_stamp(folder: Path) -> str | None:
    """Read the stamp beside a run's results; None where there is none."""
    path = folder / STAMP
    return path.read_text(encoding="utf-8") if path.is_file() else None


def table(trials: Mapping[Run, Trial]) -> str:
    """Lay out the results as a Markdown table, one row for each task and method, in percent.

    Of several seeds they are means, and the last column has the standard deviation on test.
    """
    header = [
        "| task         | method            |  dev | test |",
        "|--------------|-------------------|-----:|-----:|",
    ]
    if len({run.seed for run in trials}) > 1:
        header = [header[0] + " standard deviation |", header[1] + "-------------------:|"]
    rows = []
    for task, method in dict.fromkeys((run.task, run.method) for run in trials):
        seeds = [trial for run, trial in trials.items() if (run.task, run.method) == (task, method)]
        test = [trial.test for trial in seeds]
        dev, mean, deviation = percent(np.mean([trial.dev for trial in seeds])), percent(np.mean(test)), np.std(test)
        row = f"| {task:12} | {method.name:17} | {dev:>4} | {mean:>4} |"
        rows.append(row if len(seeds) == 1 else f"{row} {percent(deviation):>18} |")
    return "\n".join([*header, *rows]) + "\n"


def finish_all(workshop: Workshop) -> dict[Run, Trial]:
    """Finish all runs, some at a time, with a line for each; what they found, in their order."""
    runs = workshop.demo.runs
    numbers, telling = itertools.count(1), threading.Lock()

    def finish(run: Run) -> Trial:
        trial, how = workshop.finish(run)
        with telling:
            print(f"[{next(numbers):2}/{len(runs)}] {run}: test accuracy {trial.test:.1%} ({how})", flush=True)
        return trial

    with ThreadPoolExecutor(workshop.demo.runs_at_a_time) as pool:
        futures = [pool.submit(finish, run) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {run: future.result() for run, future in zip(runs, futures, strict=True)}


def explain(demo: Demo) -> str:
    """Say what the numbers of the table are."""
    chance = "guessing is right half of the time."
    if len(demo.seeds) == 1:
        return f"Accuracies in percent, seed {demo.seeds[0]}; {chance}"
    seeds = " and ".join(map(str, demo.seeds))
    return f"Accuracies in percent, means over the seeds {seeds}, and the standard deviation\non test; {chance}"


def main(demo: Demo = DEMO) -> None:
    """Draw the splits, do what is not done yet, print the table."""
    parser = Parser(description=demo.what)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/demo" / demo.model, help="folder of the model")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/demo", help="folder of the tasks")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "result" / demo.name, help="results go here")
    given = parser.read(None)
    workshop = Workshop(demo, given.model.resolve(), given.data_dir.resolve(), given.output_dir.resolve())

    for folder in (workshop.model, *(workshop.data / task for task in demo.tasks)):
        if not folder.is_dir():
            raise UsageError(f"{folder} is missing: make {demo.name} fetches it")
    for task in demo.tasks:
        workshop.draw_splits(task)
    how = "one at a time, on all cores" if demo.alone else f"{RUNS_AT_A_TIME} at a time"
    print(f"{len(demo.runs)} runs, {how}; each prints a line when it is done.", flush=True)
    trials = finish_all(workshop)
    means = table(trials)
    (workshop.output / "table.md").write_text(means, encoding="utf-8")
    gather = [sys.executable, str(GATHER_TOOL), "--log", str(workshop.write_log(trials)), "--format", "markdown"]
    print(f"\n{explain(demo)}\n\n{means}\nThis table: {workshop.output / 'table.md'}")
    print(f"What each run left: {workshop.output / 'TASK' / 'METHOD' / f'{K}-SEED'}")
    print("The same numbers from the log:")
    print(f"  {shlex.join(gather)} --condition \"{{'task_name': '{TASK_NAME}'}}\"")
    print(f"Kernels to look at, of {demo.tasks[0]} and seed {demo.seeds[-1]}, in a browser:", flush=True)
    print(f"  {workshop.write_report()}")


def command_line(demo: Demo) -> int:
    """Do a demo for the command line; return the exit status."""
    return exit_status(lambda: main(demo), "what is done is kept; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(command_line(DEMO))
