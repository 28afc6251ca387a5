"""How the gradients of each type of layer are projected to the columns of features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels.contraction import summation_dtype
from lmntk.kernels.engines.layer_selection import parameters_of
from lmntk.kernels.layers import EmbeddingLayer, Layer, LayerNormLayer, LinearLayer
from lmntk.kernels.layers.linear_factors import OuterProducts
from lmntk.kernels.layers.token_matching import TokenGradients
from lmntk.kernels.projection import Projection, Side, projected


class Buckets:
    """A random matrix S, ``[size, count]``, with one entry in each row, +1 or −1.

    E S Sᵀ = I because signs are independent, whichever column a row has its entry in.

    Args:
        bucket: The column of each row's entry, ``[size]``.
        count: The number of columns.
        generator: Draws the signs.
    """

    def __init__(self, bucket: Tensor, count: int, generator: torch.Generator) -> None:
        self.count = count
        self.bucket = bucket
        self.sign = (torch.randint(2, bucket.shape, generator=generator) * 2 - 1).to(bucket.device)

    @classmethod
    def of_rows(cls, projection: Projection, name: str, size: int, count: int) -> "Buckets":
        """Spread the rows of an embedding: neighbours, such as positions or segments, never share a bucket."""
        return cls(torch.arange(size) % count, count, projection.generator(f"rows/{name}"))

    @classmethod
    def of_columns(cls, projection: Projection, size: int, count: int) -> "Buckets":
        """Spread the columns of features at random."""
        generator = projection.generator("columns")
        return cls(torch.randint(count, (size,), generator=generator), count, generator)

    def to(self, device: torch.device) -> "Buckets":
        """Move the matrix to a device; returns itself."""
        self.bucket, self.sign = self.bucket.to(device), self.sign.to(device)
        return self

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix, ``[..., count]``, for indices ``[...]``; a negative one gives zeros."""
        known = indices.clamp(min=0)
        found = torch.zeros(*indices.shape, self.count, dtype=dtype, device=indices.device)
        signs = self.sign[known] * (indices >= 0)
        return found.scatter_(-1, self.bucket[known][..., None], signs[..., None].to(dtype))

    def sums(self, values: Tensor) -> Tensor:
        """Return ``[..., count]`` of values ``[..., size]``."""
        found = values.new_zeros(*values.shape[:-1], self.count)
        return found.index_add_(-1, self.bucket, values * self.sign.to(values.dtype))


VECTOR_FACTOR = 4
"""A vector keeps four times the width at most: most of a model's vectors are small parts of its kernel."""

WIDE_FACTOR = 2
"""Embeddings, and weights at a single position, keep twice the width of a side: few parameters, most of a kernel."""


