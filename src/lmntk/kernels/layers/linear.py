"""Linear layers: the gradient of a weight is a sum of outer products, G_cᵀA, and need not be held for long.

The inner product of two gradients does not ask how a weight is laid out, so that GPT-2's `Conv1D`, which stores it
transposed, and decoders of some rows only are linear layers like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from lmntk.kernels.contraction import BLOCK
from lmntk.kernels.formulas import Direction
from lmntk.kernels.layers.base import Gradients, Layer, Workspace, stack_vectors, vector_kernel, with_positions
from lmntk.kernels.machine import stage

# A product of small entries costs less than its memory traffic: what an entry of a Gram matrix costs, in flops.
GRAM_ENTRY_FLOPS = 24
# X examples that are formed together: enough for products near the machine's best rate.
FORMED_TOGETHER = 128


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


class LinearLayer(Layer):
    """``y = x Wᵀ + b``."""

    def __init__(self, module: nn.Module, counted: frozenset[str]) -> None:
        super().__init__(module, counted)
        # Whether gradients live at one position only; None while no batch has told. Once untrue it is asked no more.
        self.one_position: bool | None = None

    def factors(self, inputs: Tensor, gradients: Gradients) -> OuterProducts:
        """Keep inputs and gradients; of a module whose gradient lives at one position, that position alone."""
        inputs = with_positions(inputs)
        gradients = [with_positions(gradient) for gradient in gradients]
        biases = stack_vectors(gradients) if "bias" in self.counted else None
        if "weight" not in self.counted:
            return OuterProducts(None, [gradient[:, :0] for gradient in gradients], biases)
        if inputs.shape[1] > 1 and self.one_position is not False:
            strength = torch.stack([gradient.abs().sum(dim=2) for gradient in gradients]).sum(dim=0)
            # Behind the last layer's attention only the position that predicts has a gradient: rank one.
            self.one_position = bool((strength.count_nonzero(dim=1) <= 1).all())
            if self.one_position:
                inputs, gradients = _at(strength.argmax(dim=1), inputs, gradients)
        return OuterProducts(inputs, gradients, biases)

    def formed(self, factors: OuterProducts) -> int:
        """The whole weight; nothing where the gradient is one outer product, or only the bias counts."""
        return 0 if factors.inputs is None or factors.length <= 1 else factors.inputs.shape[2] * factors.out_features

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
                    found = _gram(train, x, directions)
            else:
                found = _dense(train, x, directions, workspace)
            parts.append(found.permute(0, 2, 1, 4, 3))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _at(position: Tensor, inputs: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Narrow ``[B, L, d]`` to one position of each example, ``[B, 1, d]``."""
    index = position[:, None, None]

    def there(tensor: Tensor) -> Tensor:
        return tensor.gather(1, index.expand(-1, 1, tensor.shape[2]))

    return there(inputs), [there(gradient) for gradient in gradients]


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
    """Form gradients in preallocated buffers, some rows of the weight at a time: float64 ``[D, C, n, C, x]``."""
    c, n, d_out, d_in = _shape(train)
    groups = _group(x, FORMED_TOGETHER)
    widest = max(n, *(sum(factor.size for factor in group) for group in groups))
    rows = max(1, min(d_out, workspace.capacity // (c * widest * d_in)))
    result = torch.zeros(
        len(directions), c, n, c, _shape(x)[1], dtype=torch.float64, device=train[0].gradients[0].device
    )
    for start in range(0, d_out, rows):
        part = slice(start, min(start + rows, d_out))
        with stage("forming"):
            formed_train = _form("train", train, part, workspace)
        signed_train = None
        if any(direction.sign_train != direction.sign_x for direction in directions):
            signed_train = torch.sign(formed_train, out=workspace.take("signed", *formed_train.shape))
        elif directions[0].sign_train:
            formed_train.sign_()
        column = 0
        for group in groups:
            with stage("forming"):
                formed_x = _form("x", group, part, workspace)
            if len(directions) == 1 and directions[0].sign_x:
                formed_x.sign_()
            width = formed_x.shape[1]
            # Signing X in place is the last thing done with it: the direction that needs it signed comes last.
            for out, direction in zip(result, directions, strict=True):
                if signed_train is not None and direction.sign_x:
                    formed_x.sign_()
                left = signed_train if signed_train is not None and direction.sign_train else formed_train
                product = workspace.take("product", c * n, c * width)
                flat_left, flat_x = left.view(c * n, -1), formed_x.view(c * width, -1)
                with stage("contraction"):
                    for left_block, x_block in zip(flat_left.split(BLOCK, 1), flat_x.split(BLOCK, 1), strict=True):
                        torch.mm(left_block, x_block.T, out=product)
                        out[:, :, :, column : column + width] += product.view(c, n, c, width)
            column += width
    return result


def _form(name: str, factors: Sequence[OuterProducts], part: slice, workspace: Workspace) -> Tensor:
    """Form some rows of the gradients, ``[C, B, rows, d_in]``."""
    c, examples, _, d_in = _shape(factors)
    buffer = workspace.take(name, c, examples, part.stop - part.start, d_in)
    for logit in range(c):
        first = 0
        for factor in factors:
            assert factor.inputs is not None
            gradients = factor.gradients[logit][:, :, part].transpose(1, 2)
            torch.bmm(gradients, factor.inputs, out=buffer[logit, first : first + factor.size])
            first += factor.size
    return buffer


def _group(factors: Sequence[OuterProducts], size: int) -> list[list[OuterProducts]]:
    """Put neighbouring batches together while they have no more than `size` examples."""
    groups: list[list[OuterProducts]] = []
    for factor in factors:
        if groups and sum(member.size for member in groups[-1]) + factor.size <= size:
            groups[-1].append(factor)
        else:
            groups.append([factor])
    return groups


def _gram(train: Sequence[OuterProducts], x: Sequence[OuterProducts], directions: Sequence[Direction]) -> Tensor:
    """Multiply inputs with inputs and gradients with gradients: float64 ``[D, C, n, C, x]``.

    K[i, a, j, b] = Σ_{l, m} (A_i A_jᵀ)_{lm} (G_ia G_jbᵀ)_{lm}; of single outer products the signs multiply alike.
    """
    train, x = _joined(train), _joined(x)
    c, n = _shape(train)[:2]
    result = torch.zeros(
        len(directions), c, n, c, _shape(x)[1], dtype=torch.float64, device=train[0].gradients[0].device
    )
    row = 0
    for left in train:
        column = 0
        for right in x:
            assert left.inputs is not None
            assert right.inputs is not None
            shape = left.size, left.length, right.size, right.length
            for out, direction in zip(result, directions, strict=True):
                inputs = _product(left.inputs, right.inputs, direction)
                for a, left_gradient in enumerate(left.gradients):
                    for b, right_gradient in enumerate(right.gradients):
                        both = inputs * _product(left_gradient, right_gradient, direction)
                        block = both.view(shape).sum(dim=(1, 3), dtype=torch.float64)
                        out[a, row : row + left.size, b, column : column + right.size] = block
            column += right.size
        row += left.size
    return result


def _joined(factors: Sequence[OuterProducts]) -> list[OuterProducts]:
    """Put neighbouring batches of one length together."""
    joined = []
    for _, members in groupby(factors, key=lambda factor: factor.length):
        found = list(members)
        inputs = torch.cat([member.inputs for member in found if member.inputs is not None])
        gradients = [torch.cat(logit) for logit in zip(*(member.gradients for member in found), strict=True)]
        joined.append(OuterProducts(inputs, gradients, None))
    return joined


def _product(left: Tensor, right: Tensor, direction: Direction) -> Tensor:
    """All inner products of positions: ``[B · L, B' · L']``."""
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    return (left.sign() if direction.sign_train else left) @ (right.sign() if direction.sign_x else right).T
