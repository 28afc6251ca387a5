"""Errors that a command helps against name that command, with the mode, task, k and seed of the folder."""

from pathlib import Path

import pytest

from lmntk.config.remedies import sentence_of
from lmntk.data.examples import split_file
from lmntk.data.tasks import TASKS, custom_task
from lmntk.errors import EmbeddingsError, MissingSplitError, UsageError

TOOL = "python tools/generate_k_shot_data.py"
MINE = custom_task("text,label")


@pytest.fixture(autouse=True)
def _empty_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sentence(task: str, folder: str | Path, split: str = "train") -> str:
    with pytest.raises(MissingSplitError) as caught:
        split_file(MINE if task == "custom" else TASKS[task], folder, split)
    return sentence_of(caught.value)


@pytest.mark.parametrize(
    ("task", "folder", "remedy"),
    [
        ("SST-2", "data/k-shot-1k-test/SST-2/16-42", "`{} --mode k-shot-1k-test --k 16 --seed 42 --task SST-2`"),
        ("CoLA", "data/k-shot/CoLA/16-42", "`{} --mode k-shot --k 16 --task CoLA`"),
        ("CoLA", "data/k-shot/CoLA/16-5", "`{} --mode k-shot --k 16 --seed 5 --task CoLA`"),
        (
            "mnli-mm",
            "data/k-shot/mnli-mm/16-42",
            "`{} --mode k-shot --k 16 --seed 42 --task MNLI` and give --data_dir data/k-shot/MNLI/16-42",
        ),
        (
            "mr",
            "data/demo/x y/k-shot/mr/16-42",
            "`{} --mode k-shot --k 16 --seed 42 --task mr --data_dir 'data/demo/x y/original' "
            "--output_dir 'data/demo/x y'`",
        ),
        ("SST-2", "data/k-shot/mr/16-42", "give --task_name mr, or --data_dir data/k-shot/SST-2/16-42 for SST-2"),
        (
            "RTE",
            "elsewhere",
            "`{} --mode k-shot-1k-test --k 16 --task RTE` and give --data_dir data/k-shot-1k-test/RTE/16-42",
        ),
        (
            "custom",
            "data/k-shot-10x/mine/4-7",
            "`{} --mode k-shot-10x --k 4 --seed 7 --task mine --custom_columns text,label --input FILE`",
        ),
        ("custom", "my data/k-shot/custom/4-7", "--input FILE --output_dir 'my data'`"),
        (
            "custom",
            "elsewhere",
            "`{} --mode k-shot-1k-test --k 16 --seed 42 --task custom --custom_columns text,label --input FILE`",
        ),
    ],
)
def test_a_missing_split_names_the_command_that_draws_it(task: str, folder: str, remedy: str) -> None:
    found = sentence(task, folder)
    assert found.startswith(f"there is no folder {folder}: ")
    assert found.endswith(remedy.format(TOOL))


def test_a_missing_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data/k-shot/mr/8-7").mkdir(parents=True)
    assert sentence("mr", "data/k-shot/mr/8-7", "dev").startswith("data/k-shot/mr/8-7/dev.csv is missing: make it")
    assert sentence("custom", "data/k-shot/mr/8-7").startswith("data/k-shot/mr/8-7 has no train file: put train, dev")


def test_the_usual_data_folder_may_be_given_in_full(tmp_path: Path) -> None:
    assert sentence("mr", tmp_path / "data/k-shot/mr/16-42").endswith("--seed 42 --task mr`")


def test_embeddings_name_the_command_that_writes_them_and_other_errors_stay() -> None:
    error = EmbeddingsError("in Python", cause="a.npy is missing", model="sbert")
    assert sentence_of(error).startswith("a.npy is missing: `python tools/get_sbert_embedding.py ")
    assert "--name sbert --do_test`" in sentence_of(error)
    assert sentence_of(UsageError("as it is")) == "as it is"
