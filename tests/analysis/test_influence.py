"""What single train examples do to a saved run: tables against solving again, its command, and what that refuses."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import refusal
from kernel_folders import Folder
from lmntk.analysis.influence import RunInfluence, query_influence, read_groups, run_influence
from lmntk.analysis.least_squares import find_kernel_run, read_least_squares
from lmntk.commands import influence as command
from lmntk.errors import FileError
from lmntk.solvers import fit
from lmntk.solvers.problem import SolverSettings

CLOSE = 1e-9


def influence_of(folder: Folder, groups: Any = None, **settings: Any) -> RunInfluence:
    return run_influence(read_least_squares(find_kernel_run(folder.path), settings), groups)


def without(folder: Folder, out: np.ndarray, split: str, f0: Any = None, regularization: float = 0.0) -> np.ndarray:
    """Predict a split by solving without some train examples, with the ridge of the whole kernel: ``[X, C]``."""
    samples, logits = folder.samples, folder.logits
    kernel = [folder.kernel(name) for name in ("train", split)]
    train, other = (one[0] if folder.asymmetric else one for one in kernel)
    size = train.shape[0] * logits
    flat, columns = train.reshape(size, size), other.reshape(size, -1)
    ridged = flat + regularization * np.linalg.norm(flat, 2) * np.eye(size)
    ids = np.tile(folder.classes["train"], samples)
    wanted = (2.0 * ids - 1)[:, None] if logits == 1 else np.eye(logits)[ids]
    wanted = (wanted - (f0["train"] if f0 else 0)).reshape(-1)
    kept = ~np.repeat(np.tile(out, samples), logits)
    found = columns[kept].T @ np.linalg.solve(ridged[kept][:, kept], wanted[kept])
    found = found.reshape(-1, logits) + (f0[split] if f0 else 0)
    return found.reshape(samples, -1, logits).mean(axis=0)


def margins_of(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How far the label's logit is above the largest other one, example by example."""
    both = np.concatenate([-logits, logits], axis=1) / 2 if logits.shape[1] == 1 else logits
    return np.array([row[label] - np.delete(row, label).max() for row, label in zip(both, classes, strict=True)])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "how",
    [{"logits": 1}, {"logits": 2}, {"logits": 2, "samples": 2}, {"logits": 1, "asymmetric": True}],
    ids=str,
)
def test_every_number_of_the_tables_is_that_of_solving_again(tmp_path: Path, how: dict[str, Any]) -> None:
    folder = Folder(tmp_path, noise=3.0, **how)
    f0 = folder.write_untrained_logits()
    folder.record(kernel_regularization=0.01, adjust_for_init=True)
    assert command.main([str(folder.path)]) == 0
    train = rows_of(folder.path / "influence_train_sst-2.csv")
    for split in ("dev", "test"):
        table, classes = rows_of(folder.path / f"influence_{split}_sst-2.csv"), folder.classes[split]
        whole = without(folder, np.zeros(8, dtype=bool), split, f0, 0.01)
        np.testing.assert_allclose([float(row["margin"]) for row in table], margins_of(whole, classes), atol=CLOSE)
        wanted = (2.0 * classes - 1)[:, None] if folder.logits == 1 else np.eye(2)[classes]
        for index in range(8):
            left = without(folder, np.arange(8) == index, split, f0, 0.01)
            added = [float(row[f"train_{index}"]) for row in table]
            np.testing.assert_allclose(added, margins_of(whole, classes) - margins_of(left, classes), atol=CLOSE)
            change = np.mean((left - wanted) ** 2) - np.mean((whole - wanted) ** 2)
            assert float(train[index][f"{split}_loss_change"]) == pytest.approx(change, abs=CLOSE)
            right = [np.mean(margins_of(logits, classes) > 0) for logits in (left, whole)]
            assert float(train[index][f"{split}_acc_change"]) == pytest.approx(right[0] - right[1])
    for index, row in enumerate(train):
        left = without(folder, np.arange(8) == index, "train", f0, 0.01)
        margin = margins_of(left, folder.classes["train"])[index]
        assert float(row["loo_margin"]) == pytest.approx(margin, abs=CLOSE)
        assert (row["mislabel_rank"] != "") == (margin < 0) == (row["loo_prediction"] != row["label"])


def test_mislabelled_candidates_are_ranked_by_margin_and_a_flipped_label_comes_first(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=0.3)
    folder.classes["train"][5] = 1 - folder.classes["train"][5]  # the features stay those of the other class
    folder.texts("train").unlink()
    for split in ("train", "dev", "test"):
        folder.write(split)
    found = influence_of(folder, kernel_regularization=0.1)
    assert found.mislabelled[0] == 5
    ranked = [found.margins[index] for index in found.mislabelled]
    assert ranked == sorted(ranked) and all(margin < 0 for margin in ranked)
    # Without the wrong example predictions of the others' classes are better.
    assert found.by_helpfulness("test")[-1] == 5 and found.splits["test"].loss_changes[5] < 0


