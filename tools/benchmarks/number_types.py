#!/usr/bin/env python3
"""How far kernels of models in float32 and bfloat16 are from those in float64, and what that does to predictions.

The errors are those of few examples, against gradients that autograd takes in float64, one example and one logit at a
time. Signs are compared number by number, over all gradients of two of the examples. Seconds, bytes and predictions
(least squares without regularisation) are those of all examples with the `factored` engine.

    python tools/benchmarks/number_types.py --model models/minilm --data_dir data/k-shot-1k-test/SST-2/16-42
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[index] / name) for index, name in ((1, ""), (2, "src"))]

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.inputs import Inputs, Job, gradients_of_logits, load_inputs, load_model, make_problem, true_kernel
from lmntk import solvers
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.examples import split_file
from lmntk.data.tasks import find_task
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels import assemble
from lmntk.kernels.contraction import NUMBER_TYPES
from lmntk.kernels.engines import FactoredEngine
from lmntk.kernels.memory import retain_freed_memory
from lmntk.models.prompt_model import PromptModel
from lmntk.solvers.problem import SolverSettings, predicted_classes, signed
from lmntk.storage.tables import format_table

BOUNDS = tuple(Bounds(name, 1) for name in ("train_examples", "x_examples", "error_examples", "threads"))
EXACT = "float64"
SIGN_EXAMPLES = 2


def make_parser() -> Parser:
    """Return the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder; of a GGUF file the one it was converted to")
    parser.add_argument("--data_dir", required=True, help="a k-shot folder")
    parser.add_argument("--task_name", default="SST-2", help="its task, of two classes (default SST-2)")
    parser.add_argument("--template", help="a template, in place of the task's own")
    parser.add_argument("--train_examples", type=int, default=32, help="N (default 32)")
    parser.add_argument("--x_examples", type=int, default=200, help="X (default 200)")
    parser.add_argument("--error_examples", type=int, default=8, help="examples of the errors on each side (default 8)")
    parser.add_argument("--binary_classification", action="store_true", help="one logit difference, not two logits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--memory_gb", type=float, help="budget of the engine (default: 60%% of what is free)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    return run_tool(make_parser(), measure_all, argv)


def measure_all(given: argparse.Namespace) -> None:
    """Measure every number type in turn, and print a table."""
    job = _job(given)
    torch.set_num_threads(job.threads)
    inputs = load_inputs(job)
    number = min(given.error_examples, len(inputs.train.features), len(inputs.x.features))
    few = inputs.first(number)
    truth = true_kernel(job, few)[0]
    model = load_model(job, inputs, getattr(torch, EXACT))
    exact, _ = predictions(job, model, inputs)
    wanted = _signs(model, few)
    rows = []
    for name in tqdm([name for name in NUMBER_TYPES if name != EXACT], unit="number type"):
        model = load_model(job, inputs, getattr(torch, name))
        found, facts = predictions(job, model, inputs)
        error = (kernel_of(job, model, few)[0] - truth).abs()
        rows.append(
            {
                "number type": name,
                "error": f"{float(error.norm() / truth.norm()):.1e}",
                "median": f"{float((error / truth.abs()).median()):.1e}",
                "wrong signs": f"{share_of_wrong_signs(_signs(model, few), wanted):.2%}",
                "equal classes": f"{np.mean(found == exact):.1%}",
                "accuracy": f"{_accuracy(found, inputs):.1%}",
                **facts,
            }
        )
    print(format_table(rows, "markdown", words=["number type"]), end="")
    print(f"\naccuracy in {EXACT}: {_accuracy(exact, inputs):.1%}; errors of {number} × {number} examples")


def kernel_of(job: Job, model: PromptModel, inputs: Inputs) -> tuple[Tensor, FactoredEngine, float]:
    """Compute train × x with the factored engine.

    Returns:
        The kernel, float64 ``[N, C, X, C]``, the engine, and the seconds that the processor spent.
    """
    problem = make_problem(job, model, inputs)
    engine = FactoredEngine(problem, job.budget)
    plan = engine.plan()
    with retain_freed_memory():
        list(engine.blocks(plan.restricted_to({next(iter(plan))})))  # the first products prepare those that follow
        start = time.process_time()
        kernel = assemble(engine.blocks(plan), plan, problem)[0]
    return kernel, engine, time.process_time() - start


def predictions(job: Job, model: PromptModel, inputs: Inputs) -> tuple[np.ndarray, dict[str, str]]:
    """Predict the classes of the x examples by least squares, and measure the kernel that this takes.

    Returns:
        Class ids ``[X]``, and cells of the table.
    """
    kernel, engine, seconds = kernel_of(job, model, inputs)
    of_train, _, _ = kernel_of(job, model, Inputs(**(vars(inputs) | {"x": inputs.train})))
    labels = [np.array([feature.label for feature in side.features]) for side in (inputs.train, inputs.x)]
    train, x = (signed(part) if model.num_logits == 1 else part for part in labels)
    solver = solvers.fit("lstsq", of_train.numpy(), train, SolverSettings())
    logits = solver.predict(kernel.numpy(), x).logits
    facts = {"CPU s": f"{seconds:.1f}", "bytes a token": f"{engine.planner.demands.per_token:,}"}
    return predicted_classes(logits), facts


def share_of_wrong_signs(found: Tensor, wanted: Tensor) -> float:
    """Return the share of signs that are wrong; zeros of `wanted` do not count.

    Args:
        found: Signs, of any shape.
        wanted: The exact ones, of the same shape.
    """
    return float(((found != wanted) & (wanted != 0)).sum() / (wanted != 0).sum())


def _signs(model: PromptModel, inputs: Inputs) -> Tensor:
    """Return the signs of the first examples' logits' gradients by all parameters, int8 ``[examples · C, p]``."""
    model.requires_grad_(True)
    examples = inputs.examples(inputs.train)
    chosen = range(min(SIGN_EXAMPLES, len(examples)))
    rows = (row for index in chosen for row in gradients_of_logits(model, examples, index, signed=True))
    found = torch.stack([row.to(torch.int8) for row in rows])
    model.requires_grad_(False)
    return found


def _accuracy(classes: np.ndarray, inputs: Inputs) -> float:
    return float(np.mean(classes == [feature.label for feature in inputs.x.features]))


def _job(given: argparse.Namespace) -> Job:
    """Return the job, after checking what would fail after minutes."""
    check_numbers(BOUNDS, vars(given))
    task = find_task(given.task_name)
    if len(task.labels) != 2:
        raise UsageError(f"--task_name {task.name} has {len(task.labels)} classes: take a task of two")
    if not Path(given.model).is_dir():
        raise UsageError(f"--model: there is no folder {given.model}; it takes one with a checkpoint and its tokenizer")
    for split in ("train", "test"):
        split_file(task, given.data_dir, split)
    return Job(
        model=given.model,
        task_name=given.task_name,
        template=given.template,
        data_dir=given.data_dir,
        original_dir=None,
        train_examples=given.train_examples,
        x_examples=given.x_examples,
        formula="sgd",
        binary=given.binary_classification,
        threads=given.threads,
        memory_gb=given.memory_gb,
        sample_tiles=0,
        times_only=False,
    )


if __name__ == "__main__":
    sys.exit(main())
