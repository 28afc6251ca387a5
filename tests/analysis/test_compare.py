"""The comparison of kernels: its numbers, and what it refuses to compare."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel_folders import Folder
from lmntk import solvers
from lmntk.analysis import statistics
from lmntk.analysis.compare import _note_different_texts, compare_paths
from lmntk.analysis.saved_kernel import SavedKernel
from lmntk.commands import compare
from lmntk.errors import FileError, KernelMismatchError, SettingError, UsageError
from lmntk.solvers.problem import SolverSettings
from lmntk.storage.paths import RunPaths


def table(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, dict[str, str]], str]:
    """What a call prints, by split and column, and its notes."""
    assert compare.main([str(word) for word in words]) == 0
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
    assert notes.count("\n") == 1 and "lstsq, regularisation 0" in notes


def test_the_solver_of_the_flags_predicts_from_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = Folder(tmp_path, "a"), Folder(tmp_path, "b")
    found, notes = table(capsys, a.path, b.path, "--kernel_solver", "svc", "--kernel_regularization", 0.25)
    assert "svc, regularisation 0.25" in notes
    for row in found.values():
        assert [row["distance"], row["scaled"], row["CKA"], row["correlation"]] == ["0", "0", "1.0000", "1.0000"]
    assert found["test"]["agreement"] == "100.0"


def test_kernel_files_are_compared_and_the_table_may_be_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = Folder(tmp_path, "a"), Folder(tmp_path, "b")
    b.write("test", 2 * b.kernel("test"))
    paths = [RunPaths(folder.path, "sst-2").kernel("test") for folder in (a, b)]
    assert compare.main([*map(str, paths), "--format", "markdown"]) == 0
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
    assert "f1 - f0" in notes


def test_an_asymmetric_kernel_is_compared_as_the_mean_of_its_directions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asymmetric, plain = Folder(tmp_path, "asymmetric", asymmetric=True), Folder(tmp_path, "plain")
    for split in plain.classes:
        plain.write(split, asymmetric.kernel(split).mean(axis=0))
    found, notes = table(capsys, asymmetric.path, plain.path)
    assert found["test"]["distance"] == "0"
    assert "asymmetric" in notes


def test_different_texts_with_the_same_labels_are_noted(tmp_path: Path) -> None:
    a, b = Folder(tmp_path / "1", "a"), Folder(tmp_path / "2", "b")
    b.texts("dev").write_text(a.texts("dev").read_text().replace("sentence 3", "sentence 4"), encoding="utf-8")
    b.write("dev")
    _, notes = compare_paths(a.path, b.path)
    assert len([note for note in notes if "data files of dev" in note]) == 1


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
    ("change", "kind", "fact"),
    [
        (in_another_order, KernelMismatchError, "example 0"),
        (of_fewer, KernelMismatchError, "8 × 10"),
        (with_infinity, UsageError, "test example 1"),
    ],
)
def test_kernels_of_other_examples_or_without_numbers_are_refused(
    tmp_path: Path, change: Callable[[Folder], None], kind: type[UsageError], fact: str
) -> None:
    a, b = Folder(tmp_path, "a"), Folder(tmp_path, "b")
    change(b)
    with pytest.raises(kind) as caught:
        compare_paths(a.path, b.path)
    assert fact in str(caught.value) and str(b.path) in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "kind", "data"),
    [
        ("a", "nowhere", FileError, {"path": "nowhere"}),
        ("a", "a/test_kernels_sst-2.pt", FileError, {"path": "a/test_kernels_sst-2.pt"}),
        ("a", "mr", KernelMismatchError, {"path": "mr", "differences": ["task"]}),
        ("a", "results", FileError, {"path": "results"}),
        ("both", "both", KernelMismatchError, {"path": "both", "differences": ["mr", "sst-2"]}),
        (
            *("a/test_kernels_sst-2.pt", "six/test_kernels_sst-2.pt", KernelMismatchError),
            {"path": "six/test_kernels_sst-2.pt", "differences": ["logits"]},
        ),
    ],
)
def test_folders_and_files_that_cannot_be_compared_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
    kind: type[UsageError],
    data: dict[str, object],
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
    with pytest.raises(kind) as caught:
        compare_paths(Path(first), Path(second))
    assert caught.value.data == data | {"path": Path(str(data["path"]))}


def test_two_kernel_files_take_no_solver(tmp_path: Path) -> None:
    files = [Folder(tmp_path, name).path / "test_kernels_sst-2.pt" for name in ("a", "b")]
    with pytest.raises(SettingError) as caught:
        compare_paths(*files, {"kernel_solver": "svr"})
    assert caught.value.data == {"setting": "kernel_solver", "value": "svr"}


@pytest.mark.parametrize(
    ("words", "said"), [(["a"], "required: B"), (["a", "a", "--formats", "x"], "did you mean '--format'?")]
)
def test_a_wrong_command_line_is_reported_in_a_line(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert compare.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_texts_of_another_split_are_refused_though_labels_agree(tmp_path: Path) -> None:
    a, b = Folder(tmp_path / "1", "a"), Folder(tmp_path / "2", "b")
    for folder in (a, b):
        path = RunPaths(folder.path, "sst-2").description("train")
        told = json.loads(path.read_text(encoding="utf-8"))
        told |= {"data_sha256": {"train": folder.path.name}, "tokens_sha256": {"train": folder.path.name}}
        path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(KernelMismatchError) as caught:
        compare_paths(a.path, b.path)
    assert caught.value.data["differences"] == ["data_sha256", "tokens_sha256"]


def test_an_interrupted_comparison_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmntk.analysis.compare.compare_paths", interrupted)
    assert compare.main([str(tmp_path), str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("stopped by SIGINT: ")


def test_hashes_are_compared_of_modes_that_both_descriptions_have() -> None:
    def kernel(name: str, modes: list[str]) -> SavedKernel:
        hashes = {key: {mode: f"{name} {mode}" for mode in modes} for key in ("data_sha256", "tokens_sha256")}
        return SavedKernel(Path(name), np.zeros((1, 1, 1, 1)), np.zeros(1), hashes)

    assert _note_different_texts(kernel("a", ["train"]), kernel("b", ["test"])) == []
    with pytest.raises(KernelMismatchError):
        _note_different_texts(kernel("a", ["train", "dev"]), kernel("b", ["train"]))
