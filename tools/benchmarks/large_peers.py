#!/usr/bin/env python3
"""Other libraries' kernels of many examples, beside the `factored` and `projected` engines, in one process.

Each example has one output, the difference of the two label words' logits. Every library gets the same model and the
same batches, sorted by length and padded, and its import is not timed. What it returns is compared with the exact
kernel of the parameters that it takes, as it is and after its own scale is taken out. The libraries are not installed
with lmntk:

    pip install traker==0.3.2 bergson==2.5.1 kronfluence==1.0.1
    python tools/benchmarks/large_peers.py --model models/minilm --data_dir data/k-shot-1k-test/SST-2/16-42 \\
        --peers bergson kronfluence kronfluence-low-rank traker

`bergson` projects each linear layer's gradient from both sides; `kronfluence` multiplies gradients of linear layers, or
those of the queries after a singular value decomposition of low rank; `traker` projects the gradient of all parameters
from one side, with a matrix of independent signs, which takes so long that it gets fewer examples.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[index] / name) for index, name in ((1, ""), (2, "src"))]

import torch
from torch import Tensor, nn

from benchmarks.inputs import Inputs, Job, load_inputs, load_model, make_problem
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.tasks import find_task
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels import assemble, make_engine
from lmntk.kernels.memory import retain_freed_memory
from lmntk.models.prompt_model import PromptModel
from lmntk.prompts.features import FeatureExamples
from lmntk.storage.tables import format_table

LOW_RANK = 32
BATCH = 32
BOUNDS = tuple(Bounds(name, 1) for name in ("train_examples", "x_examples", "width", "one_sided_width", "threads"))
TRAK_BATCH = 16  # gradients of all parameters, several copies of each
TRAK_BLOCK = 16  # columns of the projection that are held at once: 4 bytes for each of them and each parameter


@dataclass(frozen=True)
class Sides:
    """What a library gets.

    Attributes:
        model: The model, which it may change.
        train: The N train examples.
        x: The X others.
        width: The numbers that a two-sided projection leaves of each side of a weight.
        one_sided_width: Those that a projection from one side leaves of the gradient of all parameters.
    """

    model: PromptModel
    train: FeatureExamples
    x: FeatureExamples
    width: int
    one_sided_width: int

    def batches(self, side: FeatureExamples, size: int) -> list[list[int]]:
        """Return the indices of batches of prompts of nearly one length, the shortest first."""
        order = by_length(side)
        return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        package: Its name at the package index.
        module: The name by which it is imported.
        kernel: Computes the kernel of two sides, float64 ``[N, X]``.
        linear_only: Whether it takes the gradients of linear layers alone.
    """

    package: str
    module: str
    kernel: Callable[[Sides], Tensor]
    linear_only: bool


def bergson_kernel(sides: Sides) -> Tensor:
    """Multiply the projected gradients that bergson collects in memory."""
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset as Rows

    processor = GradientProcessor(projection_dim=sides.width, include_bias=True)
    found = []
    for side in (sides.train, sides.x):
        with tempfile.TemporaryDirectory() as folder:
            collector = InMemoryCollector(
                model=sides.model.lm,
                processor=processor,
                target_modules=set(linear_layers(sides.model.lm)),
                data=Rows.from_dict({"input_ids": [[0]] * len(side)}),
                cfg=IndexConfig(run_path=folder, projection_dim=sides.width, include_bias=True),
            )
            for indices in sides.batches(side, BATCH):
                with collector.with_batch():
                    outputs = sides.model(**side.batch(indices))[:, 0]
                    outputs.sum().backward()
                sides.model.zero_grad()
                collector.process_batch(indices, losses=outputs)
            collector.teardown()
        found.append(torch.cat([collector.gradients[name] for name in sorted(collector.gradients)], dim=1))
    return (found[0] @ found[1].T).double()


