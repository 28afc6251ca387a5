"""Models computed at the one position of each sequence that predicts.

No layer after the last attention mixes positions, so the last layer needs keys and values of all positions, but its
query, and everything after it, of one. The logits are the same, and the layer's work, forward and backward, shrinks to
about a sixth (less in ModernBERT and GPT-2, where one matrix gives queries and keys). In training the last layer stays
as transformers has it, so that dropout draws the same random numbers.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from lmntk.models.attention import NAME, plain_attention
from lmntk.models.families import decoder_of


class Position:
    """The position of each sequence that predicts; without indices, all positions.

    Args:
        indices: int64 ``[B]``.
    """

    def __init__(self, indices: Tensor | None = None) -> None:
        self._indices = indices

    def select(self, states: Tensor) -> Tensor:
        """Narrow states ``[B, L, d]`` to ``[B, 1, d]``; states of one position stay as they are."""
        if self._indices is None or states.shape[1] == 1:
            return states
        return states.gather(1, self._indices.view(-1, 1, 1).expand(-1, 1, states.shape[2]))

    def mask_row(self, attention_mask: Tensor | None) -> Tensor | None:
        """Narrow a mask ``[B or 1, 1, L, L]`` to the row of the position, ``[B, 1, 1, L]``."""
        if attention_mask is None or self._indices is None:
            return attention_mask
        return self.select(attention_mask[:, 0].expand(len(self._indices), -1, -1))[:, None]


class SinglePosition:
    """Lets a model compute one position while `at` is entered; outside of it the model is as transformers has it.

    Args:
        lm: The model.

    Attributes:
        layers: The layers with another forward pass while `at` is entered: the last one, of an architecture that is
            known here and has `plain_attention`, and OPT's others.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self._encoder = decoder_of(lm)
        self.layers: list[Any] = []
        if lm.config.model_type in _ARCHITECTURES and lm.config._attn_implementation == NAME:
            find, self._forward = _ARCHITECTURES[lm.config.model_type]
            layers = list(find(self._encoder))
            # OPT's layers flatten the examples of a batch into one; each needs a forward pass that keeps them apart.
            self.layers = layers if lm.config.model_type == "opt" else layers[-1:]

    @contextlib.contextmanager
    def at(self, indices: Tensor) -> Iterator[None]:
        """Narrow the encoder's last hidden state ``[B, L, d]`` to ``[B, 1, d]`` while this is entered.

        Args:
            indices: The position of each sequence, int64 ``[B]``.
        """
        position = Position(indices)

        def narrow(module: object, args: object, output: Any) -> Any:
            output["last_hidden_state"] = position.select(output[0])
            return output

        handle = self._encoder.register_forward_hook(narrow)
        # A layer may have a `forward` of its own already, set by another library.
        replaced = [(layer, vars(layer).get("forward")) for layer in self.layers if not layer.training]
        for layer, _ in replaced:
            at = position if layer is self.layers[-1] else Position()
            layer.forward = partial(self._forward, layer, at)
        try:
            yield
        finally:
            handle.remove()
            for layer, own in replaced:
                del layer.forward
                if own is not None:
                    layer.forward = own


def _bert(
    layer: Any,
    position: Position,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Tensor:
    own, here = layer.attention.self, position.select(hidden_states)
    query, key, value = own.query(here), own.key(hidden_states), own.value(hidden_states)
    mixed = _attend(position, own, query, key, value, attention_mask)
    return layer.feed_forward_chunk(layer.attention.output(mixed, here))


def _distilbert(
    layer: Any, position: Position, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Tensor:
    own, here = layer.attention, position.select(hidden_states)
    query, key, value = own.q_lin(here), own.k_lin(hidden_states), own.v_lin(hidden_states)
    mixed = _attend(position, own, query, key, value, attention_mask)
    attended = layer.sa_layer_norm(own.out_lin(mixed) + here)
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


def _modernbert(
    layer: Any,
    position: Position,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    assert position_embeddings is not None
    own, here = layer.attn, position.select(hidden_states)
    # One matrix gives queries, keys and values, of all positions.
    query, key, value = own.Wqkv(layer.attn_norm(hidden_states)).chunk(3, dim=-1)
    turned = apply_rotary_pos_emb(_heads(own, query), _heads(own, key), *position_embeddings)
    query, key = (heads.transpose(1, 2).flatten(2) for heads in turned)
    attended = here + own.Wo(_attend(position, own, position.select(query), key, value, attention_mask))
    return attended + layer.mlp(layer.mlp_norm(attended))


def _llama(
    layer: Any,
    position: Position,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    assert position_embeddings is not None
    own, here, normed = layer.self_attn, position.select(hidden_states), layer.input_layernorm(hidden_states)
    query = _heads(own, own.q_proj(position.select(normed)))
    key, value = _heads(own, own.k_proj(normed)), _heads(own, own.v_proj(normed))
    if hasattr(own, "q_norm"):
        query, key = own.q_norm(query), own.k_norm(key)
    here_embeddings = [position.select(part.expand(len(hidden_states), -1, -1)) for part in position_embeddings]
    query, key = rotate(query, query, *here_embeddings)[0], rotate(key, key, *position_embeddings)[0]
    attended = here + own.o_proj(_mix(position, own, query, key, value, attention_mask, own.scaling))
    return attended + layer.mlp(layer.post_attention_layernorm(attended))


def _gpt2(
    layer: Any,
    position: Position,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Tensor:
    own, here = layer.attn, position.select(hidden_states)
    # One matrix gives queries, keys and values, of all positions.
    query, key, value = own.c_attn(layer.ln_1(hidden_states)).chunk(3, dim=-1)
    query, key, value = (_heads(own, states) for states in (position.select(query), key, value))
    attended = here + own.c_proj(_mix(position, own, query, key, value, attention_mask, own.scaling))
    # GPT-2 reshapes the layer's output to the shape of its input.
    return (attended + layer.mlp(layer.ln_2(attended))).expand(hidden_states.shape)


def _opt(
    layer: Any, position: Position, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Tensor:
    own, here, before = layer.self_attn, position.select(hidden_states), layer.do_layer_norm_before
    normed = layer.self_attn_layer_norm(hidden_states) if before else hidden_states
    query = own.q_proj(position.select(normed))
    mixed = _attend(position, own, query, own.k_proj(normed), own.v_proj(normed), attention_mask)
    attended = here + own.out_proj(mixed)
    if not before:
        attended = layer.self_attn_layer_norm(attended)
    fed = attended + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(attended) if before else attended)))
    return fed if before else layer.final_layer_norm(fed)


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
    """Attend from one position: heads ``[B, heads, 1 or L, d]`` to ``[B, 1, heads · d]``; queries may share keys."""
    return plain_attention(attention, query, key, value, position.mask_row(attention_mask), scaling)[0].flatten(2)


def _heads(attention: Any, states: Tensor) -> Tensor:
    """Reshape ``[B, L, heads · d]`` to ``[B, heads, L, d]``."""
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
