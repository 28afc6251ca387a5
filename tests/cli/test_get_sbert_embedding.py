"""tools/get_sbert_embedding.py with a tiny random model: its numbers, its files, what it refuses."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from command_line import refusal
from lmntk.commands.embed import main
from lmntk.prompts import sentence_embeddings
from tiny_models import save_tiny_checkpoint

# Means of float32 states, once of one text and once of a padded batch: sums of 16 to 64 terms in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
SENTENCES = ["a boring film", "great", "", "the actor was very good and the story was not dull", "so it goes", "great"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("bert", tmp_path_factory.mktemp("models") / "tiny-sentences")


class Data:
    """A folder of k-shot data, two examples a label, and calls of the tool on it."""

    def __init__(self, root: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root / "k-shot-1k-test"
        self.model = model
        self._capsys = capsys

    def write(self, task: str, name: str, rows: list[str], seed: int = 42) -> Path:
        path = self.root / task / f"2-{seed}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        return path

    def write_sst2(self, seed: int = 42) -> None:
        for split, sentences in (("train", SENTENCES), ("dev", SENTENCES[3:]), ("test", SENTENCES[::-1])):
            rows = [f"{sentence}\t{number % 2}" for number, sentence in enumerate(sentences)]
            self.write("SST-2", f"{split}.tsv", ["sentence\tlabel", *rows], seed)

    def argv(self, *flags: str) -> list[str]:
        model = [] if "--sbert_model" in flags else ["--model", str(self.model)]
        seed = [] if "--seed" in flags else ["--seed", "42"]
        return ["--data_dir", str(self.root), "--k", "2", *model, *seed, *flags]

    def run(self, *flags: str) -> list[str]:
        """Call the tool; return the files that are there afterwards."""
        assert main(self.argv(*flags)) == 0
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*.npy"))

    def load(self, name: str) -> np.ndarray:
        return np.load(self.root / name)

    def refusal(self, *flags: str) -> str:
        return refusal(self._capsys, main, self.argv(*flags))


@pytest.fixture
def data(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Data:
    return Data(tmp_path, model, capsys)


def by_hand(model: Path, text: str, limit: int = 64) -> np.ndarray:
    """The mean over the tokens of one text alone, without padding or mask."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    ids = tokenizer.encode(text)
    if len(ids) > limit:
        ids = [*ids[: limit - 1], tokenizer.sep_token_id]
    with torch.no_grad():
        states = network(input_ids=torch.tensor([ids])).last_hidden_state
    return states[0].double().mean(0).numpy()


@pytest.mark.parametrize("batch_size", ["1", "4", "32"])
def test_rows_are_means_over_the_tokens_in_file_order_whatever_the_batches(data: Data, batch_size: str) -> None:
    data.write_sst2()
    files = data.run("--task", "SST-2", "--batch_size", batch_size)
    assert files == [f"SST-2/2-42/{split}_tiny-sentences.npy" for split in ("dev", "train")]
    for file, sentences in zip(files, (SENTENCES[3:], SENTENCES), strict=True):
        embeddings = data.load(file)
        assert (embeddings.dtype, embeddings.shape) == (np.float32, (len(sentences), 16))
        expected = np.stack([by_hand(data.model, sentence) for sentence in sentences])
        np.testing.assert_allclose(embeddings, expected, **ROUNDING)
    assert abs(expected[0] - expected[1]).max() > 0.1, "texts differ by far more than rounding"


@pytest.mark.parametrize(("architecture", "limit"), [("bert", 64), ("roberta", 298)])
def test_a_text_is_cut_to_what_the_model_can_read(
    data: Data, tmp_path: Path, architecture: str, limit: int
) -> None:  # fmt: skip
    data.model = save_tiny_checkpoint(architecture, tmp_path / architecture)
    long = " ".join(["good", "bad", "film"] * 150)
    for split in ("train", "dev"):
        data.write("SST-2", f"{split}.tsv", ["sentence\tlabel", f"{long}\t0", "a good film\t1"])
    data.run("--task", "SST-2")
    embeddings = data.load(f"SST-2/2-42/train_{architecture}.npy")
    expected = np.stack([by_hand(data.model, text, limit) for text in (long, "a good film")])
    np.testing.assert_allclose(embeddings, expected, **ROUNDING)


@pytest.mark.parametrize("task", ["MNLI", "mnli-mm"])
def test_mnli_has_both_test_sets_and_pairs_are_joined_by_a_space(data: Data, task: str) -> None:
    pairs = {"train": ("the film won", "it said no"), "dev_matched": ("a", "b"), "test_matched": ("he", "she said")}
    pairs["test_mismatched"] = ("people", "how many")
    for stem, (first, second) in pairs.items():
        row = "\t".join([*"01234567", first, second, "x", "neutral"])
        data.write("MNLI", f"{stem}.tsv", ["header", row])
    files = data.run("--task", task, "--name", "mine")
    assert files == [f"MNLI/2-42/{stem}_mine.npy" for stem in ("dev_matched", "train")]
    files = data.run("--task", "MNLI", "mnli-mm", "--name", "mine", "--do_test")
    assert files == [f"MNLI/2-42/{stem}_mine.npy" for stem in sorted(pairs)]
    for stem, (first, second) in pairs.items():
        expected = by_hand(data.model, f"{first} {second}")
        np.testing.assert_allclose(data.load(f"MNLI/2-42/{stem}_mine.npy"), expected[None], **ROUNDING)


