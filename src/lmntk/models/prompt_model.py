"""A language model that answers a prompt: the logits of its label words at one position of the sequence."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmntk.kernels.layers import LinearLayer, register
from lmntk.models.classifier import PromptClassifier


class LabelWordDecoder(nn.Module):
    """The decoder of a language model of which only the label words' rows are ever multiplied.

    Args:
        weight: The decoder's rows, one per token of the vocabulary, ``[V, d]``.
        bias: One number per token of the vocabulary, ``[V]``, where the decoder has them.
        label_word_ids: The token of each class's label word, in logit order.
    """

    label_word_ids: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, label_word_ids: Sequence[int]) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.register_buffer("label_word_ids", torch.tensor(label_word_ids), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the label words' logits, ``[..., C]``, of hidden states ``[..., d]``."""
        bias = None if self.bias is None else self.bias[self.label_word_ids]
        return F.linear(hidden, self.weight[self.label_word_ids], bias)


# Its gradient is that of a linear layer of some rows.
register(LabelWordDecoder, LinearLayer)


class PromptModel(PromptClassifier):
    """A language model with its own head, as it is but for two changes that hold for whatever architecture.

    The encoder hands it the hidden state of one position only, and its decoder multiplies the label words' rows only.

    Args:
        lm: A language model whose decoder is untied from its word embeddings (see `models.loading`).
        label_word_ids: The token of each class's label word, in logit order.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.
    """

    def __init__(self, lm: PreTrainedModel, label_word_ids: Sequence[int], binary_classification: bool = False) -> None:
        decoder = lm.get_output_embeddings()
        label_words = LabelWordDecoder(decoder.weight, decoder.bias, label_word_ids)
        lm.set_output_embeddings(label_words)
        _drop_second_name(lm, label_words)
        super().__init__(lm, binary_classification)

    @property
    def last_layer(self) -> LabelWordDecoder:
        """The decoder."""
        return cast(LabelWordDecoder, self.lm.get_output_embeddings())

    @property
    def num_classes(self) -> int:
        """The number of label words."""
        return len(self.last_layer.label_word_ids)

    @property
    def label_word_ids(self) -> list[int]:
        """The token of each class's label word, in logit order."""
        return self.last_layer.label_word_ids.tolist()

    def head_logits(self, **inputs: Any) -> Tensor:
        """Return the label words' logits, ``[B, C]``."""
        return self.lm(**inputs).logits[:, 0]

    def _class_rows(self) -> Tensor:
        return self.last_layer.label_word_ids

    def _rows_that_matter(self) -> tuple[set[int], Tensor, dict[str, Tensor]]:
        decoder = self.last_layer
        name = next(name for name, module in self.named_modules() if module is decoder)
        rows = decoder.label_word_ids
        buffers = {f"{name}.label_word_ids": torch.arange(len(rows), device=rows.device)}
        return {id(parameter) for parameter in decoder.parameters()}, rows, buffers


def _drop_second_name(lm: nn.Module, decoder: LabelWordDecoder) -> None:
    """Leave the decoder's bias, which some heads hold under a name of their own too, to the decoder that uses it."""
    for module in lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is decoder.bias and module is not decoder:
                delattr(module, name)
