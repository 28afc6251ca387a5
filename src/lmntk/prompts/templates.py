"""The template language: a string split at ``*`` into special tokens, sentences, label words and text.

`Template.parse` lists the parts; `lmntk.prompts.render` fills them in. The language is that of LM-BFF (Gao et al. 2021,
arXiv 2012.15723).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lmntk.errors import TemplateError, suggest

EXAMPLE_TEMPLATE = "*cls**sent_0*_It_was*mask*.*sep+*"


@dataclass(frozen=True)
class SpecialPart:
    """``cls``, ``mask``, ``sep`` or ``sep+``."""

    name: str


@dataclass(frozen=True)
class SentencePart:
    """The text of sentence `index`, changed as the letters of its name say."""

    index: int
    space: bool
    case: str
    drop_last: bool

    def apply(self, text: str) -> str:
        """Change the case of the first character, drop the last one, put a space in front, as the name says.

        Examples:
            >>> SentencePart(0, space=True, case="l", drop_last=True).apply("The end.")
            ' the end'
        """
        if self.case:
            first = text[:1].lower() if self.case == "l" else text[:1].upper()
            text = first + text[1:]
        if self.drop_last:
            text = text[:-1]
        return " " + text if self.space else text


@dataclass(frozen=True)
class LabelPart:
    """The label word of class `index`, or of the `index`-th in-context example."""

    index: int
    in_context: bool


@dataclass(frozen=True)
class LiteralPart:
    """The template's own text, with its spaces."""

    text: str


Part = SpecialPart | SentencePart | LabelPart | LiteralPart

MASK = SpecialPart("mask")
SEGMENT_END = SpecialPart("sep+")
_SPECIAL = {"cls": SpecialPart("cls"), "mask": MASK, "sep": SpecialPart("sep"), "sep+": SEGMENT_END}
_SENTENCE = re.compile(r"(\+?)sent([lu]?)(-?)_([0-9]+)")
_LABEL = re.compile(r"label(x?)_([0-9]+)")
_FORMS = ("sent", "sent-", "sentl", "sentl-", "sentu", "+sent", "+sentl", "+sentu", "label", "labelx")
# Misspelt variables. A part that begins like a variable counts, because the published program takes it for one;
# `sentence_1` and `Label_1` do not, since they may well be text.
_MISSPELT = re.compile(
    r"\+?sent[lu]?-?_.*|labelx?_.*|labelx?[0-9]+|(?i:\+?sents?[lu]?-?_?-?[0-9]+|\+?(?:cls|mask|sep)\+?)", re.DOTALL
)


