"""From Jacobians to blocks of the kernel: products that keep float32 exact."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmntk.kernels.formulas import Direction

# A float32 product over millions of parameters loses two digits, one over 2**18 still loses one; over so many it keeps
# what the gradients have. It is also far below 2**24, up to which float32 counts products of signs exactly.
BLOCK = 2**15


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
    for out, direction in zip(result, directions, strict=True):
        for left, right in zip(train.split(BLOCK, dim=1), x.split(BLOCK, dim=1), strict=True):
            out += (left.sign() if direction.sign_train else left) @ (right.sign() if direction.sign_x else right).T
    return result
