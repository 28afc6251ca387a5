"""A k-shot folder whose train file has some rows of another one's, and whose other splits are the same files."""

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path

from lmntk.data.examples import open_examples
from lmntk.data.formats import format_of, format_row
from lmntk.data.tasks import Task, find_task
from lmntk.errors import FileError
from lmntk.storage.atomic import as_bytes, write_atomically


def subset_files(task: Task, train: Path, examples: Sequence[int]) -> dict[str, bytes]:
    """Return the files of a k-shot folder with some of the train examples, by name.

    Args:
        task: The task of the files.
        train: Its train file, beside which its other splits are.
        examples: The indices of the train examples as `read_examples` counts them, in the order to write.

    Raises:
        FileError: A file cannot be read.
        DataError: A row is not valid.
    """
    located, header, rows = open_examples(task, train)
    written = dataclasses.replace(located, file_format=format_of(task, train))
    texts = [
        row.text or format_row(written, row.fields)
        for row in rows
        if not (task.skip_short_rows and len(row.fields) < located.min_columns)
    ]
    # The header of lines of JSON is made of the task's columns and stands in no file.
    first = format_row(written, header.fields) if header is not None and header.line else ""
    chosen = [texts[example] if texts[example].endswith("\n") else f"{texts[example]}\n" for example in examples]
    files = {train.name: as_bytes(first + "".join(chosen))}
    for name in _other_names(task, train):
        path = train.with_name(name)
        if path.is_file():
            files[name] = path.read_bytes()
    return files


def write_new_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder, which is made if missing.

    Args:
        folder: The folder.
        files: The content of each file, by its name.

    Raises:
        FileError: The folder holds other files of these names, or a file cannot be written.
    """
    for name, content in files.items():
        path = folder / name
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise FileError(
                f"{path} exists already and is not what this command would write: move {folder} away, or choose "
                "another `output_dir`",
                path=path,
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"`output_dir={folder}`: {error.strerror}: choose another folder", path=folder) from error
    for name, content in files.items():
        write_atomically(folder / name, operator.methodcaller("write", content))


def _other_names(task: Task, train: Path) -> list[str]:
    """The names of the files of dev and of the test sets."""
    if task.columns:
        return [path.name for split in ("dev", "test") for path in sorted(train.parent.glob(f"{split}.*"))]
    tests = [task, *([find_task(task.second_test_set)] if task.second_test_set else [])]
    return [task.file_name("dev"), *(each.file_name("test") for each in tests)]
