#!/usr/bin/env python3
"""A kernel larger than the memory that a process may take: assembled in its file, and solved by `lstsq` from there.

Blocks come from random features with decaying scales instead of a model's gradients, so that they cost next to nothing.
Everything else is what `run.py` does: the plan, the tiles on disk, the assembly, the mapped file, the solvers. A limit
of the system on the process's data holds throughout (RLIMIT_DATA: the heap, and what is mapped privately, as kernels
are):

    python tools/benchmarks/large_kernels.py --examples 20000 --x_examples 1000 --memory_gb 4 --folder DIR

`own GB` is the peak of the memory that only the process has, sampled; `resident GB` counts the pages of its files too,
which the system takes back where memory is short.
"""

import argparse
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[index] / name) for index, name in ((1, ""), (2, "src"))]

import numpy as np
import torch
from torch import Tensor

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels import FORMULAS, KernelProblem, MemoryBudget, Plan
from lmntk.kernels.engines.base import ComputedTile, Engine
from lmntk.kernels.problem import FunctionModel
from lmntk.kernels.tiling import CostModel, Tile, TileRequest, TileSize, make_plan
from lmntk.solvers import fit
from lmntk.solvers.blocked import CHOLESKY, DEFAULT_TOLERANCE, DIRECT, METHODS, Blocked
from lmntk.solvers.problem import SolverSettings
from lmntk.storage.kernel_files import load_kernel
from lmntk.storage.kernel_writer import kernel_writer
from lmntk.storage.paths import RunPaths
from lmntk.storage.tables import format_table
from lmntk.storage.tile_store import TileStore, drop_tiles
from lmntk.trainers.kernel_job import KernelJob

BOUNDS = tuple(Bounds(name, 1) for name in ("examples", "x_examples", "tile", "dimension"))
SECONDS_BETWEEN_LOOKS = 0.02


class RandomExamples:
    """Examples of random features, whose scales decay as a power of their number: `batch` returns features.

    Args:
        number: How many examples.
        dimension: The number of features.
        seed: The seed of the features.
    """

    padded = equal_lengths = False

    def __init__(self, number: int, dimension: int, seed: int) -> None:
        scales = torch.arange(1, dimension + 1) ** -0.75
        self.features = torch.randn(number, dimension, generator=torch.Generator().manual_seed(seed)) * scales
        self.shapes: Sequence[int] = [0] * number

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.shapes)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return the features of some examples, float64 ``[B, d]``."""
        return self.features[list(indices)].double()


class RandomFeatureEngine(Engine):
    """Multiplies random features in place of gradients."""

    name = "random features"

    def plan(self, tiles: TileRequest = TileRequest(), processes: int = 1) -> Plan:  # noqa: B008 (frozen)
        """Lay tiles of the size that is asked for."""
        problem, side = self.problem, tiles.row or 1
        return make_plan(problem.train.shapes, problem.x_examples.shapes, TileSize(side, side), problem.symmetric)

    def tiles_of_group(
        self, plan: Plan, group: int, with_diagonal: Container[Tile] = frozenset()
    ) -> Iterator[ComputedTile]:
        """Multiply the features of both sides of each tile."""
        for row in plan.tile_rows:
            train = self.problem.train.batch(row.train)
            for x in row.x_tiles:
                tile, other = Tile(row.train, x), self.problem.x_examples.batch(x)
                diagonal = (other**2).sum(dim=1).reshape(1, -1, 1, 1) if tile in with_diagonal else None
                yield ComputedTile(tile, (train @ other.T).reshape(1, len(train), 1, len(other), 1), diagonal)

    def diagonal(self, plan: Plan, x: tuple[int, ...], group: int) -> Tensor:
        """Return the squared lengths of some examples' features."""
        return (self.problem.x_examples.batch(x) ** 2).sum(dim=1).reshape(1, -1, 1, 1)

    def expected_bytes(self, plan: Plan) -> int:
        """Return the bytes of a tile and of its features."""
        return 8 * plan.tile_size.row**2

    def estimate_cost(self, plan: Plan) -> CostModel:
        """Return a cost by the number of pairs."""
        return CostModel(lambda row: 0.0, lambda tile: 1e-9 * tile.pairs)


class Watch:
    """The peaks of a process's memory while a block runs."""

    def __init__(self) -> None:
        self.own = self.resident = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the memory again and again until the end of the block."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                self._look()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._look()
            ended.set()
            thread.join()

    def _look(self) -> None:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("Rss", "VmRSS"))}
        self.own = max(self.own, found["RssAnon"] + found["RssShmem"])
        self.resident = max(self.resident, found["VmRSS"])


class Table:
    """Runs steps and notes what each takes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work; keep its seconds and peaks of memory."""
        watch, start, cpu = Watch(), time.perf_counter(), time.process_time()
        with watch.watching():
            result = work()
        self.rows.append(
            {
                "step": name,
                "seconds": f"{time.perf_counter() - start:.1f}",
                "CPU s": f"{time.process_time() - cpu:.1f}",
                "own GB": f"{watch.own / 2**30:.2f}",
                "resident GB": f"{watch.resident / 2**30:.2f}",
            }
        )
        return result


