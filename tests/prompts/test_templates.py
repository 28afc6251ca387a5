"""What a template may hold, and how a mistake in it is reported."""

import re

import pytest

from lmntk.errors import TemplateError
from lmntk.prompts.templates import LabelPart, LiteralPart, SentencePart, SpecialPart, Template


def test_a_template_is_split_at_stars_and_empty_parts_yield_nothing() -> None:
    template = Template.parse("*cls**sent_0*_It_was*mask*.*sep+*", 1, 2)
    assert template.parts == (
        SpecialPart("cls"),
        SentencePart(0, space=False, case="", drop_last=False),
        LiteralPart(" It was"),
        SpecialPart("mask"),
        LiteralPart("."),
        SpecialPart("sep+"),
    )


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("sent_0", "The End."),
        ("+sent_0", " The End."),
        ("sent-_0", "The End"),
        ("sentl_0", "the End."),
        ("+sentl_0", " the End."),
        ("sentl-_0", "the End"),
        ("sentu_0", "The End."),
        ("+sentu_0", " The End."),
    ],
)
def test_each_sentence_variable_changes_the_text_its_own_way(word: str, text: str) -> None:
    part = Template.parse(f"*{word}**mask*", 1, 2).parts[0]
    assert isinstance(part, SentencePart)
    assert part.apply("The End.") == text


def test_only_the_first_character_changes_case_and_an_empty_text_stays_empty() -> None:
    lower, upper = Template.parse("*sentl-_0**mask**sentu_0*", 1, 2).parts[::2]
    assert isinstance(lower, SentencePart)
    assert isinstance(upper, SentencePart)
    assert (lower.apply("ABC"), upper.apply("abC")) == ("aB", "AbC")
    assert (lower.apply(""), upper.apply("")) == ("", "")


def test_label_variables_name_a_class_or_an_example_in_context() -> None:
    parts = Template.parse("*label_1**mask**labelx_7*", 0, 2).parts
    assert parts[::2] == (LabelPart(1, in_context=False), LabelPart(7, in_context=True))


@pytest.mark.parametrize(
    "literal", ["_It_was", ".", ",", "?", "_news.", ":", "_", "sentence_1", "Label_1:", "_mask", "masks"]
)
def test_ordinary_text_is_no_variable(literal: str) -> None:
    assert Template.parse(f"*{literal}*mask*", 1, 2).parts[0] == LiteralPart(literal.replace("_", " "))


@pytest.mark.parametrize(
    ("template", "part", "available"),
    [
        ("*cls**sent_0**mask*,*sent_1**sep+*", "sent_1", "one sentence (sent_0)"),
        ("*sent_0**mask**label_2*", "label_2", "two labels (label_0 to label_1)"),
    ],
)
def test_a_part_that_the_task_does_not_have_is_refused(template: str, part: str, available: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(f"{part}, but SST-2 has {available}")) as caught:
        Template.parse(template, 1, 2, "SST-2")
    assert caught.value.data == {"template": template, "part": part}


def test_sentences_of_demonstrations_parse_where_their_number_is_given() -> None:
    assert Template.parse("*sent_0**mask**sent_1*label_1*", 2, 2).parts[2] == SentencePart(1, False, "", False)


@pytest.mark.parametrize(
    ("template", "count"), [("*cls**sent_0**sep+*", "no *mask*"), ("", "no *mask*"), ("*mask**mask*", "*mask* 2 times")]
)
def test_a_template_needs_exactly_one_mask(template: str, count: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(f"`template` has {count}, but")) as caught:
        Template.parse(template, 1, 2)
    assert caught.value.data == {"template": template}


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("sent0", "sent_0"),
        ("sents_0", "sent_0"),
        ("Sent_0", "sent_0"),
        ("sentl-0", "sentl-_0"),
        ("+sent1", "+sent_1"),
        ("sentl_x", "sentl_0"),
        ("Mask", "mask"),
        ("SEP+", "sep+"),
        ("label1", "label_1"),
        ("label_one", "label_0"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_one_that_was_meant(word: str, meant: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(f"did you mean '{meant}'?")) as caught:
        Template.parse(f"*cls**{word}**mask*", 2, 2)
    assert caught.value.data["part"] == word


def test_text_that_follows_a_sentence_without_a_star_is_not_lost() -> None:
    with pytest.raises(TemplateError) as caught:
        Template.parse("*cls**sent_0_It_was*mask*.*sep+*", 1, 2)
    assert caught.value.data["part"] == "sent_0_It_was"
