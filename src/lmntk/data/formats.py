"""Read and write the rows of TSV, CSV and JSON-lines files without changing any value.

A TSV line is split only at tabs, since the quotation marks of GLUE's files belong to the text. A CSV row has ordinary
quoting. A line of JSON is an object, and the task's columns are its keys. An ``NA`` in a review is a word, not a gap.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from lmntk.data.tasks import Task
from lmntk.data.text_files import open_text
from lmntk.errors import DataError, FileError, suggest
from lmntk.storage.wording import quantity

_NEEDS_QUOTES = re.compile('[",\r\n]')
_PREVIEW_LENGTH = 40  # characters


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        line: The line of the file on which the row starts, counted from 1; 0 for the header of JSON lines.
        fields: The columns; those of the task for a line of JSON.
        text: The whole line of JSON, which may hold more than the fields; empty for other formats.
    """

    line: int
    fields: list[str]
    text: str = ""


def read_rows(task: Task, path: str | Path) -> Iterator[Row]:
    """Yield every row of a file, the header included; blank lines are skipped.

    The header of JSON lines is the names of the task's columns.

    Args:
        task: The task, which gives the format unless the file's ending does.
        path: The file.

    Raises:
        FileError: The file cannot be read, or is not UTF-8.
        DataError: The file is not well formed; `data` has path and line.
    """
    reader = _FORMATS[format_of(task, path)].read
    with open_text(path) as file:
        yield from reader(file, task, path)


def format_row(task: Task, fields: Sequence[str]) -> str:
    r"""Return the text of one row in the task's format, with its line ending: the inverse of `read_rows`.

    Args:
        task: The task; a user's task needs a `file_format`.
        fields: The columns of the row.

    Examples:
        >>> from lmntk.data.tasks import find_task
        >>> format_row(find_task("mr"), ["0", 'a "dull" film'])
        '0,"a ""dull"" film"\n'
    """
    return _FORMATS[task.file_format].format(fields, task)


def format_of(task: Task, path: str | Path) -> str:
    """Return the format of a file.

    Args:
        task: The task whose file it is.
        path: The file, whose ending gives the format of a user's data.

    Raises:
        FileError: The ending is not that of a known format.
    """
    if task.file_format:
        return task.file_format
    ending = Path(path).suffix[1:].lower()
    if ending not in _FORMATS:
        raise FileError(f"{path}: the file's ending must name its format, {known_endings()}", path=path)
    return ending


def known_endings() -> str:
    """List the endings of a user's files, for a sentence."""
    *most, last = (f".{ending}" for ending in ENDINGS)
    return f"{', '.join(most)} or {last}"


def preview(name: str) -> str:
    """Write a column's name or a label on one line, for a sentence; a long one is cut, as it may be a whole text."""
    name = " ".join(name.split())
    return name if len(name) <= _PREVIEW_LENGTH else name[: _PREVIEW_LENGTH - 1] + "…"


def _read_tsv(file: TextIO, task: Task, path: str | Path) -> Iterator[Row]:
    # The published programs take a byte order mark for a part of the first line; a user's header is read by name.
    for number, line in enumerate(_without_bom(file) if task.columns else file, start=1):
        text = line.rstrip("\r\n")
        if text:
            yield Row(number, text.split("\t"))


def _read_csv(file: TextIO, task: Task, path: str | Path) -> Iterator[Row]:
    # A blank line is added after the last; it comes back as an empty row, unless an open quotation swallows it.
    reader = csv.reader(chain(_without_bom(file), ["\n"]))
    start, width, fields = 1, 0, [""]
    try:
        for fields in reader:
            if len(fields) > 1 or any(field.strip() for field in fields):
                width = width or len(fields)
                if len(fields) != width:
                    comma = "there a comma in a text without"
                    cause = comma if len(fields) > width else "a column missing, or a pair of"
                    raise DataError(
                        f"{path} line {start} has {quantity(len(fields), 'column')}, but the rows before it have "
                        f"{width}: is {cause} quotation marks?",
                        **{"path": path, "line": start},
                    )
                if not task.columns:
                    fields[task.label_column] = _plain_number(fields[task.label_column])
                yield Row(start, fields)
            last_start, start = start, reader.line_num + 1
    except csv.Error as error:
        sentence = f"{path} line {start}: {error}; is a quotation mark never closed?"
        raise DataError(sentence, path=path, line=start) from error
    if fields:
        sentence = f"{path} line {last_start}: a quotation mark is opened and never closed"
        raise DataError(sentence, path=path, line=last_start)


