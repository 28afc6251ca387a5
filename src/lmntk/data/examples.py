"""Examples from a task's files: where they are, how their rows become examples, what is wrong with a row."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from lmntk.data.formats import ENDINGS, Row, columns, read_rows, shown
from lmntk.data.tasks import REGRESSION_RANGE, Task, as_number, spelled_columns
from lmntk.errors import FileError, MissingSplitError, UsageError, suggest

logger = logging.getLogger(__name__)

_SEPARATORS = {
    "\t": "call a file with tabs .tsv",
    ",": "call a file with commas .csv",
    ";": "separate its columns by commas, not by ';'",
}
"""What to do about a header that is not split, by what should have split it."""


@dataclass(frozen=True)
class Example:
    """One row of a task's file.

    Attributes:
        texts: The sentences, as many as the task has.
        label: The label, or the score of a regression task, as the file has it.
    """

    texts: tuple[str, ...]
    label: str


def read_examples(task: Task, path: str | Path) -> list[Example]:
    """Read a file of `task`, keeping its order.

    Raises:
        UsageError: The file cannot be read or holds no example, or a row is too short or has an unknown label: the
            sentence names file and line.
    """
    examples: list[Example] = []
    short_lines: list[int] = []
    empty_lines: list[int] = []
    task, header, rows = open_examples(task, path)
    if task.numbered and (header is None or header.line):  # lines of JSON have names
        _tell_how_columns_are_found(task, header, path)
    for line, fields, _ in rows:
        if len(fields) < task.min_columns:
            if not task.skip_short_rows:
                raise UsageError(
                    f"{path} line {line} has {columns(len(fields))}, but a row of {task.name} has at least "
                    f"{task.min_columns}: mend or remove the line"
                )
            short_lines.append(line)
            continue
        label = fields[task.label_column].strip()
        check_label(task, label, path, line)
        examples.append(Example(tuple(fields[column] for column in task.text_columns), label))
        if not all(map(str.strip, examples[-1].texts)):
            empty_lines.append(line)
    if short_lines:
        logger.warning(
            "%s: skipped %d of %d rows that have fewer than %d columns (the first is line %d)",
            *(path, len(short_lines), len(short_lines) + len(examples), task.min_columns, short_lines[0]),
        )
    if not examples:
        raise UsageError(f"{path} holds no examples")
    if empty_lines:
        logger.warning(
            "%s: %d of %d examples have an empty text (the first is line %d)",
            *(path, len(empty_lines), len(examples), empty_lines[0]),
        )
    if not task.header and not task.labels:
        _require_no_header([example.label for example in examples], path)
    return examples


def open_examples(task: Task, path: str | Path) -> tuple[Task, Row | None, Iterator[Row]]:
    """Begin to read a file.

    Returns:
        The task, with a user's own columns where the file has them; its header, if there is one; its rows.

    Raises:
        UsageError: A column that the user named is not in the header, or there is an example in its place; and, while
            rows are taken, see `formats.read_rows`, or a row of a user's own file is longer or shorter than the
            first.
    """
    rows = read_rows(task, path)
    header = next(rows, None) if task.header else None
    if not task.columns:
        if header is not None:
            _require_header(task, header, path)
        return task, header, rows
    if header is None:
        raise UsageError(f"{path} holds no examples")
    names = [name.strip() for name in header.fields]
    if task.numbered and not set(names) >= set(task.columns):
        places = [int(column) for column in task.columns]
        if max(places) >= len(names):
            raise UsageError(
                f"{path}: there is no column {max(places)}, its first line has {columns(len(names))}, counted from 0, "
                f"and none of the name '{max(places)}': give --custom_columns places or names that are there"
            )
        located = replace(task, text_columns=tuple(places[:-1]), label_column=places[-1], header=False)
        return located, None, _check_row_width(chain([header], rows), len(names), path, "first line")
    places = [_place(column, names, path) for column in task.columns]
    located = replace(task, text_columns=tuple(places[:-1]), label_column=places[-1])
    return located, header, _check_row_width(rows, len(names), path)


def _require_header(task: Task, header: Row, path: str | Path) -> None:
    """Make sure that the first line is none of the examples, which would be passed over."""
    if len(header.fields) < task.min_columns:
        return
    label = header.fields[task.label_column].removeprefix("\ufeff").strip()
    if _is_label(task, label):
        raise UsageError(
            f"{path} line 1 is an example, of label '{label}', where a file of {task.name} has the names of its "
            f"columns: put such a line of {columns(len(header.fields))} before it"
        )


def _require_no_header(labels: list[str], path: str | Path) -> None:
    """Make sure that the first line is an example, where nothing but its label can tell."""
    if len(labels) > 1 and labels[0] not in labels[1:]:
        raise UsageError(
            f"{path} line 1 has the label '{shown(labels[0])}', which no other line has: if it is the header, give "
            "--custom_columns its names; if it is an example, put it behind another"
        )


def _tell_how_columns_are_found(task: Task, header: Row | None, path: str | Path) -> None:
    if header is None:
        taken = "counts columns from 0, and the first line is an example"
    else:
        taken = "names columns of the header"
    logger.warning("%s: --custom_columns %s %s", path, spelled_columns(task.columns), taken)


def _place(column: str, names: list[str], path: str | Path) -> int:
    """Find a user's column in the header of a file."""
    if names.count(column) == 1:
        return names.index(column)
    if column in names:
        raise UsageError(
            f"{path}: its header has '{column}' {names.count(column)} times: give each column its own name"
        )
    other = next((mark for mark in _SEPARATORS if mark in names[0]), None) if len(names) == 1 else None
    hint = "" if other is None else f"; {_SEPARATORS[other]}"
    told = suggest(column, map(shown, filter(None, names)), "column")
    raise UsageError(f"{path}: {told}; --custom_columns names columns of the first line, which is the header{hint}")


