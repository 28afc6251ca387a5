"""NaN and infinity: they stay in a kernel under signs too, and `empirical_ntk` says what holds them."""

import math

import pytest
import torch
from torch import Tensor, nn

from lmntk.kernels import ENGINES, FORMULAS, BatchedExamples, KernelProblem, TileRequest, functional
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.empirical import empirical_ntk

BAD = [math.nan, -math.inf]
ALL_ENGINES = ("auto", *ENGINES)


class Mixed(nn.Module):
    """Layers that have factors, and a parameter that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.bare = nn.Parameter(torch.ones(4))
        self.out = nn.Linear(4, 2)

    def forward(self, ids: Tensor, shift: Tensor) -> Tensor:
        hidden = self.norm(self.inner(self.words(ids) + shift[..., None]) * self.bare)
        return self.out(torch.tanh(hidden).mean(dim=1))


IDS = torch.tensor([[0, 1, 2], [3, 3, 1], [2, 0, 1], [1, 1, 4]])


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().double()


def batch(value: float = 0.0, example: int = 2) -> dict[str, Tensor]:
    shift = torch.zeros(4, 3, dtype=torch.float64)
    shift[example, 1] = value
    return {"ids": IDS, "shift": shift}


def block(engine: str, formula: str, examples: dict[str, Tensor], model: nn.Module) -> Tensor:
    params = {name: value.detach() for name, value in model.named_parameters()}
    problem = KernelProblem(
        train=BatchedExamples([examples]),
        x=None,
        formula=FORMULAS[formula],
        num_logits=2,
        model=functional.module_model(model),
        params=params,
    )
    with torch.no_grad():
        chosen = make_engine(problem, engine)
        plan = chosen.plan(TileRequest(2, 2))
        return assemble(chosen.blocks(plan), plan, problem)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_gradient_that_is_not_finite_makes_nan_of_its_row_and_column_alone(
    engine: str, formula: str, value: float
) -> None:
    found, whole = (block(engine, formula, examples, mixed()) for examples in (batch(value), batch()))
    others = [0, 1, 3]
    assert found[:, 2].isnan().all()
    assert found[:, :, :, 2].isnan().all()
    kept = [found[:, others][:, :, :, others], whole[:, others][:, :, :, others]]
    torch.testing.assert_close(*kept, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    # An infinite bias before tanh would only saturate it.
    [("norm.bias", math.nan), *((name, value) for name in ("words.weight", "bare", "out.weight") for value in BAD)],
)
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_parameter_that_is_not_finite_is_named(engine: str, formula: str, name: str, value: float) -> None:
    model = mixed()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    with pytest.raises(ValueError, match=f"^the parameter '{name}' holds NaN or infinity$"):
        empirical_ntk(model, [batch()], formula=formula, engine=engine)


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_given_or_unused_parameter_that_is_not_finite_is_named(
    engine: str,
) -> None:
    model = mixed()
    params = {"inner.weight": model.inner.weight.detach().clone()}
    params["inner.weight"][1, 1] = math.nan
    with pytest.raises(ValueError, match="the parameter 'inner.weight' holds NaN"):
        empirical_ntk(model, [batch()], params=params, engine=engine, formula="signgd")
    with torch.no_grad():
        model.words.weight[1] = math.inf
    params = {"out.weight": model.out.weight}
    with pytest.raises(ValueError, match="the parameter 'words.weight' holds NaN"):
        empirical_ntk(model, [batch()], params=params, engine=engine, formula="signgd")


def test_what_no_example_uses_may_hold_nan() -> None:
    model = mixed()
    whole = empirical_ntk(model, [batch()], formula="signgd")
    model.words.weight.data = torch.cat([model.words.weight.data, torch.full((1, 4), math.nan).double()])
    model.words.num_embeddings += 1
    assert torch.equal(empirical_ntk(model, [batch()], formula="signgd"), whole)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_an_example_that_is_not_finite_is_named_by_its_side(engine: str, formula: str) -> None:
    def ask(train: dict[str, Tensor], *x: dict[str, Tensor]) -> None:
        empirical_ntk(mixed(), [train], [*x] or None, formula=formula, engine=engine)

    with pytest.raises(ValueError, match=r"first at train example 2 \(counted from 0\): look at that example"):
        ask(batch(math.nan))
    with pytest.raises(ValueError, match="first at train example 1 "):
        ask(batch(math.inf, example=1), batch())
    with pytest.raises(ValueError, match="first at example 7 of `x_batches` "):
        ask(batch(), batch(), batch(math.nan, example=3))


class Saturated(nn.Module):
    """A gradient that is NaN where the logit is a number: 0 · ∞."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.first(x)))


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_gradient_that_is_nan_behind_logits_that_are_numbers_is_found(engine: str, formula: str) -> None:
    torch.manual_seed(0)
    model, x = Saturated().double(), torch.tensor([[1.0, 2.0], [math.inf, 1.0], [0.0, 1.0]]).double()
    assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="train example 1 "):
        empirical_ntk(model, [x], formula=formula, engine=engine)
