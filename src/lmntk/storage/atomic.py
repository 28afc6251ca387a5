"""Files that are written whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lmntk.errors import FileError

TEMPORARY_SUFFIX = ".tmp"
SAVING = ".saving-"
"""Prefix of a folder into which a model is being written; `tempfile.mkdtemp` adds eight characters."""


def prepare_output_dir(path: str | Path, setting: str = "output_dir") -> Path:
    """Make a folder and check that a file can be made in it: permissions alone do not say what a file system allows.

    Args:
        path: The folder to make.
        setting: The setting that names the folder.

    Raises:
        FileError: The folder cannot be made or written.
    """
    directory = Path(path)
    probe = directory / f".writable-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise FileError(
            f"`{setting}={directory}` cannot be written ({error.strerror}): choose another folder, or free the path",
            path=directory,
            setting=setting,
        ) from error
    return directory


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Give `path` the bytes that `write` writes: all of them or, after a failure or a kill, none.

    Args:
        path: The file to make or replace.
        write: Called once with an open file in the same folder.
        durable: Wait until the bytes are on the disk, so that they survive a power cut.

    Raises:
        FileError: The file system refuses.
    """
    with temporary_file(Path(path)) as file:
        write(file)
        move_into_place(file, Path(path), durable=durable)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` to write and read; it is removed at the end unless `move_into_place` has moved it.

    Raises:
        FileError: The file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    with _as_file_error(path):
        try:
            with temporary.open("x+b") as file:
                yield file
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def move_into_place(file: BinaryIO, path: Path, *, durable: bool = True) -> None:
    """Close a `temporary_file` and rename it to `path`, which it replaces.

    Args:
        file: What `temporary_file` opened.
        path: The path given to it.
        durable: Wait until the disk holds the bytes and the new name.
    """
    file.flush()
    if durable:
        os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(path)
    if durable:
        _sync_directory(path.parent)


def write_text(path: Path, text: str, *, make_folder: bool = False) -> None:
    r"""Write a text in UTF-8 as `write_atomically` does.

    Args:
        path: The file to make or replace.
        text: The whole text; line ends are not translated, and a byte that is not Unicode is escaped as ``\udcff``.
        make_folder: Make the folder if it is missing.

    Raises:
        FileError: The file system refuses.
    """
    if make_folder:
        with _as_file_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(as_bytes(text)))


@contextlib.contextmanager
def _as_file_error(path: Path) -> Iterator[None]:
    """Turn what the file system reports into a `FileError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = cause_in_file_system(error)
        if cause is None:
            raise
        raise FileError(
            f"cannot write {path} ({cause.strerror}): make room, or free the path, and give the same command again; "
            "what was finished is kept",
            path=path,
        ) from error


def remove_unfinished_files(folder: Path) -> None:
    """Remove what a killed process was writing into a folder or a checkpoint in it.

    Args:
        folder: A folder into which no living process writes.
    """
    for place in (folder, *folder.glob("checkpoint-*")):
        for path in place.glob(f".*.{'[0-9a-f]' * 32}{TEMPORARY_SUFFIX}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in place.glob(f"{SAVING}{'[a-z0-9_]' * 8}"):
            # A folder that holds other files has this name by chance.
            if path.is_dir() and all(file.suffix in (".json", ".safetensors") for file in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)


def cause_in_file_system(error: BaseException | None) -> OSError | None:
    """Return the `OSError` that `torch.save` turned into another error; None if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def as_bytes(text: str) -> bytes:
    r"""Encode as UTF-8; what is not Unicode, such as a byte of a folder's name, becomes JSON's escape ``\udcff``."""
    return text.encode(errors="backslashreplace")


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut, if the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
