"""The process's memory: who may change how the C library keeps it, and the budget that engines get."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

from lmntk.kernels import ENGINES, MemoryBudget, empirical_ntk, memory
from lmntk.kernels.memory import retain_freed_memory


@pytest.fixture
def mallopt_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The calls of glibc's mallopt that Python code makes, which are kept from having an effect."""
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> None:
            calls.append((parameter, value))

        def malloc_trim(self, pad: int) -> None: ...

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    return calls


@pytest.mark.parametrize("engine", ENGINES)
def test_a_call_of_the_library_leaves_the_c_librarys_settings_alone(
    engine: str, mallopt_calls: list[tuple[int, int]]
) -> None:
    empirical_ntk(nn.Linear(3, 2), [torch.randn(4, 3)], engine=engine)
    assert mallopt_calls == []
    with retain_freed_memory():
        assert len(mallopt_calls) == 2


def test_a_default_budget_is_six_tenths_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * 2**30)
    assert MemoryBudget.default(torch.device("cpu")).gb == 6
    assert MemoryBudget.default(torch.device("cpu"), neighbours=4).gb == 1.5


def test_a_budget_survives_the_way_to_a_file_and_back() -> None:
    budget = MemoryBudget.from_gb(0.1)
    assert MemoryBudget.from_gb(budget.gb) == budget


@pytest.mark.parametrize(
    ("stat", "left"), [(None, 60), ("anon 30\ninactive_file 25\n", 85), ("total_inactive_file 7\n", 67), ("odd\n", 60)]
)
def test_files_that_a_control_group_counts_are_free_memory(tmp_path: Path, stat: str | None, left: int) -> None:
    (tmp_path / "memory.max").write_text("100\n")
    (tmp_path / "memory.current").write_text("40\n")
    if stat is not None:
        (tmp_path / "memory.stat").write_text(stat)
    files = str(tmp_path / "memory.max"), str(tmp_path / "memory.current")
    assert memory._cgroup_left(*files) == left
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_left(*files) is None
