"""The table of tasks: the one place that knows labels, prompts, columns and files of each.

Labels, templates, label words and limits are those of LM-BFF (Gao et al. 2021) and of the kernels published with
Malladi et al. 2023 (arXiv 2210.05643). Adding a task is adding a row. Data of a user's own have no row: flags say of
them what a row says of others (`custom_task`).
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmntk.errors import UsageError, suggest


@dataclass(frozen=True)
class Task:
    """What is particular to one task; see `TASKS`.

    Attributes:
        name: The task's usual spelling, ``"SST-2"``.
        labels: The labels as the files hold them, in the order of the logits. For regression the two ends of the scale.
            Empty only for data of a user's own of which nobody has said them: any label will do.
        template: The prompt.
        mapping: The label word of each label.
        text_columns: Where the sentences stand in a row, counted from 0.
        label_column: Where the label stands, counted from 0; -1 is the last column.
        file_format: ``"tsv"`` (split on tabs alone) or ``"csv"``; also the ending of the file names. Empty for data of
            a user's own, whose files say by their endings what they are.
        header: Whether the files start with a line of column names.
        metric: The key of the task's metric in `lmntk.data.metrics.METRICS`.
        metric_prefix: What comes before a metric's name, ``"mnli/"``.
        max_seq_length: Tokens in a prompt, where the task differs from the general default.
        first_sent_limit: Tokens of the first sentence; None is no limit.
        other_sent_limit: Tokens of each further sentence; None is no limit.
        num_sample: Draws of demonstrations, where the task differs from the general default.
        regression: Whether the label is a score between the ends and not a class.
        skip_short_rows: Whether rows that miss columns are passed over: the published QQP files have some.
        split_names: File stems of the splits that are not called train, dev or test.
        data_folder: Name of the task's folder where that is not `name`.
        second_test_set: The task whose test set, in the same folder, is predicted too.
        columns: Of data of a user's own the names of the text columns and, last, of the label's: each file's header
            says where they stand, not `text_columns` and `label_column`. Numbers are places, counted from 0, in a file
            without a header. Empty for the rows of the table.
    """

    name: str
    labels: tuple[str, ...]
    template: str
    mapping: Mapping[str, str]
    text_columns: tuple[int, ...]
    label_column: int
    file_format: str = "tsv"
    header: bool = True
    metric: str = "acc"
    metric_prefix: str = ""
    max_seq_length: int | None = None
    first_sent_limit: int | None = None
    other_sent_limit: int | None = None
    num_sample: int | None = None
    regression: bool = False
    skip_short_rows: bool = False
    split_names: Mapping[str, str] = field(default_factory=dict)
    data_folder: str = ""
    second_test_set: str = ""
    columns: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The lower-case name, as in file names and in the log."""
        return self.name.lower()

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """The metric by which one model is better than another, and the one that is told beside it, if there is one.

        F1 before Matthews before Pearson before accuracy, as in LM-BFF; without `metric_prefix`.
        """
        return _MAIN_METRICS[self.metric]

    @property
    def folder(self) -> str:
        """The name of the task's folder in ``data/original`` and in ``data/<mode>``."""
        return self.data_folder or self.name

    @property
    def num_sentences(self) -> int:
        """How many sentences an example has."""
        return len(self.text_columns)

    @property
    def min_columns(self) -> int:
        """How many columns a row must have: a label counted from the end stands behind the texts."""
        behind_texts = max(self.text_columns) + 1
        return behind_texts + 1 if self.label_column < 0 else max(behind_texts, self.label_column + 1)

    @property
    def sampling_label_column(self) -> int:
        """Where the published sampler looks for the label: at the end of a TSV line unless it stands before the texts.

        It differs from `label_column` for rows of QQP that miss columns, which the sampler does not pass over.
        """
        in_front = 0 <= self.label_column < min(self.text_columns)
        return self.label_column if in_front or self.file_format == "csv" else -1

    @property
    def seeds_build_on_each_other(self) -> bool:
        """Whether the published sampler shuffles the lines of the seed before again (TSV without a header: CoLA)."""
        return self.file_format == "tsv" and not self.header

    @property
    def numbered(self) -> bool:
        """Whether the columns of a user's own data may be places, counted from 0."""
        return bool(self.columns) and all(re.fullmatch("0|[1-9][0-9]{0,5}", column) for column in self.columns)

    def file_name(self, split: str) -> str:
        """Give the name of the file that holds ``train``, ``dev`` or ``test`` in a k-shot folder.

        Without an ending where `file_format` leaves that open; `lmntk.data.examples.split_file` finds the file.
        """
        stem = self.split_names.get(split, split)
        return f"{stem}.{self.file_format}" if self.file_format else stem

    def original_name(self, split: str) -> str:
        """Give the name of the original file that a k-shot folder's ``train`` or ``test`` is drawn from.

        The labels of GLUE's test files were never published: its dev file serves as the test set.
        """
        name = self.file_name(split)
        return name.replace("test", "dev") if self.file_format == "tsv" else name


