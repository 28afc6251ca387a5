"""Attention in the open: every product and the softmax in the model's own dtype, differentiable in every mode.

Fused attention has no forward-mode derivative on CPU, and some architectures' own eager attention takes its softmax
in float32 whatever the model's dtype, which costs float64 kernels half their digits.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "lmntk_plain"


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention as transformers calls it.

    Args:
        module: The attention module, which knows how many query heads share a key.
        query: ``[B, heads, L, d]``.
        key: ``[B, key heads, L, d]``.
        value: ``[B, key heads, L, d]``.
        attention_mask: Added to the scores, ``[B, 1, L, L]``; None where every token sees every other.
        scaling: What scores are multiplied by; 1/√d where none is given.
        dropout: Probability of dropping an attention weight in training.
        softcap: What scores are kept below, smoothly, as in Gemma 2.
        s_aux: A score for looking at no token, ``[heads]``, as in GPT-OSS.
        **kwargs: What other kinds of attention want to know.

    Returns:
        The mixed values, ``[B, L, heads, d]``, and the attention weights, ``[B, heads, L, L]``.
    """
    # Queries that share a key stand below one another in one matrix: nothing is repeated.
    together = (*key.shape[:2], -1)
    scores = query.reshape(*together, query.shape[3]) @ key.transpose(2, 3)
    scores = scores.view(*query.shape[:3], -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    mixed = weights.reshape(*together, weights.shape[3]) @ value
    return mixed.view(*query.shape[:3], -1).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, plain_attention)
AttentionMaskInterface.register(NAME, eager_mask)


def use_plain_attention(lm: PreTrainedModel) -> None:
    """Switch a model over, if its architecture lets its attention be chosen."""
    if getattr(lm, "_supports_attention_backend", False):
        lm.set_attn_implementation(NAME)
