"""Check the words of a command line before any flag is parsed: every word must be text that files can record."""

from collections.abc import Sequence

from lmntk.config.legacy_flags import is_flag
from lmntk.errors import UsageError


def check_words(words: Sequence[str]) -> None:
    """Refuse words that cannot be written to a file or name one.

    Args:
        words: The command line; bytes that are not UTF-8 arrive as lone surrogates.

    Raises:
        UsageError: A word is not UTF-8, or holds a NUL character; names its flag.
    """
    flag = ""
    for word in words:
        flag = word.partition("=")[0] if is_flag(word) else flag
        cause = _trouble(word)
        if cause:
            shown = ascii(word.partition("=")[2] if is_flag(word) and "=" in word else word)
            named = flag if flag and not _trouble(flag) else "the command line"
            raise UsageError(f"{named}: {shown} {cause}: give text in UTF-8, without NUL characters")


def _trouble(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return "holds a NUL character" if "\0" in word else ""
