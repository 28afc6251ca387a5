"""From flags to data sets: the prompts with demonstrations of every split, derived here once more from SPEC alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from command_line import SENTENCES, Workplace, sst2_rows, write_rows
from lmntk.config.arguments import parse_arguments
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.prompts.features import Feature

SEED = 13


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    for split, number in (("train", 8), ("dev", 3), ("test", 4)):
        write_rows(place.folder / "SST-2" / f"{split}.tsv", [("sentence", "label"), *sst2_rows(number, split)])
    labels = ("contradiction", "entailment", "neutral")
    for stem, number in (("train", 9), ("dev_matched", 3), ("test_matched", 3), ("test_mismatched", 2)):
        rows = [
            ["x"] * 8 + [SENTENCES[i % 6].capitalize() + ".", SENTENCES[(i + len(stem)) % 6], labels[i % 3]]
            for i in range(number)
        ]
        write_rows(place.folder / "MNLI" / f"{stem}.tsv", [["h"] * 11, *rows])
    return place


def built(place: Workplace, task: str, *flags: str) -> Experiment:
    argv = place.argv("--task_name", task, "--data_dir", str(place.folder / task), "--few_shot_type", "prompt-demo")
    return build(*parse_arguments([*argv, "--seed", str(SEED), *flags]))


def tokens(feature: Feature) -> tuple[list[int], int]:
    return feature.input_ids, feature.mask_position


class ByHand:
    """Prompts put together token by token, drawn from one generator in the order in which they are asked for."""

    def __init__(self, place: Workplace) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(place.model)
        self.generator = np.random.RandomState(SEED)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def first_of_each(self, labels: list[str], candidates: list[int], classes: tuple[str, ...]) -> list[int]:
        order = [candidates[i] for i in self.generator.permutation(len(candidates))]
        return [next(i for i in order if labels[i] == label) for label in classes]

    def sst2(self, query: str, train: list[tuple[str, str]], own: int | None = None) -> tuple[list[int], int]:
        candidates = [i for i in range(len(train)) if i != own]
        shown = self.first_of_each([label for _, label in train], candidates, ("0", "1"))
        cls, sep, mask = (getattr(self.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask"))
        (dot,) = self.encode(".")
        ids = [cls, *self.encode(query), *self.encode(" It was")]
        position = len(ids)
        ids += [mask, dot, sep]
        for i, word in zip(shown, (" terrible", " great"), strict=True):
            ids += [*self.encode(train[i][0]), *self.encode(" It was"), *self.encode(word), dot, sep]
        return ids, position

    def mnli(self, query: list[str], train: list[list[str]]) -> tuple[list[int], int]:
        labels = [row[-1] for row in train]
        shown = self.first_of_each(labels, list(range(len(train))), ("contradiction", "entailment", "neutral"))
        cls, sep, mask = (getattr(self.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask"))
        (question,), (comma,) = self.encode("?"), self.encode(",")

        def pair(row: list[str], answer: int) -> list[int]:
            first, second = row[8][:-1], " " + row[9][:1].lower() + row[9][1:]
            return [*self.encode(first), question, answer, comma, *self.encode(second), sep]

        ids = [cls, *pair(query, mask)]
        for i, word in zip(shown, (" No", " Yes", " Maybe"), strict=True):
            (answer,) = self.encode(word)
            ids += pair(train[i], answer)
        return ids, ids.index(mask)


def read(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def sentences(place: Workplace, split: str) -> list[tuple[str, str]]:
    return [(row[0], row[1]) for row in read(place.folder / "SST-2" / f"{split}.tsv")]


def test_dev_is_drawn_before_test_sample_by_sample_and_query_by_query(place: Workplace) -> None:
    run, by_hand, train = built(place, "SST-2", "--num_sample", "3"), ByHand(place), sentences(place, "train")
    for split in ("dev", "test"):
        queries = sentences(place, split)
        expected = [by_hand.sst2(query, train) for _, (query, _) in itertools.product(range(3), queries)]
        assert [tokens(feature) for feature in run.datasets[split].features] == expected
        assert run.datasets[split].num_sample == 3
        assert len({tuple(ids) for ids, _ in expected}) > len(queries), "the draws would all be alike"


def test_without_dev_test_is_drawn_first(place: Workplace) -> None:
    argv = ["--num_sample", "2", "--no_train", "--trainer", "standard"]
    model_args, data_args, training_args = parse_arguments(
        place.argv(
            "--data_dir", str(place.folder / "SST-2"), "--few_shot_type", "prompt-demo", "--seed", str(SEED), *argv
        )
    )
    training_args.do_eval = False
    run, by_hand, train = build(model_args, data_args, training_args), ByHand(place), sentences(place, "train")
    assert list(run.datasets) == ["test"]
    expected = [by_hand.sst2(query, train) for _ in range(2) for query, _ in sentences(place, "test")]
    assert [tokens(feature) for feature in run.datasets["test"].features] == expected


def test_a_train_example_is_drawn_once_without_itself_whatever_else_is_drawn(place: Workplace) -> None:
    run, by_hand, train = built(place, "SST-2", "--num_sample", "3"), ByHand(place), sentences(place, "train")
    expected = [by_hand.sst2(query, train, own=i) for i, (query, _) in enumerate(train)]
    assert [tokens(feature) for feature in run.datasets["train"].features] == expected
    assert run.datasets["train"].num_sample == 1


def test_in_fine_tuning_every_visit_of_a_train_example_is_a_new_draw_by_seed_epoch_and_example(
    place: Workplace,
) -> None:
    run, by_hand, train = built(place, "SST-2", "--trainer", "standard"), ByHand(place), sentences(place, "train")
    data = run.resampled
    assert data is not None
    assert len(data) == 8
    found = []
    for data.epoch, index in ((0, 3), (0, 5), (1, 3), (2, 3), (3, 3)):
        by_hand.generator = np.random.RandomState([SEED, data.epoch, index])
        found.append(tokens(data[index]))
        assert found[-1] == by_hand.sst2(train[index][0], train, own=index)
    assert len({tuple(ids) for ids, _ in found}) > 3


def test_the_second_test_set_of_mnli_is_drawn_after_the_first_and_pairs_are_numbered_on(place: Workplace) -> None:
    run, by_hand = built(place, "MNLI", "--num_sample", "2"), ByHand(place)
    train = read(place.folder / "MNLI" / "train.tsv")
    splits = {"dev": "dev_matched", "test": "test_matched", "test:mnli-mm": "test_mismatched"}
    assert list(run.datasets) == ["train", *splits]
    for split, stem in splits.items():
        rows = read(place.folder / "MNLI" / f"{stem}.tsv")
        expected = [by_hand.mnli(row, train) for _ in range(2) for row in rows]
        assert [tokens(feature) for feature in run.datasets[split].features] == expected
    assert run.datasets["test:mnli-mm"].task.name == "mnli-mm"


def test_several_templates_take_the_draws_in_turn(place: Workplace, tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("*cls**sent_0*_It_was*mask*.*sep+*\n*cls**sent_0*_This_is*mask*.*sep+*\n", encoding="utf-8")
    run = built(place, "SST-2", "--num_sample", "2", "--template_path", str(path))
    one, by_hand, train = built(place, "SST-2", "--num_sample", "4"), ByHand(place), sentences(place, "train")
    data = run.datasets["dev"]
    assert (data.num_sample, len(data)) == (4, 12)
    decoded = [by_hand.tokenizer.decode(feature.input_ids) for feature in data.features]
    assert [" It was" in text for text in decoded] == ([True] * 3 + [False] * 3) * 2
    # The same draws: the first and third sample are those of one template with four.
    for sample in (0, 2):
        part = slice(3 * sample, 3 * sample + 3)
        assert data.features[part] == one.datasets["dev"].features[part]
    assert (run.datasets["train"].num_sample, len(run.datasets["train"])) == (2, 2 * len(train))


@pytest.mark.parametrize(("flags", "longest"), [([], 128), (["--double_demo"], 256), (["--max_seq_length", "99"], 99)])
def test_demonstrations_may_make_prompts_twice_as_long(place: Workplace, flags: list[str], longest: int) -> None:
    assert built(place, "SST-2", "--num_sample", "1", *flags).prompts.limits.max_seq_length == longest


def test_in_context_prompts_may_be_as_long_as_the_model_reads(place: Workplace) -> None:
    run = built(place, "SST-2", "--num_sample", "1", "--gpt3_in_context_tail", "--gpt3_in_context_num", "3")
    assert run.prompts.limits.max_seq_length == 298
    by_hand = ByHand(place)
    assert by_hand.tokenizer.decode(run.datasets["dev"][0].input_ids).count("</s>") == 4


def test_loaded_kernels_of_mnli_are_those_of_the_first_test_set_where_there_is_no_other(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--few_shot_type", "prompt", "--load_kernels", str(tmp_path)]
    assert list(built(place, "MNLI", *flags).datasets) == ["train", "dev", "test"]
    assert caplog.messages == [
        f"there is no {tmp_path / 'test_kernels_mnli-mm.pt'}: the second test set, mnli-mm, is left out"
    ]
    (tmp_path / "test_kernels_mnli-mm.pt").touch()
    assert list(built(place, "MNLI", *flags).datasets) == ["train", "dev", "test", "test:mnli-mm"]


def test_the_plain_text_of_finetune_mode_is_cls_and_each_sentence_with_sep(place: Workplace) -> None:
    run, by_hand = built(place, "MNLI", "--few_shot_type", "finetune"), ByHand(place)
    cls, sep = by_hand.tokenizer.cls_token_id, by_hand.tokenizer.sep_token_id
    for feature, row in zip(run.datasets["dev"].features, read(place.folder / "MNLI" / "dev_matched.tsv"), strict=True):
        assert feature.input_ids == [cls, *by_hand.encode(row[8]), sep, *by_hand.encode(row[9]), sep]
        assert feature.token_type_ids == [0] * (2 + len(by_hand.encode(row[8]))) + [1] * (
            1 + len(by_hand.encode(row[9]))
        )
        assert feature.mask_position == 0
    assert run.prompts.limits.first_sent_limit is None
