"""Results over seeds: per seed the trial that is best on dev, per group of runs their mean on test.

Numbers are percentages; the standard deviation is the population's (divided by the number of seeds), as published.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np

from lmntk.errors import DataError, SettingError
from lmntk.runs.log import (
    BestTrial,
    LogEntry,
    MetricKeys,
    Trial,
    best_trial,
    find_trials,
    parse_condition,
    select,
    split_folder,
)
from lmntk.storage.run_results import is_zero_shot
from lmntk.storage.tables import format_table
from lmntk.storage.wording import quantity

logger = logging.getLogger(__name__)

COLUMNS = ("tag", "task", "K", "type", "trainer")
"""What always names a group."""

SETTINGS = {
    "kernel_formula": "kernel",
    "kernel_solver": "kernel",
    "kernel_dtype": "kernel",
    "projection_width": "kernel",
    "optimizer": "standard",
    "optimizer_variant": "standard",
    "apply_lora": None,
    "zero-shot": None,
}
"""The settings that separate groups if they differ among the runs, and the trainer that uses each; None: all do."""

DEFAULTS_OF_OLD_LOGS = {"kernel_dtype": "float32"}
"""What runs had before their settings were in the log."""

CHOSEN = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "eval_steps", "max_steps"),
    *("f0_scaling", "kernel_regularization", "kernel_gamma", "kernel_lambda", "output_dir"),
)
"""The settings that a grid search varies; the text form prints them for each chosen trial."""


@dataclass(frozen=True)
class TrialGroup:
    """Trials that differ only in their seeds and in the settings that a grid search varies.

    Attributes:
        columns: The names of the group: `COLUMNS`, and those `SETTINGS` that differ among groups.
        seeds: The best trial of each data seed and seed, by ``"42-13"``.
        missing: The data seeds that the group lacks.
    """

    columns: dict[str, str]
    seeds: dict[str, BestTrial]
    missing: list[str]

    def values(self, metric: str) -> list[float]:
        """Return the ``dev``, ``test`` or ``second`` metric of the best trials, seed by seed."""
        return [getattr(best.trial, metric) for best in self.seeds.values()]

    @property
    def has_second(self) -> bool:
        """Whether the task has a second metric."""
        return None not in self.values("second")

    @property
    def num_trials(self) -> int:
        """The number of trials from which the best were chosen."""
        return sum(best.num_trials for best in self.seeds.values())


def percent(value: SupportsFloat) -> str:
    """Write a fraction in percent with one decimal."""
    return f"{100 * float(value):.1f}"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Write the mean, population standard deviation and median of fractions in percent."""
    mean, deviation, median = (percent(measure(values)) for measure in (np.mean, np.std, np.median))
    return f"mean {mean} (standard deviation {deviation}), median {median}"


def matching_trials(entries: Sequence[LogEntry], condition: str, keys: MetricKeys) -> dict[str, list[Trial]]:
    """Return the trials that meet a condition, by task; warnings count the runs that are left out.

    Args:
        entries: All entries of the log.
        condition: A Python dictionary of literals, see `parse_condition`.
        keys: The keys of metrics that replace the task's own.

    Raises:
        DataError: No run meets the condition, or none of those has the metrics.
        SettingError: The condition cannot be read, or keys are given for several tasks.
    """
    by_task = select(entries, parse_condition(condition))
    if any(keys) and len(by_task) > 1:
        sentence = f"`key` and `test_key` name metrics of one task, but the runs are of {', '.join(by_task)}"
        raise SettingError(f"{sentence}: give one 'task_name' in `condition`", setting="key", tasks=[*by_task])
    found = {}
    for task, matching in by_task.items():
        found[task] = find_trials(matching, task, keys)
        lacking = len(matching) - len(found[task])
        if lacking:
            logger.warning("%d of %d runs of %s lack a dev or test metric: left out", lacking, len(matching), task)
        elif not matching:
            logger.warning("no run of %s meets the other conditions", task)
    if not any(found.values()):
        raise DataError(
            f"none of the {sum(map(len, by_task.values()))} runs that meet `condition` has both a dev and a test "
            "metric: run with `do_eval` and `do_predict`, or name the metrics that they have in `key` and `test_key`",
            tasks=[*by_task],
        )
    return found


