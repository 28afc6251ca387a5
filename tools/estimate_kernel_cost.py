#!/usr/bin/env python3
"""What the kernels of a k-shot task cost on one and on many GPUs: by counting alone, without model and GPU.

The plan is the factored engine's own: its tiles, its memory, and how it deals tiles to processes. What the engine
measures on the machine is counted here instead: the factors' bytes, from the shape of a BERT or RoBERTa whose last
layer computes one position, and seconds, from flops. `run.py --dry_run` on the machine itself knows better.

    python tools/estimate_kernel_cost.py --shape roberta-large
    python tools/estimate_kernel_cost.py --shape 1b --k 16 --processes 1 8
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.config.tool_parser import Parser, exit_status
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.kernels import FORMULAS, KernelProblem, MemoryBudgetError
from lmntk.kernels.engines import factored
from lmntk.kernels.engines.base import Engine
from lmntk.kernels.layers import linear
from lmntk.kernels.memory import DEFAULT_FRACTION
from lmntk.kernels.tiling import CostModel, Plan, Tile

FLOAT32, FLOAT64 = 4, 8  # bytes: gradients, kernels
SIZES = ("layers", "hidden", "intermediate", "vocabulary")
TILES = ("per_device_train_batch_size", "per_device_eval_batch_size")
COUNTS = (*SIZES, *TILES, "k", "classes", "logits", "x_examples", "tokens", "processes")
BOUNDS = (
    *(Bounds(name, 1, 10**6) for name in COUNTS),
    Bounds("rate", 1e-6, 1e9),
    Bounds("memory_gb", 0, 1e9, above=True),
)


@dataclass(frozen=True)
class Shape:
    """A model as BERT and RoBERTa are made: `hidden` features a token, `intermediate` inside the feed-forward part."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def formed(self) -> int:
        """P, the weights whose gradients are formed: of the last layer, only keys and values see all tokens."""
        d, between = self.hidden, self.intermediate
        return (self.layers - 1) * (4 * d * d + 2 * d * between) + 2 * d * d

    @property
    def at_one_position(self) -> int:
        """The weights that only the position that predicts goes through: the rest of the last layer, and the head."""
        return 3 * self.hidden**2 + 2 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All parameters of a checkpoint, whose decoder is the word embeddings."""
        d, between = self.hidden, self.intermediate
        layer = 4 * (d * d + d) + 2 * d * between + between + d + 4 * d
        return self.layers * layer + (self.vocabulary + 512 + 2) * d + d * d + 5 * d + self.vocabulary

    @property
    def model_bytes(self) -> int:
        """The model in memory, where the decoder has weights of its own."""
        return FLOAT32 * (self.parameters + self.vocabulary * self.hidden)

    def factor_bytes(self, logits: int, tokens: float) -> int:
        """What the engine keeps of a token, all layers together, where examples have so many tokens.

        Of a linear layer that is 4 · (d_in + C · d_out); query, key and value share their input.
        """
        d, between = self.hidden, self.intermediate
        inputs, outputs = 3 * d + between, 5 * d + between
        per_token = (self.layers - 1) * (inputs + logits * outputs) + d + 2 * logits * d
        # Words, positions and segments: a row for each logit, and which token it is, in int64.
        per_token += 3 * (logits * d + 2)
        # The last layer's one position, and the head's two matrices.
        per_example = inputs + logits * (outputs - 2 * d) + 2 * d + logits * (d + logits)
        # Biases, and weights and biases of the norms.
        per_example += logits * (self.layers * outputs + d + logits + (2 * self.layers + 2) * 2 * d)
        return round(FLOAT32 * (per_token + per_example / tokens))


SHAPES = {
    "bert-base": Shape(12, 768, 3072, 30522),
    "roberta-large": Shape(24, 1024, 4096, 50265),
    "1b": Shape(18, 2048, 8192, 50265),
}


class Lengths(list[int]):
    """Examples of which nothing is known but their numbers of tokens."""

    padded = True
    equal_lengths = False
    shapes = property(lambda self: self)


def spread_lengths(count: int, mean: int) -> Lengths:
    """Spread lengths around their mean as SST-2's prompts are: 8 to 60 tokens, 29 on average."""
    spread = NormalDist(mean, mean / 3)
    found = (spread.inv_cdf((number + 0.5) / count) for number in range(count))
    return Lengths([round(min(max(length, mean / 4), 2 * mean)) for length in found])


