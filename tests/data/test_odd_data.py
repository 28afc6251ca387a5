"""Data files that are not what they seem: no header, a header too many, labels and texts that are not valid."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmntk.data.examples import Example, read_examples
from lmntk.data.kshot import read_originals
from lmntk.data.tasks import TASKS, custom_task, join_columns, split_columns
from lmntk.errors import DataError, FileError, SettingError, UnknownNameError, UsageError

Write = Callable[[str, str | bytes], Path]
NUMBERED = custom_task("0,1", ("no", "yes"))
ANY = custom_task("text,label")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


GLUE = {
    "SST-2": "sentence label",
    "MRPC": "Quality #1_ID #2_ID #1_String #2_String",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "QNLI": "index question sentence label",
    "RTE": "index sentence1 sentence2 label",
    "MNLI": "index promptID pairID genre parse1 parse2 parse3 parse4 sentence1 sentence2 label1 gold_label",
    "SNLI": "index captionID pairID parse1 parse2 parse3 parse4 sentence1 sentence2 label1 gold_label",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "WNLI": "index sentence1 sentence2 label",
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", GLUE)
def test_an_example_in_place_of_a_header_is_refused(write: Write, name: str, mark: str) -> None:
    task, header = TASKS[name], GLUE[name].split()
    row = ["text"] * len(header)
    row[task.label_column] = task.labels[0]
    lines = ["\t".join(fields) + "\n" for fields in (header, row, row)]
    assert len(read_examples(task, write("train.tsv", mark + "".join(lines)))) == 2
    path = write(f"{name}/train.tsv", mark + "".join(lines[1:]))
    with pytest.raises(DataError, match="line 1 is an example") as caught:
        read_examples(task, path)
    assert caught.value.data == {"path": path, "line": 1, "label": task.labels[0]}


def test_an_example_in_place_of_a_header_is_refused_in_drawing(write: Write, tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write(f"SST-2/{split}.tsv", "good\t1\nbad\t0\n")
    with pytest.raises(DataError, match="train.tsv line 1 is an example"):
        read_originals(TASKS["SST-2"], tmp_path)


@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t")])
def test_numbers_are_places_in_a_file_without_a_header(
    write: Write, caplog: pytest.LogCaptureFixture, name: str, sep: str
) -> None:
    path = write(name, f"good{sep}yes\n1{sep}no\n")
    assert read_examples(NUMBERED, path) == [Example(("good",), "yes"), Example(("1",), "no")]
    assert caplog.messages == [f"{path}: `custom_columns=0,1` counts columns from 0, and the first line is an example"]
    assert read_examples(custom_task("2,0,1"), write(name, sep.join("abc") + "\n"))[0] == Example(("c", "a"), "b")


def test_a_header_with_these_names_stays_one(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("a.csv", "1,0\nyes,good\n")
    assert read_examples(NUMBERED, path) == [Example(("good",), "yes")]
    assert caplog.messages == [f"{path}: `custom_columns=0,1` names columns of the header"]
    assert read_examples(NUMBERED, write("a.jsonl", '{"0": "good", "1": "yes"}\n')) == [Example(("good",), "yes")]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("columns", "content", "kind", "fact"),
    [
        ("0,1", "text,label\ngood,yes\n", DataError, "if line 1 is the header, give `custom_columns` its names"),
        ("0,2", "good,yes\n", UnknownNameError, "there is no column 2"),
        ("0,99999999999999999999", "good,yes\n", UnknownNameError, "unknown column '0'"),
        ("0,1", "good,yes\na,b,no\n", DataError, "line 2 has 3 columns"),
        ("text,1", "text,label\ngood,yes\n", UnknownNameError, "unknown column '1'"),
        ("-1,0", "good,yes\n", UnknownNameError, "unknown column '-1'"),
    ],
)
def test_places_that_do_not_fit_are_refused(
    write: Write, columns: str, content: str, kind: type[UsageError], fact: str
) -> None:
    path = write("a.csv", content)
    with pytest.raises(kind, match=fact) as caught:
        read_examples(custom_task(columns, ("no", "yes")), path)
    assert caught.value.data["path"] == path


def test_columns_with_commas_are_written_as_in_a_csv_header() -> None:
    assert split_columns('"review, long", label,x"y') == ["review, long", "label", 'x"y']
    assert split_columns(join_columns(["a,b", 'c"d', "e"])) == ["a,b", 'c"d', "e"]
    assert custom_task('"review, long",label').columns == ("review, long", "label")


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("Yes", "'Yes' and 'yes' differ only in case"),
        ("1.0", "'1.0' and '1' are the same number"),
        ("01", "'01' and '1' are the same number"),
        ("a b", "'a b' and ' a b' differ only in surrounding spaces"),
        ("true", "'true' and 'True' differ only in case"),
        ("²", ""),
        ("maybe", ""),
    ],
)
def test_a_label_that_is_almost_known_is_refused_with_the_difference(write: Write, label: str, hint: str) -> None:
    task = custom_task("text,label", ("yes", "1", " a b", "True"))
    with pytest.raises(DataError) as caught:
        read_examples(task, write("a.csv", f"text,label\nx,{label}\n"))
    assert (caught.value.data["line"], caught.value.data["label"]) == (2, label)
    _, _, found = str(caught.value).partition("the keys of `mapping`")
    assert found.startswith(f"; {hint}") if hint else not found


def test_labels_that_are_the_same_number_are_not_two_classes() -> None:
    with pytest.raises(SettingError, match="'1' and '1.0' of column 'label' are the same number"):
        custom_task("text,label", ("0", "1", "1.0"))
    assert custom_task("text,label", ("1", "1.5", "nan", "1_0", "10", "²")).labels[3] == "1_0"


def test_empty_texts_are_counted(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("a.csv", 'text,label\nx,0\n"",1\n"  ",0\n')
    assert [example.texts[0] for example in read_examples(ANY, path)] == ["x", "", "  "]
    assert caplog.messages == [f"{path}: 2 of 3 examples have an empty text (the first is line 3)"]


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "UTF-16"), ("utf-16le", "UTF-16LE"), ("utf-16be", "UTF-16BE"), ("utf-32", "UTF-32")],
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_another_unicode_encoding_is_named(write: Write, encoding: str, name: str, ending: str) -> None:
    path = write(f"a.{ending}", '{"text": "a", "label": 0}\n'.encode(encoding))
    with pytest.raises(FileError, match=f"{name}: convert it, with iconv -f {encoding} -t utf-8") as caught:
        read_examples(ANY, path)
    assert caught.value.data["path"] == path
