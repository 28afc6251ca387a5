"""Archives: what is damaged or dangerous is refused before anything of it is written."""

import io
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from archive_server import SGD, SMALL, SMALL_ZIP, SST_2, SST_2_FOLDER, UNPACKED, Place, below, saved, serving, zip_of
from lmntk.errors import FileError
from lmntk.published.archives import DamagedArchiveError, UnsafeArchiveError


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving(tmp_path, capsys, monkeypatch) as place:
        yield place


@pytest.mark.parametrize("content", [b"no archive", SMALL_ZIP[:-40], b"\0" * 5000], ids=["text", "cut", "zeros"])
def test_a_damaged_archive_is_removed(place: Place, content: bytes) -> None:
    place.mirror.files[SGD] = content
    error = place.refuse(DamagedArchiveError)
    assert error.data["path"] == place.cache / SGD
    assert f"{place.mirror.url}/{SGD}" in str(error) and "`base_url`" in str(error)
    assert list(place.cache.iterdir()) == []
    assert place.unpacked() == {}


def test_a_damaged_member_is_found_before_anything_is_written(place: Place) -> None:
    damaged = bytearray(SMALL_ZIP)
    with zipfile.ZipFile(io.BytesIO(SMALL_ZIP)) as archive:
        last = archive.infolist()[-1]
    damaged[last.header_offset + 200 : last.header_offset + 220] = bytes(20)
    place.mirror.files[SGD] = bytes(damaged)
    assert last.filename in str(place.refuse(DamagedArchiveError))
    assert place.unpacked() == {}
    assert list(place.cache.iterdir()) == []
    place.mirror.files[SGD] = SMALL_ZIP
    place.get()
    assert place.unpacked() == UNPACKED


def test_a_member_with_more_bytes_than_announced_is_refused_before_writing(place: Place) -> None:
    body = zip_of(SMALL | {"x/16-13/train_kernels_sst-2.pt": bytes(10**6)})
    place.mirror.files[SGD] = body.replace((10**6).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert "x/16-13/train_kernels_sst-2.pt" in str(place.refuse(DamagedArchiveError))
    assert place.unpacked() == {}


def symlink(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


EVIL = "train_kernels_sst-2.pt"


@pytest.mark.parametrize(
    ("member", "danger"),
    [
        (f"../16-42/{EVIL}", "climbs out of its folder"),
        (f"a/../../16-42/{EVIL}", "climbs out of its folder"),
        (f"/tmp/16-42/{EVIL}", "has an absolute path"),
        (f"C:/16-42/{EVIL}", "has an absolute path"),
        (f"..\\16-42\\{EVIL}", "has a backslash or a control character in its name"),
        (f"a/16-42/{EVIL}\n", "has a backslash or a control character in its name"),
        (f"a\x85\u202e/16-42/{EVIL}", "has a backslash or a control character in its name"),
        (symlink(f"a/16-42/{EVIL}"), "is a symbolic link"),
        (symlink("a"), "is a symbolic link"),
    ],
    ids=str,
)
def test_an_archive_with_an_unsafe_member_is_refused_whole_and_kept(
    place: Place, member: str | zipfile.ZipInfo, danger: str
) -> None:
    place.mirror.files[SGD] = zip_of({**SMALL, member: b"/etc"})
    error = place.refuse(UnsafeArchiveError)
    name = member if isinstance(member, str) else member.filename
    assert error.data == {"path": place.cache / SGD, "member": name, "danger": danger}
    assert place.unpacked() == {}
    assert sorted(path.name for path in place.folder.rglob("*")) == ["cache", SGD, "result"]
    assert (place.cache / SGD).exists()


def test_a_member_without_a_name_is_refused(place: Place) -> None:
    # Python writes no such member: what was its name becomes an extra field, AA of no bytes.
    body = zip_of({**SMALL, "AAAA": b"x"}, compression=zipfile.ZIP_STORED)
    for start, length in ((b"PK\x03\x04", 26), (b"PK\x01\x02", 28)):
        place_of_name = body.index(b"AAAA")
        header = body.rindex(start, 0, place_of_name) + length
        no_name = body[:header] + bytes([0, 0, 4, 0]) + body[header + 4 : place_of_name]
        body = no_name + b"AA\0\0" + body[place_of_name + 4 :]
    place.mirror.files[SGD] = body
    assert place.refuse(UnsafeArchiveError).data["danger"] == "has no name"
    assert place.unpacked() == {}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_would_overwrite_each_other_are_refused(place: Place) -> None:
    body = io.BytesIO(SMALL_ZIP)
    with zipfile.ZipFile(body, "a") as archive:
        archive.writestr(next(iter(SMALL)), b"another")
    place.mirror.files[SGD] = body.getvalue()
    assert place.refuse(UnsafeArchiveError).data["danger"] == "occurs twice"
    (place.cache / SGD).unlink()
    place.mirror.files[SGD] = zip_of(SMALL | below("elsewhere/16-42", SST_2))
    assert "SST-2-roberta-base-prompt-kernel-sgd/16-42/train_kernels_sst-2.pt and elsewhere/16-42/" in str(
        place.refuse(FileError)
    )
    assert place.unpacked() == {}


class Payload:
    """A pickle that would leave a trace if it were run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["kernels", "logits"])
def test_a_pickle_of_something_else_is_named_and_not_run(place: Place, kind: str) -> None:
    member, trace = f"x/16-42/dev_{kind}_sst-2.pt", place.folder / "trace"
    train = {f"x/16-42/{EVIL}": SST_2[EVIL]}
    place.mirror.files[SGD] = zip_of({**train, member: saved(Payload(trace), 1)})
    assert place.refuse(FileError).data == {"path": place.cache / SGD, "member": member}
    assert not trace.exists()
    assert not (place.result / SST_2_FOLDER / f"dev_{kind}_sst-2.pt").exists()
    assert not list(place.result.rglob(".*"))


def test_half_of_an_archive_with_a_complete_archive_in_it_is_damaged(place: Place) -> None:
    whole = zip_of(SMALL, compression=zipfile.ZIP_STORED)
    place.mirror.files[SGD] = whole[: 2 * len(whole) // 3]
    assert place.refuse(DamagedArchiveError).data["path"] == place.cache / SGD
    assert not (place.cache / SGD).exists()
