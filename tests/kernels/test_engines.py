"""Every engine against the oracle: all formulas, filters and architectures."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from engine_problems import TOLERANCE, gradients_by_name, longer_sides, names_of, oracle_gradients, problem_of, sides
from lmntk.kernels import ENGINES, FORMULAS, MemoryBudget, TileRequest, capture
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.batching import length_buckets
from lmntk.kernels.engines import layer_selection
from lmntk.kernels.engines.base import MemoryBudgetError
from lmntk.kernels.layers import LAYERS, EmbeddingLayer, embedding
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning
from lmntk.models.factored_layers import LabelWordDecoder
from lmntk.models.parameters import ParameterFilter
from tiny_models import (
    ARCHITECTURES,
    CAUSAL,
    MASKED,
    TYPICAL,
    TYPICAL_CAUSAL,
    WITHOUT_BIASES,
    PaddedPrompts,
    prompts_for,
    tiny_prompt_model,
    tiny_prompts,
)


def tolerance(engine, architecture, dtype):
    """ModernBERT rotates queries and keys in float32 whatever its dtype: forward and reverse mode round differently."""
    return 2e-8 if (engine, architecture, dtype) == ("jvp", "modernbert", torch.float64) else TOLERANCE[dtype]


TRAIN_LENGTHS, X_LENGTHS = [5, 9, 5, 7], [6, 9, 12, 5, 5]
FILTERS = {
    "all": ParameterFilter(),
    "no embeddings": ParameterFilter(exclude_embeddings=True),
    "no head": ParameterFilter(exclude_head=True),
    "biases": ParameterFilter(only_biases=True),
    "no first layer": ParameterFilter(exclude_first_layers=1),
    "biases behind the first layer": ParameterFilter(only_biases=True, exclude_first_layers=1, exclude_embeddings=True),
}


# Of causal models the layers are what is new, not which of them count.
FEWER_FILTERS = ("all", "no embeddings", "biases")


def filters_for(engine, architecture):
    every = architecture in MASKED or (engine == "factored" and architecture in TYPICAL)
    chosen = FILTERS if every else FEWER_FILTERS
    return [name for name in chosen if not (architecture in WITHOUT_BIASES and FILTERS[name].only_biases)]


# The quick half of the cases counts every parameter, in float64; the rest repeats it with filters and in float32.
CASES = [
    pytest.param(engine, architecture, chosen, marks=() if chosen == "all" else pytest.mark.slow)
    for engine in ENGINES
    for architecture in (ARCHITECTURES if engine == "factored" else TYPICAL)
    for chosen in filters_for(engine, architecture)
]


def engine_kernel(engine, model, names, train, x, formula, train_tile=None, x_tile=None):
    problem = problem_of(model, names, train, x, formula)
    chosen = make_engine(problem, engine)
    plan = chosen.plan(TileRequest(train_tile, x_tile))
    kernel = assemble(chosen.blocks(plan), plan, problem)
    return kernel if problem.formula.is_asymmetric else kernel[0]


def unsure(gradients, dtype):
    """1 where a gradient is within float32's rounding of zero, so that its sign may fall either way."""
    return ((gradients.abs() < (1e-6 if dtype == torch.float32 else 0.0)) & (gradients != 0)).double()


def room_for_signs(of_train, of_x, formula, dtype):
    """How far a kernel may be from the oracle's because of signs that may fall either way; nothing in float64."""
    if formula == "sgd":
        return torch.zeros(())
    unsure_train, unsure_x = unsure(of_train, dtype), unsure(of_x, dtype)
    assert max(unsure_train.mean(), unsure_x.mean()) < 0.002, "the test would allow anything"
    if formula == "signgd":
        of_train, of_x = torch.ones_like(of_train), torch.ones_like(of_x)
    rooms = [
        2 * oracle.kernel(left, right, "sgd")
        for left, right in ((unsure_train, of_x.abs()), (of_train.abs(), unsure_x))
    ]
    return sum(rooms) if formula == "signgd" else torch.stack(rooms)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["float64", "float32"]
)
@pytest.mark.parametrize(("engine", "architecture", "chosen"), CASES)
def test_every_engine_formula_and_filter_agrees_with_the_oracle(engine, architecture, chosen, dtype, formula):
    size = 2 if engine == "jvp" else 3
    model = tiny_prompt_model(architecture, dtype)
    names = names_of(model, FILTERS[chosen], noise=formula == "sgd")
    of_train, of_x = (torch.cat([side[name] for name in names], -1)[:size] for side in gradients_by_name(architecture))
    truth = oracle.kernel(of_train, of_x, formula)
    train, x = (side[:size] for side in sides(architecture))
    found = engine_kernel(engine, model, names, train, x, formula, train_tile=2, x_tile=2)
    assert found.shape == truth.shape
    excess = ((found - truth).abs() - room_for_signs(of_train, of_x, formula, dtype)).clamp(min=0)
    if formula == "signgd":
        assert torch.equal(found, found.round())
        assert not excess.any()
    assert float(excess.norm() / truth.norm()) <= tolerance(engine, architecture, dtype)


