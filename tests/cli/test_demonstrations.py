"""Prompts with demonstrations through the command line, against prompts that are drawn and written here by hand."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

import oracle
from command_line import SIZES, Workplace, read_kernel, read_results, read_tensors, sst2_rows, write_rows

DEMO = ("--few_shot_type", "prompt-demo", "--num_sample", "3")
WORDS = ("terrible", "great")
# Float32 against float64, relative Frobenius error, and logits of order 1.
FLOAT32, FLOAT64, LOGITS = 2e-6, 1e-12, 2e-5
ROWS = {split: sst2_rows(size, split) for split, size in {**SIZES, "train": 6}.items()}

Draw = list[int]


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    write_rows(place.data / "train.tsv", [("sentence", "label"), *ROWS["train"]])
    return place


@pytest.fixture(scope="module")
def shown(place: Workplace) -> Path:
    """The output folder of a kernel run with three draws."""
    return place.run(*DEMO, output="shown")


@pytest.fixture(scope="module")
def lm(place: Workplace) -> nn.Module:
    """The checkpoint as transformers loads it, in float64, its decoder untied."""
    model = AutoModelForMaskedLM.from_pretrained(place.model, attn_implementation="eager").double().eval()
    model.lm_head.decoder.weight = nn.Parameter(model.lm_head.decoder.weight.detach().clone())
    return model


@pytest.fixture(scope="module")
def tokenizer(place: Workplace) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(place.model)


def label_of(index: int) -> int:
    return int(ROWS["train"][index][1])


def drawn(split: str, samples: int, generator: np.random.RandomState) -> list[Draw]:
    """Train examples for each prompt of a split, sample by sample: the first of each class of a permutation."""
    draws = []
    for _ in range(samples):
        for query in range(len(ROWS[split])):
            candidates = [index for index in range(6) if split != "train" or index != query]
            order = [candidates[at] for at in generator.permutation(len(candidates))]
            draws.append([next(index for index in order if label_of(index) == wanted) for wanted in (0, 1)])
    return draws


def all_draws(samples: int, seed: int = 42) -> dict[str, list[Draw]]:
    """Dev comes first, then test; train is drawn once, by a generator of its own."""
    generator = np.random.RandomState(seed)
    dev = drawn("dev", samples, generator)
    return {
        "dev": dev,
        "test": drawn("test", samples, generator),
        "train": drawn("train", 1, np.random.RandomState(seed)),
    }


def demonstration(index: int) -> str:
    text, label = ROWS["train"][index]
    return f"{text} It was {WORDS[int(label)]}.</s>"


def query(split: str, index: int) -> str:
    rows = ROWS[split]
    return f"<s>{rows[index % len(rows)][0]} It was<mask>.</s>"


def prompts(split: str, draws: Sequence[Draw]) -> list[str]:
    return [query(split, n) + "".join(map(demonstration, draw)) for n, draw in enumerate(draws)]


def hand_logits(lm: nn.Module, tokenizer: PreTrainedTokenizerBase, text: object) -> Tensor:
    """The label words' logits, [1, 2], of a prompt written out."""
    ids = tokenizer(str(text), add_special_tokens=False, return_tensors="pt").input_ids
    at = ids[0].tolist().index(tokenizer.mask_token_id)
    return lm(input_ids=ids).logits[:, at, tokenizer.convert_tokens_to_ids(["Ġterrible", "Ġgreat"])]


def check_logits(folder: Path, lm: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: dict[str, list[str]]) -> None:
    """Hold the logits files of a run against prompts written out by hand."""
    for split, texts in wanted.items():
        logits, labels = read_tensors(folder / f"{split}_logits_sst-2.pt")
        assert labels.tolist() == [int(ROWS[split][n % len(ROWS[split])][1]) for n in range(len(texts))]
        with torch.no_grad():
            hand = torch.cat([hand_logits(lm, tokenizer, text) for text in texts])
        assert logits.shape == hand.shape
        assert torch.allclose(logits.double(), hand, atol=LOGITS), split


def tokens(folder: Path, split: str = "test") -> dict[str, str]:
    """Hashes of the tokens of train and of a split."""
    return json.loads((folder / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))["tokens_sha256"]


def saved_logits(place: Workplace, *flags: str, name: str) -> np.ndarray:
    place.run(*DEMO, *flags, "--save_logit", "--save_logit_dir", str(place.folder / f"{name} d"), output=name)
    return np.load(place.folder / f"{name} d" / "sst-2--1--1.npy")