def group_trials(found: Mapping[str, Sequence[Trial]], seeds: Sequence[int] | None = None) -> list[TrialGroup]:
    """Group trials, and choose the best one of each seed; warnings name what is missing or was repeated.

    Args:
        found: The trials of each task, from `matching_trials`.
        seeds: The data seeds that every group should have; by default those that any group of its task and K has.
    """
    import pandas  # here, since it takes half a second to load

    rows = [_names(task, trial.entry) | {"trial": trial} for task, trials in found.items() for trial in trials]
    table = pandas.DataFrame(rows)
    _warn_of_models([trial.entry for trial in table["trial"]])
    names = [*COLUMNS, *(name for name in SETTINGS if len({*table[name]} - {""}) > 1)]
    order = list(found)
    groups = []
    for key, of_group in sorted(
        table.groupby(names, sort=False),
        key=lambda item: (order.index(item[0][1]), item[0][0], as_numbers(item[0][2]), item[0]),
    ):
        by_seed = {str(seed): list(of_seed["trial"]) for seed, of_seed in of_group.groupby("seed")}
        best = {seed: best_trial(by_seed[seed]) for seed in sorted(by_seed, key=as_numbers)}
        alike = table[(table["task"] == key[1]) & (table["K"] == key[2])]
        wanted = sorted({*alike["data seed"]}, key=as_numbers) if seeds is None else map(str, dict.fromkeys(seeds))
        missing = [seed for seed in wanted if seed not in {*of_group["data seed"]}]
        groups.append(TrialGroup(dict(zip(names, key, strict=True)), best, missing))
    repeats = sum(best.num_repeats for group in groups for best in group.seeds.values())
    if repeats:
        logger.warning("ignored %s whose output_dir a later run has too", quantity(repeats, "run", ""))
    for group in groups:
        if group.missing:
            name = ", ".join(filter(None, group.columns.values()))
            logger.warning("%s: missing seeds %s", name, " ".join(group.missing))
    return groups


def _names(task: str, entry: LogEntry) -> dict[str, str]:
    """Return the columns by which an entry is grouped, all `SETTINGS` among them."""
    k, seed = split_folder(entry)
    return {
        "tag": str(entry.get("tag", "")),
        "task": task,
        # The folder says how many examples there are; the setting records how many were meant.
        "K": k if k.isdecimal() else str(entry.get("num_k", "")),
        "type": str(entry.get("few_shot_type", "")),
        "trainer": str(entry.get("trainer", "")),
        **{name: str(_setting(entry, name)) for name in SETTINGS},
        "data seed": seed,
        "seed": f"{seed}-{entry.get('seed', '')}",
    }


def _setting(entry: LogEntry, name: str) -> Any:
    """Return what a run has set; an empty text if its trainer, or a run without training, does not use the setting."""
    zero_shot, trainer = is_zero_shot(entry), SETTINGS[name]
    if name == "zero-shot":
        return zero_shot
    unused = trainer is not None and (zero_shot or entry.get("trainer", trainer) != trainer)
    if unused:
        return ""
    if name == "projection_width" and entry.get("kernel_engine") != "projected":
        return "exact"
    return entry.get(name) or DEFAULTS_OF_OLD_LOGS.get(name)


def _warn_of_models(entries: Sequence[LogEntry]) -> None:
    models = sorted({str(entry["model_name_or_path"]) for entry in entries if entry.get("model_name_or_path")})
    if len(models) > 1:
        taken = "the best on dev of each group is taken; choose one with 'model_name_or_path' in `condition`"
        logger.warning("the runs are of %d models (%s), and %s", len(models), ", ".join(models), taken)


def as_numbers(text: str) -> list[tuple[float, str]]:
    """Return a sort key that puts ``"13-2"`` before ``"100-1"``, and words after numbers.

    Examples:
        >>> sorted(["100-1", "mine", "13-2"], key=as_numbers)
        ['13-2', '100-1', 'mine']
    """
    return [(float(part) if part.isdecimal() else np.inf, part) for part in text.split("-")]


def as_text(groups: Sequence[TrialGroup]) -> str:
    """Write a line and the chosen settings for each seed, and a summary of each group."""
    lines = []
    for group in groups:
        lines.append(", ".join(f"{name} {value}" for name, value in group.columns.items()))
        for seed, (trial, num_trials, num_repeats) in group.seeds.items():
            second = f", second metric {percent(trial.second)}" if trial.second is not None else ""
            count = quantity(num_trials, "trial", "") + (f" ({num_repeats} ignored)" if num_repeats else "")
            lines.append(f"  {seed}: best dev {percent(trial.dev)}, test {percent(trial.test)}{second}, {count}")
            chosen = [f"{name}: {trial.entry[name]}" for name in CHOSEN if trial.entry.get(name) is not None]
            lines.append("    " + " | ".join(chosen))
        size = f"{quantity(len(group.seeds), 'seed', '')}, {quantity(group.num_trials, 'run', '')}"
        lines.append(f"  {mean_and_deviation(group.values('test'))}, {size}")
        if group.has_second:
            lines.append(f"  second metric: {mean_and_deviation(group.values('second'))}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def as_table(groups: Sequence[TrialGroup], style: str) -> str:
    """Write one row for each group, in percent, in a style of `lmntk.storage.tables`."""
    rows = []
    for group in groups:
        test = group.values("test")
        row = group.columns | {"dev mean": percent(np.mean(group.values("dev"))), "test mean": percent(np.mean(test))}
        row |= {"standard deviation": percent(np.std(test)), "median": percent(np.median(test))}
        if any(other.has_second for other in groups):
            row["second mean"] = percent(np.mean(group.values("second"))) if group.has_second else ""
        row |= {"seeds": str(len(test)), "runs": str(group.num_trials), "missing seeds": " ".join(group.missing)}
        rows.append(row)
    return format_table(rows, style, words={*groups[0].columns, "missing seeds"} - {"K"})
