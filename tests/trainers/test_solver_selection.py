"""Settings of the solver that a run chooses: on dev or by leave-one-out, its files, and what it refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import Workplace, flags_of, read_results, snapshot
from lmntk import KernelClassifier
from lmntk.errors import SettingError

AUTO = ("--kernel_regularization", "auto", "--f0_scaling", "auto", "--adjust_for_init")
CHOSEN = ("kernel_regularization", "f0_scaling", "kernel_gamma", "kernel_lambda")


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run_sst-2.json").read_text(encoding="utf-8"))


def grid_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "solver_selection_sst-2.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def predictions_of(folder: Path, split: str) -> np.ndarray:
    with (folder / f"{split}_predictions_sst-2.csv").open(encoding="utf-8", newline="") as file:
        return np.array(
            [[float(row[name]) for name in row if name.startswith("logit")] for row in csv.DictReader(file)]
        )


@pytest.fixture(scope="module")
def chosen(place: Workplace) -> Path:
    return place.run(*AUTO, output="auto")


def test_the_chosen_setting_predicts_as_a_run_with_its_numbers(place: Workplace, chosen: Path) -> None:
    record, numbers = record_of(chosen), []
    for name in CHOSEN:
        assert isinstance(record[name], float)
        numbers += [f"--{name}", str(record[name])]
    again = place.run(*numbers, "--adjust_for_init", "--load_kernels", str(chosen), output="numbers")
    for split in ("dev", "test"):
        np.testing.assert_allclose(predictions_of(again, split), predictions_of(chosen, split), rtol=0, atol=1e-9)
    assert not (again / "solver_selection_sst-2.csv").exists()
    assert record_of(again)["kernel_selection"] is None


def test_the_record_and_the_table_hold_the_choice_and_the_whole_grid(chosen: Path) -> None:
    record, rows = record_of(chosen), grid_of(chosen)
    (row,) = (row for row in rows if row["chosen"] == "1")
    assert len(rows) == 25
    assert [float(row[name]) for name in CHOSEN[:2]] == [record[name] for name in CHOSEN[:2]]
    scores = [float(row["dev_score"]) for row in rows]
    best = max(scores)
    assert record["kernel_selection"] == {
        "by": "dev", "metric": "acc", "score": best, "settings": 25, "ties": scores.count(best) - 1,
    }  # fmt: skip
    assert read_results(chosen / "eval_results_sst-2.txt")["eval_acc"] == best == float(row["dev_score"])


def test_every_row_of_the_table_is_the_dev_score_of_a_run_of_its_own(place: Workplace, chosen: Path) -> None:
    for row in grid_of(chosen)[::6]:
        numbers = [word for name in CHOSEN[:2] for word in (f"--{name}", row[name])]
        again = place.run(*numbers, "--adjust_for_init", "--load_kernels", str(chosen), output="rows")
        results = read_results(again / "eval_results_sst-2.txt")
        assert results["eval_acc"] == float(row["dev_score"])
        assert results["eval_loss"] == pytest.approx(float(row["dev_loss"]), rel=1e-9)


def test_a_list_with_one_number_is_that_number(place: Workplace, chosen: Path) -> None:
    loaded = ("--load_kernels", str(chosen), "--adjust_for_init")
    one = place.run("--kernel_regularization", "0.1", *loaded, output="one")
    again = place.run("--kernel_regularization=1e-1", *loaded, output="again")
    for name, (content, _) in snapshot(one).items():
        assert name == "run_sst-2.json" or snapshot(again)[name][0] == content
    assert not (one / "solver_selection_sst-2.csv").exists()


def test_a_table_of_an_earlier_run_does_not_stay(place: Workplace, chosen: Path) -> None:
    place.run("--kernel_regularization", "0,1", "--load_kernels", str(chosen), output="stale")
    folder = place.run("--kernel_regularization", "0", "--load_kernels", str(chosen), output="stale")
    assert not (folder / "solver_selection_sst-2.csv").exists()


def test_leave_one_out_spares_dev(place: Workplace, chosen: Path) -> None:
    flags = place.argv(*AUTO, "--select_by", "loo", "--load_kernels", str(chosen), output="loo")
    outcome = place.call([flag for flag in flags if flag != "--do_eval"])
    assert outcome.status == 0, outcome.err
    folder = place.folder / "loo"
    record, rows = record_of(folder), grid_of(folder)
    assert record["kernel_selection"]["by"] == "loo" and record["do_eval"] is False
    assert len(rows) == 25 and {"loo_score", "loo_loss"} <= rows[0].keys()
    assert "chosen by leave-one-out: --kernel_regularization" in outcome.messages
    (best,) = (row for row in rows if row["chosen"] == "1")
    results = read_results(folder / "test_results_sst-2.txt")
    assert results["loo_acc"] == float(best["loo_score"])
    assert results["loo_loss"] == pytest.approx(float(best["loo_loss"]), rel=1e-9)


def test_asym_chooses_gamma_and_lambda_too(place: Workplace) -> None:
    flags = ("--kernel_gamma", "auto", "--kernel_lambda", "0,0.5,1", *flags_of("asymmetric_signgd"), *AUTO[:2])
    folder = place.run(*flags, output="asym")
    rows, record = grid_of(folder), record_of(folder)
    assert len(rows) == 5 * 4 * 3 and set(rows[0]) >= {"kernel_regularization", "kernel_gamma", "kernel_lambda"}
    assert read_results(folder / "eval_results_sst-2.txt")["eval_acc"] == record["kernel_selection"]["score"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--kernel_solver", "svr", *AUTO),
        ("--kernel_solver", "svc", "--flattened_targets", *AUTO[:2]),
        ("--kernel_solver", "logistic", "--kernel_regularization", "0,0.1"),
        ("--as_published", "--kernel_regularization", "0,0.1"),
        ("--kernel_per_layer", *AUTO[:2]),
    ],
    ids=" ".join,
)
def test_other_solvers_and_settings_choose_on_dev_as_well(place: Workplace, flags: tuple[str, ...]) -> None:
    folder = place.run(*flags, output=f"other{len(' '.join(flags))}")
    score = record_of(folder)["kernel_selection"]["score"]
    assert read_results(folder / "eval_results_sst-2.txt")["eval_acc"] == score


def test_unused_candidates_are_warned_of_and_not_chosen_among(place: Workplace, chosen: Path) -> None:
    argv = place.argv("--f0_scaling", "auto", "--select_by", "loo", "--load_kernels", str(chosen), output="unused")
    outcome = place.call(argv)
    assert "--f0_scaling has no effect without --adjust_for_init" in outcome.messages
    assert "--select_by has no effect without candidates" in outcome.messages
    record = record_of(place.folder / "unused")
    assert record["f0_scaling"] == 1 and record["kernel_selection"] is None


def test_a_dry_run_chooses_nothing(place: Workplace) -> None:
    outcome = place.call(place.argv(*AUTO, "--dry_run", output="dry"))
    assert outcome.status == 0 and not (place.folder / "dry").exists()


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (("--kernel_regularization", "0,,1"), ("--kernel_regularization", "'0,,1'")),
        (("--kernel_gamma", "auto,1"), ("--kernel_gamma", "'auto,1'")),
        (("--f0_scaling", "nan"), ("--f0_scaling is nan",)),
        (("--kernel_lambda", "0,2"), ("--kernel_lambda is 2.0", "from 0 to 1")),
        (("--kernel_regularization", "1,1"), ("--kernel_regularization holds 1 twice",)),
        ((*AUTO, "--kernel_solver", "svr", "--select_by", "loo"), ("--select_by loo", "--kernel_solver lstsq")),
    ],
    ids=" ".join,
)
def test_a_bad_list_is_refused_in_a_sentence(place: Workplace, flags: tuple[str, ...], facts: tuple[str, ...]) -> None:
    outcome = place.call(place.argv(*flags, output="bad"))
    assert outcome.status == 2 and all(fact in outcome.err for fact in facts), outcome.err
    assert not (place.folder / "bad").exists()


def test_candidates_without_dev_are_refused_with_the_ways_out(place: Workplace) -> None:
    outcome = place.call([flag for flag in place.argv(*AUTO, output="bad") if flag != "--do_eval"])
    assert outcome.status == 2 and not (place.folder / "bad").exists()
    assert "--kernel_regularization auto is chosen on dev" in outcome.err
    assert "--do_eval" in outcome.err and "--select_by loo" in outcome.err


def test_a_json_file_may_hold_a_list_of_candidates(place: Workplace, chosen: Path) -> None:
    config = {"kernel_regularization": [0, 0.1, 1], "load_kernels": str(chosen)}
    path = place.folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert place.call([str(path), *place.argv(output="json")]).status == 0
    assert len(grid_of(place.folder / "json")) == 3


def test_a_classifier_chooses_by_leave_one_out(place: Workplace) -> None:
    texts = [line.split("\t")[0] for line in (place.data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    usual: dict[str, Any] = {"task_name": "sst-2", "adjust_for_init": True, "use_cpu": True}
    found = KernelClassifier(str(place.model), kernel_regularization="auto", f0_scaling=[10, 0], **usual)
    found.fit(texts, [0, 1, 0, 1])
    assert set(found.selected_) == set(CHOSEN) and found.selected_["f0_scaling"] in (10, 0)
    plain = KernelClassifier(str(place.model), **usual, **found.selected_).fit(texts, [0, 1, 0, 1])
    assert plain.selected_ == found.selected_
    np.testing.assert_allclose(found.predict_logits(texts), plain.predict_logits(texts), rtol=0, atol=1e-9)


def test_a_classifier_with_another_solver_needs_numbers(place: Workplace) -> None:
    with pytest.raises(SettingError, match="leave-one-out"):
        KernelClassifier(str(place.model), solver="svr", task_name="sst-2", kernel_regularization="auto").fit(
            ["a", "b"], [0, 1]
        )