def test_the_test_set_is_embedded_when_asked_for_and_a_text_of_several_seeds_once(
    data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (13, 42):
        data.write_sst2(seed)
    files = data.run("--seed", "13", "42", "--do_test")  # the tasks: those that are there
    assert files == [
        f"SST-2/2-{seed}/{split}_tiny-sentences.npy" for seed in (13, 42) for split in ("dev", "test", "train")
    ]
    for split in ("dev", "test", "train"):
        first, second = (data.load(f"SST-2/2-{seed}/{split}_tiny-sentences.npy") for seed in (13, 42))
        assert first.tobytes() == second.tobytes()
    out, err = capsys.readouterr()
    assert "SST-2: 100%" in err and "5/5" in err and "text/s" in err
    assert out.splitlines()[0] == str(data.root / "SST-2/2-13/train_tiny-sentences.npy")
    assert out.splitlines()[-1] == "to use them: run.py --demo_filter --demo_filter_model tiny-sentences"


def test_what_is_there_is_kept_and_said_unless_it_is_to_be_overwritten(
    data: Data, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data.write_sst2()
    data.run("--task", "SST-2")
    train = data.root / "SST-2/2-42/train_tiny-sentences.npy"
    right = data.load(str(train))
    np.save(train, np.zeros((6, 16), dtype=np.float32))
    with monkeypatch.context() as patched:
        patched.delattr(sentence_embeddings, "load_encoder")  # nothing to do, no model
        data.run("--task", "SST-2")
    assert f"{train} is there already: kept (--overwrite computes it again)\n" in capsys.readouterr().out
    assert not data.load(str(train)).any()
    (data.root / "SST-2/2-42/dev_tiny-sentences.npy").unlink()
    data.run("--task", "SST-2")
    assert not data.load(str(train)).any()
    assert data.load("SST-2/2-42/dev_tiny-sentences.npy").shape == (3, 16)
    data.run("--task", "SST-2", "--overwrite")
    np.testing.assert_allclose(data.load(str(train)), right, **ROUNDING)


@pytest.mark.parametrize("damage", ["another number of rows", "no array"])
def test_a_kept_file_that_cannot_be_that_of_the_split_is_refused(data: Data, damage: str) -> None:
    data.write_sst2()
    path = data.root / "SST-2/2-42/dev_tiny-sentences.npy"
    path.write_text("") if damage == "no array" else np.save(path, np.zeros((4, 16)))
    reason = "is not an array that can be read (" if damage == "no array" else "has the shape [4, 16], for 3 examples: "
    assert data.refusal("--task", "SST-2").startswith(f"{path} {reason}")


def test_lm_bffs_spelling_means_its_sentence_models_and_their_file_names(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.write_sst2()
    asked: list[str] = []
    load = sentence_embeddings.load_encoder

    def load_tiny(name: str, max_positions: Any) -> sentence_embeddings.Encoder:
        asked.append(name)
        return load(str(data.model), max_positions)

    monkeypatch.setattr(sentence_embeddings, "load_encoder", load_tiny)
    files = data.run("--sbert_model", "roberta-large")
    assert asked == ["sentence-transformers/roberta-large-nli-stsb-mean-tokens"]
    assert files == [f"SST-2/2-42/{split}_sbert-roberta-large.npy" for split in ("dev", "train")]


def test_a_missing_folder_is_told_with_the_command_that_makes_it(data: Data) -> None:
    data.write_sst2()
    folder = data.root / "mr" / "2-42"
    told = data.refusal("--task", "SST-2", "mr", "cr")
    assert told.startswith(f"there is no folder {folder}: make it with `python tools/generate_k_shot_data.py --mode ")
    assert not list(data.root.rglob("*.npy")), "files are looked for before anything is computed"
    shutil.rmtree(data.root)
    assert data.refusal().startswith(f"{data.root} holds none of the usual tasks: `python tools/generate_k_shot_dat")


def test_weights_that_would_be_random_are_refused(data: Data, tmp_path: Path) -> None:
    data.write_sst2()
    network = AutoModel.from_pretrained(data.model)
    shutil.copytree(data.model, tmp_path / "cut")
    kept = {name: weight for name, weight in network.state_dict().items() if "layer.1." not in name}
    network.save_pretrained(tmp_path / "cut", state_dict=kept)
    told = data.refusal("--model", str(tmp_path / "cut"))
    assert told.startswith(f"--model {tmp_path / 'cut'} lacks weights, which would be random: encoder.layer.1.")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--taks", "SST-2"], "unknown flag '--taks': did you mean '--task'? Available: --help, "),
        (["--task", "sst2"], "unknown task 'sst2': did you mean 'SST-2'?"),
        (["--batch_size", "0"], "--batch_size 0: at least one text at a time"),
        (["--name", "a/b"], "--name a/b: it is part of a file's name and cannot hold a slash"),
        (["--model", "no/where/at/all"], "--model no/where/at/all: the name, which is not a local folder, gives no mo"),
        (
            ["--sbert_model", "x", "--model", "y"],
            "argument --model: not allowed with argument --sbert_model; see --hel",
        ),
    ],
)
def test_a_mistake_is_one_sentence(data: Data, flags: list[str], sentence: str) -> None:
    data.write_sst2()
    told = data.refusal(*flags)
    assert told.startswith(sentence)
    assert "\n" not in told
