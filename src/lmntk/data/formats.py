"""The rows of data files: TSV, CSV and JSON lines, read and written so that every value stays the text it is.

A TSV line is split on tabs alone, since the quotation marks of GLUE's files belong to the text. A CSV row has ordinary
quoting. A line of JSON is an object, of which the task's columns are taken. An ``NA`` in a review is a word, not a gap.
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
from lmntk.errors import UsageError, suggest

_NEEDS_QUOTES = re.compile('[",\r\n]')
_SHOWN = 40  # characters


class Row(NamedTuple):
    """The fields of a row, the line of the file, counted from 1, on which it starts, and its text where that is kept.

    Fields are not all that a line of JSON says: it is kept as it stands.
    """

    line: int
    fields: list[str]
    text: str = ""


def read_rows(task: Task, path: str | Path) -> Iterator[Row]:
    """Yield every row of a file in the task's format, the header included; blank lines do not count.

    JSON lines have the names of the task's columns for a header.

    Raises:
        UsageError: The file cannot be read, is not UTF-8, or is not well formed; names file and, for CSV and JSON,
            line.
    """
    reader = _FORMATS[format_of(task, path)].read
    with open_text(path) as file:
        yield from reader(file, task, path)


def format_row(task: Task, fields: Sequence[str]) -> str:
    """Write one row as text in the task's format, line ending included: the inverse of `read_rows`.

    The file that is to be written decides for data of a user's own: see `Task.file_format`.
    """
    return _FORMATS[task.file_format].format(fields, task)


def format_of(task: Task, path: str | Path) -> str:
    """Say in which format a file of a task is.

    Raises:
        UsageError: The ending of a user's own file names none.
    """
    if task.file_format:
        return task.file_format
    ending = Path(path).suffix[1:].lower()
    if ending not in _FORMATS:
        raise UsageError(f"{path}: the file's ending must say what it is, {known_endings()}")
    return ending


def known_endings() -> str:
    """The endings of a user's own files, for a sentence."""
    *most, last = (f".{ending}" for ending in ENDINGS)
    return f"{', '.join(most)} or {last}"


def shown(name: str) -> str:
    """A column's name or a label for a sentence, on one line: a long one is cut, as it may be a whole text."""
    name = " ".join(name.split())
    return name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…"


def columns(count: int) -> str:
    """``1 column``, ``2 columns``."""
    return f"{count} column{'' if count == 1 else 's'}"


def _read_tsv(file: TextIO, task: Task, path: str | Path) -> Iterator[Row]:
    # The published programs take a byte order mark for a part of the first line; headers of one's own are read by name.
    for number, line in enumerate(_without_byte_order_mark(file) if task.columns else file, start=1):
        text = line.rstrip("\r\n")
        if text:
            yield Row(number, text.split("\t"))


def _read_csv(file: TextIO, task: Task, path: str | Path) -> Iterator[Row]:
    # The blank line put behind the last comes back as an empty row, unless an open quotation has swallowed it.
    reader = csv.reader(chain(_without_byte_order_mark(file), ["\n"]))
    start, width, fields = 1, 0, [""]
    try:
        for fields in reader:
            if len(fields) > 1 or any(field.strip() for field in fields):
                width = width or len(fields)
                if len(fields) != width:
                    cause = (
                        "there a comma in a text without" if len(fields) > width else "a column missing, or a pair of"
                    )
                    raise UsageError(
                        f"{path} line {start} has {columns(len(fields))}, but the rows before it have {width}: is "
                        f"{cause} quotation marks?"
                    )
                if not task.columns:
                    fields[task.label_column] = _plain_number(fields[task.label_column])
                yield Row(start, fields)
            last_start, start = start, reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path} line {start}: {error}; is a quotation mark never closed?") from error
    if fields:
        raise UsageError(f"{path} line {last_start}: a quotation mark is opened and never closed")


def _read_json_lines(file: TextIO, task: Task, path: str | Path) -> Iterator[Row]:
    yield Row(0, list(task.columns))
    for number, line in enumerate(_without_byte_order_mark(file), start=1):
        if text := line.strip():
            yield Row(number, _json_fields(text, task, f"{path} line {number}"), text + "\n")


def _json_fields(text: str, task: Task, where: str) -> list[str]:
    """What a line of JSON has in the task's columns; numbers and truth values stay spelled as they are there."""
    try:
        found = json.loads(
            text, object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=_no_constant
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        lines = "; a list over many lines becomes JSON lines with jq -c '.[]'" if text[0] == "[" or text == "{" else ""
        raise UsageError(f"{where} is not one JSON object ({error}){lines}") from error
    if not isinstance(found, tuple):
        lines = ": jq -c '.[]' makes JSON lines of a list" if isinstance(found, list) else ""
        raise UsageError(f'{where} must be one JSON object, {{"{task.columns[0]}": …}}{lines}')
    names = [name for name, _ in found]
    fields = []
    for column in task.columns:
        if names.count(column) != 1:
            told = f" has '{column}' twice" if column in names else f": {suggest(column, map(shown, names), 'column')}"
            raise UsageError(where + told)
        fields.append(_json_text(dict(found)[column], f"{where}: '{column}'"))
    return fields


def _json_text(value: Any, what: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        kind = "null" if value is None else "a list or an object"
        raise UsageError(f"{what} is {kind}, where a text or a number belongs")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} holds half a character, \\u{ord(value[error.start]):04x}: mend the text") from error
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _without_byte_order_mark(lines: TextIO) -> Iterator[str]:
    first = next(lines, "")
    return chain([first.removeprefix("\ufeff")], lines)


def _plain_number(label: str) -> str:
    """Spell a whole number in the one usual way: the published programs read CSV labels as numbers."""
    number = re.fullmatch(r"\s*0*(\d+)\s*", label, re.ASCII)
    return number[1] if number else label


def _format_tsv(fields: Sequence[str], task: Task) -> str:
    return "\t".join(fields) + "\n"


def _format_csv(fields: Sequence[str], task: Task) -> str:
    """Quote a field where it needs it: as Python's csv module and pandas do.

    They leave a lone carriage return bare, though, at which readers would end the row.
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
"""How a file is read and written, by its ending."""

ENDINGS = tuple(_FORMATS)
"""The endings that a user's own files may have."""
