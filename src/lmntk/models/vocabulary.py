"""Checks of a vocabulary: transformers loads a tokenizer even if parts of its files are missing."""

import functools
import json
import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmntk.errors import ModelError

logger = logging.getLogger(__name__)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, name_or_path: str, model_size: int) -> None:
    """Warn if parts of a vocabulary seem to be missing.

    Args:
        tokenizer: The tokenizer that was loaded.
        name_or_path: Its name or folder, for messages.
        model_size: The number of tokens that the model knows.

    Raises:
        ModelError: A special token has the id of another token.
    """
    _require_own_ids(tokenizer, name_or_path)
    if not tokenizer.all_special_tokens:
        logger.warning("the tokenizer of '%s' has no special tokens: *cls* and *sep* are empty", name_or_path)
    if len(tokenizer) < 0.9 * model_size:  # models have some more rows, for round numbers
        logger.warning(
            "the tokenizer of '%s' has %d tokens, but the model knows %d: is it the model's own, and whole?",
            name_or_path,
            len(tokenizer),
            model_size,
        )
    _warn_of_missing_merges(Path(name_or_path))


def _require_own_ids(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Refuse a special token that the vocabulary lacks: it gets the next id, which may be another token's."""
    clash = _clash(tokenizer)
    if clash is not None:
        name, token = clash
        raise ModelError(
            f"the vocabulary of the tokenizer in '{name_or_path}' lacks the special token {name}, which would be the "
            f"same as '{token}': copy the tokenizer's files again, or name another with `tokenizer_name`",
            path=name_or_path,
            token=name,
        )


@functools.lru_cache(maxsize=1)  # a kept tokenizer is checked for every run
def _clash(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return a special token and another token with its id, None if there are none."""
    vocabulary = tokenizer.get_vocab()
    special = {vocabulary[name]: name for name in tokenizer.all_special_tokens if name in vocabulary}
    for token, token_id in vocabulary.items():
        if (name := special.get(token_id, token)) != token:
            return name, token
    return None


def _warn_of_missing_merges(folder: Path) -> None:
    """Warn if the list of merges lacks entries: without them, texts are cut into smaller pieces."""
    merges, vocabulary = folder / "merges.txt", folder / "vocab.json"
    if (folder / "tokenizer.json").is_file() or not (merges.is_file() and vocabulary.is_file()):
        return
    made = {"".join(line.split()[:2]) for line in merges.read_text(encoding="utf-8").split("\n")}
    tokens = [token for token in json.loads(vocabulary.read_text(encoding="utf-8")) if len(token) > 1]
    missing = sum(token not in made for token in tokens)
    if missing > 0.1 * len(tokens):
        logger.warning(
            "%s makes %d of the %d tokens of vocab.json: is it whole?", merges, len(tokens) - missing, len(tokens)
        )
