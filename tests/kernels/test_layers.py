"""Every layer type against one example at a time: shapes, padding, repeated tokens, one and many logits."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import oracle
from lmntk.kernels import (
    ENGINES,
    FORMULAS,
    BatchedExamples,
    KernelProblem,
    MemoryBudget,
    ModuleModel,
    TileRequest,
    Tuning,
    capture,
)
from lmntk.kernels.assembly import assemble
from lmntk.kernels.empirical import empirical_ntk
from lmntk.kernels.engines.base import MemoryBudgetError
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.engines.layer_selection import find_layers
from lmntk.kernels.formulas import Formula, SignPlacement
from lmntk.kernels.functional import module_model
from lmntk.kernels.layers import LAYERS, Workspace, embedding, linear, linear_dense, linear_gram, token_matching
from lmntk.kernels.layers.base import stack_vectors
from lmntk.kernels.layers.linear import LinearLayer, LinearPair
from lmntk.kernels.layers.linear_factors import OuterProducts, as_matrices, pack_contiguous
from lmntk.models.factored_layers import register_layers

register_layers()
FEATURES = 5


class Probe(nn.Module):
    """Embeds tokens, mixes positions nonlinearly, applies the layer under test, and reads C logits off."""

    def __init__(self, layer: nn.Module, width: int, logits: int, one_position: bool) -> None:
        super().__init__()
        self.layer = layer
        self.words = nn.Embedding(7, FEATURES, padding_idx=0)
        self.out = nn.Linear(width, logits)
        self.one_position = one_position

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = self.layer(ids) if isinstance(self.layer, nn.Embedding) else self.words(ids)
        mixed = torch.tanh(embedded + embedded.cumsum(dim=1))
        hidden = mixed if isinstance(self.layer, nn.Embedding) else torch.tanh(self.layer(mixed))
        pooled = hidden[:, -1] if self.one_position else (hidden * (ids != 0)[..., None]).sum(dim=1)
        return self.out(pooled)


LAYER_TYPES = {
    "linear": (lambda: nn.Linear(FEATURES, 4), 4),
    "linear without bias": (lambda: nn.Linear(FEATURES, 4, bias=False), 4),
    "conv1d": (lambda: Conv1D(4, FEATURES), 4),
    "embedding": (lambda: nn.Embedding(7, FEATURES), FEATURES),
    "embedding with padding": (lambda: nn.Embedding(7, FEATURES, padding_idx=0), FEATURES),
    "layer norm": (lambda: nn.LayerNorm(FEATURES), FEATURES),
    "layer norm without bias": (lambda: nn.LayerNorm(FEATURES, bias=False), FEATURES),
    "rms norm": (lambda: nn.RMSNorm(FEATURES, eps=1e-5), FEATURES),
}


def make_probe(kind: str, logits: int, one_position: bool) -> Probe:
    torch.manual_seed(0)
    make, width = LAYER_TYPES[kind]
    probe = Probe(make(), width, logits, one_position).double()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return probe


def ids_of(lengths: list[int], seed: int) -> list[torch.Tensor]:
    """Token batches of one example; 0 is padding, and few tokens are there, so that they repeat."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 7, (1, length), generator=generator) for length in lengths]


