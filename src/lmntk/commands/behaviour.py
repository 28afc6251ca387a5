"""Show whether the kernel describes fine-tuning: one row a task, with verdicts.

    lmntk behaviour SST-2 tweets=data/demo/tweets/k-shot-1k-test/mr --model roberta-base --k 16 64 --jobs 2
    lmntk behaviour --kernel_runs result/SST-2-*-kernel-* --fine_tuned_runs result/SST-2-*-standard-*

A case is a TASK, whose splits are in data/k-shot-1k-test/TASK, or NAME=FOLDER, where FOLDER/K-SEED hold the splits of
the task of the folder's own name. For every case, K, seed and pair of a kernel formula and an optimizer it makes these
runs: the kernel, with and without the untrained logits f0, its settings chosen on dev; a training with each learning
rate; and that with the best on dev (of equal ones the smallest) once more, with snapshots of its first and last step.
Flags after -- go to every run: -- --apply_lora --binary_classification.

All is written below --output: the runs in CASE/WHAT/K-SEED, and the table as behaviour.txt, .md, .tex, .csv, .json and
.png. Runs that are done are not done again: a stopped command goes on. --dry_run says how many runs and hours there
are; it does one run of each kind of which none is there, and keeps it.

With --kernel_runs and --fine_tuned_runs the table is that of runs that are there, paired by task and data folder.
Trainings with snapshots (--kernel_steps 0,last) are taken as they are; of a saved model alone the snapshots are
computed first.
"""

import argparse
import csv
import io
import itertools
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lmntk.config.recorded_settings import recorded_settings
from lmntk.config.runs_parser import FORMS, OWN_SETTINGS, RESUME, RunsParser, teller
from lmntk.config.tool_parser import run_tool
from lmntk.errors import SettingError
from lmntk.interrupts import Stopped
from lmntk.runs.behaviour_plan import OPTIMIZERS, BehaviourPlan, BehaviourRun, Case, Pair
from lmntk.runs.behaviour_runs import Finished, finish_runs, status_of
from lmntk.runs.fine_tuned_runs import FineTunedRun
from lmntk.runs.found_runs import DEFINING, FoundPair, find_runs, k_and_seed, pair_runs
from lmntk.runs.learning_rate import DEFAULT_RATES, read_rates
from lmntk.runs.processes import run_all
from lmntk.runs.progress import Bar
from lmntk.runs.run_hours import estimate, format_estimate, unmeasured
from lmntk.storage.atomic import write_text
from lmntk.storage.wording import quantity

if TYPE_CHECKING:
    from lmntk.report.behaviour_files import SeedRuns

SEEDS = (13, 21, 42, 87, 100)


