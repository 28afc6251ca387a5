"""Draw k-shot splits from a task's original files.

``data/original/<TASK>`` becomes ``data/<mode>/<TASK>/<k>-<seed>``: k training and k dev examples of each label, drawn
from the original training file, and the original test set. The draws are those of LM-BFF (Gao et al. 2021) and of the
published kernels (Malladi et al. 2023), line for line. That fixes numpy's legacy generator, a draw of test sets that
differs between CSV and TSV files, and the seeds of CoLA, which build on each other.

A user's own data are drawn in the same way, from original files or from one file, whose rows that are in neither train
nor dev are the test set.
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
from lmntk.data.tasks import MIDDLE_SCORE, TASKS, Task, custom_task, find_task
from lmntk.errors import DataError, FileError, SettingError
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
"""The tasks to draw if none is named, as published."""

MAX_TEST_ROWS = 1000
"""The size to which ``k-shot-1k-test`` cuts a test set."""

_TEST_SEED = 42


class Line(NamedTuple):
    """A row.

    Attributes:
        label: The label by which it is drawn.
        text: Its text in the file, line ending included.
    """

    label: str
    text: str


@dataclass
class Originals:
    """The original files of a task.

    Attributes:
        task: The task of the files.
        header: The header line of the training file, which the dev file gets too; empty if there is none.
        train: The training rows.
        tests: Header and rows of each test set, by the name of the file to write; empty if the rows of `train` that
            are not drawn are the test set.
    """

    task: Task
    header: str
    train: list[Line]
    tests: dict[str, tuple[str, list[Line]]]


def choose_tasks(names: Sequence[str] | None, data_dir: Path) -> list[Task]:
    """Look up tasks by their names, or the usual ones that have a folder; tasks that share a folder count once.

    Args:
        names: The names; None for the usual tasks.
        data_dir: The folder of the tasks' folders.

    Raises:
        UnknownNameError: There is no task of a name.
        FileError: No name is given, and no usual task has a folder.
    """
    tasks = list({(task := TASKS[find_task(name).folder]).name: task for name in names or DEFAULT_TASKS}.values())
    if not names:
        tasks = [task for task in tasks if (data_dir / task.folder).is_dir()]
    if not tasks:
        raise FileError(f"{data_dir} holds none of the usual tasks", path=data_dir)
    return tasks


def missing_originals(task: Task, data_dir: Path) -> Path | None:
    """Return the folder or the first file that a task's original files lack; None if all exist.

    Args:
        task: The task.
        data_dir: The folder of the tasks' folders, ``data/original``.
    """
    folder = data_dir / task.folder
    if not folder.is_dir():
        return folder
    names = [task.original_name("train"), *_test_files(task).values()]
    return next((folder / name for name in names if not (folder / name).is_file()), None)


def read_originals(task: Task, data_dir: Path) -> Originals:
    """Read the original files of a task and check every label.

    Args:
        task: The task.
        data_dir: The folder of the tasks' folders, ``data/original``.

    Raises:
        FileError: A file cannot be read or has no rows.
        DataError: A row has no valid label; `data` has path and line.
    """
    folder = data_dir / task.folder
    header, train = _read_lines(task, folder / task.original_name("train"))
    tests = {name: _read_lines(task, folder / original) for name, original in _test_files(task).items()}
    return Originals(task, header, train, tests)


def read_user_file(task: Task, path: Path) -> Originals:
    """Read one file of a user's data, from which train, dev and test are drawn.

    Args:
        task: A task from `tasks.custom_task`, without labels: those of the file are taken, in order of appearance.
        path: The file.

    Raises:
        FileError: The file cannot be read.
        DataError: A row is not valid, or the labels do not separate classes.
    """
    examples = read_examples(task, path)
    originals = _user_originals(task, [example.label for example in examples], path, None)
    repeated = len(examples) - len({example.texts for example in examples})
    if repeated:
        logger.warning(
            "%s: %d of %d rows repeat the texts of another: train, dev and test may share them",
            *(path, repeated, len(examples)),
        )
    return originals


def read_user_originals(task: Task, folder: Path) -> Originals:
    """Read the train and test files of a user's data; the labels are those of both.

    Args:
        task: As for `read_user_file`.
        folder: The folder of the files.

    Raises:
        FileError: A file is missing, cannot be read, or exists with two endings.
        DataError: A row is not valid, or the labels do not separate classes.
    """
    train, test = find_user_file(folder, "train"), find_user_file(folder, "test")
    if train is None or test is None:
        raise FileError(
            f"{folder} has no {'test' if train else 'train'} file ending in {known_endings()}: put train and test "
            "there, or name one file of all examples with `input`",
            path=folder,
        )
    labels = [example.label for path in (train, test) for example in read_examples(task, path)]
    return _user_originals(task, labels, train, test)


def write_splits(originals: Originals, output_dir: Path, mode: str, k: int, seeds: Sequence[int]) -> Iterator[Path]:
    """Draw and write a k-shot folder for each seed, in order, and yield the folders.

    Args:
        originals: The rows to draw from. If seeds build on each other, every draw changes their order.
        output_dir: The folder that holds the folder of the mode: ``data``.
        mode: One of `KSHOT_MODES`.
        k: Training examples of each label.
        seeds: Seeds of numpy's legacy generator.

    Raises:
        FileError: A file cannot be written, or a user's file that this draw did not write is in its place.
        SettingError: No row is left for the test set.
    """
    _warn_of_rare_labels(originals, mode, k)
    for seed in seeds:
        folder = output_dir / mode / originals.task.folder / f"{k}-{seed}"
        files = draw(originals, mode, k, seed)
        if originals.task.columns:
            _check_no_other_files(folder, files)
        for name, text in files.items():
            write_text(folder / name, text, make_folder=True)
        yield folder


def _check_no_other_files(folder: Path, files: Mapping[str, str]) -> None:
    """Refuse to replace a user's files that this draw did not write, or to write beside some of another ending."""
    paths = [path for split in ("train", "dev", "test") for path in sorted(folder.glob(f"{split}.*"))]
    for path in paths:
        if path.read_bytes() != files.get(path.name, "").encode():
            raise FileError(
                f"{path} exists already and is not what this command would write: move {folder} away, or choose "
                "another `output_dir`, or another name with `task`",
                path=path,
            )