@dataclass(frozen=True)
class Template:
    """A template in parts, checked against the sentences and classes it was parsed for.

    Attributes:
        text: The template as it was written.
        parts: The parts, in their order.
        causal: Whether it is for a causal model, which predicts the token after the last one.
    """

    text: str
    parts: tuple[Part, ...]
    causal: bool = False

    @classmethod
    def parse(
        cls, text: str, num_sentences: int, num_labels: int, task_name: str = "the task", needs_mask: bool = True
    ) -> Template:
        """Split a template at ``*`` into its parts.

        Parts: ``cls``, ``mask``, ``sep``, ``sep+`` (sep, then the segment id goes up); ``sent_i`` the i-th sentence,
        with ``l`` / ``u`` after ``sent`` for its first character in lower / upper case, ``-`` after that for all but
        its last character, and ``+`` in front for a space before it; ``label_i`` the label word of class i;
        ``labelx_i`` that of the i-th in-context example; else literal text with ``_`` for a space.

        Args:
            text: The template.
            num_sentences: How many texts `render` will get: those of the query and of all demonstrations.
            num_labels: Number of classes.
            task_name: The task's name in error messages.
            needs_mask: Whether the model predicts a label word, which stands at ``*mask*``.

        Raises:
            TemplateError: It has no ``*mask*`` or several, a sentence or class that the task does not have, or a
                misspelt variable. The error's `data` has the template and, if one part is wrong, the part.

        Examples:
            >>> Template.parse("*cls**sent_0*_It_was*mask*.", num_sentences=1, num_labels=2).parts[2:]
            (LiteralPart(text=' It was'), SpecialPart(name='mask'), LiteralPart(text='.'))
        """
        parts = []
        for word in text.split("*"):
            if word:
                parts.append(_parse_part(word, text, num_sentences, num_labels, task_name))
        if needs_mask and parts.count(MASK) != 1:
            count = "no *mask*" if MASK not in parts else f"*mask* {parts.count(MASK)} times"
            raise TemplateError(
                f"`template` has {count}, but the label word needs exactly one place, as in {EXAMPLE_TEMPLATE}; "
                f"the template is '{text}'",
                template=text,
            )
        return cls(text, tuple(parts))

    def for_causal(self) -> Template:
        """Return the template for a causal model, which reads up to the mask and predicts the label word there.

        Examples:
            >>> len(Template.parse("*sent_0**mask*.*sep+*", 1, 2).for_causal().parts)
            2
        """
        end = self.parts.index(MASK) + 1 if MASK in self.parts else len(self.parts)
        return Template(self.text, self.parts[:end], causal=True)

    @property
    def sentences(self) -> set[int]:
        """The indices of the sentences in the prompt."""
        return {part.index for part in self.parts if isinstance(part, SentencePart)}

    @property
    def has_sentence(self) -> bool:
        """Whether the prompt shows any sentence of its example."""
        return bool(self.sentences)


def _parse_part(word: str, template: str, num_sentences: int, num_labels: int, task_name: str) -> Part:
    if word in _SPECIAL:
        return _SPECIAL[word]
    if match := _SENTENCE.fullmatch(word):
        space, case, minus, digits = match.groups()
        if (index := _index(digits)) >= num_sentences:
            raise _unknown_part(word, f"{task_name} has {_there_are(num_sentences, 'sentence', 'sent_')}", template)
        return SentencePart(index, bool(space), case, bool(minus))
    if match := _LABEL.fullmatch(word):
        in_context, digits = match.groups()
        if (index := _index(digits)) >= num_labels and not in_context:
            raise _unknown_part(word, f"{task_name} has {_there_are(num_labels, 'label', 'label_')}", template)
        return LabelPart(index, bool(in_context))
    if _MISSPELT.fullmatch(word):
        number = re.search("[0-9]+", word)
        meant = _index(number.group()) if number else 0
        names = [*_SPECIAL, *(f"{form}_{meant}" for form in _FORMS)]
        unknown = suggest(word, names, "variable")
        raise TemplateError(f"`template`: {unknown}; the template is '{template}'", template=template, part=word)
    return LiteralPart(word.replace("_", " "))


def _unknown_part(part: str, available: str, template: str) -> TemplateError:
    sentence = f"`template` uses {part}, but {available}; the template is '{template}'"
    return TemplateError(sentence, template=template, part=part)


def _index(digits: str) -> int:
    """Read a number; one with more than ten digits is cut to ten, which is more than any index."""
    return int(digits.lstrip("0")[:10] or "0")


def _there_are(count: int, noun: str, prefix: str) -> str:
    """Write ``one sentence (sent_0)``, ``two sentences (sent_0 to sent_1)``."""
    if count == 0:
        return f"no {noun}"
    if count == 1:
        return f"one {noun} ({prefix}0)"
    return f"{'two' if count == 2 else count} {noun}s ({prefix}0 to {prefix}{count - 1})"


def plain_text_template(num_sentences: int) -> str:
    """Return the template of plain text without a prompt: a cls token, then each sentence and a sep token.

    Examples:
        >>> plain_text_template(2)
        '*cls**sent_0**sep+**sent_1**sep+*'
    """
    return "*cls*" + "".join(f"*sent_{i}**sep+*" for i in range(num_sentences))
