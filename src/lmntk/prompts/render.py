"""A template, an example's texts and label words become the tokens of a prompt.

Templates (`lmntk.prompts.templates`) and label words (`lmntk.prompts.prompt_files`) are those of LM-BFF (Gao et al.
2021, arXiv 2012.15723): the same tokens come out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmntk.errors import UsageError
from lmntk.prompts.templates import MASK, SEGMENT_END, LabelPart, LiteralPart, SentencePart, SpecialPart, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How many tokens of a sentence and of a prompt are kept; each name is also the flag that sets it.

    Raises:
        UsageError: A limit is below 1.
    """

    max_seq_length: int = 128
    first_sent_limit: int | None = None
    other_sent_limit: int | None = None
    truncate_head: bool = False

    def __post_init__(self) -> None:
        """Refuse limits that keep nothing (and would turn slices around)."""
        for flag in ("max_seq_length", "first_sent_limit", "other_sent_limit"):
            limit = getattr(self, flag)
            if limit is not None and limit < 1:
                raise UsageError(f"--{flag} is {limit}, but must be at least 1")


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt, cut to its limits.

    Attributes:
        input_ids: `[L]` token ids.
        segment_ids: `[L]` token type ids.
        mask_position: Where in `input_ids` the template's mask stands; of a template without one, the first token. For
            a causal model it is the last token: what comes behind it is predicted.
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
) -> Prompt:
    """Fill a template in.

    For a causal model ``*cls*`` is the tokenizer's BOS token, or nothing where it has none, ``*sep*`` is nothing, and
    the prompt ends where the mask would stand.

    Args:
        template: From `Template.parse`.
        texts: The texts of ``sent_0``, ``sent_1``, …
        tokenizer: Every part is encoded on its own, without special tokens.
        limits: Sentences are cut first, then the whole prompt.
        label_word_ids: `[C]` token ids for ``label_i`` and ``labelx_i``; needed where the template has them.
        context_labels: Class ids of the in-context examples, for ``labelx_i``.
        name: What messages call the example, such as ``example 3 of train``.

    Raises:
        UsageError: The mask does not survive the cut, the tokenizer lacks a special token of the template,
            ``labelx_i`` has no in-context example, or nothing is left for a causal model to read.
    """
    ids: list[int] = []
    segments: list[int] = []
    segment = mask_position = 0
    for part in template.parts:
        match part:
            case SpecialPart():
                tokens = _special_ids(part, tokenizer, template.causal)
            case SentencePart():
                limit = limits.first_sent_limit if part.index == 0 else limits.other_sent_limit
                tokens = _encode(part.apply(texts[part.index]), tokenizer)[:limit]
            case LabelPart():
                tokens = [label_word_ids[_label_of(part, context_labels)]]
            case LiteralPart():
                tokens = _literal_ids(part.text, tokenizer)
        # The template's own mask counts: a sentence may hold the text of a mask token before it.
        if part == MASK:
            mask_position = len(ids) - template.causal
        ids += tokens
        segments += [segment] * len(tokens)
        if part == SEGMENT_END:
            segment += 1

    start = max(0, len(ids) - limits.max_seq_length) if limits.truncate_head else 0
    kept = slice(start, start + limits.max_seq_length)
    if not ids:
        raise UsageError(f"the prompt of {name} has no token, as its text is empty: take it out of its file")
    if MASK not in template.parts:
        mask_position = start + len(ids[kept]) - 1 if template.causal else start
    elif not start <= mask_position < start + limits.max_seq_length:
        raise UsageError(_mask_cut_away(template, texts, limits, len(ids), name))
    return Prompt(tuple(ids[kept]), tuple(segments[kept]), mask_position - start, len(ids))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if text.startswith(" ") and _adds_space(tokenizer):
        text = text[1:]
    # Not verbose: it would warn of texts longer than the model takes, which are cut here anyway.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


@functools.lru_cache(maxsize=4)  # asked for every part of every prompt
def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a space (``▁``) in front of a text that has one already, as Llama 2's does."""
    pieces = tokenizer.tokenize("a")
    return bool(pieces) and pieces[0].startswith("▁") and tokenizer.tokenize(" a") != pieces


