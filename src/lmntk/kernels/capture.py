"""One forward pass and C backward passes to module outputs: each layer's input and the gradients at its output."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lmntk.kernels.batching import Batch
from lmntk.kernels.layers.base import Layer
from lmntk.kernels.layers.linear_factors import storage_key


@dataclass(frozen=True)
class ModuleIO:
    """The input and output of a module in one forward pass.

    Attributes:
        inputs: The input that the module's layer type selects, ``[B, L, d]`` or indices ``[B, L]``.
        output: The output, part of the graph, ``[B, L, d]`` or ``[B, d]``.
        edge: Where the gradient at that output arrives, whatever is done to the output in place later on.
        versions: Counts of in-place changes of inputs and output at that time.
    """

    inputs: Tensor
    output: Tensor
    edge: GradientEdge
    versions: tuple[int, int]

    @property
    def changed(self) -> bool:
        """Whether the inputs were overwritten, or the gradient at the output no longer passes through `edge`."""
        inputs, output = _version(self.inputs), _version(self.output)
        return inputs != self.versions[0] or (output != self.versions[1] and self.output._is_view())


# Operations by which a model sorts, selects or drops examples according to their values.
SELECTING = {"argsort", "msort", "sort", "topk", "unique", "unique_consecutive", "searchsorted", "tolist"}
SELECTING |= {"argwhere", "nonzero", "masked_select", "masked_scatter", "masked_scatter_", "argmax", "argmin"}
SELECTING |= {"kthvalue", "median", "mode", "bincount", "item", "numpy", "__index__", "__int__", "__float__"}

GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are all different


class OperationWatcher(TorchFunctionMode):
    """Watches the operations of a forward pass.

    Args:
        parameters: The parameters whose uses are counted, by their modules or by anything else.

    Attributes:
        selects: Whether values decide which example, or token, goes where.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._wanted = {id(parameter) for parameter in parameters}
        self._counts: Counter[int] = Counter()
        self.selects = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in SELECTING or (name in ("__getitem__", "__setitem__") and _is_mask(args[1])):
            self.selects = True
        if name == "where" and len(args) + len(kwargs or {}) == 1:
            self.selects = True
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor | tuple | list):  # not questions about shapes, dtypes and devices
            for value in (*args, *(kwargs or {}).values()):
                for one in value if isinstance(value, tuple | list) else (value,):
                    if id(one) in self._wanted:
                        self._counts[id(one)] += 1
        return found

    def uses(self, parameter: Tensor) -> int:
        """Return the number of operations that took the parameter."""
        return self._counts[id(parameter)]


def _is_mask(index: Any) -> bool:
    entries = index if isinstance(index, tuple | list) else (index,)
    return any(isinstance(entry, Tensor) and entry.dtype == torch.bool for entry in entries)


@dataclass(frozen=True)
class ForwardCapture:
    """What hooks saw of a batch in one forward pass and the backward passes.

    Attributes:
        logits: The model's logits, ``[B, C]``, part of the graph.
        inputs: Each regular module's input by the module's name, ``[B, L, d]`` or indices ``[B, L]``.
        gradients: Each regular module's output gradients, one for each logit, shaped like its output.
        irregular: Modules whose gradients do not factor in this batch as their type assumes.
    """

    logits: Tensor
    inputs: dict[str, Tensor]
    gradients: dict[str, list[Tensor]]
    irregular: frozenset[str]


