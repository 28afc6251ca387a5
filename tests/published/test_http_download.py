"""Downloads: what was received is never lost nor mixed up, whatever server and network do."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from archive_server import HALF, SGD, SMALL_ZIP, UNPACKED, Place, below, kernels, serving, zip_of
from lmntk.errors import FileError
from lmntk.published import http_download
from lmntk.published.http_download import DownloadError


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving(tmp_path, capsys, monkeypatch) as place:
        yield place


@pytest.mark.parametrize("validator", ["etags", "dates", "neither"])
def test_an_interrupted_download_continues_with_only_the_rest(
    place: Place, monkeypatch: pytest.MonkeyPatch, validator: str
) -> None:
    class Stopping(tqdm):
        came = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.came += n or 0
            if self.came >= 3000:
                os.kill(os.getpid(), signal.SIGINT)
            return super().update(n)

    place.mirror.etags, place.mirror.dates = validator == "etags", validator == "dates"
    place.mirror.files[SGD] = SMALL_ZIP
    partial = http_download.partial_of(place.cache / SGD)
    with monkeypatch.context() as patch:
        patch.setattr(http_download, "tqdm", Stopping)
        patch.setattr(http_download, "CHUNK", 1000)
        outcome = place.call()
    assert outcome.status == 130
    assert outcome.err.startswith(f"stopped by SIGINT: {partial} keeps the 3.0 kB")
    assert partial.read_bytes() == SMALL_ZIP[:3000]
    place.mirror.sent.clear()
    out = place.get("--keep_archives")
    assert ", 3.0 kB of it are here already; " in out
    assert place.mirror.asked[1:] == [(SGD, "bytes=3000-")]
    assert place.mirror.sent == [len(SMALL_ZIP) - 3000]
    assert (place.cache / SGD).read_bytes() == SMALL_ZIP
    assert place.unpacked() == UNPACKED
    assert not partial.exists()


def test_a_dropped_connection_is_taken_up_in_the_same_call(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.drop_after = [HALF, 100]
    assert place.get().count("the connection was dropped after ") == 2
    assert place.mirror.sent == [HALF, 100, len(SMALL_ZIP) - HALF - 100]
    assert place.unpacked() == UNPACKED


def test_a_busy_server_is_asked_again_and_given_up_at_last(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.statuses = [503, 429]
    assert "503 Service Unavailable after 0 bytes: trying again" in place.get()
    place.mirror.statuses = [503] * 9
    shutil.rmtree(place.result)
    assert place.refuse(DownloadError).data["reason"] == "503 Service Unavailable"
    assert len(place.mirror.statuses) == 4


def test_a_server_that_always_drops_is_given_up_with_what_came(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.drop_after = [500] + [0] * 5
    sentence = str(place.refuse(DownloadError))
    assert "5 times with nothing new" in sentence and "500 bytes" in sentence
    assert http_download.partial_of(place.cache / SGD).read_bytes() == SMALL_ZIP[:500]


def test_a_server_without_ranges_sends_the_file_again_but_not_for_ever(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.ranges = False
    place.mirror.drop_after = [HALF]
    assert "the server sends complete files only" in place.get()
    assert place.mirror.sent == [HALF, len(SMALL_ZIP)]
    assert place.unpacked() == UNPACKED
    shutil.rmtree(place.result)
    place.mirror.drop_after = [HALF] * 20
    assert "5 times with nothing new" in str(place.refuse(DownloadError))


@pytest.mark.parametrize("heeds", [True, False], ids=["If-Range heeded", "If-Range ignored"])
def test_a_file_that_has_changed_in_between_is_fetched_anew(place: Place, heeds: bool) -> None:
    place.mirror.files[SGD] = zip_of(below("old/16-42", kernels("sst-2", 2, n=24)))
    place.mirror.drop_after = [HALF] + [0] * 5
    place.refuse(DownloadError)
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.heeds_if_range = heeds
    assert "the file on the server has changed" in place.get()
    assert place.unpacked() == UNPACKED
    assert place.mirror.sent[-1] == len(SMALL_ZIP)


def test_a_part_that_nothing_tells_of_is_not_built_upon(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.cache.mkdir()
    http_download.partial_of(place.cache / SGD).write_bytes(b"half of something")
    assert "has no record of its address" in place.get()
    assert place.unpacked() == UNPACKED


def test_a_part_of_a_file_of_another_address_is_not_built_upon(place: Place) -> None:
    place.mirror.files |= {SGD: bytes(9000), f"other/{SGD}": SMALL_ZIP}
    place.mirror.drop_after = [1000] + [0] * 5
    place.refuse(DownloadError)
    out = place.get("--base_url", f"{place.mirror.url}/other/")
    assert f"the part received earlier is of {place.mirror.url}/{SGD}: " in out
    assert place.unpacked() == UNPACKED


def test_a_part_that_is_whole_needs_a_name_only(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.drop_after = [len(SMALL_ZIP) - 1] + [0] * 5
    place.refuse(DownloadError)
    with http_download.partial_of(place.cache / SGD).open("ab") as file:
        file.write(SMALL_ZIP[-1:])
    place.mirror.asked.clear()
    place.get()
    assert place.unpacked() == UNPACKED
    assert place.mirror.asked == []


def test_an_archive_of_unknown_size_is_installed(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.tells_size = False
    assert "of unknown size" in place.get()
    assert place.unpacked() == UNPACKED


def test_two_processes_do_not_write_one_archive(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    with http_download._claimed(http_download.partial_of(place.cache / SGD)):
        assert "another process" in str(place.refuse(FileError))
    place.get()


def test_a_disk_that_fills_up_is_named_and_not_taken_for_the_network(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.mirror.files[SGD] = SMALL_ZIP
    monkeypatch.setattr(http_download, "write_text", full)
    error = place.refuse(FileError)
    assert error.data == {"path": http_download.partial_of(place.cache / SGD)}
    assert "No space left on device" in str(error)


def test_an_address_without_an_archive_is_named_with_the_reason(place: Place) -> None:
    url = f"{place.mirror.url}/{SGD}"
    error = place.refuse(DownloadError)
    assert error.data == {"url": url, "reason": "404 Not Found"}
    assert "`base_url`" in str(error) and str(place.cache / SGD) in str(error)
    assert list(place.cache.iterdir()) == []
    place.mirror.files[SGD] = b"<html>"
    place.mirror.content_type = "text/html; charset=utf-8"
    assert place.refuse(DownloadError).data == {"url": url, "reason": "a web page"}
    error = place.refuse(DownloadError, "--base_url", "http://127.0.0.1:1/")
    assert error.data == {"url": f"http://127.0.0.1:1/{SGD}", "reason": "Connection refused"}
    https = place.mirror.url.replace("http", "https")
    assert place.refuse(DownloadError, "--base_url", https).data["url"] == f"{https}/{SGD}"
    assert place.mirror.asked == [(SGD, None), (SGD, None)]


def test_a_server_that_does_not_answer_is_given_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(http_download.urllib.request, "urlopen", silent)
    assert place.refuse(DownloadError).data["reason"] == "no answer within 60 seconds"
