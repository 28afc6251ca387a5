"""tools/compare_kernels.py: its numbers, and what it refuses to compare."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import compare_kernels
from kernel_folders import Folder
from lmntk import solvers
from lmntk.analysis import statistics
from lmntk.config import tool_parser
from lmntk.errors import UsageError
from lmntk.solvers.problem import SolverSettings
from lmntk.storage import paths
from lmntk.storage.paths import kernel_path


def table(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, dict[str, str]], str]:
    """What a call prints, by split and column, and its notes."""
    compare_kernels.main([str(word) for word in words])
    out, notes = capsys.readouterr()
    header, *rows = [line.split("  ") for line in out.splitlines()]
    names = [name for name in header if name]
    lines = [[cell.strip() for cell in row if cell] for row in rows]
    return {line[0]: dict(zip(map(str.strip, names), line, strict=False)) for line in lines}, notes


def test_folders_are_compared_split_by_split_and_by_what_one_solver_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = Folder(tmp_path, "a", noise=4.0), Folder(tmp_path, "b", noise=4.0, seed=1)
    a.record(kernel_solver="svr", kernel_regularization=0.5)
    found, notes = table(capsys, a.path, b.path)
    assert list(found) == ["train", "dev", "test"]
    for split, row in found.items():
        numbers = statistics.compare(a.kernel(split), b.kernel(split))
        assert (row["distance"], row["scaled"]) == (f"{numbers.distance:.3g}", f"{numbers.scaled_distance:.3g}")
        assert (row["CKA"], row["correlation"]) == (f"{numbers.alignment:.4f}", f"{numbers.correlation:.4f}")
    predicted = []
    for folder in (a, b):
        fitted = solvers.fit("lstsq", folder.kernel("train"), folder.labels("train"), SolverSettings())
        predicted.append(fitted.predict(folder.kernel("test"), folder.labels("test")).logits.argmax(axis=1))
    rights = [f"{100 * np.mean(one == a.classes['test']):.1f}" for one in predicted]
    assert [found["test"]["acc A"], found["test"]["acc B"]] == rights
    assert found["test"]["agreement"] == f"{100 * np.mean(predicted[0] == predicted[1]):.1f}"
    assert "agreement" not in found["train"]
    assert notes == (
        "note: acc and agreement: predictions by lstsq, regularisation 0, from both kernels, whatever solver the runs "
        "had\n"
    )


def test_the_solver_of_the_flags_predicts_from_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = Folder(tmp_path, "a"), Folder(tmp_path, "b")
    found, notes = table(capsys, a.path, b.path, "--kernel_solver", "svc", "--kernel_regularization", 0.25)
    assert "predictions by svc, regularisation 0.25, from both" in notes
    for row in found.values():
        assert [row["distance"], row["scaled"], row["CKA"], row["correlation"]] == ["0", "0", "1.0000", "1.0000"]
    assert found["test"]["agreement"] == "100.0"


def test_kernel_files_are_compared_and_the_table_may_be_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = Folder(tmp_path, "a"), Folder(tmp_path, "b")
    b.write("test", 2 * b.kernel("test"))
    paths = [kernel_path(folder.path, "test", "sst-2") for folder in (a, b)]
    compare_kernels.main([*map(str, paths), "--format", "markdown"])
    assert capsys.readouterr().out.splitlines() == [
        "| split | distance | scaled |    CKA | correlation |",
        "|-------|---------:|-------:|-------:|------------:|",
        "| test  |      0.5 |      0 | 1.0000 |      1.0000 |",
    ]


def test_one_logit_and_two_of_the_same_function_are_no_distance_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, one = Folder(tmp_path, "two"), Folder(tmp_path, "one", logits=1)
    for split in two.classes:
        one.features[split] = two.features[split][:, 1:] - two.features[split][:, :1]
    for split in two.classes:
        one.write(split)
    found, notes = table(capsys, two.path, one.path)
    assert float(found["test"]["distance"]) < 1e-12
    assert found["test"]["agreement"] == "100.0"
    assert "note: one kernel has one logit, f1 - f0, the other two: the kernels of f1 - f0 are compared\n" in notes


def test_an_asymmetric_kernel_is_compared_as_the_mean_of_its_directions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asymmetric, plain = Folder(tmp_path, "asymmetric", asymmetric=True), Folder(tmp_path, "plain")
    for split in plain.classes:
        plain.write(split, asymmetric.kernel(split).mean(axis=0))
    found, notes = table(capsys, asymmetric.path, plain.path)
    assert found["test"]["distance"] == "0"
    assert "note: one kernel is asymmetric: the mean of its two directions is compared\n" in notes


def test_other_texts_with_the_same_labels_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = Folder(tmp_path / "1", "a"), Folder(tmp_path / "2", "b")
    b.texts("dev").write_text(a.texts("dev").read_text().replace("sentence 3", "sentence 4"), encoding="utf-8")
    b.write("dev")
    _, notes = table(capsys, a.path, b.path)
    assert notes.count("the descriptions tell of different data files of dev\n") == 1


def in_another_order(folder: Folder) -> None:
    folder.classes["test"] = folder.classes["test"][::-1]
    folder.write("test")


def of_fewer(folder: Folder) -> None:
    folder.classes["test"], folder.features["test"] = folder.classes["test"][:9], folder.features["test"][:9]
    folder.write("test")


def with_infinity(folder: Folder) -> None:
    kernel = folder.kernel("test")
    kernel[0, 0, 1, 0] = np.inf
    folder.write("test", kernel)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (in_another_order, "have different labels, first for example 0 (counted from 0)"),
        (of_fewer, "is a kernel of 8 × 10 examples and"),
        (with_infinity, "the kernel of train and test holds NaN or infinity, first at test example 1"),
    ],
)
def test_kernels_of_other_examples_or_without_numbers_are_refused(tmp_path: Path, change, said: str) -> None:
    a, b = Folder(tmp_path, "a"), Folder(tmp_path, "b")
    change(b)
    with pytest.raises(UsageError) as caught:
        compare_kernels.main([str(a.path), str(b.path)])
    assert said in str(caught.value) and str(b.path) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "nowhere"], "nowhere is not there"),
        (["a", "a/test_kernels_sst-2.pt"], "give two folders, or two kernel files"),
        (["a", "mr"], "a has kernels of sst-2 and mr of mr: give two folders of one task"),
        (["a", "results"], "results holds no kernels: give the folder of a run of --trainer kernel"),
        (["both", "both"], "both hold kernels of mr, sst-2: give two kernel files, such as both/test_kernels_mr.pt"),
        (["a/test_kernels_sst-2.pt", "six/test_kernels_sst-2.pt"], "a kernel of 2 logits and six/test"),
        (["a/test_kernels_sst-2.pt", "a/dev_kernels_sst-2.pt", "--kernel_solver", "svr"], "--kernel_solver: two"),
        (["a", "a", "--formats", "x"], "unknown flag '--formats': did you mean '--format'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    Folder(tmp_path, "a")
    six = Folder(tmp_path, "six", logits=6)
    torch.save((torch.from_numpy(six.kernel("test")), torch.arange(10) % 2), six.path / "test_kernels_sst-2.pt")
    (six.path / "test_kernels_sst-2.json").unlink()
    Folder(tmp_path, "both")
    for path in Folder(tmp_path, "mr", task="mr").path.iterdir():
        shutil.copy(path, tmp_path / "both")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "test_results_sst-2.txt").write_text("eval_acc = 0.5\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        compare_kernels.main(words)
    assert said in str(caught.value)


def test_one_kernel_alone_is_answered_with_a_sentence() -> None:
    with pytest.raises(UsageError, match="the following arguments are required: B"):
        compare_kernels.main(["somewhere"])


def test_texts_of_another_split_are_refused_though_labels_agree(tmp_path: Path) -> None:
    a, b = Folder(tmp_path / "1", "a"), Folder(tmp_path / "2", "b")
    for folder in (a, b):
        path = paths.description_path(folder.path, "train", "sst-2")
        told = json.loads(path.read_text(encoding="utf-8"))
        told |= {"data_sha256": {"train": folder.path.name}, "tokens_sha256": {"train": folder.path.name}}
        path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(UsageError, match="are kernels of different texts, as the descriptions beside them tell"):
        compare_kernels.main([str(a.path), str(b.path)])


def test_a_command_line_that_is_interrupted_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert tool_parser.exit_status(interrupted) == 130
    assert capsys.readouterr().err == "stopped by SIGINT: the same command starts anew\n"
