"""Signs as bits: the same counts as the products of -1, 0 and +1, whatever the shapes, zeros and threads."""

import math
import multiprocessing
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lmntk.kernels
from engine_problems import names_of, problem_of
from lmntk.kernels import (
    FORMULAS,
    BatchedExamples,
    Formula,
    KernelProblem,
    MemoryBudget,
    TileRequest,
    Tuning,
    functional,
    sign_bits,
)
from lmntk.kernels.assembly import assemble
from lmntk.kernels.engines.base import ANY_TILES
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers import Workspace
from lmntk.kernels.layers.linear_factors import OuterProducts
from lmntk.kernels.layers.linear_signs import WeightSigns
from lmntk.kernels.sign_bits import SignPlanes, sign_products
from lmntk.models.parameters import ParameterFilter
from tiny_models import ARCHITECTURES, prompts_for, tiny_prompt_model

pytest.importorskip("numba")
ALWAYS, NEVER = Tuning(sign_bits_flops=0), Tuning(sign_bits_flops=math.inf)


def gradients(rows: int, length: int, zeros: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers, some of which are zero, not finite or too small for anything but a sign."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, length, generator=generator, dtype=dtype)
    found[torch.rand(rows, length, generator=generator) < zeros] = 0
    special = torch.tensor([-0.0, math.nan, math.inf, -math.inf, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny / 4])
    place = torch.randint(0, length, (len(special),), generator=generator)
    if zeros:
        found[0, place] = special.to(dtype)
    return found


def counts(left: Tensor, right: Tensor) -> Tensor:
    return left.sign().nan_to_num(0).long() @ right.sign().nan_to_num(0).long().T


@settings(max_examples=60, deadline=None)
@given(
    rows=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    length=st.one_of(st.integers(1, 200), st.sampled_from([512 * 64, 512 * 64 + 1, 2 * 512 * 64 - 1, 70_000])),
    zeros=st.tuples(st.sampled_from([0, 1e-4, 0.3, 1]), st.sampled_from([0, 0.3])),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_products_of_planes_are_those_of_signs(rows, length, zeros, dtype, seed):
    left, right = (gradients(rows[side], length, zeros[side], dtype, seed + side) for side in (0, 1))
    found = sign_products(SignPlanes.of(left), SignPlanes.of(right))
    assert found.dtype == torch.int64
    assert torch.equal(found, counts(left, right))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    cut=st.integers(0, 4),
    zeros=st.lists(st.sampled_from([0, 0.2]), min_size=3, max_size=3),
    step=st.integers(1, 3),
)
def test_planes_may_be_packed_in_pieces_and_joined(sizes, cut, zeros, step):
    length = 300
    whole, parts = [], []
    for size, share in zip(sizes, zeros, strict=False):
        rows = gradients(step * size, length, share, torch.float32, seed=size)
        planes = SignPlanes(step * size, length)
        for first in range(step):
            for start, stop in ((64 * cut, length), (0, 64 * cut)):
                planes.pack(rows[first::step, start:stop].contiguous(), start, first, step)
        whole.append(rows)
        parts.append(planes)
    joined = SignPlanes.join(parts)
    assert torch.equal(sign_products(joined, joined), counts(torch.cat(whole), torch.cat(whole)))


def test_a_second_plane_is_kept_only_where_there_are_zeros():
    rows = torch.ones(3, 100)
    assert SignPlanes.of(rows).nonzero is None
    rows[1, 70] = 0
    assert SignPlanes.of(rows).nonzero is not None


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sign_bits, "PACKED_PER_THREAD", 1)
    monkeypatch.setattr(sign_bits, "WORDS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 11])
def test_threads_share_the_rows(rows, two_threads):
    left, right = (gradients(size, 500, 0.1, torch.float32, seed=size) for size in (rows, 7))
    assert torch.equal(sign_products(SignPlanes.of(left), SignPlanes.of(right)), counts(left, right))


def _products_in_child(queue, left: Tensor) -> None:
    queue.put(sign_products(SignPlanes.of(left), SignPlanes.of(left)).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_process_that_forks_after_its_threads_worked_leaves_working_children(two_threads):
    left = gradients(9, 500, 0.1, torch.float32, seed=0)
    assert torch.equal(sign_products(SignPlanes.of(left), SignPlanes.of(left)), counts(left, left))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_products_in_child, args=(queue, left))
    child.start()
    assert queue.get(timeout=60) == counts(left, left).tolist()
    child.join()


def test_loops_are_compiled_where_no_folder_can_keep_them(monkeypatch):
    import numba

    from lmntk.kernels import sign_bits_compiled

    def njit(cache: bool = False, **flags):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(numba, "njit", njit)
    assert sign_bits_compiled._compiled(len) == ("compiled", len)


def test_the_compiled_loops_agree_with_their_caller_on_block_sizes():
    from lmntk.kernels import sign_bits_compiled

    assert (sign_bits.ROW_MULTIPLE, sign_bits.BLOCK_WORDS) == (sign_bits_compiled.ROWS, sign_bits_compiled.WORDS)


@pytest.mark.parametrize("widths", [(4, 9), (9, 4), (5, 5), (64, 3)])
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
    capacity=st.sampled_from([1, 600, 10**6]),
    cache=st.sampled_from([4, 3000, 2**22]),
)
def test_signs_of_a_batch_are_those_of_its_gradients(widths, shape, capacity, cache):
    """In pieces of any size; a wide weight is formed transposed, which changes no product."""
    (d_out, d_in), (b, positions, c) = widths, shape
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(b, positions, d_in, generator=generator, dtype=torch.float64)
    outputs = [torch.randn(b, positions, d_out, generator=generator, dtype=torch.float64) for _ in range(c)]
    workspace = Workspace(capacity, torch.float64, torch.device("cpu"))
    signs = WeightSigns.of(OuterProducts(inputs, outputs, None), workspace, Tuning(sign_cache_bytes=cache))
    formed = torch.stack([output.transpose(1, 2) @ inputs for output in outputs], dim=1).flatten(0, 1).flatten(1)
    assert torch.equal(sign_products(signs.planes, signs.planes), counts(formed, formed))


