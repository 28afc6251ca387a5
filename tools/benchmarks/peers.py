"""Per-sample gradients by opacus, put into the `jacobian` engine; imported only where opacus is installed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from torch import Tensor, nn

from lmntk.kernels import Examples, KernelProblem, MemoryBudget, ModuleModel, Plan
from lmntk.kernels.batching import equal_shape_batches
from lmntk.kernels.engines.jacobian import Gradients, JacobianEngine
from lmntk.models.factored_layers import LabelWordDecoder


@register_grad_sampler(LabelWordDecoder)
def decoder_gradients(
    layer: LabelWordDecoder, activations: list[Tensor], gradients: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Differentiate the decoder, which opacus does not know: all rows, of which the label words' are not zero."""
    found = {layer.weight: layer.weight.new_zeros(len(gradients), *layer.weight.shape)}
    found[layer.weight][:, layer.label_word_ids] = torch.einsum("blc,bld->bcd", gradients, activations[0])
    if layer.bias is not None:
        found[layer.bias] = layer.bias.new_zeros(len(gradients), len(layer.bias))
        found[layer.bias][:, layer.label_word_ids] = gradients.sum(dim=1)
    return found


class OpacusEngine(JacobianEngine):
    """The `jacobian` engine with opacus' gradients: of whole parameters, by one backward pass a logit.

    All of them are in memory at once, whatever the budget. The model is in train mode, without dropout, so that its
    last layer computes all positions.
    """

    name = "opacus"

    def __init__(self, problem: KernelProblem, budget: MemoryBudget) -> None:
        assert isinstance(problem.model, ModuleModel)
        own = problem.model.module
        params = {name: parameter.detach() for name, parameter in own.named_parameters()}
        super().__init__(replace(problem, params=params), budget)
        self._module = GradSampleModule(own.requires_grad_(True), loss_reduction="sum", strict=False)
        self._module.train()  # else it takes no gradients
        for module in own.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._expand)
        self._batch_size = 1

    def _expand(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give every example positions of its own: opacus would sum what the batch shares."""
        return (arguments[0].expand(self._batch_size, -1),)

    def _groups(self, plan: Plan) -> list[list[str]]:
        return [list(self.problem.params)]

    def _gradients(self, examples: Examples, indices: Sequence[int], group: list[str]) -> Gradients:
        c = self.problem.num_logits
        gradients = {
            name: tensor.new_empty(len(indices), c, tensor.numel()) for name, tensor in self.problem.params.items()
        }
        start = 0
        for batch in equal_shape_batches(examples, indices, limit=self.tuning.jacobian_batch):
            self._batch_size = len(batch)
            for logit in range(c):
                self._module.zero_grad()
                self._module(**examples.batch(batch))[:, logit].sum().backward()
                for name, parameter in self._module._module.named_parameters():
                    gradients[name][start : start + len(batch), logit] = parameter.grad_sample.flatten(1)
            start += len(batch)
        return Gradients({name: tensor.flatten(0, 1) for name, tensor in gradients.items()}, broken=None)
