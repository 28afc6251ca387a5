"""A user's own data on the command line: drawn disjointly, and used like any task's."""

import contextlib
import csv
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import SIZES, Workplace, read_kernel, refusal, sst2_rows, write_rows
from lmntk.commands import embed, ensemble, splits
from lmntk.data.examples import read_examples
from lmntk.data.tasks import custom_task, described_task

ENDINGS = ("csv", "tsv", "jsonl", "json")
TWO = custom_task("text, label", ("0", "1"))
TEMPLATE = "*cls**sent_0*_It_was*mask*.*sep+*"
MAPPING = "{'no': 'terrible', 'yes': 'great'}"
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
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


class TestSplits:
    """The tool draws train, dev and test from one file."""

    def draw(self, folder: Path, *flags: str, output: str = "data") -> Path:
        with contextlib.chdir(folder):
            command = ["--mode", "k-shot-1k-test", "--custom_columns", "text,label", "--output_dir", output, *flags]
            assert splits.main(command) == 0
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
            ("text,label\na,x\nb,y\nc,x\nd,y\n", [], "--k 16: train and dev take all 4 rows of custom"),
            ("text,label\na,x\nb,x\n", [], "all.csv: all rows have the label 'x'"),
            ("text,label\na,x\nb,\n", [], "all.csv line 3 has no label"),
            (
                *("label,text\nx,a\ny,b\nx,c\n", ["--custom_columns", "label,text"]),
                "all.csv: column 'text' has 3 labels in 3 rows: --custom_columns names",
            ),
            ("text,label\na,x\n", ["--input", "none.csv"], "cannot read none.csv"),
            ("text,label\na,x\n", ["--task", "a", "b"], "--task a b: --custom_columns are those of one data set"),
            ("text,label\na,x\n", ["--task", "mr"], "--custom_columns is for your own data, but mr is a task"),
            ("0,1\n", ["--custom_columns", "0,9"], "all.csv: there is no column 9"),
            ("text,label\na,0\nb,1\nc,1.0\nd,0\n", [], "the labels '1' and '1.0' of column 'label' are the same"),
            (
                *("text,label\na,x\nb,y\nc,x\nd,y\n", ["--custom_columns", "0,1"]),
                "all.csv line 1 has the label 'label', which no other line has: if it is the header, give "
                "--custom_columns its names",
            ),
        ],
    )
    def test_what_cannot_be_drawn_is_one_sentence(
        self,
        tmp_path: Path,
        write: Write,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        content: str,
        flags: list[str],
        sentence: str,
    ) -> None:
        write("all.csv", content)
        monkeypatch.chdir(tmp_path)
        command = ["--mode", "k-shot-1k-test", "--custom_columns", "text,label", "--input", "all.csv", *flags]
        assert refusal(capsys, splits.main, command).startswith(sentence)
        assert [path.name for path in tmp_path.iterdir()] == ["all.csv"]

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (["--input", "all.csv"], "--input all.csv needs --custom_columns, such as text,label"),
            (["--task", "custom"], "task 'custom' is for your own data, whose columns are not given here: see docs/"),
            (["--custom_columns", "text,label"], "data/original/custom has no train file ending in .csv, .tsv, .jsonl"),
        ],
    )
    def test_flags_that_lack_something_say_what(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        flags: list[str],
        sentence: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert refusal(capsys, splits.main, flags).startswith(sentence)


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    """The tiny SST-2 data once more, as a user's own CSV, TSV and JSON-lines files."""
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
        assert ensemble.main(["--condition", "{'task_name': 'custom', 'tag': 'both'}", "--n_models", "2"]) == 0
    assert "ensemble: mean" in capsys.readouterr().out


def test_sentence_embeddings_are_made_of_the_named_columns(place: Workplace) -> None:
    task, seed = ["--task", "custom", "--custom_columns", "text,verdict"], ["--k", "16", "--seed", "1"]
    folder = place.folder / "k-shot" / "custom" / "16-1"
    folder.mkdir(parents=True)
    for path in (place.folder / "own").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = ["--model", str(place.model), "--name", "tiny"]
    assert embed.main([*model, *task, *seed, "--do_test", "--data_dir", str(place.folder / "k-shot")]) == 0
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
        (["--task_name", "custom"], "--task_name custom is for"),
        (["--custom_columns", "a,b"], "--custom_columns is for your own data, but SST-2 is a task whose files are"),
        (["--task_name", "custm"], "unknown task 'custm': did you mean 'custom'? Available: SST-2, "),
        (COLUMNS, NEEDS_MAPPING),
        ([*COLUMNS, "--few_shot_type", "finetune"], NEEDS_MAPPING),
        ([*COLUMNS, "--mapping", MAPPING], f"--custom_columns needs --template, as in --template '{TEMPLATE}', or --f"),
        (
            [*COLUMNS, "--custom_columns", "id,text,verdict", "--mapping", MAPPING],
            "--custom_columns needs --template, as in --template '*cls**sent_0**+sent_1*_It_was*mask*.*sep+*', or --fe",
        ),
        (flags("--mapping", "{'no': 'bad'}"), "--mapping {'no': 'bad'} needs at least two labels"),
        (flags("--mapping", "{}"), "--mapping {} needs at least two labels"),
        (flags("--mapping", "no"), "--mapping is not a Python dictionary: no; write for example"),
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


def test_drawing_keeps_files_that_it_did_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "k-shot" / "custom" / "2-1"
    own = folder / "train.csv"
    write_rows(own, [("text", "label"), *((f"text {n}", "ab"[n % 2]) for n in range(20))])
    before = own.read_bytes()
    command = ["--mode", "k-shot", "--k", "2", "--seed", "1", "--custom_columns", "text,label"]
    command += ["--output_dir", str(tmp_path), "--input"]
    refused = refusal(capsys, splits.main, [*command, str(own)])
    assert (
        refused.startswith(f"{own} exists already") and "another --output_dir, or another name with --task" in refused
    )
    assert own.read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["train.csv"]
    source = str(shutil.move(own, tmp_path / "all.csv"))
    for _ in range(2):
        assert splits.main([*command, source]) == 0
    assert len(own.read_text(encoding="utf-8").splitlines()) == 5
    (folder / "test.tsv").write_text("text\tlabel\n", encoding="utf-8")
    assert refusal(capsys, splits.main, [*command, source]).startswith(f"{folder / 'test.tsv'} exists already")


class TestOddFiles:
    """Drawing from files without a header, or with labels that are almost alike."""

    def draw(self, path: Path, columns: str) -> Path:
        command = ["--mode", "k-shot", "--k", "2", "--seed", "1", "--custom_columns", columns, "--input", str(path)]
        assert splits.main([*command, "--output_dir", str(path.parent / "drawn")]) == 0
        return path.parent / "drawn" / "k-shot" / "custom" / "2-1"

    def test_a_file_without_a_header_gives_splits_without_one(
        self, write: Write, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [f"text {number},{('no', 'yes')[number % 2]}\n" for number in range(12)]
        folder = self.draw(write("all.csv", "".join(rows)), "0,1")
        assert capsys.readouterr().out.startswith("12 rows, labels 'no' (6), 'yes' (6)\n")
        drawn = [line for split in SIZES for line in (folder / f"{split}.csv").read_text().splitlines(keepends=True)]
        assert sorted(drawn) == sorted(rows)
        assert len(read_examples(custom_task("0,1", ("no", "yes")), folder / "train.csv")) == 4

    def test_classes_that_differ_only_in_case_are_noted(self, write: Write, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            path = write("all.csv", "text,label\n" + "".join(f"t{n},{('a', 'b', 'B')[n % 3]}\n" for n in range(18)))
            self.draw(path, "text,label")
        assert f"{path}: labels 'b' and 'B' differ only in case, and are two classes" in caplog.messages


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


def test_a_key_that_a_configuration_file_gives_twice_is_refused(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    (tmp_path / "config.json").write_text('{"mapping": {"0": "bad", "1": "dull", "1": "good"}}', encoding="utf-8")
    outcome = place.call(["config.json"])
    assert (outcome.status, outcome.err) == (2, "error: config.json is not valid JSON: '1' is given twice\n")
