#!/usr/bin/env python3
"""How fast and exact the kernel engines are and how much memory they take, all in one run on one machine.

Every engine runs in its own process, which has its own peak memory. The yardstick is the published method: the `jvp`
engine over whole parameters and the whole vocabulary's logits, in tiles of 1 × 1. It and the `jacobian` engine would
take hours and are timed on samples. The error is that of 8 × 8 examples at most, against gradients by plain autograd.
That of signgd includes gradients that are zero except for rounding, such as those of attention's key biases: no two
computations agree on their signs.

    python tools/benchmark_kernels.py --model models/minilm --data_dir data/k-shot-1k-test/SST-2/16-42
    python tools/benchmark_kernels.py --shape bert-base --formula sgd signgd
    python tools/benchmark_kernels.py --quick
    python tools/benchmark_kernels.py --whole_runs --against ../older --model .cache/demo/bert-tiny --data_dir …/16-42
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import torch
from tqdm import tqdm

from benchmarks.engines import PEERS, PUBLISHED, measure
from benchmarks.inputs import SHAPES, Job
from benchmarks.whole_runs import add_flags, measure_whole_runs
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.examples import split_file
from lmntk.data.tasks import find_task
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels import ENGINES, FORMULAS, MemoryBudgetError
from lmntk.storage.atomic import write_atomically
from lmntk.storage.part_names import read_part_keys
from lmntk.storage.tables import format_table

BOUNDS = (
    *(Bounds(name, 1) for name in ("train_examples", "x_examples", "threads", "repeats", "kernel_lora_rank")),
    Bounds("sample_tiles", 0),
    Bounds("memory_gb", 0, above=True),
)


def make_parser() -> Parser:
    """Return the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; of a GGUF file the one it was converted to")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of that shape, in place of --model")
    parser.add_argument("--task_name", default="SST-2", help="the task whose prompts are used (default SST-2)")
    parser.add_argument("--template", help="a template, in place of the task's own")
    parser.add_argument("--data_dir", help="its k-shot folder; not given: random tokens of SST-2's lengths")
    parser.add_argument(
        "--original_dir", help="its original files, such as data/original/SST-2: examples beyond the k-shot folder's"
    )
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES, *PEERS], help="what to measure (default factored)")
    parser.add_argument("--train_examples", nargs="+", type=int, help="N, one or several (default 32)")
    parser.add_argument("--x_examples", type=int, help="X (default 1000)")
    parser.add_argument("--formula", nargs="+", default=["sgd"], choices=FORMULAS, help="one or several formulas")
    parser.add_argument("--binary_classification", action="store_true", help="one logit difference, not two logits")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="one or several")
    parser.add_argument("--memory_gb", type=float, help="budget of the engines (default: 60%% of what is free)")
    parser.add_argument(
        "--kernel_parts", help="also with parts of the kernel: layer,kind,weight-or-bias or some of these"
    )
    parser.add_argument("--kernel_lora_rank", type=int, help="also with parts and kernels of adapters of that rank")
    parser.add_argument("--repeats", type=int, default=1, help="measure all so often, in turn (default 1)")
    parser.add_argument("--sample_tiles", type=int, default=0, help="time so many tiles and scale up (default: all)")
    parser.add_argument("--times_only", action="store_true", help="neither errors nor the published method")
    parser.add_argument("--quick", action="store_true", help="all engines, a small model, 16 × 64: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there, a list of objects")
    add_flags(parser)
    return parser


def jobs_of(given: argparse.Namespace) -> list[Job]:
    """Return the jobs that the flags describe, after filling in defaults."""
    if given.quick and given.model is None:
        given.shape = given.shape or "quick"
    given.engines = given.engines or (list(ENGINES) if given.quick else ["factored"])
    given.train_examples = given.train_examples or ([16] if given.quick else [32])
    given.x_examples = given.x_examples if given.x_examples is not None else (64 if given.quick else 1000)
    _check(given)
    return [
        Job(
            model=given.model or given.shape,
            task_name=given.task_name,
            template=given.template,
            data_dir=given.data_dir,
            original_dir=given.original_dir,
            train_examples=n,
            x_examples=given.x_examples,
            formula=formula,
            binary=given.binary_classification or FORMULAS[formula].is_asymmetric,
            threads=threads,
            memory_gb=given.memory_gb,
            sample_tiles=given.sample_tiles,
            times_only=given.times_only,
            part_keys=keys,
            lora_rank=rank,
        )
        for threads in given.threads
        for n in given.train_examples
        for formula in given.formula
        for _ in range(given.repeats)
        for keys, rank in _slices(given)
    ]


def _slices(given: argparse.Namespace) -> list[tuple[tuple[str, ...], int | None]]:
    """Return what is kept beside the kernel, in one measurement after the other: nothing, parts, adapters' kernels."""
    keys = () if given.kernel_parts is None else read_part_keys(given.kernel_parts)
    found: list[tuple[tuple[str, ...], int | None]] = [((), None)]
    found += [(keys, None)] if keys else []
    return found + ([(keys, given.kernel_lora_rank)] if given.kernel_lora_rank is not None else [])


