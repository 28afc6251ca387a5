"""Prompts of causal language models token for token: what they read, where they predict, what is refused."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lmntk.data.examples import Example
from lmntk.data.tasks import TASKS, find_task
from lmntk.errors import DataError, LabelWordError, TemplateError
from lmntk.prompts.demonstrations import DemonstrationSampler, DemonstrationSettings, template_with_demonstrations
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import Limits, Prompt, render
from lmntk.prompts.templates import Template, plain_text_template
from tiny_tokenizers import (
    make_bert_tokenizer,
    make_gpt2_tokenizer,
    make_llama_tokenizer,
    make_qwen_tokenizer,
    make_roberta_tokenizer,
)

Tokenizer = PreTrainedTokenizerBase
SENTIMENT = "*cls**sent_0*_It_was*mask*.*sep+*"
ENTAILMENT = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
MAKERS = {
    "bert": make_bert_tokenizer,
    "roberta": make_roberta_tokenizer,
    "gpt2": make_gpt2_tokenizer,
    "qwen": make_qwen_tokenizer,
    "llama": make_llama_tokenizer,
    "llama without a second space": lambda folder: make_llama_tokenizer(folder, always_adds_space=False),
}
LLAMAS = [name for name in MAKERS if name.startswith("llama")]
CAUSAL = ["gpt2", "qwen", *LLAMAS]
FIRST, SECOND = "A funny film.", "The plot was dull."
# What is read of FIRST and SECOND, part by part, behind the token of the beginning.
READ = {
    **dict.fromkeys(["SST-2", "sst-5", "mr", "cr", "mpqa"], [FIRST, " It was"]),
    **dict.fromkeys(["subj", "CoLA"], [FIRST, " This is"]),
    "trec": [],
    **dict.fromkeys(["MRPC", "QQP", "STS-B"], [FIRST]),
    **dict.fromkeys(["QNLI", "RTE", "MNLI", "mnli-mm", "SNLI", "WNLI"], ["A funny film", "?"]),
    "ag_news": [FIRST, " This article is about"],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: make(tmp_path_factory.mktemp("tokenizer")) for name, make in MAKERS.items()}


def fill(text: str, texts: Sequence[str], tokenizer: Tokenizer, limits: Limits | None = None, **more: Any) -> Prompt:
    template = Template.parse(text, len(texts), 2, needs_mask=False).for_causal()
    return render(template, texts, tokenizer, limits or Limits(), **more)


def tokens(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(prompt.input_ids)))


def pieces_of(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """The ids of pieces that begin with a space where they have one, or where a tokenizer like Llama's adds its own."""
    ids: list[int] = []
    for piece in pieces:
        if len(piece) == 1:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            own_space = tokenizer.tokenize("a") == ["▁a"]
            ids += tokenizer.encode(piece.removeprefix(" ") if own_space else piece, add_special_tokens=False)
    return ids


def beginning(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("task", TASKS)
def test_each_tasks_own_template_is_read_up_to_the_mask(tokenizers: dict[str, Tokenizer], task: str, name: str) -> None:
    tokenizer, row = tokenizers[name], TASKS[task]
    expected = [*beginning(tokenizer), *pieces_of(tokenizer, READ[task])]
    template = Template.parse(row.template, row.num_sentences, len(row.labels)).for_causal()
    if not expected:
        with pytest.raises(DataError, match="has no token"):
            render(template, [FIRST], tokenizer, Limits())
        return
    prompt = render(template, [FIRST, SECOND][: row.num_sentences], tokenizer, Limits())
    assert list(prompt.input_ids) == expected
    assert prompt.mask_position == len(expected) - 1
    assert prompt.full_length == len(prompt.segment_ids) == len(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "<|endoftext|> a Ġdull Ġfilm ĠIt Ġwas"),
        ("qwen", "a Ġdull Ġfilm ĠIt Ġwas"),
        ("llama", "<s> ▁a ▁dull ▁film ▁It ▁was"),
        ("llama without a second space", "<s> ▁a ▁dull ▁film ▁It ▁was"),
    ],
)
def test_a_prompt_begins_with_bos_and_ends_before_the_mask(
    tokenizers: dict[str, Tokenizer], name: str, expected: str
) -> None:
    prompt = fill(SENTIMENT, ["a dull film"], tokenizers[name])
    assert tokens(prompt, tokenizers[name]) == expected
    assert prompt.mask_position == len(expected.split()) - 1


