"""The table of tasks, with the labels, prompt, columns and files of each.

Labels, templates, label words and limits are those of LM-BFF (Gao et al. 2021) and of the kernels published with
Malladi et al. 2023 (arXiv 2210.05643). To add a task, add an entry. A user's own data have no entry: settings describe
them (`custom_task`).
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmntk.errors import SettingError, UnknownNameError, suggest


@dataclass(frozen=True)
class Task:
    """The definition of a task; see `TASKS`.

    Attributes:
        name: The task's usual spelling, ``"SST-2"``.
        labels: The labels as the files spell them, in the order of the logits; for regression the two ends of the
            scale. Empty only for a user's own data without known labels: any label is valid.
        template: The prompt.
        mapping: The label word of each label.
        text_columns: The columns of the sentences, counted from 0.
        label_column: The column of the label, counted from 0; -1 is the last one.
        file_format: ``"tsv"`` (split only at tabs) or ``"csv"``; also the ending of the file names. Empty for a user's
            own data, where each file's ending gives its format.
        header: Whether the files start with a line of column names.
        metric: The key of the task's metric in `lmntk.data.metrics.METRICS`.
        metric_prefix: The prefix of a metric's name, ``"mnli/"``.
        max_seq_length: Tokens in a prompt, if the task differs from the general default.
        first_sent_limit: Tokens of the first sentence; None for no limit.
        other_sent_limit: Tokens of each further sentence; None for no limit.
        num_sample: Draws of demonstrations, if the task differs from the general default.
        regression: Whether the label is a score on a scale and not a class.
        skip_short_rows: Whether rows that lack columns are skipped: the published QQP files have some.
        split_names: File stems of the splits that are not called train, dev or test.
        data_folder: Name of the task's folder where that is not `name`.
        second_test_set: The task whose test set, in the same folder, is predicted too.
        columns: For a user's own data, the names of the text columns and, last, of the label column. Each file's
            header gives their places, not `text_columns` and `label_column`. In a file without a header, numbers are
            places, counted from 0. Empty for the tasks of the table.
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
        """The metric that compares models, and the second one to report, if there is one.

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
        """How many columns a row must have; a label counted from the end comes after the texts."""
        after_texts = max(self.text_columns) + 1
        return after_texts + 1 if self.label_column < 0 else max(after_texts, self.label_column + 1)

    @property
    def sampling_label_column(self) -> int:
        """Where the published sampler looks for the label: the last column of a TSV line unless it precedes the texts.

        It differs from `label_column` for rows of QQP that lack columns, which the sampler does not skip.
        """
        before_texts = 0 <= self.label_column < min(self.text_columns)
        return self.label_column if before_texts or self.file_format == "csv" else -1

    @property
    def seeds_build_on_each_other(self) -> bool:
        """Whether the published sampler shuffles the lines of the seed before again (TSV without a header: CoLA)."""
        return self.file_format == "tsv" and not self.header

    @property
    def numbered(self) -> bool:
        """Whether all columns of a user's own data are numbers, which may be places counted from 0."""
        return bool(self.columns) and all(re.fullmatch("0|[1-9][0-9]{0,5}", column) for column in self.columns)

    def file_name(self, split: str) -> str:
        """Return the name of the file of ``train``, ``dev`` or ``test`` in a k-shot folder.

        Without a `file_format` it has no ending, and `lmntk.data.examples.split_file` finds the file.
        """
        stem = self.split_names.get(split, split)
        return f"{stem}.{self.file_format}" if self.file_format else stem

    def original_name(self, split: str) -> str:
        """Return the name of the original file from which ``train`` or ``test`` of a k-shot folder is drawn.

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
_TABLE = (
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
    # The columns are label, title and description; the description is the text.
    Task("ag_news", tuple(_SECTIONS), _ARTICLE, _SECTIONS, (2,), 0, "csv", header=False,
         max_seq_length=256, first_sent_limit=240),
    Task("STS-B", _TWO, _PAIR, _NO_YES, (7, 8), -1, metric="pearson_and_spearman", regression=True),
    Task("WNLI", _TWO, _QUESTION, _NO_YES, (1, 2), -1),
)
# fmt: on

TASKS: dict[str, Task] = {task.name: task for task in _TABLE}
"""The tasks by name."""

REGRESSION_RANGE = (0.0, 5.0)
"""The scores of a regression task, from its first label to its last."""

MIDDLE_SCORE = sum(REGRESSION_RANGE) / 2
"""The score between the low and the high half. LM-BFF has two rules for this score itself, and both are kept so that
published splits and prompts come out the same: k-shot sampling counts it as high, demonstrations as low."""


CUSTOM = "custom"
"""The name of a user's own data, unless the user gives them another that is not in the table."""


