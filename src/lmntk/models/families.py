"""Masked and causal language models: which of the two a checkpoint is, and how a causal one is asked."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from lmntk.errors import UsageError

MASKED, CAUSAL = "masked", "causal"
AUTO_CLASSES: dict[str, Any] = {MASKED: AutoModelForMaskedLM, CAUSAL: AutoModelForCausalLM}
# Positions are numbered from padding_idx + 1 on.
_COUNT_FROM_PADDING = {"roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"}
_COUNT_FROM_PADDING |= {"data2vec-text", "xlm-roberta-xl", "xmod", "ibert", "longformer", "luke", "mpnet", "esm"}


def family_of(config: PretrainedConfig) -> str:
    """Return ``"masked"`` or ``"causal"``, as a checkpoint's configuration says.

    An architecture that transformers has in one form is of that family. One that it has in both is causal where the
    configuration says that it is a decoder, or was saved from a causal model.

    Raises:
        UsageError: transformers has neither form of the architecture.
    """
    forms = [family for family, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
    if not forms:
        raise UsageError(
            f"--model_name_or_path: '{config.name_or_path}' is of type {config.model_type}, of which transformers has "
            "neither a masked nor a causal language model; take BERT, RoBERTa, GPT-2, OPT, Llama, Qwen or their like"
        )
    if len(forms) == 1:
        return forms[0]
    masked_form, causal_form = (auto._model_mapping[type(config)] for auto in AUTO_CLASSES.values())
    # XLM has one class for both, whose name says nothing, and no such setting.
    saved_as_causal = causal_form is not masked_form and causal_form.__name__ in (config.architectures or ())
    return CAUSAL if saved_as_causal or getattr(config, "is_decoder", False) else MASKED


def choose_family(config: PretrainedConfig, family: str | None) -> None:
    """Make a configuration say which family is meant.

    Args:
        config: Changed where transformers has both forms of its architecture.
        family: ``--model_family``; None leaves the choice to the configuration.

    Raises:
        UsageError: transformers has not that form of the architecture.
    """
    found = family_of(config)
    if family is None or family == found:
        if found == CAUSAL and type(config) in AutoModelForMaskedLM._model_mapping:
            config.is_decoder = True
        return
    if type(config) not in AUTO_CLASSES[family]._model_mapping:
        raise UsageError(
            f"--model_family {family}: '{config.name_or_path}' is of type {config.model_type}, of which transformers "
            f"has no {family} language model; leave the flag out, or name another --model_name_or_path"
        )
    config.is_decoder = family == CAUSAL
    config.architectures = None


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration reads from left to right only."""
    return family_of(config) == CAUSAL


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence the model can read, in tokens; None where nothing limits it.

    A causal model whose layers look back so many tokens only is asked within that window, where it sees everything.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    # Then so many rows are never a position.
    positions = positions and positions - _first_position(text)
    window = None
    # Not all have one window for all layers, and say so by an error; an encoder of sentences need be no language model.
    if type(config) in AutoModelForCausalLM._model_mapping and is_causal(config):
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return min(filter(None, (positions, window)), default=None)


def vocabulary_size(config: PretrainedConfig) -> int:
    """Return how many tokens the model knows; the configuration of one that sees pictures too has it further down."""
    return config.get_text_config().vocab_size


def _first_position(config: PretrainedConfig) -> int:
    return config.pad_token_id + 1 if config.model_type in _COUNT_FROM_PADDING else 0


def decoder_of(lm: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model whose output is its last hidden state: OPT's heads ask its decoder directly."""
    return lm.get_decoder() if is_causal(lm.config) else lm.base_model  # type: ignore[return-value]


def causal_inputs(
    lm: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, makes_masks: bool = True
) -> dict[str, Any]:
    """Return the inputs that tell a causal model what each token sees, and where it stands.

    The mask is ready to be added to scores, since transformers decides by the data which one to make, of which
    `torch.vmap` knows nothing. Positions count tokens, so that padding may stand on either side.

    Args:
        lm: The model.
        input_ids: ``[B, L]``.
        attention_mask: 1 for tokens, 0 for padding, ``[B, L]``; None where nothing is padded.
        makes_masks: Whether the model takes such a mask; Bloom and others derive more than a mask from the other one.

    Returns:
        ``attention_mask`` ``[B or 1, 1, L, L]`` in the model's dtype, ``position_ids`` ``[B or 1, L]``, and the wish
        not to keep keys and values. A model that takes no positions gets the mask as it is.
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
