"""Signs of a weight's gradients, taken as soon as a batch is propagated: its factors are not needed after that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmntk.kernels.layers.base import Buffer, Workspace
from lmntk.kernels.layers.linear_factors import OuterProducts, shape_of
from lmntk.kernels.sign_bits import WORD_BITS, SignPlanes, num_words, sign_products
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning


@dataclass(frozen=True)
class WeightSigns:
    """What formulas of signs need of a batch.

    Attributes:
        planes: The signs of the weight's gradients, one a row: of an example's C logits, then of the next example's.
        num_logits: C.
        biases: Gradients of the bias, ``[B, C, d_out]``; None if gradients are not taken over it.
    """

    planes: SignPlanes
    num_logits: int
    biases: Tensor | None

    @classmethod
    def of(cls, batch: OuterProducts, workspace: Workspace, tuning: Tuning = DEFAULT_TUNING) -> "WeightSigns":
        """Form the gradients of a batch, some rows of the weight at a time, and keep their signs.

        Args:
            batch: The factors of the batch.
            workspace: Buffers that are overwritten.
            tuning: Chooses how much is formed at a time.
        """
        c, examples, d_out, d_in = shape_of([batch])
        inner, outer = sorted((d_out, d_in))
        # Rows of the weight that fill whole words.
        step = WORD_BITS // math.gcd(inner, WORD_BITS)
        element_size = batch.gradients[0].element_size()
        limit = min(workspace.capacity, torch.get_num_threads() * tuning.sign_cache_bytes // element_size)
        size = max(1, min(examples, limit // (step * inner)))
        num_rows = step * max(1, limit // (size * step * inner))
        planes = SignPlanes(examples * c, d_out * d_in)
        with workspace.timer.stage("forming"):
            for first in range(0, examples, size):
                chunk = batch[first : first + size]
                for start in range(0, outer, num_rows):
                    rows = slice(start, min(start + num_rows, outer))
                    for logit, gradient in enumerate(chunk.gradients):
                        formed = _form(gradient, chunk.inputs, rows, workspace)
                        planes.pack(formed.flatten(1), start * inner, first=first * c + logit, step=c)
        return cls(planes, c, batch.biases)

    @classmethod
    def join(
        cls, factors: Sequence["OuterProducts | WeightSigns"], workspace: Workspace, tuning: Tuning = DEFAULT_TUNING
    ) -> "WeightSigns":
        """Return the signs of all batches as one; those of batches that are factors still are taken now."""
        batches = [batch if isinstance(batch, WeightSigns) else cls.of(batch, workspace, tuning) for batch in factors]
        biases = [batch.biases for batch in batches if batch.biases is not None]
        planes = SignPlanes.join([batch.planes for batch in batches])
        return cls(planes, batches[0].num_logits, torch.cat(biases) if biases else None)


def sign_bytes(batch: OuterProducts) -> int:
    """Return the bytes of `WeightSigns` of a batch, if both planes are needed."""
    c, examples, d_out, d_in = shape_of([batch])
    biases = 0 if batch.biases is None else batch.biases.nbytes
    return 2 * (WORD_BITS // 8) * examples * c * num_words(d_out * d_in) + biases


def sign_kernel(
    train: Sequence[OuterProducts | WeightSigns],
    x: Sequence[OuterProducts | WeightSigns],
    workspace: Workspace,
    tuning: Tuning = DEFAULT_TUNING,
) -> Tensor:
    """Count the products of signs of a weight's gradients: float64 ``[n, C, x, C]``.

    Args:
        train: The train tile's batches; the signs of those that are factors still are taken now.
        x: The same for the X tile.
        workspace: Buffers that are overwritten.
        tuning: Chooses how much is formed at a time.
    """
    left, right = (WeightSigns.join(side, workspace, tuning) for side in (train, x))
    with workspace.timer.stage("contraction"):
        counts = sign_products(left.planes, right.planes).double()
    return counts.unflatten(1, (-1, right.num_logits)).unflatten(0, (-1, left.num_logits))


def _form(gradients: Tensor, inputs: Tensor | None, rows: slice, workspace: Workspace) -> Tensor:
    """Form rows of one logit's gradients, or of the transposed ones if the weight is wide: ``[B, rows, inner]``."""
    assert inputs is not None
    left, right = (gradients, inputs) if gradients.shape[2] >= inputs.shape[2] else (inputs, gradients)
    formed = workspace.take(Buffer.X, len(left), rows.stop - rows.start, right.shape[2])
    return torch.bmm(left[:, :, rows].transpose(1, 2), right, out=formed)
