"""Zip archives from elsewhere: nothing of an archive is written that could land outside or is not what it says."""

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
    """An archive that does not hold what its table of contents says."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive all of whose members are safe to write.

    Args:
        path: The archive.

    Raises:
        DamagedArchiveError: It is no zip archive.
        FileError: It cannot be read; or names the member that is a link, or would land outside of a folder.
    """
    with contextlib.ExitStack() as stack:
        with _damage_told(path, "its table of contents"):
            archive = stack.enter_context(zipfile.ZipFile(path))
        if all(member.header_offset for member in archive.infolist()) and archive.infolist():
            # Of an archive that was cut, zipfile finds the contents of a tensors' file within: a zip archive itself.
            raise DamagedArchiveError(f"{path} is damaged: its end is missing")
        seen = set()
        for member in archive.infolist():
            danger = _danger(member) or ("is there twice" if member.filename in seen else "")
            if danger:
                raise FileError(
                    f"{path} was not unpacked: its member {member.orig_filename!a} {danger}, which no archive of "
                    "kernels has; look where it comes from, and remove it to fetch another"
                )
            seen.add(member.filename)
        yield archive


def _danger(member: zipfile.ZipInfo) -> str:
    """What speaks against writing a member, as a predicate; nothing where all is well."""
    # zipfile cuts names at a zero byte: what counts is the name as the archive has it.
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
    """Read members to the end and compare their checksums; nothing is written.

    Args:
        archive: From `opened`.
        members: What to read of it.
        advance: Called with the number of bytes read, again and again.

    Raises:
        DamagedArchiveError: Names the member that is damaged, or that has more bytes than the archive announces.
    """
    for member in members:
        with _damage_told(_path(archive), f"its member {member.filename}"), archive.open(member) as source:
            while chunk := source.read(CHUNK):
                advance(len(chunk))


def copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO) -> None:
    """Write the bytes of a member that `check` has passed."""
    try:
        with archive.open(member) as source:
            shutil.copyfileobj(source, file, CHUNK)
    except _DAMAGE as error:
        raise DamagedArchiveError(
            f"{archive.filename} has changed: {member.filename} cannot be read any more"
        ) from error


def _path(archive: zipfile.ZipFile) -> Path:
    return Path(archive.filename or "")


@contextlib.contextmanager
def _damage_told(path: Path, part: str) -> Iterator[None]:
    """Tell damage, which zipfile and what it calls raise as errors of many kinds, in one way."""
    try:
        yield
    except OSError as error:
        # bz2 says it of damaged data; the file system's errors have a number.
        if error.errno is not None:
            raise FileError(f"cannot read {path} ({error.strerror})") from error
        raise DamagedArchiveError(f"{path} is damaged: {part} cannot be read ({error})") from error
    except NotImplementedError as error:
        raise FileError(
            f"{path} cannot be unpacked here: {part} is packed in a way that Python does not know ({error}); unpack it "
            "by hand, and name a folder of its kernels with `load_kernels` of run.py"
        ) from error
    except _DAMAGE as error:
        raise DamagedArchiveError(f"{path} is damaged: {part} cannot be read ({error})") from error
