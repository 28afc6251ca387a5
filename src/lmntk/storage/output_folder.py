"""The output folder of a run, which belongs to one run at a time."""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from lmntk.errors import FileError
from lmntk.storage.atomic import prepare_output_dir, remove_unfinished_files

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"


@contextlib.contextmanager
def output_folder_for(path: str | Path, *, sweep: bool, dry_run: bool) -> Iterator[Path]:
    """Provide the folder that a run writes to.

    Args:
        path: `output_dir`.
        sweep: The run writes to a new folder in `path`, named after the time.
        dry_run: Nothing is written: the folder is neither locked nor left behind if it is new.

    Raises:
        FileError: The folder cannot be written, or another run is using it.
    """
    if dry_run:
        with no_leftover_folders(path):
            yield Path(path)
    elif sweep:
        with timestamped_folder(path) as folder, locked_output_folder(folder):
            yield folder
    else:
        with locked_output_folder(path) as folder:
            yield folder


def require_room(folder: str | Path, needed: int, what: str) -> None:
    """Check that a disk has room for what is to be written, before it is computed.

    Args:
        folder: `output_dir`, which exists.
        needed: The bytes that are to be written.
        what: What they are, for a sentence: ``"the features"``.

    Raises:
        FileError: There is too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FileError(
            f"`output_dir={folder}`: {what} take {needed / 2**20:.0f} MB, but {free / 2**20:.0f} MB are free: make "
            "room, or choose another folder",
            path=folder,
        )


@contextlib.contextmanager
def locked_output_folder(path: str | Path) -> Iterator[Path]:
    """Make the output folder, lock it for this run, and remove files that a killed run was writing.

    The operating system releases the lock when the process ends.

    Raises:
        FileError: The folder cannot be written, or another run is using it.
    """
    with no_leftover_folders(path):
        folder = prepare_output_dir(path)
        lock = _lock(folder)
        try:
            remove_unfinished_files(folder)
            yield folder
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)
            os.close(lock)


@contextlib.contextmanager
def no_leftover_folders(path: str | Path) -> Iterator[None]:
    """At the end, remove `path` and its parents if they are new and empty."""
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def timestamped_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder named after the time, ``month_day_hour_minute_second``; remove it if it is empty at the end.

    Args:
        path: The folder to make it in.

    Raises:
        FileError: It cannot be made.
    """
    parent = prepare_output_dir(path)
    name = datetime.now().strftime("%m_%d_%H_%M_%S")
    for number in itertools.count(1):
        # Runs that start within one second must not share a folder.
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock(folder: Path) -> int:
    """Return the open, locked file."""
    path = folder / LOCK_NAME
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FileError(f"`output_dir`: {path} cannot be made ({error.strerror}): make room", path=path) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.read(lock, 200).decode(errors="replace").strip() or "of unknown owner"
                os.close(lock)
                raise FileError(
                    f"another run ({owner}) is at work in {folder}: wait for it, or give this one another TAG or "
                    "`output_dir`",
                    path=folder,
                ) from error
            logger.warning("%s cannot be locked (%s): make sure no other run writes there", folder, error.strerror)
            return lock
        # The previous run may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == path.stat().st_ino:
                break
        os.close(lock)
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock works without its owner's name
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
    return lock