def make_job(train: RandomExamples, x: RandomExamples | None, tile: int, folder: Path) -> KernelJob:
    """Plan a kernel of one logit, whose tiles are kept in a folder."""
    problem = KernelProblem(
        train=train,
        x=x,
        formula=FORMULAS["sgd"],
        num_logits=1,
        model=FunctionModel(lambda params, batch: batch),
        params={"features": train.features},
    )
    engine = RandomFeatureEngine(problem, MemoryBudget.from_gb(1))
    plan = engine.plan(TileRequest(tile, tile))
    name = f"train × {'train' if x is None else 'test'}"
    return KernelJob(name, engine, plan, engine.estimate_cost(plan), TileStore.open(folder, {"name": name}))


def write_kernel(job: KernelJob, paths: RunPaths, split: str, labels: Tensor, progress: bool) -> None:
    """Assemble a kernel from its tiles, and remove them."""
    kernel, slices = job.outline()
    with kernel_writer(paths, split, kernel, labels, slices) as writer:
        writer.finish({}, job.assemble(writer, progress))
    drop_tiles(job.store.folder)


def make_kernels(given: argparse.Namespace, folder: Path, table: Table) -> RunPaths:
    """Compute the tiles of both kernels and assemble them."""
    paths = RunPaths(folder, "random")
    train = RandomExamples(given.examples, given.dimension, seed=0)
    direction = torch.randn(given.dimension, generator=torch.Generator().manual_seed(2))
    for split in ("train", "test"):
        x = None if split == "train" else RandomExamples(given.x_examples, given.dimension, seed=1)
        job = make_job(train, x, given.tile, paths.tiles(split))
        labels = torch.sign((train if x is None else x).features @ direction)

        def compute(job: KernelJob = job) -> None:
            job.store.create()
            job.compute(progress=given.progress)

        table.step(f"{job.name}: tiles", compute)
        table.step(
            f"{job.name}: assembly",
            lambda job=job, split=split, labels=labels: write_kernel(job, paths, split, labels, given.progress),
        )
    return paths


def solve(given: argparse.Namespace, method: str, paths: RunPaths) -> tuple[np.ndarray, dict[str, float]]:
    """Open both kernels, fit `lstsq` and predict; return the logits and what the solver says of itself."""
    blocked = None if method == DIRECT else Blocked(method, Path(paths.folder), given.cg_tolerance, given.progress)
    settings = SolverSettings(regularization=given.regularization, blocked=blocked)
    train, labels = load_kernel(paths.kernel("train"))
    fitted = fit("lstsq", train.numpy(), labels.numpy(), settings)
    test, test_labels = load_kernel(paths.kernel("test"))
    found = fitted.predict(test.numpy(), test_labels.numpy())
    right = float((np.sign(found.logits[:, 0]) == test_labels.numpy()).mean())
    return found.logits, {**found.metrics, "accuracy": right}


def measure(given: argparse.Namespace) -> None:
    """Make the kernels, solve with each method, and print what it took."""
    check_numbers(BOUNDS, vars(given))
    if not Path(given.folder).is_dir():
        raise UsageError(f"--folder: there is no folder {given.folder}; make it, on a disk with room for the kernel")
    torch.set_num_threads(given.threads)
    limit = int(given.memory_gb * 2**30)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    table, folder = Table(), Path(tempfile.mkdtemp(dir=given.folder))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        paths = make_kernels(given, folder, table)
        size = paths.kernel("train").stat().st_size
        found = {
            method: table.step(f"{method}: fit and predict", lambda method=method: solve(given, method, paths))
            for method in given.methods
        }
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        shutil.rmtree(folder)
    print(
        f"{given.examples} × {given.examples} in one logit, {size / 2**30:.2f} GB, limit {given.memory_gb:g} GB, "
        f"{given.threads} threads, λ = {given.regularization:g}"
    )
    print(format_table(table.rows, "markdown", words=["step"]), end="")
    first = next(iter(found.values()))[0]
    for method, (logits, metrics) in found.items():
        said = ", ".join(f"{name} = {value:.3g}" for name, value in metrics.items())
        print(
            f"{method}: {said}; largest difference of logits from {given.methods[0]}'s: {abs(logits - first).max():.1e}"
        )


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4000, help="train examples, N (4000)")
    parser.add_argument("--x_examples", type=int, default=1000, help="test examples, X (1000)")
    parser.add_argument("--tile", type=int, default=500, help="examples along either side of a tile (500)")
    parser.add_argument("--dimension", type=int, default=512, help="random features of an example (512)")
    parser.add_argument("--regularization", type=float, default=0.001, help="λ of lstsq (0.001)")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=[CHOLESKY, "cg"], help="how to solve")
    parser.add_argument("--cg_tolerance", type=float, default=DEFAULT_TOLERANCE, help="of cg (1e-8)")
    parser.add_argument("--memory_gb", type=float, default=4.0, help="limit of the process's data, in GB (4)")
    parser.add_argument("--threads", type=int, default=2, help="threads of products (2)")
    parser.add_argument("--folder", required=True, help="an existing folder with room for twice the kernel")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    return run_tool(make_parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
