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
from lmntk.published import http_download


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving(tmp_path, capsys, monkeypatch) as place:
        yield place


@pytest.mark.parametrize("validator", ["etags", "dates", "neither"])
def test_a_stopped_download_says_what_it_keeps_and_goes_on_with_only_the_rest(
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
    assert (outcome.status, outcome.err) == (
        130,
        f"stopped by SIGINT: {partial} keeps the 3.0 kB that came; the same command goes on from there\n",
    )
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


def test_a_server_that_is_busy_is_asked_again_and_one_that_stays_so_is_given_up(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.statuses = [503, 429]
    assert "503 Service Unavailable after 0 bytes: trying again" in place.get()
    place.mirror.statuses = [503] * 9
    shutil.rmtree(place.result)
    assert "(503 Service Unavailable, 5 times with nothing new)" in place.refuse()
    assert len(place.mirror.statuses) == 4


def test_a_server_that_always_drops_is_given_up_with_what_came(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.drop_after = [500] + [0] * 5
    sentence = place.refuse()
    assert "5 times with nothing new): the 500 bytes that came are kept, and the same command goes on" in sentence
    assert http_download.partial_of(place.cache / SGD).read_bytes() == SMALL_ZIP[:500]


def test_a_server_that_sends_whole_files_only_sends_it_anew_but_not_for_ever(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.ranges = False
    place.mirror.drop_after = [HALF]
    assert "the server sends whole files only: starting anew" in place.get()
    assert place.mirror.sent == [HALF, len(SMALL_ZIP)]
    assert place.unpacked() == UNPACKED
    shutil.rmtree(place.result)
    place.mirror.drop_after = [HALF] * 20
    assert "5 times with nothing new" in place.refuse()


@pytest.mark.parametrize("heeds", [True, False], ids=["If-Range heeded", "If-Range ignored"])
def test_a_file_that_has_changed_in_between_is_fetched_anew(place: Place, heeds: bool) -> None:
    place.mirror.files[SGD] = zip_of(below("old/16-42", kernels("sst-2", 2, n=24)))
    place.mirror.drop_after = [HALF] + [0] * 5
    place.refuse()
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.heeds_if_range = heeds
    assert "the server has another file by now: starting anew" in place.get()
    assert place.unpacked() == UNPACKED
    assert place.mirror.sent[-1] == len(SMALL_ZIP)


def test_a_part_that_nothing_tells_of_is_not_built_upon(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.cache.mkdir()
    http_download.partial_of(place.cache / SGD).write_bytes(b"half of something")
    assert "nothing says what the part that is here is of: starting anew" in place.get()
    assert place.unpacked() == UNPACKED


def test_a_part_of_a_file_of_another_address_is_not_built_upon(place: Place) -> None:
    place.mirror.files |= {SGD: bytes(9000), f"other/{SGD}": SMALL_ZIP}
    place.mirror.drop_after = [1000] + [0] * 5
    place.refuse()
    out = place.get("--base_url", f"{place.mirror.url}/other/")
    assert f"the part that is here is of {place.mirror.url}/{SGD}: starting anew" in out
    assert place.unpacked() == UNPACKED


def test_a_part_that_is_whole_needs_a_name_only(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.drop_after = [len(SMALL_ZIP) - 1] + [0] * 5
    place.refuse()
    with http_download.partial_of(place.cache / SGD).open("ab") as file:
        file.write(SMALL_ZIP[-1:])
    place.mirror.asked.clear()
    place.get()
    assert place.unpacked() == UNPACKED
    assert place.mirror.asked == []


def test_a_size_that_is_not_told_does_no_harm(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    place.mirror.tells_size = False
    assert "of a size that the server does not tell" in place.get()
    assert place.unpacked() == UNPACKED


def test_two_processes_do_not_write_one_archive(place: Place) -> None:
    place.mirror.files[SGD] = SMALL_ZIP
    with http_download._claimed(http_download.partial_of(place.cache / SGD)):
        assert "another process is fetching" in place.refuse()
    place.get()


def test_a_disk_that_fills_up_is_named_and_not_taken_for_the_network(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.mirror.files[SGD] = SMALL_ZIP
    monkeypatch.setattr(http_download, "write_text", full)
    sentence = place.refuse()
    assert sentence.startswith(
        f"cannot write {http_download.partial_of(place.cache / SGD)} (No space left on device): "
    )


def test_an_address_without_an_archive_is_one_sentence(place: Place) -> None:
    way_out = (
        f"--base_url names a mirror, and with the archive from elsewhere as {place.cache / SGD} this command goes on"
    )
    url = f"{place.mirror.url}/{SGD}"
    assert place.refuse() == f"cannot fetch {url} (404 Not Found): {way_out}"
    assert list(place.cache.iterdir()) == []
    place.mirror.files[SGD] = b"<html>"
    place.mirror.content_type = "text/html; charset=utf-8"
    assert place.refuse().startswith(f"{url} gives a web page and no archive")
    assert place.refuse("--base_url", "http://127.0.0.1:1/") == (
        f"cannot fetch http://127.0.0.1:1/{SGD} (Connection refused): {way_out}"
    )
    https = place.mirror.url.replace("http", "https")
    assert place.refuse("--base_url", https).startswith(f"cannot fetch {https}/{SGD} (")
    assert place.mirror.asked == [(SGD, None), (SGD, None)]


def test_a_server_that_does_not_answer_is_one_sentence(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(http_download.urllib.request, "urlopen", silent)
    assert "(no answer within 60 seconds): --base_url names a mirror" in place.refuse()
