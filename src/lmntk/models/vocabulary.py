"""What is wrong with the vocabulary of a tokenizer that loads all the same."""

import json
import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmntk.errors import UsageError

logger = logging.getLogger(__name__)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, name_or_path: str, model_size: int) -> None:
    """Warn of a vocabulary that is not whole, as far as anything tells.

    Args:
        tokenizer: The tokenizer.
        name_or_path: Where it comes from.
        model_size: How many tokens the model knows.

    Raises:
        UsageError: A special token has the id of another token.
    """
    _require_own_ids(tokenizer, name_or_path)
    if not tokenizer.all_special_tokens:
        logger.warning("the tokenizer of '%s' names no special token: *cls* and *sep* are nothing", name_or_path)
    if len(tokenizer) < 0.9 * model_size:  # models have some rows to spare, for round numbers
        logger.warning(
            "the tokenizer of '%s' has %d tokens, but the model knows %d: is it the model's own, and whole?",
            *(name_or_path, len(tokenizer), model_size),
        )
    _warn_of_missing_merges(Path(name_or_path))


def _require_own_ids(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Refuse a special token that the vocabulary lacks: it is given the next id, which may be another token's."""
    vocabulary = tokenizer.get_vocab()
    special = {vocabulary[name]: name for name in tokenizer.all_special_tokens if name in vocabulary}
    for token, token_id in vocabulary.items():
        if (name := special.get(token_id, token)) != token:
            raise UsageError(
                f"the vocabulary of the tokenizer in '{name_or_path}' lacks the special token {name}, which would be "
                f"the same as '{token}': copy the tokenizer's files anew, or name another with --tokenizer_name"
            )


def _warn_of_missing_merges(folder: Path) -> None:
    """Tell of a list of merges that is cut: the tokens it lacks are never made, and texts come in smaller pieces."""
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
