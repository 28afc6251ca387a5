"""Data of a user's own, `--custom_columns`: read exactly, drawn disjointly, and asked like any task's."""

import contextlib
import csv
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ensemble
import generate_k_shot_data
import get_sbert_embedding
from command_line import SIZES, Workplace, read_kernel, sst2_rows, write_rows
from lmntk.data.examples import Example, read_examples, split_file
from lmntk.data.formats import format_row
from lmntk.data.tasks import Task, custom_task, described_task
from lmntk.errors import FileError, MissingSplitError, UsageError

ENDINGS = ("csv", "tsv", "jsonl", "json")
PAIR = custom_task("first,second,label")
TWO = custom_task("text, label", ("0", "1"))
TEMPLATE = "*cls**sent_0*_It_was*mask*.*sep+*"
MAPPING = "{'no': 'terrible', 'yes': 'great'}"
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


HEADER = "; --custom_columns names columns of the first line, which is the header"
NOT_ENDED = ": the file's ending must say what it is, .csv, .tsv, .jsonl or .json"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "Text,label\na,0\n", f": unknown column 'text': did you mean 'Text'? Available: Text, label{HEADER}"),
        ("a.csv", "text;label\na;0\n", f": unknown column 'text': Available: text;label{HEADER}; separate its columns"),
        ("a.csv", "text\tlabel\na\t0\n", f": unknown column 'text': Available: text label{HEADER}; call a file with t"),
        ("a.tsv", "text,label\na,0\n", f": unknown column 'text': Available: text,label{HEADER}; call a file with com"),
        ("a.csv", "0," + "a b " * 20, f": unknown column 'text': Available: 0, {'a b ' * 9}a b…{HEADER}"),
        ("a.csv", "text,label,text\na,0,b\n", ": its header has 'text' 2 times: give each column its own name"),
        ("a.csv", "text,label\na,b,0\n", " line 2 has 3 columns, but the rows before it have 2: is there a comma in a"),
        ("a.csv", "text,label\na\n", " line 2 has 1 column, but the rows before it have 2: is a column missing, or a"),
        ("a.csv", 'text,label\n1,"0\n', " line 2: a quotation mark is opened and never closed"),
        ("a.tsv", "text\tlabel\na\tb\t0\n", " line 2 has 3 columns, but the header has 2: is there a tab or a line en"),
        ("a.tsv", "text\tlabel\n\na\n", " line 3 has 1 column, but the header has 2"),
        ("a.csv", "text,label\na,00\n", " line 2: label '00' is not among the labels of custom, 0, 1, the keys of --m"),
        ("a.csv", "text,label\na,\n", " line 2: label '' is not among the labels of custom, 0, 1, the keys of --mappi"),
        ("a.csv", "text,label\n", " holds no examples"),
        ("a.jsonl", "", " holds no examples"),
        ("a.csv", b"text,label\ncaf\xe9,0\n", " is not UTF-8 text: convert it, for instance with iconv -f latin1 -t u"),
        ("a.txt", "text,label\na,0\n", NOT_ENDED),
        ("a", "text,label\na,0\n", NOT_ENDED),
        ("a.jsonl", '{"Text": "a", "label": 0}', " line 1: unknown column 'text': did you mean 'Text'? Available: Tex"),
        ("a.jsonl", '\n{"text": null, "label": 0}', " line 2: 'text' is null, where a text or a number belongs"),
        ("a.jsonl", '{"text": ["a"], "label": 0}', " line 1: 'text' is a list or an object, where a text or a number "),
        ("a.jsonl", '{"text": "a", "label": 0, "text": "b"}', " line 1 has 'text' twice"),
        ("a.jsonl", '{"text": "\\ud800", "label": 0}', " line 1: 'text' holds half a character, \\ud800: mend the tex"),
        ("a.jsonl", '{"text": "a", "label": NaN}', " line 1 is not one JSON object (NaN is no JSON)"),
        ("a.jsonl", "{'text': 'a'}", " line 1 is not one JSON object (Expecting property name"),
        ("a.jsonl", "3", ' line 1 must be one JSON object, {"text": …}'),
        ("a.json", '[{"text": "a", "label": 0}]', ' line 1 must be one JSON object, {"text": …}: jq -c \'.[]\' makes'),
        ("a.json", "[\n{}\n]", " line 1 is not one JSON object (Expecting value: line 1 column 2 (char 1)); a list ov"),
        ("a.jsonl", "[" * 100_000, " line 1 is not one JSON object (maximum recursion depth exceeded"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_place(
    write: Write, name: str, content: str | bytes, sentence: str
) -> None:
    path = write(name, content)
    with pytest.raises(UsageError) as caught:
        read_examples(TWO, path)
    assert str(caught.value).startswith(f"{path}{sentence}")


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
    ("columns", "name", "sentence"),
    [
        ("text", "custom", "--custom_columns text: name the columns of the texts and, last, that of the label"),
        ("text,,label", "custom", "--custom_columns text,,label: name the columns"),
        ("a,b,a", "custom", "--custom_columns a,b,a names 'a' twice"),
        ("text,label", "sst-2", "--custom_columns is for data of one's own, but SST-2 is a task whose files are known"),
        ("text,label", "../up", "task '../up': names of files are made of it: take letters"),
    ],
)
def test_columns_and_names_that_cannot_be_are_refused(columns: str, name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}"):
        custom_task(columns, name=name)