class CountingEngine(factored.FactoredEngine):
    """The factored engine as far as it plans, with a model's shape in place of a model."""

    def __init__(self, problem: KernelProblem, memory_bytes: int, shape: Shape, flops: float) -> None:
        Engine.__init__(self, problem, memory_bytes)
        self._flops = factored.PRODUCT_EFFICIENCY * flops
        self._fallback = None
        self._lengths = [*problem.train.shapes, *problem.x_examples.shapes]
        self._longest = max(self._lengths)
        self._formed = shape.formed
        tokens = sum(self._lengths) / len(self._lengths)
        self._propagated = shape.formed + shape.at_one_position / tokens
        per_token = shape.factor_bytes(problem.num_logits, tokens)
        together = max(problem.num_logits * len(problem.train), linear.FORMED_TOGETHER)
        buffer = max(factored.LEAST_BUFFER, FLOAT32 * together * linear.LEAST_ROWS * shape.hidden)
        activations = min(memory_bytes * factored.ACTIVATION_SHARE, factored.MOST_ACTIVATION_BYTES)
        affordable = int(activations / (factored.ACTIVATIONS * per_token))
        self._most_x_bytes = factored.MOST_X_BYTES  # all is taken to be formed
        self._memory = factored.Memory(
            per_token,
            buffer=int(min(factored.LARGEST_BUFFER, memory_bytes * factored.BUFFER_SHARE, buffer)),
            tokens=max(self._longest, min(factored.MOST_TOKENS, affordable)),
        )

    def estimate_cost(self, plan: Plan) -> CostModel:
        """Count flops: (1 + C) · 2 · P to propagate a token, 2 · P · C to form its part, 2 · P · C² a pair."""
        problem, c = self.problem, self.problem.num_logits

        def propagation(shapes: Sequence[int], indices: tuple[int, ...]) -> float:
            return (1 + c) * 2 * self._propagated * sum(shapes[index] for index in indices)

        def tile(tile: Tile) -> float:
            x, x_shapes = (() if problem.on_diagonal(tile) else tile.x), problem.x_examples.shapes
            tokens = sum(problem.train.shapes[index] for index in tile.train) + sum(x_shapes[index] for index in x)
            products = tokens + c * tile.pairs * len(problem.formula.directions)
            return (propagation(x_shapes, x) + 2 * self._formed * c * products) / self._flops

        return CostModel(lambda train: propagation(problem.train.shapes, train) / self._flops, tile)


def estimate(given: argparse.Namespace, processes: int, tiles: Sequence[int | None] = (None, None)) -> dict[str, Any]:
    """Return what the three kernels cost so many processes, in tiles of their own choice or in such."""
    shape, formula, logits = given.shape, FORMULAS[given.formula], given.logits
    sizes = {"train": given.k * given.classes, "dev": given.k * given.classes, "test": given.x_examples}
    sides = {split: spread_lengths(size, given.tokens) for split, size in sizes.items()}
    budget = int(DEFAULT_FRACTION * (given.memory_gb * 2**30 - shape.model_bytes))
    count, seconds, mean, peak = 0, {}, 0.0, 0
    for split, x in sides.items():
        problem = KernelProblem(NotImplemented, {}, sides["train"], None if split == "train" else x, formula, logits)
        engine = CountingEngine(problem, budget, shape, given.rate * 1e12)
        try:
            plan = engine.plan(*tiles, processes)
        except MemoryBudgetError as error:
            least = (error.needed / DEFAULT_FRACTION + shape.model_bytes) / 2**30
            raise UsageError(
                f"--memory_gb: the tiles of train × {split} take {least + 0.05:.1f} GB with the model"
            ) from error
        pace = engine.estimate_cost(plan)
        shares = [share.seconds(pace) for share in plan.partition(pace, processes)]
        seconds[split], mean, count = max(shares), mean + sum(shares) / processes, count + sum(1 for _ in plan)
        peak = max(peak, engine.expected_bytes(plan))
    kernels = [FLOAT64 * len(formula.directions) * sizes["train"] * size * logits**2 for size in sizes.values()]
    return {
        "processes": processes,
        "tiles": count,
        "seconds": seconds,
        "all": sum(seconds.values()),
        "memory": shape.model_bytes + peak,
        "disk": FLOAT32 * shape.parameters + sum(kernels) + max(kernels),
        "kernels": kernels,
        "balance": sum(seconds.values()) / mean,
    }


