"""Label words as token ids."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmntk.errors import UsageError
from lmntk.prompts.render import _adds_space, _known_id, _quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def label_word_ids(mapping: Mapping[str, str], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The one token of each class's label word.

    A word is looked up with a space before it, and only if that is not one token, without; the log tells of it. The
    mapping may say which: a word that begins with a space is looked up with it alone, one with ``-`` before it without,
    unless the word is one token with its ``-``. What starts with one of ``< [ . ,`` is a token as it is written.

    Args:
        mapping: Label to label word, from `lmntk.prompts.prompt_files.parse_mapping`.
        labels: The task's labels, in logit order.
        tokenizer: Looks words up.

    Returns:
        `[C]` token ids.

    Raises:
        UsageError: A word of several pieces, an unknown one, or one token for two classes.
    """
    ids: list[int] = []
    bare: list[str] = []
    for label in labels:
        word = mapping[label]
        token_id, without_space = _label_word_id(word, label, tokenizer)
        if token_id in ids:
            first = labels[ids.index(token_id)]
            raise UsageError(
                f"label words '{mapping[first]}' (label {first}) and '{word}' (label {label}) are the same token "
                f"for this model: give each class a word of its own with --mapping"
            )
        ids.append(token_id)
        bare += [word] * without_space
    if bare:
        logger.warning(
            "label words looked up without a space before them, since with one they are no token of this model: %s%s",
            *(_quoted(bare), "" if len(bare) == len(labels) else "; the others have one"),
        )
    return ids


def _label_word_id(word: str, label: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """The token of a label word, and whether it was found without a space though the mapping does not say so."""
    marked = word.startswith("-") and len(word) > 1
    if word.startswith(("<", "[", ".", ",")):
        forms = [[word]]
    elif word.startswith(" "):
        forms = [_pieces_after_space(word.lstrip(" "), tokenizer)]
    else:
        bare = word[1:] if marked else word
        forms = [_pieces_after_space(word, tokenizer), _pieces_without_space(bare, tokenizer)]
    for number, pieces in enumerate(forms):
        if len(pieces) == 1 and (token_id := _known_id(pieces[0], tokenizer)) is not None:
            return token_id, number == 1 and not marked
    pieces = forms[-1 if marked else 0]
    if len(pieces) == 1:
        raise UsageError(f"label word '{word}' (label {label}) is unknown to this model: choose another with --mapping")
    raise UsageError(
        f"label word '{word}' (label {label}) is {len(pieces)} pieces for this model ({' '.join(pieces)}): "
        f"choose a word of one piece with --mapping"
    )


def _pieces_after_space(word: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.tokenize(word if _adds_space(tokenizer) else " " + word)


def _pieces_without_space(word: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    pieces = tokenizer.tokenize(word)
    if not pieces or not pieces[0].startswith(("▁", "Ġ")):
        return pieces
    # The tokenizer has put a space before the word; the vocabulary may hold the word without it.
    joined = "".join(pieces)[1:]
    return [joined] if len(pieces) == 1 or _known_id(joined, tokenizer) is not None else pieces
