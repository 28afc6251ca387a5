"""Examples chosen from a run's train examples: the k-shot folder that is written, its scores, refusals."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import refusal
from kernel_folders import Folder
from lmntk.analysis.example_selection import WAYS, select_examples
from lmntk.analysis.learning_curve import subset_scores
from lmntk.analysis.least_squares import read_least_squares
from lmntk.analysis.saved_run import read_runs
from lmntk.commands import select as command
from lmntk.data.examples import read_examples
from lmntk.data.subsets import subset_files
from lmntk.data.tasks import TASKS, custom_task
from lmntk.errors import FileError, KernelMismatchError, SettingError, UsageError


@pytest.fixture
def kernel(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path, "kernel", noise=2.0, samples=2)
    folder.write_untrained_logits()
    folder.record(kernel_regularization=0.01, adjust_for_init=True)
    return folder


@pytest.mark.parametrize("by", WAYS)
def test_the_folder_has_the_chosen_rows_and_the_other_splits_as_they_are(
    kernel: Folder, tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "chosen" / "SST-2" / "2-0"
    argv = [str(kernel.path), "-k", "2", "--by", by, "--draws", "5", "--output_dir", str(output), "--format", "json"]
    assert command.main(argv) == 0
    table = json.loads(capsys.readouterr().out)
    record = json.loads((output / command.RECORD).read_text())
    indices = [example["index"] for example in record["examples"]]
    assert (record["by"], record["k"]) == (by, 2) and indices == table["examples"]
    assert [example["label"] for example in record["examples"]] == ["0", "1", "0", "1"]
    pool = read_examples(TASKS["SST-2"], kernel.texts("train"))
    written = read_examples(TASKS["SST-2"], output / "train.tsv")
    assert written == [pool[index] for index in (*indices[::2], *indices[1::2])], "class by class"
    for split in ("dev", "test"):
        assert (output / f"{split}.tsv").read_bytes() == kernel.texts(split).read_bytes()
    scores = subset_scores(read_least_squares(read_runs(kernel.path)[0], {}), np.array(indices))
    assert record["scores"] == scores == {row["split"]: row["score"] for row in table["splits"]}


def test_the_share_of_worse_random_subsets_counts_ties_half(kernel: Folder) -> None:
    run = read_least_squares(read_runs(kernel.path)[0], {})
    found = select_examples(run, "random", 1, seed=0, draws=9)
    drawn = np.array(found.random.drawn["test"])
    wanted = ((drawn < found.scores["test"]).sum() + (drawn == found.scores["test"]).sum() / 2) / 9
    assert found.better_than["test"] == pytest.approx(wanted, rel=1e-12)


def test_a_choice_by_dev_has_no_larger_loss_on_dev_than_others_of_one_a_class(kernel: Folder) -> None:
    """With one example a class both are tried by brute force: the first alone, the second given the first."""
    run = read_least_squares(read_runs(kernel.path)[0], {"kernel_regularization": 0.0})
    chosen = select_examples(run, "dev", 1, seed=0, draws=1).examples

    def loss(examples: list[int]) -> float:
        part = run.problem.restricted_to(examples)
        values = run.problem.restrict(run.kernel("dev").values, examples)
        return part.predict(values, run.kernel("dev").labels, run.f0("dev")).loss

    classes = run.problem.classes
    first = min(np.flatnonzero(classes == 0), key=lambda example: loss([int(example)]))
    second = min(np.flatnonzero(classes == 1), key=lambda example: loss([int(first), int(example)]))
    assert chosen == [first, second]


def test_rows_of_a_users_own_json_keep_all_their_fields(tmp_path: Path) -> None:
    lines = ['{"text": "good", "label": "yes", "id": 7}', '{"id": 8, "text": "bad", "label": "no"}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "test.csv").write_text("text,label\nfine,yes\n", encoding="utf-8")
    files = subset_files(custom_task("text,label", ["yes", "no"]), tmp_path / "train.jsonl", [1])
    assert files == {"train.jsonl": f"{lines[1]}\n".encode(), "test.csv": b"text,label\nfine,yes\n"}


def test_the_table_has_a_row_for_each_split_in_every_form(kernel: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    for form in command.FORMS:
        assert command.main([str(kernel.path), "-k", "1", "--draws", "2", "--format", form]) == 0
        out = capsys.readouterr().out
        assert "dev" in out and "test" in out
        if form == "csv":
            assert [row["split"] for row in csv.DictReader(io.StringIO(out))] == ["dev", "test"]


def test_the_figure_has_the_choice_beside_random_subsets(kernel: Folder, tmp_path: Path) -> None:
    file = tmp_path / "new" / "choice.png"
    assert command.main([str(kernel.path), "-k", "2", "--draws", "5", "--figure", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert command.main([str(kernel.path), "-k", "2", "--figure", "choice.pdf"]) == 2


def changed(name: str) -> Callable[[Folder], Any]:
    return lambda folder: (folder.data / name).write_text("sentence\tlabel\nother\t0\n")


@pytest.mark.parametrize(
    ("change", "flags", "error", "words"),
    [
        (lambda folder: None, ["-k", "5"], SettingError, "`k=5`"),
        (lambda folder: None, ["-k", "0"], SettingError, "`k=0`: the rarest class has 4"),
        (lambda folder: folder.texts("train").unlink(), ["-k", "1"], FileError, "is missing"),
        (changed("train.tsv"), ["-k", "1"], FileError, "has changed"),
        (lambda folder: (folder.path / "dev_kernels_sst-2.pt").unlink(), ["-k", "1", "--by", "dev"], FileError, "dev"),
        (lambda folder: None, ["-k", "1", "--by", "luck"], UsageError, "luck"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_a_sentence(
    kernel: Folder, tmp_path: Path, change: Callable[[Folder], Any], flags: list[str], error: type, words: str
) -> None:
    change(kernel)
    output = tmp_path / "chosen"
    with pytest.raises(error, match=words):
        command._select(command.make_parser().read([str(kernel.path), "--output_dir", str(output), *flags]))
    assert not output.exists()


def test_an_asymmetric_kernel_has_no_covariance_to_choose_by(tmp_path: Path) -> None:
    folder = Folder(tmp_path, logits=1, asymmetric=True)
    folder.record()
    run = read_least_squares(read_runs(folder.path)[0], {})
    with pytest.raises(KernelMismatchError, match="by herding or at random"):
        select_examples(run, "loo", 1, seed=0, draws=1)
    assert len(select_examples(run, "herding", 1, seed=0, draws=1).examples) == 2


def test_files_of_another_choice_are_not_replaced(kernel: Folder, tmp_path: Path) -> None:
    argv = [str(kernel.path), "--draws", "2", "--output_dir", str(tmp_path / "chosen"), "-k"]
    assert command.main([*argv, "1"]) == command.main([*argv, "1"]) == 0
    before = (tmp_path / "chosen" / "train.tsv").read_bytes()
    assert command.main([*argv, "2"]) == 2
    assert (tmp_path / "chosen" / "train.tsv").read_bytes() == before


def test_a_run_is_not_overwritten_by_a_choice(
    kernel: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Folder(tmp_path, "other")
    for folder in (kernel, other):
        argv = [str(kernel.path), "-k", "1", "--output_dir", str(folder.path)]
        assert f"--output_dir {folder.path} holds a run" in refusal(capsys, command.main, argv)
        assert not (folder.path / "train.tsv").exists()


def test_the_whole_pool_is_not_compared_with_itself(kernel: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(kernel.path), "-k", "4"]) == 0
    printed = capsys.readouterr().out
    assert "the whole pool" in printed and printed.splitlines()[1].count("–") == 3 and "of 1 subset" not in printed
    assert command.main([str(kernel.path), "-k", "4", "--format", "json"]) == 0
    assert {row["better_than"] for row in json.loads(capsys.readouterr().out)["splits"]} == {None}


@pytest.mark.parametrize("by", ["dev", "herding"])
def test_a_choice_by_dev_says_that_dev_does_not_judge_it(
    kernel: Folder, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    assert command.main([str(kernel.path), "-k", "1", "--by", by, "--draws", "2"]) == 0
    assert ("dev chose the examples" in capsys.readouterr().out) == (by == "dev")


def test_the_flag_for_moved_data_is_named(kernel: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved"
    kernel.data.rename(moved)
    argv = [str(kernel.path), "-k", "1", "--draws", "2", "--output_dir", str(tmp_path / "chosen")]
    assert "is missing: give --data_dir, the folder" in refusal(capsys, command.main, argv)
    assert command.main([*argv, "--data_dir", str(moved)]) == 0
