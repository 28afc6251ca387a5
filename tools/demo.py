#!/usr/bin/env python3
"""The demo: a small model predicts the mood of tweets and film reviews from 16 examples a class, in nine ways.

As it is, by a linear head, by four of its kernels, and fine-tuned with SGD, Adam and LoRA. Draws the k-shot splits with
`tools/generate_k_shot_data.py`, starts `run_fewshot.sh` once for every task, method and seed, and prints one table of
means over the seeds. The model and the sentences come from `tools/fetch_demo_assets.py`.

A run is not started again if its results are there and the stamp beside them fits: a hash over its command, its split,
the model's files and the program. Otherwise the run's folder is deleted first. Each run has its folder as its working
directory, so the line that it appends to `log` is deleted with it; the demo's own `log` is those of all runs.

Every run takes the two classes as one logit, the difference of the label words: the asymmetric kernel needs that, and
the others do the same so that their numbers can be compared. All runs use the CPU, one core each, several at a time:
for so small a model more cores would mostly wait for each other.
"""

import argparse
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

from gather_result import percent
from lmntk.errors import UsageError
from lmntk.run_log import Trial, read_log, trials_of

ROOT = Path(__file__).resolve().parents[1]
RUN_SCRIPT = ROOT / "run_fewshot.sh"
K_SHOT_TOOL = ROOT / "tools" / "generate_k_shot_data.py"
GATHER_TOOL = ROOT / "tools" / "gather_result.py"


@dataclass(frozen=True)
class Method:
    """A way to predict: its name, run_fewshot.sh's TRAINER and run.py's flags."""

    name: str
    trainer: str
    flags: str


