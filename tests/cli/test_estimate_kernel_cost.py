"""tools/estimate_kernel_cost.py: its counts against counts by hand, and against the engine on a real model."""

from dataclasses import replace

import pytest
import torch

from lmntk.commands import estimate as command
from lmntk.kernels import FORMULAS, KernelProblem, MemoryBudget, ModuleModel, TileRequest
from lmntk.kernels.cost_model import (
    SHAPES,
    Lengths,
    ModelShape,
    cost_of_shape,
    planner_of_shape,
    spread_lengths,
)
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.problem import KernelSides
from lmntk.kernels.tiling import Tile
from lmntk.kernels.tuning import DEFAULT_TUNING
from tiny_models import PaddedPrompts, tiny_prompt_model, tiny_prompts

SMALL = ModelShape(layers=2, hidden=4, intermediate=8, vocabulary=10)
SMALL_FLAGS = ["--layers", "2", "--hidden", "4", "--intermediate", "8", "--vocabulary", "10"]


ANY = TileRequest()


def sides_of(train, x, logits=2, formula="sgd"):
    """Examples of these lengths."""
    other = None if x is None else Lengths(x)
    return KernelSides(train=Lengths(train), x=other, formula=FORMULAS[formula], num_logits=logits)


def counted(train, x, logits=2, formula="sgd"):
    """The plan of the small shape for examples of these lengths, and its cost at one product a second."""
    sides = sides_of(train, x, logits, formula)
    planner = planner_of_shape(SMALL, sides, MemoryBudget(2**30))
    return planner.plan(ANY, 1), cost_of_shape(SMALL, sides, planner, 1 / DEFAULT_TUNING.product_efficiency)


def task_of(*flags):
    """The kernels that the flags describe."""
    return command.task_of(command.make_parser().read([*flags]))


