"""Ensembles by `ensemble.py`, with numbers worked out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmntk.commands.ensemble import main
from lmntk.errors import DataError, FileError, MissingSplitError, SettingError
from lmntk.runs.ensemble import evaluate_ensemble
from lmntk.runs.gather import matching_trials
from lmntk.runs.log import MetricKeys, read_log

TOOL = Path(__file__).resolve().parents[2] / "tools" / "ensemble.py"
LABELS = [0, 0, 1, 1]
# Model 0 errs on the second text, model 1 on the third; their mean on none. Model 0's logits are larger.
RIGHT = [[3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0]]
LEFT = [[2.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 2.0]]


def run(seed, model, array, dev, test, *, task="SST-2", metric="acc", **more):
    name = task.lower()
    return {
        "tag": "x",
        "task_name": task,
        "data_dir": f"data/{task}/16-{seed}/",
        "seed": seed,
        "model_id": model,
        "array_id": array,
        "save_logit_dir": None,
        "output_dir": f"result/{seed}-{model}-{array}",
        f"{name}_dev_eval_{metric}": dev,
        f"{name}_test_eval_{metric}": test,
    } | more


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with the test sets of two seeds of SST-2, four texts each."""
    monkeypatch.chdir(tmp_path)
    for seed in (13, 42):
        write_test_set("SST-2", seed, "sentence\tlabel\n" + "".join(f"text\t{label}\n" for label in LABELS))
    return tmp_path