def table(rows: list[dict[str, Any]], alone: float) -> str:
    """Return the estimates as a Markdown table; speed-ups are over one process of so many seconds."""
    head = ["processes", "tiles", *(f"train × {split}" for split in rows[0]["seconds"]), "all", "speed-up"]
    head += ["GPU memory each", "disk", "slowest / mean"]
    lines = ["| " + " | ".join(head) + " |", "|---:" * len(head) + "|"]
    for row in rows:
        cells = [str(row["processes"]), str(row["tiles"]), *map(_duration, (*row["seconds"].values(), row["all"]))]
        cells += [f"{alone / row['all']:.1f}", *(f"{row[name] / 2**30:.1f} GB" for name in ("memory", "disk"))]
        lines.append("| " + " | ".join([*cells, f"{row['balance']:.2f}"]) + " |")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; `shape` becomes a `Shape`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="roberta-large", help="the model (default roberta-large)")
    for name in (*SIZES, *TILES):
        parser.add_argument(f"--{name}", type=int, help="as in run.py" if name in TILES else "another than the shape's")
    parser.add_argument("--k", type=int, default=512, help="train examples, and dev examples, a class (default 512)")
    parser.add_argument("--classes", type=int, default=2, help="of the task (default 2)")
    parser.add_argument("--logits", type=int, help="1 under --binary_classification (default: one a class)")
    parser.add_argument("--x_examples", type=int, default=1000, help="test examples (default 1000)")
    parser.add_argument("--tokens", type=int, default=30, help="mean length of a prompt (default 30)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 64], help="one a device (default 1 64)")
    parser.add_argument("--rate", type=float, default=40, help="TFLOP/s of large float32 matrix products (default 40)")
    parser.add_argument("--memory_gb", type=float, default=80, help="memory of a device, in 2**30 bytes (default 80)")
    parser.add_argument("--formula", choices=FORMULAS, default="sgd", help="the kernel (default sgd)")
    given = parser.parse_args(argv)
    check_numbers(BOUNDS, vars(given))
    given.logits = given.logits or (1 if FORMULAS[given.formula].is_asymmetric else given.classes)
    if FORMULAS[given.formula].is_asymmetric and given.logits != 1:
        raise UsageError(f"--formula {given.formula} takes --logits 1")
    given.shape = replace(SHAPES[given.shape], **{name: own for name in SIZES if (own := getattr(given, name))})
    return given


def main(argv: list[str]) -> int:
    """Do one command line; return the exit status."""
    return exit_status(lambda: count(argv))


def count(argv: list[str]) -> None:
    """Count, and print a table."""
    given = parse(argv)
    alone = estimate(given, 1)
    rows = [estimate(given, number, [getattr(given, name) for name in TILES]) for number in given.processes]
    print(table(rows, alone["all"]))
    kernels, parameters = alone["kernels"], given.shape.parameters
    print(
        f"\n{parameters / 1e6:.0f} M parameters, {given.rate:g} TFLOP/s, of which products of factors reach "
        f"{factored.PRODUCT_EFFICIENCY:.0%}. Disk: checkpoint {FLOAT32 * parameters / 2**30:.2f} GB, kernels "
        f"{sum(kernels) / 2**30:.2f}, tiles {max(kernels) / 2**30:.2f}. The first process takes up to "
        f"{2 * max(kernels) / 2**30:.2f} GB of the machine's own memory for a kernel."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