@settings(max_examples=25, deadline=None)
@given(
    train=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    x=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    logits=st.sampled_from([1, 2, 6]),
    formula=st.sampled_from(sorted(FORMULAS)),
    one_position=st.booleans(),
)
@pytest.mark.parametrize("kind", LAYER_TYPES)
def test_a_layer_type_agrees_with_the_oracle(kind, train, x, logits, formula, one_position):
    probe = make_probe(kind, logits, one_position)
    train_ids, x_ids = ids_of(train, 1), ids_of(x, 2)
    own = list(probe.parameters())
    truth = oracle.kernel(oracle.gradients(probe, own, train_ids), oracle.gradients(probe, own, x_ids), formula)
    probe.requires_grad_(False)
    found = empirical_ntk(probe, train_ids, x_ids, formula=formula, engine="factored")
    scale = truth.abs().max().clamp(min=1.0)
    if formula == "signgd":
        assert torch.equal(found, truth)
    torch.testing.assert_close(found / scale, truth / scale, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", LAYER_TYPES)
@pytest.mark.parametrize("one", ["weight", "bias"])
def test_a_layer_can_count_one_of_its_parameters_alone(kind, one):
    probe = make_probe(kind, 2, False)
    if getattr(probe.layer, one, None) is None:
        pytest.skip("the layer has no such parameter")
    ids = ids_of([3, 4, 4], 3)
    own = getattr(probe.layer, one)
    gradients = oracle.gradients(probe, [own], ids)
    probe.requires_grad_(False)
    found = empirical_ntk(probe, ids, params={f"layer.{one}": own.detach()}, engine="factored")
    torch.testing.assert_close(found, oracle.kernel(gradients, gradients, "sgd"), atol=1e-9, rtol=1e-12)


class Odd(nn.Module):
    """What must go to the fallback: a tied weight, a module called twice, a bare parameter, an unknown type."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, FEATURES)
        self.tied = nn.Linear(FEATURES, 7, bias=True)
        self.tied.weight = self.words.weight
        self.twice = nn.Linear(FEATURES, FEATURES)
        self.bare = nn.Parameter(torch.randn(FEATURES))
        self.unknown = nn.PReLU()
        self.known = nn.Linear(7, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.unknown(self.twice(self.unknown(self.twice(self.words(ids)))) * self.bare)
        return self.known(torch.tanh(self.tied(hidden))).sum(dim=1)


def odd_problem(formula: str) -> tuple[Odd, list[torch.Tensor], KernelProblem]:
    torch.manual_seed(1)
    odd = Odd().double()
    ids = ids_of([3, 5, 3, 2], 4)

    def logits_fn(params, batch):
        return torch.func.functional_call(odd, params, (batch,))

    params = {name: parameter.detach() for name, parameter in odd.named_parameters()}
    train, x = BatchedExamples(ids[:2]), BatchedExamples(ids[2:])
    model = ModuleModel(logits_fn, odd)
    sides = {"train": train, "x": x, "formula": FORMULAS[formula], "num_logits": 2}
    return odd, ids, KernelProblem(**sides, model=model, params=params)


@pytest.mark.parametrize("formula", FORMULAS)
def test_what_no_layer_type_knows_is_counted_once_by_the_fallback(formula):
    odd, ids, problem = odd_problem(formula)
    own = list(odd.parameters())
    gradients = oracle.gradients(odd, own, ids)
    odd.requires_grad_(False)
    engine = FactoredEngine(problem, MemoryBudget(2**28))
    assert set(engine.fallback_parameters) == {
        "words.weight",
        "tied.bias",
        "twice.weight",
        "twice.bias",
        "bare",
        "unknown.weight",
        "unused.weight",
        "unused.bias",
    } - {"tied.bias"}
    plan = engine.plan()
    found = assemble(engine.blocks(plan), plan, problem)
    truth = oracle.kernel(gradients[:2], gradients[2:], formula)
    torch.testing.assert_close(found if len(found) == 2 else found[0], truth, atol=1e-10, rtol=1e-12)


def test_hooks_leave_the_outputs_unchanged_and_go_away():
    odd, ids, problem = odd_problem("sgd")
    odd.requires_grad_(False)
    before = [odd(batch) for batch in ids]
    layers, _ = find_layers(problem, problem.model, MemoryBudget(2**28), Tuning())
    assert set(layers) == {"known", "tied"}
    engine = FactoredEngine(problem, MemoryBudget(2**28))
    plan = engine.plan()
    assemble(engine.blocks(plan), plan, problem)
    assert all(torch.equal(odd(batch), logits) for batch, logits in zip(ids, before, strict=True))
    assert not any(module._forward_hooks for module in odd.modules())


@pytest.mark.parametrize(
    ("budget", "tuning"), [(2**28, Tuning(probe_gradient_bytes=100)), (200, Tuning())], ids=["tuning", "budget"]
)
def test_gradients_that_do_not_fit_are_compared_in_groups(budget, tuning, monkeypatch):
    _, _, problem = odd_problem("sgd")
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(0) or grad(*args, **kwargs))
    at_once = find_layers(problem, problem.model, MemoryBudget(2**28), Tuning())
    num_calls = len(calls)
    in_groups = find_layers(problem, problem.model, MemoryBudget(budget), tuning)
    assert len(calls) - num_calls > num_calls
    assert (in_groups[0].keys(), in_groups[1]) == (at_once[0].keys(), at_once[1])


@pytest.mark.parametrize("place", [(capture, "forward_backward"), (LinearLayer, "kernel")], ids=["model", "layer"])
def test_a_comparison_that_runs_out_of_memory_rejects_no_layer(place, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("none left")

    _, _, problem = odd_problem("sgd")
    monkeypatch.setattr(*place, fail)
    with pytest.raises(torch.OutOfMemoryError):
        find_layers(problem, problem.model, MemoryBudget(2**28), Tuning())


def test_every_registered_type_has_a_case_here():
    covered = {type(make()) for make, _ in LAYER_TYPES.values()}
    others = {"LabelWordDecoder", "OPTLearnedPositionalEmbedding"}  # held by the prompt models of test_engines
    assert {kind for kind in LAYERS if kind.__name__ not in others} == covered


@pytest.mark.parametrize("engine", ENGINES)
def test_no_x_examples_make_an_empty_kernel(engine):
    probe = make_probe("linear", 2, False)
    probe.requires_grad_(False)
    found = empirical_ntk(probe, ids_of([3, 2], 5), [], engine=engine)
    assert found.shape == (2, 2, 0, 2)


def test_no_train_examples_are_an_error():
    with pytest.raises(ValueError, match="holds no example"):
        empirical_ntk(make_probe("linear", 2, False), [])


class Tricky(nn.Module):
    """Ordinary modules whose gradients do not factor the way their type says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(7, 12)
        self.inner = nn.Linear(12, 12)
        self.norm = nn.RMSNorm((4, 3), eps=1e-5) if kind == "rms norm over two axes" else nn.LayerNorm((4, 3))
        self.positions = nn.Embedding(9, 12)
        self.out = nn.Linear(12, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids)
        if self.kind == "changed in place":
            hidden = torch.relu_(self.inner(hidden))
        elif self.kind == "first output changed in place":
            hidden = torch.relu_(hidden)
        elif self.kind == "used as a function too":
            hidden = torch.tanh(nn.functional.linear(hidden, self.words.weight)) @ self.words.weight
        elif "norm over two axes" in self.kind:
            hidden = self.norm(hidden.unflatten(-1, (4, 3))).flatten(-2)
        elif self.kind == "called by keyword":
            hidden = torch.tanh(self.inner(input=hidden))
        elif self.kind == "without a batch axis":
            hidden = hidden + self.positions(torch.arange(ids.shape[1]))
        elif self.kind == "one index an example":
            hidden = hidden + self.positions(ids[:, 0])[:, None]
        elif self.kind == "indices of two axes":
            hidden = hidden + self.positions(torch.stack([ids, ids], dim=2)).sum(dim=2)
        return self.out(torch.tanh(hidden).sum(dim=1))


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize(
    "kind",
    [
        "changed in place",
        "first output changed in place",
        "used as a function too",
        "layer norm over two axes",
        "rms norm over two axes",
        "called by keyword",
        "without a batch axis",
        "one index an example",
        "indices of two axes",
    ],
)
def test_modules_used_in_unusual_ways_are_right_all_the_same(kind, length):
    torch.manual_seed(2)
    tricky = Tricky(kind).double()
    ids = ids_of([length] * 4, 6)
    gradients = oracle.gradients(tricky, list(tricky.parameters()), ids)
    tricky.requires_grad_(False)
    found = empirical_ntk(tricky, ids[:2], ids[2:], engine="factored")
    torch.testing.assert_close(found, oracle.kernel(gradients[:2], gradients[2:], "sgd"), atol=1e-10, rtol=1e-12)


def test_a_budget_too_small_for_the_fallback_says_what_is_enough():
    odd, _, problem = odd_problem("sgd")
    odd.requires_grad_(False)
    with pytest.raises(MemoryBudgetError) as caught:
        FactoredEngine(problem, MemoryBudget(4000)).plan()
    engine = FactoredEngine(problem, MemoryBudget(caught.value.needed))
    plan = engine.plan()
    assert engine.expected_bytes(plan) <= caught.value.needed
    assert assemble(engine.blocks(plan), plan, problem).abs().sum() > 0


def test_tiles_that_do_not_fit_the_budget_are_refused():
    probe = make_probe("linear", 2, False).requires_grad_(False)
    ids = ids_of([6] * 400, 7)
    with pytest.raises(MemoryBudgetError):
        empirical_ntk(probe, ids, engine="factored", train_tile=400, memory_gb=2e-4)


def outer_products(sizes: list[tuple[int, int]], d_out: int, d_in: int, c: int, seed: int) -> list[OuterProducts]:
    """Random factors of c logits, a batch for each (examples, positions)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [OuterProducts(draw(b, n, d_in), [draw(b, n, d_out) for _ in range(c)], None) for b, n in sizes]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("widths", [(4, 9), (9, 4), (5, 5)])
@settings(max_examples=25, deadline=None)
@given(
    train=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3),
    x=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=3),
    logits=st.sampled_from([1, 2, 6]),
    together=st.integers(1, 14),
    capacity=st.sampled_from([1, 50, 10**6]),
)
def test_both_ways_to_multiply_a_linear_layer_are_one_kernel(formula, widths, train, x, logits, together, capacity):
    """Gram matrices and dense gradients, in buffers of any size, in pieces of any size, signs and all."""

    def way_of_gram(train, x, *others):
        return linear_gram.gram([train], [x], *others)

    ways = [linear_dense.dense]
    if formula == "sgd":
        ways.append(way_of_gram)
    elif together % 2:  # of one outer product the sign is that of its factors
        train, x = [(b, 1) for b, _ in train], [(b, 1) for b, _ in x]
        ways.append(way_of_gram)
    sides = outer_products(train, *widths, logits, seed=0), outer_products(x, *widths, logits, seed=1)
    raw = [
        torch.cat([torch.stack([g.transpose(1, 2) @ side.inputs for g in side.gradients], 1) for side in batches])
        for batches in sides
    ]
    directions = FORMULAS[formula].directions
    expected = torch.stack(
        [
            torch.einsum(
                "iapq,jbpq->aibj",
                raw[0].sign() if direction.sign_train else raw[0],
                raw[1].sign() if direction.sign_x else raw[1],
            )
            for direction in directions
        ]
    )
    workspace = Workspace(capacity, torch.float64, torch.device("cpu"))
    tuning = Tuning(dense_gradient_batch=together, min_weight_rows=1, cache_bytes=8 * capacity, gram_tokens=together)
    for way in ways:
        torch.testing.assert_close(way(*sides, directions, workspace, tuning), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("efficiency", [0.0, math.inf], ids=["by Gram matrices", "by dense gradients"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_layers_that_are_given_the_same_have_the_sum_of_their_parts(formula, efficiency, length):
    """As queries, keys and values; their biases, of which one is left out here, each for itself."""
    tuning = Tuning(dense_efficiency=efficiency)
    workspace = Workspace(10**4, torch.float64, torch.device("cpu"))
    sizes, x_sizes = [(2, length), (1, length + (length > 1))], [(3, length)]
    directions = FORMULAS[formula].directions
    members = []
    for seed, (width, counted) in enumerate([(5, "weight bias"), (3, "weight"), (7, "weight bias")]):
        layer = LinearLayer(nn.Linear(4, width), frozenset(counted.split()), tuning)
        sides = [outer_products(part, width, 4, 2, seed=2 * seed) for part in (sizes, x_sizes)]
        if members:
            shared = (members[0].train, members[0].x)
            pairs = [list(zip(*both, strict=True)) for both in zip(sides, shared, strict=True)]
            sides = [[replace(own, inputs=one.inputs) for own, one in pair] for pair in pairs]
        sides = [[replace(one, biases=stack_vectors(one.gradients)) for one in side] for side in sides]
        members.append(LinearPair(layer, *sides))
    together = linear.shared_input_kernel(members, directions, workspace)
    apart = sum(member.layer.kernel(member.train, member.x, directions, workspace) for member in members)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "embedding", "layer norm"])
@pytest.mark.parametrize("length", [1, 4])
@settings(max_examples=15, deadline=None)
@given(
    signs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5),
    engine=st.sampled_from(sorted(ENGINES)),
)
def test_directions_come_in_any_order_and_any_number(kind, length, signs, engine):
    """Not those of today's formulas alone: the signs of one direction are not in another's way."""
    probe = make_probe(kind, 2, False)
    ids, own = ids_of([length] * 3, 11), list(probe.layer.parameters())
    gradients = oracle.gradients(probe, own, ids)
    sides = {False: gradients.double(), True: gradients.sign()}
    truth = torch.stack([torch.einsum("iap,jbp->iajb", sides[train], sides[x]) for train, x in signs])
    probe.requires_grad_(False)
    formula = Formula("any", tuple(SignPlacement(*pair) for pair in signs))
    params = {f"layer.{name}": value.detach() for name, value in probe.layer.named_parameters()}
    sides = {"train": BatchedExamples(ids), "x": None, "formula": formula, "num_logits": 2}
    problem = KernelProblem(**sides, model=module_model(probe), params=params)
    chosen = ENGINES[engine](problem, MemoryBudget(2**28))
    plan = chosen.plan(TileRequest(2, 2))
    torch.testing.assert_close(assemble(chosen.blocks(plan), plan, problem), truth, rtol=1e-11, atol=1e-11)


class ViewsOfOneTensor(nn.Module):
    """Two linear layers, the second of which is given a part of what the first is given, at the same address."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.words = nn.Embedding(7, FEATURES)
        self.whole, self.some = nn.Linear(FEATURES, 4), nn.Linear(3 if part == "features" else FEATURES, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.words(ids) + self.words(ids).cumsum(dim=1))
        some = {"features": hidden[..., :3], "position": hidden[:, 0], "positions": hidden[:, :2]}[self.part]
        read = torch.tanh(self.some(some))
        return self.out(torch.tanh(self.whole(hidden)).sum(1) + (read if read.dim() == 2 else read.sum(1)))


@pytest.mark.parametrize("efficiency", [0.0, math.inf], ids=["by Gram matrices", "by dense gradients"])
@pytest.mark.parametrize("part", ["features", "position", "positions"])
def test_a_part_of_a_tensor_is_not_taken_for_the_whole(part, efficiency):
    tuning = Tuning(dense_efficiency=efficiency)
    torch.manual_seed(3)
    model = ViewsOfOneTensor(part).double()
    ids = ids_of([4] * 5, 8) + ids_of([3] * 2, 9)
    gradients = oracle.gradients(model, list(model.parameters()), ids)
    model.requires_grad_(False)
    found = empirical_ntk(model, ids[:3], ids[3:], engine="factored", tuning=tuning)
    torch.testing.assert_close(found, oracle.kernel(gradients[:3], gradients[3:], "sgd"), atol=1e-10, rtol=1e-12)


def test_a_model_finds_out_which_of_its_layers_are_given_the_same():
    """Only what is the same tensor in every batch: equal numbers are not enough."""
    layers = {name: LinearLayer(nn.Linear(4, 4), frozenset({"weight"})) for name in "abcd"}
    layers["e"] = LinearLayer(nn.Linear(4, 4), frozenset({"bias"}))
    train = {name: outer_products([(2, 3)], 4, 4, 1, seed=0) for name in "abcde"}
    x = {name: outer_products([(1, 3)], 4, 4, 1, seed=1) for name in "abcde"}
    for side in (train, x):
        side["c"] = [replace(one, inputs=other.inputs) for one, other in zip(side["c"], side["a"], strict=True)]
    train["d"] = [replace(one, inputs=other.inputs) for one, other in zip(train["d"], train["a"], strict=True)]
    assert linear.group_by_shared_input(layers, train, x) == [["a", "c"], ["b"], ["d"], ["e"]]


@pytest.mark.parametrize("chosen", [[(0, slice(1, 2)), (1, slice(0, 3))], [(1, slice(1, 3))], [(0, slice(0, 2))]])
def test_packed_factors_are_views_of_one_matrix(chosen):
    """Any consecutive examples, with the numbers that they have without packing, and inputs that stay shared."""
    batches = outer_products([(2, 4), (3, 1), (1, 5)], 3, 2, 2, seed=0)
    other = [replace(batch, gradients=[gradient + 1 for gradient in batch.gradients]) for batch in batches]
    expected = as_matrices(batches, chosen)
    packed = pack_contiguous({"one": batches, "other": other})
    found = as_matrices(packed["one"], chosen)
    assert torch.equal(found.inputs, expected.inputs)
    assert all(torch.equal(*logits) for logits in zip(found.gradients, expected.gradients, strict=True))
    whole = packed["one"].whole
    assert found.inputs.untyped_storage().data_ptr() == whole.inputs.untyped_storage().data_ptr()
    assert packed["other"].whole.inputs is whole.inputs


def test_a_model_of_vectors_has_buffers_too():
    """Nothing is formed there; single outer products are to be multiplied for many examples at once all the same."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).requires_grad_(False)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    examples = BatchedExamples([torch.randn(9, 6)])
    sides = {"train": examples, "x": None, "formula": FORMULAS["sgd"], "num_logits": 2}
    problem = KernelProblem(**sides, model=module_model(model), params=params)
    engine = FactoredEngine(problem, MemoryBudget(2**30))
    assert engine._workspace.capacity >= 2**20


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("capacity", [1, 200, 10**6])
@settings(max_examples=25, deadline=None)
@given(
    train=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=3),
    x=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=3),
    logits=st.integers(1, 3),
    tokens=st.integers(3, 30),
    paired=st.sampled_from([0, 6, 2**15]),
    aligned=st.sampled_from([1, 60, 2**24]),
    seed=st.integers(0, 99),
)
def test_both_ways_to_match_tokens_are_one_kernel(formula, capacity, train, x, logits, tokens, paired, aligned, seed):
    """Looking tokens up, on a CPU, all that most examples have at once, and rare ones by pairs; comparing them all."""
    torch.manual_seed(seed)
    layer = embedding.EmbeddingLayer(nn.Embedding(tokens, 3, padding_idx=1), frozenset({"weight"}))
    sides = [
        [
            layer.factors(
                torch.randint(0, tokens, shape), [torch.randn(*shape, 3, dtype=torch.float64) for _ in range(logits)]
            )
            for shape in side
        ]
        for side in (train, x)
    ]
    directions = FORMULAS[formula].directions
    workspace = Workspace(capacity, torch.float64, torch.device("cpu"))
    few_at_a_time = {"PAIRED_NUMBERS": paired, "NUMBERS_AT_A_TIME": 12, "BLOCK": 6, "ALIGNED_NUMBERS": aligned}
    with mock.patch.multiple(token_matching, **few_at_a_time):
        looked_up = token_matching.match_tokens(*sides, directions)
    compared = embedding._match_by_mask(*sides, directions, workspace)
    torch.testing.assert_close(compared, looked_up, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aligned", [2 * 9 * 2 * 4, 3 * 9 * 2 * 4, 10**6])
def test_tokens_of_all_examples_are_laid_side_by_side_within_a_bound(aligned, monkeypatch):
    """Of 4 train and 5 X examples with 2 logits and rows of 4 numbers."""
    torch.manual_seed(0)
    token = torch.arange(7)
    train, x = (
        [token_matching.TokenGradients(token.expand(n, 7), torch.randn(n, 7, 2, 4, dtype=torch.float64))]
        for n in (4, 5)
    )
    laid, contract = [], token_matching.contract
    monkeypatch.setattr(token_matching, "ALIGNED_NUMBERS", aligned)
    monkeypatch.setattr(token_matching, "contract", lambda *sides: (laid.append(sides[:2]), contract(*sides))[1])
    found = token_matching.match_tokens(train, x, FORMULAS["sgd"].directions)
    assert max(left.numel() + right.numel() for left, right in laid) <= aligned
    assert sum(left.shape[1] for left, _ in laid) == 7 * 4
    expected = torch.einsum("ilap,jlbp->iajb", train[0].gradients, x[0].gradients)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
