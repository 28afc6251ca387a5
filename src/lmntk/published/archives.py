"""Zip archives from elsewhere: no member is written that is damaged or would leave its folder."""

import contextlib
import lzma
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lmntk.errors import FileError

CHUNK = 2**20
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError
)  # fmt: skip


class DamagedArchiveError(FileError):
    """An archive does not hold what its table of contents says; data: ``path``."""


class UnsafeArchiveError(FileError):
    """A member of an archive could be written outside its folder; data: ``path``, ``member``, ``danger``."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive whose members are all safe to write.

    Args:
        path: The archive.

    Raises:
        DamagedArchiveError: It is not a complete zip archive.
        UnsafeArchiveError: A member is a link, or would be written outside its folder.
        FileError: The file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        with _reporting_damage(path, "its table of contents"):
            archive = stack.enter_context(zipfile.ZipFile(path))
        if all(member.header_offset for member in archive.infolist()) and archive.infolist():
            # In a truncated archive, zipfile finds the contents of a tensor file, which is a zip archive itself.
            raise DamagedArchiveError(f"{path} is damaged: its end is missing", path=path)
        seen = set()
        for member in archive.infolist():
            danger = _danger(member) or ("occurs twice" if member.filename in seen else "")
            if danger:
                raise UnsafeArchiveError(
                    f"{path} was not unpacked: its member {member.orig_filename!a} {danger}, which does not happen in "
                    "an archive of kernels; check where it comes from, and remove it to fetch another",
                    path=path,
                    member=member.orig_filename,
                    danger=danger,
                )
            seen.add(member.filename)
        yield archive


def _danger(member: zipfile.ZipInfo) -> str:
    """Return the reason against writing a member, as a predicate; empty if it is safe."""
    # zipfile cuts names at a zero byte: check the name as the archive has it.
    name = member.orig_filename
    if not name:
        return "has no name"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in name.split("/"):
        return "climbs out of its folder"
    if "\\" in name or not name.isprintable():
        return "has a backslash or a control character in its name"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is neither file nor folder"
    return "is encrypted" if member.flag_bits & 1 else ""


def check(archive: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo], advance: Callable[[int], object]) -> None:
    """Read members completely and compare their checksums, without writing anything.

    Args:
        archive: An archive from `opened`.
        members: The members to read.
        advance: Called with the number of bytes after each read.

    Raises:
        DamagedArchiveError: A member is damaged, or has more bytes than the archive announces.
    """
    for member in members:
        with _reporting_damage(_path(archive), f"its member {member.filename}"), archive.open(member) as source:
            while chunk := source.read(CHUNK):
                advance(len(chunk))


def copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO) -> None:
    """Write the bytes of a member that `check` has passed."""
    try:
        with archive.open(member) as source:
            shutil.copyfileobj(source, file, CHUNK)
    except _DAMAGE as error:
        message = f"{archive.filename} has changed: {member.filename} cannot be read any more"
        raise DamagedArchiveError(message, path=_path(archive)) from error


def _path(archive: zipfile.ZipFile) -> Path:
    return Path(archive.filename or "")


@contextlib.contextmanager
def _reporting_damage(path: Path, part: str) -> Iterator[None]:
    """Raise the errors of many kinds that zipfile and its codecs raise for damage as one kind."""
    try:
        yield
    except OSError as error:
        # bz2 raises OSError for damaged data; errors of the file system have a number.
        if error.errno is not None:
            raise FileError(f"cannot read {path} ({error.strerror})", path=path) from error
        raise DamagedArchiveError(f"{path} is damaged: {part} cannot be read ({error})", path=path) from error
    except NotImplementedError as error:
        raise FileError(
            f"{path} cannot be unpacked here: Python does not support the compression of {part} ({error}); unpack it "
            "by hand, and name a folder of its kernels with `load_kernels` of run.py",
            path=path,
        ) from error
    except _DAMAGE as error:
        raise DamagedArchiveError(f"{path} is damaged: {part} cannot be read ({error})", path=path) from error
