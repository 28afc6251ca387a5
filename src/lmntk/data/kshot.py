"""Drawing k-shot splits from a task's original files.

``data/original/<TASK>`` becomes ``data/<mode>/<TASK>/<k>-<seed>``: k training and k dev examples of each label, drawn
from the original training file, and the original test set. The draws are those of LM-BFF (Gao et al. 2021) and of the
published kernels (Malladi et al. 2023), line for line. That fixes more than one would choose: numpy's legacy generator,
another way of drawing a test set for CSV files than for TSV files, and CoLA's seeds, which build on each other.

Data of a user's own are drawn alike, from original files or from one file, of which what is neither train nor dev is
the test set.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmntk.data.examples import check_label, find_user_file, open_examples, read_examples
from lmntk.data.formats import Row, format_of, format_row, known_endings
from lmntk.data.tasks import MIDDLE_SCORE, TASKS, Task, custom_task
from lmntk.errors import UsageError
from lmntk.storage.atomic import write_text

logger = logging.getLogger(__name__)

KSHOT_MODES = ("k-shot", "k-shot-10x", "k-shot-1k-test")
"""The kinds of k-shot data, named like the folders that hold them."""

PUBLISHED_SEEDS = (100, 13, 21, 42, 87)
"""The seeds of LM-BFF's splits, in the order in which it draws them."""

DEFAULT_TASKS = (
    *("SST-2", "sst-5", "mr", "cr", "mpqa", "subj", "trec", "CoLA"),
    *("MRPC", "QQP", "STS-B", "MNLI", "SNLI", "QNLI", "RTE"),
)
"""The tasks that are sampled where none is named, as published."""

MAX_TEST_ROWS = 1000
"""What ``k-shot-1k-test`` cuts a test set to."""

_TEST_SEED = 42


class Line(NamedTuple):
    """A row as the files hold it, its line ending included, and the label it is sampled by."""

    label: str
    text: str


@dataclass
class Originals:
    """The original files of a task.

    Attributes:
        task: Whose files they are.
        header: The header line of the training file, which the dev file is given too; empty where there is none.
        train: The training rows.
        tests: Header and rows of each test set, by the name of the file it is to be written to; none where the rows of
            `train` that are not drawn are the test set.
    """

    task: Task
    header: str
    train: list[Line]
    tests: dict[str, tuple[str, list[Line]]]


def missing_originals(task: Task, data_dir: Path) -> Path | None:
    """Name what is not there of a task's original files: its folder or a file, or None if all is there."""
    folder = data_dir / task.folder
    if not folder.is_dir():
        return folder
    names = [task.original_name("train"), *_test_files(task).values()]
    return next((folder / name for name in names if not (folder / name).is_file()), None)


def read_originals(task: Task, data_dir: Path) -> Originals:
    """Read the original files of a task, checking every label.

    Raises:
        UsageError: A file cannot be read, has no rows, or has a row without a valid label; names file and line.
    """
    folder = data_dir / task.folder
    header, train = _read_lines(task, folder / task.original_name("train"))
    tests = {name: _read_lines(task, folder / original) for name, original in _test_files(task).items()}
    return Originals(task, header, train, tests)


def read_own_file(task: Task, path: Path) -> Originals:
    """Read one file of a user's own, to draw train, dev and test from.

    Args:
        task: From `tasks.custom_task`, without labels: they are those of the file, in order of first appearance.
        path: The file.

    Raises:
        UsageError: The file cannot be read, or its rows have no labels that tell classes apart.
    """
    examples = read_examples(task, path)
    originals = _own_originals(task, [example.label for example in examples], path, None)
    repeated = len(examples) - len({example.texts for example in examples})
    if repeated:
        logger.warning(
            "%s: %d of %d rows repeat the texts of another: train, dev and test may share them",
            *(path, repeated, len(examples)),
        )
    return originals


