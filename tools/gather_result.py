#!/usr/bin/env python
"""Gather results from the log: per seed the trial that is best on dev, per group of runs their mean on test.

Numbers are percentages; the standard deviation is the population's (divided by the number of seeds), as published.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import numpy as np

from lmntk.config import tool_parser
from lmntk.errors import UsageError
from lmntk.runs.log import Best, Run, Trial, best_trial, data_seed, parse_condition, read_log, select, trials_of

# What separates groups where it differs among the runs, and the trainer that heeds it; None: all do.
SETTINGS = {
    "kernel_formula": "kernel",
    "kernel_solver": "kernel",
    "optimizer": "standard",
    "optimizer_variant": "standard",
    "apply_lora": None,
    "zero-shot": None,
}
# What a grid search varies: told of each chosen trial that has it.
CHOSEN = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "eval_steps", "max_steps"),
    *("f0_scaling", "kernel_regularization", "kernel_gamma", "kernel_lambda", "output_dir"),
)


class Parser(tool_parser.Parser):
    """The flags of tools that read the log; it leaves the telling of errors to `main`."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument(
            "--condition", required=True, metavar="DICT",
            help="which runs, as a Python dictionary: \"{'tag': 'x', 'task_name': 'sst-2'}\". A list as a value means "
            "any of these; mrpc/acc, mrpc/f1, qqp/acc, qqp/f1, sts-b/pearson and sts-b/spearmanr choose a metric; "
            "without a task_name: all tasks",
        )  # fmt: skip
        self.add_argument("--log", type=Path, default=Path("log"), help="the log that run.py appends to (log)")
        self.add_argument("--key", help="metric to choose by (the task's, on dev), such as sst-2_dev_eval_acc")
        self.add_argument("--test_key", help="metric to report (the task's, on test)")
        self.add_argument("--test_key2", help="second metric to report (the task's other one, where it has two)")


@dataclass(frozen=True)
class Group:
    """Runs that differ in seeds and in what a grid search varies.

    Attributes:
        columns: What names it: tag, task, K, type, trainer, and the settings that differ among groups.
        seeds: Its best trials by data seed and seed, ``"42-13"``.
        missing: The data seeds that it lacks.
    """

    columns: dict[str, str]
    seeds: dict[str, Best]
    missing: list[str]

    def values(self, metric: str) -> list[float]:
        """Return the best trials' ``dev``, ``test`` or ``second`` metric, seed by seed."""
        return [getattr(best.trial, metric) for best in self.seeds.values()]

    @property
    def has_second(self) -> bool:
        """Whether its task has a second metric."""
        return None not in self.values("second")

    @property
    def runs(self) -> int:
        """How many trials its seeds were chosen from."""
        return sum(best.trials for best in self.seeds.values())


def percent(value: float) -> str:
    """Write a fraction in percent with one decimal."""
    return f"{100 * value:.1f}"


def spread(values: Sequence[float]) -> str:
    """Write mean, population standard deviation and median of fractions in percent."""
    mean, deviation, median = (percent(measure(values)) for measure in (np.mean, np.std, np.median))
    return f"mean {mean} (standard deviation {deviation}), median {median}"


