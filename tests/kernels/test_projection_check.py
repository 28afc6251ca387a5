"""The error of projected kernels on a sub-sample, against kernels that the engines compute separately."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine_problems import longer_sides, names_of, problem_of
from lmntk.kernels import MemoryBudget, Projection, assemble, make_engine
from lmntk.kernels.projection_check import ProjectionCheck, entry_error, evenly_spaced
from lmntk.models.parameters import ParameterFilter
from tiny_models import tiny_prompt_model

DRAWS = [Projection(4, seed) for seed in range(3)]
BUDGET = MemoryBudget(2**28)


def problem(train, x, projection=None):
    model = tiny_prompt_model("roberta")
    return replace(problem_of(model, names_of(model, ParameterFilter()), train, x), projection=projection)


def kernel(train, x, projection=None):
    engine = make_engine(problem(train, x, projection), "projected" if projection else "factored", BUDGET)
    plan = engine.plan()
    return assemble(engine.blocks(plan), plan, engine.problem)[0]


@pytest.fixture(scope="module")
def engine():
    return make_engine(problem(*longer_sides("roberta"), DRAWS[0]), "projected", BUDGET)


@pytest.mark.parametrize("budget", [2**28, 2**17])
def test_kernels_of_the_sub_sample_are_those_that_the_engines_compute(engine, budget, monkeypatch):
    train, x = longer_sides("roberta")
    monkeypatch.setattr(engine, "budget", MemoryBudget(budget))  # layer by layer where nothing fits
    check = ProjectionCheck(engine, 3)
    assert (len(check._groups) > 1) == (budget < 2**28)
    assert [len(train[i]["input_ids"][0]) for i in check.train] == [5, 12, 13]
    assert len(check.x) == 3
    left, right = [train[i] for i in check.train], [x[i] for i in check.x]
    for _ in range(2):  # factors that are kept give the same
        found = check.kernels(DRAWS)
        for one, projection in ((found.exact, None), *zip(found.drawn, DRAWS, strict=True)):
            assert torch.allclose(one, kernel(left, [*left, *right], projection), rtol=1e-10, atol=1e-12)
    error = check.entry_error(found)
    exact, drawn = found.exact[:, :, 3:], found.drawn[:, :, :, 3:]
    expected = [float((one - exact).norm() / exact.norm()) for one in drawn]
    assert error.own == pytest.approx(expected[0])
    assert (error.mean, error.std) == pytest.approx((np.mean(expected), np.std(expected, ddof=1)))
    assert error.upper == max(error.own, error.mean + error.std)


def test_what_is_not_projected_is_exact_in_all_draws(engine, monkeypatch):
    train, x = longer_sides("roberta")
    check = ProjectionCheck(engine, 2)
    left, right = [train[i] for i in check.train], [x[i] for i in check.x]
    wide = check.kernels([Projection(64)])
    assert torch.equal(wide.drawn[0], wide.exact)
    # A layer that these examples use in another way goes to the jacobian engine, which is exact.
    name = next(name for name in engine.exact_layers if name.endswith("query"))
    of_all, of_query = difference_of_draw(check), difference_of_draw(check, only=name)
    assert of_query.norm() > 1e-3 * wide.exact.norm()
    check._irregular.add(name)
    check._held = check._beside = None
    found = check.kernels(DRAWS[:1])
    assert torch.allclose(found.exact, kernel(left, [*left, *right]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.drawn[0] - found.exact, of_all - of_query, rtol=1e-9, atol=1e-11)


def difference_of_draw(check, only=None):
    """K̂ − K of the first draw, of one layer or of all."""
    groups = check._groups
    check._groups, check._held = groups if only is None else [[only], []], None
    found = check.kernels(DRAWS[:1])
    check._groups, check._held = groups, None
    return found.drawn[0] - found.exact


def test_the_error_of_train_weighs_pairs_as_the_whole_kernel_has_them():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4, 2, 4, 2, generator=generator, dtype=torch.float64)
    drawn = exact + 0.1 * torch.randn(1, 4, 2, 4, 2, generator=generator, dtype=torch.float64)
    own = np.eye(4, dtype=bool)
    errors = ((drawn[0] - exact) ** 2).sum(dim=(1, 3)).numpy()
    squares = (exact**2).sum(dim=(1, 3)).numpy()
    n, whole = 4, 100
    total = [whole / n * part[own].sum() + whole * 99 / (n * 3) * part[~own].sum() for part in (errors, squares)]
    assert entry_error(exact, drawn, whole).own == pytest.approx((total[0] / total[1]) ** 0.5)
    plain = entry_error(exact, drawn)
    assert plain.own == pytest.approx(float((drawn[0] - exact).norm() / exact.norm()))
    assert plain.median == pytest.approx(float(((drawn[0] - exact).abs() / exact.abs()).median()))
    assert entry_error(exact, drawn, 4).own == pytest.approx(plain.own)


def test_resampled_examples_tell_how_far_an_error_varies_with_the_sample():
    """Errors of single pairs from a known distribution: the spread over new samples is what resampling finds."""
    generator = torch.Generator().manual_seed(1)

    def sample(n):
        scale = torch.rand(n, 1, 1, 1, generator=generator, dtype=torch.float64)
        exact = torch.ones(n, 1, n, 1, dtype=torch.float64)
        noise = scale * torch.randn(n, 1, n, 1, generator=generator, dtype=torch.float64)
        return entry_error(exact, (exact + noise)[None])

    found = [sample(32) for _ in range(60)]
    spread = np.std([error.own for error in found])
    assert 0.7 * spread < np.mean([error.sampling for error in found]) < 1.5 * spread


def test_sub_samples_are_evenly_spaced_in_order_of_length():
    class Lengths:
        shapes = (9, 3, 7, 1, 5, 8)

        def __len__(self):
            return 6

    assert evenly_spaced(Lengths(), 2) == (1, 5)
    assert evenly_spaced(Lengths(), 10) == (3, 1, 4, 2, 5, 0)


def test_the_mean_of_many_draws_is_the_exact_kernel_within_the_expected_spread(engine):
    found = ProjectionCheck(engine, 3).kernels([Projection(4, seed) for seed in range(100, 300)])
    deviations = (found.drawn - found.exact).flatten(1)
    of_one, of_mean = deviations.square().sum(dim=1).mean().sqrt(), deviations.mean(dim=0).norm()
    # The mean of 200 draws without bias is off by 1 / √200 of what one is. Most of that is one number, common to all
    # entries, so that three times as much is beyond chance.
    assert of_mean < 3 * of_one / 200**0.5
    assert (deviations.mean(dim=0).abs() < 4.5 * deviations.std(dim=0) / 200**0.5).all()
