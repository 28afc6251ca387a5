"""Files of every format are read without a change, and bad rows are refused with file and line."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmntk.data.examples import Example, read_examples, split_file
from lmntk.data.formats import format_row, read_rows
from lmntk.data.tasks import TASKS
from lmntk.errors import DataError, FileError, MissingSplitError


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def refusal(task, path, kind=DataError):
    """Read a file that must be refused; return the error, whose sentence begins with the path."""
    with pytest.raises(kind) as caught:
        read_examples(TASKS[task], path)
    assert caught.value.data["path"] == path
    return caught.value


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
    assert refusal("mr", path).data == {"path": path, "line": 6, "label": "7"}
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
    ("task", "content", "line", "found", "needed"),
    [
        ("SST-2", "sentence\tlabel\na\t1\nno label\n", 3, "1 column", "at least 2"),
        ("RTE", "i\ta\tb\tlabel\n0\tA.\tentailment\n", 2, "3 columns", "at least 4"),
        ("mr", "0,a\n1\n", 2, "1 column", "have 2"),
        ("mr", "0,a\n1,b,c\n", 2, "3 columns", "have 2"),
        ("mr", "0\n1\n", 1, "1 column", "at least 2"),
        ("ag_news", "1,title\n", 1, "2 columns", "at least 3"),
    ],
)
def test_a_row_with_too_few_or_too_many_columns_is_refused(write, task, content, line, found, needed):
    path = write("train", content)
    error = refusal(task, path)
    assert error.data["line"] == line
    assert str(error).startswith(f"{path} line {line} has {found}, but ") and needed in str(error)


@pytest.mark.parametrize(
    ("task", "content", "line", "label", "known"),
    [
        ("SST-2", "sentence\tlabel\na\t1\nb\t2\n", 3, "2", "SST-2, 0, 1"),
        ("RTE", "i\ta\tb\tlabel\n0\tA\tB\tyes\n", 2, "yes", "RTE, entailment, not_entailment"),
        ("mr", "label,text\n0,a\n", 1, "label", "mr, 0, 1 (files of mr have no header line)"),
        ("STS-B", "h\n" + "\t".join("01234567") + "\tb\thigh\n", 2, "high", "a number from 0 to 5"),
        ("STS-B", "h\n" + "\t".join("01234567") + "\tb\t5.01\n", 2, "5.01", "a number from 0 to 5"),
        ("STS-B", "h\n" + "\t".join("01234567") + "\tb\tnan\n", 2, "nan", "a number from 0 to 5"),
    ],
)
def test_an_unknown_label_is_refused_with_the_known_ones(write, task, content, line, label, known):
    path = write("train", content)
    error = refusal(task, path)
    assert error.data == {"path": path, "line": line, "label": label}
    assert str(error).endswith(known)


@pytest.mark.parametrize(
    ("task", "content"), [("SST-2", ""), ("SST-2", "sentence\tlabel\n"), ("mr", ""), ("mr", "\n\n")]
)
def test_a_file_without_examples_is_refused(write, task, content):
    assert "holds no examples" in str(refusal(task, write("train", content), FileError))


def test_a_quotation_that_is_never_closed_is_refused_with_its_line(write):
    error = refusal("mr", write("train.csv", '0,a\n1,"b\n0,c\n'))
    assert error.data["line"] == 2 and "never closed" in str(error)
    error = refusal("mr", write("train.csv", '0,a\n1,"b\n' + "0,c\n" * 50_000))
    assert error.data["line"] == 2 and "field larger than field limit" in str(error)


@pytest.mark.parametrize("encoding", ["latin1", "utf-16"])
def test_a_file_that_is_not_utf8_names_the_command_that_converts_it(write, encoding):
    error = refusal("mr", write("train.csv", "0,caf\u00e9\n".encode(encoding)), FileError)
    assert f"iconv -f {encoding} -t utf-8" in str(error)


def test_a_file_that_cannot_be_opened_is_refused_with_the_reason(tmp_path):
    assert "No such file or directory" in str(refusal("mr", tmp_path / "none.csv", FileError))
    assert "Is a directory" in str(refusal("mr", tmp_path, FileError))


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