_MAIN_METRICS = {
    "acc": ("acc",),
    "acc_and_f1": ("f1", "acc"),
    "mcc": ("mcc",),
    "pearson_and_spearman": ("pearson", "spearmanr"),
}

_IT_WAS = "*cls**sent_0*_It_was*mask*.*sep+*"
_THIS_IS = "*cls**sent_0*_This_is*mask*.*sep+*"
_QUESTION = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
_PAIR = "*cls**sent_0**mask*,*+sentl_1**sep+*"
_TOPIC = "*cls**mask*:*+sent_0**sep+*"
_ARTICLE = "*cls**sent_0*_This_article_is_about*mask*_news.*sep+*"

_TWO = ("0", "1")
_SENTIMENT = {"0": "terrible", "1": "great"}
_STARS = {"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"}
_ANSWER_TYPES = {"0": "Description", "1": "Entity", "2": "Expression", "3": "Human", "4": "Location", "5": "Number"}
_NO_YES = {"0": "No", "1": "Yes"}
_ENTAILED = {"entailment": "Yes", "not_entailment": "No"}
_INFERENCE = {"contradiction": "No", "entailment": "Yes", "neutral": "Maybe"}
_SECTIONS = {"1": "world", "2": "sports", "3": "business", "4": "tech"}

# fmt: off
_ROWS = (
    Task("SST-2", _TWO, _IT_WAS, _SENTIMENT, (0,), 1),
    Task("sst-5", tuple(_STARS), _IT_WAS, _STARS, (1,), 0, "csv", header=False),
    Task("mr", _TWO, _IT_WAS, _SENTIMENT, (1,), 0, "csv", header=False, first_sent_limit=110, other_sent_limit=50),
    Task("cr", _TWO, _IT_WAS, _SENTIMENT, (1,), 0, "csv", header=False, first_sent_limit=110, other_sent_limit=50),
    Task("mpqa", _TWO, _IT_WAS, _SENTIMENT, (1,), 0, "csv", header=False, first_sent_limit=110),
    Task("subj", _TWO, _THIS_IS, {"0": "subjective", "1": "objective"}, (1,), 0, "csv", header=False,
         first_sent_limit=110, other_sent_limit=50),
    Task("trec", tuple(_ANSWER_TYPES), _TOPIC, _ANSWER_TYPES, (1,), 0, "csv", header=False, first_sent_limit=110),
    Task("CoLA", _TWO, _THIS_IS, {"0": "incorrect", "1": "correct"}, (3,), 1, header=False, metric="mcc"),
    Task("MRPC", _TWO, _PAIR, _NO_YES, (3, 4), 0, metric="acc_and_f1"),
    Task("QQP", _TWO, _PAIR, _NO_YES, (3, 4), 5, metric="acc_and_f1", skip_short_rows=True),
    Task("QNLI", tuple(_ENTAILED), _QUESTION, _ENTAILED, (1, 2), -1),
    Task("RTE", tuple(_ENTAILED), _QUESTION, _ENTAILED, (1, 2), -1, max_seq_length=256, first_sent_limit=240),
    Task("MNLI", tuple(_INFERENCE), _QUESTION, _INFERENCE, (8, 9), -1, metric_prefix="mnli/",
         max_seq_length=256, first_sent_limit=240, split_names={"dev": "dev_matched", "test": "test_matched"},
         second_test_set="mnli-mm"),
    # The same k-shot folder, tested on texts of other genres. Its dev set is MNLI's: both are drawn from train.
    Task("mnli-mm", tuple(_INFERENCE), _QUESTION, _INFERENCE, (8, 9), -1, metric_prefix="mnli-mm/",
         max_seq_length=256, first_sent_limit=240, data_folder="MNLI",
         split_names={"dev": "dev_matched", "test": "test_mismatched"}),
    Task("SNLI", tuple(_INFERENCE), _QUESTION, _INFERENCE, (7, 8), -1, max_seq_length=256, num_sample=4),
    # Of label, title and description the last is the text.
    Task("ag_news", tuple(_SECTIONS), _ARTICLE, _SECTIONS, (2,), 0, "csv", header=False,
         max_seq_length=256, first_sent_limit=240),
    Task("STS-B", _TWO, _PAIR, _NO_YES, (7, 8), -1, metric="pearson_and_spearman", regression=True),
    Task("WNLI", _TWO, _QUESTION, _NO_YES, (1, 2), -1),
)
# fmt: on

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
"""The tasks by name."""

