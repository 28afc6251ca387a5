"""Data files that are not what they are taken for: no header, a header in the way, labels and texts that are off."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import generate_k_shot_data
from command_line import SIZES, Workplace, read_kernel, sst2_rows, write_rows
from lmntk.data.examples import Example, read_examples
from lmntk.data.kshot import read_originals
from lmntk.data.tasks import TASKS, custom_task, spelled_columns, split_columns
from lmntk.errors import UsageError

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
def test_the_header_of_glue_is_one_and_an_example_in_its_place_is_not_passed_over(
    write: Write, name: str, mark: str
) -> None:
    task, header = TASKS[name], GLUE[name].split()
    row = ["text"] * len(header)
    row[task.label_column] = task.labels[0]
    lines = ["\t".join(fields) + "\n" for fields in (header, row, row)]
    assert len(read_examples(task, write("train.tsv", mark + "".join(lines)))) == 2
    path = write(f"{name}/train.tsv", mark + "".join(lines[1:]))
    sentence = f"{path} line 1 is an example, of label '{task.labels[0]}', where a file of {name} has the names of its"
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}"):
        read_examples(task, path)


def test_nor_is_it_passed_over_in_drawing(write: Write, tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write(f"SST-2/{split}.tsv", "good\t1\nbad\t0\n")
    with pytest.raises(UsageError, match="train.tsv line 1 is an example, of label '1'"):
        read_originals(TASKS["SST-2"], tmp_path)


@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t")])
def test_numbers_are_places_in_a_file_without_a_header(
    write: Write, caplog: pytest.LogCaptureFixture, name: str, sep: str
) -> None:
    path = write(name, f"good{sep}yes\n1{sep}no\n")
    assert read_examples(NUMBERED, path) == [Example(("good",), "yes"), Example(("1",), "no")]
    assert caplog.messages == [f"{path}: --custom_columns 0,1 counts columns from 0, and the first line is an example"]
    assert read_examples(custom_task("2,0,1"), write(name, sep.join("abc") + "\n"))[0] == Example(("c", "a"), "b")


def test_a_header_with_these_names_stays_one(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("a.csv", "1,0\nyes,good\n")
    assert read_examples(NUMBERED, path) == [Example(("good",), "yes")]
    assert caplog.messages == [f"{path}: --custom_columns 0,1 names columns of the header"]
    assert read_examples(NUMBERED, write("a.jsonl", '{"0": "good", "1": "yes"}\n')) == [Example(("good",), "yes")]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("columns", "content", "sentence"),
    [
        ("0,1", "text,label\ngood,yes\n", " line 1: label 'label' is not among the labels of custom, no, yes, the keys "
         "of --mapping; if line 1 is the header, give --custom_columns its names"),
        ("0,2", "good,yes\n", ": there is no column 2, its first line has 2 columns, counted from 0, and none of the"),
        ("0,99999999999999999999", "good,yes\n", ": unknown column '0'"),
        ("0,1", "good,yes\na,b,no\n", " line 2 has 3 columns, but the rows before it have 2"),
        ("text,1", "text,label\ngood,yes\n", ": unknown column '1'"),
        ("-1,0", "good,yes\n", ": unknown column '-1'"),
    ],
)  # fmt: skip
def test_places_that_do_not_fit_are_told(write: Write, columns: str, content: str, sentence: str) -> None:
    path = write("a.csv", content)
    with pytest.raises(UsageError, match=f"^{re.escape(str(path) + sentence)}"):
        read_examples(custom_task(columns, ("no", "yes")), path)


def test_columns_with_commas_are_written_as_in_a_csv_header() -> None:
    assert split_columns('"review, long", label,x"y') == ["review, long", "label", 'x"y']
    assert split_columns(spelled_columns(["a,b", 'c"d', "e"])) == ["a,b", 'c"d', "e"]
    assert custom_task('"review, long",label').columns == ("review, long", "label")


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("Yes", "; 'Yes' and 'yes' differ in case alone: spell them alike"),
        ("1.0", "; '1.0' and '1' are one number: spell them alike"),
        ("01", "; '01' and '1' are one number: spell them alike"),
        ("a b", "; 'a b' and ' a b' differ in surrounding spaces alone: spell them alike"),
        ("true", "; 'true' and 'True' differ in case alone: spell them alike"),
        ("²", ""),
        ("maybe", ""),
    ],
)
def test_a_label_that_is_almost_one_of_the_mapping_is_told_with_the_difference(
    write: Write, label: str, hint: str
) -> None:
    task = custom_task("text,label", ("yes", "1", " a b", "True"))
    with pytest.raises(UsageError, match=re.escape(f"the keys of --mapping{hint}") + "$"):
        read_examples(task, write("a.csv", f"text,label\nx,{label}\n"))


def test_labels_that_are_one_number_are_no_two_classes() -> None:
    sentence = "the labels '1' and '1.0' of column 'label' are one number: spell the label of a class in one way"
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}"):
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
def test_a_file_in_another_unicode_encoding_is_told_by_its_name(
    write: Write, encoding: str, name: str, ending: str
) -> None:
    path = write(f"a.{ending}", '{"text": "a", "label": 0}\n'.encode(encoding))
    sentence = f"{path} is not UTF-8 text but {name}: convert it, with iconv -f {encoding} -t utf-8"
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}$"):
        read_examples(ANY, path)


class TestDrawing:
    """tools/generate_k_shot_data.py on such files."""

    def draw(self, path: Path, columns: str, *more: str) -> Path:
        generate_k_shot_data.main(
            ["--mode", "k-shot", "--k", "2", "--seed", "1", "--custom_columns", columns, "--input", str(path)]
            + ["--output_dir", str(path.parent / "drawn"), *more]
        )
        return path.parent / "drawn" / "k-shot" / "custom" / "2-1"

    def test_a_file_without_a_header_gives_splits_without_one(
        self, write: Write, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [f"text {number},{('no', 'yes')[number % 2]}\n" for number in range(12)]
        folder = self.draw(write("all.csv", "".join(rows)), "0,1")
        assert capsys.readouterr().out.startswith("12 rows, labels 'no' (6), 'yes' (6)\n")
        drawn = [line for split in SIZES for line in (folder / f"{split}.csv").read_text().splitlines(keepends=True)]
        assert sorted(drawn) == sorted(rows)
        assert len(read_examples(NUMBERED, folder / "train.csv")) == 4

    @pytest.mark.parametrize(
        ("columns", "content", "sentence"),
        [
            ("0,1", "text,label\na,x\nb,y\nc,x\nd,y\n", "line 1 has the label 'label', which no other line has: if it"),
            ("text,label", "text,label\na,0\nb,1\nc,1.0\nd,0\n", "the labels '1' and '1.0' of column 'label' are one"),
        ],
    )
    def test_a_header_and_a_second_spelling_are_no_classes(
        self, write: Write, columns: str, content: str, sentence: str
    ) -> None:
        with pytest.raises(UsageError, match=re.escape(sentence)):
            self.draw(write("all.csv", content), columns)

    def test_classes_that_differ_in_case_alone_are_told(self, write: Write, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            path = write("all.csv", "text,label\n" + "".join(f"t{n},{('a', 'b', 'B')[n % 3]}\n" for n in range(18)))
            self.draw(path, "text,label")
        assert f"{path}: labels 'b' and 'B' differ in case alone, and are two classes" in caplog.messages


def test_places_and_names_with_commas_give_the_kernels_that_plain_names_give(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    rows = {
        split: [(text, ("no", "yes")[int(label)]) for text, label in sst2_rows(SIZES[split], split)] for split in SIZES
    }
    for split in SIZES:
        write_rows(tmp_path / "bare" / f"{split}.csv", rows[split])
        write_rows(tmp_path / "named" / f"{split}.csv", [('"review, long"', "verdict"), *rows[split]])
    flags = ["--task_name", "custom", "--template", "*cls**sent_0*_It_was*mask*.*sep+*"]
    flags += ["--mapping", "{'no': 'terrible', 'yes': 'great'}"]
    bare = place.run(*flags, "--data_dir", "bare", "--custom_columns", "0,1", output="bare-out")
    config = {"custom_columns": ["review, long", "verdict"], "data_dir": "named", "output_dir": "named-out"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    argv = [word for word in place.argv(*flags) if word not in ("--data_dir", str(place.data))]
    argv = [word for word in argv if word not in ("--output_dir", str(tmp_path / "out"))]
    outcome = place.call(["config.json", *argv])
    assert (outcome.status, outcome.err) == (0, "")
    assert place.last_record()["custom_columns"] == '"review, long",verdict'
    known = place.run(output="known")
    for split in SIZES:
        for folder in (bare, tmp_path / "named-out"):
            assert read_kernel(folder, split, "custom").equal(read_kernel(known, split))


def test_a_key_that_a_configuration_file_gives_twice_is_told(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    (tmp_path / "config.json").write_text('{"mapping": {"0": "bad", "1": "dull", "1": "good"}}', encoding="utf-8")
    outcome = place.call(["config.json"])
    assert (outcome.status, outcome.err) == (2, "error: config.json is not valid JSON: '1' is given twice\n")
