"""Prompts token for token, their limits, label words, mappings, and files of prompts."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lmntk.data.tasks import TASKS
from lmntk.errors import DataError, FileError, LabelWordError, SettingError, TemplateError, UsageError
from lmntk.prompts.label_words import label_word_ids, parse_mapping
from lmntk.prompts.prompt_files import PromptSources, choose_prompts
from lmntk.prompts.render import Limits, Prompt, render
from lmntk.prompts.templates import Template
from tiny_tokenizers import make_bert_tokenizer, make_roberta_tokenizer

Tokenizer = PreTrainedTokenizerBase
SENTIMENT = "*cls**sent_0*_It_was*mask*.*sep+*"
ENTAILMENT = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_bert_tokenizer(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_roberta_tokenizer(tmp_path_factory.mktemp("roberta"))


def tokens(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(prompt.input_ids)))


def fill(text: str, texts: list[str], tokenizer: Tokenizer, limits: Limits | None = None, **more: Any) -> Prompt:
    return render(Template.parse(text, len(texts), 2), texts, tokenizer, limits or Limits(), **more)


def test_a_sentiment_prompt_token_for_token(bert: Tokenizer, roberta: Tokenizer) -> None:
    prompt = fill(SENTIMENT, ["The film was dull"], bert)
    assert tokens(prompt, bert) == "[CLS] the film was dull it was [MASK] . [SEP]"
    assert (prompt.mask_position, prompt.full_length) == (7, 10)
    assert prompt.segment_ids == (0,) * 10
    prompt = fill(SENTIMENT, ["a dull film"], roberta)
    assert tokens(prompt, roberta) == "<s> a Ġdull Ġfilm ĠIt Ġwas <mask> . </s>"
    assert prompt.mask_position == 6


def test_an_entailment_prompt_token_for_token(bert: Tokenizer, roberta: Tokenizer) -> None:
    texts = ["a city won.", "People won."]
    prompt = fill(ENTAILMENT, texts, roberta)
    assert tokens(prompt, roberta) == "<s> a Ġcity Ġwon ? <mask> , Ġpeople Ġwon . </s>"
    prompt = fill("*cls**sent_0**sep+**+sent_1**mask**sep+*.", texts, bert)
    assert tokens(prompt, bert) == "[CLS] a city won . [SEP] people won . [MASK] [SEP] ."
    assert prompt.segment_ids == (0,) * 6 + (1,) * 5 + (2,)


def test_a_leading_space_makes_the_first_word_word_initial(roberta: Tokenizer) -> None:
    assert tokens(fill("*mask**sent_0*", ["film"], roberta), roberta) == "<mask> f i l m"
    assert tokens(fill("*mask**+sent_0*", ["film"], roberta), roberta) == "<mask> Ġfilm"


def test_every_part_is_encoded_on_its_own(bert: Tokenizer) -> None:
    assert tokens(fill("*sent_0*m*mask*", ["fil"], bert), bert) == "f ##i ##l m [MASK]"


def test_a_literal_of_one_character_is_looked_up_and_encoded_where_it_is_unknown(
    bert: Tokenizer, roberta: Tokenizer
) -> None:
    assert tokens(fill("*mask*:*sent_0*", [""], roberta), roberta) == "<mask> :"
    assert tokens(fill("*mask*_*sent_0*", [""], roberta), roberta) == "<mask> Ġ"
    assert tokens(fill("*mask*_*sent_0*", [""], bert), bert) == "[MASK]"
    assert tokens(fill("*mask*É*sent_0*", [""], bert), bert) == "[MASK] e"
    # Encoded, a capital would be lowered by a lower-casing tokenizer; here the lookup finds it.
    assert tokens(fill("*mask*Q*sent_0*", [""], roberta), roberta) == "<mask> Q"


def test_label_words_are_put_in_as_tokens(roberta: Tokenizer) -> None:
    words = label_word_ids({"0": "terrible", "1": "great"}, ["0", "1"], roberta)
    text = "*mask**label_1**labelx_0**labelx_1*"
    prompt = fill(text, [""], roberta, label_word_ids=words, context_labels=[0, 1])
    assert tokens(prompt, roberta) == "<mask> Ġgreat Ġterrible Ġgreat"
    with pytest.raises(TemplateError, match="labelx_1, but the prompt has 1 in-context examples"):
        fill(text, [""], roberta, label_word_ids=words, context_labels=[0])


def test_the_first_sentence_and_the_others_have_limits_of_their_own(bert: Tokenizer) -> None:
    texts = ["the film was very dull", "many people never won", "nothing"]
    template = "*sent_0**mask**sent_1*,*+sentl_1*,*sent_2*"
    prompt = fill(template, texts, bert, Limits(first_sent_limit=2, other_sent_limit=3))
    assert tokens(prompt, bert) == "the film [MASK] many people never , many people never , nothing"
    prompt = fill(template, texts, bert, Limits(other_sent_limit=1))
    assert tokens(prompt, bert) == "the film was very dull [MASK] many , many , nothing"


def test_a_long_prompt_loses_its_tail_or_its_head(bert: Tokenizer) -> None:
    prompt = fill(SENTIMENT, ["the film was dull"], bert, Limits(max_seq_length=8))
    assert tokens(prompt, bert) == "[CLS] the film was dull it was [MASK]"
    assert (prompt.mask_position, prompt.full_length) == (7, 10)
    prompt = fill(SENTIMENT, ["the film was dull"], bert, Limits(max_seq_length=3, truncate_head=True))
    assert tokens(prompt, bert) == "[MASK] . [SEP]"
    assert (prompt.mask_position, prompt.full_length) == (0, 10)


def test_segment_ids_are_cut_with_their_tokens(bert: Tokenizer) -> None:
    limits = Limits(max_seq_length=3, truncate_head=True)
    assert fill("*cls**sent_0**sep+**mask**sep*", ["a film"], bert, limits).segment_ids == (0, 1, 1)


def test_a_mask_token_inside_a_sentence_is_not_taken_for_the_templates(roberta: Tokenizer) -> None:
    prompt = fill(SENTIMENT, ["a <mask> film"], roberta)
    assert tokens(prompt, roberta).count("<mask>") == 2
    assert prompt.mask_position == tokens(prompt, roberta).split().index("Ġwas") + 1


@pytest.mark.parametrize(
    ("template", "limits", "length", "remedies"),
    [
        (SENTIMENT, Limits(7), 10, ["raise `max_seq_length` (now 7)", "lower `first_sent_limit` (now none)"]),
        (
            "*cls**sent_1**sent_0**mask*",
            Limits(7, first_sent_limit=4, other_sent_limit=3),
            9,
            [
                *("raise `max_seq_length` (now 7)", "lower `first_sent_limit` (now 4)"),
                "lower `other_sent_limit` (now 3)",
            ],
        ),
        (
            "*mask*:*+sent_0*",
            Limits(5, truncate_head=True),
            6,
            [
                *("raise `max_seq_length` (now 5)", "lower `first_sent_limit` (now none)"),
                "leave out `truncate_head`",
            ],
        ),
        ("*cls*_It_was*mask*.*+sent_0*", Limits(3), 9, ["raise `max_seq_length` (now 3)"]),
    ],
)
def test_a_mask_that_is_cut_away_names_the_limits_that_keep_it(
    bert: Tokenizer, template: str, limits: Limits, length: int, remedies: list[str]
) -> None:
    texts = ["the film was dull", "nothing much more"][: 2 if "sent_1" in template else 1]
    with pytest.raises(DataError) as caught:
        fill(template, texts, bert, limits, name="example 3 of dev")
    assert caught.value.data == {"example": "example 3 of dev", "length": length, "limits": limits}
    assert f": {', or '.join(remedies)}; " in str(caught.value)
    assert str(caught.value).endswith(f"'{' | '.join(texts)}'")


def test_a_long_text_is_shortened_in_messages(bert: Tokenizer) -> None:
    with pytest.raises(UsageError) as error:
        fill(SENTIMENT, ["dull " * 200], bert)
    assert str(error.value).endswith(f"its text is '{('dull ' * 200)[:59]}…'")


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    tokenizer = make_bert_tokenizer(tmp_path)
    tokenizer.mask_token = None
    with pytest.raises(TemplateError, match="no mask token") as caught:
        fill(SENTIMENT, ["a film"], tokenizer)
    assert caught.value.data["part"] == "mask"


@pytest.mark.parametrize("setting", ["max_seq_length", "first_sent_limit", "other_sent_limit"])
def test_a_limit_below_one_is_an_error(setting: str) -> None:
    with pytest.raises(SettingError) as caught:
        Limits(**{setting: 0})  # type: ignore[arg-type]
    assert caught.value.data == {"setting": setting, "value": 0}


@given(
    texts=st.tuples(st.text(max_size=40), st.text(max_size=40)),
    limits=st.builds(
        Limits,
        max_seq_length=st.integers(1, 60),
        first_sent_limit=st.none() | st.integers(1, 30),
        other_sent_limit=st.none() | st.integers(1, 30),
        truncate_head=st.booleans(),
    ),
    template=st.sampled_from([ENTAILMENT, "*cls**sentu_1**sep+**mask*:*+sentu_0**sep+*", "*mask**sentl-_0**+sent_1*"]),
    use_bert=st.booleans(),
)
def test_whatever_the_text_the_limits_hold_and_the_mask_is_where_it_is_said_to_be(
    bert: Tokenizer, roberta: Tokenizer, texts: tuple[str, str], limits: Limits, template: str, use_bert: bool
) -> None:
    tokenizer = bert if use_bert else roberta
    parsed = Template.parse(template, 2, 2)
    whole = render(parsed, texts, tokenizer, Limits(10_000, limits.first_sent_limit, limits.other_sent_limit))
    assert whole.full_length == len(whole.input_ids) == len(whole.segment_ids)
    assert list(whole.segment_ids) == sorted(whole.segment_ids)
    start = max(0, whole.full_length - limits.max_seq_length) if limits.truncate_head else 0
    try:
        prompt = render(parsed, texts, tokenizer, limits)
    except UsageError:
        assert not start <= whole.mask_position < start + limits.max_seq_length
        return
    assert len(prompt.input_ids) == len(prompt.segment_ids) == min(limits.max_seq_length, whole.full_length)
    assert prompt.input_ids == whole.input_ids[start : start + limits.max_seq_length]
    assert prompt.input_ids[prompt.mask_position] == tokenizer.mask_token_id
    assert prompt.mask_position == whole.mask_position - start


@pytest.mark.parametrize(
    "text", ["{0: 'terrible', 1: 'great'}", '{"1": "great", "0": "terrible"}', " {'0':'terrible',1:'great'}"]
)
def test_mapping_keys_may_be_integers_or_strings_in_any_order(text: str) -> None:
    mapping = parse_mapping(text, ["0", "1"])
    assert list(mapping.items()) == [("0", "terrible"), ("1", "great")]


def test_a_dictionary_is_checked_like_a_flag() -> None:
    assert parse_mapping({"1": "great", "0": "bad"}, ["0", "1"]) == {"0": "bad", "1": "great"}
    with pytest.raises(UsageError, match="no word for label '1'"):
        parse_mapping({"0": "bad"}, ["0", "1"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("terrible,great", "is not a Python dictionary"),
        ("['terrible', 'great']", "is not a Python dictionary"),
        ("{[]: 'a'}", "is not a Python dictionary"),
        ("__import__('os').getcwd()", "is not a Python dictionary"),
        ("{'0': 'terrible'}", "no word for label '1'"),
        ("{}", "no word for labels '0', '1'"),
        ("{0: 'a', 1: 'b', 2: 'c'}", "label '2'"),
        ("{0: 'a', '0': 'b', 1: 'c'}", "label '0' twice"),
    ],
)
def test_a_mapping_that_does_not_fit_the_task_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingError, match=re.escape(problem)) as caught:
        parse_mapping(text, ["0", "1"])
    assert caught.value.data == {"setting": "mapping", "value": text}


@pytest.mark.parametrize("word", [2, " "])
def test_a_label_word_must_be_a_word(word: object) -> None:
    with pytest.raises(LabelWordError) as caught:
        parse_mapping(str({0: "a", 1: word}), ["0", "1"])
    assert caught.value.data == {"word": word, "label": "1"}


def test_label_words_are_looked_up_after_a_space_but_for_four_first_characters(
    bert: Tokenizer, roberta: Tokenizer
) -> None:
    mapping = {"0": "terrible", "1": "Maybe", "2": "<s>", "3": ".", "4": ","}
    ids = label_word_ids(mapping, list("01234"), roberta)
    assert roberta.convert_ids_to_tokens(ids) == ["Ġterrible", "ĠMaybe", "<s>", ".", ","]
    ids = label_word_ids({"0": "[SEP]", "1": "Yes"}, ["1", "0"], bert)
    assert bert.convert_ids_to_tokens(ids) == ["yes", "[SEP]"]


@pytest.mark.parametrize(
    ("words", "label", "pieces"),
    [
        (("great", "good film"), "1", ["good", "film"]),
        (("dim", "great"), "0", ["d", "##i", "##m"]),
        (("great", "[great]"), "1", ["[great]"]),
        (("great", "☃"), "1", ["[UNK]"]),
    ],
)
def test_a_label_word_that_is_not_one_known_token_is_refused(
    bert: Tokenizer, words: tuple[str, str], label: str, pieces: list[str]
) -> None:
    problem = "is unknown to this model" if len(pieces) == 1 else f"is {len(pieces)} pieces"
    with pytest.raises(LabelWordError, match=problem) as caught:
        label_word_ids(dict(zip("01", words, strict=True)), ["0", "1"], bert)
    assert caught.value.data == {"word": words[int(label)], "label": label, "pieces": pieces}


def test_two_label_words_may_not_be_one_token(bert: Tokenizer) -> None:
    with pytest.raises(LabelWordError, match="same token"):
        label_word_ids({"0": "Yes", "1": "yes"}, ["0", "1"], bert)


def choose(**flags: Any) -> tuple[list[str], str | Mapping[str, str]]:
    return choose_prompts(TASKS["SST-2"], PromptSources(**flags))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    contents = {
        "templates": "*mask*a\n\n*mask*b\n*mask*c\n\n",
        "mappings": "{0: 'bad', 1: 'good'}\n{0: 'dull', 1: 'funny'}\n",
        "prompts": "*mask*p\t{0: 'bad', 1: 'good'}\n*mask*q\t{0: 'No', 1: 'Yes'}\n",
        "spaces": "*mask*p {0: 'bad', 1: 'good'}\n",
        "empty": "\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return {name: str(tmp_path / name) for name in contents}


def test_without_flags_the_tasks_row_is_used_and_a_flag_beats_it() -> None:
    assert choose() == ([SENTIMENT], {"0": "terrible", "1": "great"})
    assert choose(template="*mask*") == (["*mask*"], {"0": "terrible", "1": "great"})
    assert choose(mapping="{0: 'bad', 1: 'good'}") == ([SENTIMENT], "{0: 'bad', 1: 'good'}")


def test_a_file_of_templates_gives_all_the_first_few_or_one(files: dict[str, str]) -> None:
    path = files["templates"]
    assert choose(template_path=path)[0] == ["*mask*a", "*mask*b", "*mask*c"]
    assert choose(template_path=path, top_n_template=2)[0] == ["*mask*a", "*mask*b"]
    assert choose(template_path=path, top_n_template=9)[0] == ["*mask*a", "*mask*b", "*mask*c"]
    assert choose(template_path=path, template_id=1)[0] == ["*mask*b"]


def test_files_of_mappings_and_of_prompts_give_the_line_asked_for(files: dict[str, str]) -> None:
    assert choose(mapping_path=files["mappings"], mapping_id=1) == ([SENTIMENT], "{0: 'dull', 1: 'funny'}")
    assert choose(prompt_path=files["prompts"], prompt_id=1) == (["*mask*q"], "{0: 'No', 1: 'Yes'}")


def test_a_file_beats_a_flag_and_says_so(files: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmntk.prompts.prompt_files"):
        assert choose(template="*mask*x", template_path=files["templates"], template_id=0)[0] == ["*mask*a"]
    assert caplog.messages == [f"`template` is not used: {files['templates']} takes its place"]


@pytest.mark.parametrize(
    ("sources", "setting"),
    [
        ({"template_path": "templates", "template_id": 3}, "template_id"),
        ({"template_path": "templates", "template_id": -1}, "template_id"),
        ({"template_path": "templates", "template_id": 1, "top_n_template": 2}, "top_n_template"),
        ({"template_path": "templates", "top_n_template": 0}, "top_n_template"),
        ({"template_id": 0}, "template_id"),
        ({"top_n_template": 2}, "top_n_template"),
        ({"mapping_id": 0}, "mapping_id"),
        ({"prompt_id": 0}, "prompt_id"),
        ({"mapping_path": "mappings"}, "mapping_id"),
        ({"prompt_path": "prompts"}, "prompt_id"),
        ({"mapping_path": "mappings", "mapping_id": 2}, "mapping_id"),
        ({"prompt_path": "prompts", "prompt_id": 2}, "prompt_id"),
        ({"prompt_path": "prompts", "prompt_id": 0, "template_path": "templates"}, "template_path"),
    ],
)
def test_settings_that_do_not_fit_their_files_are_refused(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, sources: dict[str, object], setting: str
) -> None:
    monkeypatch.chdir(Path(files["empty"]).parent)
    with pytest.raises(SettingError, match=f"`{setting}") as caught:
        choose(**sources)
    assert caught.value.data == {"setting": setting, "value": sources.get(setting)}


@pytest.mark.parametrize(("name", "problem"), [("empty", "is empty"), ("missing", "No such file or directory")])
def test_a_file_of_templates_that_has_none_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    with pytest.raises(FileError, match=f"`template_path=.*{problem}") as caught:
        choose(template_path=str(tmp_path / name))
    assert caught.value.data["path"] == str(tmp_path / name)


def test_a_line_of_prompts_without_a_tab_is_refused(files: dict[str, str]) -> None:
    with pytest.raises(TemplateError) as caught:
        choose(prompt_path=files["spaces"], prompt_id=0)
    assert (caught.value.data["path"], caught.value.data["line"]) == (files["spaces"], 0)