REGRESSION_RANGE = (0.0, 5.0)
"""The scores of a regression task, from its first label to its last."""

MIDDLE_SCORE = sum(REGRESSION_RANGE) / 2
"""Where scores part into low and high. LM-BFF has two rules for the middle itself, so that published splits and prompts
come out the same: k-shot sampling counts it as high, demonstrations as low."""


CUSTOM = "custom"
"""The name of data of a user's own, unless the user gives them another that no row has."""


def find_task(name: str) -> Task:
    """Look a task up by its name in any case.

    Raises:
        UsageError: There is no such task; says which was probably meant, and lists them.
    """
    task = _by_key().get(name.lower())
    if task is not None:
        return task
    if name.lower() == CUSTOM:
        raise UsageError(
            f"task '{name}' is for data of one's own, whose columns are not given here: see docs/how-to/own-data.md"
        )
    raise UsageError(suggest(name, [*TASKS, CUSTOM], "task"))


def custom_task(columns: str | Sequence[str], labels: Sequence[str] = (), name: str = CUSTOM) -> Task:
    """Make the task of data of a user's own.

    Args:
        columns: The names of the text columns and, last, of the label's, as files' headers have them; or all of them
            as ``--custom_columns`` has them: see `split_columns`.
        labels: The labels in the order of the logits; none to let any label pass.
        name: What the task is called in file names and in the log.

    Returns:
        A task without template and label words: flags must give them.

    Raises:
        UsageError: A name that a task of the table has or that no file can have, columns too few or named twice, or
            labels that are one number.
    """
    if isinstance(columns, str):
        columns = split_columns(columns)
    given = f"--custom_columns {spelled_columns(columns)}"
    if name.lower() in _by_key():
        raise UsageError(
            f"--custom_columns is for data of one's own, but {_by_key()[name.lower()].name} is a task whose files are "
            f"known: leave the flag out, or call the data {CUSTOM} or by another name"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UsageError(f"task '{name}': names of files are made of it: take letters, digits, '-', '_' and '.' alone")
    if len(columns) < 2 or not all(columns):
        raise UsageError(
            f"{given}: name the columns of the texts and, last, that of the label, as in --custom_columns text,label"
        )
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise UsageError(f"{given} names '{twice}' twice: each column has one use")
    numbers: dict[float, str] = {}
    for label in labels:
        if (number := as_number(label)) is not None and (other := numbers.setdefault(number, label)) != label:
            raise UsageError(
                f"the labels '{other}' and '{label}' of column '{columns[-1]}' are one number: spell the label of a "
                "class in one way, in the files and in --mapping"
            )
    texts = range(len(columns) - 1)
    return Task(name, tuple(labels), "", {}, tuple(texts), len(texts), file_format="", columns=tuple(columns))


def split_columns(columns: str) -> list[str]:
    """Take ``--custom_columns`` apart at its commas; a name with a comma is quoted, as in the header of a CSV file.

    Raises:
        UsageError: There is a line end in it.
    """
    try:
        return [name.strip() for name in next(csv.reader([columns], skipinitialspace=True), [])]
    except csv.Error as error:
        raise UsageError(f"--custom_columns {columns!r}: {error}") from error


def spelled_columns(columns: Iterable[str]) -> str:
    """Write names of columns as ``--custom_columns`` has them: the inverse of `split_columns`."""
    return ",".join('"' + name.replace('"', '""') + '"' if re.search('[",]', name) else name for name in columns)


def as_number(text: str) -> float | None:
    """The finite number that a text spells, if any: ``1``, ``01`` and ``1.0`` are one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def described_task(description: Mapping[str, Any]) -> Task:
    """Look up the task that the description of a kernel names, data of a user's own included.

    Raises:
        UsageError: There is no such task.
    """
    if "custom_columns" in description:
        return custom_task(description["custom_columns"], description["labels"], description["task"])
    return find_task(description["task"])


def _by_key() -> dict[str, Task]:
    return {task.key: task for task in TASKS.values()}
