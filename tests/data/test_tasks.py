"""The table of tasks holds the published prompts, columns and limits."""

import pytest

from lmntk.data.tasks import TASKS, Task, find_task
from lmntk.errors import UnknownNameError

IT_WAS = "*cls**sent_0*_It_was*mask*.*sep+*"
THIS_IS = "*cls**sent_0*_This_is*mask*.*sep+*"
PAIR = "*cls**sent_0**mask*,*+sentl_1**sep+*"
QUESTION = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"

# name: template, label words in logit order, text columns, label column, format, header
ROWS = {
    "SST-2": (IT_WAS, "terrible great", (0,), 1, "tsv", True),
    "sst-5": (IT_WAS, "terrible bad okay good great", (1,), 0, "csv", False),
    "mr": (IT_WAS, "terrible great", (1,), 0, "csv", False),
    "cr": (IT_WAS, "terrible great", (1,), 0, "csv", False),
    "mpqa": (IT_WAS, "terrible great", (1,), 0, "csv", False),
    "subj": (THIS_IS, "subjective objective", (1,), 0, "csv", False),
    "trec": (
        *("*cls**mask*:*+sent_0**sep+*", "Description Entity Expression Human Location Number"),
        *((1,), 0, "csv", False),
    ),
    "CoLA": (THIS_IS, "incorrect correct", (3,), 1, "tsv", False),
    "MRPC": (PAIR, "No Yes", (3, 4), 0, "tsv", True),
    "QQP": (PAIR, "No Yes", (3, 4), 5, "tsv", True),
    "QNLI": (QUESTION, "Yes No", (1, 2), -1, "tsv", True),
    "RTE": (QUESTION, "Yes No", (1, 2), -1, "tsv", True),
    "MNLI": (QUESTION, "No Yes Maybe", (8, 9), -1, "tsv", True),
    "mnli-mm": (QUESTION, "No Yes Maybe", (8, 9), -1, "tsv", True),
    "SNLI": (QUESTION, "No Yes Maybe", (7, 8), -1, "tsv", True),
    "ag_news": (
        *("*cls**sent_0*_This_article_is_about*mask*_news.*sep+*", "world sports business tech"),
        *((2,), 0, "csv", False),
    ),
    "STS-B": (PAIR, "No Yes", (7, 8), -1, "tsv", True),
    "WNLI": (QUESTION, "No Yes", (1, 2), -1, "tsv", True),
}

LABELS = {
    "sst-5": ("0", "1", "2", "3", "4"),
    "trec": ("0", "1", "2", "3", "4", "5"),
    "ag_news": ("1", "2", "3", "4"),
    "QNLI": ("entailment", "not_entailment"),
    "RTE": ("entailment", "not_entailment"),
    "MNLI": ("contradiction", "entailment", "neutral"),
    "mnli-mm": ("contradiction", "entailment", "neutral"),
    "SNLI": ("contradiction", "entailment", "neutral"),
}

# max_seq_length, first_sent_limit, other_sent_limit, num_sample
LIMITS = {
    "mr": (None, 110, 50, None),
    "cr": (None, 110, 50, None),
    "mpqa": (None, 110, None, None),
    "subj": (None, 110, 50, None),
    "trec": (None, 110, None, None),
    "RTE": (256, 240, None, None),
    "MNLI": (256, 240, None, None),
    "mnli-mm": (256, 240, None, None),
    "SNLI": (256, None, None, 4),
    "ag_news": (256, 240, None, None),
}

METRICS = {"MRPC": "acc_and_f1", "QQP": "acc_and_f1", "CoLA": "mcc", "STS-B": "pearson_and_spearman"}


