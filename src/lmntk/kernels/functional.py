"""A module as a function of its parameters and one batch, and what must hold of it for kernels to be what they say."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lmntk.kernels.batching import Batch, equal_shape_runs
from lmntk.kernels.problem import KernelProblem, Parameters


def parameters_of(module: nn.Module, params: Parameters | None) -> Parameters:
    """Return the parameters asked for, all by default, after seeing that outputs are functions of one example each."""
    for name, part in module.named_modules():
        which = f"{name or 'the model'}, a {type(part).__name__},"
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{which} draws anew at every call: `model.eval()` first")
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(f"{which} lets examples see each other: give it running statistics, and `model.eval()`")
    own = named(module)
    params = own if params is None else params
    unknown = [name for name in params if name not in own]
    if unknown or not params:
        raise ValueError(f"`params` names {unknown[0]!r}, which the module has not" if unknown else "no parameters")
    for name, value in params.items():
        if value.shape != own[name].shape:
            raise ValueError(f"`params` has {list(value.shape)} for {name!r}, which is {list(own[name].shape)}")
    return {name: value.detach() for name, value in params.items()}


def caller(module: nn.Module) -> Callable[[Batch], Tensor]:
    """Return what calls a module with a batch: a dict by keyword, a tuple by position, a tensor alone."""

    def call(batch: Batch) -> Tensor:
        if isinstance(batch, dict):
            return logits_of(module(**batch))
        return logits_of(module(*batch) if isinstance(batch, tuple) else module(batch))

    return call


def as_function(module: nn.Module) -> Callable[[Parameters, Batch], Tensor]:
    """Return a module as a function of its parameters and a batch."""

    def logits_fn(params: Parameters, batch: Batch) -> Tensor:
        if isinstance(batch, dict):
            return logits_of(functional_call(module, params, kwargs=batch))
        return logits_of(functional_call(module, params, batch if isinstance(batch, tuple) else (batch,)))

    return logits_fn


def logits_of(outputs: Any) -> Any:
    """Return the logits of outputs that have them by that name, as transformers' models' do, else the outputs."""
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)


def like(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one number type, on one device."""
    return (tensor.dtype, tensor.device) == (other.dtype, other.device)


def named(model: object) -> Parameters:
    """Return all parameters of a module; a function's are not known."""
    return {name: value.detach() for name, value in model.named_parameters()} if isinstance(model, nn.Module) else {}


def stands_at(module: nn.Module | None, params: Parameters) -> bool:
    """Whether a module's own parameters are those, where it has any: of another number type they cannot be."""
    return module is not None and all(
        module.get_parameter(name).data_ptr() == params[name].data_ptr() for name in params
    )


def with_logits(function: Callable[[Parameters, Batch], Any]) -> Callable[[Parameters, Batch], Any]:
    """Return a function that gives the logits of another's outputs."""
    return lambda params, batch: logits_of(function(params, batch))


def scaled_down(problem: KernelProblem) -> Parameters:
    """Return the weights of embeddings with `max_norm`, which they scale down in place where they are called.

    Copies, as they are once every example was seen.
    """
    if problem.module is None:
        return {}
    copies = {
        name: problem.params.get(name, part.weight.detach()).clone()
        for prefix, part in problem.module.named_modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None
        for name in [f"{prefix}.weight".lstrip(".")]
    }
    for examples in filter(None, (problem.train, problem.x)) if copies else ():
        for run in equal_shape_runs(examples, range(len(examples)), limit=8):
            problem.logits_fn(problem.params | copies, examples.batch(run))
    return copies


@contextlib.contextmanager
def standing_at(module: nn.Module, params: Parameters) -> Iterator[None]:
    """Let a module stand at values that it can hold, and torch compute what its formulas say, while the block runs.

    Embeddings keep their rows as they are, and the gradient of a row is that of the output, neither divided by how
    often its token occurs nor sparse. Attention takes no short cut that works without gradients alone.
    """
    usual: dict[str, Any] = {"scale_grad_by_freq": False, "sparse": False, "max_norm": None}
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    settings = [{name: getattr(part, name) for name in usual} for part in embeddings]
    own = {name: module.get_parameter(name) for name in params}
    moved = {name: parameter for name, parameter in own.items() if like(parameter, params[name])}
    values = {name: parameter.data for name, parameter in moved.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for part in embeddings:
            vars(part).update(usual)
        for name, parameter in moved.items():
            parameter.data = params[name]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, before in zip(embeddings, settings, strict=True):
            vars(part).update(before)
        for name, parameter in moved.items():
            parameter.data = values[name]
