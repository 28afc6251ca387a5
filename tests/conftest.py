"""Fixtures that tests in several folders share."""

import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import Workplace
from tiny_models import save_tiny_checkpoint
from warm_python import WarmPython


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> None:
    """Set aside what is there, most of all transformers' million objects, which each collection would go through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny random RoBERTa with its tokenizer; to be read, not changed."""
    return save_tiny_checkpoint("roberta", tmp_path_factory.mktemp("tiny-roberta"))


@pytest.fixture(scope="module", name="place")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_roberta: Path) -> Workplace:
    """A folder to call run.py in, new for each file of tests; a file that needs more there takes it and adds that."""
    return Workplace(tmp_path_factory.mktemp("workplace"), tiny_roberta)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """A program that is Python with the imports of run.py done, for processes whose start is not what is tested."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="lmntk-") as folder, WarmPython(Path(folder), environment) as warm:
        yield str(warm.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thin", type=int, default=1, help="of a test with many parameters run every n-th case only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave cases out for `make test-quick`: every test function still runs, with some of its parameters."""
    every, cases = config.getoption("--thin"), Counter[str]()
    kept, left_out = [], []
    for item in items:
        name = item.nodeid.partition("[")[0]
        (left_out if cases[name] % every else kept).append(item)
        cases[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
