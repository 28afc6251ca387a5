"""A tokenizer that a process keeps for its forks: it is given out as long as its files stay as they are."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmntk.errors import ModelError
from lmntk.models import pretrained
from lmntk.models.pretrained import keep_tokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path, tiny_roberta: Path) -> Iterator[Path]:
    shutil.copytree(tiny_roberta, tmp_path / "model")
    yield tmp_path / "model"
    pretrained._kept.clear()


def test_a_kept_tokenizer_is_the_one_that_is_loaded(folder: Path) -> None:
    fresh = load_tokenizer(str(folder))
    keep_tokenizer(str(folder))
    kept = load_tokenizer(str(folder))
    assert kept is load_tokenizer(str(folder)) is not fresh
    text = "the film was great"
    assert kept.encode(text) == fresh.encode(text)
    assert load_tokenizer(f"{folder}/") is not kept


def test_after_a_change_of_its_files_it_is_loaded_again(folder: Path) -> None:
    keep_tokenizer(str(folder))
    kept = load_tokenizer(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": 7}
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(str(folder)) is not kept
    assert load_tokenizer(str(folder)).model_max_length == 7


def test_what_a_run_asks_for_is_checked_of_a_kept_tokenizer_too(folder: Path) -> None:
    keep_tokenizer(str(folder))
    load_tokenizer(str(folder)).mask_token = None
    with pytest.raises(ModelError):
        load_tokenizer(str(folder), needs_mask=True)
