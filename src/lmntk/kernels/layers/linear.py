"""Linear layers: the gradient of a weight is a sum of outer products, G_cᵀA, and is formed for a moment at most.

The inner product of two gradients does not depend on the layout of the weight, so that GPT-2's `Conv1D`, which stores
it transposed, and decoders of some rows only are linear layers like any other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels.contraction import contract_each
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Cost, Gradients, Layer, Workspace, stack_vectors, vector_kernel, with_positions
from lmntk.kernels.layers.linear_dense import dense, dense_buffer_numel
from lmntk.kernels.layers.linear_diagonal import weight_diagonal
from lmntk.kernels.layers.linear_factors import OuterProducts, shape_of, storage_key
from lmntk.kernels.layers.linear_gram import gram_flops, gram_parts
from lmntk.kernels.layers.linear_signs import WeightSigns, sign_bytes, sign_kernel
from lmntk.kernels.tuning import Tuning


class LinearLayer(Layer):
    """``y = x Wᵀ + b``."""

    separable = True

    @staticmethod
    def as_matrices(gradients: Tensor) -> Tensor:
        """Return gradients of the module's weight as ``[..., d_out, d_in]``, whatever the layout of the weight."""
        return gradients

    def factors(self, inputs: Tensor, gradients: Gradients) -> OuterProducts:
        """Keep inputs and output gradients for the weight, and the whole gradient of the bias."""
        gradients = [with_positions(gradient) for gradient in gradients]
        biases = stack_vectors(gradients) if "bias" in self.parameter_names else None
        if "weight" not in self.parameter_names:
            return OuterProducts(None, [gradient[:, :0] for gradient in gradients], biases)
        return OuterProducts(with_positions(inputs), gradients, biases)

    def cost(self, factors: OuterProducts, train: int, x: int, signed: bool) -> Cost:
        """Return the cost of the cheaper path; a single outer product or the bias alone costs nothing."""
        if factors.inputs is None or factors.positions <= 1:
            return Cost()
        c, _, d_out, d_in = shape_of([factors])
        per_pair = gram_flops(c, d_out, d_in, self.tuning)
        positions, pairs = (train + x) * factors.positions, train * x * factors.positions**2
        dense_cost = _dense_flops(c, d_out, d_in, positions, train * x)
        if not signed and _gram_is_faster(pairs * per_pair, dense_cost, self.tuning):
            return Cost(gram_flops_per_position_pair=per_pair)
        return Cost(dense_numel=d_out * d_in)

    def buffer(self, factors: OuterProducts, train: int) -> int:
        """Return the size of the gradients that are formed together; 0 if none are."""
        if factors.inputs is None or factors.positions <= 1:
            return 0
        c, _, d_out, d_in = shape_of([factors])
        return dense_buffer_numel(c * train, d_out, d_in, factors.product_size, self.tuning)

    def sign_bytes(self, factors: OuterProducts) -> int:
        """Return the bytes of the planes of bits; the sign of a single outer product has factors."""
        return 0 if factors.inputs is None or factors.positions <= 1 else sign_bytes(factors)

    def signs(self, factors: OuterProducts | WeightSigns, workspace: Workspace) -> OuterProducts | WeightSigns:
        """Form the gradients and keep their signs; signs stay as they are."""
        if isinstance(factors, WeightSigns) or not self.sign_bytes(factors):
            return factors
        return WeightSigns.of(factors, workspace, self.tuning)

    def join_signs(
        self, batches: Sequence[OuterProducts | WeightSigns], workspace: Workspace
    ) -> Sequence[OuterProducts | WeightSigns]:
        """Return one batch of signs if there are any, else the factors."""
        if any(isinstance(batch, WeightSigns) for batch in batches):
            return [WeightSigns.join(batches, workspace, self.tuning)]
        return batches

    def kernel(
        self,
        train: Sequence[OuterProducts | WeightSigns],
        x: Sequence[OuterProducts | WeightSigns],
        directions: Sequence[SignPlacement],
        workspace: Workspace,
    ) -> Tensor:
        """Multiply through Gram matrices or dense gradients, whichever costs less: float64 ``[D, n, C, x, C]``.

        Where signs were taken already they are counted, and all directions take them on both sides.
        """
        of_train, of_x = _without_signs(train), _without_signs(x)
        if of_train is not None and of_x is not None:
            return shared_input_kernel([LinearPair(self, of_train, of_x)], directions, workspace)
        product = sign_kernel(train, x, workspace, self.tuning)
        if "bias" in self.parameter_names:
            product += vector_kernel(_biases(train), _biases(x), directions[:1])[0]
        return product.expand(len(directions), *product.shape)

    def kernel_parts(
        self,
        train: Sequence[OuterProducts | WeightSigns],
        x: Sequence[OuterProducts | WeightSigns],
        directions: Sequence[SignPlacement],
        workspace: Workspace,
    ) -> dict[str, Tensor]:
        """Multiply the gradients of the weight, and those of the bias: float64 ``[D, n, C, x, C]`` each."""
        of_train, of_x = _without_signs(train), _without_signs(x)
        if of_train is not None and of_x is not None:
            apart = {name: name for name in self.parameter_names}
            return shared_input_parts([LinearPair(self, of_train, of_x)], [apart], directions, workspace)
        product = sign_kernel(train, x, workspace, self.tuning)
        found = {"weight": product.expand(len(directions), *product.shape)}
        if "bias" in self.parameter_names:
            found["bias"] = vector_kernel(_biases(train), _biases(x), directions)
        return found

    def diagonal(
        self, x: Sequence[OuterProducts | WeightSigns], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> Tensor:
        """Multiply each example's gradients through its own Gram matrices or formed: float64 ``[D, x, C, C]``."""
        found = []
        if "weight" in self.parameter_names:
            found.append(weight_diagonal(x, directions, workspace, self.tuning))
        if "bias" in self.parameter_names:
            found.append(contract_each(torch.cat(_biases(x)), directions))
        return sum(found[1:], start=found[0])


@dataclass(frozen=True)
class LinearPair:
    """A linear layer's factors on both sides of a tile.

    Attributes:
        layer: The layer.
        train: The factors of the train tile's batches.
        x: The same for the X tile.
    """

    layer: LinearLayer
    train: Sequence[OuterProducts]
    x: Sequence[OuterProducts]


def shared_input_kernel(
    members: Sequence[LinearPair], directions: Sequence[SignPlacement], workspace: Workspace
) -> Tensor:
    """Return the sum of the contributions of layers that share their inputs, as queries, keys and values do.

    Args:
        members: The layers' factors; several layers all have their weights among their parameters.
        directions: Which side takes the sign, for each of the D results.
        workspace: Buffers that are overwritten.

    Returns:
        float64 ``[D, n, C, x, C]``.
    """
    together = [dict.fromkeys(member.layer.parameter_names, "all") for member in members]
    return shared_input_parts(members, together, directions, workspace)["all"]


def shared_input_parts(
    members: Sequence[LinearPair],
    parts: Sequence[Mapping[str, str]],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
) -> dict[str, Tensor]:
    """Return the contributions of layers that share their inputs, summed part by part.

    Args:
        members: As for `shared_input_kernel`.
        parts: The part that the weight, and the bias, of each member belongs to.
        directions: As for `shared_input_kernel`.
        workspace: As for `shared_input_kernel`.

    Returns:
        float64 ``[D, n, C, x, C]`` by part.
    """
    terms = [
        (part["bias"], vector_kernel(_biases(member.train), _biases(member.x), directions))
        for member, part in zip(members, parts, strict=True)
        if "bias" in member.layer.parameter_names
    ]
    if "weight" in members[0].layer.parameter_names:
        train, x, tuning = members[0].train, members[0].x, members[0].layer.tuning
        of_weights = [part["weight"] for part in parts]
        # The sign of a sum has no factors, that of a single outer product has.
        factored = all(batch.positions == 1 for batch in (*train, *x)) or not any(way.signed for way in directions)
        products: Iterable[tuple[str, Tensor]]
        if factored and _gram_is_faster(*_flops(members, len({*of_weights})), tuning):
            names = list(dict.fromkeys(of_weights))
            chosen = [[place for place, part in enumerate(of_weights) if part == name] for name in names]
            with workspace.timer.stage("factors alone"):
                trains, xs = [member.train for member in members], [member.x for member in members]
                products = zip(names, gram_parts(trains, xs, chosen, directions, workspace, tuning), strict=True)
        else:
            dense_products = [dense(member.train, member.x, directions, workspace, tuning) for member in members]
            products = zip(of_weights, dense_products, strict=True)
        # [D, C, n, C, x] -> [D, n, C, x, C]
        terms += [(part, product.permute(0, 2, 1, 4, 3)) for part, product in products]
    sums: dict[str, Tensor] = {}
    for part, values in terms:
        sums[part] = sums[part] + values if part in sums else values
    return sums


def group_by_shared_input(
    layers: Mapping[str, Layer], train: Mapping[str, Sequence[Any]], x: Mapping[str, Sequence[Any]]
) -> list[list[str]]:
    """Group linear layers by their inputs, in the order of `layers`; layers without them are alone in their groups.

    Args:
        layers: The layers by name.
        train: The factors of the train tile's batches in each of them.
        x: The factors of the X tile's batches in each of them.
    """
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        key: object = name
        if isinstance(layer, LinearLayer) and "weight" in layer.parameter_names:
            batches = (*train[name], *x[name])
            if all(isinstance(batch, OuterProducts) for batch in batches):
                key = tuple((storage_key(batch.inputs), batch.positions) for batch in batches)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _biases(factors: Sequence[OuterProducts | WeightSigns]) -> list[Tensor]:
    return [factor.biases for factor in factors if factor.biases is not None]


def _without_signs(batches: Sequence[OuterProducts | WeightSigns]) -> list[OuterProducts] | None:
    """Return the factors of batches; None if some are signs already."""
    found = [batch for batch in batches if isinstance(batch, OuterProducts)]
    return found if len(found) == len(batches) else None


def _flops(members: Sequence[LinearPair], num_parts: int) -> tuple[float, float]:
    """Return the flops of the Gram path, which sums some parts apart, and of the dense path."""
    train, x = members[0].train, members[0].x
    c, n, _, d_in = shape_of(train)
    widths = [shape_of(member.train)[2] for member in members]
    positions = [sum(factor.batch_size * factor.positions for factor in side) for side in (train, x)]
    dense_cost = sum(_dense_flops(c, width, d_in, sum(positions), n * shape_of(x)[1]) for width in widths)
    tuning = members[0].layer.tuning
    per_pair = gram_flops(c, sum(widths), d_in, tuning) + (num_parts - 1) * c**2 * tuning.gram_entry_flops
    return positions[0] * positions[1] * per_pair, dense_cost


def _dense_flops(c: int, d_out: int, d_in: int, positions: int, pairs: int) -> float:
    """Return the flops of forming the gradients of all positions and of multiplying them for all pairs of examples."""
    return 2.0 * d_out * d_in * c * (positions + c * pairs)


def _gram_is_faster(gram_cost: float, dense_cost: float, tuning: Tuning) -> bool:
    return gram_cost * tuning.dense_efficiency < dense_cost
