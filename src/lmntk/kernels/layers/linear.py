"""Linear layers: the gradient of a weight is a sum of outer products, G_cᵀA, and need not be held for long.

The inner product of two gradients does not ask how a weight is laid out, so that GPT-2's `Conv1D`, which stores it
transposed, and decoders of some rows only are linear layers like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lmntk.kernels.contraction import BLOCK
from lmntk.kernels.formulas import Direction
from lmntk.kernels.layers.base import Gradients, Layer, Workspace, stack_vectors, vector_kernel, with_positions
from lmntk.kernels.machine import stage

# A product of small entries costs less than its memory traffic: what an entry of a Gram matrix costs, in flops.
GRAM_ENTRY_FLOPS = 16
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

    def formed(self, factors: OuterProducts) -> int:
        """The whole weight; nothing where the gradient is one outer product, or only the bias counts."""
        return 0 if factors.inputs is None or factors.length <= 1 else factors.inputs.shape[2] * factors.out_features

    def buffer(self, factors: OuterProducts, train: int) -> int:
        """The gradients that are formed together; nothing where none are."""
        if not self.formed(factors):
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
        parts = []
        if "bias" in self.counted:
            parts.append(vector_kernel(_biases(train), _biases(x), directions))
        if "weight" in self.counted:
            # The sign of a sum has no factors, that of a single outer product has.
            factored = all(factor.length == 1 for factor in (*train, *x)) or not any(
                direction.sign_train or direction.sign_x for direction in directions
            )
            use_gram = factored and _gram_flops(train, x) < _dense_flops(train, x)
            if use_gram:
                with stage("factors alone"):
                    found = _gram(train, x, directions, workspace)
            else:
                found = _dense(train, x, directions, workspace)
            parts.append(found.permute(0, 2, 1, 4, 3))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _biases(factors: Sequence[OuterProducts]) -> list[Tensor]:
    return [factor.biases for factor in factors if factor.biases is not None]


def _shape(factors: Sequence[OuterProducts]) -> tuple[int, int, int, int]:
    """Return C, the number of examples, d_out and d_in."""
    inputs = factors[0].inputs
    assert inputs is not None
    examples = sum(factor.size for factor in factors)
    return len(factors[0].gradients), examples, factors[0].out_features, inputs.shape[2]


def _dense_flops(train: Sequence[OuterProducts], x: Sequence[OuterProducts]) -> float:
    c, n, d_out, d_in = _shape(train)
    m = _shape(x)[1]
    outer_products = sum(factor.size * factor.length for factor in (*train, *x))
    return 2.0 * d_out * d_in * c * (outer_products + c * n * m)


def _gram_flops(train: Sequence[OuterProducts], x: Sequence[OuterProducts]) -> float:
    c, _, d_out, d_in = _shape(train)
    entries = sum(factor.size * factor.length for factor in train) * sum(factor.size * factor.length for factor in x)
    return float(entries) * (2 * d_in + c**2 * (2 * d_out + GRAM_ENTRY_FLOPS))


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


def _gram(
    train: Sequence[OuterProducts], x: Sequence[OuterProducts], directions: Sequence[Direction], workspace: Workspace
) -> Tensor:
    """Multiply inputs with inputs and gradients with gradients: float64 ``[D, C, n, C, x]``.

    K[i, a, j, b] = Σ_{l, m} (A_i A_jᵀ)_{lm} (G_ia G_jbᵀ)_{lm}; of single outer products the signs multiply alike.
    """
    train, x = _that_fit(_joined(train), _joined(x), workspace.capacity)
    c, n = _shape(train)[:2]
    result = torch.zeros(
        len(directions), c, n, c, _shape(x)[1], dtype=torch.float64, device=train[0].gradients[0].device
    )
    row = 0
    for left in train:
        column = 0
        for right in x:
            entries = left.size, left.length, right.size, right.length
            for out, direction in zip(result, directions, strict=True):
                inputs = _product(left.inputs, right.inputs, direction, workspace, "train")
                for a, left_gradient in enumerate(left.gradients):
                    for b, right_gradient in enumerate(right.gradients):
                        both = _product(left_gradient, right_gradient, direction, workspace, "x").mul_(inputs)
                        block = both.view(entries).sum(dim=1).sum(dim=2, dtype=torch.float64)
                        out[a, row : row + left.size, b, column : column + right.size] = block
            column += right.size
        row += left.size
    return result


def _that_fit(
    train: Sequence[OuterProducts], x: Sequence[OuterProducts], capacity: int
) -> tuple[list[OuterProducts], list[OuterProducts]]:
    """Cut both sides' batches so that the products of any two fit a buffer, or are those of two examples."""
    longest = max(factor.length for factor in train)
    x = [piece for factor in x for piece in _cut(factor, capacity // (longest * factor.length))]
    widest = max(factor.size * factor.length for factor in x)
    return [piece for factor in train for piece in _cut(factor, capacity // (factor.length * widest))], x


def _cut(factor: OuterProducts, size: int) -> list[OuterProducts]:
    size = max(1, size)
    return [factor.some(slice(first, first + size)) for first in range(0, factor.size, size)]


def _joined(factors: Sequence[OuterProducts]) -> list[OuterProducts]:
    """Put neighbouring batches of one length together."""
    joined = []
    for _, members in groupby(factors, key=lambda factor: factor.length):
        found = list(members)
        inputs = torch.cat([member.inputs for member in found if member.inputs is not None])
        gradients = [torch.cat(logit) for logit in zip(*(member.gradients for member in found), strict=True)]
        joined.append(OuterProducts(inputs, gradients, None))
    return joined


def _product(
    left: Tensor | None, right: Tensor | None, direction: Direction, workspace: Workspace, name: str
) -> Tensor:
    """All inner products of positions, in the buffer `name`: ``[B · L, B' · L']``."""
    assert left is not None
    assert right is not None
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    return torch.mm(
        left.sign() if direction.sign_train else left,
        (right.sign() if direction.sign_x else right).T,
        out=workspace.take(name, len(left), len(right)),
    )
