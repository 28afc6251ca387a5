"""The projected engine against projected per-example autograd gradients in float64, and its estimates' statistics."""

from dataclasses import replace

import pytest
import torch

from engine_problems import gradients_by_name, names_of, problem_of, sides
from lmntk.kernels import MemoryBudget, Projection, TileRequest, assemble, empirical_ntk, make_engine
from lmntk.kernels.layers.projected_linear import ProjectedLinear
from lmntk.kernels.projection import Side
from lmntk.models.parameter_parts import parts_of
from lmntk.models.parameters import ParameterFilter
from tiny_models import tiny_prompt_model

DRAWN = Projection(4, 3)
ANY_TILES = TileRequest()


def engine_of(architecture, projection=DRAWN, x="x", parts=False, formula="sgd", name="projected"):
    model = tiny_prompt_model(architecture)
    names = names_of(model, ParameterFilter())
    train, other = sides(architecture)
    problem = problem_of(model, names, train, other if x == "x" else x, formula)
    part_of = parts_of(problem.params, model, ("kind", "weight-or-bias")) if parts else None
    problem = replace(problem, projection=projection, part_of=part_of)
    return make_engine(problem, name, MemoryBudget(2**28))


def kernel_of(engine, tiles=ANY_TILES):
    plan = engine.plan(tiles)
    return assemble(engine.blocks(plan), plan, engine.problem)


def projected_gradients(engine, gradients, names):
    """What the engine keeps of the oracle's gradients, ``[N, C, d]``: weights projected by their matrices."""
    kept = []
    for name in names:
        gradient, (prefix, _, local) = gradients[name], name.rpartition(".")
        layer = engine._layers.get(prefix)
        if isinstance(layer, ProjectedLinear) and local == "weight":
            shape = layer.module.weight.shape
            matrices = gradient.unflatten(-1, shape)
            if type(layer.module).__name__ == "Conv1D":
                matrices, shape = matrices.transpose(-1, -2), shape[::-1]
            for side, size, axis in ((Side.OUTPUT, shape[0], -2), (Side.INPUT, shape[1], -1)):
                random = engine.problem.projection.matrix(prefix, side, size)
                if random is not None:
                    matrices = torch.tensordot(matrices, random, ([axis], [0])).movedim(-1, axis)
            gradient = matrices.flatten(2)
        kept.append(gradient)
    return torch.cat(kept, dim=-1)


@pytest.mark.parametrize("architecture", ["roberta", "gpt2", "llama"])
def test_a_projected_kernel_is_that_of_the_oracles_projected_gradients(architecture):
    engine = engine_of(architecture)
    names = list(engine.problem.params)
    train, x = (projected_gradients(engine, side, names) for side in gradients_by_name(architecture))
    expected = torch.einsum("iap,jbp->iajb", train, x)
    for tiles in (TileRequest(), TileRequest(2, 1)):
        error = (kernel_of(engine, tiles)[0] - expected).norm() / expected.norm()
        assert error < 1e-12
    exact = kernel_of(engine_of(architecture, None, name="factored"))[0]
    assert (exact - expected).norm() / exact.norm() > 1e-3  # so that the comparison above could fail


def test_a_width_that_keeps_all_gives_the_exact_kernel():
    exact = kernel_of(engine_of("roberta", None, name="factored"))
    assert torch.equal(kernel_of(engine_of("roberta", Projection(64))), exact)


def test_kernels_of_one_seed_are_blocks_of_one_positive_semidefinite_kernel():
    train, x = sides("roberta")
    model = tiny_prompt_model("roberta")
    names = names_of(model, ParameterFilter())

    def kernel(left, right):
        problem = replace(problem_of(model, names, left, right), projection=Projection(2))
        return kernel_of(make_engine(problem, "projected", MemoryBudget(2**28)))[0]

    whole, n = kernel([*train, *x], None), len(train)
    blocks = {"train": kernel(train, None), "x": kernel(train, x)}
    assert torch.allclose(whole[:n, :, :n], blocks["train"], rtol=1e-12, atol=0)
    assert torch.allclose(whole[:n, :, n:], blocks["x"], rtol=1e-12, atol=1e-12)
    values = torch.linalg.eigvalsh(whole.flatten(2).flatten(0, 1))
    assert values.min() > -1e-12 * values.max()


