"""A model linearised in its parameters: what it would say after a training that moves no feature.

f_lin(x; θ) = f(x; θ₀) + ⟨∂f(x; θ₀)/∂θ, θ − θ₀⟩: one Jacobian-vector product an example (Lee et al. 2019, "Wide Neural
Networks of Any Depth Evolve as Linear Models Under Gradient Descent", section 2; Malladi et al. 2023, section 3). Its
kernel is that of the model at θ₀, at every θ.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmntk.kernels import functional
from lmntk.kernels.batching import Batch, equal_shape_batches
from lmntk.kernels.engines.derivatives import Differentiator, LogitsFunction
from lmntk.kernels.formulas import FORMULAS
from lmntk.kernels.problem import KernelProblem, Parameters
from lmntk.kernels.user_batches import read_batches

BATCH_SIZE = 32
"""Examples of one shape that are differentiated together."""


class Linearisation:
    """A function of parameters as its tangent at θ₀.

    Args:
        logits_fn: `f(params, batch) -> [B, C]`.
        start: θ₀, the values at which f is differentiated; what `logits_fn` needs beyond them, it knows itself.
    """

    def __init__(self, logits_fn: LogitsFunction, start: Parameters) -> None:
        self._logits_fn = logits_fn
        self.start = start
        # A parameter that has not moved is no argument: it adds nothing, and costs nothing.
        self._differentiator = Differentiator(lambda moved, batch: logits_fn(start | moved, batch))

    def towards(self, params: Parameters) -> Callable[[Batch], Tensor]:
        """Return x → f_lin(x; θ): takes a batch of examples of one shape and returns float64 ``[B, C]``.

        Args:
            params: θ, for all names of `start` or some; the others have not moved.
        """
        with torch.no_grad():
            moved = {name: self.start[name] for name in params}
            change = {name: value.detach() - moved[name] for name, value in params.items()}

        def logits(batch: Batch) -> Tensor:
            with torch.no_grad():
                at_start, derivative = self._differentiator.linear(moved, change, batch)
                return at_start.double() + derivative.double()

        return logits

    def __call__(self, params: Parameters, batch: Batch) -> Tensor:
        """Return f_lin(x; θ), ``[B, C]`` in the model's own dtype; autograd differentiates it by `params`, θ."""
        logits: Tensor = _Tangent.apply(self, batch, tuple(params), *params.values())
        return logits

    def pull(self, names: Iterable[str], batch: Batch, gradient: Tensor) -> list[Tensor | None]:
        """Return ⟨gradient, ∂f(x; θ₀)/∂θ⟩ for some parameters, summed over the batch; None where f does not depend.

        Args:
            names: The parameters.
            batch: B examples.
            gradient: A weight for each logit, ``[B, C]``.
        """
        with torch.enable_grad():
            leaves = {name: self.start[name].detach().requires_grad_() for name in names}
            logits = self._logits_fn(self.start | leaves, batch)
            return list(torch.autograd.grad(logits, list(leaves.values()), gradient, allow_unused=True))


class _Tangent(torch.autograd.Function):
    """The linearised logits as an operation of autograd: one product forwards, one backwards, both at θ₀."""

    @staticmethod
    def forward(ctx: Any, tangent: Linearisation, batch: Batch, names: tuple[str, ...], *values: Tensor) -> Tensor:
        ctx.tangent, ctx.batch, ctx.names = tangent, batch, names
        return tangent.towards(dict(zip(names, values, strict=True)))(batch).to(values[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.tangent.pull(ctx.names, ctx.batch, gradient)


def linearised(
    model: nn.Module | Callable[[Parameters, Batch], Any],
    batches: Iterable[Any],
    trained: Parameters,
    *,
    params: Parameters | None = None,
    progress: Callable[[Iterator[list[int]]], Iterable[list[int]]] = iter,
) -> Tensor:
    """Compute the logits of a model that is linearised at its parameters θ₀, at other parameters θ.

    Args:
        model: A module or function, as `empirical_ntk` takes it.
        batches: The examples: pytrees of tensors ``[B, ...]``.
        trained: θ, by name; a parameter that is missing has not moved.
        params: θ₀, the values at which the model is differentiated; by default all of a module's own.
        progress: Wraps the iterator of batches, for instance with `tqdm`.

    Returns:
        f(x; θ₀) + ⟨∂f(x; θ₀)/∂θ, θ − θ₀⟩, float64 ``[X, C]``.

    Raises:
        ValueError: An argument does not fit: parameters that the model lacks or of another shape, no examples, batches
            that are not pytrees of tensors of one length. The model does not fit: it draws random numbers, mixes
            examples, or returns no tensor ``[B, C]``.

    Example:
        >>> import torch
        >>> square = lambda params, x: params["w"] ** 2 * x  # its tangent at w = 1 is x (2 w - 1)
        >>> start, end = {"w": torch.ones(1)}, {"w": torch.tensor([3.0])}
        >>> linearised(square, [torch.tensor([[1.0], [2.0]])], end, params=start)
        tensor([[ 5.],
                [10.]], dtype=torch.float64)
    """
    with torch.inference_mode(False), torch.no_grad():
        chosen, params = functional.engine_model(model, params)
        module = model if isinstance(model, nn.Module) else None
        examples = read_batches("batches", batches, module, next(iter(params.values())).device)
        if not len(examples):
            raise ValueError("`batches` holds no example")
        problem = KernelProblem(
            train=examples, x=None, formula=FORMULAS["sgd"], num_logits=0, model=chosen, params=params
        )
        params = params | functional.renormed_embeddings(problem)
        _check_trained(trained, params, module)
        moved = {name: value.detach().to(params[name]) for name, value in trained.items()}
        with functional.with_values(module, params) if module is not None else nullcontext():
            answer = Linearisation(chosen.logits_fn, params).towards(moved)
            order = sorted(range(len(examples)), key=lambda index: str(examples.shapes[index]))
            found: dict[int, Tensor] = {}
            for indices in progress(iter(equal_shape_batches(examples, order, BATCH_SIZE))):
                logits = answer(examples.batch(indices))
                if logits.dim() != 2 or len(logits) != len(indices):
                    raise ValueError(
                        f"for {len(indices)} examples the model returns a tensor {list(logits.shape)}, but it must "
                        "return its outputs as a tensor [B, C]: wrap it in a module or function that does"
                    )
                found |= dict(zip(indices, logits, strict=True))
    return torch.stack([found[index] for index in range(len(examples))])


def _check_trained(trained: Parameters, params: Parameters, module: nn.Module | None) -> None:
    if not trained:
        raise ValueError("`trained` is empty")
    unknown = next((name for name in trained if name not in params), None)
    if unknown is not None:
        own = set() if module is None else {name for name, _ in module.named_parameters()}
        if unknown in own or module is None:
            raise ValueError(
                f"`trained` names {unknown!r}, which `params` lacks: `params` must hold the start of all that has moved"
            )
        if unknown in module.state_dict():
            raise ValueError(
                f"`trained` names {unknown!r}, which is a buffer of the model or a second name of a parameter, as its "
                "state_dict() has them: pass dict(model.named_parameters()) of the trained model"
            )
        raise ValueError(f"`trained` names {unknown!r}, which the model lacks")
    for name, value in trained.items():
        if value.shape != params[name].shape:
            raise ValueError(f"`trained` has {list(value.shape)} for {name!r}, which is {list(params[name].shape)}")