class _Hooks:
    """Forward hooks that keep the inputs and outputs of layers' modules for a batch of `size` examples."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.module_io: dict[str, ModuleIO] = {}
        self.calls: Counter[str] = Counter()

    def hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        """Return the forward hook of the module `name`."""

        def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            inputs = layer.select_input(arguments, keywords)
            self.calls[name] += 1
            if not all(isinstance(value, Tensor) for value in (inputs, output)) or not torch.is_grad_enabled():
                return output
            if output.shape[0] == 1 < self.size and output.dim() > 2:
                # An output broadcast over the batch would have its gradient summed over the examples.
                output = output.expand(self.size, *output.shape[1:])
                inputs = inputs.expand(self.size, *inputs.shape[1:])
            if not output.requires_grad:
                # Some models change an output in place, which a leaf would not allow.
                output = output.detach().requires_grad_().clone()
            versions = _version(inputs), _version(output)
            self.module_io[name] = ModuleIO(inputs.detach(), output, get_gradient_edge(output), versions)
            return output

        return keep

    def is_regular(self, name: str, layer: Layer, operations: OperationWatcher) -> bool:
        """Return whether a module was called once, on one row an example, and its parameters were used by it alone."""
        io = self.module_io.get(name)
        return (
            io is not None
            and self.calls[name] == 1
            and io.inputs.dim() > 0
            and len(io.inputs) == len(io.output) == self.size
            and io.output.dim() > 1
            and not io.changed
            and all(operations.uses(getattr(layer.module, local)) == 1 for local in layer.parameter_names)
        )


def forward_backward(layers: Mapping[str, Layer], call: Callable[[Batch], Tensor], batch: Batch) -> ForwardCapture:
    """Propagate a batch forward, and each logit backward to the outputs of layers' modules.

    Args:
        layers: The layers by module name; their parameters need no gradient.
        call: Calls the model with a batch and returns the logits, ``[B, C]``.
        batch: B examples, of which none depends on another.
    """
    hooks = _Hooks(size=len(tree_leaves(batch)[0]))
    handles = [
        # Before the user's own hooks: what these do to an output, they do to what is kept here.
        layer.module.register_forward_hook(hooks.hook(name, layer), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    operations = OperationWatcher(
        [getattr(layer.module, local) for layer in layers.values() for local in layer.parameter_names]
    )
    try:
        with torch.enable_grad(), operations:
            logits = call(batch)
    finally:
        for handle in handles:
            handle.remove()
    regular = {
        name: hooks.module_io[name] for name, layer in layers.items() if hooks.is_regular(name, layer, operations)
    }
    hooks.module_io.clear()
    gradients: dict[str, list[Tensor]] = {name: [] for name in regular}
    for logit in range(logits.shape[1]):
        with torch.enable_grad():
            # Examples do not see each other: the gradient of their sum is each one's own.
            total = logits[:, logit].sum()
        retain_graph = operations.selects or logit < logits.shape[1] - 1
        for name, gradient in _backward(total, regular, retain_graph).items():
            gradients[name].append(gradient)
    if operations.selects and hooks.size > 1:
        for name in _of_other_examples(logits, regular, gradients):
            del regular[name], gradients[name]
    inputs = {name: io.inputs for name, io in regular.items()}
    return ForwardCapture(logits, inputs, gradients, frozenset(layers.keys() - regular.keys()))


def _backward(total: Tensor, module_io: Mapping[str, ModuleIO], retain_graph: bool) -> dict[str, Tensor]:
    """Return the gradients of `total` at modules' outputs."""
    found: Sequence[Tensor | None] = [None] * len(module_io)
    if module_io and total.requires_grad:
        edges = [io.edge for io in module_io.values()]
        found = torch.autograd.grad(total, edges, retain_graph=retain_graph, allow_unused=True)
    return {
        name: torch.zeros_like(io.output) if gradient is None else gradient
        for (name, io), gradient in zip(module_io.items(), found, strict=True)
    }


def _of_other_examples(
    logits: Tensor, module_io: Mapping[str, ModuleIO], gradients: Mapping[str, Sequence[Tensor]]
) -> list[str]:
    """Find the modules in which a row belongs to another example than the one at its place in the batch.

    Each example's logits are multiplied by a number of its own, and so must be the gradient of its row. The weights of
    an example's logits differ from each other, since their plain sum may be constant (that of a softmax is 1).
    """
    size, num_logits = logits.shape
    scale = torch.arange(1, size + 1, device=logits.device).to(logits)
    weights = 1 + torch.arange(num_logits, device=scale.device).to(scale) * GOLDEN % 1
    with torch.enable_grad():
        total = (logits @ weights * scale).sum()
    wrong = []
    for name, gradient in _backward(total, module_io, retain_graph=False).items():
        terms = torch.stack([term.flatten(1) * weight for term, weight in zip(gradients[name], weights, strict=True)])
        expected = terms.sum(dim=0) * scale[:, None]
        largest, error = expected.abs().amax(dim=1), (gradient.flatten(1) - expected).abs().amax(dim=1)
        rounding = torch.finfo(expected.dtype).eps ** 0.5 * terms.abs().amax(dim=(0, 2)) * scale
        if (error > largest / (10 * size) + rounding).any():
            wrong.append(name)
    return wrong


@dataclass(frozen=True)
class BatchFactors:
    """The factors of a batch.

    Attributes:
        of_layer: The factors in every regular layer, by module name.
        irregular: The layers that are not regular in this batch.
        broken: Which examples' gradients hold NaN or infinity, bool ``[B]``; None if no signs are taken.
    """

    of_layer: dict[str, Any]
    irregular: frozenset[str]
    broken: Tensor | None


def factors(layers: Mapping[str, Layer], call: Callable[[Batch], Tensor], batch: Batch, signed: bool) -> BatchFactors:
    """Return the factors of a batch in every layer.

    Args:
        layers: The layers by module name.
        call: Calls the model with a batch.
        batch: B examples.
        signed: Whether signs are taken, which would hide NaN and infinity.
    """
    captured = forward_backward(layers, call, batch)
    broken = _not_finite(captured) if signed else None
    # Gradients are released layer by layer: factors may be smaller.
    of_layer = {
        name: layers[name].factors(captured.inputs[name], captured.gradients.pop(name))
        for name in list(captured.gradients)
    }
    return BatchFactors(of_layer, captured.irregular, broken)


def _not_finite(captured: ForwardCapture) -> Tensor:
    """Return which examples have NaN or infinity in a layer's input or output gradient, bool ``[B]``."""
    total = 0 * captured.logits.detach().sum(dim=1, dtype=torch.float64)
    seen: set[tuple[object, ...]] = set()
    for name, of_logits in captured.gradients.items():
        inputs = captured.inputs[name]
        for tensor in (inputs, *of_logits) if inputs.is_floating_point() else of_logits:
            if storage_key(tensor) not in seen:  # queries, keys and values share one input
                seen.add(storage_key(tensor))
                # A sum is the fastest test of all numbers: one that is not finite makes it so.
                total = total + 0 * tensor.flatten(1).sum(dim=1, dtype=torch.float64)
    return ~total.isfinite()


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version
