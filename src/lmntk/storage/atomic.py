"""Files written whole or not at all, and readers of the plain formats that files from outside have."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from lmntk.errors import FileError, UsageError

UNFINISHED = ".tmp"
SAVING = ".saving-"
"""How the name of a folder begins into which a model is being written; `tempfile.mkdtemp` adds eight characters."""


def prepare_output_dir(path: str | Path, flag: str = "--output_dir") -> Path:
    """Make a folder, and a file in it for a moment: permissions alone do not tell what a file system allows.

    Args:
        path: The folder.
        flag: The flag that named it.

    Raises:
        UsageError: Names the flag and what is in the way.
    """
    directory = Path(path)
    probe = directory / f".writable-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{flag} {directory} cannot be written ({error.strerror}): choose another folder, or clear the way"
        ) from error
    return directory


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], *, lasting: bool = True) -> None:
    """Give `path` the bytes that `write` writes, all of them or, after a failure or a kill, none.

    Args:
        path: The file to make or replace.
        write: Called once with an open file in the same folder.
        lasting: Wait until the disk has it, so that it outlives a power cut too.

    Raises:
        UsageError: The file system refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    with _as_file_error(path):
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if lasting:
                _sync_directory(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Give `path` a text in UTF-8, as `write_atomically` does, after making its folder.

    Args:
        path: The file to make or replace.
        text: All of it, line ends included: none is translated.

    Raises:
        FileError: The file system refuses.
    """
    with _as_file_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _as_file_error(path: Path) -> Iterator[None]:
    """Turn what the file system says of a write into a `FileError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = file_error_behind(error)
        if cause is None:
            raise
        raise FileError(
            f"cannot write {path} ({cause.strerror}): make room, or clear the way, and give the same command again; "
            "what was finished is kept",
            path=path,
        ) from error


def remove_unfinished_files(folder: Path) -> None:
    """Remove what was being written into a folder, or into a checkpoint in it, when a process was killed.

    Args:
        folder: No living process may be writing there.
    """
    for place in (folder, *folder.glob("checkpoint-*")):
        for path in place.glob(f".*.{'[0-9a-f]' * 32}{UNFINISHED}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in place.glob(f"{SAVING}{'[a-z0-9_]' * 8}"):
            # What holds anything but a model's files has this name by chance.
            if path.is_dir() and all(file.suffix in (".json", ".safetensors") for file in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)


def file_error_behind(error: BaseException | None) -> OSError | None:
    """What the file system said, where `torch.save` made another error of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _sync_directory(directory: Path) -> None:
    """Let a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
