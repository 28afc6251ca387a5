"""Label words with and without a space before them, and text that a tokenizer does not know."""

import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from lmntk.data.examples import Example
from lmntk.data.tasks import TASKS
from lmntk.errors import LabelWordError
from lmntk.prompts.features import FeatureDataset, PromptBuilder
from lmntk.prompts.label_words import label_word_ids
from lmntk.prompts.render import Limits, render, warn_of_unknown_text
from lmntk.prompts.templates import Template
from tiny_tokenizers import make_bert_tokenizer, make_gpt2_tokenizer, make_llama_tokenizer

Tokenizer = PreTrainedTokenizerBase
LOOKED_UP = "label words looked up without a space before them, since with one they are no token of this model"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """``great`` is one token with and without a space, 好 and 坏 without alone, ``terrible`` with one alone."""
    return make_gpt2_tokenizer(tmp_path_factory.mktemp("gpt2"), "great", "好", "坏")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_bert_tokenizer(tmp_path_factory.mktemp("bert"))


def tokens_of(tokenizer: Tokenizer, *words: str) -> list[str]:
    labels = [str(number) for number in range(len(words))]
    ids = label_word_ids(dict(zip(labels, words, strict=True)), labels, tokenizer)
    return [tokenizer.decode([token]) for token in ids]


def test_words_that_are_one_token_without_a_space_alone_are_found_and_told(
    gpt2: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert tokens_of(gpt2, "好", "坏") == ["好", "坏"]
    assert tokens_of(gpt2, "terrible", "好") == [" terrible", "好"]
    assert caplog.messages == [f"{LOOKED_UP}: '好', '坏'", f"{LOOKED_UP}: '好'; the others have one"]


def test_a_word_with_both_forms_is_looked_up_with_a_space_by_default(
    gpt2: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert tokens_of(gpt2, "great", "terrible") == [" great", " terrible"]
    assert tokens_of(gpt2, " great", " terrible") == [" great", " terrible"]
    assert tokens_of(gpt2, "-great", "great", "-好") == ["great", " great", "好"]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("word", "pieces"),
    [(" 好", ["Ġ", "å¥½"]), ("-dull", ["d", "u", "l", "l"]), ("好好", ["Ġ", "å¥½", "å¥½"])],
)
def test_a_word_without_the_form_that_is_asked_for_is_an_error(gpt2: Tokenizer, word: str, pieces: list[str]) -> None:
    with pytest.raises(LabelWordError) as caught:
        tokens_of(gpt2, word, "great")
    assert caught.value.data == {"word": word, "label": "0", "pieces": pieces}


def test_a_dash_that_is_a_word_stays_one_and_bert_makes_no_difference(bert: Tokenizer) -> None:
    assert tokens_of(bert, "-", "-great", " dull", " .") == ["-", "great", "dull", "."]
    with pytest.raises(LabelWordError, match="same token"):
        tokens_of(bert, "great", "-great")


@pytest.mark.parametrize("always_adds_space", [True, False])
def test_a_tokenizer_that_adds_a_space_itself_has_words_without_it_too(tmp_path: Path, always_adds_space: bool) -> None:
    llama = make_llama_tokenizer(tmp_path, always_adds_space)
    ids = label_word_ids({"0": "-g", "1": "great", "2": "q", "3": " dull"}, list("0123"), llama)
    assert llama.convert_ids_to_tokens(ids) == ["g", "▁great", "q", "▁dull"]
    with pytest.raises(LabelWordError, match="is unknown to this model"):
        label_word_ids({"0": "-great"}, ["0"], llama)


def test_text_of_a_template_that_the_tokenizer_does_not_know_is_named(
    bert: Tokenizer, gpt2: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    template = Template.parse("*sent_0*_It_was☃*é*mask*\u200d*[UNK]*.", 1, 2)
    warn_of_unknown_text([template, template], bert)
    assert caplog.messages == [
        "`template`: this model's tokenizer does not know ' It was☃' and gives the token [UNK] in its place",
        "`template`: this model's tokenizer makes no token of '\u200d'",
    ]
    caplog.clear()
    warn_of_unknown_text([template], gpt2)
    assert caplog.messages == []


def test_a_letter_that_spells_a_byte_in_the_vocabulary_is_encoded_as_the_letter(gpt2: Tokenizer) -> None:
    prompt = render(Template.parse("*sent_0*é*mask*", 1, 2).for_causal(), ["x"], gpt2, Limits())
    assert gpt2.decode(list(prompt.input_ids)) == "xé"
    assert gpt2.decode([gpt2.convert_tokens_to_ids("é")]) == "\ufffd"


def test_texts_of_which_much_is_unknown_are_counted(bert: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    def build(*texts: str) -> None:
        template = Template.parse("*cls**sent_0**mask**sep*", 1, 2)
        examples = [Example((text,), "0") for text in texts]
        FeatureDataset.build(PromptBuilder("dev", TASKS["SST-2"], examples, [template], bert, Limits()))

    with caplog.at_level(logging.WARNING):
        build("a good film " * 6, "a good film ☃")
        assert caplog.messages == []
        build("a good film", "很好 ☃")
    assert caplog.messages == [
        "dev: 3 of 12 tokens are [UNK], which stands for what the tokenizer does not know: does it fit these texts?"
    ]
