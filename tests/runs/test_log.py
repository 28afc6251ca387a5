"""Reading the log, and choosing runs, metrics and trials."""

import json
import logging
import math

import pytest

from lmntk.data.metrics import compute_metrics
from lmntk.data.tasks import TASKS
from lmntk.errors import DataError, FileError, SettingError
from lmntk.runs.log import (
    MetricKeys,
    Trial,
    best_trial,
    data_seed,
    find_trials,
    metric_keys,
    parse_condition,
    read_log,
    select,
)

OLD = (
    "{'tag': 'old <mask>', 'logging': <IntervalStrategy.NO: 'no'>, 'lr': <SchedulerType.LINEAR: 'linear'>, "
    "'level': <Level.HIGH: 3>, 'thing': <object at 0x7f>, 'device': device(type='cuda', index=0), 'loss': inf, "
    "'low': -inf, 'none': nan, 'acc': np.float64(0.5), 'f1': numpy.float64(nan), 'far': float('inf'), "
    "'dir': PosixPath('a/b'), 'array': array([1.0, -2.0]), 'typed': array([1], dtype=int64), 'pair': (1, 'two'), "
    "'nothing': None, 'flag': True, 'small': -1e-05, 'quotes': \"it's <b>\"}"
)


def log_with(tmp_path, *lines):
    path = tmp_path / "log"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_an_older_dictionary_is_read_and_what_is_no_literal_becomes_text(tmp_path):
    (run,) = read_log(log_with(tmp_path, OLD))
    assert math.isnan(run.pop("none"))
    assert math.isnan(run.pop("f1"))
    assert run == {
        "tag": "old <mask>",
        "logging": "no",
        "lr": "linear",
        "level": 3,
        "thing": "<object at 0x7f>",
        "device": "device(type='cuda', index=0)",
        "loss": math.inf,
        "low": -math.inf,
        "acc": 0.5,
        "far": math.inf,
        "dir": "a/b",
        "array": [1.0, -2.0],
        "typed": "array([1], dtype=int64)",
        "pair": [1, "two"],
        "nothing": None,
        "flag": True,
        "small": -1e-05,
        "quotes": "it's <b>",
    }


def test_both_forms_may_be_mixed_and_what_cannot_be_read_is_skipped_with_one_warning(tmp_path, caplog):
    lines = ['{"tag": "new", "acc": null}', "", '{"tag": "ne', "{'tag': 'old'}", "[1, 2]", "{1: 2}", "{**{}}"]
    path = log_with(tmp_path, *lines, "(" * 10_000, "{'a\0': 1}", '{"last": 1}')
    with caplog.at_level(logging.WARNING):
        assert read_log(path) == [{"tag": "new", "acc": None}, {"tag": "old"}, {"last": 1}]
    assert caplog.messages == [f"{path}: skipped 6 of 9 lines that cannot be read (the first is line 3)"]


def test_a_character_cut_in_half_costs_its_own_line_only(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b'{"tag": "\xc3\n{"tag": "b"}\n')
    assert read_log(path) == [{"tag": "b"}]


def test_code_in_a_line_is_not_run(tmp_path, caplog):
    made = tmp_path / "made"
    code = f"__import__('os').system('touch {made}')"
    path = log_with(tmp_path, f"{{'tag': {code}}}", code, f"{{'tag': (lambda: {code})()}}", f'{{"tag": {code}}}')
    assert [run["tag"] for run in read_log(path)] == [code, f"(lambda: {code})()", code]
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
        ("", "no line that can be read"),
        ("words\n{", "no line that can be read"),
    ],
)
def test_a_log_without_runs_is_refused(tmp_path, content, cause):
    path = tmp_path / "log"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(FileError, match=cause) as error:
        read_log(path)
    assert error.value.data == {"path": path}


@pytest.mark.parametrize("text", ["", "tag", "{'tag': x}", "['tag']", "{1: 2}", "{'a'", "{[]: 1}", "(" * 10_000])
def test_a_condition_that_is_no_dictionary_of_plain_values_is_refused(text):
    with pytest.raises(SettingError) as error:
        parse_condition(text)
    assert error.value.data == {"setting": "condition", "value": text}


def test_code_in_a_condition_is_not_run(tmp_path):
    made = tmp_path / "made"
    with pytest.raises(SettingError):
        parse_condition(f"{{'tag': __import__('os').system('touch {made}')}}")
    assert not made.exists()


