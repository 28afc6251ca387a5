"""Download a file over HTTP: an interrupted download continues, and the file has its name only when it is complete."""

import contextlib
import fcntl
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from lmntk.errors import FileError, UsageError
from lmntk.interrupts import Stopped
from lmntk.storage.atomic import write_text
from lmntk.storage.readers import read_json
from lmntk.storage.wording import data_size

PARTIAL = ".partial"
TIMEOUT_SECONDS = 60
PAUSES = (1, 2, 4, 8)
"""Seconds to wait after an attempt that received nothing new."""
CHUNK = 2**18
_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)

Announce = Callable[[int | None, int], None]
"""Called with a file's size, None if the server does not send it, and the bytes received; may raise UsageError."""


class DownloadError(UsageError):
    """An address gives no file; data: ``url``, ``reason``."""


@dataclass(frozen=True)
class Version:
    """One version of the file at an address.

    Attributes:
        url: The address.
        size: Bytes of the file; None if the server does not send its size.
        validator: The strong ETag or else Last-Modified, ``""`` if the server sends neither.
    """

    url: str
    size: int | None
    validator: str


def partial_of(target: Path) -> Path:
    """Return where the received part of a file is kept until the file is complete."""
    return target.with_name(target.name + PARTIAL)


def download(url: str, target: Path, announce: Announce, remedy: str) -> None:
    """Fetch a file, or the rest of it; the received part is kept when the connection or the program is interrupted.

    Args:
        url: An http or https address.
        target: The path of the complete file; see `partial_of` for the path until then.
        announce: Called before bytes are received.
        remedy: What else the user can do if the address gives no file, for the error.

    Raises:
        DownloadError: The address gives no file.
        FileError: The file cannot be written.
    """
    partial = partial_of(target)
    with _claimed(partial) as file:
        if target.exists():
            return  # another process completed it in the meantime
        try:
            _fetch(url, file, _note_of(partial), announce, remedy)
        except Stopped as stop:
            stop.kept_summary = f"{partial} keeps the {data_size(_size(file))} received so far"
            raise
        os.fsync(file.fileno())
        partial.replace(target)
        _note_of(partial).unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[BinaryIO]:
    """Open the file to append to, locked for this process."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            while True:
                file = stack.enter_context(partial.open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between opening and locking, another process may have completed and renamed it.
                if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                    break
            try:
                yield file
            finally:
                if not _size(file):
                    partial.unlink(missing_ok=True)
                    _note_of(partial).unlink(missing_ok=True)
    except BlockingIOError as error:
        raise FileError(f"another process is fetching {partial}: wait until it is done", path=partial) from error
    except OSError as error:
        message = f"cannot write {partial} ({error.strerror}): make room, or name another folder"
        raise FileError(message, path=partial) from error


def _fetch(url: str, file: BinaryIO, note: Path, announce: Announce, remedy: str) -> None:
    """Repeat until the file is complete; give up after a few attempts in a row without anything new."""
    known = _read_note(note)
    if known is not None and known.url == url and known.size == _size(file):
        return
    furthest, vain, reached = _size(file), 0, False
    while True:
        try:
            with _open(url, _size(file), _read_note(note)) as response:
                reached = True
                complete = _receive(url, response, file, note, announce)
            if complete:
                return
            reason = "the connection was dropped"
        except _FileError as error:
            raise error.cause from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            reason = _in_words(error)
            is_worth_repeating = code in _RETRIED_STATUSES if code else reached
            if not is_worth_repeating:
                raise DownloadError(f"cannot fetch {url} ({reason}): {remedy}", url=url, reason=reason) from error
        vain = 0 if _size(file) > furthest else vain + 1
        furthest = max(furthest, _size(file))
        if vain > len(PAUSES):
            raise DownloadError(
                f"cannot fetch {url} ({reason}, {vain} times with nothing new): the {data_size(_size(file))} received "
                f"so far are kept, and the same command continues; or {remedy}",
                url=url,
                reason=reason,
            )
        print(f"{reason} after {data_size(_size(file))}: trying again", flush=True)
        time.sleep(PAUSES[vain - 1] if vain else 0)


class _FileError(Exception):
    """The disk refused received bytes."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _open(url: str, have: int, known: Version | None) -> http.client.HTTPResponse:
    """Request the missing part of a file, or all of it if the server cannot send just that."""
    if have and known is not None and known.url == url:
        headers = {"Range": f"bytes={have}-"} | ({"If-Range": known.validator} if known.validator else {})
        try:
            response = _ask(url, headers)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()
        else:
            # A server may ignore If-Range: compare the version that it sends.
            if response.status != http.client.PARTIAL_CONTENT or (_start(response), _version(url, response)) == (
                have,
                known,
            ):
                return response
            response.close()
    return _ask(url, {})


def _ask(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "lmntk", "Accept-Encoding": "identity"} | headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def _start(response: http.client.HTTPResponse) -> int:
    """Return the byte of the file that a response begins with; -1 if the server does not say."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


def _version(url: str, response: http.client.HTTPResponse) -> Version:
    headers = response.headers
    if response.status == http.client.PARTIAL_CONTENT:
        size = headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = headers.get("Content-Length", "")
    tag = headers.get("ETag", "")
    # A weak ETag promises equivalent content, not equal bytes.
    validator = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    return Version(url, int(size) if size.isdecimal() else None, validator)


def _receive(url: str, response: http.client.HTTPResponse, file: BinaryIO, note: Path, announce: Announce) -> bool:
    """Append what the server sends; return whether the file is complete."""
    version, have = _version(url, response), _size(file)
    with _marking_disk_errors():
        if response.headers.get_content_type() == "text/html":
            message = f"{url} gives a web page and no archive: look at it in a browser (is there a log-in?)"
            raise DownloadError(message, url=url, reason="a web page")
        if not _start(response):
            _restart(version, file, note, have)
            have = 0
        announce(version.size, have)
    with tqdm(
        total=version.size, initial=have, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None
    ) as bar:
        while chunk := response.read(CHUNK):
            with _marking_disk_errors():
                file.write(chunk)
                file.flush()
            bar.update(len(chunk))
    return version.size is None or _size(file) == version.size


def _restart(version: Version, file: BinaryIO, note: Path, have: int) -> None:
    known = _read_note(note)
    if have:
        if known is None:
            reason = "the part received earlier has no record of its address"
        elif known.url != version.url:
            reason = f"the part received earlier is of {known.url}"
        elif known != version:
            reason = "the file on the server has changed"
        else:
            reason = "the server sends complete files only"
        print(f"{reason}: starting again", flush=True)
    # The bytes always match the note beside them, wherever this is interrupted.
    file.truncate(0)
    write_text(note, json.dumps(asdict(version)))


@contextlib.contextmanager
def _marking_disk_errors() -> Iterator[None]:
    """Keep errors of the disk apart from errors of the network."""
    try:
        yield
    except OSError as error:
        raise _FileError(error) from error


def _note_of(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _read_note(note: Path) -> Version | None:
    try:
        return Version(**read_json(note))
    except (OSError, ValueError, TypeError):
        return None


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _in_words(error: Exception) -> str:
    """Describe an error of the network in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {TIMEOUT_SECONDS} seconds"
    if isinstance(reason, http.client.IncompleteRead | ConnectionResetError | http.client.RemoteDisconnected):
        return "the connection was dropped"
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return " ".join(text.split()) or type(error).__name__