class TestSplits:
    """tools/generate_k_shot_data.py draws train, dev and test from one file."""

    def draw(self, folder: Path, *flags: str, output: str = "data") -> Path:
        with contextlib.chdir(folder):
            generate_k_shot_data.main(
                ["--mode", "k-shot-1k-test", "--custom_columns", "text,label", "--output_dir", output, *flags]
            )
        return folder / output / "k-shot-1k-test"

    @pytest.fixture
    def all_rows(self) -> list[list[str]]:
        return [["id", "text", "label"], *([str(n), f'"text", {n}', ("no", "yes")[n % 3 == 0]] for n in range(60))]

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_every_row_goes_into_one_split_as_it_stands(
        self, tmp_path: Path, write: Write, all_rows: list[list[str]], ending: str
    ) -> None:
        path = write(f"all.{ending}", as_file(ending, all_rows))
        task = custom_task("id,text,label")
        folder = self.draw(tmp_path, "--input", path.name, "--k", "5", "--seed", "42") / "custom" / "5-42"
        assert sorted(file.name for file in folder.iterdir()) == [
            f"{name}.{ending}" for name in ("dev", "test", "train")
        ]
        drawn = {name: read_examples(task, folder / f"{name}.{ending}") for name in SIZES}
        for name in ("train", "dev"):
            assert Counter(example.label for example in drawn[name]) == {"no": 5, "yes": 5}
        assert Counter(sum(drawn.values(), [])) == Counter(read_examples(task, path))
        order = [int(example.texts[0]) for example in drawn["test"]]
        assert order == sorted(order) and len(order) == 40
        if ending == "jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            assert set((folder / "test.jsonl").read_text(encoding="utf-8").splitlines()) < set(lines)

    def test_the_draw_is_that_of_the_published_sampler(
        self, tmp_path: Path, write: Write, all_rows: list[list[str]]
    ) -> None:
        write("all.csv", as_file("csv", all_rows))
        folder = self.draw(tmp_path, "--input", "all.csv", "--k", "3", "--seed", "13") / "custom" / "3-13"
        order = all_rows[1:]
        np.random.RandomState(13).shuffle(order)
        wanted = [
            row for label in dict.fromkeys(row[2] for row in order) for row in [r for r in order if r[2] == label][:3]
        ]
        with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
            assert list(csv.reader(file)) == [all_rows[0], *wanted]

    def test_the_same_command_writes_the_same_bytes_and_another_seed_others(
        self, tmp_path: Path, write: Write, all_rows: list[list[str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        write("all.csv", as_file("csv", all_rows))
        flags = ("--input", "all.csv", "--task", "mine", "--k", "2", "--seed", "1", "2")
        made = [self.draw(tmp_path, *flags, output=output) / "mine" for output in ("one", "two")]
        assert capsys.readouterr().out.startswith(
            "60 rows, labels 'yes' (20), 'no' (40)\none/k-shot-1k-test/mine/2-1\n"
        )
        contents = [{str(f.relative_to(d)): f.read_bytes() for f in sorted(d.rglob("*.csv"))} for d in made]
        assert contents[0] == contents[1]
        assert len(contents[0]) == 6 and contents[0]["2-1/train.csv"] != contents[0]["2-2/train.csv"]

    def test_a_large_rest_is_cut_to_1000_test_rows(self, tmp_path: Path, write: Write) -> None:
        rows = [["text", "label"], *([f"text {n}", str(n % 2)] for n in range(1100))]
        write("all.csv", as_file("csv", rows))
        folder = self.draw(tmp_path, "--input", "all.csv", "--k", "4", "--seed", "1") / "custom" / "4-1"
        drawn = [example for name in SIZES for example in read_examples(TWO, folder / f"{name}.csv")]
        assert len(drawn) == len(set(drawn)) == 1016

    def test_original_train_and_test_files_are_drawn_from_as_those_of_a_task(
        self, tmp_path: Path, write: Write, all_rows: list[list[str]]
    ) -> None:
        write("data/original/custom/train.csv", as_file("csv", all_rows))
        write("data/original/custom/test.jsonl", as_file("jsonl", all_rows[:8]))
        folder = self.draw(tmp_path, "--k", "2", "--seed", "1") / "custom" / "2-1"
        assert len(read_examples(custom_task("text,label"), folder / "train.csv")) == 4
        assert (folder / "test.jsonl").read_text(encoding="utf-8") == as_file("jsonl", all_rows[:8])

    def test_rare_labels_and_repeated_texts_are_warned_of(
        self, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
    ) -> None:
        write("all.csv", "text,label\n" + "a,x\n" * 3 + "".join(f"b{n},y\n" for n in range(5)))
        with caplog.at_level(logging.WARNING):
            self.draw(tmp_path, "--input", "all.csv", "--k", "2", "--seed", "1")
        assert caplog.messages == [
            "all.csv: 2 of 8 rows repeat the texts of another: train, dev and test may share them",
            "custom: label x has 3 training rows where 4 are wanted (2 for train, 2 for dev)",
        ]

    @pytest.mark.parametrize(
        ("content", "flags", "sentence"),
        [
            (
                "text,label\na,x\nb,y\nc,x\nd,y\n",
                [],
                "--k 16: train and dev take all 4 rows of custom, and none is left for test",
            ),
            ("text,label\na,x\nb,x\n", [], "all.csv: all rows have the label 'x', where two at least are to be told"),
            ("text,label\na,x\nb,\n", [], "all.csv line 3 has no label: fill it in, or remove the line"),
            (
                "label,text\nx,a\ny,b\nx,c\n",
                ["--custom_columns", "label,text"],
                "all.csv: column 'text' has 3 labels in 3",
            ),
            ("text,label\na,x\n", ["--input", "none.csv"], "cannot read none.csv: No such file or directory"),
            ("text,label\na,x\n", ["--task", "a", "b"], "--task a b: --custom_columns are those of one data set"),
            ("text,label\na,x\n", ["--task", "mr"], "--custom_columns is for data of one's own, but mr is a task"),
        ],
    )
    def test_what_cannot_be_drawn_is_told_in_one_sentence(
        self, tmp_path: Path, write: Write, content: str, flags: list[str], sentence: str
    ) -> None:
        write("all.csv", content)
        with pytest.raises(UsageError, match=f"^{re.escape(sentence)}"):
            self.draw(tmp_path, "--input", "all.csv", *flags)
        assert [path.name for path in tmp_path.iterdir()] == ["all.csv"]

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (["--input", "all.csv"], "--input all.csv needs --custom_columns, such as text,label"),
            (
                ["--task", "custom"],
                "task 'custom' is for data of one's own, whose columns are not given here: see docs/",
            ),
            (["--custom_columns", "text,label"], "data/original/custom has no train file ending in .csv, .tsv, .jsonl"),
        ],
    )
    def test_flags_that_lack_something_say_what(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sentence: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=f"^{re.escape(sentence)}"):
            generate_k_shot_data.main(flags)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The tiny SST-2 data once more, as a user's own CSV, TSV and JSON-lines files."""
    place = Workplace(tmp_path_factory.mktemp("custom"))
    for (split, size), ending in zip(SIZES.items(), ENDINGS, strict=False):
        rows = [[f"{n}", ("no", "yes")[int(label)], text] for n, (text, label) in enumerate(sst2_rows(size, split))]
        path = place.folder / "own" / f"{split}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(as_file(ending, [["id", "verdict", "text"], *rows]), encoding="utf-8")
    return place


def flags(*more: str) -> list[str]:
    own = ["--task_name", "custom", "--data_dir", "own", "--custom_columns", "text,verdict"]
    return [*own, "--template", TEMPLATE, "--mapping", MAPPING, *more]


@pytest.fixture(scope="module")
def kernels(place: Workplace) -> Path:
    return place.run(*flags(), output="kernels")


def test_kernels_are_those_of_a_task_with_the_same_texts_template_and_words(place: Workplace, kernels: Path) -> None:
    known = place.run(output="known")
    for split in SIZES:
        assert torch.equal(read_kernel(kernels, split, "custom"), read_kernel(known, split))
    results = [folder / f"test_results_{key}.txt" for folder, key in ((kernels, "custom"), (known, "sst-2"))]
    assert results[0].read_text(encoding="utf-8") == results[1].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "more",
    [
        ("--few_shot_type", "prompt-demo", "--num_sample", "2"),
        ("--few_shot_type", "finetune", "--from_linearhead", "--binary_classification", "--kernel_solver", "svc"),
    ],
    ids=["prompt-demo", "finetune"],
)
def test_demonstrations_and_heads_are_those_of_such_a_task_too(place: Workplace, more: tuple[str, ...]) -> None:
    own, known = place.run(*flags(*more), output=f"own-{more[1]}"), place.run(*more, output=f"known-{more[1]}")
    assert torch.equal(read_kernel(own, "test", "custom"), read_kernel(known, "test"))


