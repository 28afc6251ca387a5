"""The last layer at the one position that predicts: behind its attention no other position is ever asked.

Keys and values are taken of all positions; the query, and everything after it, of one. The logits are the same, and the
layer's work, forward and backward, shrinks to about a sixth (less in ModernBERT and GPT-2, whose queries come with the
keys). In training the layer is left as it is, so that dropout draws what it always drew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from lmntk.models.attention import NAME, plain_attention
from lmntk.models.families import decoder_of


@dataclass
class Position:
    """Where each example of the batch that is on its way predicts.

    Attributes:
        indices: int64 ``[B]``; None while no batch is.
    """

    indices: Tensor | None = None

    def of(self, states: Tensor) -> Tensor:
        """Narrow ``[B, L, d]`` to ``[B, 1, d]``; what has been narrowed stays as it is."""
        if self.indices is None or states.shape[1] == 1:
            return states
        return states.gather(1, self.indices.view(-1, 1, 1).expand(-1, 1, states.shape[2]))

    def seen_from(self, attention_mask: Tensor | None) -> Tensor | None:
        """Narrow a mask ``[B, 1, L, L]`` to the row of the position, ``[B, 1, 1, L]``."""
        if attention_mask is None or self.indices is None:
            return attention_mask
        return self.of(attention_mask[:, 0].expand(len(self.indices), -1, -1))[:, None]


def compute_single_position(lm: PreTrainedModel, position: Position) -> None:
    """Let the last layer of a model of a known architecture compute one position only, in eval mode.

    Args:
        lm: The model. If its attention is not `plain_attention`, or its architecture unknown, it stays as it is.
        position: Tells, while the model is called, which position.
    """
    if lm.config.model_type not in _ARCHITECTURES or lm.config._attn_implementation != NAME:
        return
    find, forward = _ARCHITECTURES[lm.config.model_type]
    layers: Any = find(decoder_of(lm))
    # OPT's own layers put all examples' tokens into one row, so that none shows whose is whose.
    others = layers[:-1] if lm.config.model_type == "opt" else []
    for layer, seen in [(layers[-1], position), *((layer, Position()) for layer in others)]:
        layer.predicts = seen
        layer.forward = MethodType(_in_eval_mode(forward), layer)


def _in_eval_mode(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a layer do `forward` in eval mode, and what it always did in training."""

    def either(self: Any, *arguments: Any, **options: Any) -> Tensor:
        return (type(self).forward if self.training else forward)(self, *arguments, **options)

    return either


def _bert(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **options: Any
) -> Tensor:
    own, here = self.attention.self, self.predicts.of(hidden_states)
    query, key, value = own.query(here), own.key(hidden_states), own.value(hidden_states)
    mixed = _attend(self.predicts, own, query, key, value, attention_mask)
    return self.feed_forward_chunk(self.attention.output(mixed, here))


def _distilbert(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    own, here = self.attention, self.predicts.of(hidden_states)
    query, key, value = own.q_lin(here), own.k_lin(hidden_states), own.v_lin(hidden_states)
    mixed = _attend(self.predicts, own, query, key, value, attention_mask)
    attended = self.sa_layer_norm(own.out_lin(mixed) + here)
    return self.output_layer_norm(self.ffn.ff_chunk(attended) + attended)


def _modernbert(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    assert position_embeddings is not None
    own, here = self.attn, self.predicts.of(hidden_states)
    # Queries, keys and values come out of one matrix, for all positions.
    query, key, value = own.Wqkv(self.attn_norm(hidden_states)).chunk(3, dim=-1)
    turned = apply_rotary_pos_emb(_heads(own, query), _heads(own, key), *position_embeddings)
    query, key = (heads.transpose(1, 2).flatten(2) for heads in turned)
    attended = here + own.Wo(_attend(self.predicts, own, self.predicts.of(query), key, value, attention_mask))
    return attended + self.mlp(self.mlp_norm(attended))


def _llama(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    assert position_embeddings is not None
    own, here, normed = self.self_attn, self.predicts.of(hidden_states), self.input_layernorm(hidden_states)
    query = _heads(own, own.q_proj(self.predicts.of(normed)))
    key, value = _heads(own, own.k_proj(normed)), _heads(own, own.v_proj(normed))
    if hasattr(own, "q_norm"):
        query, key = own.q_norm(query), own.k_norm(key)
    here_embeddings = [self.predicts.of(part.expand(len(hidden_states), -1, -1)) for part in position_embeddings]
    query, key = rotate(query, query, *here_embeddings)[0], rotate(key, key, *position_embeddings)[0]
    attended = here + own.o_proj(_mix(self.predicts, own, query, key, value, attention_mask, own.scaling))
    return attended + self.mlp(self.post_attention_layernorm(attended))


def _gpt2(
    self: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Tensor:
    own, here = self.attn, self.predicts.of(hidden_states)
    # Queries, keys and values come out of one matrix, for all positions.
    query, key, value = own.c_attn(self.ln_1(hidden_states)).chunk(3, dim=-1)
    query, key, value = (_heads(own, states) for states in (self.predicts.of(query), key, value))
    attended = here + own.c_proj(_mix(self.predicts, own, query, key, value, attention_mask, own.scaling))
    # The model gives what comes out the shape of what went in.
    return (attended + self.mlp(self.ln_2(attended))).expand(hidden_states.shape)


def _opt(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    own, here, before = self.self_attn, self.predicts.of(hidden_states), self.do_layer_norm_before
    normed = self.self_attn_layer_norm(hidden_states) if before else hidden_states
    query = own.q_proj(self.predicts.of(normed))
    mixed = _attend(self.predicts, own, query, own.k_proj(normed), own.v_proj(normed), attention_mask)
    attended = here + own.out_proj(mixed)
    if not before:
        attended = self.self_attn_layer_norm(attended)
    fed = attended + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(attended) if before else attended)))
    return fed if before else self.final_layer_norm(fed)


def _attend(
    position: Position, attention: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Attend from one position: query ``[B, 1, d]``, key and value ``[B, L, d]``; returns ``[B, 1, d]``."""
    heads = [_heads(attention, states) for states in (query, key, value)]
    return _mix(position, attention, heads[0], heads[1], heads[2], attention_mask)


def _mix(
    position: Position,
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
) -> Tensor:
    """The same of heads, ``[B, heads, 1 or L, d]``; queries may share a key."""
    return plain_attention(attention, query, key, value, position.seen_from(attention_mask), scaling)[0].flatten(2)


def _heads(attention: Any, states: Tensor) -> Tensor:
    """``[B, L, heads · d]`` as ``[B, heads, L, d]``."""
    size = attention.head_dim if hasattr(attention, "head_dim") else attention.attention_head_size
    return states.unflatten(-1, (-1, size)).transpose(1, 2)


_BERT = (lambda encoder: encoder.encoder.layer, _bert)
_LLAMA = (lambda decoder: decoder.layers, _llama)
_ARCHITECTURES: dict[str, tuple[Callable[[Any], nn.ModuleList], Callable[..., Tensor]]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": (lambda encoder: encoder.transformer.layer, _distilbert),
    "modernbert": (lambda encoder: encoder.layers, _modernbert),
    "gpt2": (lambda decoder: decoder.h, _gpt2),
    "opt": (lambda decoder: decoder.layers, _opt),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
