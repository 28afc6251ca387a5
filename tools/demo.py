#!/usr/bin/env python3
"""The demo: three kernels of one small model predict the mood of tweets and of film reviews from 16 examples a class.

Draws the k-shot splits with `tools/generate_k_shot_data.py`, starts `run_fewshot.sh` once for every task, formula and
seed, and prints one table of means over the seeds. The model and the sentences come from `tools/fetch_demo_assets.py`.

A run is not started again if its results are there and the stamp beside them fits: a hash over its command, its split,
the model's files and the program. Otherwise the run's folder is deleted first.

Every run takes the two classes as one logit, the difference of the label words: the asymmetric kernel needs that, and
the others do the same so that their numbers can be compared. All runs use the CPU, one core each, several at a time:
for so small a model more cores would mostly wait for each other.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from lmntk.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
RUN_SCRIPT = ROOT / "run_fewshot.sh"
K_SHOT_TOOL = ROOT / "tools" / "generate_k_shot_data.py"

TASKS = ("tweets", "film-reviews")
SOLVERS = {"sgd": "lstsq", "signgd": "lstsq", "asymmetric_signgd": "asym"}
SEEDS = (13, 42)
K = 16
MODE = "k-shot-1k-test"
STAMP = "demo-stamp"
# A run takes about 1 GB of memory.
RUNS_AT_A_TIME = min(4, os.cpu_count() or 1)
# Settings of the caller's shell that would send run_fewshot.sh elsewhere.
FOREIGN_SETTINGS = ("GRID_TAG", "LOAD_KERNELS_TAG", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Run:
    """One call of run_fewshot.sh."""

    task: str
    formula: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run found: accuracies as fractions, and the seconds that its three kernels took."""

    dev: float
    test: float
    zero_shot: float
    seconds: float


@dataclass(frozen=True)
class Demo:
    """Where the demo finds its model and data and leaves its results."""

    model: Path
    data: Path
    output: Path

    def folder(self, run: Run) -> Path:
        """Return the output folder of a run."""
        return self.output / run.task / run.formula / f"{K}-{run.seed}"

    def draw_splits(self, task: str) -> None:
        """Draw the k-shot splits of a task; the same files every time."""
        seeds = [str(seed) for seed in SEEDS]
        command = [sys.executable, str(K_SHOT_TOOL), "--mode", MODE, "--k", str(K), "--task", "mr", "--seed", *seeds]
        command += ["--data_dir", str(self.data / task / "original"), "--output_dir", str(self.data / task)]
        self._run(command, self.output / task / "k-shot.log", dict(os.environ))

    def finish(self, run: Run) -> tuple[Outcome, str]:
        """Return what a run found, and how it came to be; start the run if no results are there that it would give."""
        folder, stamp = self.folder(run), self.stamp(run)
        outcome = read_outcome(folder) if read_stamp(folder) == stamp else None
        if outcome is not None:
            return outcome, "there already"
        if folder.exists():
            shutil.rmtree(folder)
        started = time.monotonic()
        self.start(run)
        outcome = read_outcome(folder)
        if outcome is None:
            raise UsageError(f"the run ended well but left no complete results in {folder}")
        (folder / STAMP).write_text(stamp, encoding="utf-8")
        return outcome, f"{time.monotonic() - started:.0f} s"

    def start(self, run: Run) -> None:
        """Start run_fewshot.sh and wait for it; what it prints goes to `run.log` in the run's folder."""
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN_SETTINGS}
        # The interpreter that runs this script has the dependencies. The model is local: ask no hub about it.
        environment |= {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._run(self.command(run), self.folder(run) / "run.log", environment | self.settings(run))

    def command(self, run: Run) -> list[str]:
        """Return the words of a run's command."""
        command = ["bash", str(RUN_SCRIPT), "--data_dir", str(self.split(run))]
        command += ["--output_dir", str(self.folder(run)), "--binary_classification"]
        return command + ["--kernel_formula", run.formula, "--kernel_solver", SOLVERS[run.formula]]

    def settings(self, run: Run) -> dict[str, str]:
        """Return the variables that run_fewshot.sh reads."""
        settings = {"TASK": "mr", "SEED": str(run.seed), "K": str(K), "MODEL": str(self.model), "TYPE": "prompt"}
        return settings | {"TRAINER": "kernel", "TAG": f"demo-{run.task}-{run.formula}", "NUM_GPU": "0"}

    def split(self, run: Run) -> Path:
        """Return the folder of a run's k-shot split."""
        return self.data / run.task / MODE / "mr" / f"{K}-{run.seed}"

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

    def _run(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        # The working directory is where run.py appends its line to a file `log`.
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=self.output, check=False
            )
        if done.returncode:
            last_lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise UsageError(
                f"{Path(command[1]).name} ended with status {done.returncode}; "
                f"all it said is in {log}, which ends so:\n" + "\n".join(f"    {line}" for line in last_lines)
            )


def read_outcome(folder: Path) -> Outcome | None:
    """Read the results in a run's output folder; None when they are not all there."""
    kernel_notes = [folder / f"{split}_kernels_mr.json" for split in ("train", "dev", "test")]
    dev, test, logits = folder / "eval_results_mr.txt", folder / "test_results_mr.txt", folder / "test_logits_mr.pt"
    if not all(path.exists() for path in (dev, test, logits, *kernel_notes)):
        return None
    return Outcome(
        dev=read_accuracy(dev),
        test=read_accuracy(test),
        zero_shot=zero_shot_accuracy(logits),
        seconds=sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in kernel_notes),
    )


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its path, in the order of paths."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def read_stamp(folder: Path) -> str | None:
    """Read the stamp beside a run's results; None where there is none."""
    path = folder / STAMP
    return path.read_text(encoding="utf-8") if path.is_file() else None


