"""Masked and causal language models: the family of a checkpoint, its limits, and the inputs of a causal model."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from lmntk.errors import ModelError

MASKED, CAUSAL = "masked", "causal"
AUTO_CLASSES: dict[str, Any] = {MASKED: AutoModelForMaskedLM, CAUSAL: AutoModelForCausalLM}
# Positions are numbered from padding_idx + 1 on.
_COUNT_FROM_PADDING = {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"}
_COUNT_FROM_PADDING |= {"data2vec-text", "xlm-roberta-xl", "xmod", "ibert", "longformer", "luke", "mpnet", "esm"}


def family_of(config: PretrainedConfig) -> str:
    """Return ``"masked"`` or ``"causal"`` for a checkpoint's configuration.

    Most architectures exist in one form in transformers. Of those that exist in both, a model is causal if its
    configuration says that it is a decoder, or that it was saved from a causal model.

    Raises:
        ModelError: transformers has neither form of the architecture.

    Examples:
        >>> from transformers import BertConfig, GPT2Config
        >>> family_of(BertConfig()), family_of(BertConfig(is_decoder=True)), family_of(GPT2Config())
        ('masked', 'causal', 'causal')
    """
    forms = [family for family, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
    if not forms:
        raise ModelError(
            f"`model_name_or_path`: '{config.name_or_path}' is of type {config.model_type}, of which transformers has "
            "neither a masked nor a causal language model; take BERT, RoBERTa, GPT-2, OPT, Llama, Qwen or similar",
            model=config.model_type,
        )
    if len(forms) == 1:
        return forms[0]
    masked_form, causal_form = (auto._model_mapping[type(config)] for auto in AUTO_CLASSES.values())
    # XLM has one class for both forms, so its name does not decide, and no `is_decoder`.
    saved_as_causal = causal_form is not masked_form and causal_form.__name__ in (config.architectures or ())
    return CAUSAL if saved_as_causal or getattr(config, "is_decoder", False) else MASKED


def choose_family(config: PretrainedConfig, family: str | None) -> None:
    """Set the family in a configuration.

    Args:
        config: The configuration; changed if transformers has both forms of its architecture.
        family: ``"masked"`` or ``"causal"``; None leaves the choice to the configuration.

    Raises:
        ModelError: transformers does not have that form of the architecture.
    """
    found = family_of(config)
    if family is None or family == found:
        if found == CAUSAL and type(config) in AutoModelForMaskedLM._model_mapping:
            config.is_decoder = True
        return
    if type(config) not in AUTO_CLASSES[family]._model_mapping:
        raise ModelError(
            f"`model_family={family}`: '{config.name_or_path}' is of type {config.model_type}, of which transformers "
            f"has no {family} language model; leave it out, or name another `model_name_or_path`",
            model=config.model_type,
        )
    config.is_decoder = family == CAUSAL
    config.architectures = None


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration reads from left to right only."""
    return family_of(config) == CAUSAL


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that the model can read, in tokens; None for a model without a limit.

    The limit of a causal model with sliding-window attention is the window, within which it sees all tokens.

    Examples:
        >>> from transformers import BertConfig
        >>> max_positions(BertConfig(max_position_embeddings=512))
        512
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    positions = positions and positions - _first_position(text)
    window = None
    # Some configurations raise an error because they have several windows; and not every encoder is a language model.
    if type(config) in AutoModelForCausalLM._model_mapping and is_causal(config):
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return min(filter(None, (positions, window)), default=None)


def vocabulary_size(config: PretrainedConfig) -> int:
    """Return the number of tokens that the model knows, from the part of a configuration that is about text."""
    return config.get_text_config().vocab_size


def _first_position(config: PretrainedConfig) -> int:
    return config.pad_token_id + 1 if config.model_type in _COUNT_FROM_PADDING else 0


def decoder_of(lm: PreTrainedModel) -> PreTrainedModel:
    """Return the module whose output is the last hidden state; of causal models the one that the head calls."""
    return lm.get_decoder() if is_causal(lm.config) else lm.base_model  # type: ignore[return-value]


def causal_inputs(
    lm: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, makes_masks: bool = True
) -> dict[str, Any]:
    """Return a causal model's attention mask, positions and setting of the cache.

    The mask is ready to be added to the scores: the mask that transformers would make depends on the data, which
    `torch.vmap` does not allow. Positions count tokens, so that padding may be on either side.

    Args:
        lm: The causal model.
        input_ids: Tokens, int64 ``[B, L]``.
        attention_mask: 1 for tokens, 0 for padding, ``[B, L]``; None for a batch without padding.
        makes_masks: Whether the model takes such a mask; Bloom and others need the mask of 1 and 0.

    Returns:
        ``attention_mask`` ``[B or 1, 1, L, L]`` in the model's dtype, ``position_ids`` ``[B or 1, L]``, and
        ``use_cache=False``. A model without positions gets the mask unchanged.
    """
    if not makes_masks or "position_ids" not in inspect.signature(lm.forward).parameters:
        return {"attention_mask": attention_mask, "use_cache": False}
    weight = lm.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    length, device = input_ids.shape[1], input_ids.device
    sees = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    positions = torch.arange(length, device=device)[None]
    if attention_mask is not None:
        sees = sees & attention_mask.bool()[:, None]
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    mask = torch.zeros(sees.shape, dtype=weight.dtype, device=device).masked_fill(~sees, torch.finfo(weight.dtype).min)
    return {
        "attention_mask": mask[:, None],
        "position_ids": positions + _first_position(lm.config),
        "use_cache": False,
    }
