"""Runs that are there: which kernels and trainings belong together, and what is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmntk.errors import DataError, FileError
from lmntk.runs.found_runs import FoundRun, find_runs, pair_runs
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import SplitSnapshot, TrainingSnapshot, write_snapshot


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with splits of two tasks of the same name."""
    for name in ("tweets", "films"):
        for seed in (13, 42):
            (tmp_path / "data" / name / "mr" / f"16-{seed}").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(name: str, data: str = "tweets/mr/16-13", snapshots: str = "", **record: Any) -> FoundRun:
    """A folder with the record of a run, and with a snapshot of a formula if it is given."""
    folder = Path("result") / name
    folder.mkdir(parents=True)
    record = {"task_name": "mr", "data_dir": f"data/{data}", "trainer": "kernel", **record}
    (folder / "run_mr.json").write_text(json.dumps(record), encoding="utf-8")
    if snapshots:
        split = SplitSnapshot(np.zeros(1, np.int64), np.zeros((1, 1)), np.zeros((1, 1)))
        snapshot = TrainingSnapshot(5, {"test": split}, None, {"kernel_formula": snapshots})
        write_snapshot(RunPaths(folder, "mr"), snapshot)
    setting = "kernel_runs" if record["trainer"] == "kernel" else "fine_tuned_runs"
    (found,) = find_runs([folder], setting)
    return found


def training(name: str, data: str = "tweets/mr/16-13", snapshots: str = "", **record: Any) -> FoundRun:
    settings = {"trainer": "standard", "do_train": True, "optimizer": "sgd", "optimizer_variant": ""}
    settings |= {"learning_rate": 0.1, "mr_dev_eval_acc": 0.5}
    return make(name, data, snapshots, **{**settings, **record})


def test_a_folder_stands_for_all_runs_below_it_each_once(root: Path) -> None:
    make("a", kernel_formula="sgd"), make("deeper/b", kernel_formula="sgd")
    found = find_runs([Path("result"), Path("result/a"), root / "result"], "kernel_runs")
    assert [run.folder.name for run in found] == ["a", "b"]


@pytest.mark.parametrize("place", ["nowhere", "data", "result/a/run_mr.json"])
def test_a_folder_without_runs_is_refused(root: Path, place: str) -> None:
    make("a")
    with pytest.raises(FileError) as caught:
        find_runs([Path(place)], "fine_tuned_runs")
    assert caught.value.data["path"] == Path(place)
    assert "`fine_tuned_runs" in str(caught.value)


def test_a_record_that_is_no_object_is_refused(root: Path) -> None:
    make("a")
    (root / "result/a/run_mr.json").write_text("[]", encoding="utf-8")
    with pytest.raises(FileError) as caught:
        find_runs([Path("result")], "kernel_runs")
    assert caught.value.data["path"] == Path("result/a/run_mr.json")


def test_a_training_goes_with_the_kernel_of_its_data_and_formula(root: Path) -> None:
    kernels = {
        (name, seed, formula): make(f"{name}-{formula}-{seed}", f"{name}/mr/16-{seed}", kernel_formula=formula)
        for name in ("tweets", "films")
        for seed in (13, 42)
        for formula in ("sgd", "signgd")
    }
    with_f0 = make("f0", kernel_formula="sgd", adjust_for_init=True, f0_scaling=10.0)
    of_sgd = training("sgd", "tweets/mr/16-13")
    of_signgd = training("signgd", "films/mr/16-42", optimizer_variant="signgd")
    of_adam = training("adam", "films/mr/16-13", optimizer="adam")
    with_snapshots = training("snapshots", "tweets/mr/16-42", "sgd", optimizer="adam")
    pairs = pair_runs([with_f0, *kernels.values()], [of_sgd, of_signgd, of_adam, with_snapshots])
    assert [pair.training for pair in pairs] == [of_sgd, of_signgd, of_adam, with_snapshots]
    wanted = [("tweets", 13, "sgd"), ("films", 42, "signgd"), ("films", 13, "signgd"), ("tweets", 42, "sgd")]
    assert [pair.kernel for pair in pairs] == [kernels[name] for name in wanted]
    assert [pair.with_f0 for pair in pairs] == [with_f0, None, None, None]
    assert [pair.training.optimizer for pair in pairs] == ["sgd", "signgd", "adam", "adam"]


def test_a_relative_data_folder_is_that_of_a_folder_above_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make("kernel", kernel_formula="sgd"), training("sgd")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    kernels = find_runs([root / "result/kernel"], "kernel_runs")
    trainings = find_runs([root / "result/sgd"], "fine_tuned_runs")
    (pair,) = pair_runs(kernels, trainings)
    assert pair.training.data == pair.kernel.data == ("mr", root / "data/tweets/mr/16-13")


