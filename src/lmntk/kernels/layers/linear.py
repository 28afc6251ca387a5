"""Linear layers: the gradient of a weight is a sum of outer products, G_cᵀA, and need not be held for long.

The inner product of two gradients does not ask how a weight is laid out, so that GPT-2's `Conv1D`, which stores it
transposed, and decoders of some rows only are linear layers like any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels.contraction import BLOCK
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Cost, Gradients, Layer, Workspace, stack_vectors, vector_kernel, with_positions
from lmntk.kernels.layers.linear_factors import OuterProducts, shape_of, storage_key
from lmntk.kernels.layers.linear_gram import entry_flops, gram
from lmntk.kernels.timing import stage

# The rate at which gradients are formed and contracted, in units of that of Gram matrices' larger products.
DENSE_EFFICIENCY = 0.6
# X gradients (examples times logits) that are formed together: enough for products near the machine's best rate.
FORMED_TOGETHER = 256
# What is formed together is multiplied before it leaves the processor's cache: written to memory and read again, it
# would take a quarter longer.
CACHED_BYTES = 2**24
# Fewer rows of a weight at a time make slow products.
LEAST_ROWS = 64


class LinearLayer(Layer):
    """``y = x Wᵀ + b``."""

    def factors(self, inputs: Tensor, gradients: Gradients) -> OuterProducts:
        """Keep inputs and gradients, and of a bias's gradient the whole."""
        gradients = [with_positions(gradient) for gradient in gradients]
        biases = stack_vectors(gradients) if "bias" in self.parameter_names else None
        if "weight" not in self.parameter_names:
            return OuterProducts(None, [gradient[:, :0] for gradient in gradients], biases)
        return OuterProducts(with_positions(inputs), gradients, biases)

    def cost(self, factors: OuterProducts, train: int, x: int, signed: bool) -> Cost:
        """The whole weight, or Gram matrices; nothing where the gradient is one outer product, or the bias alone."""
        if factors.inputs is None or factors.positions <= 1:
            return Cost()
        c, _, d_out, d_in = shape_of([factors])
        entry = entry_flops(c, d_out, d_in)
        positions = (train + x) * factors.positions, train * x * factors.positions**2
        if not signed and _gram_is_faster(positions[1] * entry, _dense_flops(c, d_out, d_in, positions[0], train * x)):
            return Cost(gram_flops_per_position_pair=entry)
        return Cost(dense_numel=d_out * d_in)

    def buffer(self, factors: OuterProducts, train: int) -> int:
        """The gradients that are formed together; nothing where none can be."""
        if factors.inputs is None or factors.positions <= 1:
            return 0
        c, _, d_out, d_in = shape_of([factors])
        rows = _rows_in_cache(FORMED_TOGETHER, d_out, d_in, factors.gradients[0].element_size())
        return max(c * train, FORMED_TOGETHER) * rows * min(d_out, d_in)

    def kernel(
        self,
        train: Sequence[OuterProducts],
        x: Sequence[OuterProducts],
        directions: Sequence[SignPlacement],
        workspace: Workspace,
    ) -> Tensor:
        """Multiply by Gram matrices or dense gradients, whichever costs less: float64 ``[D, n, C, x, C]``."""
        return shared_input_kernel([LinearPair(self, train, x)], directions, workspace)


@dataclass(frozen=True)
class LinearPair:
    """A linear layer's factors on both sides of a tile.

    Attributes:
        layer: The layer.
        train: The factors of the train tile's batches.
        x: The same for the X tile.
    """

    layer: LinearLayer
    train: Sequence[OuterProducts]
    x: Sequence[OuterProducts]


def shared_input_kernel(
    members: Sequence[LinearPair], directions: Sequence[SignPlacement], workspace: Workspace
) -> Tensor:
    """Return the sum of the parts of layers that are given the same inputs, as queries, keys and values are.

    Args:
        members: The layers' factors; of all the weights count, unless it is one alone.
        directions: Which side takes the sign.
        workspace: Buffers to use.

    Returns:
        float64 ``[D, n, C, x, C]``.
    """
    parts = [
        vector_kernel(_biases(member.train), _biases(member.x), directions)
        for member in members
        if "bias" in member.layer.parameter_names
    ]
    if "weight" in members[0].layer.parameter_names:
        train, x = members[0].train, members[0].x
        # The sign of a sum has no factors, that of a single outer product has.
        factored = all(factor.positions == 1 for factor in (*train, *x)) or not any(
            direction.sign_train or direction.sign_x for direction in directions
        )
        if factored and _gram_is_faster(*_flops(members)):
            with stage("factors alone"):
                trains, xs = [member.train for member in members], [member.x for member in members]
                found = [gram(trains, xs, directions, workspace)]
        else:
            found = [_dense(member.train, member.x, directions, workspace) for member in members]
        parts += [part.permute(0, 2, 1, 4, 3) for part in found]
    return sum(parts[1:], start=parts[0])