class BehaviourParser(RunsParser):
    """The parser of the command line."""

    def __init__(self) -> None:
        super().__init__(
            usage="%(prog)s CASE … --model MODEL [flags] [-- flags of run.py]", description=__doc__, allow_abbrev=False
        )
        add = self.add_argument
        add("cases", nargs="*", metavar="CASE", help="TASK, or NAME=FOLDER")
        add("--model", help="folder of the model, or its name on the hub")
        add("--k", type=int, nargs="+", default=[16], help="training examples of each class (16)")
        add("--seeds", type=int, nargs="+", default=[*SEEDS], help=f"seeds ({' '.join(map(str, SEEDS))})")
        add("--pairs", nargs="+", default=["sgd:sgd", "signgd:adam"], metavar="FORMULA:OPTIMIZER",
            help=f"formulas, each with its optimizer: {', '.join(OPTIMIZERS)} (sgd:sgd signgd:adam)")  # fmt: skip
        rates = " ".join(f"{name}={','.join(rates)}" for name, rates in DEFAULT_RATES.items())
        add("--learning_rates", nargs="+", default=[], metavar="OPTIMIZER=RATE,RATE", help=f"to choose from ({rates})")
        add("--max_steps", type=int, default=100, help="steps of a training (100)")
        add("--batch_size", type=int, default=8, help="examples of a step (8)")
        add("--output", type=Path, default=Path("result/behaviour"), help="all results go here (result/behaviour)")
        add("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
        add("--dry_run", action="store_true", help="say how many runs and hours there are")
        add("--format", choices=FORMS, default="text", help="how to print the table (text)")
        add("--split", default="test", choices=("dev", "test"), help="what is predicted (test)")
        add("--least_ratio", type=float, default=0.9, help="kernel over fine-tuning (0.9)")
        add("--least_recovery", type=float, default=0.5, help="gain of the linearised model over fine-tuning's (0.5)")
        add("--most_distance", type=float, default=2.0, help="mean change of the kernel's entries (2)")
        add("--standard_errors", type=float, default=2.0, help="what counts as better, in standard errors (2)")
        add("--kernel_runs", type=Path, nargs="+", metavar="FOLDER", help="kernels that are there")
        add("--fine_tuned_runs", type=Path, nargs="+", metavar="FOLDER", help="trainings that are there")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing and the table; return the exit status, 1 if a run failed."""
    return run_tool(BehaviourParser(), _behaviour, argv, RESUME)


def _behaviour(given: argparse.Namespace) -> int:
    if given.kernel_runs or given.fine_tuned_runs:
        return _of_found_runs(given)
    if not given.cases or not given.model:
        lacking = "a case, as in SST-2 or tweets=data/demo/tweets/k-shot-1k-test/mr" if given.model else "`model`"
        ways = "`kernel_runs` with `fine_tuned_runs` take runs that are there"
        raise SettingError(f"give {lacking}; {ways}", setting="cases" if given.model else "model")
    plan = _make_plan(given)
    plan.check()
    for case, k, seed in itertools.product(plan.cases, plan.ks, plan.seeds):
        if given.split == "dev" and not case.has_dev(k, seed):
            sentence = f"`split=dev`: {case.split(k, seed)} has no dev file: take `split=test`, or draw that split"
            raise SettingError(sentence, setting="split", value="dev")
    if given.dry_run:
        return _dry_run(plan, given.jobs)
    status = status_of(plan)
    todo = [*status.todo, *status.waiting]
    say = teller(given.format)
    say(f"{quantity(status.total, 'run')} below {plan.output}: {len(status.done)} done already, {len(todo)} to do")
    if todo:
        say(format_estimate(estimate(status.done, todo, _done(status.waiting)), given.jobs))
    # Runs differ in length: the mean over all says more than the last few.
    with tqdm(total=len(todo), unit="run", smoothing=0, disable=not todo) as bar:
        found = finish_runs(plan, given.jobs, Bar(bar))
        bar.total = bar.n  # a run that waited for its learning rate may have been there
    _write_choices(plan, found, say)
    from lmntk.report.behaviour_files import SeedRuns  # here, since matplotlib takes seconds that --help need not wait

    runs = [
        SeedRuns(cell.row, cell.case.task.lower(), of_cell.training, of_cell.kernel, of_cell.with_f0)
        for cell, of_cell in found.cells.items()
    ]
    return _finish(given, runs, found.problems)


def _make_plan(given: argparse.Namespace) -> BehaviourPlan:
    cases = [Case.parse(text) for text in given.cases]
    for values, setting in (([case.name for case in cases], "cases"), (given.k, "k"), (given.seeds, "seeds"),
                            (given.pairs, "pairs")):  # fmt: skip
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise SettingError(f"`{setting}` has {twice} twice: give each once", setting=setting, value=twice)
    folder = Path(given.model)
    return BehaviourPlan(
        given.output.resolve(),
        str(folder.resolve()) if folder.is_dir() else given.model,
        cases,
        given.k,
        given.seeds,
        [Pair.parse(text) for text in given.pairs],
        read_rates(given.learning_rates),
        given.max_steps,
        given.batch_size,
        given.further,
    )


def _dry_run(plan: BehaviourPlan, jobs: int) -> int:
    """Say what there is to do, after one run of each kind of which none is there."""
    status = status_of(plan)
    todo = [*status.todo, *status.waiting]
    trials = unmeasured([*status.done, *_done(status.waiting)], todo)
    needed = [plan.kernel(run.cell) for run in trials if run.trainer == "kernel"]
    first = [*needed, *(run for run in trials if run.trainer != "kernel")]
    first = list(dict.fromkeys(run for run in first if not run.is_done()))
    second = [run for run in trials if run not in first]
    failures = []
    if trials:
        number = quantity(len(first) + len(second), "run")
        print(f"first one run of each kind of which none is there, {number}; they are kept", flush=True)
        with tqdm(total=len(first) + len(second), unit="run", smoothing=0) as bar:
            for runs in (first, second):
                outcome = run_all(runs, jobs, Bar(bar))
                if outcome.signals:
                    raise Stopped(signal.Signals(outcome.signals[0]))
                failures += outcome.failures
    status = status_of(plan)
    todo = [*status.todo, *status.waiting]
    further = [run for run in _done([*first, *second, *status.waiting]) if run not in status.done]
    print(f"{quantity(status.total, 'run')}: {len(status.done)} done, {len(todo)} to do")
    print(format_estimate(estimate(status.done, todo, further), jobs))
    for run, problem in failures:
        print(f"failed: {run}\n    {problem}")
    return 1 if failures else 0


def _done(runs: Sequence[BehaviourRun]) -> list[BehaviourRun]:
    return [run for run in runs if run.is_done()]


def _write_choices(plan: BehaviourPlan, found: Finished, say: Callable[[str], None]) -> None:
    """Say which learning rates are chosen, and write the metrics on dev of all."""
    lines, rows = dict[str, list[str]](), dict[tuple[object, ...], None]()
    for cell, choice in found.choices.items():
        name = f"{cell.case.name} K={cell.k} {cell.pair.optimizer}"
        tie = f" (as good: {', '.join(choice.ties)})" if choice.ties else ""
        lines.setdefault(name, [])
        if (text := f"seed {cell.seed}: {choice.rate}{tie}") not in lines[name]:
            lines[name].append(text)
        for rate, score in choice.scores.items():
            rows[(cell.case.name, cell.k, cell.seed, cell.pair.optimizer, rate, score, int(rate == choice.rate))] = None
    if not lines:
        return
    say("learning rates, the best on dev, of equal ones the smallest:")
    for name, texts in lines.items():
        say(f"  {name}: {'; '.join(texts)}")
    table = io.StringIO()
    header = ("case", "K", "seed", "optimizer", "learning_rate", "dev", "chosen")
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    write_text(plan.output / "learning_rates.csv", table.getvalue(), make_folder=True)


def _of_found_runs(given: argparse.Namespace) -> int:
    """Make the table of runs that are there."""
    for setting, other in (("kernel_runs", "fine_tuned_runs"), ("fine_tuned_runs", "kernel_runs")):
        if not getattr(given, setting):
            sentence = f"`{other}` alone: `{setting}` must name the {setting.replace('_', ' ')} of the same data"
            raise SettingError(sentence, setting=setting)
    if given.cases or given.further or given.dry_run:
        raise SettingError("`kernel_runs` takes no case, no `dry_run` and no flags after --", setting="kernel_runs")
    kernels, trainings = (find_runs(getattr(given, name), name) for name in ("kernel_runs", "fine_tuned_runs"))
    pairs = pair_runs(kernels, trainings)
    names = _names(pairs)
    without = [pair for pair in pairs if pair.training.snapshot_formula is None]
    lacking = {
        str(pair.training.folder): "it has neither snapshots nor a saved model: repeat it with --kernel_steps 0,last"
        for pair in without
        if not pair.training.has_weights
    }
    pairs = [pair for pair in pairs if str(pair.training.folder) not in lacking]
    made = _snapshot_runs([pair for pair in without if pair in pairs], names, given.output.resolve())
    todo = [run for run in made.values() if not run.is_done()]
    for run in todo:
        run.take_kernels()
    say = teller(given.format)
    say(f"{quantity(len(pairs), 'training')} with kernels; {quantity(len(todo), 'run')} of snapshots to do")
    with tqdm(total=len(todo), unit="run", smoothing=0, disable=not todo) as bar:
        outcome = run_all(todo, given.jobs, Bar(bar))
    if outcome.signals:
        raise Stopped(signal.Signals(outcome.signals[0]))
    for pair in pairs:
        if pair.choice is not None:
            say(f"{names[pair]}, seed {k_and_seed(pair.kernel)[1]}: {pair.choice}")
    from lmntk.report.behaviour_files import SeedRuns

    failed = [run for run, _ in outcome.failures]
    runs = [
        SeedRuns(
            names[pair],
            pair.kernel.paths.task_key,
            made[pair].folder if pair in made else pair.training.folder,
            pair.kernel.folder,
            None if pair.with_f0 is None else pair.with_f0.folder,
        )
        for pair in pairs
        if made.get(pair) not in failed or pair not in made
    ]
    return _finish(given, runs, lacking | {str(run): problem for run, problem in outcome.failures})


def _names(pairs: Sequence[FoundPair]) -> dict[FoundPair, str]:
    """The row of each pair; two folders of splits of one task are told apart by their paths."""
    from lmntk.analysis.saved_run import distinguishing_names  # here, since torch takes its time to load

    folders: dict[str, list[Path]] = {}
    for pair in pairs:
        task, split = pair.kernel.data
        if split.parent not in folders.setdefault(task, []):
            folders[task].append(split.parent)
    short = {
        (task, folder): task if len(places) == 1 else name
        for task, places in folders.items()
        for folder, name in zip(places, distinguishing_names(places), strict=True)
    }
    names = {}
    for pair in pairs:
        task, split = pair.kernel.data
        k = k_and_seed(pair.kernel)[0]
        names[pair] = f"{short[task, split.parent]} K={k} {pair.formula}:{pair.training.optimizer}"
    return {pair: name + _what_differs(pair, name, names) for pair, name in names.items()}


def _what_differs(pair: FoundPair, name: str, names: Mapping[FoundPair, str]) -> str:
    """The settings that tell the trainings of one name apart, which are rows of their own."""
    alike = [other.training.definition for other, its_name in names.items() if its_name == name]
    own = pair.training.definition
    return "".join(
        f" {setting}={value}"
        for number, (setting, value) in enumerate(zip(DEFINING, own, strict=True))
        if any(other[number] != value for other in alike)
    )


def _snapshot_runs(
    pairs: Sequence[FoundPair], names: Mapping[FoundPair, str], output: Path
) -> dict[FoundPair, FineTunedRun]:
    """The runs that compute the snapshots of saved models, with the settings of their kernels."""
    if not pairs:
        return {}
    from lmntk.config.arguments import DataArguments, ModelArguments
    from lmntk.config.kernel_arguments import KernelArguments  # here, since transformers takes its time to load

    left_out = {*OWN_SETTINGS, "few_shot_type", "tag", "overwrite_kernels", "fine_tuned_model"}
    left_out |= {"kernel_per_layer", "kernel_parts", "kernel_lora_rank", "kernel_lora_targets"}
    groups = (ModelArguments, DataArguments, KernelArguments)
    runs = {}
    for pair in pairs:
        settings = recorded_settings(pair.kernel.record, groups, left_out)
        settings["kernel_formula"] = pair.formula
        task, split = pair.kernel.data
        folder = output / names[pair].replace(" ", "-").replace(":", "-").replace("/", "_") / split.name
        runs[pair] = FineTunedRun(pair, folder, settings)
    return runs


def _finish(given: argparse.Namespace, runs: Sequence["SeedRuns"], problems: dict[str, str]) -> int:
    """Write the table, print it, and say what is missing; return the exit status."""
    from lmntk.analysis.behaviour import Thresholds
    from lmntk.report.behaviour_files import ENDINGS, PICTURE, make_rows, write_table

    say = teller(given.format)
    thresholds = Thresholds(given.least_ratio, given.least_recovery, given.most_distance, given.standard_errors)
    rows, refused = make_rows(runs, thresholds, given.split)
    problems |= {str(folder): str(error) for folder, error in refused.items()}
    if rows:
        tables = write_table(rows, thresholds, given.output)
        say("")
        print(tables[given.format], end="", flush=True)
        say("")
    if problems:
        say("\n".join(["missing:", *(f"  {name}\n    {problem}" for name, problem in problems.items())]))
    if rows:
        endings = ", .".join(ENDINGS.values())
        say(f"the table: {given.output / 'behaviour'}.{endings}; its figure: {given.output / PICTURE}")
    return 1 if problems or not rows else 0