def counted(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def note(text: str) -> None:
    """Tell beside the results what a reader of them should know."""
    print(f"note: {text}", file=sys.stderr)


def find_trials(runs: Sequence[Run], arguments: argparse.Namespace) -> dict[str, list[Trial]]:
    """Find the matching runs that have the metrics, by the task asked for; notes what is left out.

    Args:
        runs: All of the log.
        arguments: Those of `Parser`.

    Raises:
        UsageError: There are none, or keys are given for several tasks.
    """
    condition = parse_condition(arguments.condition)
    given = (arguments.key, arguments.test_key, arguments.test_key2)
    by_task = select(runs, condition)
    if any(given) and len(by_task) > 1:
        raise UsageError(
            f"--key and --test_key name one task's metrics, but the runs are of {', '.join(by_task)}: "
            "give one 'task_name' in --condition"
        )
    found = {}
    for task, matching in by_task.items():
        found[task] = trials_of(matching, task, given)
        lacking = len(matching) - len(found[task])
        if lacking:
            note(f"{lacking} of {len(matching)} runs of {task} lack a dev or test metric: left out")
        elif not matching:
            note(f"no run of {task} meets the other conditions")
    if not any(found.values()):
        raise UsageError(
            f"none of the {sum(map(len, by_task.values()))} runs that meet --condition has both a dev and a test "
            "metric: run with --do_eval and --do_predict, or name what they have with --key and --test_key"
        )
    return found


def is_zero_shot(run: Run) -> bool:
    """Tell whether a run evaluated the model as it is: kernels are computed without ``--do_train`` too."""
    return bool(run.get("no_train")) or (run.get("do_train") is False and run.get("trainer") != "kernel")


def setting(run: Run, name: str) -> Any:
    """Return what a run has set, and an empty text where its trainer, or a run without training, does not heed it."""
    if name == "zero-shot":
        return is_zero_shot(run)
    trainer = SETTINGS[name]
    if trainer is not None and is_zero_shot(run):
        return ""
    return run.get(name) if trainer in (None, run.get("trainer", trainer)) else ""


def examples_per_class(run: Run) -> str:
    """Return K as the data folder has it, ``16`` of ``.../16-42``; the flag is a record of what was meant."""
    k = str(run.get("data_dir", "")).rstrip("/").rpartition("/")[2].removesuffix("-" + data_seed(run))
    return k if k.isdecimal() else str(run.get("num_k", ""))


def make_groups(found: dict[str, list[Trial]], seeds: list[int] | None) -> list[Group]:
    """Group trials and choose the best one per seed.

    Args:
        found: The trials of each task.
        seeds: The data seeds that every group should have; None: those that another of the same task and K has.
    """
    runs = [trial.run for trials in found.values() for trial in trials]
    models = sorted({str(run["model_name_or_path"]) for run in runs if run.get("model_name_or_path")})
    if len(models) > 1:
        print(
            f"note: the runs are of {len(models)} models ({', '.join(models)}), and the best on dev of each group is "
            "taken; choose one with 'model_name_or_path' in --condition",
            file=sys.stderr,
        )
    told = [name for name in SETTINGS if len({str(setting(run, name)) for run in runs} - {""}) > 1]
    trials_by_group: dict[tuple[str, ...], dict[str, list[Trial]]] = {}
    for task, trials in found.items():
        for trial in trials:
            run = trial.run
            kind = [str(run.get(name, "")) for name in ("few_shot_type", "trainer")]
            key = (str(run.get("tag", "")), task, examples_per_class(run), *kind)
            by_seed = trials_by_group.setdefault((*key, *(str(setting(run, name)) for name in told)), {})
            by_seed.setdefault(f"{data_seed(run)}-{run.get('seed', '')}", []).append(trial)
    there: dict[tuple[str, ...], set[str]] = {}
    for key, by_seed in trials_by_group.items():
        there.setdefault(key[1:3], set()).update(seed.partition("-")[0] for seed in by_seed)
    order = list(found)
    groups = []
    for key in sorted(trials_by_group, key=lambda key: (order.index(key[1]), key[0], as_numbers(key[2]), key)):
        by_seed = trials_by_group[key]
        best = {seed: best_trial(by_seed[seed]) for seed in sorted(by_seed, key=as_numbers)}
        wanted = sorted(there[key[1:3]], key=as_numbers) if seeds is None else map(str, dict.fromkeys(seeds))
        missing = [seed for seed in wanted if seed not in {name.partition("-")[0] for name in best}]
        groups.append(Group(dict(zip(("tag", "task", "K", "type", "trainer", *told), key, strict=True)), best, missing))
    return groups


def as_numbers(text: str) -> list[tuple[float, str]]:
    """Return a key that sorts ``"13-2"`` before ``"100-1"``, and what is no number behind."""
    return [(float(part) if part.isdecimal() else np.inf, part) for part in text.split("-")]


def as_text(groups: Iterable[Group]) -> str:
    """Write a line and the chosen settings per seed, and a summary per group."""
    lines = []
    for group in groups:
        lines.append(", ".join(f"{name} {value}" for name, value in group.columns.items()))
        for seed, (trial, trials, ignored) in group.seeds.items():
            second = f", second metric {percent(trial.second)}" if trial.second is not None else ""
            count = counted(trials, "trial") + (f" ({ignored} ignored)" if ignored else "")
            lines.append(f"  {seed}: best dev {percent(trial.dev)}, test {percent(trial.test)}{second}, {count}")
            chosen = [f"{name}: {trial.run[name]}" for name in CHOSEN if trial.run.get(name) is not None]
            lines.append("    " + " | ".join(chosen))
        lines.append(
            f"  {spread(group.values('test'))}, {counted(len(group.seeds), 'seed')}, {counted(group.runs, 'run')}"
        )
        if group.has_second:
            lines.append(f"  second metric: {spread(group.values('second'))}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def as_table(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Lay out one row a group, in percent, all with the same columns."""
    rows = []
    for group in groups:
        test = group.values("test")
        row = group.columns | {"dev mean": percent(np.mean(group.values("dev"))), "test mean": percent(np.mean(test))}
        row |= {"standard deviation": percent(np.std(test)), "median": percent(np.median(test))}
        if any(other.has_second for other in groups):
            row["second mean"] = percent(np.mean(group.values("second"))) if group.has_second else ""
        row |= {"seeds": str(len(test)), "runs": str(group.runs), "missing seeds": " ".join(group.missing)}
        rows.append(row)
    return rows


def as_csv(groups: Sequence[Group]) -> str:
    """Write the table as CSV with a header."""
    rows, file = as_table(groups), io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_markdown(groups: Sequence[Group]) -> str:
    """Write the table as Markdown, words to the left and numbers to the right."""
    rows = [{name: value.replace("|", "\\|") for name, value in row.items()} for row in as_table(groups)]
    words = {"missing seeds", *groups[0].columns} - {"K"}
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    rules = {name: "-" * (width + 2) if name in words else "-" * (width + 1) + ":" for name, width in widths.items()}
    lines = [
        [f" {cell:<{widths[name]}} " if name in words else f" {cell:>{widths[name]}} " for name, cell in row.items()]
        for row in [{name: name for name in widths}, *rows]
    ]
    return "".join("|" + "|".join(cells) + "|\n" for cells in (lines[0], rules.values(), *lines[1:]))


FORMATS = {"text": as_text, "csv": as_csv, "markdown": as_markdown}


def main(argv: list[str] | None = None) -> None:
    """Print the results of the matching runs, and beside them what is missing."""
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="data seeds of which none may be missing")
    parser.add_argument("--format", choices=tuple(FORMATS), default="text", help="how to print (text)")
    arguments = parser.read(argv)
    groups = make_groups(find_trials(read_log(arguments.log), arguments), arguments.seeds)
    ignored = sum(best.ignored for group in groups for best in group.seeds.values())
    if ignored:
        note(f"ignored {counted(ignored, 'run')} whose output_dir a later run has too")
    for group in groups:
        if group.missing:
            note(f"{', '.join(filter(None, group.columns.values()))}: missing seeds {' '.join(group.missing)}")
    print(FORMATS[arguments.format](groups), end="")


if __name__ == "__main__":
    sys.exit(tool_parser.exit_status(main))
