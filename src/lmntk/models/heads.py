"""Models with a classification head, which read the plain text without a prompt (`few_shot_type=finetune`)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lmntk.errors import ModelError
from lmntk.models.classifier import PromptClassifier
from lmntk.models.families import is_causal

# Architectures whose heads read the first token only.
_READS_FIRST_TOKEN = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"}


class SequenceClassifier(PromptClassifier):
    """An architecture's sequence-classification model in transformers, with its head.

    Args:
        lm: The sequence-classification model.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.

    Raises:
        ModelError: The head of a causal model is not a linear layer on its last token.
    """

    def __init__(self, lm: PreTrainedModel, binary_classification: bool = False) -> None:
        self._reads_last_token = is_causal(lm.config)
        if self._reads_last_token and not isinstance(getattr(lm, "score", None), nn.Linear):
            raise ModelError(
                f"`few_shot_type=finetune`: the classification head of {lm.config.model_type} is not known here; add "
                "`from_linearhead=True`, which puts one linear layer on the last token, or take `few_shot_type=prompt`",
                model=lm.config.model_type,
            )
        super().__init__(lm, binary_classification, single_position=_reads_one_token(lm.config))
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

    def head_logits(self, **inputs: Any) -> Tensor:
        """Return the classes' logits, ``[B, C]``."""
        if self._reads_last_token:
            # The forward pass of transformers finds the last token by the padding token; here `mask_pos` names it.
            return self.last_layer(self.lm.base_model(**inputs).last_hidden_state[:, 0])
        return self.lm(**inputs).logits


class OneTokenClassifier(PromptClassifier):
    """An encoder and one linear layer on the last hidden state of one token: the first, or a causal model's last.

    The no-prompt kernels published with Malladi et al. 2023 have this head. The layer is zero until it is fitted.

    Args:
        encoder: The encoder alone, without a pooler.
        num_classes: The number of classes, or 1 for a score.
        binary_classification: Make the logits the single difference f₁ − f₀, ``[B, 1]``.
    """

    def __init__(self, encoder: PreTrainedModel, num_classes: int, binary_classification: bool = False) -> None:
        super().__init__(encoder, binary_classification)
        # OPT-350m's last hidden state is as narrow as its word embeddings.
        width = getattr(encoder.config, "word_embed_proj_dim", encoder.config.hidden_size)
        self.classifier = nn.Linear(width, num_classes)
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
        """The beginning of the names of the encoder's parameters."""
        return "lm."

    def head_logits(self, **inputs: Any) -> Tensor:
        """Return the classes' logits, ``[B, C]``."""
        return self.classifier(self.lm(**inputs).last_hidden_state[:, 0])


def _reads_one_token(config: PretrainedConfig) -> bool:
    if config.model_type == "modernbert":
        return config.classifier_pooling == "cls"
    return is_causal(config) or config.model_type in _READS_FIRST_TOKEN
