"""Attention as plain tensor operations: in the model's own dtype throughout, differentiable in every mode.

Fused attention has no forward-mode derivative on CPU. The eager attention of some architectures computes its softmax
in float32 whatever the model's dtype, so that float64 kernels lose half their digits.
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
    """Compute scaled dot-product attention, with the signature that transformers expects.

    Args:
        module: The attention module, whose mode switches dropout on or off.
        query: The query heads, ``[B, heads, L, d]``.
        key: The key heads, ``[B, key heads, L, d]``; query heads may share them.
        value: The value heads, ``[B, key heads, L, d]``.
        attention_mask: The mask that is added to the scores, ``[B, 1, L, L]``; None if every token sees every other.
        scaling: The factor of the scores; None for 1/√d.
        dropout: The probability of dropping an attention weight in training.
        softcap: The smooth bound of the scores, as in Gemma 2; None for no bound.
        s_aux: The score for attending to no token, ``[heads]``, as in GPT-OSS; None for none.
        **kwargs: The arguments of other kinds of attention, ignored here.

    Returns:
        The mixed values, ``[B, L, heads, d]``, and the attention weights, ``[B, heads, L, L]``.
    """
    # Queries that share a key are stacked in one matrix, so that no key is copied.
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
    """Let a model use `plain_attention`, if its architecture supports other attention functions."""
    if getattr(lm, "_supports_attention_backend", False):
        lm.set_attn_implementation(NAME)