def kronfluence_kernel(sides: Sides, rank: int | None = None) -> Tensor:
    """Multiply gradients pair by pair, without preconditioning: kronfluence's scores of the strategy "identity".

    Args:
        sides: The model and the examples.
        rank: That of the queries' gradients; None for exact ones.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class SumOfOutputs(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return model(**batch)[:, 0].sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return model(**batch)[:, 0].sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return linear_layers(sides.model)

    task = SumOfOutputs()
    orders = [by_length(side) for side in (sides.x, sides.train)]
    queries, train = (
        [(side, index) for index in order] for side, order in zip((sides.x, sides.train), orders, strict=True)
    )
    loading = DataLoaderKwargs(collate_fn=_padded)
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(sides.model, task)
        analyzer = Analyzer("kernel", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.set_dataloader_kwargs(loading)
        analyzer.fit_all_factors("none", train, BATCH, factor_args=FactorArguments(strategy="identity"))
        analyzer.compute_pairwise_scores(
            "scores",
            "none",
            queries,
            train,
            per_device_query_batch_size=BATCH,
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(query_gradient_low_rank=rank, query_gradient_accumulation_steps=4),
        )
        (scores,) = analyzer.load_pairwise_scores("scores").values()
    kernel = torch.empty(len(sides.train), len(sides.x), dtype=torch.float64)
    kernel[torch.tensor(orders[1])[:, None], torch.tensor(orders[0])] = scores.T.double()
    return kernel


def _padded(items: list[tuple[FeatureExamples, int]]) -> dict[str, Tensor]:
    return items[0][0].batch([index for _, index in items])


def trak_kernel(sides: Sides) -> Tensor:
    """Multiply the features that traker stores of both sides, as if all were train examples."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            self.names: tuple[str, ...] = ()

        def get_output(self, model: nn.Module, weights: Any, buffers: Any, *inputs: Tensor) -> Tensor:
            batch = {name: values[None] for name, values in zip(self.names, inputs, strict=True)}
            return torch.func.functional_call(model, (weights, buffers), kwargs=batch)[0, 0]

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    output, n = Output(), len(sides.train)
    size = sum(parameter.numel() for parameter in sides.model.parameters())
    cpu = torch.device("cpu")
    projector = BasicProjector(size, sides.one_sided_width, 0, ProjectionType.rademacher, cpu, block_size=TRAK_BLOCK)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            sides.model, output, n + len(sides.x), folder, device="cpu", projector=projector, logging_level=30
        )
        traker.load_checkpoint(sides.model.state_dict(), model_id=0)
        for side, first in ((sides.train, 0), (sides.x, n)):
            for indices in sides.batches(side, TRAK_BATCH):
                batch = side.batch(indices)
                # transformers makes masks in a way that vmap does not support, unless they are ready to be added.
                batch["attention_mask"] = (batch["attention_mask"][:, None, None] - 1.0) * 1e9
                output.names = tuple(batch)
                traker.featurize(batch=list(batch.values()), inds=torch.tensor(indices) + first)
        features = torch.as_tensor(traker.saver.current_store["grads"][:]).double()
    return features[:n] @ features[n:].T


def by_length(side: FeatureExamples) -> list[int]:
    """Return the indices of examples, the shortest first."""
    return sorted(range(len(side)), key=lambda index: side.shapes[index])


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of a model's linear layers that other libraries know."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


PEERS = {
    "bergson": Peer("bergson", "bergson", bergson_kernel, linear_only=True),
    "kronfluence": Peer("kronfluence", "kronfluence.analyzer", kronfluence_kernel, linear_only=True),
    "kronfluence-low-rank": Peer(
        "kronfluence", "kronfluence.analyzer", partial(kronfluence_kernel, rank=LOW_RANK), linear_only=True
    ),
    "traker": Peer("traker", "trak", trak_kernel, linear_only=False),
}


@dataclass(frozen=True)
class Errors:
    """How far a kernel is from the exact one: relative Frobenius errors.

    Attributes:
        as_returned: Of the numbers that a library returns.
        without_scale: After division by the scale that fits best.
        scale: That scale.
    """

    as_returned: float
    without_scale: float
    scale: float


def errors_of(found: Tensor, exact: Tensor) -> Errors:
    """Compare a kernel with the exact one."""
    scale = float((found * exact).sum() / exact.pow(2).sum())
    off = [float((kernel - exact).norm() / exact.norm()) for kernel in (found, found / scale)]
    return Errors(*off, scale)


def our_kernel(job: Job, inputs: Inputs, engine: str, linear_only: bool) -> tuple[Tensor, float, float]:
    """Return the kernel of the sides by one of our engines, float64 ``[N, X]``, its seconds and those of the processor.

    Args:
        job: The threads and the width.
        inputs: The examples.
        engine: `factored` or `projected`.
        linear_only: Only over the weights and biases of linear layers.
    """
    model = load_model(job, inputs, torch.float32)
    problem = make_problem(job, model, inputs)
    if linear_only:
        layers = linear_layers(model)
        params = {name: values for name, values in problem.params.items() if name.rpartition(".")[0] in layers}
        problem = replace(problem, params=params)
    start, cpu_start = time.perf_counter(), time.process_time()
    made = make_engine(problem, engine, job.budget)
    plan = made.plan()
    with retain_freed_memory():
        kernel = assemble(made.blocks(plan), plan, problem)
    return kernel[0, :, 0, :, 0], time.perf_counter() - start, time.process_time() - cpu_start