def _check_row_width(rows: Iterator[Row], width: int, path: str | Path, first: str = "header") -> Iterator[Row]:
    for row in rows:
        if len(row.fields) != width:
            raise UsageError(
                f"{path} line {row.line} has {columns(len(row.fields))}, but the {first} has {width}: is there a tab "
                "or a line end in a text?"
            )
        yield row


def check_label(task: Task, label: str, path: str | Path, line: int) -> None:
    """Make sure that `label` is one of the task's, or a score within its scale.

    Raises:
        UsageError: It is not; names file, line, the label and what it may be.
    """
    if _is_label(task, label):
        return
    if task.regression:
        low, high = REGRESSION_RANGE
        raise UsageError(
            f"{path} line {line}: '{label}' is not a score of {task.name}, a number from {low:g} to {high:g}"
        )
    if not task.labels:
        raise UsageError(f"{path} line {line} has no label: fill it in, or remove the line")
    hint = ", the keys of --mapping" if task.columns else ""
    if line == 1 and not task.header:
        hint += (
            "; if line 1 is the header, give --custom_columns its names"
            if task.columns
            else f" (files of {task.name} have no header line)"
        )
    raise UsageError(
        f"{path} line {line}: label '{shown(label)}' is not among the labels of {task.name}, "
        f"{', '.join(task.labels)}{hint}{_almost(label, task.labels)}"
    )


def _is_label(task: Task, label: str) -> bool:
    if task.regression:
        low, high = REGRESSION_RANGE
        return (score := as_number(label)) is not None and low <= score <= high
    return label in task.labels or bool(task.columns and not task.labels and label)


def _almost(label: str, labels: Iterable[str]) -> str:
    """Say how a label differs from one that would do, if it is close to one."""
    number = as_number(label)
    for known in labels:
        if known.strip().casefold() == label.casefold():
            kind = "surrounding spaces" if known.strip() == label else "case"
            return f"; '{label}' and '{known}' differ in {kind} alone: spell them alike"
        if number is not None and as_number(known) == number:
            return f"; '{label}' and '{known}' are one number: spell them alike"
    return ""


def split_file(task: Task, data_dir: str | Path, split: str) -> Path:
    """Find the file of a split in a k-shot folder.

    Args:
        task: The task whose file it is.
        data_dir: The folder, such as ``data/k-shot-1k-test/SST-2/16-42``.
        split: ``"train"``, ``"dev"`` or ``"test"``.

    Raises:
        MissingSplitError: The folder or the file is missing. Its `data` has path, folder, task, split and cause.
        FileError: There are several files of the split.
    """
    folder = Path(data_dir)
    path: Path | None
    if task.columns:
        path, name = find_user_file(folder, split), f"{folder} has no {split} file"
    else:
        path = folder / task.file_name(split)
        name = f"{path} is missing"
    if path is not None and path.is_file():
        return path
    cause = name if folder.is_dir() else f"there is no folder {folder}"
    raise MissingSplitError(
        f"{cause}: draw k-shot splits, or name another folder with `data_dir`",
        **{"path": path or folder, "folder": folder, "task": task, "split": split, "cause": cause},
    )


def find_user_file(folder: Path, split: str) -> Path | None:
    """Find the file of a split among a user's own data; None where there is none.

    Raises:
        FileError: There are several.
    """
    found = [path for ending in ENDINGS if (path := folder / f"{split}.{ending}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise FileError(f"{folder} holds {names}: keep one of them", path=folder)
    return found[0] if found else None
