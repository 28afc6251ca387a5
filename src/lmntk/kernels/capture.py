"""One forward and C backward passes, to module outputs only: what went into each layer, and the gradients behind it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lmntk.kernels.batching import Batch
from lmntk.kernels.layers.base import Layer
from lmntk.kernels.layers.linear_factors import storage_key


@dataclass
class ModuleIO:
    """What a module was given and gave in one forward pass.

    Attributes:
        inputs: What its layer type wants to know of what it was given.
        output: What came out, part of the graph.
        edge: Where the gradient at that output arrives, whatever is done to the output in place later on.
        versions: How often inputs and output had been changed in place by then.
    """

    inputs: Tensor
    output: Tensor
    edge: GradientEdge
    versions: tuple[int, int]

    @property
    def changed(self) -> bool:
        """Whether the inputs are no longer there, or the gradient at the output no longer passes by `edge`."""
        inputs, output = _version(self.inputs), _version(self.output)
        return inputs != self.versions[0] or (output != self.versions[1] and self.output._is_view())


# What a model sorts, selects or drops examples with, by what is in them.
SELECTING = {"argsort", "msort", "sort", "topk", "unique", "unique_consecutive", "searchsorted", "tolist"}
SELECTING |= {"argwhere", "nonzero", "masked_select", "masked_scatter", "masked_scatter_", "argmax", "argmin"}
SELECTING |= {"kthvalue", "median", "mode", "bincount", "item", "numpy", "__index__", "__int__", "__float__"}

GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are all different


class ParameterUses(TorchFunctionMode):
    """Watches a forward pass.

    Args:
        parameters: The parameters whose uses are counted, be it their module that makes them, or anything else.

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
        if isinstance(found, Tensor | tuple | list):  # not what is asked of shapes, dtypes and devices
            for value in (*args, *(kwargs or {}).values()):
                for one in value if isinstance(value, tuple | list) else (value,):
                    if id(one) in self._wanted:
                        self._counts[id(one)] += 1
        return found

    def uses(self, parameter: Tensor) -> int:
        """Return in how many operations the parameter took part."""
        return self._counts[id(parameter)]


def _is_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple | list) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


@dataclass
class ForwardCapture:
    """The module_io of one batch, by module name.

    Attributes:
        layers: The layers whose modules are recorded, by name.
        size: B, the number of examples in the batch.
        logits: What came out of the model, ``[B, C]``.
        module_io: What each module was given and gave.
        calls: How often each was called.
        irregular: The modules of which this batch shows that their gradients do not factor as their type has it.
    """

    layers: Mapping[str, Layer]
    size: int
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    module_io: dict[str, ModuleIO] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    irregular: set[str] = field(default_factory=set)

    def hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        """Return the forward hook that records the module `name`."""

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
                # A leaf could not be changed in place, of which some models make use.
                output = output.detach().requires_grad_().clone()
            versions = _version(inputs), _version(output)
            self.module_io[name] = ModuleIO(inputs.detach(), output, get_gradient_edge(output), versions)
            return output

        return keep

    def find_irregular(self, seen: ParameterUses) -> None:
        """Find the modules whose gradients do not factor, and let their module_io go.

        A module's own call must be all that its parameters do, once in the batch, of one row an example, with inputs
        that stay what they were.
        """
        for name, layer in self.layers.items():
            io = self.module_io.get(name)
            regular = (
                io is not None
                and self.calls[name] == 1
                and io.inputs.dim() > 0
                and len(io.inputs) == len(io.output) == self.size
                and io.output.dim() > 1
                and not io.changed
                and all(seen.uses(getattr(layer.module, local)) == 1 for local in layer.parameter_names)
            )
            if not regular:
                self.irregular.add(name)
                self.module_io.pop(name, None)


