"""Models that classify the plain text with a head of their own (``--few_shot_type finetune``)."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lmntk.models.base import PositionModel

# Their heads look at the first token and nothing else.
_READS_FIRST_TOKEN = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"}


class SequenceClassifier(PositionModel):
    """The sequence-classification model that transformers has of an architecture, with its head.

    Args:
        lm: The model.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.
    """

    def __init__(self, lm: PreTrainedModel, binary_classification: bool = False) -> None:
        super().__init__(lm, binary_classification, narrows=_reads_first_token(lm.config))
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        self._last_layer_name = next(name for name, module in self.named_modules() if module is linear[-1])

    @property
    def last_layer(self) -> nn.Linear:
        """The layer of the head that gives the logits."""
        return cast(nn.Linear, self.get_submodule(self._last_layer_name))

    @property
    def num_classes(self) -> int:
        """The number of classes, or 1 for a score."""
        return self.last_layer.out_features

    def head_logits(self, **inputs: Tensor | None) -> Tensor:
        """Return the classes' logits, ``[B, C]``."""
        return self.lm(**inputs).logits


class FirstTokenClassifier(PositionModel):
    """An encoder and one linear layer on the last hidden state of the first token.

    So were the no-prompt kernels published with Malladi et al. 2023 computed. The layer is zero until it is fitted.

    Args:
        encoder: The encoder alone, without a pooler.
        num_classes: The number of classes, or 1 for a score.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.
    """

    def __init__(self, encoder: PreTrainedModel, num_classes: int, binary_classification: bool = False) -> None:
        super().__init__(encoder, binary_classification)
        self.classifier = nn.Linear(encoder.config.hidden_size, num_classes)
        with torch.no_grad():
            for parameter in self.classifier.parameters():
                parameter.zero_()

    @property
    def last_layer(self) -> nn.Linear:
        """The one layer of the head."""
        return self.classifier

    @property
    def num_classes(self) -> int:
        """The number of classes, or 1 for a score."""
        return self.classifier.out_features

    @property
    def base_prefix(self) -> str:
        """What the names of the encoder's parameters begin with."""
        return "lm."

    def head_logits(self, **inputs: Tensor | None) -> Tensor:
        """Return the classes' logits, ``[B, C]``."""
        return self.classifier(self.lm(**inputs).last_hidden_state[:, 0])


def _reads_first_token(config: PretrainedConfig) -> bool:
    if config.model_type == "modernbert":
        return config.classifier_pooling == "cls"
    return config.model_type in _READS_FIRST_TOKEN
