"""Derivatives of examples' logits by `torch.func`, or by plain autograd for models that it cannot transform."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from lmntk.kernels.batching import Batch
from lmntk.kernels.contraction import contract
from lmntk.kernels.formulas import UNSIGNED
from lmntk.kernels.problem import Parameters

logger = logging.getLogger(__name__)
T = TypeVar("T")

LogitsFunction = Callable[[Parameters, Batch], Tensor]


class Differentiator:
    """Differentiates the logits of any model that autograd differentiates.

    `vmap` fails for models whose control flow depends on values, and for some operations, such as those of GRU and
    LSTM; forward mode lacks some too. Whether they fail depends only on the shapes of a batch, which are tried once.

    Args:
        logits_fn: `f(params, batch) -> [B, C]`.
    """

    def __init__(self, logits_fn: LogitsFunction) -> None:
        self._logits_fn = logits_fn
        self._refused: dict[str, set[Any]] = {"jacobian": set(), "push": set(), "linear": set()}

    def jacobian(self, params: Parameters, batch: Batch, fixed: Parameters) -> Parameters:
        """Differentiate every example's logits.

        Args:
            params: The parameters to differentiate by.
            batch: Examples of one shape, a pytree of ``[B, ...]``.
            fixed: The function's other parameters, by name.

        Returns:
            For each parameter its Jacobian, ``[B, C, *shape]``.
        """
        return self._try(
            "jacobian",
            batch,
            lambda: self._vectorised(params, batch, fixed),
            lambda: self._by_autograd(params, batch, fixed),
            "torch cannot vectorise the model over examples (%s): gradients are taken one example and one logit at a "
            "time, which is slow",
        )

    def push(self, params: Parameters, tangents: Parameters, batch: Batch) -> Tensor:
        """Take the derivative of examples' logits along directions in parameter space.

        Args:
            params: The parameters.
            tangents: The directions, ``[T, *shape]``.
            batch: Examples of one shape, a pytree of ``[B, ...]``.

        Returns:
            float64 ``[T, B, C]``.
        """

        def derivative(tangent: Parameters) -> Tensor:
            return jvp(lambda params: self._logits_fn(params, batch), (params,), (tangent,))[1]

        return self._try(
            "push",
            batch,
            lambda: vmap(derivative)(tangents).to(torch.float64),
            lambda: self._push_backward(params, tangents, batch),
            "torch cannot differentiate the model forwards (%s): the jvp engine takes gradients in its place",
        )

    def linear(self, params: Parameters, tangent: Parameters, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return examples' logits and their derivative along one direction in parameter space.

        Fused attention has no forward-mode derivative: torch takes its plain form here.

        Args:
            params: The parameters.
            tangent: The direction, a tensor for each parameter.
            batch: Examples of one shape, a pytree of ``[B, ...]``.

        Returns:
            Both ``[B, C]``, in the model's own dtype.
        """

        def forwards() -> tuple[Tensor, Tensor]:
            with sdpa_kernel(SDPBackend.MATH):
                logits, derivative, *_ = jvp(lambda own: self._logits_fn(own, batch), (params,), (tangent,))
            return logits, derivative

        def backwards() -> tuple[Tensor, Tensor]:
            logits = self._logits_fn(params, batch)
            single = {name: change[None] for name, change in tangent.items()}
            return logits, self._push_backward(params, single, batch)[0].to(logits)

        return self._try(
            "linear",
            batch,
            forwards,
            backwards,
            "torch cannot differentiate the model forwards (%s): gradients are taken one example and one logit at a "
            "time, which is slow",
        )

    def _try(self, what: str, batch: Batch, fast: Callable[[], T], sure: Callable[[], T], warning: str) -> T:
        """Return `fast()` if torch can, else `sure()`, with a warning the first time."""
        shape = tuple(leaf.shape[1:] for leaf in tree_leaves(batch))
        refused = self._refused[what]
        if shape in refused:
            return sure()
        try:
            return fast()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # torch raises many kinds of errors for operations that it cannot transform
            if "can't allocate memory" in str(error):
                raise
            if "random operation" in str(error):
                raise ValueError("the model draws random numbers as it computes: call its eval() first") from error
            found = sure()  # raises if the model itself is wrong
            if not refused:
                logger.warning(warning, (str(error) or type(error).__name__).partition("\n")[0])
            refused.add(shape)
            return found

    def _vectorised(self, params: Parameters, batch: Batch, fixed: Parameters) -> Parameters:
        def one_example(params: Parameters, example: Batch) -> Tensor:
            return self._logits_fn({**fixed, **params}, tree_map(lambda leaf: leaf[None], example))[0]

        return vmap(jacrev(one_example), in_dims=(None, 0))(params, batch)

    def _by_autograd(self, params: Parameters, batch: Batch, fixed: Parameters) -> Parameters:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in leaves}
        size = len(tree_leaves(batch)[0])
        for row in range(size):
            with torch.enable_grad():
                example = tree_map(lambda leaf, row=row: leaf[row : row + 1], batch)
                logits = self._logits_fn({**fixed, **leaves}, example)[0].unbind()
            for logit in logits:
                gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
                if logit.requires_grad:
                    gradients = torch.autograd.grad(logit, list(leaves.values()), retain_graph=True, allow_unused=True)
                for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                    found[name].append(torch.zeros_like(leaf) if gradient is None else gradient.to_dense())
        return {name: torch.stack(rows).unflatten(0, (size, -1)) for name, rows in found.items()}

    def _push_backward(self, params: Parameters, tangents: Parameters, batch: Batch) -> Tensor:
        columns = []
        for row in range(len(tree_leaves(batch)[0])):
            example = tree_map(lambda leaf, row=row: leaf[row : row + 1], batch)
            jacobian = self.jacobian(params, example, {})
            columns.append(
                torch.stack(
                    [
                        contract(tangents[name].flatten(1), own[0].flatten(1), [UNSIGNED])[0]
                        for name, own in jacobian.items()
                    ]
                ).sum(dim=0)
            )
        return torch.stack(columns, dim=1)
