"""Read examples from a task's files: find the file of a split, check each row, and turn it into an example."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from lmntk.data.formats import ENDINGS, Row, preview, read_rows
from lmntk.data.tasks import REGRESSION_RANGE, Task, as_number, join_columns
from lmntk.errors import DataError, FileError, MissingSplitError, UnknownNameError, suggest
from lmntk.storage.wording import quantity

logger = logging.getLogger(__name__)

_SEPARATORS = {
    "\t": "call a file with tabs .tsv",
    ",": "call a file with commas .csv",
    ";": "separate its columns by commas, not by ';'",
}
"""What helps against a header of one column, by the character that should have split it."""


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
        texts: The sentences, as many as the task has.
        label: The label, or the score of a regression task, as the file spells it.
    """

    texts: tuple[str, ...]
    label: str


def check_queries(task: Task, queries: Iterable[tuple[str, ...]]) -> None:
    """Refuse texts of a user's own that cannot be an example of a task.

    Args:
        task: The task.
        queries: The sentences of each text.

    Raises:
        DataError: A text has another number of sentences than the task, or a sentence is blank.
    """
    for number, sentences in enumerate(queries):
        if len(sentences) != task.num_sentences:
            given = quantity(len(sentences), "sentence")
            raise DataError(
                f"`query` has {given}, but an example of {task.name} has {task.num_sentences}: give each sentence in "
                "quotes of its own",
                example=number,
            )
        if not all(sentence.strip() for sentence in sentences):
            raise DataError("`query` has a blank sentence: give a text", example=number)


