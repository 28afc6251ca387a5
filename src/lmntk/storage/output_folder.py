"""The output folder belongs to one run at a time."""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from lmntk.errors import UsageError
from lmntk.storage.atomic import prepare_output_dir, remove_unfinished_files

logger = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[Path]:
    """Make the output folder and keep it for this run; what an earlier one was writing when it died goes.

    The lock is the kernel's own and dies with the process, however that ends.

    Raises:
        UsageError: The folder cannot be written, or another run is at work in it.
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
    """Remove folders on the way to `path` that were not there before and hold nothing at the end."""
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def timestamped_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder of the time's name in another, as ``--sweep`` wants it: month, day, hour, minute and second.

    It goes again if nothing is in it at the end.

    Raises:
        UsageError: It cannot be made.
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
            raise UsageError(f"--output_dir: {path} cannot be made ({error.strerror}): make room there") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.read(lock, 200).decode(errors="replace").strip() or "of unknown owner"
                os.close(lock)
                raise UsageError(
                    f"another run ({owner}) is at work in {folder}: wait for it, or give this one another TAG or "
                    "--output_dir"
                ) from error
            logger.warning("%s cannot be locked (%s): see that no other run writes there", folder, error.strerror)
            return lock
        # The run before may have removed the file between our opening and our locking of it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == path.stat().st_ino:
                break
        os.close(lock)
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
    return lock
