"""Results over seeds by `gather_result.py`, with numbers worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmntk.commands.gather import main
from lmntk.errors import DataError, SettingError
from lmntk.runs.gather import matching_trials
from lmntk.runs.log import MetricKeys

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gather_result.py"


def run(seed, dev, test, *, tag="x", task="SST-2", k=16, folder=None, metric="acc", **more):
    """A line of the log, whose data seed is its seed."""
    name = task.lower()
    return {
        "tag": tag,
        "task_name": task,
        "few_shot_type": "prompt",
        "trainer": "kernel",
        "data_dir": f"data/k-shot/{task}/{k}-{seed}",
        "num_k": k,
        "seed": seed,
        "output_dir": folder or f"result/{tag}/{k}-{seed}",
        f"{name}_dev_eval_{metric}": dev,
        f"{name}_test_eval_{metric}": test,
    } | more


@pytest.fixture
def gather(tmp_path, capsys, caplog):
    """A function that writes a log, runs the tool on it, and returns what it printed and its warnings."""

    def call(runs, condition, *flags):
        log = tmp_path / "log"
        log.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in runs))
        caplog.clear()
        assert main(["--log", str(log), "--condition", str(condition), *map(str, flags)]) == 0
        return capsys.readouterr().out, caplog.messages

    return call


TWO_TAGS = [
    *(run(100, 0.5, 0.9), run(13, 0.5, 0.6), run(21, 0.5, 0.75)),
    *(run(13, 0.75, 0.5, tag="y"), run(100, 0.25, 1.0, tag="y")),
]


def test_each_seeds_best_trial_on_dev_is_told_and_summarised(gather):
    runs = [
        run(42, 0.5, 0.9, folder="c", learning_rate=1e-5, max_steps=None),
        run(42, 0.75, 0.5, folder="b", learning_rate=1e-4, max_steps=10, kernel_lambda=0.5),
        run(42, 0.75, 0.8, folder="d"),
        run(13, 0.25, 0.6, folder="e"),
        run(13, None, 1.0, folder="a"),
    ]
    printed, noted = gather(runs, {"tag": "x", "task_name": "sst-2", "few_shot_type": "prompt"})
    # Of 0.6 and 0.5 the mean is 0.55, and each is 0.05 from it.
    assert printed == (
        "tag x, task sst-2, K 16, type prompt, trainer kernel\n"
        "  13-13: best dev 25.0, test 60.0, 2 trials\n"
        "    output_dir: e\n"
        "  42-42: best dev 75.0, test 50.0, 3 trials\n"
        "    learning_rate: 0.0001 | max_steps: 10 | kernel_lambda: 0.5 | output_dir: b\n"
        "  mean 55.0 (standard deviation 5.0), median 55.0, 2 seeds, 5 runs\n"
    )
    assert noted == []


def test_one_data_seed_may_have_runs_of_several_seeds(gather):
    other = run(42, 0.5, 0.75, folder="b") | {"seed": 7}
    printed, _ = gather([run(42, 0.5, 0.25), other], {"tag": "x"})
    assert [line for line in printed.splitlines() if "best" in line] == [
        "  42-7: best dev 50.0, test 75.0, 1 trial",
        "  42-42: best dev 50.0, test 25.0, 1 trial",
    ]
    assert "mean 50.0 (standard deviation 25.0), median 50.0, 2 seeds, 2 runs" in printed


def test_repeats_of_an_output_folder_are_ignored_but_for_the_latest(gather):
    runs = [run(42, 0.9, 0.9), run(42, 0.8, 0.8), run(42, 0.5, 0.25), run(42, 0.25, 0.75, folder="other")]
    printed, noted = gather(runs, {"tag": "x"})
    assert "  42-42: best dev 50.0, test 25.0, 2 trials (2 ignored)\n" in printed
    assert noted == ["ignored 2 runs whose output_dir a later run has too"]


def test_a_list_in_the_condition_gives_a_row_for_each_tag_as_csv(gather):
    printed, noted = gather(TWO_TAGS, {"tag": ["x", "y", "z"], "task_name": "SST-2"}, "--format", "csv")
    # 0.9, 0.6, 0.75: deviations 0.15, -0.15, 0, so the square root of 0.045 / 3 = 0.1225.
    assert printed == (
        "tag,task,K,type,trainer,dev mean,test mean,standard deviation,median,seeds,runs,missing seeds\n"
        "x,sst-2,16,prompt,kernel,50.0,75.0,12.2,75.0,3,3,\n"
        "y,sst-2,16,prompt,kernel,50.0,75.0,25.0,75.0,2,2,21\n"
    )
    assert noted == ["y, sst-2, 16, prompt, kernel: missing seeds 21"]


def test_markdown_is_aligned_with_numbers_to_the_right(gather):
    runs = [run(42, 0.5, 1.0, tag="a|b", kernel_formula="sgd"), run(42, 0.5, 0.5, kernel_formula="signgd")]
    printed, _ = gather(runs, {"task_name": "sst-2"}, "--format", "markdown", "--seeds", 42, 13)
    # fmt: off
    assert printed == (
        "| tag  | task  |  K | type   | trainer | kernel_formula | dev mean | test mean | standard deviation | median | seeds | runs | missing seeds |\n"  # noqa: E501
        "|------|-------|---:|--------|---------|----------------|---------:|----------:|-------------------:|-------:|------:|-----:|---------------|\n"  # noqa: E501
        "| a\\|b | sst-2 | 16 | prompt | kernel  | sgd            |     50.0 |     100.0 |                0.0 |  100.0 |     1 |    1 | 13            |\n"  # noqa: E501
        "| x    | sst-2 | 16 | prompt | kernel  | signgd         |     50.0 |      50.0 |                0.0 |   50.0 |     1 |    1 | 13            |\n"  # noqa: E501
    )
    # fmt: on


def test_the_seeds_asked_for_are_those_that_may_be_missing(gather):
    _, noted = gather(TWO_TAGS, {"tag": ["x", "y"]}, "--seeds", 13, 87)
    assert noted == [f"{tag}, sst-2, 16, prompt, kernel: missing seeds 87" for tag in ("x", "y")]


def test_another_k_or_task_has_seeds_of_its_own(gather):
    runs = [run(13, 0.5, 0.5), run(21, 0.5, 0.5, k=64), run(42, 0.5, 0.5, task="RTE")]
    printed, noted = gather(runs, {"tag": "x"}, "--format", "csv")
    assert [line.split(",")[1:3] for line in printed.splitlines()[1:]] == [
        ["sst-2", "16"],
        ["sst-2", "64"],
        ["rte", "16"],
    ]
    assert noted == []


def test_settings_that_differ_separate_groups_where_the_trainer_heeds_them(gather):
    runs = [
        run(42, 0.5, 0.5, kernel_solver="lstsq", optimizer="adam", folder="a"),
        run(42, 0.5, 0.625, kernel_solver="svr", optimizer="sgd", folder="b"),
        run(42, 0.5, 0.75, trainer="standard", kernel_solver="logistic", optimizer="adam", folder="c"),
        run(42, 0.5, 0.875, trainer="standard", optimizer="adam", folder="d", no_train=True),
    ]
    printed, _ = gather(runs, {"tag": "x"}, "--format", "csv")
    rows = [line.split(",") for line in printed.splitlines()]
    assert rows[0][4:9] == ["trainer", "kernel_solver", "zero-shot", "dev mean", "test mean"]
    assert sorted([*row[4:7], row[8]] for row in rows[1:]) == [
        ["kernel", "lstsq", "False", "50.0"],
        ["kernel", "svr", "False", "62.5"],
        ["standard", "", "False", "75.0"],
        ["standard", "", "True", "87.5"],
    ]


def test_a_kernel_run_is_zero_shot_only_by_no_train_which_uses_no_settings(gather):
    settings = {"optimizer": "adam", "optimizer_variant": "", "kernel_solver": "lstsq"}
    runs = [
        run(42, 0.5, 0.5, folder="a", do_train=False, **settings),
        run(42, 0.5, 0.625, folder="b", do_train=False, no_train=True, **settings),
        run(42, 0.5, 0.75, folder="c", trainer="standard", do_train=False, **settings),
        run(42, 0.5, 0.875, folder="d", trainer="standard", do_train=True, **settings | {"optimizer": "sgd"}),
        run(42, 0.5, 1.0, folder="e", trainer="standard", do_train=True, **settings),
        run(42, 0.5, 0.25, folder="f", do_train=True, **settings | {"kernel_solver": "svr"}),
    ]
    printed, _ = gather(runs, {"tag": "x"}, "--format", "csv")
    rows = [line.split(",") for line in printed.splitlines()]
    assert rows[0][4:10] == ["trainer", "kernel_solver", "optimizer", "zero-shot", "dev mean", "test mean"]
    assert sorted([*row[4:8], row[9]] for row in rows[1:]) == [
        ["kernel", "", "", "True", "62.5"],
        ["kernel", "lstsq", "", "False", "50.0"],
        ["kernel", "svr", "", "False", "25.0"],
        ["standard", "", "", "True", "75.0"],
        ["standard", "", "adam", "False", "100.0"],
        ["standard", "", "sgd", "False", "87.5"],
    ]


MRPC = [
    run(42, 0.9, 0.5, task="MRPC", folder="a", mrpc_dev_eval_f1=0.25, mrpc_test_eval_f1=0.75),
    run(42, 0.1, 0.25, task="MRPC", folder="b", mrpc_dev_eval_f1=0.5, mrpc_test_eval_f1=1.0),
]


@pytest.mark.parametrize(
    ("asked", "dev", "test", "second"),
    [("mrpc/f1", 50, 100, 25), ("MRPC", 50, 100, 25), ("mrpc/acc", 90, 50, 75)],
)
def test_a_task_with_two_metrics_is_chosen_by_one_and_tells_both(gather, asked, dev, test, second):
    printed, _ = gather(MRPC, {"task_name": asked})
    assert f"  42-42: best dev {dev}.0, test {test}.0, second metric {second}.0, 2 trials\n" in printed
    assert printed.endswith(f"  second metric: mean {second}.0 (standard deviation 0.0), median {second}.0\n")


def test_the_second_metric_has_a_column_where_a_task_has_one(gather):
    printed, _ = gather([*MRPC, run(42, 0.5, 0.5)], {"task_name": ["mrpc/f1", "sst-2"]}, "--format", "csv")
    assert [line.split(",")[9:11] for line in printed.splitlines()] == [
        ["second mean", "seeds"],
        ["25.0", "1"],
        ["", "1"],
    ]


def test_mnli_mm_takes_the_runs_of_mnli_that_were_tested_on_it_and_its_own(gather):
    more = {"mnli-mm_test_eval_mnli-mm/acc": 0.75}
    runs = [
        run(13, 0.5, 0.25, task="mnli", metric="mnli/acc", folder="a", **more),
        run(21, 0.5, 0.25, task="MNLI-mm", metric="mnli-mm/acc", folder="b"),
        run(42, 0.5, 1.0, task="MNLI", metric="mnli/acc", folder="c"),
    ]
    printed, noted = gather(runs, {"task_name": "mnli-mm"})
    assert "  mean 50.0 (standard deviation 25.0), median 50.0, 2 seeds, 2 runs\n" in printed
    assert noted == ["1 of 3 runs of mnli-mm lack a dev or test metric: left out"]
    printed, _ = gather(runs, {"task_name": "mnli"})
    # 0.25 and 1: the mean is 0.625, and each is 0.375 from it.
    assert "  mean 62.5 (standard deviation 37.5), median 62.5, 2 seeds, 2 runs\n" in printed


def test_keys_may_be_given_for_one_task(gather):
    runs = [run(42, 0.5, 0.5, folder="a", loss=0.75), run(42, 0.25, 0.25, folder="b", loss=1.0)]
    printed, _ = gather(runs, {"tag": "x"}, "--key", "loss", "--test_key2", "loss")
    assert "best dev 100.0, test 25.0, second metric 100.0, 2 trials" in printed


def test_a_metric_that_is_no_number_is_shown_as_such(gather):
    printed, _ = gather([run(42, 0.5, None), run(13, 0.5, 0.5)], {"tag": "x"}, "--format", "csv")
    assert printed.splitlines()[1] == "x,sst-2,16,prompt,kernel,50.0,nan,nan,nan,2,2,"


def test_older_lines_half_lines_and_hostile_lines_may_be_in_the_log(gather, tmp_path):
    made = tmp_path / "made"
    older = run(42, 0.5, 0.75, task="sst-2", folder="o")
    lines = [
        str(older).replace("'kernel'", "<Trainer.KERNEL: 'kernel'>").replace("0.75", "np.float64(0.75)"),
        '{"tag": "x", "task_na',
        f"{{'tag': __import__('os').system('touch {made}'), 'task_name': 'sst-2'}}",
        run(13, 0.5, 0.25),
    ]
    printed, noted = gather(lines, {"tag": "x"})
    assert "trainer kernel\n" in printed
    assert "  mean 50.0 (standard deviation 25.0), median 50.0, 2 seeds, 2 runs\n" in printed
    assert noted == [f"{tmp_path}/log: skipped 1 of 4 lines that cannot be read (the first is line 2)"]
    assert not made.exists()


@pytest.mark.parametrize(
    ("condition", "keys", "kind", "data"),
    [
        ({"tag": "w"}, (), DataError, {"condition": {"tag": "w"}, "key": "tag"}),
        ("{'tag': x}", (), SettingError, {"setting": "condition", "value": "{'tag': x}"}),
        ({"tag": "x"}, ("loss",), SettingError, {"setting": "key", "tasks": ["sst-2", "cola"]}),
        ({"task_name": "cola"}, (), DataError, {"tasks": ["cola"]}),
    ],
)
def test_a_condition_or_key_that_selects_nothing_is_refused(condition, keys, kind, data):
    lacking = {key: value for key, value in run(42, 0.5, 0.5, task="CoLA").items() if "eval" not in key}
    with pytest.raises(kind) as error:
        matching_trials([*TWO_TAGS, lacking], str(condition), MetricKeys(*keys))
    assert error.value.data == data


@pytest.mark.parametrize(("flags", "fact"), [(["--sed", "3"], "--seeds"), (["--format", "table"], "--format")])
def test_a_mistake_in_a_flag_names_the_flag(flags, fact, capsys):
    assert main(["--condition", "{}", *flags]) == 2
    assert fact in capsys.readouterr().err


def test_latex_is_a_table_in_booktabs(gather):
    printed, _ = gather(TWO_TAGS, {"tag": ["x", "y"]}, "--format", "latex")
    assert printed.startswith(
        "\\begin{tabular}{llrllrrrrrrl}\n\\toprule\ntag & task & K & type & trainer & dev mean & "
    )
    assert "\ny & sst-2 & 16 & prompt & kernel & 50.0 & 75.0 & 25.0 & 75.0 & 2 & 2 & 21 \\\\\n" in printed


def test_runs_of_several_models_are_noted(gather):
    runs = [run(42, 0.5, 0.5, model_name_or_path=name, folder=name) for name in ("a", "b")]
    _, (noted,) = gather(runs, {"tag": "x"})
    assert "2 models (a, b)" in noted


def test_a_task_of_several_without_runs_is_noted(gather):
    _, noted = gather(TWO_TAGS, {"task_name": ["sst-2", "cola"], "tag": "x"})
    assert noted == ["no run of cola meets the other conditions"]


def test_the_command_reads_log_in_the_working_directory_or_exits_with_2(tmp_path):
    def call(*flags):
        command = [sys.executable, str(TOOL), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = call("--condition", "{}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --log log cannot be read (No such file or directory)")
    (tmp_path / "log").write_text(json.dumps(run(42, 0.5, 0.5)) + "\n{'half")
    done = call("--condition", "{'task_name': 'sst-2'}")
    assert done.returncode == 0
    assert "  mean 50.0 (standard deviation 0.0), median 50.0, 1 seed, 1 run\n" in done.stdout
    assert done.stderr == "warning: log: skipped 1 of 2 lines that cannot be read (the first is line 2)\n"
    assert "population" in call("--help").stdout


def test_the_help_does_not_wait_for_pandas():
    command = [sys.executable, "-X", "importtime", str(TOOL), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "lmntk.runs.gather" in done.stderr
    assert "pandas" not in done.stderr


def test_counts_in_the_text_have_no_separators(gather):
    runs = [run(42, 0.5, 0.5, folder=str(number)) for number in range(1000)]
    printed, _ = gather(runs, {"tag": "x"})
    assert ", 1000 trials\n" in printed and ", 1 seed, 1000 runs\n" in printed
