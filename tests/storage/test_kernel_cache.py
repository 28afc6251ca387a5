"""Kernels and logits that are loaded belong together, to the command and to the data; what is not at hand is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import SIZES, Workplace, read_tensors, sst2_rows, write_rows
from kernel_folders import Folder
from lmntk.analysis.saved_run import read_runs
from lmntk.errors import UsageError
from lmntk.storage import logits_files
from lmntk.storage.kernel_metadata import check_one_run

NOWHERE = ["--model_name_or_path", "no/model", "--data_dir", "no/data"]


@pytest.fixture(scope="module")
def made(place: Workplace) -> Path:
    for seed in ("42", "13"):
        for split, size in SIZES.items():
            rows = sst2_rows(size, split if seed == "42" else "another")
            write_rows(place.folder / f"data/16-{seed}/{split}.tsv", [("sentence", "label"), *rows])
    return place.run("--data_dir", "data/16-42", output="result/16-42")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "16-42"))


def edit(path: Path, **values: Any) -> None:
    """Change what the description of a kernel says."""
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(described | values), encoding="utf-8")


def undescribed(folder: Path) -> None:
    for path in folder.glob("*.json"):
        path.unlink()


def load(place: Workplace, folder: Path, *flags: str):
    return place.call(place.argv("--load_kernels", str(folder), *flags, output="loaded"))


@pytest.mark.parametrize("model", [[], ["--model_name_or_path", "no/model"]], ids=["model", "no model"])
def test_kernels_of_another_seed_are_refused_with_and_without_a_model(
    place: Workplace, made: Path, model: list[str]
) -> None:
    outcome = load(place, made, "--data_dir", "data/16-13", *model)
    assert outcome.status == 2
    assert f"{made}/train_kernels_sst-2.pt is another kernel (" in outcome.err
    assert "data_sha256.train: stored " in outcome.err
    right = load(place, made, "--data_dir", "data/16-42", *model)
    assert (right.status, right.err) == (0, "")
    assert ("could not be compared" in right.messages) == bool(model)
    if model:
        assert "tokens_sha256.train, tokens_sha256.test could not" in right.messages
        assert "(no tokenizer of 'no/model' is at hand)" in right.messages


def test_a_data_folder_that_is_not_there_is_named(place: Workplace, made: Path) -> None:
    outcome = load(place, made, *NOWHERE)
    assert outcome.status == 0
    assert "data_sha256.train, data_sha256.test, " in outcome.messages
    assert "no/data/train.tsv is not there; no/data/dev.tsv is not there" in outcome.messages


@pytest.mark.parametrize("described", [True, False])
def test_the_names_of_folders_tell_another_seed_where_the_files_are_gone(
    place: Workplace, copy: Path, described: bool
) -> None:
    if not described:
        undescribed(copy)
    outcome = load(place, copy, "--data_dir", "gone/16-13")
    assert outcome.status == 2
    assert "belongs to another k-shot split than --data_dir gone/16-13" in outcome.err
    assert load(place, copy, "--data_dir", "gone/16-42").status == 0


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--max_seq_length", "64"], "limits.max_seq_length: stored 128, now 64"),
        (["--first_sent_limit", "3"], "limits.first_sent_limit: stored nothing, now 3"),
        (["--template", "*cls**sent_0*_So*mask*.*sep+*"], "template: stored"),
    ],
)
def test_limits_and_template_are_compared_without_model_and_data(
    place: Workplace, made: Path, flags: list[str], difference: str
) -> None:
    outcome = load(place, made, *NOWHERE, *flags)
    assert outcome.status == 2
    assert difference in outcome.err


def test_tokens_are_compared_where_the_tokenizer_is_there(place: Workplace, copy: Path) -> None:
    for path in copy.glob("*_kernels_*.json"):
        tokens = json.loads(path.read_text(encoding="utf-8"))["tokens_sha256"]
        edit(path, tokens_sha256=dict.fromkeys(tokens, "0"))
    outcome = load(place, copy, "--data_dir", "data/16-42")
    assert outcome.status == 2
    assert "(tokens_sha256.train: stored 0, now " in outcome.err


def test_kernels_without_description_have_the_labels_of_the_data(place: Workplace, copy: Path) -> None:
    undescribed(copy)
    outcome = load(place, copy, "--data_dir", "data/16-42", "--model_name_or_path", "no/model")
    assert outcome.status == 0
    assert outcome.messages.count("has no description, so its model, texts and template cannot be checked") == 3
    for rows, sentence in (
        ([(text, str(1 - int(label))) for text, label in sst2_rows(4)], "has other labels than the train examples"),
        (sst2_rows(6), "has 4 train examples, but --data_dir has 6"),
    ):
        write_rows(place.folder / "data/other/train.tsv", [("sentence", "label"), *rows])
        outcome = load(place, copy, "--data_dir", "data/other")
        assert outcome.status == 2
        assert sentence in outcome.err


@pytest.mark.parametrize(
    ("key", "value"), [("weights_sha256", "0"), ("formula", "signgd"), ("grad_dim", 1), ("dtype", "float64")]
)
def test_a_folder_of_mixed_kernels_is_refused_by_runs_and_reports(
    place: Workplace, copy: Path, key: str, value: Any
) -> None:
    edit(copy / "test_kernels_sst-2.json", **{key: value})
    outcome = load(place, copy, "--data_dir", "data/16-42")
    sentence = f"train_kernels_sst-2.pt beside it do not belong to one run: their descriptions differ in {key}; "
    assert outcome.status == 2
    assert sentence in outcome.err
    with pytest.raises(UsageError, match=sentence):
        read_runs(copy)[0].kernel("test")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda logits, labels: (logits * torch.nan, labels), "holds NaN or infinity, first for example 0"),
        (lambda logits, labels: (logits, 1 - labels), "has other targets than the labels of"),
        (lambda logits, labels: (logits + 1, labels), "is not the file that train_kernels_sst-2.pt was made with"),
        (lambda logits, labels: (logits[:2], labels[:2]), "has other targets than the labels of"),
    ],
    ids=["nan", "targets", "weights", "fewer"],
)
def test_logits_that_do_not_go_with_the_kernels_are_refused(
    place: Workplace, copy: Path, damage, sentence: str
) -> None:
    path = copy / "train_logits_sst-2.pt"
    torch.save(damage(*read_tensors(path)), path)
    outcome = load(place, copy, *NOWHERE, "--adjust_for_init")
    assert outcome.status == 2
    assert f"{path} {sentence}" in outcome.err
    with pytest.raises(UsageError, match=sentence):
        read_runs(copy)[0].untrained_logits("train")


def test_logits_are_those_of_the_kernel_also_when_a_run_is_given_again(place: Workplace) -> None:
    folder = place.run(output="again")
    before = (folder / "test_kernels_sst-2.json").stat().st_mtime_ns
    place.run(output="again")
    assert (folder / "test_kernels_sst-2.json").stat().st_mtime_ns == before
    outcome = load(place, folder, *NOWHERE, "--adjust_for_init")
    assert outcome.status == 0
    assert "nothing shows whether" not in outcome.messages
    undescribed(folder)
    assert (
        load(place, folder, *NOWHERE, "--adjust_for_init").messages.count("nothing shows whether it belongs to the")
        == 3
    )


def test_a_report_takes_a_whole_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert read_runs(folder.path)[0].kernel("test").values.shape == (8, 2, 10, 2)


@pytest.mark.parametrize("flags", [["--use_full_length", "True"], ["--max_seq_length", "40"], ["--model_reads", "100"]])
def test_a_length_that_depends_on_a_model_that_is_not_there_is_named_not_compared(
    place: Workplace, copy: Path, flags: list[str]
) -> None:
    length = {"--use_full_length": 512, "--max_seq_length": 40, "--model_reads": 100}[flags[0]]
    for path in copy.glob("*_kernels_*.json"):
        limits = json.loads(path.read_text(encoding="utf-8"))["limits"]
        edit(path, limits={**limits, "max_seq_length": length})
    given = [] if flags[0] == "--model_reads" else flags
    outcome = load(place, copy, "--data_dir", "data/16-42", "--model_name_or_path", "no/model", *given)
    assert outcome.status == 0, outcome.err
    named = "limits.max_seq_length, tokens_sha256.train" in outcome.messages
    assert named == (flags[0] != "--max_seq_length")
    assert "no tokenizer of 'no/model' is at hand" in outcome.messages
    other = load(place, copy, *NOWHERE, *given, "--first_sent_limit", "3")
    assert (other.status, "limits.first_sent_limit: stored nothing, now 3" in other.err) == (2, True)


@pytest.mark.parametrize("key", ["data_sha256", "tokens_sha256", "limits"])
def test_what_a_description_says_nothing_of_is_not_compared_between_kernels_of_a_folder(copy: Path, key: str) -> None:
    for split in ("train", "test"):
        edit(copy / f"{split}_kernels_sst-2.json", **{key: None})
    check_one_run(*(copy / f"{split}_kernels_sst-2.pt" for split in ("train", "test")))


def change_logits(folder: Path, by: float) -> bytes:
    """Let the logits of train differ from what is noted of them."""
    path = folder / "train_logits_sst-2.pt"
    logits, labels = read_tensors(path)
    torch.save((logits * (1 + by), labels), path)
    return path.read_bytes()


@pytest.mark.parametrize("by", [1e-6, 0.1], ids=["rounding", "damage"])
def test_the_command_of_the_kernels_again_renews_the_logits_or_notes_those_that_differ_by_rounding(
    place: Workplace, by: float
) -> None:
    folder = place.run(output=f"renewed {by}")
    wanted = (folder / "train_logits_sst-2.pt").read_bytes()
    changed = change_logits(folder, by)
    refused = load(place, folder, *NOWHERE, "--adjust_for_init")
    assert refused.status == 2
    assert "give the command that made the kernel again, without --load_kernels, which renews the logits" in refused.err
    place.run(output=f"renewed {by}")
    assert (folder / "train_logits_sst-2.pt").read_bytes() == (changed if by < 1e-3 else wanted)
    outcome = load(place, folder, *NOWHERE, "--adjust_for_init")
    assert (outcome.status, "nothing shows whether" in outcome.messages) == (0, False)


@pytest.mark.parametrize("write", ["save_logits", "write_description"])
def test_a_run_that_is_killed_while_it_renews_logits_leaves_a_folder_of_use(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    name = f"killed at {write}"
    folder = place.run(output=name)
    change_logits(folder, 0.1)
    real, calls = getattr(logits_files, write), []

    def killed(*args: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if write == "save_logits" else 2):
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(logits_files, write, killed)
        assert place.call(place.argv(output=name)).status == 130
    there = (folder / "train_logits_sst-2.pt").exists()
    assert there == (write == "write_description")
    outcome = load(place, folder, *(NOWHERE if there else []), "--adjust_for_init")
    assert (outcome.status, "nothing shows whether" in outcome.messages) == (0, there)


def test_counts_of_signs_among_other_kernels_are_refused_without_any_description(tmp_path: Path) -> None:
    place, folder = Workplace(tmp_path / "place"), Folder(tmp_path)
    folder.write("test", folder.kernel("test").round())
    for description in folder.path.glob("*.json"):
        description.unlink()
    outcome = place.call(place.argv("--load_kernels", str(folder.path), "--data_dir", str(folder.data)))
    assert outcome.status == 2
    assert "only the values of test are whole numbers" in outcome.err
