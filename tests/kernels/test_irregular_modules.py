"""Modules whose layers do not do the same in every example: each kernel against autograd, one example at a time."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from lmntk.kernels import FORMULAS, BatchedExamples, KernelProblem, MemoryBudget, functional
from lmntk.kernels.empirical import empirical_ntk
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.layers import LAYERS
from lmntk.kernels.layers.base import Gradients
from lmntk.kernels.layers.linear import LinearLayer
from lmntk.kernels.layers.linear_factors import OuterProducts

WORDS, WIDTH = 9, 5
# Row 2, in the middle, is the only one without padding.
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 5, 3, 1], [7, 7, 1, 2], [4, 3, 2, 6]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])


class Reader(nn.Module):
    """Embeds words, applies a layer in an unusual way, and reads two logits off."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        padded = mask[..., None] == 0
        return self.out(getattr(self, self.way)(ids, padded).sum(dim=1))

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.wte(ids)))

    def output_filled(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.fc(self.hidden(ids))
        h.masked_fill_(padded, 0)
        return torch.tanh(h)

    def output_multiplied(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.fc(self.hidden(ids))
        h *= ~padded
        return h

    def output_assigned(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.fc(self.hidden(ids))
        h[:, -2:] = torch.where(padded[:, -2:], 0.0, h[:, -2:])
        return torch.tanh(h)

    def words_filled(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.wte(ids)
        h.masked_fill_(padded, 0)
        return torch.tanh(self.fc(self.norm(h)))

    def norm_clipped(self, ids: Tensor, padded: Tensor) -> Tensor:
        return self.fc(self.norm(self.wte(ids)).relu_() * ~padded)

    def called_twice(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = torch.tanh(self.fc(self.hidden(ids)))
        rows = padded.any(dim=1)[:, 0]
        return torch.where(rows[:, None, None], self.fc(h), h) if bool(rows.any()) else h

    def called_for_some(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.hidden(ids)
        rows = padded.any(dim=1)[:, 0]
        return torch.where(rows[:, None, None], h, torch.tanh(self.fc(h))) if not bool(rows.all()) else h

    def one_by_one(self, ids: Tensor, padded: Tensor) -> Tensor:
        found = []
        for row, gone in zip(ids.split(1), padded.split(1), strict=True):
            with torch.set_grad_enabled(not bool(gone.any())):
                h = self.fc(self.hidden(row))
            found.append(h + self.hidden(row))
        return torch.cat(found)

    def detached(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.fc(self.hidden(ids))
        return torch.where(padded, h.detach(), h)

    def used_outside(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.fc(self.hidden(ids))
        return torch.tanh(torch.where(padded, h + nn.functional.linear(h, self.fc.weight), h))

    def used_outside_where_padded(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.fc(self.hidden(ids))
        return torch.tanh(torch.where(padded.any(), h * torch.where(padded, self.fc.bias, 1.0), h))

    def flattened(self, ids: Tensor, padded: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.hidden(ids).flatten(0, 1))).unflatten(0, ids.shape) * ~padded

    def routed(self, ids: Tensor, padded: Tensor) -> Tensor:
        h = self.hidden(ids)
        chosen = ~padded[:, -1, 0]
        h = h.clone()
        h[chosen] = torch.tanh(self.fc(h[chosen]))
        return h

    def reordered(self, ids: Tensor, padded: Tensor) -> Tensor:
        order = padded.sum(dim=(1, 2)).argsort(stable=True)
        return torch.tanh(self.fc(self.hidden(ids)[order]))[order.argsort()]

    def broadcast(self, ids: Tensor, padded: Tensor) -> Tensor:
        positions = self.fc(self.wte.weight[:1])[None]
        return torch.tanh(self.hidden(ids) + positions) * ~padded


WAYS = [
    name for name, entry in vars(Reader).items() if callable(entry) and name not in ("__init__", "forward", "hidden")
]


def truth_of(model: nn.Module, batches: list[tuple[Tensor, ...]], formula: str = "sgd") -> Tensor:
    rows = [tuple(part[row : row + 1] for part in batch) for batch in batches for row in range(len(batch[0]))]
    gradients = oracle.gradients(lambda row: model(*row), list(model.parameters()), rows)
    return oracle.kernel(gradients, gradients, formula)


def reader(way: str) -> Reader:
    torch.manual_seed(0)
    return Reader(way).double()


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_used_in_another_way_where_an_example_is_padded(way: str, formula: str) -> None:
    model = reader(way)
    found = empirical_ntk(model, [(IDS, MASK)], formula=formula)
    assert oracle.relative_error(found, truth_of(model, [(IDS, MASK)], formula)) < 1e-12


@pytest.mark.parametrize("formula", ["sgd", "signgd"])
@pytest.mark.parametrize("way", WAYS)
def test_one_example_of_forty_uses_a_layer_in_another_way(way: str, formula: str) -> None:
    """It is not among those that layers are tried on."""
    model = reader(way)
    ids = torch.randint(0, WORDS, (40, 3), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[13, 1:] = 0
    found = empirical_ntk(model, [(ids, mask)], formula=formula, train_tile=7)
    assert oracle.relative_error(found, truth_of(model, [(ids, mask)], formula)) < 1e-12


@settings(max_examples=25, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    rows=st.lists(st.lists(st.integers(0, WORDS - 1), min_size=3, max_size=3), min_size=1, max_size=9),
    length=st.integers(1, 3),
    seen=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    formula=st.sampled_from(sorted(FORMULAS)),
    train_tile=st.integers(1, 9),
)
def test_any_padding_in_any_order(
    way: str, rows: list[list[int]], length: int, seen: list[int], formula: str, train_tile: int
) -> None:
    model = reader(way)
    ids = torch.tensor(rows)[:, :length]
    mask = (torch.arange(length) < torch.tensor(seen[: len(ids)]).clamp(max=length)[:, None]).long()
    found = empirical_ntk(model, [(ids, mask)], formula=formula, train_tile=train_tile)
    truth = truth_of(model, [(ids, mask)], formula)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10 * float(truth.abs().max()))


def engine_of(model: nn.Module, ids: Tensor, mask: Tensor) -> FactoredEngine:
    params = {name: value.detach() for name, value in model.named_parameters()}
    examples = BatchedExamples([(ids, mask)])
    problem = KernelProblem(
        train=examples,
        x=None,
        formula=FORMULAS["sgd"],
        num_logits=2,
        model=functional.module_model(model),
        params=params,
    )
    return FactoredEngine(problem, MemoryBudget(2**28))


def test_what_changes_an_output_in_place_leaves_all_other_layers_factored() -> None:
    unknown = {way: engine_of(reader(way), IDS, MASK).fallback_parameters for way in ("output_filled", "words_filled")}
    assert unknown == {"output_filled": ["fc.weight", "fc.bias"], "words_filled": []}


def test_a_layer_that_was_trusted_and_is_used_in_another_way_later_is_named(caplog: pytest.LogCaptureFixture) -> None:
    ids = IDS.repeat(8, 1)
    mask = torch.ones_like(ids)
    mask[13, 1:] = 0
    with caplog.at_level(logging.WARNING):
        empirical_ntk(reader("called_twice"), [(ids, mask)], train_tile=5)
    assert [message for message in caplog.messages if "fc" in message] == [
        "some examples use fc in another way than those that were tried: the jacobian engine takes its parameters there"
    ]


class Permuting(nn.Module):
    """Puts the examples of a batch of more than three into another order, and its outputs back into theirs."""

    def __init__(self, how: str, out: str) -> None:
        super().__init__()
        self.first, self.last, self.how, self.out = nn.Linear(5, 6), nn.Linear(6, 2), how, out

    def order(self, x: Tensor) -> Tensor:
        size = len(x)
        if size <= 3:
            return torch.arange(size)
        if self.how == "argsort":
            return x[:, 0].argsort()
        if self.how == "where":
            return torch.cat([torch.where(x[:, 0] > 0)[0], torch.where(~(x[:, 0] > 0))[0]])
        if self.how == "item":
            return (torch.arange(size) + 1 + int(x[:, 0].abs().sum().item())) % size
        return (torch.arange(size) + x[:, 0].argmax()) % size

    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(x)))
        y = self.last(self.first(x[order]).tanh())[back]
        if self.out == "opposite":
            return torch.cat([y[:, :1], -y[:, :1]], dim=1)
        return y.softmax(dim=1) if self.out == "softmax" else y - y.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("out", ["opposite", "softmax", "centred"])
@pytest.mark.parametrize("how", ["argsort", "where", "item", "argmax"])
def test_examples_that_change_places_are_noticed_if_logits_sum_to_a_constant(how: str, out: str) -> None:
    torch.manual_seed(0)
    model, x = Permuting(how, out).double(), torch.randn(12, 5, dtype=torch.float64)
    kernel = empirical_ntk(model, [x], [x[:7]])
    truth = truth_of(model, [(row[None],) for row in x])
    assert float((kernel - truth[:, :, :7]).norm() / truth.norm()) <= 1e-12


class Failing(LinearLayer):
    """A layer type with a mistake."""

    error: type[Exception] = RuntimeError

    def factors(self, inputs: Tensor, gradients: Gradients) -> OuterProducts:
        raise self.error("a mistake")


@pytest.mark.parametrize("where", ["fc", "out"])
def test_a_layer_type_that_fails_costs_its_layer_and_is_named(
    where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reader("norm_clipped")
    layer = type("Own", (nn.Linear,), {})
    model.get_submodule(where).__class__ = layer
    monkeypatch.setitem(LAYERS, layer, Failing)
    with caplog.at_level(logging.WARNING):
        engine = engine_of(model, IDS, MASK)
    assert {f"{where}.weight", f"{where}.bias"} <= set(engine.fallback_parameters)
    assert "wte.weight" not in engine.fallback_parameters
    assert caplog.messages[0].startswith(f"{where} cannot be factored (RuntimeError: a mistake)")


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_a_programming_error_in_a_layer_type_is_raised(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, nn.Linear, type("Wrong", (Failing,), {"error": error}))
    with pytest.raises(error, match="a mistake"):
        engine_of(reader("norm_clipped"), IDS, MASK)