def kept_sides(width: int, rows: int, columns: int) -> tuple[int, int]:
    """Return how many rows and columns are left of a gradient: k · k numbers at most, all if there are no more.

    A side that is shorter than k stays whole, and the other one keeps the more: two rows of 128 numbers are worth
    keeping whole, and their kernel may be half of all.

    >>> kept_sides(16, 384, 1536), kept_sides(16, 2, 384), kept_sides(16, 2, 128), kept_sides(16, 1, 384)
    ((16, 16), (2, 128), (2, 128), (1, 256))
    """
    most = width**2
    if rows * columns <= most:
        return rows, columns
    if min(rows, columns) > width:
        return width, width
    return (rows, most // rows) if rows < columns else (most // columns, columns)


class Sides:
    """The projection of gradients ``[rows, columns]`` of both sides.

    Args:
        projection: The seed.
        name: What the matrices are drawn for.
        shape: The rows and columns of a gradient.
        kept: How many are left of them, none of which is more.
        like: A parameter of the model, for dtype and device.
    """

    def __init__(
        self, projection: Projection, name: str, shape: tuple[int, int], kept: tuple[int, int], like: Tensor
    ) -> None:
        self.shape = shape
        self.size = kept[0] * kept[1]
        self.left, self.right = (
            None if matrix is None else matrix.to(like.device, summation_dtype(like.dtype))
            for matrix in (
                Projection(width, projection.seed).matrix(name, side, size)
                for width, side, size in zip(kept, Side, shape, strict=True)
            )
        )

    @classmethod
    def of_vector(cls, projection: Projection, name: str, size: int, like: Tensor) -> "Sides":
        """Return the projection of a vector, a gradient of one row."""
        return cls(projection, name, (1, size), (1, min(size, VECTOR_FACTOR * projection.width)), like)

    def of_factors(self, outputs: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Return ``[B, C, size]`` of output gradients, ``[B, L, rows]`` a logit, and inputs, ``[B, L, columns]``."""
        right = projected(inputs, self.right)
        return torch.stack([(projected(g, self.left).transpose(1, 2) @ right).flatten(1) for g in outputs], dim=1)

    def of_gradients(self, gradients: Tensor) -> Tensor:
        """Return ``[..., size]`` of gradients, ``[..., rows, columns]``."""
        half = projected(gradients, self.right).transpose(-1, -2)
        return projected(half, self.left).transpose(-1, -2).flatten(-2)

    def of_vectors(self, gradients: Tensor) -> Tensor:
        """Return ``[..., size]`` of gradients, ``[..., columns]``, of one row."""
        return projected(gradients, self.right)


@dataclass(frozen=True)
class ParameterColumns:
    """How the gradients of a parameter become columns.

    Attributes:
        size: The number of columns.
        of_gradients: Returns the columns, ``[B, C, size]``, of whole gradients, ``[B, C, *shape]``.
        of_factors: Returns the same of a layer's factors; None for a parameter that no layer type knows.
    """

    size: int
    of_gradients: Callable[[Tensor], Tensor]
    of_factors: Callable[[Any], Tensor] | None = None


Columns = Mapping[str, ParameterColumns]
"""The columns of a layer's parameters, by the parameters' names."""


KNOWN = (LinearLayer, EmbeddingLayer, LayerNormLayer)
"""The layer types whose factors can be projected; the gradients of others are formed."""


def columns_of(layer: Layer, prefix: str, factors: object, used: int, projection: Projection, like: Tensor) -> Columns:
    """Return how the gradients of a layer's parameters are projected.

    Args:
        layer: A layer of one of the types `KNOWN`.
        prefix: Its name.
        factors: Its factors of a typical example.
        used: Of an embedding, how many rows some examples use.
        projection: The width and the seed.
        like: A parameter of the model, for dtype and device.
    """
    names = dict(zip(sorted(layer.parameter_names), parameters_of(prefix, layer), strict=True))
    if isinstance(layer, LinearLayer):
        assert isinstance(factors, OuterProducts)
        return _linear_columns(layer, names, prefix, factors, projection, like)
    if isinstance(layer, EmbeddingLayer):
        return _embedding_columns(layer, names["weight"], used, projection, like)
    return _norm_columns(layer, names, projection, like)


def columns_of_gradients(name: str, shape: torch.Size, projection: Projection, like: Tensor) -> ParameterColumns:
    """Return how the gradients of a parameter that no layer type knows are projected: those of a matrix, or a vector.

    Args:
        name: The parameter.
        shape: Its shape; of more than two axes the first one counts as rows, the others as columns.
        projection: The width and the seed.
        like: A parameter of the model, for dtype and device.
    """
    if len(shape) < 2:
        return _vector_columns(name, shape.numel(), projection, like)
    rows, columns = shape[0], shape[1:].numel()
    sides = Sides(projection, name, (rows, columns), kept_sides(projection.width, rows, columns), like)
    return ParameterColumns(sides.size, lambda g: sides.of_gradients(g.reshape(*g.shape[:2], rows, columns)))


def _linear_columns(
    layer: LinearLayer,
    names: Mapping[str, str],
    prefix: str,
    typical: OuterProducts,
    projection: Projection,
    like: Tensor,
) -> Columns:
    columns: dict[str, ParameterColumns] = {}
    if "weight" in names:
        assert typical.inputs is not None
        shape = typical.out_features, typical.inputs.shape[2]
        width = projection.width if typical.positions > 1 else WIDE_FACTOR * projection.width
        weight = Sides(projection, prefix, shape, kept_sides(width, *shape), like)
        columns[names["weight"]] = ParameterColumns(
            weight.size,
            lambda gradients: weight.of_gradients(layer.as_matrices(gradients)),
            lambda factors: weight.of_factors(factors.gradients, factors.inputs),
        )
    if "bias" in names:
        assert typical.biases is not None
        size = typical.biases.shape[2]
        columns[names["bias"]] = _vector_columns(names["bias"], size, projection, like, lambda factors: factors.biases)
    return columns


def _norm_columns(layer: Layer, names: Mapping[str, str], projection: Projection, like: Tensor) -> Columns:
    columns: dict[str, ParameterColumns] = {}
    start = 0
    for local in (local for local in ("weight", "bias") if local in names):  # the order of a norm's factors
        size = layer.module.get_parameter(local).numel()
        columns[names[local]] = _vector_columns(names[local], size, projection, like, _taking(start, start + size))
        start += size
    return columns


def _taking(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda factors: factors[:, :, start:stop]


def _vector_columns(
    name: str, size: int, projection: Projection, like: Tensor, select: Callable[[Any], Tensor] | None = None
) -> ParameterColumns:
    """Return the projection of a vector; `select` returns its gradients, ``[B, C, size]``, from a layer's factors."""
    vector = Sides.of_vector(projection, name, size, like)
    return ParameterColumns(
        vector.size,
        lambda gradients: vector.of_vectors(gradients.flatten(2)),
        None if select is None else lambda factors: vector.of_vectors(select(factors)),
    )


def _embedding_columns(layer: Layer, name: str, used: int, projection: Projection, like: Tensor) -> Columns:
    rows, width = layer.module.get_parameter("weight").shape
    # Of a table of segments most texts use one row: unless all fit, what matters is how many are used.
    own = WIDE_FACTOR * projection.width
    count, kept = kept_sides(own, rows if rows * width <= own**2 else max(1, used), width)
    matrix = Projection(kept, projection.seed).matrix(name, Side.INPUT, width)
    right = None if matrix is None else matrix.to(like.device, summation_dtype(like.dtype))
    buckets = Buckets.of_rows(projection, name, rows, count).to(like.device)

    def of_factors(factors: TokenGradients) -> Tensor:
        values = projected(factors.gradients, right)  # [B, L, C, kept]
        left = buckets.rows(factors.token, values.dtype)
        product = left.transpose(1, 2) @ values.flatten(2)  # [B, count, C · kept]
        return product.unflatten(2, values.shape[2:]).transpose(1, 2).flatten(2)

    def of_gradients(gradients: Tensor) -> Tensor:
        values = projected(gradients, right).transpose(2, 3)  # [B, C, kept, rows]
        return buckets.sums(values).transpose(2, 3).flatten(2)

    return {name: ParameterColumns(count * kept, of_gradients, of_factors)}
