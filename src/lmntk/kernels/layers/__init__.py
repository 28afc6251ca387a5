"""Layer types whose gradients factor: one class each, in one table by exact type.

`LAYERS` says which class knows a module; `register` adds a type. Parameters of modules that are not in it go to the
`jacobian` engine. A class turns what went into a module and the gradients at what came out into factors, and two
sides' factors into their part of the kernel, without a gradient over all parameters ever being held.
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
    """Let `layer` stand for modules whose type is exactly `module_type`."""
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
