"""One forward and C backward passes, to module outputs only: what went into each layer, and the gradients behind it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lmntk.kernels.examples import Batch
from lmntk.kernels.layers.base import Layer


@dataclass
class Passage:
    """What a module was given and gave in one forward pass.

    Attributes:
        inputs: What its layer type wants to know of what it was given.
        output: What came out, part of the graph.
        calls: How often it was called.
    """

    inputs: Tensor
    output: Tensor
    calls: int = 1


@dataclass
class Record:
    """The passages of one batch, by module name.

    Attributes:
        size: B, the number of examples in the batch.
        passages: What each module was given and gave.
        logits: What came out of the model, ``[B, C]``.
    """

    size: int
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    passages: dict[str, Passage] = field(default_factory=dict)

    def hook(self, name: str, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor]:
        """Return the forward hook that records the module `name`."""

        def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Tensor:
            inputs = layer.given(arguments, keywords)
            if not all(isinstance(value, Tensor) for value in (inputs, output)):
                return output
            if output.shape[0] == 1 < self.size and output.dim() > 2:
                # An output broadcast over the batch would have its gradient summed over the examples.
                output = output.expand(self.size, *output.shape[1:])
                inputs = inputs.expand(self.size, *inputs.shape[1:])
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            calls = self.passages[name].calls + 1 if name in self.passages else 1
            self.passages[name] = Passage(inputs.detach(), output, calls)
            return output

        return record


def run(
    layers: Mapping[str, Layer], call: Callable[[Batch], Tensor], batch: Batch
) -> tuple[Record, dict[str, list[Tensor]]]:
    """Propagate a batch forward, and each logit backward.

    Args:
        layers: The layers whose modules to record, by name; no parameter of theirs needs a gradient.
        call: Calls the model with a batch and returns its logits, ``[B, C]``.
        batch: Some examples.

    Returns:
        The record, and for every recorded module the gradient of each logit at its output.
    """
    record = Record(len(tree_leaves(batch)[0]))
    handles = [
        layer.module.register_forward_hook(record.hook(name, layer), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            logits = record.logits = call(batch)
    finally:
        for handle in handles:
            handle.remove()
    names = list(record.passages)
    if not names:
        return record, {}
    outputs = [record.passages[name].output for name in names]
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    for logit in range(logits.shape[1]):
        last = logit == logits.shape[1] - 1
        with torch.enable_grad():
            # Examples do not see each other: the gradient of their sum is each one's own.
            total = logits[:, logit].sum()
        found = torch.autograd.grad(total, outputs, retain_graph=not last, allow_unused=True)
        for name, output, gradient in zip(names, outputs, found, strict=True):
            gradients[name].append(torch.zeros_like(output) if gradient is None else gradient)
    return record, gradients


def factors(layers: Mapping[str, Layer], call: Callable[[Batch], Tensor], batch: Batch) -> dict[str, Any]:
    """Return the factors of a batch in every layer."""
    if not layers:
        return {}
    record, gradients = run(layers, call, batch)
    return {name: layers[name].factors(record.passages[name].inputs, gradients.pop(name)) for name in list(gradients)}
