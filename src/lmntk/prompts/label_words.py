"""Label words: a mapping from label to word as users write it, and each word's one token.

The spelling of a mapping is that of LM-BFF (Gao et al. 2021, arXiv 2012.15723).
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmntk.errors import LabelWordError, SettingError
from lmntk.prompts.encoding import adds_space, known_id, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def parse_mapping(mapping: str | Mapping[str, str], labels: Sequence[str]) -> dict[str, str]:
    """Read a mapping from each label of a task to its label word.

    Args:
        mapping: A dictionary, or the text of a Python dictionary whose keys are strings or integers.
        labels: The task's labels, in the order of the logits.

    Returns:
        Label to label word, in the order of `labels`.

    Raises:
        SettingError: The text is not a dictionary, or a label is missing, unknown or given twice.
        LabelWordError: A label word is not a text.

    Examples:
        >>> parse_mapping("{1: 'great', 0: 'terrible'}", ["0", "1"])
        {'0': 'terrible', '1': 'great'}
    """
    words = read_mapping(mapping, labels)
    known = f"{mapping}; the labels are {', '.join(labels)}"
    if missing := [label for label in labels if label not in words]:
        raise _mapping_error(f"`mapping` has no word for {_named(missing)}: {known}", mapping)
    if extra := [label for label in words if label not in labels]:
        raise _mapping_error(f"`mapping` has {_named(extra)}, unknown here: {known}", mapping)
    return {label: words[label] for label in labels}


def read_mapping(mapping: str | Mapping[str, str], labels: Sequence[str] = ("0", "1")) -> dict[str, str]:
    """Read a mapping with any labels, in its own order.

    Args:
        mapping: As for `parse_mapping`.
        labels: The labels of the example in an error message.

    Raises:
        SettingError: The text is not a dictionary, or a label is given twice.
        LabelWordError: A label word is not a text.

    Examples:
        >>> read_mapping("{'bad': 'terrible', 'good': 'great'}")
        {'bad': 'terrible', 'good': 'great'}
    """
    example = str({label: f"word{i}" for i, label in enumerate(labels)})
    pairs = _pairs_of(mapping) if isinstance(mapping, str) else [(str(key), word) for key, word in mapping.items()]
    if pairs is None:
        raise _mapping_error(f'`mapping` is not a Python dictionary: {mapping}; write for example "{example}"', mapping)
    words: dict[str, str] = {}
    for label, word in pairs:
        if label in words:
            raise _mapping_error(f"`mapping` gives label '{label}' twice: {mapping}", mapping)
        if not isinstance(word, str) or not word.strip():
            raise LabelWordError(
                f"`mapping` gives label '{label}' {word!r}, which is not a word; write for example \"{example}\"",
                **{"word": word, "label": label},
            )
        words[label] = word
    require_utf8("mapping", *words, *words.values())
    return words


def require_utf8(setting: str, *texts: str) -> None:
    """Refuse a text of the command line that holds bytes in another encoding.

    Args:
        setting: The setting that holds the texts.
        *texts: The texts.

    Raises:
        SettingError: A text cannot be written as UTF-8.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            sentence = f"`{setting}` holds bytes that are not UTF-8: {ascii(text)}"
            raise SettingError(sentence, setting=setting, value=text) from error


def _pairs_of(mapping: str) -> list[tuple[str, object]] | None:
    """Return the keys and values of a dictionary literal, repeated keys included; None for any other text."""
    try:
        display = ast.parse(mapping.strip(), mode="eval").body
        if not isinstance(display, ast.Dict):
            return None
        # A ** has no key, which literal_eval refuses.
        keys = [ast.literal_eval(key) for key in display.keys]  # type: ignore[arg-type]
        values = [ast.literal_eval(value) for value in display.values]
        if not all(isinstance(key, str | int | float) for key in keys):
            return None
        return list(zip(map(str, keys), values, strict=True))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _mapping_error(sentence: str, mapping: str | Mapping[str, str]) -> SettingError:
    return SettingError(sentence, setting="mapping", value=mapping)


def _named(labels: Sequence[str]) -> str:
    return f"label{'' if len(labels) == 1 else 's'} {quoted(labels)}"


def label_word_ids(mapping: Mapping[str, str], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Look up the one token of each class's label word.

    A word is looked up with a space before it. If that is not one token, it is looked up without the space, and a
    warning says so. The mapping may decide: a word that begins with a space is looked up only with it, and one that
    begins with ``-`` without it, unless the word with its ``-`` is one token. A word that begins with one of
    ``< [ . ,`` is a token as it is written.

    Args:
        mapping: Label to label word, from `parse_mapping`.
        labels: The task's labels, in the order of the logits.
        tokenizer: The tokenizer of the model.

    Returns:
        The token ids, `[C]`.

    Raises:
        LabelWordError: A word has several tokens or an unknown one, or two classes have the same token.
    """
    ids: list[int] = []
    bare: list[str] = []
    for label in labels:
        word = mapping[label]
        token_id, without_space = _label_word_id(word, label, tokenizer)
        if token_id in ids:
            first = labels[ids.index(token_id)]
            raise LabelWordError(
                f"label words '{mapping[first]}' (label {first}) and '{word}' (label {label}) are the same token "
                f"for this model: give each class its own word with `mapping`",
                **{"word": word, "label": label},
            )
        ids.append(token_id)
        bare += [word] * without_space
    if bare:
        logger.warning(
            "label words looked up without a space before them, since with one they are no token of this model: %s%s",
            *(quoted(bare), "" if len(bare) == len(labels) else "; the others have one"),
        )
    return ids


def _label_word_id(word: str, label: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """Return the token of a label word, and whether the space was left out though the mapping does not say so."""
    marked = word.startswith("-") and len(word) > 1
    if word.startswith(("<", "[", ".", ",")):
        forms = [[word]]
    elif word.startswith(" "):
        forms = [_pieces_after_space(word.lstrip(" "), tokenizer)]
    else:
        bare = word[1:] if marked else word
        forms = [_pieces_after_space(word, tokenizer), _pieces_without_space(bare, tokenizer)]
    for number, pieces in enumerate(forms):
        if len(pieces) == 1 and (token_id := known_id(pieces[0], tokenizer)) is not None:
            return token_id, number == 1 and not marked
    pieces = forms[-1 if marked else 0]
    if len(pieces) == 1:
        problem = "is unknown to this model: choose another with `mapping`"
    else:
        problem = (
            f"is {len(pieces)} pieces for this model ({' '.join(pieces)}): choose a word of one piece with `mapping`"
        )
    raise LabelWordError(f"label word '{word}' (label {label}) {problem}", word=word, pieces=pieces, label=label)


def _pieces_after_space(word: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.tokenize(word if adds_space(tokenizer) else " " + word)


def _pieces_without_space(word: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    pieces = tokenizer.tokenize(word)
    if not pieces or not pieces[0].startswith(("▁", "Ġ")):
        return pieces
    # The tokenizer has put a space before the word; the vocabulary may hold the word without it.
    joined = "".join(pieces)[1:]
    return [joined] if len(pieces) == 1 or known_id(joined, tokenizer) is not None else pieces
