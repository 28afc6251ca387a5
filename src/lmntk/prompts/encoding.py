"""Text to token ids, without special tokens and without a second space."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text; a space at its start stays one space."""
    if text.startswith(" ") and adds_space(tokenizer):
        text = text[1:]
    # Not verbose: it would warn of texts longer than the model takes, which are cut here anyway.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def encode_literal(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Encode a template's own text, of which a lone character is looked up.

    Encoding may split or prefix a lone character (sentence-piece models put a space before it), the lookup does not.
    Byte-level vocabularies spell lone bytes as letters, too: their é is the byte E9, which decodes to no character.
    """
    token = known_id(text, tokenizer) if len(text) == 1 else None
    if token is not None and (text.isascii() or "\ufffd" not in tokenizer.decode([token])):
        return (token,)
    return tuple(encode(text, tokenizer))


@functools.lru_cache(maxsize=4)  # asked for every part of every prompt
def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a space (``▁``) before a text that begins with one already, as Llama 2's does."""
    pieces = tokenizer.tokenize("a")
    return bool(pieces) and pieces[0].startswith("▁") and tokenizer.tokenize(" a") != pieces


def known_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of a token, None where the vocabulary does not hold it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


def quoted(texts: Iterable[str]) -> str:
    """List texts in quotation marks, for a sentence."""
    return ", ".join(f"'{text}'" for text in texts)
