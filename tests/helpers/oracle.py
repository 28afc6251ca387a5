"""The slow truth: gradients one example and one logit at a time with plain autograd, summed in float64.

Imports nothing of `lmntk.kernels`: what the engines share among them cannot hide here.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def gradients(logits_of: Callable[[object], Tensor], params: Sequence[Tensor], examples: Iterable[object]) -> Tensor:
    """Return ``[N, C, P]`` in the parameters' own dtype: one plain backward pass per example and logit."""
    rows = []
    for example in examples:
        logits = logits_of(example)
        assert logits.shape[0] == 1
        for logit in logits[0]:
            found = torch.autograd.grad(logit, list(params), retain_graph=True, allow_unused=True)
            parts = [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(params, found, strict=True)]
            rows.append(torch.cat(parts).detach())
        number = logits.shape[1]
    return torch.stack(rows).reshape(-1, number, rows[0].numel())


def kernel(train: Tensor, x: Tensor, formula: str) -> Tensor:
    """Return float64 ``[N, C, X, C]``, or ``[2, N, C, X, C]`` of the asymmetric formula, from ``[N, C, P]``."""
    train, x = train.double(), x.double()
    signs = {
        "sgd": [(train, x)],
        "signgd": [(train.sign(), x.sign())],
        "asymmetric_signgd": [(train.sign(), x), (train, x.sign())],
    }[formula]
    found = torch.stack([torch.einsum("iap,jbp->iajb", left, right) for left, right in signs])
    return found if len(found) == 2 else found[0]


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return ‖found − truth‖ / ‖truth‖ in the Frobenius norm."""
    return float((found.double() - truth).norm() / truth.norm())
