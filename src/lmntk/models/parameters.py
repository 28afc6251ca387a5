"""Which parameters count: the one place that filters them by name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lmntk.errors import UsageError
from lmntk.models.classifier import PromptClassifier

# A layer's parameters carry its number behind the name of the list that holds it: encoder.layer.3.…, layers.3.…, h.3.…
_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
# Names of embeddings in the families supported; BERT-like models keep the embeddings' LayerNorm under the same roof.
_EMBEDDINGS = re.compile(r"\.(?:\w*embed\w*|wte|wpe)\.")


@dataclass(frozen=True)
class ParameterFilter:
    """What the user leaves out; several at once combine.

    Attributes:
        exclude_embeddings: Leave out the embeddings module: word, position and segment embeddings and their LayerNorm.
        exclude_head: Leave out everything behind the encoder: the LM head with its transform, or the classifier.
        only_biases: Keep parameters whose name says ``bias``.
        exclude_first_layers: Leave out that many layers, counted from the input.
        only_adapters: Keep what peft trains with LoRA adapters, and what lies behind the encoder.
    """

    exclude_embeddings: bool = False
    exclude_head: bool = False
    only_biases: bool = False
    exclude_first_layers: int = 0
    only_adapters: bool = False

    def keeps(self, name: str, model: PromptClassifier) -> bool:
        """Whether the parameter `name` of a model counts."""
        in_base = name.startswith(model.base_prefix)
        layer = _LAYER.search(name)
        return not (
            (self.exclude_embeddings and in_base and layer is None and _EMBEDDINGS.search(name))
            or (self.exclude_head and not in_base)
            or (self.only_biases and "bias" not in name)
            or (self.only_adapters and in_base and name not in model.trained)
            or (layer is not None and int(layer.group(1)) < self.exclude_first_layers)
        )


def select_parameters(
    model: PromptClassifier, chosen: ParameterFilter, layers_flag: str = "--exclude_first_layers"
) -> dict[str, nn.Parameter]:
    """Return the parameters that count, by name; one that has two names is there once.

    Args:
        model: The model.
        chosen: What is left out.
        layers_flag: The flag that leaves layers out, for messages.

    Raises:
        UsageError: None is left, or the model has fewer layers than are to be left out.
    """
    named = dict(model.named_parameters())
    depth = 1 + max((int(match.group(1)) for match in map(_LAYER.search, named) if match), default=-1)
    if not 0 <= chosen.exclude_first_layers <= depth:
        raise UsageError(f"{layers_flag} {chosen.exclude_first_layers}: the model has {depth} layers")
    selected = {name: parameter for name, parameter in named.items() if chosen.keeps(name, model)}
    if not selected:
        flags = ["--apply_lora" if flag == "only_adapters" else f"--{flag}" for flag, on in vars(chosen).items() if on]
        raise UsageError(f"{' '.join(flags)} together leave no parameter of this model; drop one of them")
    return selected


def layers_of(names: Iterable[str], base_prefix: str) -> dict[str, str]:
    """Return the layer of each parameter, from the embeddings through the layers to the head; see `layer_of`."""
    layers = {name: layer_of(name, base_prefix) for name in names}
    ends = {"embeddings": -2, "project_in": -1, "head": 2}
    place = {name: ends.get(layer, 0 if _LAYER.search(name) else 1) for name, layer in layers.items()}
    return dict(sorted(layers.items(), key=lambda item: place[item[0]]))


def layer_of(name: str, base_prefix: str) -> str:
    """Return which layer a parameter belongs to: ``"embeddings"``, ``"layer 0"`` …, ``"head"``.

    What lies in the encoder beside these, such as the norm behind the last layer, goes by its module's own name.

    Args:
        name: The parameter's name.
        base_prefix: What the names of the encoder's parameters begin with.
    """
    if not name.startswith(base_prefix):
        return "head"
    if layer := _LAYER.search(name):
        return f"layer {layer.group(1)}"
    if _EMBEDDINGS.search(name):
        return "embeddings"
    inside = name.removeprefix(base_prefix).removeprefix("encoder.").removeprefix("decoder.")
    return inside.split(".")[0]


def count_parameters(selected: dict[str, nn.Parameter]) -> int:
    """Return the metric `grad_dim`: how many numbers the selected parameters hold."""
    return sum(parameter.numel() for parameter in selected.values())
