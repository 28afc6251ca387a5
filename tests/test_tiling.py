"""Plans: every pair once, whoever computes it, and a fair share for every process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmntk.kernels import ENGINES
from lmntk.kernels.tiling import fair, make_plan
from lmntk.parameters import ParameterFilter
from test_engines import names_of, problem_of
from tiny_models import tiny_prompt_model, tiny_prompts


@given(
    train=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    x=st.lists(st.integers(1, 9), max_size=9),
    train_tile=st.integers(1, 10),
    x_tile=st.integers(1, 10),
    processes=st.integers(1, 5),
)
def test_every_pair_is_computed_once_by_one_process(train, x, train_tile, x_tile, processes):
    plan = make_plan(train, x, train_tile, x_tile)
    shares = [plan.share(rank, processes) for rank in range(processes)]
    pairs = [(i, j) for share in shares for tile in share for i in tile.train for j in tile.x]
    assert sorted(pairs) == [(i, j) for i in range(len(train)) for j in range(len(x))]


@given(train=st.lists(st.integers(1, 9), min_size=1, max_size=9), tile=st.integers(1, 10))
def test_of_a_symmetric_plan_every_pair_or_its_mirror_is_there_once(train, tile):
    plan = make_plan(train, train, tile, tile, symmetric=True)
    seen = [
        pair
        for part in plan
        for i in part.train
        for j in part.x
        for pair in ({(i, j)} if part.train == part.x else {(i, j), (j, i)})
    ]
    assert sorted(seen) == [(i, j) for i in range(len(train)) for j in range(len(train))]


@pytest.mark.parametrize(
    ("size", "examples", "processes", "expected"),
    [
        (32, 100, 1, 25),
        (256, 300, 4, 75),
        (32, 3, 4, 1),
        (9, 0, 2, 1),
        (256, 872, 1, 218),
        (256, 872, 2, 218),
        (8, 9, 1, 5),
    ],
)
def test_tiles_are_equal_and_as_many_for_every_process(size, examples, processes, expected):
    assert fair(size, examples, processes) == expected


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("itself", [True, False], ids=["train × train", "train × x"])
@pytest.mark.parametrize("engine", ["factored", "jacobian"])
def test_every_process_has_work(engine, itself, processes):
    model = tiny_prompt_model("bert")
    train, x = tiny_prompts([5] * 6, seed=1), tiny_prompts([6] * 7, seed=2)
    problem = problem_of(model, names_of(model, ParameterFilter()), train, None if itself else x)
    plan = ENGINES[engine](problem, 2**28).plan(processes=processes)
    shares = [plan.share(rank, processes).pairs for rank in range(processes)]
    assert min(shares) > 0
    assert sum(shares) == plan.pairs
