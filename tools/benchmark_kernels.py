#!/usr/bin/env python3
"""How fast and exact the kernel engines are and how much memory they take, all in one run on one machine.

Every engine runs in its own process, which has its own peak memory. The yardstick is the published method: the `jvp`
engine over whole parameters and the whole vocabulary's logits, in tiles of 1 × 1. It and the `jacobian` engine would
take hours and are timed on samples. The error is that of 8 × 8 examples at most, against gradients by plain autograd.
That of signgd includes gradients that are zero except for rounding, such as those of attention's key biases: no two
computations agree on their signs. The error of the `projected` engine is that of 64 × 64 examples at most, against the
`factored` engine; its seconds are never scaled up from samples.

    python tools/benchmark_kernels.py --model models/minilm --data_dir data/k-shot-1k-test/SST-2/16-42
    python tools/benchmark_kernels.py --shape bert-base --formula sgd signgd
    python tools/benchmark_kernels.py --model models/minilm --data_dir … --train_examples 1024 --sample_tiles 1 \\
        --engines factored projected --projection_width 32 64 128 --train_kernel
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
from dataclasses import replace
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
from lmntk.kernels import ENGINES, ESTIMATES, FORMULAS, MemoryBudgetError
from lmntk.kernels.projection import DEFAULT_WIDTH
from lmntk.storage.atomic import write_atomically
from lmntk.storage.part_names import read_part_keys
from lmntk.storage.tables import format_table

YARDSTICKS = {"jvp": PUBLISHED, "factored": "factored"}  # what the others are compared with, by its name in JSON
BOUNDS = (
    *(Bounds(name, 1) for name in ("train_examples", "x_examples", "threads", "repeats", "kernel_lora_rank")),
    Bounds("projection_width", 1),
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
    parser.add_argument(
        "--engines", nargs="+", choices=[*ENGINES, *ESTIMATES, *PEERS], help="what to measure (default factored)"
    )
    parser.add_argument(
        "--projection_width",
        nargs="+",
        type=int,
        help=f"for the projected engine: one or several widths (default {DEFAULT_WIDTH})",
    )
    parser.add_argument(
        "--train_kernel",
        action="store_true",
        help="train × train too, as a run computes it; with the engines factored and projected",
    )
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
    given.projection_width = given.projection_width or ([DEFAULT_WIDTH] if "projected" in given.engines else [])
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
            train_kernel=given.train_kernel,
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
    _check_estimates(given)
    one_logit = [formula for formula in given.formula if FORMULAS[formula].is_asymmetric]
    if (given.binary_classification or one_logit) and len(task.labels) != 2:
        cause = "--binary_classification" if given.binary_classification else f"--formula {one_logit[0]}"
        raise UsageError(f"{cause} takes tasks of two classes, but {task.name} has {len(task.labels)}")
    if given.json is not None and not Path(given.json).resolve().parent.is_dir():
        raise UsageError(f"--json: there is no folder {Path(given.json).resolve().parent}")


def _check_estimates(given: argparse.Namespace) -> None:
    if given.projection_width and "projected" not in given.engines:
        raise UsageError("--projection_width is for the projected engine: name it with --engines, or leave this out")
    if "projected" in given.engines:
        signed = [formula for formula in given.formula if FORMULAS[formula].signed]
        if signed:
            raise UsageError(
                f"--engines projected takes --formula sgd: a projection keeps no signs, as {signed[0]} needs"
            )
        if given.kernel_lora_rank is not None:
            raise UsageError("--engines projected keeps no kernels of adapters: leave out --kernel_lora_rank")
    slow = [engine for engine in given.engines if engine not in ("factored", *ESTIMATES)]
    if given.train_kernel and slow:
        raise UsageError(f"--train_kernel takes the engines factored and projected: leave out {slow[0]}")


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    return run_tool(
        make_parser(), lambda given: measure_whole_runs(given) if given.whole_runs else measure_all(given), argv
    )


def measure_all(given: argparse.Namespace) -> None:
    """Measure, print a table, write JSON."""
    jobs = jobs_of(given)
    kinds, rows = _kinds(given), []
    with tqdm(total=len(jobs) * len(kinds), unit="measurement") as bar:
        for job in jobs:
            measured, truth = [], None
            for engine, width in kinds:
                name = engine if width is None else f"{engine} {width}"
                bar.set_description(f"{name}, {job.formula}, N = {job.train_examples}, {job.threads} threads")
                row, truth = in_own_process(measure, replace(job, projection_width=width), engine, truth)
                measured.append(row)
                bar.update()
            rows += [
                row | {f"speedup_over_{name}": _speedup(row, measured, of) for name, of in YARDSTICKS.items()}
                for row in measured
            ]
    rows = [row | {"seconds_over_first_formula": row["seconds"] / _first_formula(row, rows)["seconds"]} for row in rows]
    estimates = any(row["engine"] in ESTIMATES for row in rows)
    cells = [_cells(row, estimates) for row in rows]
    print(format_table(cells, "markdown", words=["engine", "formula", "stages"]), end="")
    if given.json:
        text = json.dumps(rows, indent=2) + "\n"
        write_atomically(Path(given.json), lambda file: file.write(text.encode()))
        print(f"\nmeasurements are in {given.json}")


def _kinds(given: argparse.Namespace) -> list[tuple[str, int | None]]:
    """Return the engines to measure in turn, an estimate once for each width."""
    found: list[tuple[str, int | None]] = [] if given.times_only else [(PUBLISHED, None)]
    for engine in given.engines:
        found += [(engine, width) for width in (given.projection_width if engine in ESTIMATES else [None])]
    return found


def _speedup(row: dict[str, Any], measured: list[dict[str, Any]], yardstick: str) -> float | None:
    """Return how many times as fast as a yardstick a measurement is; None if that is not among those of the job."""
    others = [other for other in measured if other["engine"] == yardstick]
    return others[0]["seconds_per_pair"] / row["seconds_per_pair"] if others else None


def _first_formula(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurement of the same engine, examples and threads with the formula that was named first."""
    same = ("engine", "projection_width", "model", "n_train", "n_x", "threads")
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


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cells(row: dict[str, Any], estimates: bool) -> dict[str, str]:
    """Return a line of the table for a measurement, with more columns where estimates are among them."""
    return {
        "engine": row["engine"] if row["projection_width"] is None else f"{row['engine']} {row['projection_width']}",
        "formula": row["formula"],
        "N × X": f"{row['n_train']} × {row['n_x']}",
        "C": str(row["logits"]),
        "threads": str(row["threads"]),
        **({} if row["slices"] == 1 else {"slices": str(row["slices"])}),
        "seconds": f"{row['seconds']:.1f}",
        "CPU s": _number(row["cpu_seconds"], ".1f"),
        "× first formula": f"{row['seconds_over_first_formula']:.2f}",
        "s / pair": f"{row['seconds_per_pair']:.2e}",
        "speed-up": _number(row["speedup_over_jvp"], ".1f"),
        **({"× factored": _number(row["speedup_over_factored"], ".1f")} if estimates else {}),
        "error": _number(row["relative_error"], ".1e"),
        **({"median error": _number(row["median_error"], ".1e")} if estimates else {}),
        "peak GB": f"{row['peak_memory_gb']:.1f}",
        "GFLOP/s": f"{row['matmul_gflops']:.0f}",
        "roofline": f"{row['roofline_fraction']:.2f}",
        "stages": ", ".join(f"{name} {value:.1f} s" for name, value in row["seconds_by_stage"].items()),
    }


if __name__ == "__main__":
    sys.exit(main())