@functools.cache
def longer_gradients(architecture):
    model = tiny_prompt_model(architecture, our_attention=False)
    names = names_of(model, ParameterFilter(), noise=False)
    return [oracle_gradients(model, names, prompts) for prompts in longer_sides(architecture)]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    ("architecture", "padded_on"),
    [*((name, "right") for name in ARCHITECTURES), *((name, "left") for name in TYPICAL_CAUSAL)],
)
def test_padded_batches_give_the_kernel_of_the_prompts_alone(architecture, padded_on, formula):
    train, x = longer_sides(architecture)
    model = tiny_prompt_model(architecture)
    names = names_of(model, ParameterFilter(), noise=False)
    of_train, of_x = longer_gradients(architecture)
    problem = problem_of(model, names, train, x, formula)
    problem = replace(problem, train=PaddedPrompts(train, padded_on), x=PaddedPrompts(x, padded_on))
    engine = make_engine(problem, "factored")
    plan = engine.plan()
    for examples, tile in ((problem.train, plan.tile_rows[0][0]), (problem.x, plan.tile_rows[0][1][0])):
        lengths = [
            {examples.shapes[index] for index in bucket}
            for bucket in length_buckets(examples, tile, DEFAULT_TUNING.batch_tokens)
        ]
        assert max(map(len, lengths)) > 1, "a batch is padded"
    found = assemble(engine.blocks(plan), plan, problem)
    truth = oracle.kernel(of_train, of_x, formula).reshape(found.shape)
    assert oracle.relative_error(found, truth) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_asymmetric_kernel_has_the_sign_on_the_train_side_first(engine):
    train, x = tiny_prompts([5, 9, 5], seed=5), tiny_prompts([6, 9], seed=6)
    model = tiny_prompt_model("roberta", binary=True)
    names = names_of(model, ParameterFilter(), noise=False)
    of_train, of_x = oracle_gradients(model, names, train), oracle_gradients(model, names, x)
    found = engine_kernel(engine, model, names, train, x, "asymmetric_signgd")
    assert found.shape == (2, 3, 1, 2, 1)
    by_hand = torch.einsum("iap,jbp->iajb", of_train.sign(), of_x)
    assert oracle.relative_error(found[0], by_hand) <= TOLERANCE[torch.float64]
    by_hand = torch.einsum("iap,jbp->iajb", of_train, of_x.sign())
    assert oracle.relative_error(found[1], by_hand) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    "unknown", [nn.RMSNorm, nn.Embedding, nn.Linear, LabelWordDecoder], ids=lambda kind: kind.__name__
)
def test_parameters_of_unknown_layers_are_differentiated_beside_all_the_others(unknown, formula, monkeypatch):
    """The jacobian engine gets them alone: not the label words' rows, by which the model then asks all the same."""
    model = tiny_prompt_model("llama")
    monkeypatch.delitem(LAYERS, unknown)  # after the model, which registers the layers of language models
    names = names_of(model, ParameterFilter())
    modules = dict(model.named_modules())
    of_unknown = [name for name in names if type(modules[name.rpartition(".")[0]]) is unknown]
    train, x = sides("llama")
    assert make_engine(problem_of(model, names, train, x), "factored").fallback_parameters == of_unknown != []
    of_train, of_x = (torch.cat([side[name] for name in names], -1) for side in gradients_by_name("llama"))
    found = engine_kernel("factored", model, names, train, x, formula, train_tile=2, x_tile=2)
    assert oracle.relative_error(found, oracle.kernel(of_train, of_x, formula)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_of_gpt2s_and_opts_positions_the_rows_that_occur_count(engine, architecture):
    """A row of position embeddings has a gradient where a prompt is that long, on both sides, and nowhere else."""
    train, x = prompts_for(architecture, [3, 7], seed=7), prompts_for(architecture, [5], seed=8)
    model = tiny_prompt_model(architecture)
    (name,) = [name for name, _ in model.named_parameters() if "wpe" in name or "embed_positions" in name]
    of_train, of_x = oracle_gradients(model, [name], train), oracle_gradients(model, [name], x)
    rows = of_train.unflatten(-1, (-1, 16)).any(dim=-1)[:, 0]
    first = {"gpt2": 0, "opt": 2}[architecture]
    assert [row.nonzero().flatten().tolist() for row in rows] == [list(range(first, first + n)) for n in (3, 7)]
    found = engine_kernel(engine, model, [name], train, x, "sgd")
    assert oracle.relative_error(found, oracle.kernel(of_train, of_x, "sgd")) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("formula", ["sgd", "signgd"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_train_kernel_is_symmetric_and_that_of_two_equal_sets(engine, formula):
    train = tiny_prompts(TRAIN_LENGTHS, seed=9)
    model = tiny_prompt_model("roberta")
    names = names_of(model, ParameterFilter(), noise=False)
    half = engine_kernel(engine, model, names, train, None, formula, train_tile=3)
    whole = engine_kernel(engine, model, names, train, train, formula)
    assert torch.equal(half, half.permute(2, 3, 0, 1))
    assert oracle.relative_error(half, whole) <= 1e-14


@pytest.mark.parametrize("engine", ENGINES)
def test_of_the_asymmetric_train_kernel_one_direction_is_the_other_transposed(engine):
    train = tiny_prompts(TRAIN_LENGTHS, seed=10)
    model = tiny_prompt_model("bert", binary=True)
    found = engine_kernel(
        engine, model, names_of(model, ParameterFilter(), noise=False), train, None, "asymmetric_signgd", train_tile=3
    )
    assert oracle.relative_error(found[1], found[0].permute(2, 3, 0, 1)) <= 1e-13


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    train_lengths=st.lists(st.integers(3, 9), min_size=1, max_size=4),
    x_lengths=st.lists(st.integers(3, 9), min_size=1, max_size=4),
    train_tile=st.integers(1, 5),
    x_tile=st.integers(1, 5),
    engine=st.sampled_from(sorted(ENGINES)),
    formula=st.sampled_from(sorted(FORMULAS)),
)
def test_tiles_of_any_size_give_the_same_kernel(train_lengths, x_lengths, train_tile, x_tile, engine, formula):
    train, x = tiny_prompts(train_lengths, seed=11), tiny_prompts(x_lengths, seed=12)
    model = tiny_prompt_model("distilbert")
    names = names_of(model, ParameterFilter(), noise=False)
    whole = engine_kernel("jacobian", model, names, train, x, formula, train_tile=9, x_tile=9)
    tiled = engine_kernel(engine, model, names, train, x, formula, train_tile=train_tile, x_tile=x_tile)
    assert oracle.relative_error(tiled, whole) <= 1e-12


def test_a_small_budget_takes_parameters_in_groups_and_changes_nothing():
    train, x = tiny_prompts(TRAIN_LENGTHS, seed=13), tiny_prompts(X_LENGTHS, seed=14)
    model = tiny_prompt_model("bert")
    names = names_of(model, ParameterFilter())
    roomy = engine_kernel("jacobian", model, names, train, x, "sgd")
    problem = problem_of(model, names, train, x)
    tight = ENGINES["jacobian"](problem, MemoryBudget(400_000))
    plan = tight.plan()
    assert tight.num_parameter_groups(plan) > 3
    assert tight.expected_bytes(plan) <= 400_000
    assert oracle.relative_error(assemble(tight.blocks(plan), plan, problem), roomy[None]) <= 1e-14


@pytest.mark.parametrize("engine", ENGINES)
def test_a_budget_too_small_for_one_tile_says_what_is_needed(engine):
    train = tiny_prompts([5], seed=15)
    model = tiny_prompt_model("bert")
    problem = problem_of(model, names_of(model, ParameterFilter()), train, None)
    with pytest.raises(MemoryBudgetError) as caught:
        ENGINES[engine](problem, MemoryBudget(1000)).plan()
    again = ENGINES[engine](problem, MemoryBudget(caught.value.needed))
    assert again.plan().pairs == 1


def test_several_processes_share_a_plan_and_their_sum_is_the_kernel():
    train, x = tiny_prompts(TRAIN_LENGTHS, seed=16), tiny_prompts(X_LENGTHS, seed=17)
    model = tiny_prompt_model("bert")
    problem = problem_of(model, names_of(model, ParameterFilter()), train, x)
    engine = ENGINES["jacobian"](problem, MemoryBudget(2**30))
    plan = engine.plan(TileRequest(3, 2))
    alone = assemble(engine.blocks(plan), plan, problem)
    shares = plan.partition(engine.estimate_cost(plan), 3)
    assert sum(share.pairs for share in shares) == plan.pairs == 20
    together = sum(assemble(engine.blocks(share), share, problem) for share in shares)
    assert torch.equal(together, alone)


class NoQuestions(TorchDispatchMode):
    """Fails where a GPU would have to finish all it has begun, to tell the host a number or a shape."""

    asking = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select", "equal")
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.asking, f"{function} asks the device for an answer"
        if function.overloadpacket is torch.ops.aten.index:
            assert not any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", CAUSAL)
def test_every_layer_of_a_causal_model_has_factors(architecture):
    """GPT-2's Conv1D and OPT's positions are taught to the factored engine, RMSNorms are made torch's."""
    model = tiny_prompt_model(architecture)
    train, x = sides(architecture)
    problem = problem_of(model, names_of(model, ParameterFilter()), train, x)
    assert list(make_engine(problem, "factored").fallback_parameters) == []


@pytest.mark.parametrize(
    ("architecture", "formula"),
    [*((name, formula) for name in MASKED for formula in FORMULAS), *((name, "sgd") for name in TYPICAL_CAUSAL)],
)
def test_the_factored_engine_asks_the_device_for_no_answer_inside_a_tile(architecture, formula, monkeypatch):
    """As on a GPU, where embeddings are matched by comparing tokens. Stand-in for a GPU, which no test may need."""
    model = tiny_prompt_model(architecture)
    # RoBERTa's head has a bias of its own that nothing uses.
    names = [name for name, _ in model.named_parameters() if name != "lm.lm_head.bias"]
    train, x = prompts_for(architecture, [6] * 3, seed=1), prompts_for(architecture, [7, 8, 7, 6, 8], seed=2)
    problem = problem_of(model, names, train, x, formula)
    tuning = Tuning(max_padding=1.0, batch_tokens=1000)  # one batch a tile
    problem = replace(problem, train=PaddedPrompts(train), x=PaddedPrompts(x))
    engine = ENGINES["factored"](problem, MemoryBudget(2**30), tuning)
    assert not engine.fallback_parameters
    plan = engine.plan(TileRequest(2, 2))
    expected = assemble(engine.blocks(plan), plan, problem)
    monkeypatch.setattr(
        EmbeddingLayer,
        "kernel",
        lambda layer, train, x, directions, workspace: embedding._match_by_mask(train, x, directions, workspace),
    )
    with NoQuestions():
        blocks = list(engine.blocks(plan))
    assert len(blocks) == 6
    torch.testing.assert_close(assemble(blocks, plan, problem), expected, rtol=1e-12, atol=1e-12)
    with NoQuestions(), pytest.raises(AssertionError, match="asks the device"):
        torch.tensor([1, 0]).nonzero()


@pytest.mark.parametrize("formula", FORMULAS)
def test_an_engine_takes_over_from_the_one_before_without_changing_a_bit(formula, monkeypatch):
    model = tiny_prompt_model("bert", torch.float32)
    names = names_of(model, ParameterFilter(), noise=False)
    train, x = sides("bert")
    first = make_engine(problem_of(model, names, train, None, formula), "factored")
    list(first.blocks(first.plan()))
    second = make_engine(problem_of(model, names, train, x, formula), "factored", earlier=first)
    propagated = []
    propagate = capture.factors
    monkeypatch.setattr(
        capture, "factors", lambda layers, model, batch, *rest: (
            propagated.append(len(batch["input_ids"])), propagate(layers, model, batch, *rest)
        )[1]
    )  # fmt: skip
    problem = problem_of(model, names, train, x, formula)
    plan = second.plan()
    found = assemble(second.blocks(plan), plan, problem)
    assert sum(propagated) == len(x), "the train examples are not propagated again"
    alone = make_engine(problem, "factored")
    assert torch.equal(found, assemble(alone.blocks(plan), plan, problem))


def test_an_engine_that_takes_over_still_compares_layers_on_the_other_side(monkeypatch):
    model = tiny_prompt_model("bert")
    names = names_of(model, ParameterFilter(), noise=False)
    train, x = sides("bert")
    first = make_engine(problem_of(model, names, train, None, "sgd"), "factored")
    compared = []
    monkeypatch.setattr(
        layer_selection, "_matching_autograd", lambda layers, model, batch, *rest: compared.append(batch) or layers
    )
    make_engine(problem_of(model, names, train, x, "sgd"), "factored", earlier=first)
    assert 0 < sum(len(batch["input_ids"]) for batch in compared) <= DEFAULT_TUNING.probe_batch
