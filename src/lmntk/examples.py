"""Examples from a task's files: where they are, how they are read, how rows are written.

A TSV line is split on tabs alone, since the quotation marks of GLUE's files belong to the text. A CSV row is
``label,text`` with ordinary quoting. Every value stays the text it is: an ``NA`` in a review is a word, not a gap.
"""

import csv
import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

from lmntk.errors import UsageError
from lmntk.tasks import REGRESSION_RANGE, TASKS, Task

logger = logging.getLogger(__name__)

_NEEDS_QUOTES = re.compile('[",\r\n]')

KSHOT_MODES = ("k-shot", "k-shot-10x", "k-shot-1k-test")
"""The kinds of k-shot data, named like the folders that hold them; see `lmntk.kshot`."""

PUBLISHED_SEEDS = (100, 13, 21, 42, 87)
"""The seeds of LM-BFF's splits, in the order in which it draws them."""


@dataclass(frozen=True)
class Example:
    """One row of a task's file.

    Attributes:
        texts: The sentences, as many as the task has.
        label: The label, or the score of a regression task, as the file has it.
    """

    texts: tuple[str, ...]
    label: str


class Row(NamedTuple):
    """The fields of a row and the line of the file, counted from 1, on which it starts."""

    line: int
    fields: list[str]


def read_examples(task: Task, path: str | Path) -> list[Example]:
    """Read a file of `task`, keeping its order.

    Raises:
        UsageError: The file cannot be read or holds no example, or a row is too short or has an unknown label: the
            sentence names file and line.
    """
    examples: list[Example] = []
    short_lines: list[int] = []
    for line, fields in _rows_below_header(task, path):
        if len(fields) < task.min_columns:
            if not task.skip_short_rows:
                raise UsageError(
                    f"{path} line {line} has {_columns(len(fields))}, but a row of {task.name} has at least "
                    f"{task.min_columns}: mend or remove the line"
                )
            short_lines.append(line)
            continue
        label = fields[task.label_column].strip()
        check_label(task, label, path, line)
        examples.append(Example(tuple(fields[column] for column in task.text_columns), label))
    if short_lines:
        logger.warning(
            "%s: skipped %d of %d rows that have fewer than %d columns (the first is line %d)",
            *(path, len(short_lines), len(short_lines) + len(examples), task.min_columns, short_lines[0]),
        )
    if not examples:
        raise UsageError(f"{path} holds no examples")
    return examples


def check_label(task: Task, label: str, path: str | Path, line: int) -> None:
    """Make sure that `label` is one of the task's, or a score within its scale.

    Raises:
        UsageError: It is not; names file, line, the label and what it may be.
    """
    if task.regression:
        low, high = REGRESSION_RANGE
        if not low <= _score(label) <= high:
            raise UsageError(
                f"{path} line {line}: '{label}' is not a score of {task.name}, a number from {low:g} to {high:g}"
            )
    elif label not in task.labels:
        hint = f" (files of {task.name} have no header line)" if line == 1 and not task.header else ""
        raise UsageError(
            f"{path} line {line}: label '{label}' is not among the labels of {task.name}, "
            f"{', '.join(task.labels)}{hint}"
        )


def read_rows(task: Task, path: str | Path) -> Iterator[Row]:
    """Yield every row of a file in the task's format, the header included; blank lines do not count.

    Raises:
        UsageError: The file cannot be read, is not UTF-8, or is no well-formed CSV; names file and, for CSV, line.
    """
    reader = _FORMATS[task.file_format].read
    with _open(path) as file:
        yield from reader(file, task, path)


def format_row(task: Task, fields: Sequence[str]) -> str:
    """Write one row as text in the task's format, line ending included: the inverse of `read_rows`."""
    return _FORMATS[task.file_format].format(fields)


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece, its folder made where missing: whoever looks finds the old file or the new one.

    Raises:
        UsageError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def split_file(task: Task, data_dir: str | Path, split: str) -> Path:
    """Find the file of a split in a k-shot folder.

    Args:
        task: The task whose file it is.
        data_dir: The folder, such as ``data/k-shot-1k-test/SST-2/16-42``.
        split: ``"train"``, ``"dev"`` or ``"test"``.

    Raises:
        UsageError: Folder or file is missing; says which command makes it.
    """
    folder = Path(data_dir)
    path = folder / task.file_name(split)
    if path.is_file():
        return path
    missing = f"{path} is missing" if folder.is_dir() else f"there is no folder {folder}"
    raise UsageError(f"{missing}: {_how_to_make(task, folder)}")