def engine_of(architecture: str, tuning: Tuning, budget: int = 2**28, formula: str = "signgd") -> FactoredEngine:
    model = tiny_prompt_model(architecture, torch.float64)
    train, x = prompts_for(architecture, [4, 6, 1, 9], seed=1), prompts_for(architecture, [5, 1, 6], seed=2)
    return FactoredEngine(
        problem_of(model, names_of(model, ParameterFilter()), train, x, formula), MemoryBudget(budget), tuning
    )


def kernel_of(engine: FactoredEngine, tiles: TileRequest = ANY_TILES) -> Tensor:
    with torch.no_grad():
        plan = engine.plan(tiles)
        assert engine.planner.expected_bytes(plan) <= engine.budget.bytes
        return assemble(engine.blocks(plan), plan, engine.problem)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bits_and_floating_point_signs_make_one_kernel(architecture):
    bits, floats = engine_of(architecture, ALWAYS), engine_of(architecture, NEVER)
    assert bits.planner.keeps_signs
    assert not floats.planner.keeps_signs
    whole = kernel_of(floats)
    assert torch.equal(kernel_of(bits), whole)
    assert torch.equal(kernel_of(bits, TileRequest(3, 2)), whole)


def forget_whether_loops_work(request: pytest.FixtureRequest) -> None:
    sign_bits._loops_work.cache_clear()
    request.addfinalizer(sign_bits._loops_work.cache_clear)


@pytest.mark.parametrize(
    "error", [NotImplementedError("no intrinsics"), SystemError("initialization of _internal failed"), OSError(28, "")]
)
@pytest.mark.parametrize("broken", ["import", "pack", "add_products"])
def test_a_numba_that_does_not_work_is_named_once_and_not_used(error, broken, monkeypatch, request, caplog):
    expected = kernel_of(engine_of("bert", NEVER))
    loops, asked = sign_bits._loops(), []

    def fail(*_):
        asked.append(error)
        raise error

    if broken == "import":
        monkeypatch.setattr(sign_bits, "_loops", fail)
    else:
        monkeypatch.setattr(loops, broken, fail)
    forget_whether_loops_work(request)
    for _ in range(2):
        engine = engine_of("bert", ALWAYS)
        assert not engine.planner.keeps_signs
    assert torch.equal(kernel_of(engine), expected)
    assert len(asked) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "numba cannot be used" in caplog.text and repr(error) in caplog.text


def test_loops_that_count_wrong_are_not_used(monkeypatch, request):
    monkeypatch.setattr(sign_bits, "sign_products", lambda left, right: torch.tensor([[3]]))
    forget_whether_loops_work(request)
    assert not engine_of("bert", ALWAYS).planner.keeps_signs


