"""A server of archives that does wrong what servers do wrong, and a place to fetch published kernels to."""

import contextlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from command_line import Outcome
from lmntk.commands import download
from lmntk.errors import UsageError
from lmntk.published import http_download
from random_kernels import Case

SGD = "prompt-sgd-16-shot.zip"
ASYMMETRIC = "prompt-asymmetric_signgd-16-shot.zip"
NO_PROMPT = "no_prompt-signgd-16-shot.zip"


@dataclass
class Mirror:
    """A server of archives, what it does wrong, and what it was asked and has sent."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: bool = True
    dates: bool = False
    ranges: bool = True
    heeds_if_range: bool = True
    drop_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    content_type: str = "application/zip"
    tells_size: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    url: str = ""

    def validators(self, body: bytes) -> dict[str, str]:
        """ETag and date of a file: others for another."""
        number = sum(body) % 60
        return ({"ETag": f'"{number}"'} if self.etags else {}) | (
            {"Last-Modified": f"Mon, 01 May 2023 10:00:{number:02} GMT"} if self.dates else {}
        )

    def answer(self, name: str, wanted: str | None, if_range: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append((name, wanted))
        if self.statuses:
            return self.statuses.pop(0), {}, b""
        if name not in self.files:
            return 404, {}, b""
        body = self.files[name]
        headers = {"Content-Type": self.content_type} | self.validators(body)
        same = if_range is None or if_range in self.validators(body).values() or not self.heeds_if_range
        if not (self.ranges and wanted and same):
            return 200, headers | ({"Content-Length": str(len(body))} if self.tells_size else {}), body
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return 206, headers | {"Content-Length": str(len(body) - start)}, body[start:]


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's mirror says."""

    server: "Server"

    def do_GET(self) -> None:
        mirror = self.server.mirror
        status, headers, body = mirror.answer(self.path[1:], self.headers["Range"], self.headers["If-Range"])
        if status < 300 and mirror.drop_after:
            body = body[: mirror.drop_after.pop(0)]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        mirror.sent.append(len(body))
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A server with a mirror; a client that goes away is nothing to tell."""

    mirror: Mirror

    def handle_error(self, *_: object) -> None:
        pass


@dataclass
class Place:
    """Where archives and kernels go, and the tool called there."""

    folder: Path
    mirror: Mirror
    capsys: pytest.CaptureFixture[str]

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def argv(self, *flags: str) -> list[str]:
        """The command line; the last of equal flags counts."""
        folders = ["--cache_dir", str(self.cache), "--output_dir", str(self.result)]
        return ["--base_url", self.mirror.url, *folders, *flags]

    def call(self, *flags: str) -> Outcome:
        """Run the tool as the command line does."""
        self.capsys.readouterr()
        return Outcome(download.main(self.argv(*flags)), *self.capsys.readouterr(), messages="")

    def get(self, *flags: str) -> str:
        """Run the tool, which must succeed; return what it printed."""
        outcome = self.call(*flags)
        assert (outcome.status, outcome.err) == (0, "")
        return outcome.out

    def refuse(self, kind: type[UsageError], *flags: str) -> UsageError:
        """Run the tool, which must end with an error of this kind in one line; return that."""
        with pytest.raises(UsageError) as caught:
            download.install_chosen(download.make_parser().read(self.argv(*flags)))
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        return caught.value

    def unpacked(self) -> dict[str, bytes]:
        """All files below the results."""
        paths = sorted(path for path in self.result.rglob("*") if path.is_file())
        return {str(path.relative_to(self.result)): path.read_bytes() for path in paths}


@contextlib.contextmanager
def serving(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Start a mirror on a port of this machine; nobody waits before another try."""
    monkeypatch.setattr(http_download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "*")
    server = Server(("127.0.0.1", 0), Handler)
    server.mirror = Mirror(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield Place(folder, server.mirror, capsys)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def saved(*tensors: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def kernels(task: str, logits: int, asymmetric: bool = False, n: int = 20) -> dict[str, bytes]:
    """The three kernel files of a run, by name."""
    case = Case(logits, features=50, asymmetric=asymmetric, n=n)
    train, test = (
        saved(torch.tensor(kernel), torch.tensor(labels))
        for kernel, labels in ((case.train, case.train_labels), (case.test, case.test_labels))
    )
    return {f"train_kernels_{task}.pt": train, f"dev_kernels_{task}.pt": test, f"test_kernels_{task}.pt": test}


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def zip_of(members: dict[str, bytes] | dict[zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


SST_2 = kernels("sst-2", 2)
SMALL = below("SST-2-roberta-base-prompt-kernel-sgd/16-42", SST_2)
SMALL_ZIP = zip_of(SMALL)
HALF = len(SMALL_ZIP) // 2
SST_2_FOLDER = "SST-2-roberta-base-prompt-kernel-published-sgd/16-42"
UNPACKED = below(SST_2_FOLDER, SST_2)
