"""Damaged tokenizers: what cannot be loaded is one sentence, what loads and is not whole is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmntk.errors import ModelError
from lmntk.models.pretrained import load_tokenizer
from tiny_tokenizers import make_bert_tokenizer, make_gpt2_tokenizer, make_roberta_tokenizer

MAKERS = {"bert": make_bert_tokenizer, "roberta": make_roberta_tokenizer, "gpt2": make_gpt2_tokenizer}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, make in MAKERS.items():
        make(folders[name])
    return folders


def edit(path: Path, change: Callable[[Any], object]) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    path.write_text(json.dumps(found), encoding="utf-8")


def without_mask(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "[MASK]"]
    del tokenizer["model"]["vocab"]["[MASK]"]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", "null", '{"model": null, "added_tokens": []}', b"\xff\xfe\0", 300]
)
def test_a_damaged_file_is_told_in_one_sentence(
    whole: dict[str, Path], tmp_path: Path, name: str, content: str | bytes | int
) -> None:
    folder = Path(shutil.copytree(whole[name], tmp_path / "model"))
    file = folder / "tokenizer.json"
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(file.read_bytes()[:data] if isinstance(data, int) else data)
    with pytest.raises(ModelError, match="^`tokenizer_name`: the folder '.*' holds no tokenizer"):
        load_tokenizer(str(folder), needs_mask=False)


@pytest.mark.parametrize("name", MAKERS)
def test_a_tokenizer_without_its_vocabulary_is_told(whole: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(whole[name], tmp_path / "model"))
    for file in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="holds no vocabulary"):
        load_tokenizer(str(folder), needs_mask=False)


def test_a_special_token_that_the_vocabulary_lacks_does_not_become_another_token(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole["bert"], tmp_path / "model"))
    edit(folder / "tokenizer.json", without_mask)
    with pytest.raises(ModelError, match="the same as 'more'") as caught:
        load_tokenizer(str(folder))
    assert caught.value.data == {"path": str(folder), "token": "[MASK]"}


def test_a_tokenizer_smaller_than_its_model_is_told(whole: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    size = len(load_tokenizer(str(whole["bert"])))
    load_tokenizer(str(whole["bert"]), model_size=int(size / 0.95))
    assert caplog.messages == []
    load_tokenizer(str(whole["bert"]), model_size=2 * size)
    assert caplog.messages == [
        f"the tokenizer of '{whole['bert']}' has {size} tokens, but the model knows {2 * size}: is it the model's own, "
        "and whole?"
    ]


def test_a_cut_list_of_merges_is_told(whole: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(whole["gpt2"], tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    load_tokenizer(str(folder), needs_mask=False)
    assert caplog.messages == []
    merges = folder / "merges.txt"
    merges.write_text("\n".join(merges.read_text(encoding="utf-8").split("\n")[:61]), encoding="utf-8")
    load_tokenizer(str(folder), needs_mask=False)
    assert caplog.messages == [f"{merges} makes 60 of the 272 tokens of vocab.json: is it whole?"]


def test_a_tokenizer_without_special_tokens_is_told(
    whole: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(whole["gpt2"], tmp_path / "model"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    load_tokenizer(str(folder), needs_mask=False)
    assert caplog.messages == [f"the tokenizer of '{folder}' has no special tokens: *cls* and *sep* are empty"]