def _literal_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Encoding may split or prefix a lone character (sentence-piece models put a space before it), the lookup does not.
    # Byte-level vocabularies spell lone bytes as letters, too: their é is the byte E9, which decodes to no character.
    token = _known_id(text, tokenizer) if len(text) == 1 else None
    if token is not None and (text.isascii() or "\ufffd" not in tokenizer.decode([token])):
        return [token]
    return _encode(text, tokenizer)


def _known_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of a token, None where the vocabulary does not hold it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


def _special_ids(part: SpecialPart, tokenizer: PreTrainedTokenizerBase, causal: bool) -> list[int]:
    kind = part.name.removesuffix("+")
    if causal:
        return [tokenizer.bos_token_id] if kind == "cls" and tokenizer.bos_token_id is not None else []
    token_id = getattr(tokenizer, f"{kind}_token_id")
    if token_id is None:
        raise UsageError(
            f"--template uses *{part.name}*, but this model's tokenizer has no {kind} token: "
            f"choose a model that has one (--model_name_or_path, --tokenizer_name)"
            + ("" if part == MASK else " or leave it out of --template")
        )
    return [token_id]


def _label_of(part: LabelPart, context_labels: Sequence[int]) -> int:
    if not part.in_context:
        return part.index
    if part.index >= len(context_labels):
        raise UsageError(
            f"--template uses labelx_{part.index}, but the prompt has {len(context_labels)} in-context examples: "
            f"leave the label word out of the template"
        )
    return context_labels[part.index]


def _mask_cut_away(template: Template, texts: Sequence[str], limits: Limits, length: int, name: str) -> str:
    """The sentence that shows the example and names the limits that bring its mask back."""
    mask = template.parts.index(MASK)
    # What stands between the mask and the end that is kept pushed it out; shortening anything else is of no use.
    pushing = template.parts[mask + 1 :] if limits.truncate_head else template.parts[:mask]
    indices = {part.index for part in pushing if isinstance(part, SentencePart)}
    ways = [f"raise --max_seq_length (now {limits.max_seq_length})"]
    if any(isinstance(part, LabelPart) and part.in_context for part in template.parts):
        # In-context prompts have all the room that the model has.
        ways = ["lower --gpt3_in_context_num"]
    if 0 in indices:
        ways.append(f"lower --first_sent_limit (now {limits.first_sent_limit or 'none'})")
    if indices - {0}:
        ways.append(f"lower --other_sent_limit (now {limits.other_sent_limit or 'none'})")
    if limits.truncate_head:
        ways.append("leave out --truncate_head")
    if template.causal:
        ways.append("add --truncate_head, to lose the beginning instead")
    lines = (" ".join(text.split()) for text in texts)
    shown = " | ".join(line if len(line) <= 60 else line[:59] + "…" for line in lines)
    lost = "end" if template.causal else "mask"
    what = f"the {lost} of {name} was cut away, its prompt has {length} tokens"
    return f"{what}: {', or '.join(ways)}; its text is '{shown}'"


def warn_of_unknown_text(templates: Iterable[Template], tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the text of templates that the tokenizer does not know, or of which it leaves nothing."""
    literals = {part.text: None for template in templates for part in template.parts if isinstance(part, LiteralPart)}
    unknown, lost = [], []
    for text in literals:
        ids = _literal_ids(text, tokenizer)
        if tokenizer.unk_token_id in ids and text.strip() != tokenizer.unk_token:
            unknown.append(text)
        elif not ids and text.strip():
            lost.append(text)
    if unknown:
        logger.warning(
            "--template: this model's tokenizer does not know %s and gives the token %s in its place",
            *(_quoted(unknown), tokenizer.unk_token),
        )
    if lost:
        logger.warning("--template: this model's tokenizer makes no token of %s", _quoted(lost))


def _quoted(texts: Iterable[str]) -> str:
    return ", ".join(f"'{text}'" for text in texts)
