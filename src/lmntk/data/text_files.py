"""Text files that users bring: UTF-8 is read; an error names any other encoding and the command that converts it."""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lmntk.errors import FileError

_MARKS = {  # UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def open_text(path: str | Path, setting: str = "") -> Iterator[TextIO]:
    """Open a text file; line ends are not translated, and a byte order mark stays the first character.

    Args:
        path: The file.
        setting: The setting that names the file, for error messages.

    Raises:
        FileError: The file cannot be read or is not UTF-8; names the encoding and the command that converts it.
    """
    name = f"`{setting}={path}`" if setting else f"{path}"
    try:
        with Path(path).open("rb") as file:
            head = file.read(64)
        if encoding := _other_encoding(head):
            raise FileError(f"{name} is not UTF-8 text but {encoding.upper()}: {_conversion(encoding)}", path=path)
        with Path(path).open(encoding="utf-8", newline="") as text:
            yield text
    except UnicodeDecodeError as error:
        raise FileError(f"{name} is not UTF-8 text: {_conversion('latin1', 'for instance ')}", path=path) from error
    except OSError as error:
        sentence = f"{name} cannot be read" if setting else f"cannot read {path}"
        raise FileError(f"{sentence}: {error.strerror}", path=path) from error


def _other_encoding(head: bytes) -> str | None:
    """Find the encoding from a byte order mark, or from the zeros in every other byte of Latin text."""
    marked = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)
    if marked or len(head) < 4:
        return marked
    zeros = [not any(head[start::2]) for start in (0, 1)]
    return None if zeros[0] == zeros[1] else "utf-16be" if zeros[0] else "utf-16le"


def _conversion(encoding: str, how: str = "") -> str:
    return f"convert it, {how}with iconv -f {encoding} -t utf-8"