def test_the_keys_of_the_mapping_give_the_order_of_the_logits(place: Workplace, kernels: Path) -> None:
    swapped = place.run(*flags("--mapping", "{'yes': 'great', 'no': 'terrible'}"), output="swapped")
    assert torch.allclose(read_kernel(swapped, "test", "custom"), read_kernel(kernels, "test", "custom").flip(1, 3))
    labels = [torch.load(folder / "test_kernels_custom.pt", weights_only=True)[1] for folder in (swapped, kernels)]
    assert torch.equal(labels[0], 1 - labels[1])


def test_the_description_tells_how_to_read_the_data_again(place: Workplace, kernels: Path) -> None:
    description = json.loads((kernels / "test_kernels_custom.json").read_text(encoding="utf-8"))
    assert (description["task"], description["custom_columns"], description["labels"]) == (
        "custom", ["text", "verdict"], ["no", "yes"],
    )  # fmt: skip
    examples = read_examples(described_task(description), place.folder / description["data_files"]["test"])
    assert [example.texts[0] for example in examples] == [text for text, _ in sst2_rows(SIZES["test"], "test")]
    assert described_task({"task": "SST-2"}).name == "SST-2"
    place.run(*flags("--tag", "logged"), output="kernels")
    assert place.last_record()["custom_columns"] == "text,verdict"


