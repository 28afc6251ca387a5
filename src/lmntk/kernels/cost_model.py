"""The cost of the kernels of a k-shot task, counted from a model's shape: without the model, the data or the device.

The plan is the `factored` engine's own. What the engine measures is counted here instead: the bytes of the factors,
from the shape of a BERT or RoBERTa whose last layer computes one position, and seconds, from flops.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from lmntk.kernels.engines.base import ANY_TILES, MemoryBudgetError
from lmntk.kernels.engines.factored_planner import FactoredPlanner, LayerDemands, side_lengths
from lmntk.kernels.formulas import Formula
from lmntk.kernels.layers.linear_dense import dense_buffer_numel
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import KernelSides
from lmntk.kernels.tiling import CostModel, TileRequest
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

FLOAT32, FLOAT64 = 4, 8  # bytes: gradients, kernels


@dataclass(frozen=True)
class ModelShape:
    """The shape of a BERT or RoBERTa.

    Attributes:
        layers: Number of transformer layers.
        hidden: Features of a token.
        intermediate: Features inside the feed-forward network.
        vocabulary: Number of tokens.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def dense_numel(self) -> int:
        """P, the weights whose gradients are formed: in the last layer only keys and values see all tokens."""
        d, between = self.hidden, self.intermediate
        return (self.layers - 1) * (4 * d * d + 2 * d * between) + 2 * d * d

    @property
    def single_position_numel(self) -> int:
        """The weights that only the predicting position passes: the rest of the last layer, and the head."""
        return 3 * self.hidden**2 + 2 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All parameters of a checkpoint, whose decoder is the word embeddings."""
        d, between = self.hidden, self.intermediate
        layer = 4 * (d * d + d) + 2 * d * between + between + d + 4 * d
        return self.layers * layer + (self.vocabulary + 512 + 2) * d + d * d + 5 * d + self.vocabulary

    @property
    def model_bytes(self) -> int:
        """Bytes of the model in memory, where the decoder has weights of its own."""
        return FLOAT32 * (self.parameters + self.vocabulary * self.hidden)

    def factor_bytes(self, logits: int, tokens: float) -> int:
        """Return the bytes of a token's factors in all layers, where examples have so many tokens on average.

        A linear layer keeps 4 · (d_in + C · d_out) bytes; query, key and value share their input.
        """
        d, between = self.hidden, self.intermediate
        inputs, outputs = 3 * d + between, 5 * d + between
        per_token = (self.layers - 1) * (inputs + logits * outputs) + d + 2 * logits * d
        # Words, positions and segments: a row for each logit, and the token's index in int64.
        per_token += 3 * (logits * d + 2)
        # The last layer's single position, and the head's two matrices.
        per_example = inputs + logits * (outputs - 2 * d) + 2 * d + logits * (d + logits)
        # Biases, and weights and biases of the norms.
        per_example += logits * (self.layers * outputs + d + logits + (2 * self.layers + 2) * 2 * d)
        return round(FLOAT32 * (per_token + per_example / tokens))


SHAPES = {
    "bert-base": ModelShape(12, 768, 3072, 30522),
    "roberta-large": ModelShape(24, 1024, 4096, 50265),
    "1b": ModelShape(18, 2048, 8192, 50265),
}


class Lengths(list[int]):
    """Examples of which only the numbers of tokens are known: `Examples` without batches."""

    padded = True
    equal_lengths = False

    @property
    def shapes(self) -> list[int]:
        """The numbers of tokens."""
        return self

    def batch(self, indices: object) -> None:
        """Fail: there are no tokens."""
        raise NotImplementedError("lengths have no batches")


def spread_lengths(count: int, mean: int) -> Lengths:
    """Spread lengths around their mean like SST-2's prompts, which have 8 to 60 tokens, 29 on average.

    Example:
        >>> spread_lengths(5, 30)
        [17, 25, 30, 35, 43]
    """
    spread = NormalDist(mean, mean / 3)
    found = (spread.inv_cdf((number + 0.5) / count) for number in range(count))
    return Lengths([round(min(max(length, mean / 4), 2 * mean)) for length in found])


def planner_of_shape(
    shape: ModelShape, sides: KernelSides, budget: MemoryBudget, tuning: Tuning = DEFAULT_TUNING
) -> FactoredPlanner:
    """Return the planner that the engine would have for a model of this shape in float32."""
    lengths, c = side_lengths(sides), sides.num_logits
    buffer = dense_buffer_numel(c * len(sides.train), shape.intermediate, shape.hidden, FLOAT32, tuning)
    demands = LayerDemands(
        per_token=shape.factor_bytes(c, sum(lengths) / len(lengths)),
        buffer_bytes=FLOAT32 * buffer,
        dense_numel=shape.dense_numel,
    )
    return FactoredPlanner(sides, budget, demands, tuning=tuning)


def cost_of_shape(
    shape: ModelShape,
    sides: KernelSides,
    planner: FactoredPlanner,
    product_flops: float,
    tuning: Tuning = DEFAULT_TUNING,
) -> CostModel:
    """Count flops: (1 + C) · 2 · P to propagate a token, 2 · P · C to form its gradients, 2 · P · C² for a pair.

    Args:
        shape: The shape of the model.
        sides: The examples of both sides.
        planner: The planner of that shape.
        product_flops: Rate of large float32 matrix products, in floating-point operations a second.
        tuning: How much of that rate is reached.
    """
    lengths = side_lengths(sides)
    weights = shape.dense_numel + shape.single_position_numel / (sum(lengths) / len(lengths))
    seconds_per_token = (1 + sides.num_logits) * 2 * weights / (tuning.product_efficiency * product_flops)
    return planner.cost_model(seconds_per_token, product_flops)


class DeviceTooSmallError(Exception):
    """The memory of a device is too small for the tiles.

    Args:
        split: The split whose kernel with the train examples does not fit.
        needed: Memory of the device that is enough, in bytes.
    """

    def __init__(self, split: str, needed: float) -> None:
        self.split = split
        self.needed = needed
        super().__init__(f"the tiles of train × {split} take {needed / 2**30:.1f} GB with the model")


@dataclass(frozen=True)
class CostEstimate:
    """The cost of all kernels of a task.

    Attributes:
        processes: Number of processes that share each kernel.
        tiles: Number of tiles of all kernels.
        seconds: Seconds of the slowest process by split.
        memory: Peak memory of a process with the model, in bytes.
        kernels: Bytes of each kernel.
        disk: Peak of the disk space in bytes: checkpoint, kernels, and the tiles of the largest kernel.
        balance: Seconds of the slowest process over those of the mean.
    """

    processes: int
    tiles: int
    seconds: dict[str, float]
    memory: int
    kernels: list[int]
    disk: int
    balance: float

    @property
    def total_seconds(self) -> float:
        """Seconds of all kernels, one after the other."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class KernelTask:
    """The kernels of a k-shot task, and the device that computes them.

    Attributes:
        shape: The shape of the model.
        sizes: Number of examples of each split; ``"train"`` is one.
        tokens: Mean number of tokens of an example.
        formula: The formula of the kernels.
        num_logits: C, the logits of an example.
        product_flops: Rate of large float32 matrix products, in floating-point operations a second.
        device_bytes: Memory of the device in bytes.
    """

    shape: ModelShape
    sizes: Mapping[str, int]
    tokens: int
    formula: Formula
    num_logits: int
    product_flops: float
    device_bytes: float

    def estimate(self, processes: int, tiles: TileRequest = ANY_TILES) -> CostEstimate:
        """Return the cost for so many processes, each on a device of its own.

        Raises:
            DeviceTooSmallError: The device cannot hold the tiles.
        """
        shape, directions = self.shape, len(self.formula.directions)
        budget = MemoryBudget.of_free(self.device_bytes - shape.model_bytes)
        count, seconds, mean, peak = 0, {}, 0.0, 0
        for split in self.sizes:
            sides = self._sides(split)
            planner = planner_of_shape(shape, sides, budget)
            try:
                plan = planner.plan(tiles, processes)
            except MemoryBudgetError as error:
                needed = error.needed / MemoryBudget.DEFAULT_FRACTION + shape.model_bytes
                raise DeviceTooSmallError(split, needed) from error
            cost = cost_of_shape(shape, sides, planner, self.product_flops)
            shares = [share.seconds(cost) for share in plan.partition(cost, processes)]
            seconds[split], mean, count = max(shares), mean + sum(shares) / processes, count + sum(1 for _ in plan)
            peak = max(peak, planner.expected_bytes(plan))
        entries = directions * self.sizes["train"] * self.num_logits**2
        kernels = [FLOAT64 * entries * size for size in self.sizes.values()]
        return CostEstimate(
            processes,
            count,
            seconds,
            memory=shape.model_bytes + peak,
            kernels=kernels,
            disk=FLOAT32 * shape.parameters + sum(kernels) + max(kernels),
            balance=sum(seconds.values()) / mean,
        )

    def _sides(self, split: str) -> KernelSides:
        train, x = (spread_lengths(self.sizes[name], self.tokens) for name in ("train", split))
        other = None if split == "train" else x
        return KernelSides(train=train, x=other, formula=self.formula, num_logits=self.num_logits)