def _how_to_make(task: Task, folder: Path) -> str:
    """Say which command makes a k-shot folder; its name tells mode, task, k and seed if it is one of ours."""
    tool = "python tools/generate_k_shot_data.py"
    numbers = re.fullmatch(r"(\d+)-(\d+)", folder.name)
    mode = folder.parent.parent.name
    if numbers is None or mode not in KSHOT_MODES:
        return (
            f"make k-shot data with `{tool} --mode k-shot-1k-test --k 16 --task {task.folder}` and give "
            f"--data_dir data/k-shot-1k-test/{task.folder}/16-42"
        )
    owner = next((other for other in TASKS.values() if other.key == folder.parent.name.lower()), task)
    root = folder.parent.parent.parent
    made = root / mode / task.folder / folder.name
    if owner.folder != task.folder:
        return f"the folder is one of {owner.name}: give --task_name {owner.key}, or --data_dir {made} for {task.name}"
    k, seed = numbers.groups()
    command = f"{tool} --mode {mode} --k {k}"
    # Where each seed's draw builds on the one before, the published split comes with the published list of seeds only.
    if not (task.seeds_build_on_each_other and int(seed) in PUBLISHED_SEEDS):
        command += f" --seed {seed}"
    command += f" --task {task.folder}"
    if root.resolve() != Path("data").resolve():
        command += f" --data_dir {shlex.quote(str(root / 'original'))} --output_dir {shlex.quote(str(root))}"
    return f"make it with `{command}`" + ("" if made == folder else f" and give --data_dir {made}")


def _rows_below_header(task: Task, path: str | Path) -> Iterator[Row]:
    rows = read_rows(task, path)
    if task.header:
        next(rows, None)
    return rows


@contextmanager
def _open(path: str | Path) -> Iterator[TextIO]:
    """Open a text file; untranslated line ends, because those within a quoted CSV field are part of it."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: convert it, for instance with iconv -f latin1 -t utf-8") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _read_tsv(file: TextIO, task: Task, path: str | Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
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
                    raise UsageError(
                        f"{path} line {start} has {_columns(len(fields))}, but the rows before it have {width}: is "
                        "there a comma in a text without quotation marks?"
                    )
                fields[task.label_column] = _plain_number(fields[task.label_column])
                yield Row(start, fields)
            last_start, start = start, reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path} line {start}: {error}; is a quotation mark never closed?") from error
    if fields:
        raise UsageError(f"{path} line {last_start}: a quotation mark is opened and never closed")


def _without_byte_order_mark(lines: TextIO) -> Iterator[str]:
    first = next(lines, "")
    return chain([first.removeprefix("\ufeff")], lines)


def _plain_number(label: str) -> str:
    """Spell a whole number in the one usual way: the published programs read CSV labels as numbers."""
    number = re.fullmatch(r"\s*0*(\d+)\s*", label, re.ASCII)
    return number[1] if number else label


def _format_tsv(fields: Sequence[str]) -> str:
    return "\t".join(fields) + "\n"


def _format_csv(fields: Sequence[str]) -> str:
    """Quote a field where it needs it: as Python's csv module and pandas do.

    They leave a lone carriage return bare, though, at which readers would end the row.
    """
    quoted = ['"' + field.replace('"', '""') + '"' if _NEEDS_QUOTES.search(field) else field for field in fields]
    return ",".join(quoted) + "\n"


class _Format(NamedTuple):
    read: Callable[[TextIO, Task, str | Path], Iterator[Row]]
    format: Callable[[Sequence[str]], str]


_FORMATS = {"tsv": _Format(_read_tsv, _format_tsv), "csv": _Format(_read_csv, _format_csv)}


def _score(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _columns(count: int) -> str:
    return f"{count} column{'' if count == 1 else 's'}"
