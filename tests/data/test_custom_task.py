"""A user's own data are read exactly, whatever their format, and bad files are refused with their place."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmntk.data.examples import Example, read_examples, split_file
from lmntk.data.formats import format_row
from lmntk.data.tasks import Task, custom_task
from lmntk.errors import DataError, FileError, MissingSplitError, SettingError, UnknownNameError, UsageError

ENDINGS = ("csv", "tsv", "jsonl", "json")
PAIR = custom_task("first,second,label")
TWO = custom_task("text, label", ("0", "1"))
ODD = [("1.50", "0"), ("", "1")]
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def as_file(ending: str, rows: list[list[str]]) -> str:
    """Rows below their header as other programs write them."""
    if ending == "tsv":
        return "".join("\t".join(row) + "\n" for row in rows)
    if ending == "csv":
        quoted = [['"' + value.replace('"', '""') + '"' for value in row] for row in rows]
        return "".join(",".join(row) + "\r\n" for row in quoted)
    return "".join(json.dumps(dict(zip(rows[0], row, strict=True))) + "\n" for row in rows[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.mark.parametrize("ours", [True, False], ids=["as we write", "as others write"])
@pytest.mark.parametrize("ending", ENDINGS)
@given(data=st.data())
def test_any_text_comes_back_exactly(folder: Path, ending: str, ours: bool, data: st.DataObject) -> None:
    left_out = "\t\r\n" if ending == "tsv" else ""
    texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=left_out))
    rows = data.draw(st.lists(st.tuples(texts, texts, st.sampled_from(["0", "NA", "a b"])), min_size=1, max_size=5))
    table = [["first", "second", "label"], *map(list, rows)]
    written = Task(**{**vars(PAIR), "file_format": ending})
    kept = table[1:] if ending.startswith("json") else table
    content = "".join(format_row(written, row) for row in kept) if ours else as_file(ending, table)
    path = folder / f"train.{ending}"
    path.write_text(content, encoding="utf-8", newline="")
    assert read_examples(PAIR, path) == [Example((first, second), label) for first, second, label in rows]


@pytest.mark.parametrize(
    ("name", "content", "examples"),
    [
        ("a.csv", "\ufeffid, label ,text\r\n7,0,NA\r\n8, 1 ,\r\n", [("NA", "0"), ("", "1")]),
        ("a.csv", ',text,label\n0,"a\r\nb",0\n\n1,null,1\n', [("a\r\nb", "0"), ("null", "1")]),
        ("a.CSV", "text,label\n007,0\n", [("007", "0")]),
        ("a.tsv", '\ufefflabel\tx\ttext\n0\t\t"a\n', [('"a', "0")]),
        ("a.jsonl", '\ufeff{"text": 1.50, "label": 0}\n\n{"x": [1], "label": "1", "text": ""}', ODD),
    ],
)  # fmt: skip
def test_columns_are_found_by_name_and_values_stay_the_text_they_are(
    write: Write, name: str, content: str, examples: list[tuple[str, str]]
) -> None:
    assert read_examples(TWO, write(name, content)) == [Example((text,), label) for text, label in examples]


def test_numbers_and_truth_values_of_json_are_labels_as_they_are_spelled(write: Write) -> None:
    path = write("a.jsonl", "".join(f'{{"text": "a", "label": {label}}}\n' for label in ("0", "1.0", "true", '"x"')))
    assert [example.label for example in read_examples(custom_task("text,label"), path)] == ["0", "1.0", "true", "x"]


PLACES = [
    ("a.csv", "Text,label\na,0\n", UnknownNameError, None, "did you mean 'Text'? Available: Text, label"),
    ("a.csv", "text;label\na;0\n", UnknownNameError, None, "separate its columns"),
    ("a.csv", "text\tlabel\na\t0\n", UnknownNameError, None, "call a file with tabs .tsv"),
    ("a.tsv", "text,label\na,0\n", UnknownNameError, None, "call a file with commas .csv"),
    ("a.csv", "0," + "a b " * 20, UnknownNameError, None, f"Available: 0, {'a b ' * 9}a b…"),
    ("a.csv", "text,label,text\na,0,b\n", UnknownNameError, None, "has 'text' 2 times"),
    ("a.csv", "text,label\na,b,0\n", DataError, 2, "is there a comma in a text"),
    ("a.csv", "text,label\na\n", DataError, 2, "is a column missing"),
    ("a.csv", 'text,label\n1,"0\n', DataError, 2, "a quotation mark is opened and never closed"),
    ("a.tsv", "text\tlabel\na\tb\t0\n", DataError, 2, "has 3 columns, but the header has 2"),
    ("a.tsv", "text\tlabel\n\na\n", DataError, 3, "has 1 column, but the header has 2"),
    (
        "a.csv",
        "text,label\na,00\n",
        DataError,
        2,
        "'00' is not among the labels of custom, 0, 1, the keys of",
    ),
    ("a.csv", "text,label\na,\n", DataError, 2, "label ''"),
    ("a.csv", "text,label\n", FileError, None, "holds no examples"),
    ("a.jsonl", "", FileError, None, "holds no examples"),
    ("a.csv", b"text,label\ncaf\xe9,0\n", FileError, None, "iconv -f latin1 -t utf-8"),
    ("a.txt", "text,label\na,0\n", FileError, None, ".csv, .tsv, .jsonl or .json"),
    ("a", "text,label\na,0\n", FileError, None, ".csv, .tsv, .jsonl or .json"),
    ("a.jsonl", '{"Text": "a", "label": 0}', DataError, 1, "did you mean 'Text'?"),
    ("a.jsonl", '\n{"text": null, "label": 0}', DataError, 2, "'text' is null"),
    ("a.jsonl", '{"text": ["a"], "label": 0}', DataError, 1, "'text' is a list or an object"),
    ("a.jsonl", '{"text": "a", "label": 0, "text": "b"}', DataError, 1, "has 'text' twice"),
    ("a.jsonl", '{"text": "\\ud800", "label": 0}', DataError, 1, "half a character, \\ud800"),
    ("a.jsonl", '{"text": "a", "label": NaN}', DataError, 1, "NaN is not JSON"),
    ("a.jsonl", "{'text': 'a'}", DataError, 1, "is not one JSON object (Expecting property name"),
    ("a.jsonl", "3", DataError, 1, 'must be one JSON object, {"text": …}'),
    ("a.json", '[{"text": "a", "label": 0}]', DataError, 1, "jq -c '.[]' makes JSON lines of a list"),
    ("a.json", "[\n{}\n]", DataError, 1, "a list over many lines becomes JSON lines with jq"),
    ("a.jsonl", "[" * 100_000, DataError, 1, "maximum recursion depth exceeded"),
]


@pytest.mark.parametrize(("name", "content", "kind", "line", "fact"), PLACES)
def test_a_bad_file_is_refused_with_path_and_line(
    write: Write, name: str, content: str | bytes, kind: type[UsageError], line: int | None, fact: str
) -> None:
    path = write(name, content)
    with pytest.raises(kind, match=re.escape(fact)) as caught:
        read_examples(TWO, path)
    assert str(caught.value).startswith(str(path))
    assert (caught.value.data["path"], caught.value.data.get("line")) == (path, line)


def test_a_split_may_have_any_ending_and_must_be_one_file(tmp_path: Path, write: Write) -> None:
    assert write("dev.jsonl", "") == split_file(TWO, tmp_path, "dev")
    for name in ("train.csv", "train.json"):
        write(name, "")
    with pytest.raises(FileError, match=r"holds train\.csv and train\.json"):
        split_file(TWO, tmp_path, "train")
    with pytest.raises(MissingSplitError) as caught:
        split_file(TWO, tmp_path, "test")
    assert (caught.value.data["task"], caught.value.data["folder"]) == (TWO, tmp_path)


@pytest.mark.parametrize(
    ("columns", "name", "setting"),
    [
        ("text", "custom", "custom_columns"),
        ("text,,label", "custom", "custom_columns"),
        ("a,b,a", "custom", "custom_columns"),
        ("a\nb,c", "custom", "custom_columns"),
        ("text,label", "sst-2", "task_name"),
        ("text,label", "../up", "task_name"),
    ],
)
def test_columns_and_names_that_cannot_be_are_refused(columns: str, name: str, setting: str) -> None:
    with pytest.raises(SettingError) as caught:
        custom_task(columns, name=name)
    assert caught.value.data == {"setting": setting, "value": columns if setting == "custom_columns" else name}