def test_a_shape_is_counted_as_by_hand():
    # Formed: one layer whole, 4 · 16 + 2 · 32, and keys and values of the last, 2 · 16.
    assert SMALL.dense_numel == 160
    # One position: the last layer's query, output and feed-forward, 2 · 16 + 2 · 32, and the head, 16.
    assert SMALL.single_position_numel == 112
    # Two layers of 172, embeddings of 10 + 512 + 2 rows of 4, three norms' and the head's 16 + 20, the decoder's bias.
    assert SMALL.parameters == 2 * 172 + 524 * 4 + 36 + 10
    assert SMALL.model_bytes == 4 * (SMALL.parameters + 40)
    # A token: 20 + 2 · 28 of the first layer, 4 + 4 · 4 of the last, 3 · (8 + 2) of embeddings: 126. An example of five
    # tokens: 20 + 2 · 20 and 8 + 2 · 6 of matrices, 2 · (56 + 6) of biases, 2 · 6 · 8 of norms: 300.
    assert SMALL.factor_bytes(logits=2, tokens=5) == 4 * (126 + 300 // 5)


@pytest.mark.parametrize(("name", "millions"), [("bert-base", 110), ("roberta-large", 355), ("1b", 1015)])
def test_the_shapes_have_as_many_parameters_as_their_models(name, millions):
    assert round(SHAPES[name].parameters / 1e6) == millions


def test_seconds_are_those_of_a_count_by_hand():
    plan, cost = counted([5] * 3, [5] * 2)
    ((train, (x,)),) = plan.tile_rows
    # 15 tokens of 3 · 2 · (160 + 112 / 5) flops.
    assert cost.row(train) == pytest.approx(16416)
    # X: 10 tokens alike; forming: 2 · 160 · 2 logits · 25 tokens; contraction: 2 · 160 · 4 · 6 pairs.
    assert cost.tile(Tile(train, x)) == pytest.approx(10944 + 16000 + 7680)
    assert plan.seconds(cost) == pytest.approx(16416 + 34624)


def test_the_train_examples_with_themselves_are_propagated_once():
    plan, cost = counted([5] * 3, None)
    # Forming of 15 tokens, and 9 pairs.
    assert plan.seconds(cost) == pytest.approx(16416 + 9600 + 11520)


def test_a_formula_of_two_directions_multiplies_twice():
    tile = Tile((0, 1, 2), (0, 1))
    once, twice = (counted([5] * 3, [5] * 2, 1, name)[1].tile(tile) for name in ("sgd", "asymmetric_signgd"))
    assert twice - once == pytest.approx(2 * 160 * 6)


def test_disk_and_memory_of_a_small_task_are_those_of_a_count_by_hand():
    found = task_of(*SMALL_FLAGS, "--k", "4", "--x_examples", "5", "--tokens", "5").estimate(1)
    assert found.kernels == [8 * 8 * 8 * 4, 8 * 8 * 8 * 4, 8 * 8 * 5 * 4]
    assert found.disk == 4 * SMALL.parameters + 5376 + 2048
    lengths = spread_lengths(8, 5)
    planner = planner_of_shape(SMALL, sides_of(lengths, lengths), MemoryBudget(2**36))
    assert found.memory == SMALL.model_bytes + planner.expected_bytes(planner.plan(ANY, 1))
    assert (found.tiles, found.balance) == (3, 1)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_the_counts_are_what_the_engine_says_of_a_real_model(architecture, binary):
    model = tiny_prompt_model(architecture, torch.float32, binary).requires_grad_(False)
    train, x = PaddedPrompts(tiny_prompts([12] * 8)), PaddedPrompts(tiny_prompts([12] * 6, seed=1))
    # Not tied in the tiny RoBERTa, and nothing that a real one has.
    names = [name for name, _ in model.named_parameters() if name != "lm.lm_head.bias"]
    logits_fn, params = model.as_function(names, range(64))
    sides = {"train": train, "x": x, "formula": FORMULAS["sgd"], "num_logits": model.num_logits}
    problem = KernelProblem(**sides, model=ModuleModel(logits_fn, model), params=params)
    engine = FactoredEngine(problem, MemoryBudget(2**30))
    planner = planner_of_shape(ModelShape(2, 16, 24, 64), KernelSides(**sides), MemoryBudget(2**30))
    assert engine.fallback_parameters == []
    # Both are rounded to whole bytes a token.
    assert planner.memory.per_token == pytest.approx(engine.planner.memory.per_token, abs=1)
    assert replace(planner.memory, per_token=1) == replace(engine.planner.memory, per_token=1)
    assert replace(planner.demands, per_token=1) == replace(engine.planner.demands, per_token=1)
    assert planner.plan(ANY, 2) == engine.plan(processes=2)
    bytes_of_both = [planner.expected_bytes(planner.plan(ANY, 1)), engine.expected_bytes(engine.plan())]
    assert bytes_of_both[0] == pytest.approx(bytes_of_both[1], rel=1e-3)


def test_64_processes_are_done_at_nearly_the_same_time():
    found = task_of("--k", "64").estimate(64)
    assert 1 <= found.balance <= 1.2
    alone = task_of("--k", "64").estimate(1)
    assert found.total_seconds < alone.total_seconds / 8
    assert found.memory <= alone.memory


def test_prompts_are_as_long_as_asked_on_average():
    drawn = spread_lengths(1000, 30)
    assert sum(drawn) / 1000 == pytest.approx(30, rel=0.01)
    assert (min(drawn), max(drawn)) == (8, 60)


def test_the_table_has_a_row_for_each_number_of_processes(capsys):
    assert command.main([*SMALL_FLAGS, "--k", "8", "--processes", "1", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert [row[0] for row in cells] == ["processes", cells[1][0], "1", "3"]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert dict(zip(cells[0], cells[2], strict=True))["speed-up"] == "1.0"
    assert "checkpoint 0.00 GB" in lines[-1]


def test_tiles_can_be_given_as_in_a_run(capsys):
    tiles = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "5"]
    assert command.main([*SMALL_FLAGS, *tiles, "--k", "4", "--x_examples", "10", "--processes", "2"]) == 0
    # 8 train examples are two tiles of 4: three pairs of them; with 8 and 10 of X, two rows of two tiles each.
    assert capsys.readouterr().out.splitlines()[2].split()[1:4:2] == ["2", "11"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--memory_gb", "1"], "--memory_gb: the tiles of train × train take 3.2 GB with the model"),
        (["--k", "0"], "--k is 0, but it must be from 1 to 1000000"),
        (["--processes", "4", "0"], "--processes is 0, but it must be from 1 to 1000000"),
        (["--rate", "nan"], "--rate is nan, but it must be from 1e-06 to 1000000000.0"),
        (["--rate", "inf"], "--rate is inf, but it must be from 1e-06 to 1000000000.0"),
        (["--rate", "0"], "--rate is 0.0, but it must be from 1e-06 to 1000000000.0"),
        (["--memory_gb", "nan"], "--memory_gb is nan, but it must be above 0, up to 1000000000.0"),
        (["--memory_gb", "-1"], "--memory_gb is -1.0, but it must be above 0, up to 1000000000.0"),
        (["--memory_gb", "1e300"], "--memory_gb is 1e+300, but it must be above 0, up to 1000000000.0"),
        (["--formula", "asymmetric_signgd", "--logits", "2"], "--formula asymmetric_signgd takes --logits 1"),
        (["--wrong", "1"], "unknown flag '--wrong'"),
    ],
)
def test_what_cannot_be_is_an_error_in_a_sentence(flags, sentence, capsys):
    assert command.main(flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_the_memory_that_an_error_names_is_enough():
    found = task_of("--memory_gb", "3.2", "--k", "1", "--x_examples", "2").estimate(1)
    assert found.memory <= 3.2 * 2**30
