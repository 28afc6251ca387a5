"""K(x, x) of every engine against per-example autograd in float64, beside a kernel whose bytes stay as they are."""

from dataclasses import replace

import pytest
import torch

import oracle
from engine_problems import TOLERANCE, gradients_by_name, longer_sides, names_of, oracle_gradients, problem_of, sides
from lmntk.kernels import ENGINES, FORMULAS, MemoryBudget, TileRequest
from lmntk.kernels.assembly import assemble, assemble_diagonal, make_engine
from lmntk.kernels.layers import LAYERS, Layer
from lmntk.kernels.tuning import DEFAULT_TUNING
from lmntk.models.parameters import ParameterFilter
from tiny_models import PaddedPrompts, tiny_prompt_model, tiny_prompts

FILTERS = {
    "all": ParameterFilter(),
    "biases": ParameterFilter(only_biases=True),
    "no embeddings": ParameterFilter(exclude_embeddings=True),
}


def true_diagonal(of_x, formula):
    """The oracle's K(x, x), ``[D, X, C, C]``, from gradients ``[X, C, P]``."""
    pairs = oracle.kernel(of_x, of_x, formula)
    pairs = pairs if pairs.dim() == 5 else pairs[None]
    return torch.stack([pairs[:, i, :, i] for i in range(len(of_x))], dim=1)


def with_diagonal(engine, plan):
    """The kernel and the diagonal that an engine computes together."""
    problem = engine.problem
    wanted = problem.tiles_with_diagonal(plan)
    groups = range(engine.num_parameter_groups(plan))
    computed = [tile for group in groups for tile in engine.tiles_of_group(plan, group, wanted)]
    kernel = assemble([(tile, block) for tile, block, _ in computed], plan, problem)
    found = [(tile.x, diagonal) for tile, _, diagonal in computed if diagonal is not None]
    assert len(found) == len(wanted) * len(groups)
    return kernel, assemble_diagonal(found, problem)


def diagonal_alone(engine, plan):
    groups = range(engine.num_parameter_groups(plan))
    xs = plan.tile_rows[0].x_tiles
    return assemble_diagonal(((x, engine.diagonal(plan, x, group)) for group in groups for x in xs), engine.problem)


CASES = [
    *((engine, "roberta", "all") for engine in ENGINES),
    *(("factored", "roberta", chosen) for chosen in ("biases", "no embeddings")),
    ("factored", "gpt2", "all"),
]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(("engine", "architecture", "chosen"), CASES)
def test_the_diagonal_is_the_oracles_and_the_kernel_keeps_its_bytes(engine, architecture, chosen, formula):
    size = 2 if engine == "jvp" else 3
    model = tiny_prompt_model(architecture)
    names = names_of(model, FILTERS[chosen], noise=formula == "sgd")
    of_x = torch.cat([gradients_by_name(architecture)[1][name] for name in names], -1)[:size]
    truth = true_diagonal(of_x, formula)
    train, x = (side[:size] for side in sides(architecture))
    made = make_engine(problem_of(model, names, train, x, formula), engine)
    plan = made.plan(TileRequest(2, 2))
    kernel, found = with_diagonal(made, plan)
    assert torch.equal(kernel, assemble(made.blocks(plan), plan, made.problem))
    assert oracle.relative_error(found, truth) <= TOLERANCE[torch.float64]
    assert oracle.relative_error(diagonal_alone(made, plan), truth) <= TOLERANCE[torch.float64]
    if formula == "signgd":
        assert torch.equal(found, found.round())


# What decides between Gram matrices, formed gradients and bits of signs.
WAYS = {
    "gram": {"dense_efficiency": 1e-9},
    "formed": {"dense_efficiency": 1e9},
    "formed in pieces": {"dense_efficiency": 1e9, "cache_bytes": 1, "min_weight_rows": 3, "dense_gradient_batch": 2},
    "bits": {"sign_bits_flops": 0},
}


@pytest.mark.parametrize(
    ("way", "formula"),
    [("gram", "sgd"), ("formed", "sgd"), ("bits", "signgd"), *(("formed in pieces", formula) for formula in FORMULAS)],
)
def test_every_way_to_multiply_gives_the_diagonal_of_padded_batches(way, formula):
    train, x = longer_sides("roberta")
    model = tiny_prompt_model("roberta")
    names = names_of(model, ParameterFilter(), noise=False)
    truth = true_diagonal(oracle_gradients(model, names, x), formula)
    problem = problem_of(model, names, train, x, formula)
    problem = replace(problem, train=PaddedPrompts(train, "right"), x=PaddedPrompts(x, "right"))
    made = make_engine(problem, "factored", tuning=replace(DEFAULT_TUNING, **WAYS[way]))
    plan = made.plan()
    for found in (with_diagonal(made, plan)[1], diagonal_alone(made, plan)):
        assert oracle.relative_error(found, truth) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_diagonal_of_the_train_examples_is_that_of_their_kernel(engine, formula):
    train = tiny_prompts([5, 9, 5], seed=5)
    model = tiny_prompt_model("roberta")
    names = names_of(model, ParameterFilter(), noise=False)
    made = make_engine(problem_of(model, names, train, train, formula), engine)
    kernel, found = with_diagonal(made, made.plan())
    blocks = torch.stack([kernel[:, i, :, i] for i in range(3)], dim=1)
    torch.testing.assert_close(found, blocks, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], found[-1].transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_a_kernel_of_train_with_itself_has_no_diagonal_apart():
    model = tiny_prompt_model("roberta")
    made = make_engine(problem_of(model, names_of(model, ParameterFilter()), tiny_prompts([5, 6], seed=1), None))
    assert made.problem.tiles_with_diagonal(made.plan()) == frozenset()


@pytest.mark.parametrize("formula", ["asymmetric_signgd"])
def test_layers_that_no_type_knows_add_to_the_diagonal_in_groups(formula, monkeypatch):
    """The jacobian engine takes them, in several tiles and groups where memory is short."""
    monkeypatch.delitem(LAYERS, torch.nn.Embedding)
    train, x = tiny_prompts([5, 9, 5], seed=5), tiny_prompts([6, 9, 7], seed=6)
    model = tiny_prompt_model("roberta")
    names = names_of(model, ParameterFilter(), noise=False)
    truth = true_diagonal(oracle_gradients(model, names, x), formula)
    roomy = make_engine(problem_of(model, names, train, x, formula), "factored")
    assert roomy.fallback_parameters
    tight = make_engine(problem_of(model, names, train, x, formula), "jacobian", MemoryBudget(2**19))
    assert tight.num_parameter_groups(tight.plan()) > 1
    for made in (roomy, tight):
        for found in (with_diagonal(made, made.plan())[1], diagonal_alone(made, made.plan())):
            assert oracle.relative_error(found, truth) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("formula", ["asymmetric_signgd"])
def test_a_layer_type_without_its_own_way_takes_the_pairs_of_the_tile(formula, monkeypatch):
    train, x = tiny_prompts([5, 9], seed=5), tiny_prompts([6, 9, 7], seed=6)
    model = tiny_prompt_model("roberta")
    names = names_of(model, ParameterFilter(), noise=False)
    truth = true_diagonal(oracle_gradients(model, names, x), formula)
    made = make_engine(problem_of(model, names, train, x, formula), "factored")
    for layer_type in {*LAYERS.values()}:
        monkeypatch.setattr(layer_type, "diagonal", Layer.diagonal)
    found = diagonal_alone(made, made.plan())
    assert oracle.relative_error(found, truth) <= TOLERANCE[torch.float64]