def draw(originals: Originals, mode: str, k: int, seed: int) -> dict[str, str]:
    r"""Draw one split.

    Args:
        originals: The rows to draw from.
        mode: One of `KSHOT_MODES`.
        k: Training examples of each label.
        seed: The seed of numpy's legacy generator.

    Returns:
        The text of each file, by its name.

    Raises:
        SettingError: No row is left for the test set.

    Examples:
        >>> rows = [Line(str(n % 2), f"{n % 2},review {n}\n") for n in range(8)]
        >>> files = draw(Originals(TASKS["mr"], "", rows, {"test.csv": ("", rows[:2])}), "k-shot", k=1, seed=13)
        >>> sorted(files), files["train.csv"]
        (['dev.csv', 'test.csv', 'train.csv'], '1,review 1\n0,review 4\n')
    """
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
            raise SettingError(
                f"`k={k}`: train and dev take all {len(originals.train)} rows of {task.name}, and none is left for "
                "test: lower `k`, or give a file of more rows",
                **{"setting": "k", "value": k},
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


def _user_originals(task: Task, labels: Sequence[str], train: Path, test: Path | None) -> Originals:
    """Read a user's rows, given the label of every row."""
    labels = list(dict.fromkeys(labels))
    if len(labels) < 2:
        raise DataError(f"{train}: all rows have the label '{labels[0]}', but two classes are needed", path=train)
    folded: dict[str, str] = {}
    for label in labels:
        if (other := folded.setdefault(label.casefold(), label)) != label:
            logger.warning("%s: labels '%s' and '%s' differ only in case, and are two classes", train, other, label)
    known = dataclasses.replace(custom_task(task.columns, labels, task.name), file_format=format_of(task, train))
    header, lines = _user_lines(known, train)
    if 2 * len(labels) > len(lines):
        raise DataError(
            f"{train}: column '{task.columns[-1]}' has {len(labels)} labels in {len(lines)} rows: `custom_columns` "
            "names the text columns and, last, that of a label which many rows share",
            path=train,
        )
    if test is None:
        return Originals(known, header, lines, {})
    test_task = dataclasses.replace(known, file_format=format_of(task, test))
    return Originals(known, header, lines, {test_task.file_name("test"): _user_lines(test_task, test)})


def _user_lines(task: Task, path: Path) -> tuple[str, list[Line]]:
    """Read header and rows of a user's file; lines of JSON have no header."""
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
    """Read header and rows. A last line without a line ending gets one, since it may not stay the last."""
    _, header, rows = open_examples(task, path)
    lines = [Line(_sampling_label(task, path, row), format_row(task, row.fields)) for row in rows]
    if not lines:
        raise FileError(f"{path} holds no examples", path=path)
    return format_row(task, header.fields) if header else "", lines


def _sampling_label(task: Task, path: Path, row: Row) -> str:
    # The published sampler strips the whole line first, and with it empty columns at the ends.
    fields = format_row(task, row.fields).strip().split("\t") if task.file_format == "tsv" else row.fields
    if len(fields) <= task.sampling_label_column:
        sentence = f"{path} line {row.line} has no label, which belongs into column {task.label_column + 1}"
        raise DataError(sentence, path=path, line=row.line)
    label = fields[task.sampling_label_column]
    # Rows of QQP that lack columns are drawn as published, by their last column; they are skipped in reading.
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
            "%s: %d rows end in '%s', which is not a label of the task: drawn as published, skipped in reading",
            *(originals.task.name, counts[label], label),
        )


def _join(header: str, lines: Iterable[Line]) -> str:
    return header + "".join(line.text for line in lines)
