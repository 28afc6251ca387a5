"""A module as a function of its parameters and a batch, and the conditions under which its kernel is defined."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lmntk.kernels.batching import Batch, equal_shape_batches
from lmntk.kernels.problem import FunctionModel, KernelProblem, ModuleModel, Parameters, logits_of


def parameters_of(module: nn.Module, params: Parameters | None) -> Parameters:
    """Return the parameters asked for, by default all, and check that each output depends on one example alone.

    Raises:
        ValueError: A module draws random numbers or mixes examples, or `params` does not fit the module.
    """
    for name, child in module.named_modules():
        which = f"{name or 'the model'}, a {type(child).__name__},"
        if isinstance(child, _DropoutNd) and child.training and child.p > 0:
            raise ValueError(f"{which} draws anew at every call: `model.eval()` first")
        if isinstance(child, _BatchNorm) and (child.training or child.running_mean is None):
            raise ValueError(f"{which} lets examples see each other: give it running statistics, and `model.eval()`")
    own = all_parameters(module)
    params = own if params is None else params
    unknown = [name for name in params if name not in own]
    if unknown or not params:
        raise ValueError(f"`params` names {unknown[0]!r}, which the module lacks" if unknown else "no parameters")
    for name, value in params.items():
        if value.shape != own[name].shape:
            raise ValueError(f"`params` has {list(value.shape)} for {name!r}, which is {list(own[name].shape)}")
    return {name: value.detach() for name, value in params.items()}


def engine_model(
    model: nn.Module | Callable[[Parameters, Batch], Any], params: Parameters | None
) -> tuple[FunctionModel, Parameters]:
    """Return a model as engines take it, and the parameters asked for.

    Raises:
        ValueError: `params` does not fit, or the model draws random numbers or mixes examples: see `parameters_of`.
    """
    if isinstance(model, nn.Module):
        return module_model(model), parameters_of(model, params)
    if not params:
        raise ValueError("a function needs `params`, the values at which its gradients are taken")
    return FunctionModel(lambda params, batch: logits_of(model(params, batch))), params


def module_model(module: nn.Module) -> ModuleModel:
    """Return a module as a model that engines take, whatever its batches are: see `call_with`."""

    def logits_fn(params: Parameters, batch: Batch) -> Tensor:
        if isinstance(batch, dict):
            return logits_of(functional_call(module, params, kwargs=batch))
        return logits_of(functional_call(module, params, batch if isinstance(batch, tuple) else (batch,)))

    return ModuleModel(logits_fn, module)


def all_parameters(model: object) -> Parameters:
    """Return all parameters of a module; none of a function, whose parameters are not known."""
    return {name: value.detach() for name, value in model.named_parameters()} if isinstance(model, nn.Module) else {}


def holds_values(module: nn.Module, params: Parameters) -> bool:
    """Return whether a module's own parameters are these: it cannot hold values of another dtype."""
    return all(module.get_parameter(name).data_ptr() == params[name].data_ptr() for name in params)


def renormed_embeddings(problem: KernelProblem) -> Parameters:
    """Return copies of the weights of embeddings with `max_norm` after every example was seen.

    Calling such an embedding scales the rows it looks up in place.
    """
    if not isinstance(problem.model, ModuleModel):
        return {}
    copies = {
        name: problem.params.get(name, child.weight.detach()).clone()
        for prefix, child in problem.model.module.named_modules()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.max_norm is not None
        for name in [f"{prefix}.weight".lstrip(".")]
    }
    for examples in filter(None, (problem.train, problem.x)) if copies else ():
        for indices in equal_shape_batches(examples, range(len(examples)), limit=8):
            problem.model.logits_fn(problem.params | copies, examples.batch(indices))
    return copies


@contextlib.contextmanager
def with_values(module: nn.Module, params: Parameters) -> Iterator[None]:
    """Give a module these values while the block runs, and switch off options of torch that change gradients.

    Embeddings keep their rows as they are, and their gradients are dense and not divided by the token's frequency.
    Attention does not use its fast path, which exists without gradients only. Values of another dtype or device than
    the module's own are left out.
    """
    usual: dict[str, Any] = {"scale_grad_by_freq": False, "sparse": False, "max_norm": None}
    embeddings = [child for child in module.modules() if isinstance(child, nn.Embedding | nn.EmbeddingBag)]
    settings = [{name: getattr(child, name) for name in usual} for child in embeddings]
    own = {name: module.get_parameter(name) for name in params}
    moved = {name: parameter for name, parameter in own.items() if _alike(parameter, params[name])}
    values = {name: parameter.data for name, parameter in moved.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for child in embeddings:
            vars(child).update(usual)
        for name, parameter in moved.items():
            parameter.data = params[name]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for child, before in zip(embeddings, settings, strict=True):
            vars(child).update(before)
        for name, parameter in moved.items():
            parameter.data = values[name]


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return (tensor.dtype, tensor.device) == (other.dtype, other.device)