def read_own_originals(task: Task, folder: Path) -> Originals:
    """Read the train and test files of a user's own; as `read_own_file` does, with the labels of both.

    Raises:
        UsageError: As there, or a file is missing or there twice.
    """
    train, test = find_user_file(folder, "train"), find_user_file(folder, "test")
    if train is None or test is None:
        raise UsageError(
            f"{folder} has no {'test' if train else 'train'} file ending in {known_endings()}: put train and test "
            "there, or name one file of all examples with --input"
        )
    labels = [example.label for path in (train, test) for example in read_examples(task, path)]
    return _own_originals(task, labels, train, test)


def write_splits(originals: Originals, output_dir: Path, mode: str, k: int, seeds: Sequence[int]) -> Iterator[Path]:
    """Draw and write a k-shot folder for each seed, in order, and yield the folders.

    Args:
        originals: What to draw from. Where seeds build on each other, the order of the rows changes with every draw.
        output_dir: Where the folder of the mode stands: ``data``.
        mode: One of `KSHOT_MODES`.
        k: Training examples of each label.
        seeds: Seeds of numpy's legacy generator.

    Raises:
        UsageError: A file cannot be written.
    """
    _warn_of_rare_labels(originals, mode, k)
    for seed in seeds:
        folder = output_dir / mode / originals.task.folder / f"{k}-{seed}"
        files = draw(originals, mode, k, seed)
        if originals.task.columns:
            _spare_what_is_there(folder, files)
        for name, text in files.items():
            write_text(folder / name, text)
        yield folder


def _spare_what_is_there(folder: Path, files: Mapping[str, str]) -> None:
    """Refuse to write over files of a user's own, or beside such of another ending, that this draw did not make."""
    paths = [path for split in ("train", "dev", "test") for path in sorted(folder.glob(f"{split}.*"))]
    for path in paths:
        if path.read_bytes() != files.get(path.name, "").encode():
            raise UsageError(
                f"{path} is there already, and not what this command would write: move {folder} away, or choose "
                "another --output_dir, or another name with --task"
            )


def draw(originals: Originals, mode: str, k: int, seed: int) -> dict[str, str]:
    """Draw one split; returns the text of each file by its name."""
    task = originals.task
    # A header is cut off by copying the list, and CSV rows are copied out of a table, so that every seed starts from
    # the file's order; the published sampler shuffles a list without a header in place, again for each seed.
    train = originals.train if task.seeds_build_on_each_other else list(originals.train)
    np.random.RandomState(seed).shuffle(train)
    by_label: dict[str, list[Line]] = {}
    for line in train:
        by_label.setdefault(line.label, []).append(line)
    files = {}
    for name, (header, lines) in originals.tests.items():
        chosen = _cut_test(task, lines) if mode == "k-shot-1k-test" else lines
        files[name] = _join(header, chosen)
    dev_end = k + _dev_per_label(mode, k)
    if not originals.tests:
        drawn = {id(line) for group in by_label.values() for line in group[:dev_end]}
        rest = [line for line in originals.train if id(line) not in drawn]
        if not rest:
            raise UsageError(
                f"--k {k}: train and dev take all {len(originals.train)} rows of {task.name}, and none is left for "
                "test: lower --k, or give a file of more rows"
            )
        chosen = _cut_test(task, rest) if mode == "k-shot-1k-test" else rest
        files[task.file_name("test")] = _join(originals.header, chosen)
    files[task.file_name("dev")] = _join(
        originals.header, (line for group in by_label.values() for line in group[k:dev_end])
    )
    files[task.file_name("train")] = _join(
        originals.header, (line for group in by_label.values() for line in group[:k])
    )
    return files


