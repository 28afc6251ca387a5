"""Plans: every pair once, whoever computes it, and a fair share for every process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_problems import names_of, problem_of
from lmntk.kernels import ENGINES, MemoryBudget
from lmntk.kernels.tiling import CostModel, Tile, TileSize, even_tile_size, make_plan, tiles_per_axis
from lmntk.models.parameters import ParameterFilter
from tiny_models import tiny_prompt_model, tiny_prompts


def by_tokens(train: list[int], x: list[int]) -> CostModel:
    """A pace at which a token of a train tile takes two seconds, and one of an X tile as many as there are rows."""
    return CostModel(
        row=lambda rows: 2.0 * sum(train[i] for i in rows),
        tile=lambda tile: float(len(tile.train) * sum(x[j] for j in tile.x)),
    )


@given(
    train=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    x=st.lists(st.integers(1, 9), max_size=9),
    train_tile=st.integers(1, 10),
    x_tile=st.integers(1, 10),
    processes=st.integers(1, 5),
)
def test_every_pair_is_computed_once_by_one_process(train, x, train_tile, x_tile, processes):
    plan = make_plan(train, x, TileSize(train_tile, x_tile))
    shares = plan.partition(by_tokens(train, x), processes)
    pairs = [(i, j) for share in shares for tile in share for i in tile.train for j in tile.x]
    assert sorted(pairs) == [(i, j) for i in range(len(train)) for j in range(len(x))]


@given(train=st.lists(st.integers(1, 9), min_size=1, max_size=9), tile=st.integers(1, 10))
def test_of_a_symmetric_plan_every_pair_or_its_mirror_is_there_once(train, tile):
    plan = make_plan(train, train, TileSize(tile, tile), symmetric=True)
    seen = [
        pair
        for part in plan
        for i in part.train
        for j in part.x
        for pair in ({(i, j)} if part.train == part.x else {(i, j), (j, i)})
    ]
    assert sorted(seen) == [(i, j) for i in range(len(train)) for j in range(len(train))]


@pytest.mark.parametrize(
    ("size", "examples", "parts", "expected"),
    [
        (32, 100, 1, 25),
        (256, 300, 4, 75),
        (32, 3, 4, 1),
        (256, 277, 6, 47),
        (9, 0, 2, 1),
        (256, 872, 1, 218),
        (256, 872, 2, 218),
        (8, 9, 1, 5),
    ],
)
def test_tiles_are_equal_and_as_many_for_every_process(size, examples, parts, expected):
    assert even_tile_size(size, examples, parts) == expected


@pytest.mark.parametrize(
    ("train", "x", "processes", "symmetric", "expected"),
    [
        (32, 1000, 1, False, (1, 1)),
        (32, 1000, 2, False, (1, 4)),  # few train examples are taken by every process
        (1024, 1000, 64, False, (16, 8)),  # many are shared like X: two tiles of 64 × 125 examples each
        (32, 32, 2, True, (3, 3)),  # 6 tiles of a triangle
        (1024, 1024, 64, True, (16, 16)),  # 136
    ],
)
def test_several_processes_share_both_axes_where_both_are_long(train, x, processes, symmetric, expected):
    rows, columns = tiles_per_axis(train, x, processes, symmetric, tokens=30, num_logits=2)
    assert (rows, columns) == expected
    tiles = rows * (rows + 1) // 2 if symmetric else rows * columns
    assert tiles >= 2 * processes or processes == 1


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("itself", [True, False], ids=["train × train", "train × x"])
@pytest.mark.parametrize("engine", ["factored", "jacobian"])
def test_every_process_has_work(engine, itself, processes):
    model = tiny_prompt_model("bert")
    train, x = tiny_prompts([5] * 6, seed=1), tiny_prompts([6] * 7, seed=2)
    problem = problem_of(model, names_of(model, ParameterFilter()), train, None if itself else x)
    built = ENGINES[engine](problem, MemoryBudget(2**28))
    plan = built.plan(processes=processes)
    pace = CostModel(row=lambda train: 0.0, tile=lambda tile: float(tile.pairs))
    pairs = [share.pairs for share in plan.partition(pace, processes)]
    assert min(pairs) > 0
    assert sum(pairs) == plan.pairs


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_tiles_are_dealt_by_cost_not_by_count(processes):
    lengths = [2 + 3 * (i % 40) for i in range(277)]
    train = [20] * 8
    plan = make_plan(train, lengths, TileSize(8, even_tile_size(256, 277, 2 * processes)))
    pace = by_tokens(train, lengths)
    loads = [share.seconds(pace) for share in plan.partition(pace, processes)]
    # Two equal tiles each, a long one with a short one: the sums of a linear order are all alike, but for rounding.
    assert max(loads) <= 1.05 * sum(loads) / processes
    by_count = [plan.restricted_to(list(plan)[rank::processes]).seconds(pace) for rank in range(processes)]
    assert max(loads) < max(by_count)


def test_a_process_keeps_to_few_train_tiles_where_these_are_what_costs():
    plan = make_plan([5] * 4, [5] * 4, TileSize(2, 2))
    pace = CostModel(row=lambda rows: 10.0, tile=lambda tile: 1.0)
    first, second = plan.partition(pace, 2)
    assert [len({tile.train for tile in share}) for share in (first, second)] == [1, 1]
    assert plan.seconds(pace) == 24.0
    assert [first.seconds(pace), second.seconds(pace)] == [12.0, 12.0]


def test_a_part_of_a_plan_keeps_its_order_and_its_sizes():
    plan = make_plan([3] * 3, [3] * 4, TileSize(2, 2))
    kept = [Tile((2, 1), (1, 0)), Tile((0,), (3, 2))]
    part = plan.restricted_to(kept)
    assert list(part) == kept
    assert (part.tile_size, part.train_size, part.x_size) == (TileSize(2, 2), 3, 4)