def _check(given: argparse.Namespace) -> None:
    """Raise an error for flags that cannot work, before minutes are spent."""
    task = find_task(given.task_name)
    if (given.model is None) == (given.shape is None):
        raise UsageError("name either a checkpoint folder with --model or a shape with --shape, or pass --quick")
    if given.model is not None and not Path(given.model).is_dir():
        raise UsageError(f"--model: there is no folder {given.model}; it takes one with a checkpoint and its tokenizer")
    if given.data_dir is not None:
        if given.shape is not None:
            raise UsageError("--data_dir needs --model: a --shape has no tokenizer to read sentences with")
        for split in ("train", "test"):
            split_file(task, given.data_dir, split)
    if given.original_dir is not None:
        if given.data_dir is None:
            raise UsageError("--original_dir needs --data_dir: its examples follow those of the k-shot folder")
        if not (path := Path(given.original_dir) / task.original_name("train")).is_file():
            raise UsageError(f"--original_dir: there is no file {path}")
    if given.template is not None and given.model is None:
        raise UsageError("--template needs --model: a --shape has no tokenizer to read it with")
    check_numbers(BOUNDS, vars(given))
    one_logit = [formula for formula in given.formula if FORMULAS[formula].is_asymmetric]
    if (given.binary_classification or one_logit) and len(task.labels) != 2:
        cause = "--binary_classification" if given.binary_classification else f"--formula {one_logit[0]}"
        raise UsageError(f"{cause} takes tasks of two classes, but {task.name} has {len(task.labels)}")
    if given.json is not None and not Path(given.json).resolve().parent.is_dir():
        raise UsageError(f"--json: there is no folder {Path(given.json).resolve().parent}")


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    return run_tool(
        make_parser(), lambda given: measure_whole_runs(given) if given.whole_runs else measure_all(given), argv
    )


def measure_all(given: argparse.Namespace) -> None:
    """Measure, print a table, write JSON."""
    jobs = jobs_of(given)
    engines, rows = given.engines if given.times_only else [PUBLISHED, *given.engines], []
    with tqdm(total=len(jobs) * len(engines), unit="measurement") as bar:
        for job in jobs:
            measured, truth = [], None
            for engine in engines:
                bar.set_description(f"{engine}, {job.formula}, N = {job.train_examples}, {job.threads} threads")
                row, truth = in_own_process(measure, job, engine, truth)
                measured.append(row)
                bar.update()
            rows += [row | {"speedup_over_jvp": _speedup(measured[0], row)} for row in measured]
    rows = [row | {"seconds_over_first_formula": row["seconds"] / _first_formula(row, rows)["seconds"]} for row in rows]
    print(format_table(map(_cells, rows), "markdown", words=["engine", "formula", "stages"]), end="")
    if given.json:
        text = json.dumps(rows, indent=2) + "\n"
        write_atomically(Path(given.json), lambda file: file.write(text.encode()))
        print(f"\nmeasurements are in {given.json}")


def _speedup(first: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return how many times as fast as the published method an engine is; None where that was not measured."""
    return first["seconds_per_pair"] / row["seconds_per_pair"] if first["engine"] == PUBLISHED else None


def _first_formula(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurement of the same engine, examples and threads with the formula that was named first."""
    same = ("engine", "model", "n_train", "n_x", "threads")
    return next(other for other in rows if all(other[key] == row[key] for key in same))


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work` in a new process of its own."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_with_usage_errors, work, *arguments).result()
    except BrokenProcessPool as error:
        raise UsageError("a measurement was killed, probably because memory ran out: lower `memory_gb`") from error


def _with_usage_errors(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except MemoryBudgetError as error:
        raise UsageError(f"`memory_gb`: {error}") from None


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a line of the table for a measurement."""
    return {
        "engine": row["engine"],
        "formula": row["formula"],
        "N × X": f"{row['n_train']} × {row['n_x']}",
        "C": str(row["logits"]),
        "threads": str(row["threads"]),
        **({} if row["slices"] == 1 else {"slices": str(row["slices"])}),
        "seconds": f"{row['seconds']:.1f}",
        "CPU s": "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.1f}",
        "× first formula": f"{row['seconds_over_first_formula']:.2f}",
        "s / pair": f"{row['seconds_per_pair']:.2e}",
        "speed-up": "" if row["speedup_over_jvp"] is None else f"{row['speedup_over_jvp']:.1f}",
        "error": "" if row["relative_error"] is None else f"{row['relative_error']:.1e}",
        "peak GB": f"{row['peak_memory_gb']:.1f}",
        "GFLOP/s": f"{row['matmul_gflops']:.0f}",
        "roofline": f"{row['roofline_fraction']:.2f}",
        "stages": ", ".join(f"{name} {value:.1f} s" for name, value in row["seconds_by_stage"].items()),
    }


if __name__ == "__main__":
    sys.exit(main())
