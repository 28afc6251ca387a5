"""Layer types whose gradients factor: one class each, in one table by the modules' exact type.

`LAYERS` maps module types to layer types, and `register` adds one. A layer type turns a module's input and output
gradients into factors, and the factors of two sides into the module's contribution to the kernel, without ever holding
a gradient over all parameters. Parameters of other modules go to the `jacobian` engine.
"""

from torch import nn

from lmntk.kernels.layers.base import Layer, Workspace
from lmntk.kernels.layers.embedding import EmbeddingLayer
from lmntk.kernels.layers.linear import LinearLayer
from lmntk.kernels.layers.norm import LayerNormLayer, RMSNormLayer

LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Embedding: EmbeddingLayer,
    nn.LayerNorm: LayerNormLayer,
    nn.RMSNorm: RMSNormLayer,
}


def register(module_type: type[nn.Module], layer: type[Layer]) -> None:
    """Use `layer` for modules whose type is exactly `module_type`, not a subclass."""
    LAYERS[module_type] = layer


__all__ = [
    "LAYERS",
    "EmbeddingLayer",
    "Layer",
    "LayerNormLayer",
    "LinearLayer",
    "RMSNormLayer",
    "Workspace",
    "register",
]
