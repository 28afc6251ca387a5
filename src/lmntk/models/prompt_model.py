"""A language model that is asked a prompt: the logits of its label words at one position of the sequence."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmntk.models.classifier import PromptClassifier
from lmntk.models.factored_layers import LabelWordDecoder


class PromptModel(PromptClassifier):
    """A language model with its own head, of any architecture, computed at one position and for the label words only.

    The constructor changes `lm`, and does not change it back: its output embeddings become a `LabelWordDecoder` that
    has their parameters, so that `lm` gives the label words' logits, also when it is called on its own. If the head has
    a second name for the decoder's bias, that name is deleted. The layers change only while this model is called
    (`models.single_position`). Pass a copy of a model that you need unchanged.

    Args:
        lm: A language model whose decoder is untied from its word embeddings (see `models.untying`).
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

    def convert(self, dtype: torch.dtype) -> None:
        """Convert all weights; the decoder multiplies the label words' rows of bfloat16 weights in float32."""
        self.to(dtype)

    def _class_rows(self) -> Tensor:
        return self.last_layer.label_word_ids

    def _sparse_parameters(self) -> tuple[set[int], Tensor, dict[str, Tensor]]:
        decoder = self.last_layer
        name = next(name for name, module in self.named_modules() if module is decoder)
        rows = decoder.label_word_ids
        buffers = {f"{name}.label_word_ids": torch.arange(len(rows), device=rows.device)}
        return {id(parameter) for parameter in decoder.parameters()}, rows, buffers


def _drop_second_name(lm: nn.Module, decoder: LabelWordDecoder) -> None:
    """Delete the second name that some heads have for the decoder's bias."""
    for module in lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is decoder.bias and module is not decoder:
                delattr(module, name)
