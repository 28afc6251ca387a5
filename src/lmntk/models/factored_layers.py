"""Layers beyond torch's own that the factored engine differentiates: their classes, and their registration."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from lmntk.kernels.contraction import widened
from lmntk.kernels.layers import EmbeddingLayer, LinearLayer, register
from lmntk.kernels.layers.base import Gradients
from lmntk.kernels.layers.token_matching import TokenGradients


class LabelWordDecoder(nn.Module):
    """The decoder of a language model, computed for the label words only.

    Args:
        weight: One row for each token of the vocabulary, ``[V, d]``.
        bias: One number for each token of the vocabulary, ``[V]``; None for a decoder without a bias.
        label_word_ids: The token of each class's label word, in logit order.
    """

    label_word_ids: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, label_word_ids: Sequence[int]) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.register_buffer("label_word_ids", torch.tensor(label_word_ids), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the label words' logits, ``[..., C]``, of hidden states ``[..., d]``; of bfloat16 in float32."""
        bias = None if self.bias is None else widened(self.bias[self.label_word_ids])
        return F.linear(widened(hidden), widened(self.weight[self.label_word_ids]), bias)


class OffsetEmbeddingLayer(EmbeddingLayer):
    """OPT's position embeddings: position p has row p + 2, and the module's first argument is the mask."""

    module: OPTLearnedPositionalEmbedding

    @staticmethod
    def select_input(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Return the positions."""
        return keywords.get("position_ids")

    def factors(self, inputs: Tensor, gradients: Gradients) -> TokenGradients:
        """Sum the output gradients of equal rows, example by example."""
        return super().factors(inputs + self.module.offset, gradients)


class TransposedLinearLayer(LinearLayer):
    """GPT-2's linear layer, whose weight is ``[d_in, d_out]``."""

    @staticmethod
    def as_matrices(gradients: Tensor) -> Tensor:
        """Return gradients of the weight, ``[..., d_in, d_out]``, as ``[..., d_out, d_in]``."""
        return gradients.transpose(-1, -2)


def register_layers() -> None:
    """Let the factored engine know the layers of language models: all of this project's registrations."""
    register(Conv1D, TransposedLinearLayer)
    register(OPTLearnedPositionalEmbedding, OffsetEmbeddingLayer)
    register(LabelWordDecoder, LinearLayer)  # its gradient is that of some rows of a linear layer