def test_whether_numba_works_is_not_asked_where_signs_would_not_be_used(monkeypatch):
    monkeypatch.setattr(sign_bits, "_loops_work", lambda dtype: pytest.fail("asked"))
    assert not engine_of("bert", Tuning()).planner.keeps_signs
    assert not engine_of("bert", ALWAYS, formula="sgd").planner.keeps_signs


def test_without_numba_the_kernel_is_the_same(monkeypatch, request):
    expected = kernel_of(engine_of("bert", ALWAYS))
    # Python's way to say that there is no such module.
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "lmntk.kernels.sign_bits_compiled")
    monkeypatch.delattr(lmntk.kernels, "sign_bits_compiled")
    forget_whether_loops_work(request)
    engine = engine_of("bert", ALWAYS)
    assert not engine.planner.keeps_signs
    assert torch.equal(kernel_of(engine), expected)


@pytest.mark.parametrize("formula", ["sgd", "asymmetric_signgd"])
def test_formulas_that_need_more_than_signs_keep_factors(formula):
    assert not engine_of("bert", ALWAYS, formula=formula).planner.keeps_signs


def test_a_small_kernel_is_not_worth_compiling_for():
    assert not engine_of("bert", Tuning()).planner.keeps_signs


def test_signs_that_take_more_memory_than_there_is_are_not_kept():
    wide = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 1)).double()
    inputs = [torch.randn(1, 2, 256, dtype=torch.float64) for _ in range(40)]

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = wide

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs).sum(dim=1)

    model = Summed().requires_grad_(False)
    problem = KernelProblem(
        train=BatchedExamples(inputs),
        x=None,
        formula=FORMULAS["signgd"],
        num_logits=1,
        model=functional.module_model(model),
        params={name: value.detach() for name, value in model.named_parameters()},
    )
    tuning = replace(ALWAYS, min_buffer_bytes=2**10)
    roomy, tiled, narrow = (FactoredEngine(problem, MemoryBudget(size), tuning) for size in (2**28, 2**21, 2**18))
    demands = roomy.planner.demands
    assert demands.kept.per_example > demands.per_token
    assert len(roomy.plan().tile_rows) == 1 < len(tiled.plan().tile_rows)
    assert roomy.planner.keeps_signs and tiled.planner.keeps_signs and not narrow.planner.keeps_signs
    assert torch.equal(kernel_of(roomy), kernel_of(narrow))
    assert torch.equal(kernel_of(roomy), kernel_of(tiled))


def test_the_memory_of_signs_is_counted_example_by_example():
    engine = engine_of("bert", ALWAYS)
    memory, signs = engine.planner.memory, engine.planner.demands.kept
    with_fragments = memory.tuning.fragmentation
    assert memory.peak(10, 3) - memory.peak(10, 2) == pytest.approx(
        with_fragments * (signs.per_example + signs.largest), abs=1
    )
    kept = engine._propagate(engine.problem.train, [1], 100).of_layer
    engine._keeps_signs = False
    factors = engine._propagate(engine.problem.train, [1], 100).of_layer
    held = [batch for batches in kept.values() for batch in batches if isinstance(batch, WeightSigns)]
    planes = sum(batch.planes.rows * batch.planes.negative.shape[1] * 8 for batch in held)
    biases = sum(batch.biases.nbytes for batch in held if batch.biases is not None)
    assert signs.per_example == 2 * planes + biases
    assert signs.largest == max(engine._layers[name].sign_bytes(batches[0]) for name, batches in factors.items())


def test_the_cost_of_counted_signs_is_that_of_their_rate():
    engine = engine_of("bert", ALWAYS)
    plan = engine.plan()
    tile = next(iter(plan))
    numel, c = engine.planner.demands.dense_numel, engine.problem.num_logits
    with_rate = engine.planner.cost_model(0.0, 1.0, sign_rate=7.0)
    assert with_rate.tile(tile) == pytest.approx(numel * c**2 * tile.pairs / 7)
    assert sign_bits.products_per_second() > 0


def test_several_directions_of_signs_on_both_sides_are_all_counted():
    engine = engine_of("bert", ALWAYS)
    both = SignPlacement(sign_train=True, sign_x=True)
    twice = FactoredEngine(replace(engine.problem, formula=Formula("twice", (both, both))), engine.budget, ALWAYS)
    assert twice.planner.keeps_signs
    found = kernel_of(twice)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[:1], kernel_of(engine))


