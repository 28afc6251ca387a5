"""The part of a kernel that each parameter contributes to: its layer, its kind, weight or bias."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lmntk.models.classifier import PromptClassifier
from lmntk.models.lora import is_adapter
from lmntk.models.parameters import inside_layer, layers_of
from lmntk.storage.part_names import KINDS, join_part_name

# Names of modules in the attention, over all architectures of transformers that the project tries.
_PROJECTIONS = {
    "query-key-value": r"Wqkv|c_attn|qkv(_proj)?|query_key_value|in_proj",
    "query": r"query(_proj|_global)?|q|q_lin|q_proj|q_head|w?2?[ew]2[ew]_query|[Ww]q|project_q|q_[ab]_proj",
    "key": r"key(_proj|_global)?|k|k_lin|k_proj|k_head|[Ww]k|project_k",
    "value": r"value(_proj|_global)?|v|v_lin|v_proj|v_head|[Ww]v|project_v",
    "output": r"o|o_proj|out_proj|out_lin|c_proj|Wo|dense|proj|post_proj|attention_out|output",
}
_ATTENTION = re.compile(r"attn|att(ention)?(_|\b)")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|expert|\bff\b|\bintermediate\b|\bfc\d|\blin\d|^output\.dense$")
_OWN_BIASES = {"q_bias": "query", "k_bias": "key", "v_bias": "value"}
"""Biases that a module of the attention holds apart from its projections, as in DeBERTa."""
# ALBERT's layers are shared, so that the number in their names is not that of a layer.
_SHARED_LAYER = re.compile(r"\.albert_layers\.\d+\.")
_NORM = re.compile(r"norm|^ln_", re.IGNORECASE)


def parts_of(names: Iterable[str], model: PromptClassifier, keys: Sequence[str]) -> dict[str, str]:
    """Return the part of each parameter, in the order of the parts: from the input to the head.

    Args:
        names: The names of the parameters.
        model: The model that has them.
        keys: Those of `lmntk.storage.part_names.PART_KEYS` that parameters are told apart by.

    Returns:
        Part by parameter; with the key ``"layer"`` alone, parts are called as in `layers_of`.
    """
    layers = layers_of(names, model.base_prefix)
    if tuple(keys) == ("layer",):
        return layers
    order = {layer: place for place, layer in enumerate(dict.fromkeys(layers.values()))}
    values = {
        name: {"layer": layer, "kind": kind_of(name, model), "weight-or-bias": _weight_or_bias(name)}
        for name, layer in layers.items()
    }

    def place(name: str) -> tuple[int, ...]:
        own = values[name]
        places = order[own["layer"]], KINDS.index(own["kind"]), int(own["weight-or-bias"] == "bias")
        return tuple(number for key, number in zip(own, places, strict=True) if key in keys)

    return {name: join_part_name([values[name][key] for key in keys]) for name in sorted(values, key=place)}


def describe_parts(
    part_of: Mapping[str, str], sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return what a kernel's description says of its parts.

    Args:
        part_of: The part of each parameter, from `parts_of`.
        sizes: The scalars in each parameter.
        shapes: d_out and d_in of each weight that an adapter could be put on.

    Returns:
        ``"parameters"``: the scalars in each part; ``"matrices"``: d_out and d_in of each weight in the parts that hold
        nothing else, for the expectation of the kernel of adapters on them.
    """
    members: dict[str, list[str]] = {}
    for name, part in part_of.items():
        members.setdefault(part, []).append(name)
    return {
        "parameters": {part: sum(sizes[name] for name in names) for part, names in members.items()},
        "matrices": {
            part: [list(shapes[name]) for name in names]
            for part, names in members.items()
            if all(name in shapes for name in names)
        },
    }


def kind_of(name: str, model: PromptClassifier) -> str:
    """Return the kind of a parameter, one of `lmntk.storage.part_names.KINDS`.

    All that comes after the encoder is the head. ``"query-key-value"`` is one matrix of all three, as in GPT-2 and
    ModernBERT. ``"other"`` is what no name or type tells: adapters, convolutions, gates, projections of embeddings.

    Args:
        name: The name of the parameter.
        model: The model that has it.
    """
    if not name.startswith(model.base_prefix):
        return "head"
    prefix, _, own = name.rpartition(".")
    module = model.get_submodule(prefix)
    if is_adapter(name):
        return "other"
    if _NORM.search(type(module).__name__) or _NORM.search(prefix.rpartition(".")[2]):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    within = inside_layer(prefix)
    if within is None and (shared := _SHARED_LAYER.search(prefix)):
        within = prefix[shared.end() :]
    if within is not None and own in _OWN_BIASES and _ATTENTION.search(within):
        return _OWN_BIASES[own]
    if within is not None and getattr(module, own).dim() == 3 and _FEED_FORWARD.search(within):
        return "feed-forward"  # the matrices of several experts in one
    weight = getattr(module, "weight", None)
    if within is None or weight is None or weight.dim() != 2 or own not in ("weight", "bias"):
        return "other"
    *outer, last = within.split(".")
    if last == "linear" or last == "base_layer":
        *outer, last = outer
    if _ATTENTION.search(".".join(outer)):
        return next((kind for kind, pattern in _PROJECTIONS.items() if re.fullmatch(pattern, last)), "other")
    return "feed-forward" if _FEED_FORWARD.search(within) else "other"


def _weight_or_bias(name: str) -> str:
    """Return ``"bias"`` for the parameters that the setting `only_biases` keeps."""
    return "bias" if "bias" in name else "weight"