def test_task_names_become_a_list_in_lower_case():
    assert parse_condition("{'task_name': 'SST-2', 'seed': 1}") == {"task_name": ["sst-2"], "seed": 1}
    assert parse_condition("{'task_name': ['MRPC/f1', 'mrpc/F1']}") == {"task_name": ["mrpc/f1"]}


@pytest.mark.parametrize("text", ["{'task_name': 3}", "{'task_name': []}", "{'task_name': 'sst-2/f1'}"])
def test_a_task_name_that_makes_no_sense_is_refused(text):
    with pytest.raises(SettingError, match="task_name|sst-2/f1") as error:
        parse_condition(text)
    assert error.value.data["setting"] == "condition"


RUNS = [
    {"tag": "a", "task_name": "SST-2", "seed": 13},
    {"tag": "b", "task_name": "mnli", "seed": 21},
    {"tag": "b", "task_name": "MNLI-mm", "seed": 42},
    {"task_name": "mine", "seed": 13},
]


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("{'tag': 'b', 'task_name': 'MNLI'}", {"mnli": [1]}),
        ("{'task_name': 'mnli-mm'}", {"mnli-mm": [1, 2]}),
        ("{'task_name': ['mnli', 'sst-2', 'cola']}", {"mnli": [1], "sst-2": [0], "cola": []}),
        ("{'seed': [13, 42]}", {"sst-2": [0], "mnli-mm": [2], "mine": [3]}),
        ("{'tag': ['a', 'c']}", {"sst-2": [0]}),
        ("{}", {"sst-2": [0], "mnli": [1], "mnli-mm": [2], "mine": [3]}),
    ],
)
def test_a_condition_selects_the_runs_of_each_task(condition, found):
    selected = select(RUNS, parse_condition(condition))
    assert selected == {task: [RUNS[number] for number in numbers] for task, numbers in found.items()}


@pytest.mark.parametrize(
    ("condition", "key", "facts"),
    [
        ("{'seed': 13, 'tag': 'x'}", "tag", ["'x'", "4 lines read", "a, b"]),
        ("{'tag': ['x', 'y']}", "tag", ["'x' or 'y'", "a, b"]),
        ("{'task_name': 'sst2'}", "task_name", ["'sst2'", "mine, mnli, mnli-mm, sst-2"]),
        ("{'sed': 13}", "sed", ["did you mean 'seed'?"]),
        ("{'qqqq': 13}", "qqqq", ["'qqqq'"]),
        ("{'tag': 'a', 'seed': 21}", None, ["tag 'a' by 1, seed 21 by 1"]),
    ],
)
def test_when_nothing_matches_the_condition_to_blame_is_named(condition, key, facts):
    with pytest.raises(DataError) as error:
        select(RUNS, parse_condition(condition))
    assert error.value.data == {"condition": parse_condition(condition), "key": key}
    assert all(fact in str(error.value) for fact in facts)


@pytest.mark.parametrize(
    ("asked", "task", "keys"),
    [
        ("sst-2", "sst-2", ("sst-2_dev_eval_acc", "sst-2_test_eval_acc", None)),
        ("mine", "mine", ("mine_dev_eval_acc", "mine_test_eval_acc", None)),
        ("cola", "cola", ("cola_dev_eval_mcc", "cola_test_eval_mcc", None)),
        ("mrpc", "mrpc", ("mrpc_dev_eval_f1", "mrpc_test_eval_f1", "mrpc_test_eval_acc")),
        ("qqp/f1", "qqp", ("qqp_dev_eval_f1", "qqp_test_eval_f1", "qqp_test_eval_acc")),
        ("mrpc/acc", "mrpc", ("mrpc_dev_eval_acc", "mrpc_test_eval_acc", "mrpc_test_eval_f1")),
        ("sts-b", "sts-b", ("sts-b_dev_eval_pearson", "sts-b_test_eval_pearson", "sts-b_test_eval_spearmanr")),
        (
            "sts-b/spearmanr",
            "sts-b",
            ("sts-b_dev_eval_spearmanr", "sts-b_test_eval_spearmanr", "sts-b_test_eval_pearson"),
        ),
        ("mnli", "mnli", ("mnli_dev_eval_mnli/acc", "mnli_test_eval_mnli/acc", None)),
        ("mnli-mm", "mnli", ("mnli_dev_eval_mnli/acc", "mnli-mm_test_eval_mnli-mm/acc", None)),
        ("mnli-mm", "mnli-mm", ("mnli-mm_dev_eval_mnli-mm/acc", "mnli-mm_test_eval_mnli-mm/acc", None)),
    ],
)
def test_the_metrics_keys_are_the_published_ones(asked, task, keys):
    assert metric_keys(asked, task) == MetricKeys(*keys)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_main_metrics_of_every_task_are_among_those_that_are_computed(task):
    computed = compute_metrics(task, [0, 1, 1], [0, 1, 0])
    names = [task.metric_prefix + name for name in task.main_metrics]
    assert set(names) <= computed.keys()