@pytest.mark.parametrize("first", [ALWAYS, NEVER], ids=["bits first", "floats first"])
@pytest.mark.parametrize("then", [ALWAYS, NEVER], ids=["then bits", "then floats"])
def test_train_factors_of_an_earlier_kernel_become_signs_or_are_made_anew(first, then):
    earlier = engine_of("bert", first)
    kernel_of(earlier)
    engine = FactoredEngine(earlier.problem, earlier.budget, then, earlier=earlier)
    # Whatever the earlier kernel kept: a kernel that is stopped and begun again has another one before it, or none.
    assert engine.planner.keeps_signs == (then is ALWAYS)
    assert engine.plan() == engine_of("bert", then).plan()
    assert torch.equal(kernel_of(engine), kernel_of(engine_of("bert", NEVER)))
    assert engine.estimate_cost(engine.plan()).tile(next(iter(engine.plan()))) > 0


@pytest.mark.parametrize("first", [ALWAYS, NEVER], ids=["bits first", "floats first"])
@pytest.mark.parametrize("then", [ALWAYS, NEVER], ids=["then bits", "then floats"])
def test_an_engine_takes_over_one_of_several_train_tiles(first, then):
    tiles = TileRequest(2, 2)
    earlier = engine_of("bert", first)
    kernel_of(earlier, tiles)
    kept = earlier._row
    engine = FactoredEngine(earlier.problem, earlier.budget, then, earlier=earlier)
    assert kept is engine._row and len(kept.train) == 2 and earlier._row is None
    assert torch.equal(kernel_of(engine, tiles), kernel_of(engine_of("bert", NEVER), tiles))


def test_a_stopped_kernel_goes_on_with_its_tiles_and_without_the_engine_before():
    """A first run computes train × train and part of train × X; a second one has train × train already."""
    whole = kernel_of(engine_of("bert", NEVER))
    problem, budget = engine_of("bert", NEVER).problem, MemoryBudget(2**28)
    first = FactoredEngine(replace(problem, x=None), budget, ALWAYS)
    kernel_of(first)
    assert first.planner.keeps_signs
    stopped = FactoredEngine(problem, budget, NEVER, earlier=first)
    plan = stopped.plan(TileRequest(2, 2))
    begun = [block for _, block in zip(range(2), stopped.blocks(plan), strict=False)]
    again = FactoredEngine(problem, budget, NEVER)
    size = plan.tile_size
    assert again.plan(TileRequest(size.row, size.column)) == plan
    assert again.expected_bytes(plan) == stopped.expected_bytes(plan)
    rest = list(again.blocks(plan.restricted_to(set(plan) - {tile for tile, _ in begun})))
    assert torch.equal(assemble([*begun, *rest], plan, problem), whole)


def test_train_planes_are_joined_once_and_not_for_each_x_tile(monkeypatch):
    engine = engine_of("bert", ALWAYS)
    joined = []
    join = SignPlanes.join.__func__
    monkeypatch.setattr(
        SignPlanes,
        "join",
        classmethod(lambda cls, parts: (joined.append(len(parts)) if len(parts) > 1 else None, join(cls, parts))[1]),
    )
    engine.planner.memory = replace(engine.planner.memory, batch_tokens=9)
    found = kernel_of(engine, TileRequest(4, 1))
    layers = [batches for batches in engine._row.factors.of_layer.values() if isinstance(batches[0], WeightSigns)]
    assert layers and all(len(batches) == 1 for batches in layers)
    # X tiles of one example have one batch each.
    assert len(joined) == len(layers) and min(joined) > 1
    assert torch.equal(found, kernel_of(engine_of("bert", NEVER)))


def test_factors_that_become_signs_are_released_layer_by_layer_and_never_kept_by_halves(monkeypatch):
    earlier = engine_of("bert", NEVER)
    kernel_of(earlier)
    factors = earlier._row.factors.of_layer
    engine = FactoredEngine(earlier.problem, earlier.budget, ALWAYS, earlier=earlier)
    sizes, of = [], WeightSigns.of

    def signs(*arguments):
        sizes.append(len(factors))
        if len(sizes) == 9:
            raise KeyboardInterrupt
        return of(*arguments)

    monkeypatch.setattr(WeightSigns, "of", signs)
    total = len(factors)
    with pytest.raises(KeyboardInterrupt):
        kernel_of(engine)
    assert engine._row is None and sizes[0] < total and sizes[-1] < sizes[0]
    monkeypatch.undo()
    assert torch.equal(kernel_of(engine), kernel_of(engine_of("bert", NEVER)))
