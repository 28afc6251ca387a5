"""From Jacobians to blocks of the kernel: products that keep float32 exact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmntk.kernels.formulas import Direction

# A float32 product over all parameters at once loses two digits; over this many it keeps what the gradients have.
# It is also far below 2**24, up to which float32 counts products of signs exactly.
BLOCK = 2**18


def contract(train: Tensor, x: Tensor, directions: Sequence[Direction]) -> Tensor:
    """Sum products of gradients over one group of parameters.

    Args:
        train: Gradients, one a row, ``[n, p]``.
        x: Gradients of the other side, ``[m, p]``.
        directions: Which side takes the sign.

    Returns:
        float64 ``[D, n, m]``, one kernel a direction.
    """
    result = torch.zeros(len(directions), len(train), len(x), dtype=torch.float64, device=train.device)
    for start in range(0, train.shape[1], BLOCK):
        train_block, x_block = train[:, start : start + BLOCK], x[:, start : start + BLOCK]
        for out, direction in zip(result, directions, strict=True):
            left = train_block.sign() if direction.sign_train else train_block
            right = x_block.sign() if direction.sign_x else x_block
            out += left @ right.T
    return result