# What is drawn.


def test_every_draw_is_a_row_of_the_logits_and_prompts_are_those_of_the_published_sampler(
    shown: Path, lm: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    draws = all_draws(3)
    assert {split: len(draw) for split, draw in draws.items()} == {"train": 6, "dev": 12, "test": 18}
    check_logits(shown, lm, tokenizer, {split: prompts(split, draws[split]) for split in draws})


def test_zero_shot_metrics_are_those_of_averaged_logits(place: Workplace, shown: Path) -> None:
    averages = saved_logits(place, "--no_train", name="zero")
    for split, name in (("dev", "eval"), ("test", "test")):
        logits, labels = read_tensors(shown / f"{split}_logits_sst-2.pt")
        averaged = logits.reshape(3, -1, 2).mean(0)
        own = labels[: len(averaged)]
        found = read_results(place.folder / "zero" / f"{name}_results_sst-2.txt")
        assert found["eval_acc"] == (averaged.argmax(1) == own).double().mean().item()
        # The loss is that of the prompts, each by itself.
        assert found["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        if split == "test":
            assert averages == pytest.approx(averaged.numpy(), abs=LOGITS)


def test_kernel_metrics_are_those_of_averaged_predictions(shown: Path) -> None:
    train, train_labels = read_tensors(shown / "train_kernels_sst-2.pt")
    test, labels = read_tensors(shown / "test_kernels_sst-2.pt")
    assert (train.shape, test.shape) == ((6, 2, 6, 2), (6, 2, 18, 2))
    targets = np.eye(2)[train_labels].reshape(-1)
    alpha = np.linalg.lstsq(train.reshape(12, 12).numpy(), targets, rcond=None)[0]
    averaged = (test.reshape(12, 36).numpy().T @ alpha).reshape(3, 6, 2).mean(axis=0)
    wanted = np.mean(averaged.argmax(axis=1) == labels[:6].numpy())
    assert read_results(shown / "test_results_sst-2.txt")["eval_acc"] == pytest.approx(wanted)


def test_the_kernel_of_the_train_examples_has_one_draw_of_each_and_is_symmetric(shown: Path) -> None:
    kernel = read_kernel(shown, "train")
    assert kernel.shape == (6, 2, 6, 2)
    assert oracle.relative_error(kernel, kernel.permute(2, 3, 0, 1)) <= FLOAT32
    for split in ("dev", "test"):
        assert tokens(shown, split)["train"] == tokens(shown, "train")["train"]


@pytest.mark.parametrize("engine", ["factored", "jacobian"])
def test_the_kernel_is_that_of_gradients_taken_one_at_a_time(
    place: Workplace, lm: nn.Module, tokenizer: PreTrainedTokenizerBase, engine: str
) -> None:
    flags = ("--kernel_dtype", "float64", "--kernel_engine", engine, "--num_sample", "1", "--no_predict")
    folder = place.run(*DEMO, *flags, output=f"exact {engine}")
    draws, parameters = all_draws(1), list(lm.parameters())

    def gradients(split: str) -> Tensor:
        texts = prompts(split, draws[split])
        return oracle.gradients(lambda text: hand_logits(lm, tokenizer, text), parameters, texts)

    of_train = gradients("train")
    for split in ("train", "dev"):
        truth = oracle.kernel(of_train, of_train if split == "train" else gradients(split), "sgd")
        assert oracle.relative_error(read_kernel(folder, split), truth) <= FLOAT64


def test_one_seed_gives_the_same_tokens_and_another_others(place: Workplace, shown: Path) -> None:
    same, other = (place.run(*DEMO, "--no_predict", "--seed", seed, output=f"seed {seed}") for seed in ("42", "7"))
    for split in ("train", "dev"):
        assert tokens(same, split) == tokens(shown, split)
        assert (same / f"{split}_kernels_sst-2.pt").read_bytes() == (shown / f"{split}_kernels_sst-2.pt").read_bytes()
        assert tokens(other, split)["train"] != tokens(shown, split)["train"]
        assert tokens(other, split)[split] != tokens(shown, split)[split]


def test_a_kernel_of_another_seed_is_not_used_again(place: Workplace, shown: Path) -> None:
    before = (shown / "test_kernels_sst-2.pt").read_bytes()
    outcome = place.call(place.argv(*DEMO, "--seed", "7", output="shown"))
    assert outcome.status == 2
    assert "tokens_sha256" in outcome.err and "--overwrite_kernels" in outcome.err
    assert (shown / "test_kernels_sst-2.pt").read_bytes() == before


def test_prompts_of_dev_and_test_do_not_depend_on_the_trainer_or_on_training(place: Workplace, shown: Path) -> None:
    zero = saved_logits(place, "--no_train", name="untrained")
    averaged = read_tensors(shown / "test_logits_sst-2.pt")[0].reshape(3, 6, 2).mean(0).numpy()
    assert zero == pytest.approx(averaged, abs=LOGITS)
    without = saved_logits(place, "--do_train", "False", "--trainer", "standard", name="not trained")
    assert np.array_equal(without, zero)
    unmoved = ("--trainer", "standard", "--max_steps", "1", "--learning_rate", "0")
    assert saved_logits(place, *unmoved, name="unmoved") == pytest.approx(zero, abs=LOGITS)
    assert tokens(place.run(*DEMO, "--do_train", "False", output="only kernels")) == tokens(shown)


def test_fine_tuning_sees_new_demonstrations_at_every_visit(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = nn.Embedding.forward

    def look_up(self: nn.Embedding, ids: Tensor) -> Tensor:
        if self.training and self.num_embeddings > 300:
            seen.append(ids)
        return real(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", look_up)
    flags = ("--trainer", "standard", "--max_steps", "3", "--per_device_train_batch_size", "6")
    place.run(*DEMO, *flags, output="visits")
    visits = [{tuple(row[row != 1].tolist()) for row in batch} for batch in seen if len(batch) == 6]
    assert len(visits) == 3
    assert visits[0] != visits[1] != visits[2]


# What a prompt shows.


def test_two_demonstrations_of_each_class_stand_class_by_class(
    place: Workplace, lm: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = place.run(*DEMO, "--num_demo", "2", "--num_sample", "1", "--no_predict", output="two each")
    generator = np.random.RandomState(42)
    draws = []
    for _ in ROWS["dev"]:
        order = generator.permutation(6).tolist()
        draws.append([index for wanted in (0, 1) for index in [i for i in order if label_of(i) == wanted][:2]])
    check_logits(folder, lm, tokenizer, {"dev": prompts("dev", draws)})


@pytest.mark.parametrize("where", ["head", "tail"])
def test_in_context_examples_stand_on_their_side_of_the_query(
    place: Workplace, lm: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    flags = (f"--gpt3_in_context_{where}", "--gpt3_in_context_num", "3", "--num_sample", "2")
    folder = place.run(*DEMO, *flags, output=f"in context {where}")
    generator = np.random.RandomState(42)
    wanted: dict[str, list[str]] = {}
    for split in ("dev", "test"):
        texts = []
        for n in range(2 * len(ROWS[split])):
            chosen = [demonstration(index) for index in generator.permutation(6)[:3]]
            tail = query(split, n) + "".join(chosen)
            texts.append(tail if where == "tail" else "".join(reversed(chosen)) + query(split, n))
        wanted[split] = texts
    check_logits(folder, lm, tokenizer, wanted)


def test_in_context_learning_shows_no_more_examples_than_there_are(
    place: Workplace, lm: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = place.run(*DEMO, "--gpt3_in_context_tail", "--num_sample", "1", output="all there are")
    generator = np.random.RandomState(42)
    orders = {split: [generator.permutation(6) for _ in ROWS[split]] for split in ("dev", "test")}
    shown = {split: prompts(split, [list(order) for order in orders[split]]) for split in orders}
    check_logits(folder, lm, tokenizer, shown)


def test_a_filter_draws_among_the_most_similar_of_each_class(
    place: Workplace, lm: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With one of three of each class kept there is nothing to draw: the most similar one is shown, in every sample."""
    generator = np.random.default_rng(0)
    data = place.folder / "embedded"
    shutil.copytree(place.data, data)
    vectors = {split: generator.normal(size=(len(ROWS[split]), 8)).astype(np.float32) for split in ROWS}
    for split, rows in vectors.items():
        np.save(data / f"{split}_our-model.npy", rows * generator.uniform(0.1, 9, (len(rows), 1)).astype(np.float32))
    flags = ("--demo_filter", "--demo_filter_model", "org/our-model", "--demo_filter_rate", "0.5")
    folder = place.run(*DEMO, *flags, "--data_dir", str(data), output="filtered")
    wanted = {}
    for split in ROWS:
        draws = []
        for n, own in enumerate(vectors[split]):
            cosine = vectors["train"] @ own / np.linalg.norm(vectors["train"], axis=1)
            if split == "train":
                cosine[n] = -np.inf
            draws.append([max((i for i in range(6) if label_of(i) == c), key=lambda i: cosine[i]) for c in (0, 1)])
        wanted[split] = prompts(split, draws * (1 if split == "train" else 3))
    check_logits(folder, lm, tokenizer, wanted)


def test_several_templates_multiply_the_draws(
    place: Workplace, lm: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    templates = place.folder / "templates.txt"
    templates.write_text("*cls**sent_0*_It_was*mask*.*sep+*\n*cls*A*mask*_film:*+sent_0**sep+*\n", encoding="utf-8")
    folder = place.run(*DEMO, "--template_path", str(templates), output="several")
    assert read_kernel(folder, "train").shape == (12, 2, 12, 2)
    generator = np.random.RandomState(42)
    draws = {split: drawn(split, 6, generator) for split in ("dev", "test")}

    def other(split: str, n: int, draw: Draw) -> str:
        rows, train = ROWS[split], ROWS["train"]
        shown = "".join(f"A {WORDS[label_of(i)]} film: {train[i][0]}</s>" for i in draw)
        return f"<s>A<mask> film: {rows[n % len(rows)][0]}</s>" + shown

    wanted = {
        split: [
            (prompts(split, [draw] * (n + 1))[n] if (n // len(ROWS[split])) % 2 == 0 else other(split, n, draw))
            for n, draw in enumerate(draws[split])
        ]
        for split in draws
    }
    assert (len(wanted["dev"]), len(wanted["test"])) == (24, 36)
    check_logits(folder, lm, tokenizer, wanted)
    zero = saved_logits(place, "--template_path", str(templates), "--no_train", name="several zero")
    logits = read_tensors(folder / "test_logits_sst-2.pt")[0].reshape(6, 6, 2).mean(0)
    assert zero == pytest.approx(logits.numpy(), abs=LOGITS)


def test_double_demo_doubles_the_limit_on_tokens(place: Workplace) -> None:
    doubled = saved_logits(place, "--no_train", "--max_seq_length", "18", "--double_demo", name="doubled")
    cut, whole = (saved_logits(place, "--no_train", "--max_seq_length", n, name=f"of {n}") for n in ("18", "36"))
    assert np.array_equal(doubled, whole)
    assert not np.allclose(doubled, cut, atol=1e-3)


@pytest.mark.parametrize("flag", ["--use_full_length", "--gpt3_in_context_head"])
def test_what_needs_room_takes_the_models_maximum(place: Workplace, flag: str) -> None:
    flags = ("--no_train", "--gpt3_in_context_num", "2", flag)
    short, long = (saved_logits(place, *flags, "--max_seq_length", n, name=f"{n} {flag}") for n in ("20", "200"))
    assert np.array_equal(short, long)


def test_a_template_of_ones_own_shows_demonstrations_without_auto_demo(
    place: Workplace, lm: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    template = "*cls*good:*+sent_2*_and_bad:*+sent_1*.*+sent_0*_It_was*mask*.*sep+*"
    folder = place.run(*DEMO, "--no_auto_demo", "--template", template, "--no_predict", output="own")
    texts = []
    for n, (bad, good) in enumerate(all_draws(3)["dev"]):
        train, dev = ROWS["train"], ROWS["dev"]
        texts.append(f"<s>good: {train[good][0]} and bad: {train[bad][0]}. {dev[n % 4][0]} It was<mask>.</s>")
    check_logits(folder, lm, tokenizer, {"dev": texts})


def test_sixteen_draws_are_usual_and_the_log_says_how_many(place: Workplace) -> None:
    folder = place.run("--few_shot_type", "prompt-demo", "--no_predict", output="usual")
    assert len(read_tensors(folder / "dev_logits_sst-2.pt")[0]) == 16 * 4
    assert place.last_record()["num_sample"] == 16


def test_a_linear_head_is_fitted_to_one_draw_and_predicts_by_all(place: Workplace) -> None:
    logits = saved_logits(place, "--trainer", "linearhead", name="linear")
    assert logits.shape == (6, 2)
    kernel = place.run(*DEMO, "--from_linearhead", output="from linear")
    assert len(read_tensors(kernel / "test_logits_sst-2.pt")[0]) == 18
    averaged = read_tensors(kernel / "test_logits_sst-2.pt")[0].reshape(3, 6, 2).mean(0).numpy()
    assert averaged == pytest.approx(logits, abs=LOGITS)