def test_the_table_has_the_17_tasks_and_mnli_on_mismatched_texts():
    assert list(TASKS) == list(ROWS)
    assert len(TASKS) == 18


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_prompt_the_columns_and_the_limits_of_its_task(name):
    template, words, text_columns, label_column, file_format, header = ROWS[name]
    task = TASKS[name]
    assert task.name == name
    assert task.template == template
    assert task.labels == LABELS.get(name, ("0", "1"))
    assert list(task.mapping.items()) == list(zip(task.labels, words.split(), strict=True))
    assert (task.text_columns, task.label_column) == (text_columns, label_column)
    assert (task.file_format, task.header) == (file_format, header)
    limits = (task.max_seq_length, task.first_sent_limit, task.other_sent_limit, task.num_sample)
    assert limits == LIMITS.get(name, (None, None, None, None))
    assert task.metric == METRICS.get(name, "acc")
    assert task.metric_prefix == {"MNLI": "mnli/", "mnli-mm": "mnli-mm/"}.get(name, "")
    assert task.regression == (name == "STS-B")
    assert task.skip_short_rows == (name == "QQP")
    assert task.seeds_build_on_each_other == (name == "CoLA")
    assert task.num_sentences == (2 if "sentl_1" in template else 1)


def test_key_is_the_lower_case_name():
    assert [TASKS[name].key for name in ("SST-2", "CoLA", "mnli-mm")] == ["sst-2", "cola", "mnli-mm"]


def test_both_mnli_tasks_share_a_folder_and_a_dev_file_but_not_the_test_file():
    matched, mismatched = TASKS["MNLI"], TASKS["mnli-mm"]
    assert matched.folder == mismatched.folder == "MNLI"
    files = [[task.file_name(split) for split in ("train", "dev", "test")] for task in (matched, mismatched)]
    assert files == [
        ["train.tsv", "dev_matched.tsv", "test_matched.tsv"],
        ["train.tsv", "dev_matched.tsv", "test_mismatched.tsv"],
    ]


@pytest.mark.parametrize(
    ("name", "original"),
    [("SST-2", "dev.tsv"), ("mr", "test.csv"), ("MNLI", "dev_matched.tsv"), ("mnli-mm", "dev_mismatched.tsv")],
)
def test_test_sets_come_from_glue_dev_files_and_from_csv_test_files(name, original):
    assert TASKS[name].original_name("test") == original
    assert TASKS[name].original_name("train").startswith("train.")


@pytest.mark.parametrize(
    ("name", "columns"), [("SST-2", 2), ("CoLA", 4), ("MRPC", 5), ("QQP", 6), ("RTE", 4), ("MNLI", 11), ("ag_news", 3)]
)
def test_a_row_has_columns_for_the_texts_and_for_a_label_behind_them(name, columns):
    assert TASKS[name].min_columns == columns


@pytest.mark.parametrize("spelling", ["SST-2", "sst-2", "Sst-2"])
def test_a_task_is_found_in_any_case(spelling):
    assert find_task(spelling) is TASKS["SST-2"]


def test_an_unknown_task_is_refused_with_the_likely_one_and_the_list():
    with pytest.raises(UnknownNameError, match="did you mean 'SST-2'") as caught:
        find_task("sst2")
    assert caught.value.data == {"name": "sst2", "kind": "task", "options": [*TASKS, "custom"]}


def test_a_new_task_is_one_row():
    task = Task("new", ("a", "b"), IT_WAS, {"a": "no", "b": "yes"}, (1,), 0, "csv", header=False)
    assert (task.key, task.folder, task.num_sentences, task.file_name("dev")) == ("new", "new", 1, "dev.csv")


def test_the_sampler_finds_the_label_of_a_new_csv_task_wherever_it_stands():
    task = Task("new", ("a", "b"), IT_WAS, {"a": "no", "b": "yes"}, (0,), 1, "csv")
    assert task.sampling_label_column == 1


def test_a_users_own_data_are_not_an_unknown_task():
    with pytest.raises(UnknownNameError, match="task 'Custom' is for your own data, .* see docs/how-to/own-data.md"):
        find_task("Custom")