def test_sep_is_nothing_and_text_behind_the_mask_is_dropped(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2 = tokenizers["gpt2"]
    text = "*cls**sent_0**sep+**+sent_1**sep*_It_was*mask*.*sep+**sent_0*_nothing_more*sep*"
    prompt = fill(text, ["a film", "a story"], gpt2)
    assert tokens(prompt, gpt2) == "<|endoftext|> a Ġfilm Ġa Ġstory ĠIt Ġwas"
    assert tokens(fill("*sent_0**mask**cls*", ["a film"], gpt2), gpt2) == "a Ġfilm"


def test_the_text_of_a_mask_token_is_text(tokenizers: dict[str, Tokenizer]) -> None:
    # RoBERTa's tokenizer, which has a mask token, in front of a causal model.
    roberta = tokenizers["roberta"]
    prompt = fill(SENTIMENT, ["a <mask> film"], roberta)
    assert tokens(prompt, roberta).endswith("Ġfilm ĠIt Ġwas")
    assert prompt.mask_position == len(prompt.input_ids) - 1


def test_a_masked_model_still_needs_its_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    for template, kind in ((SENTIMENT, "cls"), ("*sent_0**mask*", "mask"), ("*sent_0**sep**mask*", "sep")):
        with pytest.raises(TemplateError) as caught:
            render(Template.parse(template, 1, 2), ["a film"], tokenizers["gpt2"], Limits())
        assert caught.value.data["part"] == kind


def test_the_same_template_still_asks_a_masked_model_with_all_its_parts(tokenizers: dict[str, Tokenizer]) -> None:
    texts = ["a city won.", "People won."]
    template = Template.parse(ENTAILMENT, 2, 2)
    template.for_causal()
    prompt = render(template, texts, tokenizers["roberta"], Limits())
    assert tokens(prompt, tokenizers["roberta"]) == "<s> a Ġcity Ġwon ? <mask> , Ġpeople Ġwon . </s>"
    assert prompt.mask_position == 5
    prompt = render(template, texts, tokenizers["bert"], Limits())
    assert tokens(prompt, tokenizers["bert"]) == "[CLS] a city won ? [MASK] , people won . [SEP]"


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("template", ["*sent_0*_It_was*mask*", "*+sent_0*_It_was*mask*", "*+sentl_0*_It_was_*mask*"])
def test_a_tokenizer_that_adds_spaces_gets_no_second_one(
    tokenizers: dict[str, Tokenizer], name: str, template: str
) -> None:
    for text in ("film", " film"):
        found = tokens(fill(template, [text], tokenizers[name]), tokenizers[name]).split()
        doubled = text.startswith(" ") and "+" in template  # The user's, and the template's: one of them is real.
        assert found[doubled:3] == ["▁film", "▁It", "▁was"][: 3 - doubled]
        assert found.count("▁") == doubled + template.endswith("_*mask*")


@pytest.mark.parametrize("name", LLAMAS)
def test_punctuation_of_the_template_gets_no_space_in_front(tokenizers: dict[str, Tokenizer], name: str) -> None:
    prompt = fill("*cls**sent-_0*?*+sentl_1*.*mask*", ["a film.", "A story"], tokenizers[name])
    assert tokens(prompt, tokenizers[name]) == "<s> ▁a ▁film ? ▁a ▁story ."


@pytest.mark.parametrize("name", LLAMAS)
def test_a_label_word_is_one_piece_where_the_tokenizer_adds_the_space(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    for task in TASKS.values():
        ids = label_word_ids(task.mapping, task.labels, tokenizer)
        assert tokenizer.convert_ids_to_tokens(ids) == [f"▁{task.mapping[label]}" for label in task.labels]
    with pytest.raises(LabelWordError) as caught:
        label_word_ids({"0": "dim", "1": "great"}, ["0", "1"], tokenizer)
    assert caught.value.data == {"word": "dim", "label": "0", "pieces": ["▁d", "i", "m"]}


@pytest.mark.parametrize("name", ["gpt2", "qwen"])
def test_a_label_word_begins_with_the_space_of_byte_level_tokenizers(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    ids = label_word_ids({"0": "terrible", "1": "great", "2": "."}, list("012"), tokenizers[name])
    assert tokenizers[name].convert_ids_to_tokens(ids) == ["Ġterrible", "Ġgreat", "."]


def test_spaces_stay_where_a_tokenizer_has_a_token_for_each_character(tokenizers: dict[str, Tokenizer]) -> None:
    """Of a space and a letter, in characters, the letter is the rest too: it is not a space that was added."""

    class Characters:
        bos_token_id = unk_token_id = None
        tokenize = staticmethod(list)
        convert_tokens_to_ids = staticmethod(ord)

        def encode(self, text: str, **options: Any) -> list[int]:
            return [ord(character) for character in text]

    prompt = fill("*sent_0*_It_was*mask*", ["a film"], Characters())  # type: ignore[arg-type]
    assert "".join(map(chr, prompt.input_ids)) == "a film It was"


def test_sentences_are_cut_to_their_limits(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2 = tokenizers["gpt2"]
    texts = ["the film was very dull", "many people never won"]
    template = "*cls**sent_0*.*+sent_1*_It_was*mask*.*sent_0*"
    found = fill(template, texts, gpt2, Limits(first_sent_limit=3, other_sent_limit=2))
    assert tokens(found, gpt2) == "<|endoftext|> t h e . Ġmany Ġpeople ĠIt Ġwas"
    found = fill(template, texts, gpt2, Limits(other_sent_limit=1))
    assert tokens(found, gpt2) == "<|endoftext|> t h e Ġfilm Ġwas Ġvery Ġdull . Ġmany ĠIt Ġwas"


def test_a_prompt_as_long_as_the_limit_is_whole(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2 = tokenizers["gpt2"]
    prompt = fill(SENTIMENT, ["a dull film"], gpt2, Limits(max_seq_length=6))
    assert tokens(prompt, gpt2) == "<|endoftext|> a Ġdull Ġfilm ĠIt Ġwas"
    assert (prompt.mask_position, prompt.full_length) == (5, 6)


@pytest.mark.parametrize(
    ("template", "limits", "length", "remedies"),
    [
        (SENTIMENT, Limits(5), 6, ["raise `max_seq_length` (now 5)", "lower `first_sent_limit` (now none)"]),
        (
            "*cls**sent_1**sent_0*_It_was*mask*.",
            Limits(6, first_sent_limit=3, other_sent_limit=2),
            8,
            [
                *("raise `max_seq_length` (now 6)", "lower `first_sent_limit` (now 3)"),
                "lower `other_sent_limit` (now 2)",
            ],
        ),
        (
            "*cls**sent_0**labelx_0*_It_was*mask*.",
            Limits(6),
            7,
            ["lower `gpt3_in_context_num`", "lower `first_sent_limit` (now none)"],
        ),
    ],
)
def test_an_end_that_is_cut_away_names_the_limits_that_keep_it(
    tokenizers: dict[str, Tokenizer], template: str, limits: Limits, length: int, remedies: list[str]
) -> None:
    texts = ["a dull film", "a story of nothing"][: 2 if "sent_1" in template else 1]
    more: dict[str, Any] = {"name": "example 2 of dev", "label_word_ids": [5], "context_labels": [0]}
    with pytest.raises(DataError) as caught:
        fill(template, texts, tokenizers["gpt2"], limits, **more)
    assert caught.value.data == {"example": "example 2 of dev", "length": length, "limits": limits}
    remedies = [*remedies, "add `truncate_head`, to lose the beginning instead"]
    assert f": {', or '.join(remedies)}; " in str(caught.value)


def test_with_truncate_head_the_beginning_goes_and_bos_with_it(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2 = tokenizers["gpt2"]
    prompt = fill(SENTIMENT, ["a dull film"], gpt2, Limits(max_seq_length=3, truncate_head=True))
    assert tokens(prompt, gpt2) == "Ġfilm ĠIt Ġwas"
    assert (prompt.mask_position, prompt.full_length) == (2, 6)
    assert len(prompt.segment_ids) == 3


def test_an_empty_text_leaves_the_rest_and_nothing_at_all_is_told(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2, qwen = tokenizers["gpt2"], tokenizers["qwen"]
    assert tokens(fill(SENTIMENT, [""], gpt2), gpt2) == "<|endoftext|> ĠIt Ġwas"
    assert tokens(fill(SENTIMENT, [""], qwen), qwen) == "ĠIt Ġwas"
    assert tokens(fill("*cls**sent_0**mask*", [""], gpt2), gpt2) == "<|endoftext|>"
    for template in ("*cls**sent_0**mask*.", plain_text_template(1)):
        with pytest.raises(DataError, match="no token") as caught:
            fill(template, [""], qwen, name="example 3 of test")
        assert caught.value.data == {"example": "example 3 of test"}


@given(
    texts=st.tuples(st.text(max_size=40), st.text(max_size=40)),
    limits=st.builds(
        Limits,
        max_seq_length=st.integers(1, 60),
        first_sent_limit=st.none() | st.integers(1, 30),
        other_sent_limit=st.none() | st.integers(1, 30),
        truncate_head=st.booleans(),
    ),
    template=st.sampled_from([ENTAILMENT, "*sent_0**+sent_1*_It_was*mask*.", "*cls**sentu_1*:*+sentl-_0**mask*"]),
    name=st.sampled_from(CAUSAL),
)
def test_the_last_token_before_the_mask_predicts_or_the_prompt_is_refused(
    tokenizers: dict[str, Tokenizer], texts: tuple[str, str], limits: Limits, template: str, name: str
) -> None:
    tokenizer = tokenizers[name]
    whole = fill(template, texts, tokenizer, Limits(10_000, limits.first_sent_limit, limits.other_sent_limit))
    assert whole.mask_position == len(whole.input_ids) - 1
    if len(whole.input_ids) > limits.max_seq_length and not limits.truncate_head:
        with pytest.raises(DataError, match="^the end of the example was cut away"):
            fill(template, texts, tokenizer, limits)
        return
    prompt = fill(template, texts, tokenizer, limits)
    assert prompt.input_ids == whole.input_ids[-limits.max_seq_length :]
    assert prompt.mask_position == len(prompt.input_ids) - 1
    assert prompt.full_length == len(whole.input_ids)


@pytest.mark.parametrize("name", CAUSAL)
def test_plain_text_is_bos_and_the_sentences_and_its_last_token_predicts(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    prompt = fill(plain_text_template(2), [FIRST, SECOND], tokenizer)
    assert list(prompt.input_ids) == [*beginning(tokenizer), *pieces_of(tokenizer, [FIRST, SECOND])]
    assert prompt.mask_position == len(prompt.input_ids) - 1


def test_the_last_token_of_cut_plain_text_predicts(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2 = tokenizers["gpt2"]
    prompt = fill(plain_text_template(1), ["a dull film"], gpt2, Limits(max_seq_length=3))
    assert tokens(prompt, gpt2) == "<|endoftext|> a Ġdull"
    assert (prompt.mask_position, prompt.full_length) == (2, 4)
    prompt = fill(plain_text_template(1), ["a dull film"], gpt2, Limits(max_seq_length=2, truncate_head=True))
    assert tokens(prompt, gpt2) == "Ġdull Ġfilm"
    assert (prompt.mask_position, prompt.full_length) == (1, 4)


def test_a_masked_model_predicts_at_the_first_token_of_plain_text(tokenizers: dict[str, Tokenizer]) -> None:
    roberta = tokenizers["roberta"]
    template = Template.parse(plain_text_template(2), 2, 2, needs_mask=False)
    prompt = render(template, ["a film", "a story"], roberta, Limits())
    assert tokens(prompt, roberta) == "<s> a Ġfilm </s> a Ġstory </s>"
    assert prompt.mask_position == 0


def extend(name: str, shown: int, template: str | None = None, **settings: Any) -> str:
    task, how = find_task(name), DemonstrationSettings(**settings)
    return template_with_demonstrations(template or task.template, task, how, shown, causal=True)


@pytest.mark.parametrize(
    ("name", "shown", "settings", "expected"),
    [
        (
            "SST-2",
            2,
            {},
            "*cls**sent_1*_It_was*label_0*.*sep+**sent_2*_It_was*label_1*.*sep+**sent_0*_It_was*mask*.*sep+*",
        ),
        (
            "RTE",
            2,
            {},
            "*cls**sent-_2*?*label_0*,*+sentl_3**sep+**sent-_4*?*label_1*,*+sentl_5**sep+*"
            "*sent-_0*?*mask*,*+sentl_1**sep+*",
        ),
        ("STS-B", 1, {}, "*cls**sent_2**label_0*,*+sentl_3**sep+**sent_0**mask*,*+sentl_1**sep+*"),
        (
            "SST-2",
            4,
            {"num_demo": 2},
            "*cls**sent_1*_It_was*label_0*.*sep+**sent_2*_It_was*label_0*.*sep+**sent_3*_It_was*label_1*.*sep+*"
            "*sent_4*_It_was*label_1*.*sep+**sent_0*_It_was*mask*.*sep+*",
        ),
        (
            "SST-2",
            3,
            {"in_context": "head"},
            "*cls**sent_3*_It_was*labelx_2*.*sep+**sent_2*_It_was*labelx_1*.*sep+**sent_1*_It_was*labelx_0*.*sep+*"
            "*sent_0*_It_was*mask*.*sep+*",
        ),
        ("RTE", 2, {"auto": False}, "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"),
    ],
)
def test_demonstrations_stand_between_cls_and_the_query(
    name: str, shown: int, settings: dict[str, Any], expected: str
) -> None:
    assert extend(name, shown, **settings) == expected


def test_a_template_without_cls_gets_none_with_its_demonstrations() -> None:
    assert extend("SST-2", 1, "*sent_0*:*mask*") == "*sent_1*:*label_0**sent_0*:*mask*"
    assert extend("SST-2", 1, "Film:*+sent_0*_so*mask*") == "Film:*+sent_1*_so*label_0*Film:*+sent_0*_so*mask*"


def support_of(name: str) -> list[Example]:
    """Three examples of each class (or half of the scale), in turn, no two alike."""
    task = find_task(name)
    labels = ("1.5", "4.0") if task.regression else task.labels
    texts = (f"{word} film number {i}." for i in itertools.count() for word in ("a", "The", "no"))
    return [Example(tuple(next(texts) for _ in range(task.num_sentences)), label) for _ in range(3) for label in labels]


@pytest.mark.parametrize(("in_context", "num_demo"), [("", 1), ("", 2), ("head", 1)], ids=["one", "two", "head"])
@pytest.mark.parametrize("name", TASKS)
def test_a_causal_prompt_shows_the_same_demonstrations_before_the_query(
    tokenizers: dict[str, Tokenizer], name: str, in_context: Any, num_demo: int
) -> None:
    tokenizer, task, support = tokenizers["roberta"], find_task(name), support_of(name)
    words = label_word_ids(task.mapping, task.labels, tokenizer)
    settings = DemonstrationSettings(num_demo=num_demo, in_context=in_context, in_context_num=3)

    def prompts(causal: bool) -> list[list[int]]:
        demonstrator = DemonstrationSampler(task, support, settings, np.random.RandomState(7), excludes_query=True)
        text = template_with_demonstrations(task.template, task, settings, demonstrator.shown, causal)
        template = Template.parse(text, demonstrator.num_sentences, len(task.labels))
        template = template.for_causal() if causal else template
        found = []
        for query, example in enumerate(support):
            drawn = demonstrator.draw(query)
            texts = [*example.texts, *drawn.texts]
            prompt = render(template, texts, tokenizer, Limits(1000), words, drawn.context_labels)
            found.append(list(prompt.input_ids))
            assert prompt.mask_position == (len(found[-1]) - 1 if causal else found[-1].index(tokenizer.mask_token_id))
        return found

    for masked, causal in zip(prompts(causal=False), prompts(causal=True), strict=True):
        pieces = split(masked, tokenizer.sep_token_id)
        (query,) = [piece for piece in pieces if tokenizer.mask_token_id in piece]
        solved = [token for piece in pieces if piece is not query for token in piece]
        assert query.pop(0) == tokenizer.cls_token_id
        assert causal == [tokenizer.bos_token_id, *solved, *query[: query.index(tokenizer.mask_token_id)]]


def split(ids: Sequence[Any], separator: Any) -> list[list[Any]]:
    """The pieces that end with a separator, without it."""
    pieces: list[list[Any]] = [[]]
    for token in ids:
        if token == separator:
            pieces.append([])
        else:
            pieces[-1].append(token)
    assert pieces.pop() == []
    return pieces


FILMS = [
    Example(("a dull film.",), "0"),
    Example(("a moving story",), "1"),
    Example(("nothing but a plot",), "0"),
    Example(("bright and funny",), "1"),
    Example(("He won.",), "1"),
]


@pytest.mark.parametrize("name", ["gpt2", "qwen", "llama"])
@pytest.mark.parametrize("num_demo", [1, 2])
def test_demonstrations_of_each_class_token_for_token(
    tokenizers: dict[str, Tokenizer], name: str, num_demo: int
) -> None:
    tokenizer, task = tokenizers[name], find_task("SST-2")
    words = label_word_ids(task.mapping, task.labels, tokenizer)
    settings = DemonstrationSettings(num_demo=num_demo)
    demonstrator = DemonstrationSampler(task, FILMS, settings, np.random.RandomState(87), excludes_query=False)
    text = template_with_demonstrations(task.template, task, settings, demonstrator.shown, causal=True)
    template = Template.parse(text, demonstrator.num_sentences, 2).for_causal()

    generator = np.random.RandomState(87)
    for query in ("the film was great", "He won nothing"):
        order = [FILMS[place] for place in generator.permutation(5)]
        pieces = []
        for label, word in (("0", " terrible"), ("1", " great")):
            for example in [example for example in order if example.label == label][:num_demo]:
                pieces += [example.texts[0], " It was", word, "."]
        drawn = demonstrator.draw(0)
        prompt = render(template, [query, *drawn.texts], tokenizer, Limits(), words)
        assert list(prompt.input_ids) == [
            *beginning(tokenizer), *pieces_of(tokenizer, [*pieces, query, " It was"])
        ]  # fmt: skip


def test_a_rendered_prompt_with_demonstrations_reads_as_text(tokenizers: dict[str, Tokenizer]) -> None:
    gpt2 = tokenizers["gpt2"]
    words = label_word_ids({"0": "terrible", "1": "great"}, ["0", "1"], gpt2)
    texts = ["a funny film.", "a dull plot.", "never boring."]
    text = extend("SST-2", 2, "*cls**+sent_0*_It_was*mask*.")
    assert gpt2.decode(fill(text, texts, gpt2, label_word_ids=words).input_ids) == (
        "<|endoftext|> a dull plot. It was terrible. never boring. It was great. a funny film. It was"
    )
    text = extend("SST-2", 2, "*cls**+sent_0*_It_was*mask*.", in_context="head")
    assert gpt2.decode(fill(text, texts, gpt2, label_word_ids=words, context_labels=[1, 1]).input_ids) == (
        "<|endoftext|> never boring. It was great. a dull plot. It was great. a funny film. It was"
    )
