"""From Jacobians to blocks of the kernel: products that keep float32 exact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmntk.kernels.formulas import SignPlacement

# A float32 product over millions of parameters loses two digits, one over 2**18 still loses one; over so many it keeps
# what the gradients have. It is also far below 2**24, up to which float32 counts products of signs exactly.
BLOCK = 2**15


def contract(train: Tensor, x: Tensor, directions: Sequence[SignPlacement]) -> Tensor:
    """Sum products of gradients over one group of parameters.

    Args:
        train: Gradients, one a row, ``[n, p]``.
        x: Gradients of the other side, ``[m, p]``.
        directions: Which side takes the sign.

    Returns:
        float64 ``[D, n, m]``, one kernel a direction.
    """
    result = torch.zeros(len(directions), len(train), len(x), dtype=torch.float64, device=train.device)
    for out, direction in zip(result, directions, strict=True):
        for left, right in zip(train.split(BLOCK, dim=1), x.split(BLOCK, dim=1), strict=True):
            out += (left.sign() if direction.sign_train else left) @ (right.sign() if direction.sign_x else right).T
    return result


def broken_rows(gradients: Tensor) -> Tensor:
    """Tell which rows of gradients, ``[n, p]``, hold NaN or infinity, of which a sign would be an ordinary number."""
    # A sum is the fastest look at all numbers.
    return ~gradients.sum(dim=1, dtype=torch.float64).isfinite()


def hide_signs_of_broken(block: Tensor, train: Tensor | None, x: Tensor | None) -> Tensor:
    """Make NaN of what comes of gradients that are not finite, for the products of signs to be as those of numbers.

    Args:
        block: A tile, ``[S, n, C, x, C]``.
        train: Which of its train examples, bool ``[n]`` or ``[n, C]``; None where no signs are taken.
        x: The same for its X examples.
    """
    if train is None or x is None:
        return block
    rows, columns = (broken if broken.dim() == 2 else broken[:, None] for broken in (train, x))
    return block.masked_fill_(rows[:, :, None, None] | columns, torch.nan)