def _read_json_lines(file: TextIO, task: Task, path: str | Path) -> Iterator[Row]:
    yield Row(0, list(task.columns))
    for number, line in enumerate(_without_bom(file), start=1):
        if text := line.strip():
            try:
                fields = _json_fields(text, task)
            except _BadLine as error:
                raise DataError(f"{path} line {number}{error}", path=path, line=number) from error
            yield Row(number, fields, text + "\n")


class _BadLine(Exception):
    """The end of a sentence that begins with the place of a line."""


def _json_fields(text: str, task: Task) -> list[str]:
    """Return the task's columns of a line of JSON; numbers and truth values keep their spelling."""
    try:
        found = json.loads(
            text, object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=_no_constant
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        lines = "; a list over many lines becomes JSON lines with jq -c '.[]'" if text[0] == "[" or text == "{" else ""
        raise _BadLine(f" is not one JSON object ({error}){lines}") from error
    if not isinstance(found, tuple):
        lines = ": jq -c '.[]' makes JSON lines of a list" if isinstance(found, list) else ""
        raise _BadLine(f' must be one JSON object, {{"{task.columns[0]}": …}}{lines}')
    names = [name for name, _ in found]
    fields = []
    for column in task.columns:
        if column not in names:
            raise _BadLine(f": {suggest(column, map(preview, names), 'column')}")
        if names.count(column) > 1:
            raise _BadLine(f" has '{column}' twice")
        fields.append(_json_text(dict(found)[column], column))
    return fields


def _json_text(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        kind = "null" if value is None else "a list or an object"
        raise _BadLine(f": '{column}' is {kind}, where a text or a number belongs")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise _BadLine(f": '{column}' holds half a character, {half}: correct the text") from error
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_bom(lines: TextIO) -> Iterator[str]:
    first = next(lines, "")
    return chain([first.removeprefix("\ufeff")], lines)


def _plain_number(label: str) -> str:
    """Spell a whole number in the one usual way: the published programs read CSV labels as numbers."""
    number = re.fullmatch(r"\s*0*(\d+)\s*", label, re.ASCII)
    return number[1] if number else label


def _format_tsv(fields: Sequence[str], task: Task) -> str:
    return "\t".join(fields) + "\n"


def _format_csv(fields: Sequence[str], task: Task) -> str:
    """Quote a field that needs it, as Python's csv module and pandas do.

    They leave a lone carriage return without quotes, at which readers would end the row; here it gets them.
    """
    quoted = ['"' + field.replace('"', '""') + '"' if _NEEDS_QUOTES.search(field) else field for field in fields]
    return ",".join(quoted) + "\n"


def _format_json_line(fields: Sequence[str], task: Task) -> str:
    return json.dumps(dict(zip(task.columns, fields, strict=True)), ensure_ascii=False) + "\n"


class _Format(NamedTuple):
    read: Callable[[TextIO, Task, str | Path], Iterator[Row]]
    format: Callable[[Sequence[str], Task], str]


_JSON_LINES = _Format(_read_json_lines, _format_json_line)
_FORMATS = {
    "csv": _Format(_read_csv, _format_csv),
    "tsv": _Format(_read_tsv, _format_tsv),
    "jsonl": _JSON_LINES,
    "json": _JSON_LINES,
}
"""How to read and write a file, by its ending."""

ENDINGS = tuple(_FORMATS)
"""The endings that a user's files may have."""
