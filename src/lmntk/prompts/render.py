"""Fill a template with an example's texts and label words: the result is the tokens of a prompt.

Templates (`lmntk.prompts.templates`) and label words (`lmntk.prompts.label_words`) are those of LM-BFF (Gao et al.
2021, arXiv 2012.15723): the same tokens come out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmntk.errors import Bounds, DataError, TemplateError, check_numbers
from lmntk.prompts.encoding import encode, encode_literal, quoted
from lmntk.prompts.templates import (
    MASK,
    SEGMENT_END,
    LabelPart,
    LiteralPart,
    Part,
    SentencePart,
    SpecialPart,
    Template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


LIMIT_BOUNDS = tuple(Bounds(name, 1) for name in ("max_seq_length", "first_sent_limit", "other_sent_limit"))
"""The values that the numbers of `Limits` can take."""


@dataclass(frozen=True)
class Limits:
    """How many tokens of a sentence and of a prompt are kept.

    Attributes:
        max_seq_length: Tokens in a prompt.
        first_sent_limit: Tokens of the first sentence; None for no limit.
        other_sent_limit: Tokens of each further sentence; None for no limit.
        truncate_head: Whether a prompt that is too long loses its beginning and not its end.

    Raises:
        SettingError: A limit is below 1.
    """

    max_seq_length: int = 128
    first_sent_limit: int | None = None
    other_sent_limit: int | None = None
    truncate_head: bool = False

    def __post_init__(self) -> None:
        """Refuse limits that keep nothing (and would turn slices around)."""
        check_numbers(LIMIT_BOUNDS, vars(self))


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt, cut to its limits.

    Attributes:
        input_ids: `[L]` token ids.
        segment_ids: `[L]` token type ids.
        mask_position: The index in `input_ids` where the model predicts: that of the template's mask, or of the first
            token if the template has no mask. For a causal model it is the last token.
        full_length: Number of tokens before the cut to `max_seq_length`.
    """

    input_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    mask_position: int
    full_length: int


def render(
    template: Template,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    label_word_ids: Sequence[int] = (),
    context_labels: Sequence[int] = (),
    name: str = "the example",
    own_parts: MutableMapping[Part, Sequence[int]] | None = None,
) -> Prompt:
    """Fill a template with the texts of an example.

    For a causal model ``*cls*`` becomes the tokenizer's BOS token, or nothing if it has none; ``*sep*`` becomes
    nothing; and the prompt ends before the mask.

    Args:
        template: A template from `Template.parse`.
        texts: The texts of ``sent_0``, ``sent_1``, …
        tokenizer: The model's tokenizer; it encodes each part separately, without special tokens.
        limits: The limits; sentences are cut first, then the whole prompt.
        label_word_ids: Token ids of the label words, `[C]`, for templates with ``label_i`` or ``labelx_i``.
        context_labels: Class ids of the in-context examples, for ``labelx_i``.
        name: The example's name in error messages, such as ``example 3 of train``.
        own_parts: The token ids of the template's own text and special tokens, as far as earlier calls with the same
            template and tokenizer have found them; completed here. They are the same in every prompt.

    Raises:
        TemplateError: The tokenizer lacks a special token of the template, or ``labelx_i`` has no in-context example.
        DataError: The cut removed the mask, or the prompt has no token.

    Examples:
        >>> class Characters:  # a tokenizer with one token for each character
        ...     unk_token_id, cls_token_id, mask_token_id = None, 0, 1
        ...     def tokenize(self, text): return list(text)
        ...     def convert_tokens_to_ids(self, token): return ord(token)
        ...     def encode(self, text, **options): return [ord(character) for character in text]
        >>> render(Template.parse("*cls**sent_0**mask*", 1, 2), ["ab"], Characters(), Limits())
        Prompt(input_ids=(0, 97, 98, 1), segment_ids=(0, 0, 0, 0), mask_position=3, full_length=4)
    """
    own = {} if own_parts is None else own_parts
    ids: list[int] = []
    segments: list[int] = []
    segment = mask_position = 0
    for part in template.parts:
        tokens: Sequence[int]
        match part:
            case SentencePart():
                limit = limits.first_sent_limit if part.index == 0 else limits.other_sent_limit
                tokens = encode(part.apply(texts[part.index]), tokenizer)[:limit]
            case LabelPart():
                tokens = [label_word_ids[_label_of(part, context_labels)]]
            case SpecialPart() | LiteralPart():
                if part not in own:
                    own[part] = _own_ids(part, tokenizer, template.causal)
                tokens = own[part]
        # The template's own mask counts: a sentence may hold the text of a mask token before it.
        if part == MASK:
            mask_position = len(ids) - 1 if template.causal else len(ids)
        ids += tokens
        segments += [segment] * len(tokens)
        if part == SEGMENT_END:
            segment += 1

    start = max(0, len(ids) - limits.max_seq_length) if limits.truncate_head else 0
    kept = slice(start, start + limits.max_seq_length)
    if not ids:
        raise DataError(
            f"the prompt of {name} has no token, as its text is empty: remove it from its file", example=name
        )
    if MASK not in template.parts:
        mask_position = start + len(ids[kept]) - 1 if template.causal else start
    elif not start <= mask_position < start + limits.max_seq_length:
        raise _mask_cut_away(template, texts, limits, len(ids), name)
    return Prompt(tuple(ids[kept]), tuple(segments[kept]), mask_position - start, len(ids))


