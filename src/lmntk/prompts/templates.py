"""The template language: a string split at ``*`` into special tokens, sentences, label words and text.

`Template.parse` lists the parts; `lmntk.prompts.render` fills them in. The language is that of LM-BFF (Gao et al. 2021,
arXiv 2012.15723).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lmntk.errors import UsageError, suggest

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
        """The text that is tokenised: first character in another case, last one dropped, a space in front."""
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
    """Text of the template's own, spaces already in place."""

    text: str


Part = SpecialPart | SentencePart | LabelPart | LiteralPart

MASK = SpecialPart("mask")
SEGMENT_END = SpecialPart("sep+")
_SPECIAL = {"cls": SpecialPart("cls"), "mask": MASK, "sep": SpecialPart("sep"), "sep+": SEGMENT_END}
_SENTENCE = re.compile(r"(\+?)sent([lu]?)(-?)_([0-9]+)")
_LABEL = re.compile(r"label(x?)_([0-9]+)")
_FORMS = ("sent", "sent-", "sentl", "sentl-", "sentu", "+sent", "+sentl", "+sentu", "label", "labelx")
# What can only be a slip of the pen. Parts that begin like a variable are in it because the published program takes
# them for one; `sentence_1` and `Label_1` are not, since they may well be text.
_MISSPELT = re.compile(
    r"\+?sent[lu]?-?_.*|labelx?_.*|labelx?[0-9]+|(?i:\+?sents?[lu]?-?_?-?[0-9]+|\+?(?:cls|mask|sep)\+?)", re.DOTALL
)


@dataclass(frozen=True)
class Template:
    """A template taken apart, fit for the sentences and classes it was parsed for.

    Attributes:
        text: As it was written.
        parts: In their order.
        causal: Whether it asks a causal model, which predicts what comes behind its last token.
    """

    text: str
    parts: tuple[Part, ...]
    causal: bool = False

    @classmethod
    def parse(
        cls, text: str, num_sentences: int, num_labels: int, task_name: str = "the task", needs_mask: bool = True
    ) -> Template:
        """Take a template apart at ``*``.

        Parts: ``cls``, ``mask``, ``sep``, ``sep+`` (sep, then the segment id goes up); ``sent_i`` the i-th sentence,
        with ``l`` / ``u`` after ``sent`` for its first character in lower / upper case, ``-`` after that for all but
        its last character, and ``+`` in front for a space before it; ``label_i`` the label word of class i;
        ``labelx_i`` that of the i-th in-context example; else literal text with ``_`` for a space.

        Args:
            text: The template.
            num_sentences: How many texts will be given to `render`: those of the query and of all demonstrations.
            num_labels: Number of classes.
            task_name: For error messages.
            needs_mask: Whether a label word is asked for, which stands at ``*mask*``.

        Raises:
            UsageError: No ``*mask*`` or several, a sentence or class the task has not, or a misspelt variable.
        """
        parts = []
        for word in text.split("*"):
            if word:
                parts.append(_parse_part(word, text, num_sentences, num_labels, task_name))
        if needs_mask and parts.count(MASK) != 1:
            count = "no *mask*" if MASK not in parts else f"*mask* {parts.count(MASK)} times"
            raise UsageError(
                f"--template has {count}, but the label word needs exactly one place, as in {EXAMPLE_TEMPLATE}; "
                f"the template is '{text}'"
            )
        return cls(text, tuple(parts))

    def for_causal(self) -> Template:
        """The same for a causal model: its label word stands where the mask does, and nothing behind it is read."""
        end = self.parts.index(MASK) + 1 if MASK in self.parts else len(self.parts)
        return Template(self.text, self.parts[:end], causal=True)

    @property
    def sentences(self) -> set[int]:
        """The indices of the sentences that get into the prompt."""
        return {part.index for part in self.parts if isinstance(part, SentencePart)}

    @property
    def has_sentence(self) -> bool:
        """Whether anything of an example gets into its prompt."""
        return bool(self.sentences)


def _parse_part(word: str, template: str, num_sentences: int, num_labels: int, task_name: str) -> Part:
    if word in _SPECIAL:
        return _SPECIAL[word]
    if match := _SENTENCE.fullmatch(word):
        space, case, minus, digits = match.groups()
        if (index := _index(digits)) >= num_sentences:
            raise UsageError(
                f"--template uses {word}, but {task_name} has {_there_are(num_sentences, 'sentence', 'sent_')}; "
                f"the template is '{template}'"
            )
        return SentencePart(index, bool(space), case, bool(minus))
    if match := _LABEL.fullmatch(word):
        in_context, digits = match.groups()
        if (index := _index(digits)) >= num_labels and not in_context:
            raise UsageError(
                f"--template uses {word}, but {task_name} has {_there_are(num_labels, 'label', 'label_')}; "
                f"the template is '{template}'"
            )
        return LabelPart(index, bool(in_context))
    if _MISSPELT.fullmatch(word):
        number = re.search("[0-9]+", word)
        meant = _index(number.group()) if number else 0
        names = [*_SPECIAL, *(f"{form}_{meant}" for form in _FORMS)]
        raise UsageError(f"--template: {suggest(word, names, 'variable')}; the template is '{template}'")
    return LiteralPart(word.replace("_", " "))


def _index(digits: str) -> int:
    """The number; of one with more than ten digits the first ten, which are more than anything there is."""
    return int(digits.lstrip("0")[:10] or "0")


def _there_are(count: int, noun: str, prefix: str) -> str:
    """``one sentence (sent_0)``, ``two sentences (sent_0 to sent_1)``."""
    if count == 0:
        return f"no {noun}"
    if count == 1:
        return f"one {noun} ({prefix}0)"
    return f"{'two' if count == 2 else count} {noun}s ({prefix}0 to {prefix}{count - 1})"


def plain_text_template(num_sentences: int) -> str:
    """Give the template of a text without a prompt: the cls token, and each sentence with a sep token behind it."""
    return "*cls*" + "".join(f"*sent_{i}**sep+*" for i in range(num_sentences))