def test_of_trainings_with_several_learning_rates_the_best_on_dev_counts(root: Path) -> None:
    kernel = make("kernel", kernel_formula="sgd")
    rates = {rate: training(f"sgd-{rate}", learning_rate=rate, mr_dev_eval_acc=dev)
             for rate, dev in ((0.1, 0.5), (0.01, 0.75), (0.001, 0.75))}  # fmt: skip
    (pair,) = pair_runs([kernel], [*rates.values()])
    assert pair.training is rates[0.001]
    assert pair.choice is not None and pair.choice.ties == ("0.01",)


@pytest.mark.parametrize("second", [{}, {"learning_rate": 0.2, "mr_dev_eval_acc": None}])
def test_trainings_between_which_nothing_decides_are_refused(root: Path, second: dict[str, Any]) -> None:
    kernel = make("kernel", kernel_formula="sgd")
    pair = [training("a", mr_dev_eval_acc=second.get("mr_dev_eval_acc", 0.5)), training("b", **second)]
    with pytest.raises(DataError):
        pair_runs([kernel], pair)


@pytest.mark.parametrize(
    "other",
    [{"kernel_formula": "signgd"}, {"kernel_formula": "sgd", "data": "films/mr/16-13"},
     {"kernel_formula": "sgd", "data": "tweets/mr/16-42"},
     {"kernel_formula": "sgd", "adjust_for_init": True, "f0_scaling": 1.0}],
    ids=["formula", "task", "seed", "f0"],
)  # fmt: skip
def test_a_training_without_its_kernel_is_refused(root: Path, other: dict[str, Any]) -> None:
    kernel, alone = make("kernel", **other), training("alone")
    with pytest.raises(DataError) as caught:
        pair_runs([kernel], [alone])
    assert caught.value.data == {"path": alone.folder, "formula": "sgd"}


def test_two_kernels_of_one_training_are_refused(root: Path) -> None:
    kernels = [make(name, kernel_formula="sgd") for name in ("a", "b")]
    with pytest.raises(DataError) as caught:
        pair_runs(kernels, [training("sgd")])
    assert caught.value.data["paths"] == [kernel.folder for kernel in kernels]


def test_a_kernel_whose_f0_is_left_out_counts_as_without_if_there_is_no_other(root: Path) -> None:
    around_f0 = make("around-f0", kernel_formula="sgd", adjust_for_init=True, f0_scaling=0.0)
    (pair,) = pair_runs([around_f0], [training("sgd")])
    assert (pair.kernel, pair.with_f0) == (around_f0, None)
    plain = make("plain", kernel_formula="sgd")
    (pair,) = pair_runs([plain, around_f0], [training("again")])
    assert (pair.kernel, pair.with_f0) == (plain, around_f0)


def test_kernels_and_trainings_are_told_apart_by_their_trainer(root: Path) -> None:
    kernel, tuned = make("kernel", kernel_formula="sgd"), training("tuned", kernel_formula="sgd")
    folder = Path("result/linearised")
    folder.mkdir()
    (folder / "run_mr.json").write_text(json.dumps({"task_name": "mr", "trainer": "linearised"}), encoding="utf-8")
    (root / "result/zero-shot").mkdir()
    record = {"task_name": "mr", "trainer": "standard", "do_train": False, "no_train": True}
    (root / "result/zero-shot/run_mr.json").write_text(json.dumps(record), encoding="utf-8")
    for setting, wanted in (("kernel_runs", kernel), ("fine_tuned_runs", tuned)):
        assert [run.folder for run in find_runs([Path("result")], setting)] == [wanted.folder]
    with pytest.raises(FileError, match="linearised"):
        find_runs([Path("result/linearised")], "fine_tuned_runs")


def test_of_two_trainings_with_one_rate_that_with_snapshots_counts(root: Path) -> None:
    make("kernel", kernel_formula="sgd")
    training("alone")
    kept = training("with-snapshots", snapshots="sgd")
    (pair,) = pair_runs(find_runs([Path("result")], "kernel_runs"), find_runs([Path("result")], "fine_tuned_runs"))
    assert (pair.training.folder, pair.choice) == (kept.folder, None)


@pytest.mark.parametrize("setting", ["model_name_or_path", "max_steps", "apply_lora"])
def test_trainings_of_other_settings_are_pairs_of_their_own(root: Path, setting: str) -> None:
    kernel = make("kernel", kernel_formula="sgd")
    own, other = training("own", **{setting: 1}), training("other", learning_rate=0.2, **{setting: 2})
    assert [pair.training for pair in pair_runs([kernel], [own, other])] == [own, other]


def test_a_saved_model_is_found_by_its_weights(root: Path) -> None:
    run = training("sgd")
    assert not run.has_weights and run.snapshot_formula is None
    (run.folder / "adapter_model.safetensors").touch()
    assert run.has_weights
