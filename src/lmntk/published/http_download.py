"""A file fetched over HTTP that goes on where it stopped, and has its name only when it is whole."""

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

from lmntk.errors import UsageError
from lmntk.interrupts import Stopped
from lmntk.storage.atomic import write_text
from lmntk.storage.readers import read_json
from lmntk.storage.wording import data_size

PARTIAL = ".partial"
TIMEOUT_SECONDS = 60
PAUSES = (1, 2, 4, 8)
"""Seconds to wait after a try that got no further than those before."""
CHUNK = 2**18
_WORTH_WAITING = (408, 429, 500, 502, 503, 504)

Announce = Callable[[int | None, int], None]
"""Called with a file's size, where the server tells it, and how much of that is here; may refuse by a UsageError."""


@dataclass(frozen=True)
class Version:
    """Which of the files that a server may have had under an address.

    Attributes:
        url: The address.
        size: Bytes in all, None where the server does not say.
        validator: The strong ETag or else Last-Modified, ``""`` where the server gives neither.
    """

    url: str
    size: int | None
    validator: str


def partial_of(target: Path) -> Path:
    """Where what was received of a file lies until it is whole."""
    return target.with_name(target.name + PARTIAL)


def download(url: str, target: Path, announce: Announce, way_out: str) -> None:
    """Fetch a file, or the rest of it; what was received stays when the connection, or the program, breaks off.

    Args:
        url: An http or https address.
        target: Where the file is to be. Until it is whole it lies beside that, see `partial_of`.
        announce: Called before bytes are received.
        way_out: What else can be done where the address gives no file, for the error.

    Raises:
        UsageError: Names the address and what is wrong there, or the file that cannot be written.
    """
    partial = partial_of(target)
    with _claimed(partial) as file:
        if target.exists():
            return  # by another process, while this one waited for its turn
        try:
            _fetch(url, file, _note_of(partial), announce, way_out)
        except Stopped as stop:
            stop.kept_summary = f"{partial} keeps the {data_size(_size(file))} that came"
            raise
        os.fsync(file.fileno())
        partial.replace(target)
        _note_of(partial).unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed(partial: Path) -> Iterator[BinaryIO]:
    """Open the file to append to, for this process alone."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            while True:
                file = stack.enter_context(partial.open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between opening and locking another process may have finished it, and given it its name.
                if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                    break
            try:
                yield file
            finally:
                if not _size(file):
                    partial.unlink(missing_ok=True)
                    _note_of(partial).unlink(missing_ok=True)
    except BlockingIOError as error:
        raise UsageError(f"another process is fetching {partial}: wait until it is done") from error
    except OSError as error:
        raise UsageError(f"cannot write {partial} ({error.strerror}): make room, or name another folder") from error


def _fetch(url: str, file: BinaryIO, note: Path, announce: Announce, way_out: str) -> None:
    """Try until the file is whole, as long as tries get further or a few times more."""
    known = _read_note(note)
    if known is not None and known.url == url and known.size == _size(file):
        return
    furthest, vain, met = _size(file), 0, False
    while True:
        try:
            with _open(url, _size(file), _read_note(note)) as response:
                met = True
                whole = _receive(url, response, file, note, announce)
            if whole:
                return
            reason = "the connection was dropped"
        except _FileError as error:
            raise error.cause from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            reason = _in_words(error)
            if code not in _WORTH_WAITING if code else not met:
                raise UsageError(f"cannot fetch {url} ({reason}): {way_out}") from error
        vain = 0 if _size(file) > furthest else vain + 1
        furthest = max(furthest, _size(file))
        if vain > len(PAUSES):
            raise UsageError(
                f"cannot fetch {url} ({reason}, {vain} times with nothing new): the {data_size(_size(file))} that "
                f"came are kept, and the same command goes on; or {way_out}"
            )
        print(f"{reason} after {data_size(_size(file))}: trying again", flush=True)
        time.sleep(PAUSES[vain - 1] if vain else 0)


class _FileError(Exception):
    """The disk refused what the network gave."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _open(url: str, have: int, known: Version | None) -> http.client.HTTPResponse:
    """Ask for what is missing; where the server cannot give just that, for all."""
    if have and known is not None and known.url == url:
        headers = {"Range": f"bytes={have}-"} | ({"If-Range": known.validator} if known.validator else {})
        try:
            response = _ask(url, headers)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()
        else:
            # A server may not heed If-Range: what it says of the file counts.
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
    """Where in the file an answer begins."""
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
    # A weak one promises the same meaning, not the same bytes.
    validator = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    return Version(url, int(size) if size.isdecimal() else None, validator)


def _receive(url: str, response: http.client.HTTPResponse, file: BinaryIO, note: Path, announce: Announce) -> bool:
    """Append what the server sends; return whether the file is whole."""
    version, have = _version(url, response), _size(file)
    with _told_apart():
        if response.headers.get_content_type() == "text/html":
            raise UsageError(f"{url} gives a web page and no archive: look at it in a browser (is there a log-in?)")
        if not _start(response):
            _start_anew(version, file, note, have)
            have = 0
        announce(version.size, have)
    with tqdm(
        total=version.size, initial=have, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None
    ) as bar:
        while chunk := response.read(CHUNK):
            with _told_apart():
                file.write(chunk)
                file.flush()
            bar.update(len(chunk))
    return version.size is None or _size(file) == version.size


def _start_anew(version: Version, file: BinaryIO, note: Path, have: int) -> None:
    known = _read_note(note)
    if have:
        if known is None:
            reason = "nothing says what the part that is here is of"
        elif known.url != version.url:
            reason = f"the part that is here is of {known.url}"
        elif known != version:
            reason = "the server has another file by now"
        else:
            reason = "the server sends whole files only"
        print(f"{reason}: starting anew", flush=True)
    # Bytes stand beside a note of their own, wherever this is interrupted.
    file.truncate(0)
    write_text(note, json.dumps(asdict(version)))


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Let errors of the disk not pass for errors of the network."""
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
    """Say in a few words what went wrong on the network."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {TIMEOUT_SECONDS} seconds"
    if isinstance(reason, http.client.IncompleteRead | ConnectionResetError | http.client.RemoteDisconnected):
        return "the connection was dropped"
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return " ".join(text.split()) or type(error).__name__
