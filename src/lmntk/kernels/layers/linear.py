"""Linear layers: the gradient of a weight is a sum of outer products, G_cᵀA, and need not be held for long.

The inner product of two gradients does not ask how a weight is laid out, so that GPT-2's `Conv1D`, which stores it
transposed, and decoders of some rows only are linear layers like any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels.contraction import BLOCK
from lmntk.kernels.formulas import Direction
from lmntk.kernels.layers.base import Cost, Gradients, Layer, Workspace, stack_vectors, vector_kernel, with_positions
from lmntk.kernels.machine import stage

# What an entry of a Gram matrix costs beyond its products, in flops: it is multiplied, summed up and moved.
GRAM_ENTRY_FLOPS = 350
# The rate at which gradients are formed and contracted, in units of that of Gram matrices' larger products.
DENSE_EFFICIENCY = 0.6
# Tokens of either side whose Gram matrix is made at a time: enough for large products, few enough for the cache.
GRAM_TOKENS = 1024
# X gradients (examples times logits) that are formed together: enough for products near the machine's best rate.
FORMED_TOGETHER = 256
# What is formed together is multiplied before it leaves the processor's cache: written to memory and read again, it
# would take a quarter longer.
CACHED_BYTES = 2**24
# Fewer rows of a weight at a time make slow products.
LEAST_ROWS = 64


@dataclass(frozen=True)
class OuterProducts:
    """The factors of a batch: example i's gradient of logit c is ``gradients[c][i].T @ inputs[i]``.

    Attributes:
        inputs: A, ``[B, L, d_in]``; None where the weight does not count.
        gradients: G of each logit, ``[B, L, d_out]``.
        biases: G summed over positions, ``[B, C, d_out]``; None where the bias does not count.
    """

    inputs: Tensor | None
    gradients: Sequence[Tensor]
    biases: Tensor | None

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return len(self.gradients[0])

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.gradients[0].shape[2]

    @property
    def length(self) -> int:
        """L, the number of outer products that an example's gradient is a sum of."""
        return self.gradients[0].shape[1]

    def some(self, part: slice) -> "OuterProducts":
        """Return the factors of some examples of the batch."""
        inputs = None if self.inputs is None else self.inputs[part]
        return OuterProducts(
            inputs,
            [gradient[part] for gradient in self.gradients],
            None if self.biases is None else self.biases[part],
        )


class LinearLayer(Layer):
    """``y = x Wᵀ + b``."""

    def factors(self, inputs: Tensor, gradients: Gradients) -> OuterProducts:
        """Keep inputs and gradients, and of a bias's gradient the whole."""
        gradients = [with_positions(gradient) for gradient in gradients]
        biases = stack_vectors(gradients) if "bias" in self.counted else None
        if "weight" not in self.counted:
            return OuterProducts(None, [gradient[:, :0] for gradient in gradients], biases)
        return OuterProducts(with_positions(inputs), gradients, biases)

    def cost(self, factors: OuterProducts, train: int, x: int, signed: bool) -> Cost:
        """The whole weight, or Gram matrices; nothing where the gradient is one outer product, or the bias alone."""
        if factors.inputs is None or factors.length <= 1:
            return Cost()
        c, _, d_out, d_in = _shape([factors])
        entry = _entry_flops(c, d_out, d_in)
        positions = (train + x) * factors.length, train * x * factors.length**2
        if not signed and _gram_is_faster(positions[1] * entry, _dense_flops(c, d_out, d_in, positions[0], train * x)):
            return Cost(entry=entry)
        return Cost(formed=d_out * d_in)

    def buffer(self, factors: OuterProducts, train: int) -> int:
        """The gradients that are formed together; nothing where none can be."""
        if factors.inputs is None or factors.length <= 1:
            return 0
        c, _, d_out, d_in = _shape([factors])
        rows = _rows_in_cache(FORMED_TOGETHER, d_out, d_in, factors.gradients[0].element_size())
        return max(c * train, FORMED_TOGETHER) * rows * min(d_out, d_in)

    def kernel(
        self,
        train: Sequence[OuterProducts],
        x: Sequence[OuterProducts],
        directions: Sequence[Direction],
        workspace: Workspace,
    ) -> Tensor:
        """Multiply by Gram matrices or dense gradients, whichever costs less: float64 ``[D, n, C, x, C]``."""
        return joint_kernel([Member(self, train, x)], directions, workspace)