def test_runs_without_dev_or_test_metric_are_no_trials_and_null_is_no_number():
    runs = [
        {"task_name": "MRPC", "mrpc_dev_eval_f1": 0.5, "mrpc_test_eval_f1": 1, "mrpc_test_eval_acc": 0.25},
        {"task_name": "MRPC", "mrpc_dev_eval_f1": 0.5},
        {"task_name": "MRPC", "mrpc_test_eval_f1": 0.5},
        {"task_name": "MRPC", "mrpc_dev_eval_f1": "0.5", "mrpc_test_eval_f1": True},
        {"task_name": "MRPC", "mrpc_dev_eval_f1": None, "mrpc_test_eval_f1": 0.5},
    ]
    first, last = find_trials(runs, "mrpc")
    assert (first.entry, first.dev, first.test, first.second) == (runs[0], 0.5, 1.0, 0.25)
    assert (last.entry, last.test) == (runs[4], 0.5)
    assert math.isnan(last.dev)
    assert math.isnan(last.second)


def test_given_keys_replace_the_tasks():
    run = {"task_name": "mr", "mr_dev_eval_acc": 0.5, "mr_test_eval_acc": 0.75, "loss": 2.0, "seconds": 3}
    assert find_trials([run], "mr", MetricKeys("loss", None, "seconds")) == [Trial(run, 2.0, 0.75, 3.0)]


def trial(folder, dev, test=0.0):
    return Trial({"output_dir": folder}, dev, test, None)


def test_the_best_trial_is_best_on_dev_and_first_by_folder_among_equals():
    best, count, ignored = best_trial([trial("c", 0.75), trial("b", 0.75), trial("a", 0.5), trial("d", math.nan)])
    assert (best.entry["output_dir"], count, ignored) == ("b", 4, 0)


def test_a_dev_metric_that_is_no_number_never_beats_one():
    assert best_trial([trial("a", math.nan), trial("b", -0.25)]).trial.entry["output_dir"] == "b"
    assert best_trial([trial("b", math.nan), trial("a", math.nan)]).trial.entry["output_dir"] == "a"


def test_of_runs_with_one_output_folder_the_latest_counts():
    best, count, ignored = best_trial([trial("a", 0.9), trial("b", 0.6), trial("a", 0.5), trial("a", 0.55, 0.125)])
    assert (best.dev, count, ignored) == (0.6, 2, 2)
    assert best_trial([trial("a", 0.9), trial("a", 0.5, 0.125)]).trial.test == 0.125


def test_runs_without_an_output_folder_are_no_repeats():
    trials = [Trial({}, 0.5, 0.25, None), Trial({}, 0.75, 0.5, None)]
    assert best_trial(trials) == (trials[1], 2, 0)


@pytest.mark.parametrize(
    ("folder", "seed"), [("data/k-shot-1k-test/SST-2/16-42", "42"), ("x/16-13//", "13"), ("k-shot/mine", "mine")]
)
def test_the_data_seed_is_what_follows_the_last_dash_of_the_folder(folder, seed):
    assert data_seed({"data_dir": folder}) == seed


def test_what_run_py_appends_is_read_back(tmp_path):
    from lmntk.storage.run_results import append_log

    append_log(tmp_path / "log", {"tag": "ü", "mnli_dev_eval_mnli/acc": 0.1, "nan": math.nan})
    assert read_log(tmp_path / "log") == [{"tag": "ü", "mnli_dev_eval_mnli/acc": 0.1, "nan": None}]
    assert json.loads((tmp_path / "log").read_text())["tag"] == "ü"