def _own_originals(task: Task, labels: Sequence[str], train: Path, test: Path | None) -> Originals:
    """Read a user's rows, which have these labels, each as often as it comes."""
    labels = list(dict.fromkeys(labels))
    if len(labels) < 2:
        raise UsageError(f"{train}: all rows have the label '{labels[0]}', where two at least are to be told apart")
    folded: dict[str, str] = {}
    for label in labels:
        if (other := folded.setdefault(label.casefold(), label)) != label:
            logger.warning("%s: labels '%s' and '%s' differ in case alone, and are two classes", train, other, label)
    known = dataclasses.replace(custom_task(task.columns, labels, task.name), file_format=format_of(task, train))
    header, lines = _own_lines(known, train)
    if 2 * len(labels) > len(lines):
        raise UsageError(
            f"{train}: column '{task.columns[-1]}' has {len(labels)} labels in {len(lines)} rows: --custom_columns "
            "names the text columns and, last, that of a label which many rows share"
        )
    if test is None:
        return Originals(known, header, lines, {})
    of_test = dataclasses.replace(known, file_format=format_of(task, test))
    return Originals(known, header, lines, {of_test.file_name("test"): _own_lines(of_test, test)})


def _own_lines(task: Task, path: Path) -> tuple[str, list[Line]]:
    """Read header and rows of a user's own file; lines of JSON have no header."""
    located, header, rows = open_examples(task, path)
    lines = [Line(row.fields[located.label_column].strip(), row.text or format_row(task, row.fields)) for row in rows]
    return format_row(task, header.fields) if header is not None and header.line else "", lines


def _cut_test(task: Task, lines: list[Line]) -> list[Line]:
    if len(lines) <= MAX_TEST_ROWS:
        return lines
    generator = np.random.RandomState(_TEST_SEED)
    if task.file_format == "csv":
        # What pandas' DataFrame.sample(n=1000, random_state=42) picks.
        return [lines[i] for i in generator.choice(len(lines), size=MAX_TEST_ROWS, replace=False)]
    shuffled = lines if task.seeds_build_on_each_other else list(lines)
    generator.shuffle(shuffled)
    return shuffled[:MAX_TEST_ROWS]


def _test_files(task: Task) -> dict[str, str]:
    """Map each test file of a k-shot folder to its original: two for MNLI, whose folder serves two tasks."""
    sharing = [other for other in TASKS.values() if other.folder == task.folder]
    return {other.file_name("test"): other.original_name("test") for other in sharing}


def _read_lines(task: Task, path: Path) -> tuple[str, list[Line]]:
    """Read header and rows. A last line without its line ending is given one: it may not stay the last."""
    _, header, rows = open_examples(task, path)
    lines = [Line(_sampling_label(task, path, row), format_row(task, row.fields)) for row in rows]
    if not lines:
        raise UsageError(f"{path} holds no examples")
    return format_row(task, header.fields) if header else "", lines


def _sampling_label(task: Task, path: Path, row: Row) -> str:
    # The published sampler strips the whole line first, and with it empty columns at the ends.
    fields = format_row(task, row.fields).strip().split("\t") if task.file_format == "tsv" else row.fields
    if len(fields) <= task.sampling_label_column:
        raise UsageError(f"{path} line {row.line} has no label, which belongs into column {task.label_column + 1}")
    label = fields[task.sampling_label_column]
    # Rows of QQP that miss columns are drawn as published, with whatever stands last; they are skipped in reading.
    if not task.skip_short_rows:
        check_label(task, label, path, row.line)
    if task.regression:
        # LM-BFF's sampling counts the middle as high (see `MIDDLE_SCORE`).
        return task.labels[0] if float(label) < MIDDLE_SCORE else task.labels[1]
    return label


def _dev_per_label(mode: str, k: int) -> int:
    return 10 * k if mode == "k-shot-10x" else k


def _warn_of_rare_labels(originals: Originals, mode: str, k: int) -> None:
    wanted = k + _dev_per_label(mode, k)
    counts = Counter(line.label for line in originals.train)
    for label in originals.task.labels:
        if counts[label] < wanted:
            logger.warning(
                "%s: label %s has %d training rows where %d are wanted (%d for train, %d for dev)",
                *(originals.task.name, label, counts[label], wanted, k, wanted - k),
            )
    for label in sorted(counts.keys() - set(originals.task.labels)):
        logger.warning(
            "%s: %d rows end in '%s', which is no label of the task: drawn as published, skipped in reading",
            *(originals.task.name, counts[label], label),
        )


def _join(header: str, lines: Iterable[Line]) -> str:
    return header + "".join(line.text for line in lines)