def read_examples(task: Task, path: str | Path) -> list[Example]:
    r"""Read the examples of a file, in its order.

    Args:
        task: The task whose file it is.
        path: The file.

    Raises:
        FileError: The file cannot be read or holds no example.
        DataError: A row is too short or has an unknown label; `data` has path and line.
        UnknownNameError: The header lacks a column that the user named.

    Examples:
        >>> import tempfile
        >>> from lmntk.data.tasks import find_task
        >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        ...     print("sentence\tlabel\na moving story\t1", file=file, flush=True)
        ...     read_examples(find_task("SST-2"), file.name)
        [Example(texts=('a moving story',), label='1')]
    """
    examples: list[Example] = []
    short_lines: list[int] = []
    empty_lines: list[int] = []
    task, header, rows = open_examples(task, path)
    if task.numbered and (header is None or header.line):  # lines of JSON have names
        how = "names columns of the header"
        if header is None:
            how = "counts columns from 0, and the first line is an example"
        logger.warning("%s: `custom_columns=%s` %s", path, join_columns(task.columns), how)
    for line, fields, _ in rows:
        if len(fields) < task.min_columns:
            if not task.skip_short_rows:
                raise DataError(
                    f"{path} line {line} has {quantity(len(fields), 'column')}, but a row of {task.name} has at least "
                    f"{task.min_columns}: correct or remove the line",
                    **{"path": path, "line": line},
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
        raise FileError(f"{path} holds no examples", path=path)
    if empty_lines:
        logger.warning(
            "%s: %d of %d examples have an empty text (the first is line %d)",
            *(path, len(empty_lines), len(examples), empty_lines[0]),
        )
    if not task.header and not task.labels:
        _check_first_label([example.label for example in examples], path)
    return examples


def open_examples(task: Task, path: str | Path) -> tuple[Task, Row | None, Iterator[Row]]:
    """Open a file and read its header.

    Args:
        task: The task whose file it is.
        path: The file.

    Returns:
        The task, with the user's columns at their places in this file; the header, if there is one; the rows.

    Raises:
        FileError: The file holds no example.
        UnknownNameError: The header lacks a column that the user named.
        DataError: The first line is an example where a header belongs. While rows are taken: see `formats.read_rows`,
            or a row of a user's file has more or fewer columns than the first line.
    """
    rows = read_rows(task, path)
    header = next(rows, None) if task.header else None
    if not task.columns:
        if header is not None:
            _check_header(task, header, path)
        return task, header, rows
    if header is None:
        raise FileError(f"{path} holds no examples", path=path)
    names = [name.strip() for name in header.fields]
    if task.numbered and not set(names) >= set(task.columns):
        places = [int(column) for column in task.columns]
        if max(places) >= len(names):
            raise UnknownNameError(
                f"{path}: there is no column {max(places)}: its first line has {quantity(len(names), 'column')}, "
                f"counted from 0, and none with the name '{max(places)}'; give `custom_columns` others",
                **{"name": str(max(places)), "kind": "column", "options": names, "path": path},
            )
        located = replace(task, text_columns=tuple(places[:-1]), label_column=places[-1], header=False)
        return located, None, _check_row_width(chain([header], rows), len(names), path, "first line")
    places = [_column_index(column, names, path) for column in task.columns]
    located = replace(task, text_columns=tuple(places[:-1]), label_column=places[-1])
    return located, header, _check_row_width(rows, len(names), path)


def _check_header(task: Task, header: Row, path: str | Path) -> None:
    """Refuse an example in place of the header, since it would be skipped."""
    if len(header.fields) < task.min_columns:
        return
    label = header.fields[task.label_column].removeprefix("\ufeff").strip()
    if _is_label(task, label):
        raise DataError(
            f"{path} line 1 is an example with the label '{label}', where a file of {task.name} has the names of its "
            f"columns: put a line with the names of its {quantity(len(header.fields), 'column')} before it",
            **{"path": path, "line": 1, "label": label},
        )


def _check_first_label(labels: list[str], path: str | Path) -> None:
    """Refuse a header in place of the first example, where only the label can show which it is."""
    if len(labels) > 1 and labels[0] not in labels[1:]:
        raise DataError(
            f"{path} line 1 has the label '{preview(labels[0])}', which no other line has: if it is the header, give "
            "`custom_columns` its names; if it is an example, put it after another",
            **{"path": path, "line": 1, "label": labels[0]},
        )


def _column_index(column: str, names: list[str], path: str | Path) -> int:
    """Find a user's column in the header of a file."""
    if names.count(column) == 1:
        return names.index(column)
    data = {"name": column, "kind": "column", "options": names, "path": path}
    if column in names:
        sentence = f"{path}: its header has '{column}' {names.count(column)} times: give each column its own name"
        raise UnknownNameError(sentence, **data)
    other = next((mark for mark in _SEPARATORS if mark in names[0]), None) if len(names) == 1 else None
    hint = "" if other is None else f"; {_SEPARATORS[other]}"
    unknown = suggest(column, map(preview, filter(None, names)), "column")
    raise UnknownNameError(
        f"{path}: {unknown}; `custom_columns` names columns of the first line, which is the header{hint}", **data
    )


def _check_row_width(rows: Iterator[Row], width: int, path: str | Path, first: str = "header") -> Iterator[Row]:
    for row in rows:
        if len(row.fields) != width:
            raise DataError(
                f"{path} line {row.line} has {quantity(len(row.fields), 'column')}, but the {first} has {width}: is "
                "there a tab or a line end in a text?",
                **{"path": path, "line": row.line},
            )
        yield row


def check_label(task: Task, label: str, path: str | Path, line: int) -> None:
    """Check that a label is one of the task's, or a score within its scale.

    Args:
        task: The task.
        label: The label as the file spells it.
        path: The file, for error messages.
        line: The line, for error messages.

    Raises:
        DataError: It is not; `data` has path, line and label.
    """
    if _is_label(task, label):
        return
    data = {"path": path, "line": line, "label": label}
    if task.regression:
        low, high = REGRESSION_RANGE
        scale = f"a number from {low:g} to {high:g}"
        raise DataError(f"{path} line {line}: '{label}' is not a score of {task.name}, {scale}", **data)
    if not task.labels:
        raise DataError(f"{path} line {line} has no label: fill it in, or remove the line", **data)
    hint = ", the keys of `mapping`" if task.columns else ""
    if line == 1 and not task.header and task.columns:
        hint += "; if line 1 is the header, give `custom_columns` its names"
    elif line == 1 and not task.header:
        hint += f" (files of {task.name} have no header line)"
    raise DataError(
        f"{path} line {line}: label '{preview(label)}' is not among the labels of {task.name}, "
        f"{', '.join(task.labels)}{hint}{_spelling_hint(label, task.labels)}",
        **data,
    )


def _is_label(task: Task, label: str) -> bool:
    if task.regression:
        low, high = REGRESSION_RANGE
        return (score := as_number(label)) is not None and low <= score <= high
    return label in task.labels or bool(task.columns and not task.labels and label)


def _spelling_hint(label: str, labels: Iterable[str]) -> str:
    """Say how a label differs from a known one that is spelled almost like it."""
    number = as_number(label)
    for known in labels:
        if known.strip().casefold() == label.casefold():
            kind = "surrounding spaces" if known.strip() == label else "case"
            return f"; '{label}' and '{known}' differ only in {kind}: use one spelling"
        if number is not None and as_number(known) == number:
            return f"; '{label}' and '{known}' are the same number: use one spelling"
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