@dataclass(frozen=True)
class Member:
    """A linear layer's factors on both sides of a tile.

    Attributes:
        layer: The layer.
        train: The factors of the train tile's batches.
        x: The same for the X tile.
    """

    layer: LinearLayer
    train: Sequence[OuterProducts]
    x: Sequence[OuterProducts]


def joint_kernel(members: Sequence[Member], directions: Sequence[Direction], workspace: Workspace) -> Tensor:
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
        if "bias" in member.layer.counted
    ]
    if "weight" in members[0].layer.counted:
        train, x = members[0].train, members[0].x
        # The sign of a sum has no factors, that of a single outer product has.
        factored = all(factor.length == 1 for factor in (*train, *x)) or not any(
            direction.sign_train or direction.sign_x for direction in directions
        )
        if factored and _gram_is_faster(*_flops(members)):
            with stage("factors alone"):
                found = [_gram(members, directions, workspace)]
        else:
            found = [_dense(member.train, member.x, directions, workspace) for member in members]
        parts += [part.permute(0, 2, 1, 4, 3) for part in found]
    return sum(parts[1:], start=parts[0])


def sharing_inputs(
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
        if isinstance(layer, LinearLayer) and "weight" in layer.counted:
            key = tuple((factor.inputs.data_ptr(), factor.length) for factor in (*train[name], *x[name]))
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _biases(factors: Sequence[OuterProducts]) -> list[Tensor]:
    return [factor.biases for factor in factors if factor.biases is not None]


def _shape(factors: Sequence[OuterProducts]) -> tuple[int, int, int, int]:
    """Return C, the number of examples, d_out and d_in."""
    inputs = factors[0].inputs
    assert inputs is not None
    examples = sum(factor.size for factor in factors)
    return len(factors[0].gradients), examples, factors[0].out_features, inputs.shape[2]


def _flops(members: Sequence[Member]) -> tuple[float, float]:
    """Return what Gram matrices cost, and what forming and multiplying dense gradients does."""
    train, x = members[0].train, members[0].x
    c, n, _, d_in = _shape(train)
    widths = [_shape(member.train)[2] for member in members]
    positions = [sum(factor.size * factor.length for factor in side) for side in (train, x)]
    dense = sum(_dense_flops(c, width, d_in, sum(positions), n * _shape(x)[1]) for width in widths)
    return positions[0] * positions[1] * _entry_flops(c, sum(widths), d_in), dense


def _entry_flops(c: int, d_out: int, d_in: int) -> float:
    """What Gram matrices cost for every pair of positions."""
    return 2 * d_in + c**2 * (2 * d_out + GRAM_ENTRY_FLOPS)


def _dense_flops(c: int, d_out: int, d_in: int, positions: int, pairs: int) -> float:
    return 2.0 * d_out * d_in * c * (positions + c * pairs)


def _gram_is_faster(gram_flops: float, dense_flops: float) -> bool:
    return gram_flops * DENSE_EFFICIENCY < dense_flops


def _dense(
    train: Sequence[OuterProducts], x: Sequence[OuterProducts], directions: Sequence[Direction], workspace: Workspace
) -> Tensor:
    """Form gradients in preallocated buffers, some rows at a time, and multiply them: float64 ``[D, C, n, C, x]``."""
    c, n, d_out, d_in = _shape(train)
    inner, outer = sorted((d_out, d_in))
    pieces = _pieces(x, max(1, FORMED_TOGETHER // c))
    width = max(sum(factor.size for factor in piece) for piece in pieces)
    cached = _rows_in_cache(c * width, d_out, d_in, train[0].gradients[0].element_size())
    rows = max(1, min(cached, workspace.capacity // (c * max(n, width) * inner)))
    result = torch.zeros(
        len(directions), c, _shape(x)[1], c, n, dtype=torch.float64, device=train[0].gradients[0].device
    )
    for start in range(0, outer, rows):
        part = slice(start, min(start + rows, outer))
        with stage("forming"):
            formed_train = _form("train", train, part, workspace)
        signed_train = None
        if any(direction.sign_train != direction.sign_x for direction in directions):
            signed_train = torch.sign(formed_train, out=workspace.take("signed", *formed_train.shape))
        elif directions[0].sign_train:
            formed_train.sign_()
        first = 0
        for piece in pieces:
            with stage("forming"):
                formed_x = _form("x", piece, part, workspace)
            if len(directions) == 1 and directions[0].sign_x:
                formed_x.sign_()
            size = formed_x.shape[1]
            # Signing X in place is the last thing done with it: the direction that needs it signed comes last.
            for out, direction in zip(result, directions, strict=True):
                if signed_train is not None and direction.sign_x:
                    formed_x.sign_()
                right = signed_train if signed_train is not None and direction.sign_train else formed_train
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
    c, examples, d_out, d_in = _shape(factors)
    buffer = workspace.take(name, c, examples, part.stop - part.start, min(d_out, d_in))
    for logit in range(c):
        first = 0
        for factor in factors:
            left, right = factor.gradients[logit], factor.inputs
            assert right is not None
            if d_in > d_out:
                left, right = right, left
            torch.bmm(left[:, :, part].transpose(1, 2), right, out=buffer[logit, first : first + factor.size])
            first += factor.size
    return buffer


def _pieces(factors: Sequence[OuterProducts], size: int) -> list[list[OuterProducts]]:
    """Cut batches, or put them together, to pieces of `size` examples; the last one has the rest."""
    pieces: list[list[OuterProducts]] = []
    room = 0
    for factor in factors:
        first = 0
        while first < factor.size:
            if not room:
                pieces.append([])
                room = size
            taken = factor.some(slice(first, min(first + room, factor.size)))
            pieces[-1].append(taken)
            room -= taken.size
            first += taken.size
    return pieces


def _gram(members: Sequence[Member], directions: Sequence[Direction], workspace: Workspace) -> Tensor:
    """Multiply inputs with inputs and gradients with gradients: float64 ``[D, C, n, C, x]``.

    K[i, a, j, b] = Σ_{l, m} (A_i A_jᵀ)_{lm} (G_ia G_jbᵀ)_{lm}; of single outer products the signs multiply alike. For
    layers that were given the same A the products of G are summed first.
    """
    train, x = members[0].train, members[0].x
    c, n = _shape(train)[:2]
    most_tokens, most_columns = _gram_block(train, x, workspace.capacity)
    result = torch.zeros(
        len(directions), c, n, c, _shape(x)[1], dtype=torch.float64, device=train[0].gradients[0].device
    )
    row = 0
    for run in _runs(train, most_tokens):
        left_batches = [train[batch].some(part) for batch, part in run]
        left = [_flattened([member.train[batch].some(part) for batch, part in run]) for member in members]
        whose = _whose_positions(left_batches)
        column = 0
        for ((batch, part),) in _runs(x, most_columns, together=False):
            right = [_flattened([member.x[batch].some(part)]) for member in members]
            size, length = part.stop - part.start, x[batch].length
            for out, direction in zip(result, directions, strict=True):
                inputs = _products([(left[0].inputs, right[0].inputs)], direction, workspace, "train")
                for a in range(c):
                    for b in range(c):
                        pairs = [
                            (mine.gradients[a], other.gradients[b]) for mine, other in zip(left, right, strict=True)
                        ]
                        both = _products(pairs, direction, workspace, "x").mul_(inputs)
                        if whose is not None:
                            both = torch.mm(whose, both, out=workspace.take("product", len(whose), size * length))
                        found = both.view(-1, size, length).sum(dim=2, dtype=torch.float64)
                        out[a, row : row + len(found), b, column : column + size] = found
            column += size
        row += _shape(left_batches)[1]
    return result


def _gram_block(train: Sequence[OuterProducts], x: Sequence[OuterProducts], capacity: int) -> tuple[int, int]:
    """Return how many tokens of either side are multiplied together: as many as fit a buffer, or one example's."""
    rows = min(GRAM_TOKENS, max(max(factor.length for factor in train), capacity // max(f.length for f in x)))
    return rows, min(GRAM_TOKENS, capacity // rows)


def _runs(
    factors: Sequence[OuterProducts], most_tokens: int, together: bool = True
) -> Iterator[list[tuple[int, slice]]]:
    """Cut batches to examples of at most so many tokens, and one at least; short ones come together where wished."""
    run: list[tuple[int, slice]] = []
    room = most_tokens
    for number, factor in enumerate(factors):
        first = 0
        while first < factor.size:
            if run and (not together or room < factor.length):
                yield run
                run, room = [], most_tokens
            last = min(factor.size, first + max(1, room // factor.length))
            run.append((number, slice(first, last)))
            room -= (last - first) * factor.length
            first = last
    if run:
        yield run


def _flattened(factors: Sequence[OuterProducts]) -> OuterProducts:
    """Put all positions of all examples into one row: ``[positions, d]``."""
    inputs = [factor.inputs for factor in factors if factor.inputs is not None]
    gradients = zip(*(factor.gradients for factor in factors), strict=True)
    return OuterProducts(_in_one(inputs), [_in_one(logit) for logit in gradients], None)


def _in_one(parts: Sequence[Tensor]) -> Tensor:
    """Join ``[B, L, d]`` of any B and L to ``[positions, d]``; without a copy where they lie behind one another."""
    first, d = parts[0], parts[0].shape[2]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        elsewhere = part.data_ptr() != end or part.untyped_storage().data_ptr() != storage
        if elsewhere or not part.is_contiguous():
            return torch.cat([part.flatten(0, 1) for part in parts])
        end += part.numel() * part.element_size()
    return first.as_strided((sum(part.shape[0] * part.shape[1] for part in parts), d), (d, 1))


def packed(layers: Mapping[str, Layer], factors: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Lay the batches of every linear layer behind one another in memory; what layers share they go on sharing.

    Gram matrices of all train examples at once then need no copy for each tile.
    """
    places: dict[tuple[int, ...], list[Tensor]] = {}
    return {
        name: _packed(found, places) if isinstance(layers[name], LinearLayer) else list(found)
        for name, found in factors.items()
    }


def _packed(factors: Sequence[OuterProducts], places: dict[tuple[int, ...], list[Tensor]]) -> list[OuterProducts]:
    inputs = [factor.inputs for factor in factors if factor.inputs is not None]
    if not inputs:
        return list(factors)
    key = tuple(part.data_ptr() for part in inputs)
    if key not in places:
        places[key] = _behind_one_another(inputs)
    gradients = zip(*map(_behind_one_another, zip(*(factor.gradients for factor in factors), strict=True)), strict=True)
    return [
        OuterProducts(own, logits, factor.biases)
        for own, logits, factor in zip(places[key], gradients, factors, strict=True)
    ]


def _behind_one_another(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``[B, L, d]`` of any B and L into one piece of memory."""
    whole = torch.cat([part.flatten(0, 1) for part in parts])
    rows = whole.split([part.shape[0] * part.shape[1] for part in parts])
    return [row.view(part.shape) for row, part in zip(rows, parts, strict=True)]


def _products(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]], direction: Direction, workspace: Workspace, name: str
) -> Tensor:
    """The inner products of all positions with all, summed over `pairs`, in the buffer `name`: ``[P, P']``."""
    found: Tensor | None = None
    for left, right in pairs:
        assert left is not None
        assert right is not None
        left, right = left.sign() if direction.sign_train else left, right.sign() if direction.sign_x else right
        if found is None:
            found = torch.mm(left, right.T, out=workspace.take(name, len(left), len(right)))
        else:
            found.addmm_(left, right.T)
    assert found is not None
    return found


def _whose_positions(factors: Sequence[OuterProducts]) -> Tensor | None:
    """Which example each position belongs to, as ones in ``[examples, positions]``; None where all have but one."""
    if all(factor.length == 1 for factor in factors):
        return None
    blocks = [factor.gradients[0].new_ones(1, factor.length) for factor in factors for _ in range(factor.size)]
    return torch.block_diag(*blocks)
