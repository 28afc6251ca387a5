"""The memory of kernels whose parts are kept apart: what is held stays within the plan's bound and the budget."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
from lmntk.kernels import (
    FORMULAS,
    BatchedExamples,
    KernelProblem,
    MemoryBudget,
    MemoryBudgetError,
    ModuleModel,
    TileRequest,
    assemble,
    make_engine,
)

BUDGET = MemoryBudget.from_gb(0.004)
LEAST_BYTES = 2048


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of the larger tensors that are made in this block, and keeps the most that were held at once."""

    def __init__(self):
        super().__init__()
        self._storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if storage.nbytes() < LEAST_BYTES or (known and not known[0].expired()):
                continue
            self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def deep_problem(of_itself):
    """The kernel of a network of 13 small layers, with 26 parts: a block is far larger than the factors."""
    torch.manual_seed(0)
    deep = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(12)], torch.nn.Linear(4, 3)).double()
    params = dict(deep.requires_grad_(False).named_parameters())
    examples = [torch.randn(1, 4, dtype=torch.float64) for _ in range(100)]
    return KernelProblem(
        model=ModuleModel(lambda values, batch: functional_call(deep, values, (batch,)), deep),
        params=params,
        train=BatchedExamples(examples[:40]),
        x=None if of_itself else BatchedExamples(examples[40:]),
        formula=FORMULAS["sgd"],
        num_logits=3,
        part_of={name: name for name in params},
    )


@pytest.mark.parametrize("engine", ["factored", "jacobian"])
@pytest.mark.parametrize("of_itself", [False, True])
def test_many_parts_stay_within_the_expected_bytes_and_the_budget(engine, of_itself) -> None:
    problem = deep_problem(of_itself)
    chosen = make_engine(problem, engine, BUDGET)
    plan = chosen.plan()
    assert chosen.expected_bytes(plan) <= BUDGET.bytes
    with HeldBytes() as held:
        blocks = []
        for tile, block in chosen.blocks(plan):
            with torch.utils._python_dispatch._disable_current_modes():
                blocks.append((tile, block.sum(dim=0, keepdim=True)))
    assert held.peak <= chosen.expected_bytes(plan)
    whole = replace(problem, part_of=None)
    found = assemble(blocks, plan, whole)
    other = make_engine(whole, "jacobian")
    truth = assemble(other.blocks(other.plan()), other.plan(), whole)
    assert oracle.relative_error(found, truth) < 1e-12


def test_tiles_whose_parts_are_too_large_for_the_budget_are_refused() -> None:
    problem = deep_problem(of_itself=False)
    tiles = TileRequest(40, 60)
    with pytest.raises(MemoryBudgetError) as refused:
        make_engine(problem, "factored", BUDGET).plan(tiles)
    assert refused.value.needed > 2 * 26 * 40 * 60 * 9 * 8, "two blocks"
    assert make_engine(replace(problem, part_of=None), "factored", BUDGET).plan(tiles).tile_size.column == 60
