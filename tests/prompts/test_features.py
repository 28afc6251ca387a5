"""Examples to features, data set and padded batches."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lmntk.data.examples import Example
from lmntk.data.tasks import Task, find_task
from lmntk.errors import DataError
from lmntk.prompts.features import Collator, Feature, FeatureDataset, PromptBuilder
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import Limits
from lmntk.prompts.templates import Template
from tiny_tokenizers import make_roberta_tokenizer

Tokenizer = PreTrainedTokenizerBase
PAD = 1


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_roberta_tokenizer(tmp_path_factory.mktemp("roberta"))


def build(
    task: Task,
    rows: Sequence[tuple[str, ...]],
    tokenizer: Tokenizer,
    templates: tuple[str, ...] = (),
    limits: Limits | None = None,
    words: list[int] | None = None,
) -> FeatureDataset:
    examples = [Example(tuple(texts), label) for *texts, label in rows]
    parsed = [Template.parse(text, task.num_sentences, len(task.labels)) for text in templates or (task.template,)]
    return FeatureDataset.build(
        PromptBuilder("dev", task, examples, parsed, tokenizer, limits or Limits(), words or ())
    )


def test_features_hold_the_prompts_and_the_class_ids_in_the_order_of_the_tasks_labels(roberta: Tokenizer) -> None:
    rows = [("the film won.", "It won.", "not_entailment"), ("he won.", "She won.", "entailment")]
    data = build(find_task("rte"), rows, roberta)
    assert (data.mode, len(data), data.num_sample, data.num_examples) == ("dev", 2, 1, 2)
    assert data.labels == [1, 0]
    assert roberta.decode(data[0].input_ids) == "<s>the film won?<mask>, it won.</s>"
    assert [data[i].input_ids[data[i].mask_position] for i in range(2)] == [roberta.mask_token_id] * 2
    assert data[0].token_type_ids == [0] * len(data[0].input_ids)


def test_scores_of_a_regression_stay_numbers(roberta: Tokenizer) -> None:
    assert build(find_task("STS-B"), [("a", "an", "3.8"), ("a", "a", "5")], roberta).labels == [3.8, 5.0]


def test_several_templates_come_sample_by_sample(roberta: Tokenizer) -> None:
    rows = [("a film", "0"), ("a story", "1")]
    data = build(find_task("SST-2"), rows, roberta, ("*sent_0**mask*", "*mask**+sent_0*"))
    assert (len(data), data.num_sample, data.num_examples) == (4, 2, 2)
    prompts = [roberta.decode(feature.input_ids) for feature in data.features]
    assert prompts == ["a film<mask>", "a story<mask>", "<mask> a film", "<mask> a story"]
    assert data.labels == [0, 1, 0, 1]


def test_label_words_of_a_template_reach_the_prompt(roberta: Tokenizer) -> None:
    task = find_task("SST-2")
    words = label_word_ids(task.mapping, task.labels, roberta)
    data = build(task, [("a", "0")], roberta, ("*sent_0**label_1**mask*",), words=words)
    assert roberta.decode(data[0].input_ids) == "a great<mask>"


def test_prompts_that_were_cut_are_counted_in_one_warning(roberta: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a film film film", "0"), ("a film", "1"), ("a film film film film", "1")]
    with caplog.at_level(logging.WARNING, "lmntk.prompts.features"):
        data = build(find_task("SST-2"), rows, roberta, ("*mask**sent_0*",), Limits(max_seq_length=4))
        build(find_task("SST-2"), rows[1:2], roberta, ("*mask**sent_0*",), Limits(max_seq_length=3))
    assert [len(feature.input_ids) for feature in data.features] == [4, 3, 4]
    assert caplog.messages == ["2 of 3 prompts of dev were cut to `max_seq_length=4` tokens"]


def test_a_mask_that_is_cut_away_names_split_and_example(roberta: Tokenizer) -> None:
    rows = [("a film", "0"), ("a film film film", "1")]
    with pytest.raises(DataError) as caught:
        build(find_task("SST-2"), rows, roberta, limits=Limits(max_seq_length=6))
    assert (caught.value.data["example"], caught.value.data["length"]) == ("example 2 of dev", 10)


def test_a_progress_bar_shows_only_for_many_prompts(
    roberta: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lmntk.prompts.features.MANY_PROMPTS", 3)
    build(find_task("SST-2"), [("a", "0")] * 2, roberta)
    assert capsys.readouterr().err == ""
    build(find_task("SST-2"), [("a", "0")] * 3, roberta)
    assert "SST-2 dev: 100%" in capsys.readouterr().err


def test_a_batch_is_padded_on_the_right_to_its_longest_prompt() -> None:
    batch = Collator(PAD, segments=True)([Feature([5, 6, 7], [0, 1, 1], 2, 1), Feature([8], [0], 0, 0)])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, PAD, PAD]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [0, 0, 0]],
        "mask_pos": [2, 0],
        "labels": [1, 0],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_without_padding_has_no_attention_mask_and_segments_only_where_wanted() -> None:
    features = [Feature([5, 6], [0, 1], 0, 0.5), Feature([7, 8], [0, 0], 1, 4.0)]
    batch = Collator(PAD, segments=False)(features)
    assert list(batch) == ["input_ids", "mask_pos", "labels"]
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 4.0]


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_whatever_the_lengths_unpadding_a_batch_gives_the_features_back(lengths: list[int]) -> None:
    # A real token may equal the padding token: only the mask tells which is which.
    features = [Feature([PAD] * length, [1] * length, length - 1, 0) for length in lengths]
    batch = Collator(PAD, segments=True)(features)
    assert batch["input_ids"].shape == (len(lengths), max(lengths))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    assert mask.sum(1).tolist() == lengths
    assert torch.equal(batch["token_type_ids"], mask)
    assert ("attention_mask" in batch) == (len(set(lengths)) > 1)


def test_a_token_that_is_added_later_counts_in_the_next_data_set(tmp_path: Path) -> None:
    own = make_roberta_tokenizer(tmp_path)  # it is changed
    task, rows = find_task("sst-2"), [("a film", "0")]
    before = build(task, rows, own)[0].input_ids
    own.add_tokens([" It was"])
    after = build(task, rows, own)[0].input_ids
    assert own.convert_tokens_to_ids(" It was") in after
    assert own.decode(before) == own.decode(after)
