"""Files of every format are read as they stand, and what is wrong with one is told with file and line."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmntk.data.examples import Example, read_examples, split_file
from lmntk.data.formats import format_row, read_rows
from lmntk.data.tasks import TASKS
from lmntk.errors import MissingSplitError, UsageError


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def error_of(task, path):
    with pytest.raises(UsageError) as caught:
        read_examples(TASKS[task], path)
    return str(caught.value)


def tsv(*rows):
    return "".join("\t".join(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("task", "header", "row", "example"),
    [
        ("SST-2", ["sentence", "label"], ["good fun", "1"], Example(("good fun",), "1")),
        ("CoLA", None, ["gj04", "0", "*", "Him left."], Example(("Him left.",), "0")),
        ("MRPC", ["Quality", "#1 ID", "#2 ID", "#1", "#2"], ["1", "7", "8", "One.", "Two."], (("One.", "Two."), "1")),
        ("QQP", ["id", "a", "b", "c", "d", "e"], ["5", "6", "7", "Why?", "How?", "0"], (("Why?", "How?"), "0")),
        ("QNLI", ["index", "q", "s", "label"], ["0", "Who?", "He.", "entailment"], (("Who?", "He."), "entailment")),
        (
            "RTE",
            ["index", "1", "2", "label"],
            ["0", "A b.", "A.", "not_entailment"],
            (("A b.", "A."), "not_entailment"),
        ),
        ("MNLI", list("abcdefghijkl"), [*"01234567", "P.", "H.", "x", "neutral"], (("P.", "H."), "neutral")),
        ("mnli-mm", list("abcdefghijkl"), [*"01234567", "P.", "H.", "x", "neutral"], (("P.", "H."), "neutral")),
        ("SNLI", list("abcdefghijk"), [*"0123456", "P.", "H.", "x", "contradiction"], (("P.", "H."), "contradiction")),
        ("STS-B", list("abcdefghij"), [*"0123456", "One.", "Two.", "3.800"], (("One.", "Two."), "3.800")),
        ("WNLI", ["index", "1", "2", "label"], ["0", "It.", "That.", "1"], (("It.", "That."), "1")),
    ],
)
def test_a_tsv_row_gives_its_texts_and_its_label(write, task, header, row, example):
    path = write("train.tsv", tsv(*([header] if header else []), row))
    texts, label = (example.texts, example.label) if isinstance(example, Example) else example
    assert read_examples(TASKS[task], path) == [Example(texts, label)]


@pytest.mark.parametrize("task", ["mr", "sst-5", "subj", "trec", "cr", "mpqa"])
def test_a_csv_row_is_label_and_text(write, task):
    path = write("train.csv", '1,"a, ""b"" c"\n0,plain\n')
    assert read_examples(TASKS[task], path) == [Example(('a, "b" c',), "1"), Example(("plain",), "0")]


def test_ag_news_uses_the_description_and_not_the_title(write):
    path = write("train.csv", '3,Title,"Shares, up"\n')
    assert read_examples(TASKS["ag_news"], path) == [Example(("Shares, up",), "3")]


def test_quotation_marks_in_tsv_are_text(write):
    path = write("dev.tsv", 'sentence\tlabel\n"so-called\t0\n""quoted"" fun"\t1\n')
    assert [example.texts[0] for example in read_examples(TASKS["SST-2"], path)] == ['"so-called', '""quoted"" fun"']


def test_words_for_missing_values_and_empty_texts_are_texts_in_csv(write):
    path = write("train.csv", '0,NA\n1,null\n0,nan\n1,\n0,""\n1,None\n')
    texts = [example.texts[0] for example in read_examples(TASKS["mr"], path)]
    assert texts == ["NA", "null", "nan", "", "", "None"]


def test_texts_that_look_like_numbers_stay_as_they_are_written(write):
    path = write("train.csv", "0,1.50\n1,007\n0,1e3\n")
    assert [example.texts[0] for example in read_examples(TASKS["mr"], path)] == ["1.50", "007", "1e3"]


def test_csv_labels_are_whole_numbers_in_one_spelling(write):
    path = write("train.csv", "00,a\n 1,b\n1 ,c\n")
    assert [example.label for example in read_examples(TASKS["mr"], path)] == ["0", "1", "1"]


def test_a_csv_text_may_run_over_lines_and_later_lines_are_still_counted_right(write):
    path = write("train.csv", '0,"two\nlines"\n\n1,"more\r\nlines"\n7,x\n')
    assert error_of("mr", path) == f"{path} line 6: label '7' is not among the labels of mr, 0, 1"
    path = write("train.csv", '0,"two\nlines"\n1,"more\r\nlines"\n')
    assert [example.texts[0] for example in read_examples(TASKS["mr"], path)] == ["two\nlines", "more\r\nlines"]


def test_other_line_ends_blank_lines_and_a_byte_order_mark_change_nothing(write):
    unix = write("unix.tsv", "sentence\tlabel\na\t0\nb\t1\n")
    dos = write("dos.tsv", "\ufeffsentence\tlabel\r\na\t0\r\n\r\nb\t1")
    assert read_examples(TASKS["SST-2"], dos) == read_examples(TASKS["SST-2"], unix)
    unix = write("unix.csv", "0,a\n1,b\n")
    dos = write("dos.csv", "\ufeff0,a\r\n\r\n \r\n1,b")
    assert read_examples(TASKS["mr"], dos) == read_examples(TASKS["mr"], unix)


def test_other_characters_that_end_lines_elsewhere_are_text(write):
    path = write("train.tsv", "sentence\tlabel\na\u2028b\x0bc\x85d\t1\n")
    assert read_examples(TASKS["SST-2"], path) == [Example(("a\u2028b\x0bc\x85d",), "1")]


@given(st.lists(st.tuples(st.sampled_from("01"), st.text(st.characters(codec="utf-8"))), min_size=1, max_size=4))
def test_rows_written_as_csv_are_read_back_the_same(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    task = TASKS["mr"]
    path.write_text("".join(format_row(task, row) for row in rows), encoding="utf-8", newline="")
    assert [tuple(row.fields) for row in read_rows(task, path)] == rows


def test_short_rows_of_qqp_are_skipped_and_counted(write, caplog):
    path = write(
        "train.tsv", tsv(list("abcdef"), [*"012", "Why?", "How?", "1"], ["3", "torn"], [*"567", "A?", "B?", "0"])
    )
    with caplog.at_level(logging.WARNING):
        labels = [example.label for example in read_examples(TASKS["QQP"], path)]
    assert labels == ["1", "0"]
    assert caplog.messages == [f"{path}: skipped 1 of 3 rows that have fewer than 6 columns (the first is line 3)"]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("SST-2", "sentence\tlabel\na\t1\nno label\n", "line 3 has 1 column, but a row of SST-2 has at least 2"),
        ("RTE", "i\ta\tb\tlabel\n0\tA.\tentailment\n", "line 2 has 3 columns, but a row of RTE has at least 4"),
        ("mr", "0,a\n1\n", "line 2 has 1 column, but the rows before it have 2"),
        ("mr", "0,a\n1,b,c\n", "line 2 has 3 columns, but the rows before it have 2"),
        ("mr", "0\n1\n", "line 1 has 1 column, but a row of mr has at least 2"),
        ("ag_news", "1,title\n", "line 1 has 2 columns, but a row of ag_news has at least 3"),
    ],
)
def test_a_row_with_too_few_or_too_many_columns_names_file_and_line(write, task, content, message):
    path = write("train", content)
    assert error_of(task, path).startswith(f"{path} {message}")


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("SST-2", "sentence\tlabel\na\t1\nb\t2\n", "line 3: label '2' is not among the labels of SST-2, 0, 1"),
        (
            "RTE",
            "i\ta\tb\tlabel\n0\tA\tB\tyes\n",
            "line 2: label 'yes' is not among the labels of RTE, entailment, not_",
        ),
        (
            "mr",
            "label,text\n0,a\n",
            "line 1: label 'label' is not among the labels of mr, 0, 1 (files of mr have no head",
        ),
        (
            "STS-B",
            "h\n" + "\t".join("01234567") + "\tb\thigh\n",
            "line 2: 'high' is not a score of STS-B, a number from",
        ),
        (
            "STS-B",
            "h\n" + "\t".join("01234567") + "\tb\t5.01\n",
            "line 2: '5.01' is not a score of STS-B, a number from",
        ),
        (
            "STS-B",
            "h\n" + "\t".join("01234567") + "\tb\tnan\n",
            "line 2: 'nan' is not a score of STS-B, a number from 0",
        ),
    ],
)
def test_a_label_outside_the_tasks_labels_names_file_line_and_the_known_ones(write, task, content, message):
    path = write("train", content)
    assert error_of(task, path).startswith(f"{path} {message}")


@pytest.mark.parametrize(
    ("task", "content"), [("SST-2", ""), ("SST-2", "sentence\tlabel\n"), ("mr", ""), ("mr", "\n\n")]
)
def test_a_file_without_examples_is_an_error(write, task, content):
    path = write("train", content)
    assert error_of(task, path) == f"{path} holds no examples"


def test_a_quotation_that_is_never_closed_is_told_with_its_line(write):
    path = write("train.csv", '0,a\n1,"b\n0,c\n')
    assert error_of("mr", path) == f"{path} line 2: a quotation mark is opened and never closed"
    path = write("train.csv", '0,a\n1,"b\n' + "0,c\n" * 50_000)
    assert error_of("mr", path).startswith(f"{path} line 2: field larger than field limit")


def test_a_file_that_is_not_utf8_is_told_in_one_sentence(write):
    path = write("train.csv", b"0,caf\xe9\n")
    assert error_of("mr", path) == (f"{path} is not UTF-8 text: convert it, for instance with iconv -f latin1 -t utf-8")


def test_a_file_that_cannot_be_opened_is_told_in_one_sentence(tmp_path):
    assert error_of("mr", tmp_path / "none.csv") == f"cannot read {tmp_path}/none.csv: No such file or directory"
    assert error_of("mr", tmp_path) == f"cannot read {tmp_path}: Is a directory"


def test_a_split_has_the_file_name_that_the_task_gives_it(tmp_path):
    for name in ("train.tsv", "dev_matched.tsv", "test_matched.tsv", "test_mismatched.tsv"):
        (tmp_path / name).touch()
    assert split_file(TASKS["MNLI"], tmp_path, "dev") == tmp_path / "dev_matched.tsv"
    assert split_file(TASKS["MNLI"], str(tmp_path), "test") == tmp_path / "test_matched.tsv"
    assert split_file(TASKS["mnli-mm"], tmp_path, "test") == tmp_path / "test_mismatched.tsv"


@pytest.mark.parametrize("folder_exists", [True, False])
def test_a_missing_split_is_an_error_with_task_folder_and_split(tmp_path, folder_exists):
    folder = tmp_path if folder_exists else tmp_path / "none"
    with pytest.raises(MissingSplitError) as caught:
        split_file(TASKS["mr"], folder, "dev")
    data = caught.value.data
    assert (data["path"], data["folder"], data["task"].name, data["split"]) == (folder / "dev.csv", folder, "mr", "dev")
    assert data["cause"] == (f"{folder}/dev.csv is missing" if folder_exists else f"there is no folder {folder}")
    assert "data_dir" in str(caught.value)


def test_a_file_in_utf_16_is_told_from_one_in_latin_1(tmp_path):
    for encoding, advice in (("utf-16", "iconv -f utf-16 "), ("latin1", "iconv -f latin1 ")):
        path = tmp_path / "train.csv"
        path.write_bytes("1,schön\n".encode(encoding))
        with pytest.raises(UsageError, match=advice):
            read_examples(TASKS["mr"], path)