def forward_backward(
    layers: Mapping[str, Layer], call: Callable[[Batch], Tensor], batch: Batch
) -> tuple[ForwardCapture, dict[str, list[Tensor]]]:
    """Propagate a batch forward, and each logit backward.

    Args:
        layers: The layers whose modules to record, by name; no parameter of theirs needs a gradient.
        call: Calls the model with a batch and returns its logits, ``[B, C]``.
        batch: Some examples.

    Returns:
        The record, and for every module that is regular the gradient of each logit at its output.
    """
    record = ForwardCapture(layers, len(tree_leaves(batch)[0]))
    handles = [
        # Before hooks of the user's own: what these do to an output, they do to what is recorded here.
        layer.module.register_forward_hook(record.hook(name, layer), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    seen = ParameterUses([getattr(layer.module, local) for layer in layers.values() for local in layer.parameter_names])
    try:
        with torch.enable_grad(), seen:
            logits = record.logits = call(batch)
    finally:
        for handle in handles:
            handle.remove()
    record.find_irregular(seen)
    gradients: dict[str, list[Tensor]] = {name: [] for name in record.module_io}
    for logit in range(logits.shape[1]):
        with torch.enable_grad():
            # Examples do not see each other: the gradient of their sum is each one's own.
            total = logits[:, logit].sum()
        needed = seen.selects or logit < logits.shape[1] - 1
        for name, gradient in _backward(total, record.module_io, needed).items():
            gradients[name].append(gradient)
    if seen.selects and record.size > 1:
        for name in _of_other_examples(record, gradients):
            record.irregular.add(name)
            del record.module_io[name], gradients[name]
    return record, gradients


def _backward(total: Tensor, module_io: Mapping[str, ModuleIO], needed: bool) -> dict[str, Tensor]:
    """Return the gradients at modules' outputs; the graph stays if it is `needed` again."""
    found: Sequence[Tensor | None] = [None] * len(module_io)
    if module_io and total.requires_grad:
        edges = [io.edge for io in module_io.values()]
        found = torch.autograd.grad(total, edges, retain_graph=needed, allow_unused=True)
    return {
        name: torch.zeros_like(io.output) if gradient is None else gradient
        for (name, io), gradient in zip(module_io.items(), found, strict=True)
    }


def _of_other_examples(record: ForwardCapture, gradients: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """Find the modules of which a row is not that example's whose place it has.

    Each example's logits are multiplied by a number of its own, and so must be the gradient of its row. The weights of
    an example's logits differ from each other, since their plain sum may be constant (that of a softmax is 1).
    """
    scale = torch.arange(1, record.size + 1, device=record.logits.device).to(record.logits)
    weights = 1 + torch.arange(record.logits.shape[1], device=scale.device).to(scale) * GOLDEN % 1
    with torch.enable_grad():
        total = (record.logits @ weights * scale).sum()
    wrong = []
    for name, gradient in _backward(total, record.module_io, needed=False).items():
        parts = torch.stack([part.flatten(1) * weight for part, weight in zip(gradients[name], weights, strict=True)])
        expected = parts.sum(dim=0) * scale[:, None]
        size, error = expected.abs().amax(dim=1), (gradient.flatten(1) - expected).abs().amax(dim=1)
        rounding = torch.finfo(expected.dtype).eps ** 0.5 * parts.abs().amax(dim=(0, 2)) * scale
        if (error > size / (10 * record.size) + rounding).any():
            wrong.append(name)
    return wrong


@dataclass
class BatchFactors:
    """The factors of a batch.

    Attributes:
        of_layer: In every layer that is regular.
        irregular: The layers that are not.
        broken: Which examples' gradients hold NaN or infinity, bool ``[B]``; None where nobody asked.
    """

    of_layer: dict[str, Any]
    irregular: set[str]
    broken: Tensor | None


def factors(layers: Mapping[str, Layer], call: Callable[[Batch], Tensor], batch: Batch, signed: bool) -> BatchFactors:
    """Return the factors of a batch in every layer.

    Args:
        layers: The layers by module name.
        call: Calls the model.
        batch: Some examples.
        signed: Whether signs are taken, which would hide NaN and infinity.
    """
    record, gradients = forward_backward(layers, call, batch)
    broken = _not_finite(record, gradients) if signed else None
    of_layer = {
        name: layers[name].factors(record.module_io[name].inputs, gradients.pop(name)) for name in list(gradients)
    }
    return BatchFactors(of_layer, record.irregular, broken)


def _not_finite(record: ForwardCapture, gradients: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Tell which examples have NaN or infinity in what goes into a layer, or in a gradient behind one: bool ``[B]``."""
    total = 0 * record.logits.detach().sum(dim=1, dtype=torch.float64)
    seen: set[tuple[object, ...]] = set()
    for name, of_logits in gradients.items():
        inputs = record.module_io[name].inputs
        for tensor in (inputs, *of_logits) if inputs.is_floating_point() else of_logits:
            if storage_key(tensor) not in seen:  # queries, keys and values are given one tensor
                seen.add(storage_key(tensor))
                # A sum is the fastest look at all numbers; one that is not finite makes it so.
                total = total + 0 * tensor.flatten(1).sum(dim=1, dtype=torch.float64)
    return ~total.isfinite()


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; what inference mode made does not count that."""
    return 0 if tensor.is_inference() else tensor._version
