#!/usr/bin/env python3
"""Whether projected kernels predict what exact kernels predict: accuracy and classes, for widths and seeds.

For each k-shot folder the exact kernels of train × train and train × test are computed once, and the projected ones for
each width and seed. Least squares is solved with each in the same way, with the same λ. Seconds are those of the
processor. The folders are splits of one task with one K: a row of the table is their mean.

    python tools/benchmarks/projected_predictions.py --model .cache/demo/bert-tiny --task_name mr \\
        --data_dir data/demo/tweets/k-shot-1k-test/mr/64-13 data/demo/tweets/k-shot-1k-test/mr/64-42
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[index] / name) for index, name in ((1, ""), (2, "src"))]

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from benchmarks.agreement import Predictions, Split, summarise
from benchmarks.engines import entry_errors
from benchmarks.inputs import Job, load_inputs, load_model, make_problem
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.examples import read_examples, split_file
from lmntk.data.tasks import find_task
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels import Engine, KernelProblem, assemble, make_engine
from lmntk.kernels.memory import retain_freed_memory
from lmntk.kernels.projection import Projection
from lmntk.solvers.candidates import AUTO
from lmntk.solvers.least_squares import lstsq_family
from lmntk.solvers.problem import (
    SolverSettings,
    check_fit_inputs,
    predicted_classes,
    signed,
    train_directions,
    validate_predict_inputs,
)
from lmntk.solvers.selection import Examples, select_by_leave_one_out
from lmntk.storage.atomic import write_text
from lmntk.storage.tables import format_table

BOUNDS = (Bounds("x_examples", 1), Bounds("projection_width", 1), Bounds("threads", 1))
CHOSEN = "loo"
NUM_WARM_UP_EXAMPLES = 4
Kernels = tuple[Tensor, Tensor]


def make_parser() -> Parser:
    """Return the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder; of a GGUF file the one it was converted to")
    parser.add_argument("--data_dir", required=True, nargs="+", help="k-shot folders of one task, all with one K")
    parser.add_argument("--original_dir", help="its original files, for test examples beyond the k-shot folder's")
    parser.add_argument("--task_name", default="SST-2", help="the task whose prompts are used (default SST-2)")
    parser.add_argument("--template", help="a template, in place of the task's own")
    parser.add_argument("--x_examples", type=int, help="X (default: all of the k-shot folder's test file)")
    parser.add_argument(
        "--projection_width", nargs="+", type=int, default=[32, 64, 128], help="one or several (default 32 64 128)"
    )
    parser.add_argument("--projection_seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="(default 0 1 2 3 4)")
    parser.add_argument(
        "--kernel_regularization",
        nargs="+",
        default=["0.001", CHOSEN],
        help=f"λ, one or several; {CHOSEN} is auto's candidate with which the exact kernel predicts train best, by "
        f"leave-one-out (default 0.001 {CHOSEN})",
    )
    parser.add_argument("--binary_classification", action="store_true", help="one logit difference, not two logits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--memory_gb", type=float, help="budget of the engines (default: 60%% of what is free)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep what was measured there, after each folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    return run_tool(make_parser(), measure_all, argv)


def measure_all(given: argparse.Namespace) -> None:
    """Measure split after split, and print a table of their means."""
    jobs = [_job(given, folder) for folder in given.data_dir]
    torch.set_num_threads(given.threads)
    projections = [Projection(width, seed) for width in given.projection_width for seed in given.projection_seeds]
    splits: list[Split] = []
    with tqdm(total=len(jobs) * (1 + len(projections)), unit="kernel") as bar:
        for job in jobs:
            splits.append(measure_split(job, projections, given.kernel_regularization, bar.update))
            if given.json:
                write_text(given.json, json.dumps([dataclasses.asdict(split) for split in splits]) + "\n")
    rows = [
        summarise(splits, width, regularization)
        for regularization in given.kernel_regularization
        for width in given.projection_width
    ]
    print(format_table(rows, "markdown", words=["λ"]), end="")
    if CHOSEN in given.kernel_regularization:
        print("\nλ chosen by leave-one-out: " + ", ".join(f"{split.chosen:g} ({split.folder})" for split in splits))


def measure_split(
    job: Job, projections: Sequence[Projection], regularizations: Sequence[str], done: Callable[[], object]
) -> Split:
    """Compute the kernels of a split, exactly and with each projection, and predict with all of them.

    Args:
        job: The split.
        projections: The widths and seeds.
        regularizations: The values of λ, which may be `CHOSEN`.
        done: Called after each kernel.
    """
    inputs = load_inputs(job)
    model = load_model(job, inputs, torch.float32)
    few, whole = (make_problem(job, model, part) for part in (inputs.first(NUM_WARM_UP_EXAMPLES), inputs))
    classes = [np.array([feature.label for feature in side.features]) for side in (inputs.train, inputs.x)]
    labels = [signed(side) if model.num_logits == 1 else side for side in classes]

    def measured(projection: Projection | None) -> tuple[Kernels, float]:
        kernels_of(job, few, projection)  # the first products take longer
        start = time.process_time()
        return kernels_of(job, whole, projection), time.process_time() - start

    def predictions(kernels: Kernels, seconds: float, projection: Projection | None) -> Predictions:
        logits = of_exact if projection is None else predict(kernels, labels, numbers)
        errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(logits, of_exact, strict=True)]
        found = [predicted_classes(one).tolist() for one in logits]
        entries = entry_errors(kernels[1], exact[1])["relative_error"]
        by_number = (dict(zip(regularizations, values, strict=True)) for values in (errors, found))
        done()
        return Predictions(projection, seconds, entries, *by_number)

    with retain_freed_memory():
        exact, seconds = measured(None)
        chosen = chosen_regularization(exact[0], labels[0], classes[0]) if CHOSEN in regularizations else None
        numbers = [chosen if text == CHOSEN else float(text) for text in regularizations]
        of_exact = predict(exact, labels, numbers)
        own = predictions(exact, seconds, None)
        projected = [predictions(*measured(projection), projection) for projection in projections]
    return Split(str(job.data_dir), len(classes[0]), chosen, classes[1].tolist(), own, projected)


def kernels_of(job: Job, problem: KernelProblem, projection: Projection | None) -> Kernels:
    """Compute train × train and train × x, float64 ``[N, C, N, C]`` and ``[N, C, X, C]``, as a run does.

    Args:
        job: Its budget.
        problem: The kernel of train × x.
        projection: None for exact kernels.
    """
    problem = replace(problem, projection=projection)
    name = "factored" if projection is None else "projected"
    found: list[Tensor] = []
    earlier: Engine | None = None
    for sides in (replace(problem, x=None), problem):
        engine = make_engine(sides, name, job.budget, earlier=earlier)
        plan = engine.plan()
        found.append(assemble(engine.blocks(plan), plan, sides)[0])
        earlier = engine
    return found[0], found[1]


def predict(kernels: Kernels, labels: Sequence[np.ndarray], regularizations: Sequence[float]) -> list[np.ndarray]:
    """Return what least squares predicts with each λ: logits ``[X, C]``.

    Args:
        kernels: As `kernels_of` returns them.
        labels: Those of train and x, class ids, or -1 and +1 when C = 1.
        regularizations: The values of λ.
    """
    plain = check_fit_inputs(train_directions(kernels[0].numpy()), labels[0], None, SolverSettings())
    x = validate_predict_inputs(plain, kernels[1].numpy(), labels[1], None, "test")
    trains = [replace(plain, settings=SolverSettings(regularization=number)) for number in regularizations]
    with threadpool_limits(limits=1):
        return [fitted(x).logits for fitted in lstsq_family(trains)]


def chosen_regularization(kernel: Tensor, labels: np.ndarray, classes: np.ndarray) -> float:
    """Return the candidate of λ with which least squares predicts train best, each example from all the others.

    Args:
        kernel: That of train × train, ``[N, C, N, C]``.
        labels: As for `predict`.
        classes: Class ids.
    """
    grid = [SolverSettings(regularization=number) for number in AUTO["kernel_regularization"]]
    train = Examples(kernel.numpy(), labels)
    by_accuracy = select_by_leave_one_out(
        grid, train, lambda logits: float(np.mean(predicted_classes(logits) == classes))
    )
    return by_accuracy.chosen.settings.regularization


def _job(given: argparse.Namespace, folder: str) -> Job:
    """Return the job of one folder, after checking what would fail after minutes."""
    check_numbers(BOUNDS, vars(given))
    for text in given.kernel_regularization:
        if text != CHOSEN:
            SolverSettings(regularization=_number(text))
    if not Path(given.model).is_dir():
        raise UsageError(f"--model: there is no folder {given.model}; it takes one with a checkpoint and its tokenizer")
    task = find_task(given.task_name)
    sizes = {split: len(read_examples(task, split_file(task, folder, split))) for split in ("train", "test")}
    return Job(
        model=given.model,
        task_name=given.task_name,
        template=given.template,
        data_dir=folder,
        original_dir=given.original_dir,
        train_examples=sizes["train"],
        x_examples=given.x_examples or sizes["test"],
        formula="sgd",
        binary=given.binary_classification,
        threads=given.threads,
        memory_gb=given.memory_gb,
        sample_tiles=0,
        times_only=False,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--kernel_regularization {text}: take a number of 0 or more, or {CHOSEN}") from error


if __name__ == "__main__":
    sys.exit(main())