def test_a_kernel_of_other_columns_is_not_taken(place: Workplace, kernels: Path) -> None:
    for more in (("--custom_columns", "id,verdict"), ("--mapping", "{'yes': 'great', 'no': 'terrible'}")):
        outcome = place.call(place.argv(*flags(*more), output="kernels"))
        assert outcome.status == 2
        assert ("custom_columns: stored" if "id" in more[1] else "labels: stored") in outcome.err


def test_a_name_of_ones_own_keeps_data_sets_apart(place: Workplace) -> None:
    folder = place.run(*flags("--task_name", "Mine"), output="kernels-mine")
    assert {path.name for path in folder.glob("*_kernels_*")} == {
        f"{split}_kernels_mine.{ending}" for split in SIZES for ending in ("pt", "json")
    }


def test_dry_run_and_stored_kernels_and_prompts_from_files_work(place: Workplace, kernels: Path) -> None:
    outcome = place.call(place.argv(*flags("--dry_run"), output="dry"))
    assert outcome.status == 0 and "would compute the train × test kernel" in outcome.messages
    place.run(*flags("--load_kernels", str(kernels), "--kernel_solver", "svr"), output="loaded")
    (place.folder / "prompts.tsv").write_text(f"{TEMPLATE}\t{MAPPING}\n", encoding="utf-8")
    own = ["--task_name", "custom", "--data_dir", "own", "--custom_columns", "text,verdict"]
    place.run(*own, "--prompt_path", "prompts.tsv", "--prompt_id", "0", output="kernels")