# The learning rates are the best of a few on dev, mean over tasks and seeds: of 1e-3 to 3e-1 for SGD, 1e-5 to 3e-3 for
# Adam, 1e-4 to 3e-2 for LoRA.
TRAINING = "--per_device_train_batch_size 8 --max_steps 100 --save_strategy no"
METHODS = (
    Method("zero-shot", "standard", "--no_train"),
    Method("linear-head", "linearhead", ""),
    Method("kernel-sgd", "kernel", "--kernel_formula sgd --kernel_solver lstsq"),
    Method("kernel-signgd", "kernel", "--kernel_formula signgd --kernel_solver lstsq"),
    Method("kernel-asymmetric", "kernel", "--kernel_formula asymmetric_signgd --kernel_solver asym"),
    Method("kernel-lora", "kernel", "--kernel_formula sgd --kernel_solver lstsq --apply_lora"),
    Method("tuning-sgd", "standard", f"--optimizer sgd --learning_rate 1e-2 {TRAINING}"),
    Method("tuning-adam", "standard", f"--optimizer adam --learning_rate 1e-3 {TRAINING}"),
    Method("tuning-lora", "standard", f"--optimizer adam --learning_rate 3e-3 --apply_lora {TRAINING}"),
)
TASKS = ("tweets", "film-reviews")
TASK_NAME = "mr"  # whose template and label words both tasks have
SEEDS = (13, 42)
K = 16
MODE = "k-shot-1k-test"
STAMP = "demo-stamp"
LOG = "log"
# A run takes about 1 GB of memory.
RUNS_AT_A_TIME = min(4, os.cpu_count() or 1)
# Settings of the caller's shell that would send run_fewshot.sh elsewhere.
FOREIGN_SETTINGS = ("GRID_TAG", "LOAD_KERNELS_TAG", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Run:
    """One call of run_fewshot.sh."""

    task: str
    method: Method
    seed: int


@dataclass(frozen=True)
class Demo:
    """Where the demo finds its model and data and leaves its results."""

    model: Path
    data: Path
    output: Path

    def folder(self, run: Run) -> Path:
        """Return the output folder of a run."""
        return self.output / run.task / run.method.name / f"{K}-{run.seed}"

    def draw_splits(self, task: str) -> None:
        """Draw the k-shot splits of a task; the same files every time."""
        seeds = [str(seed) for seed in SEEDS]
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
        if folder.exists():
            shutil.rmtree(folder)
        started = time.monotonic()
        self.start(run)
        trial = read_trial(folder)
        if trial is None:
            raise UsageError(f"the run ended well but left no complete results in {folder}")
        (folder / STAMP).write_text(stamp, encoding="utf-8")
        return trial, f"{time.monotonic() - started:.0f} s"

    def start(self, run: Run) -> None:
        """Start run_fewshot.sh and wait for it; what it prints goes to `run.log` in the run's folder."""
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN_SETTINGS}
        # The interpreter that runs this script has the dependencies. The model is local: ask no hub about it.
        environment |= {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        folder = self.folder(run)
        self._run(self.command(run), folder / "run.log", folder, environment | self.settings(run))

    def command(self, run: Run) -> list[str]:
        """Return the words of a run's command."""
        command = ["bash", str(RUN_SCRIPT), "--data_dir", str(self.split(run))]
        command += ["--output_dir", str(self.folder(run)), "--binary_classification"]
        return [*command, "--disable_tqdm", "True", *run.method.flags.split()]

    def settings(self, run: Run) -> dict[str, str]:
        """Return the variables that run_fewshot.sh reads."""
        settings = {"TASK": TASK_NAME, "SEED": str(run.seed), "K": str(K), "MODEL": str(self.model), "TYPE": "prompt"}
        return settings | {"TRAINER": run.method.trainer, "TAG": f"demo-{run.task}-{run.method.name}", "NUM_GPU": "0"}

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
        model = [path for ending in ("safetensors", "bin", "json") for path in self.model.glob(f"*.{ending}")]
        return hashes([*program, *model])

    def write_log(self, runs: Iterable[Run]) -> Path:
        """Write the lines of all runs into one log, and nothing that was there: it may be of another version."""
        log = self.output / LOG
        log.write_bytes(b"".join((self.folder(run) / LOG).read_bytes() for run in runs))
        return log

    def _run(self, command: Sequence[str], log: Path, where: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=where, check=False
            )
        if done.returncode:
            last_lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise UsageError(
                f"{Path(command[1]).name} ended with status {done.returncode}; "
                f"all it said is in {log}, which ends so:\n" + "\n".join(f"    {line}" for line in last_lines)
            )


def read_trial(folder: Path) -> Trial | None:
    """Read what a run found from its line in the log; None when its results are not all there."""
    results = [folder / f"{split}_results_{TASK_NAME}.txt" for split in ("eval", "test")]
    if not all(path.is_file() for path in (*results, folder / LOG)):
        return None
    try:
        trials = trials_of(read_log(folder / LOG), TASK_NAME)
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
    """Lay out the means over the seeds as a Markdown table, one row for each task and method, in percent."""
    rows = [
        "| task         | method            |  dev | test | standard deviation |",
        "|--------------|-------------------|-----:|-----:|-------------------:|",
    ]
    for task, method in dict.fromkeys((run.task, run.method) for run in trials):
        seeds = [trial for run, trial in trials.items() if (run.task, run.method) == (task, method)]
        test = [trial.test for trial in seeds]
        dev, mean, deviation = percent(np.mean([trial.dev for trial in seeds])), percent(np.mean(test)), np.std(test)
        rows.append(f"| {task:12} | {method.name:17} | {dev:>4} | {mean:>4} | {percent(deviation):>18} |")
    return "\n".join(rows) + "\n"


def finish_all(demo: Demo, runs: Sequence[Run]) -> dict[Run, Trial]:
    """Finish all runs, several at a time, with a line for each; what they found, in their order."""
    trials: dict[Run, Trial] = {}
    with ThreadPoolExecutor(RUNS_AT_A_TIME) as pool:
        futures = {pool.submit(demo.finish, run): run for run in runs}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run = futures[future]
                trials[run], how = future.result()
                line = f"{run.task}, {run.method.name}, seed {run.seed}: test accuracy {trials[run].test:.1%} ({how})"
                print(f"[{number:2}/{len(runs)}] {line}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {run: trials[run] for run in runs}


def main() -> None:
    """Draw the splits, do what is not done yet, print the table."""
    parser = argparse.ArgumentParser(description="Predict the mood of tweets and film reviews in nine ways.")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/demo/bert-tiny", help="folder of a masked LM")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/demo", help="folder of the two tasks")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "result/demo", help="results go here")
    arguments = parser.parse_args()
    demo = Demo(arguments.model.resolve(), arguments.data_dir.resolve(), arguments.output_dir.resolve())

    for folder in (demo.model, *(demo.data / task for task in TASKS)):
        if not folder.is_dir():
            raise UsageError(f"{folder} is missing: tools/fetch_demo_assets.py fetches it, and make demo does both")
    for task in TASKS:
        demo.draw_splits(task)
    runs = [Run(*point) for point in product(TASKS, METHODS, SEEDS)]
    print(f"{len(runs)} runs, {RUNS_AT_A_TIME} at a time; each prints a line when it is done.", flush=True)
    means = table(finish_all(demo, runs))
    (demo.output / "table.md").write_text(means, encoding="utf-8")
    gather = [sys.executable, str(GATHER_TOOL), "--log", str(demo.write_log(runs)), "--format", "markdown"]
    print(f"\nAccuracies in percent, means over the seeds {' and '.join(map(str, SEEDS))}, and the standard deviation")
    print("on test; guessing is right half of the time.")
    print(f"\n{means}\nThis table: {demo.output / 'table.md'}")
    print(f"What each run left: {demo.output / 'TASK' / 'METHOD' / f'{K}-SEED'}")
    print("The same numbers from the log:")
    print(f"  {shlex.join(gather)} --condition \"{{'task_name': '{TASK_NAME}'}}\"")


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