def test_groups_leave_together(tmp_path: Path) -> None:
    folder, groups = Folder(tmp_path, noise=3.0), np.array([4, 4, 1, 1, 1, 9, 9, 9])
    file = tmp_path / "groups.txt"
    file.write_text("\n".join(map(str, groups)) + "\n", encoding="utf-8")
    assert command.main([str(folder.path), "--groups", str(file), "--output_dir", str(tmp_path / "out")]) == 0
    table = rows_of(tmp_path / "out" / "influence_test_sst-2.csv")
    whole = without(folder, np.zeros(8, dtype=bool), "test")
    for group in (1, 4, 9):
        left = without(folder, groups == group, "test")
        wanted = margins_of(whole, folder.classes["test"]) - margins_of(left, folder.classes["test"])
        np.testing.assert_allclose([float(row[f"group_{group}"]) for row in table], wanted, atol=CLOSE)
    assert [int(row["group"]) for row in rows_of(tmp_path / "out" / "influence_train_sst-2.csv")] == groups.tolist()
    assert not list(folder.path.glob("influence*"))
    assert command.main([str(folder.path), "--groups", "label", "--format", "csv"]) == 0


def test_a_query_has_the_prediction_of_the_solver_and_its_exact_influences(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=3.0, samples=2)
    of_run = read_least_squares(find_kernel_run(folder.path), {"kernel_regularization": 0.1})
    columns = folder.kernel("test")[:, :, [3, 13]]
    found = query_influence(of_run, columns, None)
    fitted = fit("lstsq", folder.kernel("train"), folder.labels("train"), SolverSettings(regularization=0.1))
    np.testing.assert_allclose(found.logits, fitted.predict(columns, [0, 0]).logits.mean(axis=0), atol=CLOSE)
    assert found.predicted == found.logits.argmax() and found.margin == pytest.approx(np.ptp(found.logits))
    left = without(folder, np.arange(8) == 6, "test", regularization=0.1)[[3]]
    assert found.on_margin[6] == pytest.approx(found.margin - margins_of(left, np.array([found.predicted]))[0])


