"""Layers of transformers' own that the factored engine is taught: what their gradients are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from lmntk.kernels.layers import EmbeddingLayer, LinearLayer, register
from lmntk.kernels.layers.base import Gradients
from lmntk.kernels.layers.embedding import TokenGradients


class OffsetEmbeddingLayer(EmbeddingLayer):
    """OPT's position embeddings: of position p the row p + 2; the mask comes first among what they are given."""

    module: OPTLearnedPositionalEmbedding

    @staticmethod
    def select_input(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Return the positions."""
        return keywords.get("position_ids")

    def factors(self, inputs: Tensor, gradients: Gradients) -> TokenGradients:
        """Sum the output gradients of equal rows, example by example."""
        return super().factors(inputs + self.module.offset, gradients)


# GPT-2's linear layer, with its weight transposed.
register(Conv1D, LinearLayer)
register(OPTLearnedPositionalEmbedding, OffsetEmbeddingLayer)
