"""The parameters that a kernel or training counts, chosen by name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lmntk.errors import SettingError
from lmntk.models.classifier import PromptClassifier

# A parameter's name holds the number of its layer, after the name of the list of layers: encoder.layer.3.…, h.3.…
_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
# In models like BERT this includes the LayerNorm of the embeddings.
_EMBEDDINGS = re.compile(r"\.(?:\w*embed\w*|wte|wpe)\.")


@dataclass(frozen=True)
class ParameterFilter:
    """The parameters to leave out; the settings combine.

    Attributes:
        exclude_embeddings: Leave out the embeddings module: word, position and segment embeddings and their LayerNorm.
        exclude_head: Leave out everything after the encoder: the LM head with its transform, or the classifier.
        only_biases: Keep only parameters with ``bias`` in their name.
        exclude_first_layers: The number of layers to leave out, counted from the input.
        only_adapters: Keep only the parameters that peft trains with LoRA adapters, and those after the encoder.
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
    model: PromptClassifier, chosen: ParameterFilter, layers_setting: str = "exclude_first_layers"
) -> dict[str, nn.Parameter]:
    """Return the parameters that count, by name; a parameter with two names is there once.

    Args:
        model: The model that has the parameters.
        chosen: The parameters to leave out.
        layers_setting: The setting that leaves layers out, for messages.

    Raises:
        SettingError: No parameter is left, or the model has fewer layers than are to be left out.
    """
    named = dict(model.named_parameters())
    depth = 1 + max((int(match.group(1)) for match in map(_LAYER.search, named) if match), default=-1)
    if not 0 <= chosen.exclude_first_layers <= depth:
        raise SettingError(
            f"`{layers_setting}={chosen.exclude_first_layers}`: the model has {depth} layers",
            setting=layers_setting,
            value=chosen.exclude_first_layers,
        )
    selected = {name: parameter for name, parameter in named.items() if chosen.keeps(name, model)}
    if not selected:
        settings = ["apply_lora" if name == "only_adapters" else name for name, on in vars(chosen).items() if on]
        listed = " ".join(f"`{name}`" for name in settings)
        raise SettingError(f"{listed} together leave no parameter of this model; drop one of them", setting=settings)
    return selected


def layers_of(names: Iterable[str], base_prefix: str) -> dict[str, str]:
    """Return the layer of each parameter, in the order of the model: embeddings, layers, head; see `layer_of`."""
    layers = {name: layer_of(name, base_prefix) for name in names}
    ends = {"embeddings": -2, "project_in": -1, "head": 2}
    place = {name: ends.get(layer, 0 if _LAYER.search(name) else 1) for name, layer in layers.items()}
    return dict(sorted(layers.items(), key=lambda item: place[item[0]]))


def layer_of(name: str, base_prefix: str) -> str:
    """Return the layer that a parameter belongs to: ``"embeddings"``, ``"layer 0"`` …, ``"head"``.

    Other parameters of the encoder, such as those of the norm after the last layer, have their module's name.

    Args:
        name: The name of the parameter.
        base_prefix: The beginning of the names of the encoder's parameters.

    Examples:
        >>> layer_of("lm.bert.encoder.layer.3.output.dense.bias", "lm.bert.")
        'layer 3'
        >>> layer_of("lm.cls.predictions.bias", "lm.bert.")
        'head'
    """
    if not name.startswith(base_prefix):
        return "head"
    if layer := _LAYER.search(name):
        return f"layer {layer.group(1)}"
    if _EMBEDDINGS.search(name):
        return "embeddings"
    inside = name.removeprefix(base_prefix).removeprefix("encoder.").removeprefix("decoder.")
    return inside.split(".")[0]


def inside_layer(name: str) -> str | None:
    """Return the rest of a name within its numbered layer; None for a name that is not in one.

    Examples:
        >>> inside_layer("lm.bert.encoder.layer.3.output.dense")
        'output.dense'
    """
    layer = _LAYER.search(name)
    return name[layer.end() :] if layer else None


def dropout_probabilities(model: nn.Module) -> dict[str, float]:
    """Return the probabilities above 0 with which a model in training drops values.

    Args:
        model: The model.

    Returns:
        By name, sorted: those of dropout modules by the last part of their names, and those that modules keep as
        numbers, such as the `attention_dropout` of ModernBERT; the largest of equal names.

    Examples:
        >>> dropout_probabilities(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.25), nn.Dropout(0.0)))
        {'1': 0.25}
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)}
        if isinstance(module, _DropoutNd):
            own[name.rpartition(".")[2]] = float(module.p)
        for key, value in own.items():
            if value > 0:
                found[key] = max(found.get(key, 0.0), value)
    return dict(sorted(found.items()))


def count_parameters(selected: dict[str, nn.Parameter]) -> int:
    """Return the metric `grad_dim`, the number of scalars in the selected parameters."""
    return sum(parameter.numel() for parameter in selected.values())