def test_an_ensemble_reads_labels_and_their_order_from_the_log(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, template in enumerate((TEMPLATE, "*cls*_A*mask*_film:*+sent_0**sep+*")):
        numbers = ("--save_logit", "--save_logit_dir", "logits", "--model_id", str(model), "--array_id", "0")
        place.run(*flags("--template", template, "--no_train", "--tag", "both", *numbers), output=f"model-{model}")
    with contextlib.chdir(place.folder):
        ensemble.main(["--condition", "{'task_name': 'custom', 'tag': 'both'}", "--n_models", "2"])
    assert "ensemble: mean" in capsys.readouterr().out
    with pytest.raises(UsageError, match="the log does not tell the order of its labels"):
        ensemble.task_of_run({"custom_columns": "text,verdict", "mapping": "{}"}, "custom")


def test_sentence_embeddings_are_made_of_the_named_columns(place: Workplace) -> None:
    task, seed = ["--task", "custom", "--custom_columns", "text,verdict"], ["--k", "16", "--seed", "1"]
    folder = place.folder / "k-shot" / "custom" / "16-1"
    folder.mkdir(parents=True)
    for path in (place.folder / "own").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = ["--model", str(place.model), "--name", "tiny"]
    get_sbert_embedding.main([*model, *task, *seed, "--do_test", "--data_dir", str(place.folder / "k-shot")])
    assert {path.stem: len(np.load(path)) for path in folder.glob("*.npy")} == {
        f"{s}_tiny": n for s, n in SIZES.items()
    }


NEEDS_MAPPING = (
    "--custom_columns needs --mapping, every label of your data and its word, in the order of the logits: as "
)
COLUMNS = ("--task_name", "custom", "--data_dir", "own", "--custom_columns", "text,verdict")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--task_name", "custom"], "--task_name custom is for data of one's own: add --custom_columns, the names of"),
        (["--custom_columns", "a,b"], "--custom_columns is for data of one's own, but SST-2 is a task whose files are"),
        (["--task_name", "custm"], "unknown task 'custm': did you mean 'custom'? Available: SST-2, "),
        (COLUMNS, NEEDS_MAPPING),
        ([*COLUMNS, "--few_shot_type", "finetune"], NEEDS_MAPPING),
        ([*COLUMNS, "--mapping", MAPPING], f"--custom_columns needs --template, as in --template '{TEMPLATE}', or --f"),
        (
            [*COLUMNS, "--custom_columns", "id,text,verdict", "--mapping", MAPPING],
            "--custom_columns needs --template, as in --template '*cls**sent_0**+sent_1*_It_was*mask*.*sep+*', or --fe",
        ),
        (flags("--mapping", "{'no': 'bad'}"), "--mapping {'no': 'bad'} has one label or none, where two classes at le"),
        (flags("--mapping", "{}"), "--mapping {} has one label or none"),
        (flags("--mapping", "no"), "--mapping is no Python dictionary: no; write for example"),
        (flags("--mapping", "{0: 'bad', 1: 'good'}"), "own/train.csv line 2: label 'no' is not among the labels of cu"),
        (flags("--custom_columns", "txt,verdict"), "own/train.csv: unknown column 'txt': did you mean 'text'? Availab"),
        (flags("--template", "*sent_1**mask*"), "--template uses sent_1, but custom has one sentence (sent_0)"),
        (flags("--data_dir", "none"), "there is no folder none: put train, dev and test there"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_told_in_one_sentence(place: Workplace, given: list[str], sentence: str) -> None:
    outcome = place.call(place.argv(*given, output="refused"))
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {sentence}") and outcome.err.count("\n") == 1
    assert not (place.folder / "refused").exists()


def test_numbers_as_keys_and_three_sentences_work(place: Workplace, write: Write, tmp_path: Path) -> None:
    for split in SIZES:
        rows = [[text, "a city", text[:9], label] for text, label in sst2_rows(4, split)]
        write(f"{split}.csv", as_file("csv", [["a", "b", "c", "label"], *rows]))
    own = ["--task_name", "custom", "--data_dir", str(tmp_path), "--custom_columns", "a,b,c,label"]
    prompt = ["--template", "*cls**sent_2**+sent_1**+sent_0*:*mask**sep+*", "--mapping", "{1: 'great', 0: 'bad'}"]
    kernel = read_kernel(place.run(*own, *prompt, output="three"), "test", "custom")
    assert kernel.shape == (4, 2, 4, 2) and kernel.isfinite().all()
    place.run(*own, *prompt, "--few_shot_type", "finetune", "--no_train", output="three-plain")


def test_drawing_spares_files_that_it_did_not_write(tmp_path: Path) -> None:
    folder = tmp_path / "k-shot" / "custom" / "2-1"
    own = folder / "train.csv"
    write_rows(own, [("text", "label"), *((f"text {n}", "ab"[n % 2]) for n in range(20))])
    before = own.read_bytes()
    command = ["--mode", "k-shot", "--k", "2", "--seed", "1", "--custom_columns", "text,label", "--input", str(own)]
    with pytest.raises(UsageError, match="train.csv is there already, and not what this command would write: move"):
        generate_k_shot_data.main([*command, "--output_dir", str(tmp_path)])
    assert own.read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["train.csv"]
    source = shutil.move(own, tmp_path / "all.csv")
    command[-1] = str(source)
    for _ in range(2):
        generate_k_shot_data.main([*command, "--output_dir", str(tmp_path)])
    assert len(own.read_text(encoding="utf-8").splitlines()) == 5
    (folder / "test.tsv").write_text("text\tlabel\n", encoding="utf-8")
    with pytest.raises(UsageError, match="test.tsv is there already"):
        generate_k_shot_data.main([*command, "--output_dir", str(tmp_path)])