def test_parts_of_a_projected_kernel_sum_to_it_and_its_diagonal_is_that_of_the_pairs():
    engine = engine_of("roberta", parts=True)
    apart = kernel_of(engine)
    assert len(apart) == len(engine.problem.parts) > 5
    assert torch.allclose(apart.sum(dim=0), kernel_of(engine_of("roberta"))[0], rtol=1e-12, atol=1e-14)
    own = engine_of("roberta", x=sides("roberta")[0])
    plan = own.plan()
    pairs = kernel_of(own)[0]
    (x,) = plan.tile_rows[0].x_tiles
    expected = torch.stack([pairs[i, :, i] for i in x])
    assert torch.allclose(own.diagonal(plan, x, 0)[0], expected, rtol=1e-12, atol=0)


def test_inner_products_of_projections_are_unbiased_and_spread_less_than_of_independent_numbers():
    generator = torch.Generator().manual_seed(0)
    shape, width, draws = (12, 20), 4, 1500
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    found = []
    for seed in range(draws):
        projection = Projection(width, seed)
        r1, r2 = projection.matrix("layer", Side.OUTPUT, 12), projection.matrix("layer", Side.INPUT, 20)
        assert torch.allclose(r1.T @ r1, 3 * torch.eye(4, dtype=torch.float64))
        found.append(((r1.T @ left @ r2) * (r1.T @ right @ r2)).sum())
    found = torch.stack(found)
    exact, spread = (left * right).sum(), found.std()
    assert abs(found.mean() - exact) < 3.5 * spread / draws**0.5
    # The variance with independent normal numbers of variance 1 / k, by Isserlis' theorem for both sides.
    products = left @ right.T, left.T @ right
    squares = sum((product**2).sum() for product in products)
    crossed = sum((product * product.T).sum() for product in products)
    norms = left.norm() ** 2 * right.norm() ** 2 + exact**2
    of_gaussian = (squares + crossed) / width + (norms + squares) / width**2
    assert 0.3 * of_gaussian < spread**2 < 0.9 * of_gaussian


def test_seeds_and_layers_have_matrices_of_their_own_which_stay_the_same():
    def matrix(seed, layer, side=Side.INPUT):
        return Projection(3, seed).matrix(layer, side, 8)

    assert torch.equal(matrix(0, "a"), matrix(0, "a"))
    for other in (matrix(1, "a"), matrix(0, "b"), matrix(0, "a", Side.OUTPUT)):
        assert not torch.allclose(matrix(0, "a"), other)
    assert Projection(8).matrix("a", Side.INPUT, 8) is None


def test_a_projection_refuses_signs_and_widths_that_keep_nothing():
    with pytest.raises(ValueError, match="does not keep the signs"):
        engine_of("roberta", formula="signgd")
    with pytest.raises(ValueError, match="width of 1 or more"):
        Projection(0)
    with pytest.raises(ValueError, match="`projection` is for the projected engine"):
        empirical_ntk(torch.nn.Linear(2, 1), [torch.ones(2, 2)], projection=Projection(1))


def test_empirical_ntk_estimates_the_kernel_of_any_module():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()

    class OfPositions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x).mean(dim=1)

    x = torch.randn(5, 6, 8, dtype=torch.float64)
    exact = empirical_ntk(OfPositions(), [x])
    estimates = torch.stack(
        [empirical_ntk(OfPositions(), [x], engine="projected", projection=Projection(6, seed)) for seed in range(40)]
    )
    spread = estimates.std(dim=0) / 40**0.5
    assert ((estimates.mean(dim=0) - exact).abs() < 4 * spread + 1e-12).all()