def find_task(name: str) -> Task:
    """Look up a task by its name, in upper or lower case.

    Args:
        name: The name.

    Raises:
        UnknownNameError: There is no such task; names the likely one and lists them all.

    Examples:
        >>> find_task("sst-2").labels
        ('0', '1')
    """
    task = _by_key().get(name.lower())
    if task is not None:
        return task
    options = [*TASKS, CUSTOM]
    sentence = suggest(name, options, "task")
    if name.lower() == CUSTOM:
        sentence = f"task '{name}' is for your own data, whose columns are not given here: see docs/how-to/own-data.md"
    raise UnknownNameError(sentence, name=name, kind="task", options=options)


def custom_task(columns: str | Sequence[str], labels: Sequence[str] = (), name: str = CUSTOM) -> Task:
    """Return the task of a user's own data.

    Args:
        columns: The names of the text columns and, last, of the label column, as the files' headers spell them; or
            one text with all of them, see `split_columns`.
        labels: The labels in the order of the logits; none to accept any label.
        name: The task's name in file names and in the log.

    Returns:
        A task without template and label words: settings must give them.

    Raises:
        SettingError: The name is that of another task or cannot be part of a file's name, a column is missing or named
            twice, or two labels are the same number.

    Examples:
        >>> custom_task("review,stars", labels=["1", "2"]).num_sentences
        1
    """
    if isinstance(columns, str):
        columns = split_columns(columns)
    given = f"`custom_columns={join_columns(columns)}`"
    if name.lower() in _by_key():
        raise _name_error(
            f"`custom_columns` is for your own data, but {_by_key()[name.lower()].name} is a task whose files are "
            f"known: leave `custom_columns` out, or name the data {CUSTOM} or otherwise",
            name,
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise _name_error(
            f"task '{name}': the name becomes part of file names: use only letters, digits, '-', '_' and '.'", name
        )
    if len(columns) < 2 or not all(columns):
        raise _columns_error(
            f"{given}: name the columns of the texts and, last, that of the label, as in `custom_columns=text,label`",
            columns,
        )
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise _columns_error(f"{given} names '{twice}' twice: each column has one use", columns)
    numbers: dict[float, str] = {}
    for label in labels:
        if (number := as_number(label)) is not None and (other := numbers.setdefault(number, label)) != label:
            raise SettingError(
                f"the labels '{other}' and '{label}' of column '{columns[-1]}' are the same number: use one spelling "
                "of a class's label in the files and in `mapping`",
                **{"setting": "mapping", "value": list(labels)},
            )
    texts = range(len(columns) - 1)
    return Task(name, tuple(labels), "", {}, tuple(texts), len(texts), file_format="", columns=tuple(columns))


def _name_error(sentence: str, name: str) -> SettingError:
    return SettingError(sentence, setting="task_name", value=name)


def _columns_error(sentence: str, columns: Sequence[str]) -> SettingError:
    return SettingError(sentence, setting="custom_columns", value=join_columns(columns))


def split_columns(columns: str) -> list[str]:
    """Split names of columns at their commas; a name with a comma is quoted, as in the header of a CSV file.

    Args:
        columns: The names.

    Raises:
        SettingError: There is a line end in a name.

    Examples:
        >>> split_columns('"review, long",stars')
        ['review, long', 'stars']
    """
    try:
        return [name.strip() for name in next(csv.reader([columns], skipinitialspace=True), [])]
    except csv.Error as error:
        sentence = f"`custom_columns={columns!r}`: {error}"
        raise SettingError(sentence, setting="custom_columns", value=columns) from error


def join_columns(columns: Iterable[str]) -> str:
    """Join names of columns in one text: the inverse of `split_columns`."""
    return ",".join('"' + name.replace('"', '""') + '"' if re.search('[",]', name) else name for name in columns)


def as_number(text: str) -> float | None:
    """Return the finite number that a text spells, or None: ``1``, ``01`` and ``1.0`` are the same."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def described_task(description: Mapping[str, Any]) -> Task:
    """Look up the task that the description of a kernel names, or make that of a user's own data.

    Args:
        description: The description, read from the JSON file beside the kernel.

    Raises:
        UnknownNameError: There is no such task.
    """
    if "custom_columns" in description:
        return custom_task(description["custom_columns"], description["labels"], description["task"])
    return find_task(description["task"])


def _by_key() -> dict[str, Task]:
    return {task.key: task for task in TASKS.values()}
