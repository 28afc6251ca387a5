"""Fixtures that tests in several folders share."""

from pathlib import Path

import pytest

from command_line import Workplace
from tiny_models import save_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny random RoBERTa with its tokenizer; to be read, not changed."""
    return save_tiny_checkpoint("roberta", tmp_path_factory.mktemp("tiny-roberta"))


@pytest.fixture(scope="module", name="place")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_roberta: Path) -> Workplace:
    """A folder to call run.py in, new for each file of tests; a file that needs more there takes it and adds that."""
    return Workplace(tmp_path_factory.mktemp("workplace"), tiny_roberta)