def make_parser() -> Parser:
    """Return the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder of a masked language model")
    parser.add_argument("--task_name", default="SST-2", help="a task of two classes (default SST-2)")
    parser.add_argument("--data_dir", required=True, help="the k-shot folder of the task")
    parser.add_argument("--original_dir", help="the original files of the task: examples beyond the k-shot folder's")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=["bergson"], help="what to measure (default bergson)"
    )
    parser.add_argument("--train_examples", type=int, default=256, help="how many examples N has (default 256)")
    parser.add_argument("--x_examples", type=int, default=256, help="how many examples X has (default 256)")
    parser.add_argument("--width", type=int, default=64, help="of the projections (default 64)")
    parser.add_argument("--one_sided_width", type=int, default=512, help="of traker's projection (default 512)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch (default: what it takes by itself)"
    )
    return parser


def _check(given: argparse.Namespace) -> None:
    """Raise an error for flags that cannot work, before minutes are spent."""
    if len(find_task(given.task_name).labels) != 2:
        raise UsageError(f"--task_name takes a task of two classes, and {given.task_name} has another number")
    if not Path(given.model).is_dir():
        raise UsageError(f"--model: there is no folder {given.model}; it takes one with a checkpoint and its tokenizer")
    for name in given.peers:
        if find_spec(PEERS[name].module.partition(".")[0]) is None:
            package = PEERS[name].package
            raise UsageError(f"--peers {name}: {package} is not installed: pip install {package}, or leave it out")
    check_numbers(BOUNDS, vars(given))


def measure(given: argparse.Namespace) -> None:
    """Measure everything in turn and print a table."""
    _check(given)
    torch.set_num_threads(given.threads)
    job = Job(
        model=given.model,
        task_name=given.task_name,
        template=None,
        data_dir=given.data_dir,
        original_dir=given.original_dir,
        train_examples=given.train_examples,
        x_examples=given.x_examples,
        formula="sgd",
        binary=True,
        threads=given.threads,
        memory_gb=None,
        sample_tiles=0,
        times_only=True,
    )
    inputs = load_inputs(job)
    whole, seconds, cpu = our_kernel(job, inputs, "factored", linear_only=False)
    rows = [_row("factored, all parameters", seconds, cpu, errors_of(whole, whole))]
    wide = replace(job, projection_width=given.width)
    estimate, *times = our_kernel(wide, inputs, "projected", linear_only=False)
    rows.append(_row(f"projected {given.width}, all parameters", *times, errors_of(estimate, whole)))
    exact = {False: whole}
    if any(PEERS[name].linear_only for name in given.peers):
        exact[True], *times = our_kernel(job, inputs, "factored", linear_only=True)
        rows.append(_row("factored, linear layers", *times, errors_of(exact[True], exact[True])))
        estimate, *times = our_kernel(wide, inputs, "projected", linear_only=True)
        rows.append(_row(f"projected {given.width}, linear layers", *times, errors_of(estimate, exact[True])))
    for name in given.peers:
        peer = PEERS[name]
        model = load_model(job, inputs, torch.float32).requires_grad_(True)
        if model.single_position is not None:
            model.single_position.layers = []  # as transformers computes it
        sides = Sides(
            model, inputs.examples(inputs.train), inputs.examples(inputs.x), given.width, given.one_sided_width
        )
        import_module(peer.module)
        start, cpu_start = time.perf_counter(), time.process_time()
        found = peer.kernel(sides)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        errors = errors_of(found, exact[peer.linear_only])
        what = "linear layers" if peer.linear_only else "all parameters"
        rows.append(_row(f"{name} {version(peer.package)}, {what}", seconds, cpu, errors))
    print(f"N × X = {given.train_examples} × {given.x_examples}, one output, torch {torch.__version__}")
    print(format_table(rows, "markdown", words=["what"]), end="")


def _row(what: str, seconds: float, cpu: float, errors: Errors) -> dict[str, str]:
    return {
        "what": what,
        "seconds": f"{seconds:.1f}",
        "CPU s": f"{cpu:.1f}",
        "error": f"{errors.as_returned:.1e}",
        "without scale": f"{errors.without_scale:.1e}",
        "scale": f"{errors.scale:.3g}",
    }


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    return run_tool(make_parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