def _own_ids(part: SpecialPart | LiteralPart, tokenizer: PreTrainedTokenizerBase, causal: bool) -> Sequence[int]:
    """Return the token ids of a part that is the same in every prompt."""
    if isinstance(part, LiteralPart):
        return encode_literal(part.text, tokenizer)
    return _special_ids(part, tokenizer, causal)


def _special_ids(part: SpecialPart, tokenizer: PreTrainedTokenizerBase, causal: bool) -> tuple[int, ...]:
    kind = part.name.removesuffix("+")
    if causal:
        return (tokenizer.bos_token_id,) if kind == "cls" and tokenizer.bos_token_id is not None else ()
    token_id = getattr(tokenizer, f"{kind}_token_id")
    if token_id is None:
        raise TemplateError(
            f"`template` uses *{part.name}*, but this model's tokenizer has no {kind} token: "
            f"choose a model that has one (`model_name_or_path`, `tokenizer_name`)"
            + ("" if part == MASK else " or leave it out of `template`"),
            part=part.name,
        )
    return (token_id,)


def _label_of(part: LabelPart, context_labels: Sequence[int]) -> int:
    if not part.in_context:
        return part.index
    if part.index >= len(context_labels):
        raise TemplateError(
            f"`template` uses labelx_{part.index}, but the prompt has {len(context_labels)} in-context examples: "
            f"leave the label word out of the template",
            part=f"labelx_{part.index}",
        )
    return context_labels[part.index]


def _mask_cut_away(template: Template, texts: Sequence[str], limits: Limits, length: int, name: str) -> DataError:
    """Return the error that shows the example and names the limits that keep its mask."""
    mask = template.parts.index(MASK)
    # The parts between the mask and the end that is kept pushed it out; shortening any other is of no use.
    pushing = template.parts[mask + 1 :] if limits.truncate_head else template.parts[:mask]
    indices = {part.index for part in pushing if isinstance(part, SentencePart)}
    ways = [f"raise `max_seq_length` (now {limits.max_seq_length})"]
    if any(isinstance(part, LabelPart) and part.in_context for part in template.parts):
        # In-context prompts have all the room that the model has.
        ways = ["lower `gpt3_in_context_num`"]
    if 0 in indices:
        ways.append(f"lower `first_sent_limit` (now {limits.first_sent_limit or 'none'})")
    if indices - {0}:
        ways.append(f"lower `other_sent_limit` (now {limits.other_sent_limit or 'none'})")
    if limits.truncate_head:
        ways.append("leave out `truncate_head`")
    elif template.causal:
        ways.append("add `truncate_head`, to lose the beginning instead")
    lines = (" ".join(text.split()) for text in texts)
    shown = " | ".join(line if len(line) <= 60 else line[:59] + "…" for line in lines)
    lost = "end" if template.causal else "mask"
    what = f"the {lost} of {name} was cut away, its prompt has {length} tokens"
    sentence = f"{what}: {', or '.join(ways)}; its text is '{shown}'"
    return DataError(sentence, example=name, length=length, limits=limits)


def warn_of_unknown_text(templates: Iterable[Template], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of text in templates that the tokenizer does not know, or that it drops."""
    literals = {part.text: None for template in templates for part in template.parts if isinstance(part, LiteralPart)}
    unknown, lost = [], []
    for text in literals:
        ids = encode_literal(text, tokenizer)
        if tokenizer.unk_token_id in ids and text.strip() != tokenizer.unk_token:
            unknown.append(text)
        elif not ids and text.strip():
            lost.append(text)
    if unknown:
        logger.warning(
            "`template`: this model's tokenizer does not know %s and gives the token %s in its place",
            *(quoted(unknown), tokenizer.unk_token),
        )
    if lost:
        logger.warning("`template`: this model's tokenizer makes no token of %s", quoted(lost))