def write_test_set(task, seed, text, name="test.tsv"):
    path = Path("data", task, f"16-{seed}", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_log(*runs):
    Path("log").write_text("".join(json.dumps(line) + "\n" for line in runs))


def write_logits(name, values, folder="ensemble_predict_results"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    np.save(Path(folder, name), np.array(values))


def call(condition="{'tag': 'x', 'task_name': 'sst-2'}", *flags, n_models=2):
    assert main(["--condition", condition, "--n_models", str(n_models), *flags]) == 0


TWO_MODELS = [run(42, 0, 0, 0.5, 0.75), run(42, 1, 1, 0.25, 0.75)]


@pytest.fixture
def two_models(project):
    write_log(*TWO_MODELS)
    write_logits("sst-2-0-0.npy", RIGHT)
    write_logits("sst-2-1-1.npy", LEFT)
    return project


def test_the_mean_of_the_best_trials_logits_is_scored(two_models, capsys):
    write_log(
        *TWO_MODELS,
        run(42, 0, 2, 0.25, 1.0),
        run(13, 0, 3, 0.75, 0.75),
        run(13, 1, 4, 0.75, 0.25),
        run(13, 2, 5, 0.5, 0.5),
        run(13, -1, -1, 1.0, 1.0),
    )
    write_logits("sst-2-0-3.npy", RIGHT)
    write_logits("sst-2-1-4.npy", np.array(RIGHT)[::-1] / 2)
    call()
    # Seed 13: model 1 alone has classes 1, 1, 1, 0, of which one is right; the sums are [3, 1], [0, 2], [0, 2.5],
    # [1.5, 2]: classes 0, 1, 1, 1, of which three are.
    assert capsys.readouterr().out == (
        "model 0: dev mean 62.5 (standard deviation 12.5), median 62.5; "
        "test mean 75.0 (standard deviation 0.0), median 75.0\n"
        "model 1: dev mean 50.0 (standard deviation 25.0), median 50.0; "
        "test mean 50.0 (standard deviation 25.0), median 50.0\n"
        "seed 13: test 75.0\n"
        "seed 42: test 100.0\n"
        "ensemble: mean 87.5 (standard deviation 12.5), median 87.5, 2 seeds, 2 models\n"
    )


def test_a_single_model_is_judged_as_it_was(two_models, capsys):
    call(n_models=1)
    assert "ensemble: mean 75.0 (standard deviation 0.0), median 75.0, 1 seed, 1 model\n" in capsys.readouterr().out


def test_logits_lie_where_the_flag_says_else_where_the_run_put_them(two_models, capsys):
    write_log(TWO_MODELS[0], TWO_MODELS[1] | {"save_logit_dir": "own", "sst-2_test_eval_acc": 0.5})
    write_logits("sst-2-1-1.npy", 0 * np.array(LEFT), "own")
    call()
    assert "seed 42: test 75.0\n" in capsys.readouterr().out
    write_log(*(line | {"sst-2_test_eval_acc": 0.25} for line in TWO_MODELS))
    for name in ("sst-2-0-0.npy", "sst-2-1-1.npy"):
        write_logits(name, LEFT[::-1], "moved")
    call("{'tag': 'x', 'task_name': 'sst-2'}", "--save_logit_dir", "moved")
    # Classes 1, 0, 0, 0 for labels 0, 0, 1, 1.
    assert "seed 42: test 25.0\n" in capsys.readouterr().out


def test_one_column_of_two_classes_is_class_1_above_zero(two_models, capsys):
    for name in ("sst-2-0-0.npy", "sst-2-1-1.npy"):
        write_logits(name, np.array([[-1], [0], [1], [-2]], dtype=np.float32))
    call()
    assert "seed 42: test 75.0\n" in capsys.readouterr().out


def test_a_task_with_two_metrics_tells_both(project, capsys):
    more = {"mrpc_dev_eval_f1": 0.5, "mrpc_test_eval_f1": 0.8}
    write_log(run(42, 0, 0, 0.5, 0.75, task="MRPC", **more))
    write_test_set("MRPC", 42, "label\ta\tb\tc\td\n" + "".join(f"{label}\t1\t2\tone\ttwo\n" for label in LABELS))
    write_logits("mrpc-0-0.npy", RIGHT)
    call("{'task_name': 'mrpc/f1'}", n_models=1)
    # Of three thought to be of class 1 two are, which are all: precision 2/3, recall 1, F1 4/5.
    assert "; second metric mean 75.0 (standard deviation 0.0), median 75.0\n" in (out := capsys.readouterr().out)
    assert "seed 42: test 80.0, second metric 75.0\nensemble: mean 80.0 " in out
    assert "ensemble: second metric mean 75.0 (standard deviation 0.0), median 75.0, 1 seed, 1 model\n" in out


def test_mnli_mm_reads_the_mismatched_texts_and_its_own_logits_of_a_run_of_mnli(project, capsys):
    more = {"mnli-mm_test_eval_mnli-mm/acc": 0.5}
    write_log(run(42, 0, 0, 0.5, 0.75, task="MNLI", metric="mnli/acc", **more))
    rows = "".join("\t".join([*"01234567", "a", "b", label]) + "\n" for label in ("neutral", "contradiction"))
    write_test_set("MNLI", 42, "header\n" + rows, "test_mismatched.tsv")
    write_logits("mnli-mm-0-0.npy", [[0, 0, 1], [0, 1, 0]])
    call("{'task_name': 'mnli-mm'}", n_models=1)
    assert "test mean 50.0" in (out := capsys.readouterr().out)
    assert "seed 42: test 50.0\n" in out


def test_a_regression_tasks_single_column_is_the_score(project, capsys):
    more = {"sts-b_dev_eval_spearmanr": 0.5, "sts-b_test_eval_spearmanr": 0.5}
    write_log(run(42, 0, 0, 0.5, 1.0, task="STS-B", metric="pearson", **more))
    rows = "".join("\t".join([*"0123456", "a", "b", score]) + "\n" for score in ("0.0", "1.0", "5.0"))
    write_test_set("STS-B", 42, "header\n" + rows)
    write_logits("sts-b-0-0.npy", [[1.0], [2.0], [6.0]])
    call("{'task_name': 'sts-b'}", n_models=1)
    assert "seed 42: test 100.0, second metric 100.0\n" in capsys.readouterr().out


def refusal(kind, condition="{'tag': 'x', 'task_name': 'sst-2'}", folder=None, *, n_models=2, test_key=None):
    """The error of a kind that an ensemble ends with."""
    keys, entries = MetricKeys(test=test_key), read_log("log")
    with pytest.raises(kind) as error:
        evaluate_ensemble(entries, matching_trials(entries, condition, keys), n_models, keys, folder)
    assert "\n" not in str(error.value)
    return error.value


FILE = Path("ensemble_predict_results/sst-2-1-1.npy")


@pytest.mark.parametrize("values", [LEFT[:3], np.zeros((4, 3)), LABELS])
def test_logits_of_another_shape_are_refused(two_models, values):
    write_logits("sst-2-1-1.npy", values)
    error = refusal(FileError)
    assert error.data == {"path": FILE, "shape": list(np.shape(values))}
    assert "[4, 1] or [4, 2]" in str(error)


@pytest.mark.parametrize("values", [[[np.nan, 0.0]] * 4, [["a", "b"]] * 4])
def test_logits_that_are_not_finite_numbers_are_refused(two_models, values):
    write_logits("sst-2-1-1.npy", values)
    assert refusal(FileError).data == {"path": FILE}


def test_logits_with_different_numbers_of_columns_are_not_averaged(two_models):
    write_logits("sst-2-1-1.npy", [[1.0]] * 4)
    assert refusal(DataError).data["files"] == [FILE.with_name("sst-2-0-0.npy"), FILE]


def test_missing_and_damaged_logits_are_named(two_models):
    whole = FILE.read_bytes()
    for damaged in (b"", whole[:-8], b"words"):
        FILE.write_bytes(damaged)
        assert refusal(FileError).data == {"path": FILE}
    FILE.unlink()
    error = refusal(FileError)
    assert error.data == {"path": FILE}
    assert "`save_logit_dir`" in str(error)


def test_a_pickle_in_the_place_of_logits_is_not_loaded(two_models):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(two_models / "made"),)

    np.save(FILE, np.array([Hostile()], dtype=object), allow_pickle=True)
    assert refusal(FileError).data == {"path": FILE}
    assert not (two_models / "made").exists()


def test_logits_that_a_later_run_has_overwritten_are_refused(two_models):
    write_log(*TWO_MODELS, run(13, 0, 0, 0.5, 0.5), run(13, 1, 1, 0.5, 0.5))
    error = refusal(FileError, "{'task_name': 'sst-2'}")
    assert error.data == {"path": FILE.with_name("sst-2-0-0.npy"), "writer": "result/13-0-0"}
    assert "seed 42 (result/42-0-0)" in str(error)


def test_a_run_of_another_tag_is_noticed_if_it_has_overwritten_the_logits(two_models):
    later = run(13, 0, 0, 0.5, 0.75, tag="y", save_logit=True, output_dir="later")
    write_log(*TWO_MODELS, later)
    path = FILE.with_name("sst-2-0-0.npy")
    assert refusal(FileError).data == {"path": path, "writer": "later"}
    absolute = refusal(FileError, "{'tag': 'x'}", str(two_models / path.parent))
    assert absolute.data == {"path": two_models / path, "writer": "later"}
    without_test = {key: value for key, value in later.items() if "_test_eval_" not in key}
    innocent = [
        later | {"save_logit": False},
        later | {"save_logit_dir": "other"},
        later | {"array_id": 7},
        without_test,
        run(13, 0, 0, 0.5, 0.75, tag="y", task="RTE", save_logit=True),
        {key: value for key, value in later.items() if key != "save_logit"},
    ]
    for line in innocent:
        write_log(*TWO_MODELS, line)
        call()
    write_log(later, *TWO_MODELS)
    call()


def test_a_later_run_of_mnli_has_overwritten_the_logits_of_mnli_mm(project):
    write_log(
        run(42, 0, 0, 0.5, 0.5, task="MNLI-mm", metric="mnli-mm/acc", save_logit=True),
        run(42, 0, 0, 0.5, 0.5, task="MNLI", metric="mnli/acc", tag="y", save_logit=True, output_dir="later")
        | {"mnli-mm_test_eval_mnli-mm/acc": 0.5},
    )
    assert refusal(FileError, "{'tag': 'x', 'task_name': 'mnli-mm'}", n_models=1).data["writer"] == "later"


def test_a_repeat_without_save_logit_leaves_the_logits_as_they_are(two_models, capsys, caplog):
    runs = [line | {"save_logit": True} for line in TWO_MODELS]
    write_log(*runs, runs[0] | {"save_logit": False, "sst-2_dev_eval_acc": 1.0})
    call()
    out = capsys.readouterr().out
    assert caplog.messages == ["1 of 3 runs were without `save_logit`: left out"]
    assert "model 0: dev mean 50.0 " in out
    assert "seed 42: test 100.0\n" in out
    write_log(*(line | {"save_logit": False} for line in runs))
    assert refusal(DataError).data == {"n_models": 2}


@pytest.mark.parametrize("noted", [0.5, 0.75 + 1e-5, None])
def test_logits_that_do_not_score_what_their_run_noted_are_refused(two_models, noted):
    write_log(TWO_MODELS[0], TWO_MODELS[1] | {"sst-2_test_eval_acc": noted})
    error = refusal(FileError)
    assert (error.data["path"], error.data["score"]) == (FILE, 0.75)
    assert error.data["noted"] == pytest.approx(np.nan if noted is None else noted, nan_ok=True)
    assert "result/42-1-1" in str(error)


def test_a_score_may_differ_by_rounding_and_be_no_number_on_both_sides(two_models, capsys):
    write_log(TWO_MODELS[0], TWO_MODELS[1] | {"sst-2_test_eval_acc": 0.75 + 1e-7})
    call()
    more = {"sts-b_dev_eval_spearmanr": 0.5, "sts-b_test_eval_spearmanr": None}
    write_log(run(42, 0, 0, 0.5, None, task="STS-B", metric="pearson", **more))
    rows = "".join("\t".join([*"0123456", "a", "b", score]) + "\n" for score in ("0.0", "1.0", "5.0"))
    write_test_set("STS-B", 42, "header\n" + rows)
    write_logits("sts-b-0-0.npy", [[1.0], [1.0], [1.0]])
    call("{'task_name': 'sts-b'}", n_models=1)
    assert "seed 42: test nan, second metric nan\n" in capsys.readouterr().out


def test_a_model_without_a_run_for_a_seed_is_named(two_models):
    write_log(*TWO_MODELS, run(13, 1, 5, 0.5, 0.5))
    assert refusal(DataError).data == {"seed": "13", "model_id": 0}
    write_log({key: value for key, value in TWO_MODELS[0].items() if key != "array_id"})
    assert refusal(DataError).data == {"n_models": 2}


def test_runs_of_a_seed_on_different_data_are_not_mixed(two_models):
    write_log(TWO_MODELS[0], TWO_MODELS[1] | {"data_dir": "data/SST-2/64-42"})
    assert refusal(DataError).data == {"seed": "42", "folders": ["data/SST-2/16-42", "data/SST-2/64-42"]}


def test_a_number_of_models_or_a_key_that_makes_no_sense_is_refused(two_models):
    assert refusal(SettingError, n_models=0).data == {"setting": "n_models", "value": 0}
    assert refusal(SettingError, test_key="seed").data == {"setting": "test_key", "value": "seed"}


def test_runs_of_several_tasks_or_without_a_test_set_are_refused(two_models):
    write_log(*TWO_MODELS, run(42, 0, 0, 0.5, 0.5, task="RTE"))
    assert refusal(DataError, "{'tag': 'x'}").data == {"tasks": ["sst-2", "rte"]}
    Path("data/SST-2/16-42/test.tsv").unlink()
    refusal(MissingSplitError)


def test_runs_on_the_users_data_need_label_words(project):
    write_log(run(42, 0, 0, 0.5, 0.5, task="mine", custom_columns=["text", "label"], mapping="{}"))
    assert refusal(DataError, "{'task_name': 'mine'}", n_models=1).data == {"task": "mine"}


def test_the_command_exits_with_2_on_a_mistake_and_names_flags(two_models):
    def call(*flags):
        command = [sys.executable, str(TOOL), "--condition", "{}", *flags]
        done = subprocess.run(command, cwd=two_models, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr

    assert "--n_models" in call()
    FILE.unlink()
    error = call("--n_models", "2")
    assert str(FILE) in error
    assert "--save_logit," in error and "--save_logit_dir" in error and "`" not in error