def read_accuracy(results: Path) -> float:
    """Read the accuracy from a file of `key = value` lines."""
    values = dict(line.split(" = ", 1) for line in results.read_text(encoding="utf-8").splitlines() if " = " in line)
    return float(values["eval_acc"])


def zero_shot_accuracy(logits_file: Path) -> float:
    """Compute the untrained model's accuracy from its logit differences [X, 1] and the targets -1 and +1."""
    logits, targets = torch.load(logits_file, weights_only=True)
    return ((logits.flatten() > 0) == (targets.flatten() > 0)).double().mean().item()


def table(outcomes: dict[Run, Outcome]) -> str:
    """Lay out the means over the seeds as a Markdown table, one row for each task and formula."""
    rows = [
        "| task         | formula           | dev accuracy | test accuracy | zero-shot accuracy | seconds |",
        "|--------------|-------------------|-------------:|--------------:|-------------------:|--------:|",
    ]
    for task, formula in dict.fromkeys((run.task, run.formula) for run in outcomes):
        seeds = [outcome for run, outcome in outcomes.items() if (run.task, run.formula) == (task, formula)]
        dev, test, zero_shot = (mean(getattr(seed, name) for seed in seeds) for name in ("dev", "test", "zero_shot"))
        seconds = mean(seed.seconds for seed in seeds)
        rows.append(f"| {task:12} | {formula:17} | {dev:12.1%} | {test:13.1%} | {zero_shot:18.1%} | {seconds:7.1f} |")
    return "\n".join(rows) + "\n"


def finish_all(demo: Demo, runs: Sequence[Run]) -> dict[Run, Outcome]:
    """Finish all runs, several at a time, with a line for each; what they found, in their order."""
    outcomes: dict[Run, Outcome] = {}
    with ThreadPoolExecutor(RUNS_AT_A_TIME) as pool:
        futures = {pool.submit(demo.finish, run): run for run in runs}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run = futures[future]
                outcomes[run], how = future.result()
                line = f"{run.task}, {run.formula}, seed {run.seed}: test accuracy {outcomes[run].test:.1%} ({how})"
                print(f"[{number:2}/{len(runs)}] {line}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {run: outcomes[run] for run in runs}


def main() -> None:
    """Draw the splits, do what is not done yet, print the table."""
    parser = argparse.ArgumentParser(description="Predict the mood of tweets and film reviews with three kernels.")
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
    runs = [Run(task, formula, seed) for task in TASKS for formula in SOLVERS for seed in SEEDS]
    print(f"{len(runs)} runs, {RUNS_AT_A_TIME} at a time; each prints a line when it is done.", flush=True)
    means = table(finish_all(demo, runs))
    (demo.output / "table.md").write_text(means, encoding="utf-8")
    print(f"\nMeans over the seeds {' and '.join(map(str, SEEDS))}; guessing is right half of the time.")
    print(f"The seconds are those of the kernels, without start-up and loading.\n\n{means}")
    print(f"This table: {demo.output / 'table.md'}")
    print(f"Kernels, logits and results of each run: {demo.output / 'TASK' / 'FORMULA' / f'{K}-SEED'}")


if __name__ == "__main__":
    try:
        main()
    except (UsageError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