def group_by_shared_input(
    layers: Mapping[str, Layer], train: Mapping[str, Sequence[Any]], x: Mapping[str, Sequence[Any]]
) -> list[list[str]]:
    """Group layers, by name and in their order, by what they were given; most stand alone.

    Args:
        layers: All layers.
        train: The factors of the train tile's batches in each of them.
        x: The same for the X tile.
    """
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        key: object = name
        if isinstance(layer, LinearLayer) and "weight" in layer.parameter_names:
            batches = (*train[name], *x[name])
            key = tuple((storage_key(factor.inputs), factor.positions) for factor in batches)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _biases(factors: Sequence[OuterProducts]) -> list[Tensor]:
    return [factor.biases for factor in factors if factor.biases is not None]


def _flops(members: Sequence[LinearPair]) -> tuple[float, float]:
    """Return what Gram matrices cost, and what forming and multiplying dense gradients does."""
    train, x = members[0].train, members[0].x
    c, n, _, d_in = shape_of(train)
    widths = [shape_of(member.train)[2] for member in members]
    positions = [sum(factor.batch_size * factor.positions for factor in side) for side in (train, x)]
    dense = sum(_dense_flops(c, width, d_in, sum(positions), n * shape_of(x)[1]) for width in widths)
    return positions[0] * positions[1] * entry_flops(c, sum(widths), d_in), dense


def _dense_flops(c: int, d_out: int, d_in: int, positions: int, pairs: int) -> float:
    return 2.0 * d_out * d_in * c * (positions + c * pairs)


def _gram_is_faster(gram_flops: float, dense_flops: float) -> bool:
    return gram_flops * DENSE_EFFICIENCY < dense_flops


def _dense(
    train: Sequence[OuterProducts],
    x: Sequence[OuterProducts],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
) -> Tensor:
    """Form gradients in preallocated buffers, some rows at a time, and multiply them: float64 ``[D, C, n, C, x]``."""
    c, n, d_out, d_in = shape_of(train)
    inner, outer = sorted((d_out, d_in))
    pieces = _pieces(x, max(1, FORMED_TOGETHER // c))
    width = max(sum(factor.batch_size for factor in piece) for piece in pieces)
    cached = _rows_in_cache(c * width, d_out, d_in, train[0].gradients[0].element_size())
    rows = max(1, min(cached, workspace.capacity // (c * max(n, width) * inner)))
    result = torch.zeros(
        len(directions), c, shape_of(x)[1], c, n, dtype=torch.float64, device=train[0].gradients[0].device
    )
    for start in range(0, outer, rows):
        part = slice(start, min(start + rows, outer))
        with stage("forming"):
            formed_train = _form("train", train, part, workspace)
        signed_train = formed_train
        if all(direction.sign_train for direction in directions):
            formed_train.sign_()
        elif any(direction.sign_train for direction in directions):
            signed_train = torch.sign(formed_train, out=workspace.take("signed", *formed_train.shape))
        first = 0
        for piece in pieces:
            with stage("forming"):
                formed_x = _form("x", piece, part, workspace)
            size = formed_x.shape[1]
            # X is signed in place: the directions that need it signed come last.
            for out, direction in sorted(zip(result, directions, strict=True), key=lambda pair: pair[1].sign_x):
                if direction.sign_x:
                    formed_x.sign_()
                right = signed_train if direction.sign_train else formed_train
                product = workspace.take("product", c * size, c * n)
                flat_x, flat_right = formed_x.view(c * size, -1), right.view(c * n, -1)
                with stage("contraction"):
                    for x_block, right_block in zip(flat_x.split(BLOCK, 1), flat_right.split(BLOCK, 1), strict=True):
                        torch.mm(x_block, right_block.T, out=product)
                        out[:, first : first + size] += product.view(c, size, c, n)
            first += size
    return result.permute(0, 3, 4, 1, 2)


def _rows_in_cache(count: int, d_out: int, d_in: int, element_size: int) -> int:
    """Return how many rows of `count` gradients (columns, if they are wide) are best formed at a time."""
    inner, outer = sorted((d_out, d_in))
    return min(outer, max(LEAST_ROWS, CACHED_BYTES // (count * inner * element_size)))


def _form(name: str, factors: Sequence[OuterProducts], part: slice, workspace: Workspace) -> Tensor:
    """Form some rows of the gradients, or of the transposed ones if the weight is wide: ``[C, B, rows, inner]``."""
    c, examples, d_out, d_in = shape_of(factors)
    buffer = workspace.take(name, c, examples, part.stop - part.start, min(d_out, d_in))
    for logit in range(c):
        first = 0
        for factor in factors:
            left, right = factor.gradients[logit], factor.inputs
            assert right is not None
            if d_in > d_out:
                left, right = right, left
            torch.bmm(left[:, :, part].transpose(1, 2), right, out=buffer[logit, first : first + factor.batch_size])
            first += factor.batch_size
    return buffer


def _pieces(factors: Sequence[OuterProducts], size: int) -> list[list[OuterProducts]]:
    """Cut batches, or put them together, to pieces of `size` examples; the last one has the rest."""
    pieces: list[list[OuterProducts]] = []
    room = 0
    for factor in factors:
        first = 0
        while first < factor.batch_size:
            if not room:
                pieces.append([])
                room = size
            taken = factor[first : min(first + room, factor.batch_size)]
            pieces[-1].append(taken)
            room -= taken.batch_size
            first += taken.batch_size
    return pieces