def test_the_command_prints_texts_where_they_are_and_says_where_not(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path, noise=3.0)
    assert command.main([str(folder.path), "--top", "2"]) == 0
    printed = capsys.readouterr().out
    assert "looks mislabelled" in printed and "helps test most" in printed and "hurts test most" in printed
    assert "train sentence" in printed and "terrible" in printed
    folder.texts("train").unlink()
    assert command.main([str(folder.path), "--format", "json", "--split", "dev"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "dev" and "missing" in found["remarks"][0]
    assert all(row["loss_change"] > 0 for row in found["helpful"]) and len(found["helpful"]) <= 10
    for form in ("markdown", "latex"):
        assert command.main([str(folder.path), "--format", form]) == 0
        assert "looks mislabelled" in capsys.readouterr().out


def test_a_nearly_singular_kernel_gets_a_remark(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path)
    noise = 1e-4 * np.random.default_rng(1).normal(size=(folder.logits, 40))
    folder.features["train"][1] = folder.features["train"][3] + noise
    for split in ("train", "dev", "test"):
        folder.write(split)
    argv = [str(folder.path), "--format", "json"]
    assert command.main(argv) == 0
    assert "nearly singular" in json.loads(capsys.readouterr().out)["remarks"][0]
    assert command.main([*argv, "--kernel_regularization", "0.001"]) == 0
    assert not json.loads(capsys.readouterr().out)["remarks"]


def singular(folder: Folder) -> None:
    twice = np.tile(folder.kernel("train")[:4, :, :4], (2, 1, 2, 1))
    folder.write("train", twice)


def other_solver(folder: Folder) -> None:
    folder.record(kernel_solver="svr")


@pytest.mark.parametrize(
    ("change", "flags", "facts"),
    [
        (singular, [], "--kernel_regularization 0.001"),
        (other_solver, [], "--kernel_solver lstsq"),
        (None, ["--split", "tset"], "did you mean 'test'"),
        (None, ["--top", "0"], "--top 0: give 1 or more"),
        (None, ["--groups", "missing.txt"], "--groups missing.txt cannot be read"),
        (None, ["--query", "a text"], "leave out --query"),
        (None, ["--query", " "], "--query has a blank sentence"),
        (None, ["--query", "a", "b"], "--query has 2 sentences, but an example of SST-2 has 1"),
        (None, ["--query", "a", "--figure", "q.png"], "--figure q.png has no effect with --query"),
        (None, ["--query", "a", "--split", "dev"], "--split dev has no effect with --query"),
        (None, ["--query", "a", "--output_dir", "o"], "--output_dir o has no effect with --query"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_way_out(
    tmp_path: Path, capsys: Any, change: Callable[[Folder], None] | None, flags: list[str], facts: str
) -> None:
    folder = Folder(tmp_path)
    if change is not None:
        change(folder)
    assert facts in refusal(capsys, command.main, [str(folder.path), *flags])


def test_a_word_among_groups_is_shown_with_its_line(tmp_path: Path) -> None:
    for word in ("b", "9" * 30):
        (tmp_path / "groups").write_text(f"1\n2\n\n{word}\n", encoding="utf-8")
        with pytest.raises(FileError, match=f"holds '{word}' in line 4: give a whole number"):
            read_groups(str(tmp_path / "groups"), np.zeros(8, dtype=int))


def test_a_folder_without_a_record_has_a_note_on_the_regularization_taken(tmp_path: Path, caplog: Any) -> None:
    folder = Folder(tmp_path)
    influence_of(folder, kernel_solver="lstsq")
    assert f"{folder.path} records no solver settings: lstsq with `kernel_regularization=0`" in caplog.text
    caplog.clear()
    influence_of(folder, kernel_regularization=0.1)
    folder.record()
    influence_of(folder)
    assert not caplog.text


@pytest.mark.parametrize("text", ["1 2 3", "a " * 8, "1.5 " * 8, "4 " * 8])
def test_groups_that_are_not_a_whole_number_for_each_example_are_refused(
    tmp_path: Path, capsys: Any, text: str
) -> None:
    (tmp_path / "groups").write_text(text, encoding="utf-8")
    argv = [str(Folder(tmp_path).path), "--groups", str(tmp_path / "groups")]
    assert "--groups" in refusal(capsys, command.main, argv)


@pytest.mark.parametrize(
    "flags", [["--kernel_regularization", "1"], ["--groups", "GROUPS"], ["--kernel_solver", "lstsq"]]
)
def test_other_questions_than_the_runs_own_leave_its_tables_as_they_are(
    tmp_path: Path, capsys: Any, flags: list[str]
) -> None:
    folder, out = Folder(tmp_path), tmp_path / "out"
    folder.record(kernel_regularization=0.01)
    (tmp_path / "groups").write_text("1 1 1 2 2 2 3 3", encoding="utf-8")
    assert command.main([str(folder.path)]) == 0
    before = {path.name: path.read_bytes() for path in folder.path.glob("influence_*")}
    argv = [str(folder.path), *(str(tmp_path / "groups") if flag == "GROUPS" else flag for flag in flags)]
    if "lstsq" in flags:
        folder.record(kernel_regularization=0.01, kernel_solver="svr")
    capsys.readouterr()
    assert command.main(argv) == 0
    assert "no files are written" in capsys.readouterr().err
    assert "--output_dir" in refusal(capsys, command.main, [*argv, "--output_dir", str(folder.path)])
    assert before == {path.name: path.read_bytes() for path in folder.path.glob("influence_*")} and before
    assert command.main([*argv, "--output_dir", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == before.keys()
    assert (out / "influence_train_sst-2.csv").read_bytes() != before["influence_train_sst-2.csv"] or "lstsq" in flags


def test_own_settings_written_as_flags_are_the_runs_own(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.record(kernel_regularization=0.01)
    assert command.main([str(folder.path), "--kernel_regularization", "0.01"]) == 0
    assert len(list(folder.path.glob("influence_*"))) == 3


def test_labels_of_a_class_that_leaves_as_a_whole_are_not_judged(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path, noise=3.0)
    assert command.main([str(folder.path), "--groups", "label"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "looks mislabelled" not in printed
    assert "nothing is said about the labels of 8 of 8 train examples" in printed
    found = influence_of(folder, groups=np.array([0, 1, 0, 2, 0, 2, 0, 2]))
    assert found.judged.tolist() == [False, True] + [False, True] * 3
    assert found.mislabelled == [index for index in np.argsort(found.margins) if index % 2 and found.margins[index] < 0]


def test_margins_that_are_rounding_contradict_no_label(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    found = influence_of(folder)
    logits = np.tile([[0.5, 0.5]], (8, 1))
    logits[0] += [2.7e-14, 0]
    logits[1] += [2.7e-14, 0]
    logits[3] += [1e-6, 0]
    assert dataclasses.replace(found, left_out=logits).mislabelled == [3]


def test_what_was_chosen_by_looking_at_test_is_said_below_the_table(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path)
    for split, is_said in (("test", True), ("dev", False)):
        assert command.main([str(folder.path), "--split", split]) == 0
        assert ("chosen by looking at test" in " ".join(capsys.readouterr().out.split())) == is_said


def test_a_figure_of_a_run_without_dev_and_test_is_refused(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path)
    for split in ("dev", "test"):
        for path in folder.path.glob(f"{split}_kernels*"):
            path.unlink()
    argv = [str(folder.path), "--figure", str(tmp_path / "figure.png")]
    assert "--figure" in refusal(capsys, command.main, argv) and not (tmp_path / "figure.png").exists()
    assert command.main(argv[:1]) == 0
