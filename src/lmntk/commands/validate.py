"""Compare what a kernel predicts for subsets of its train examples with really training on them.

    lmntk validate result/SST-2-roberta-base-prompt-kernel-sgd/64-42 --subsets 64 --jobs 2

It draws random subsets with half of the train examples of each class. For each subset the kernel of the run is solved
again, with the run's settings, and the model is fine-tuned again, with SGD for the sgd kernel and with Adam for that
of signgd. Of several learning rates that with the best metric on dev counts, after trainings on all train examples; of
equal ones the smallest. Flags after -- go to every training: -- --weight_decay 0.01.

  LDS         the linear datamodelling score (Park et al. 2023): Spearman's correlation over the subsets of predicted
              and trained margin of the correct class, mean over the examples of --split
  interval    95 % by the bootstrap over subsets
  of scores   Spearman's correlation of the subsets' predicted and trained scores
  equal       the share of predicted classes that are those of the trained models, in percent

Beside the kernel solved again stand the sum of the leave-one-out influences of the examples that a subset lacks,
another seed of the training if there are several (--train_seeds), and the subsets in random orders.

All trainings and their data go below --output. Those that are done are not done again: a stopped command goes on, and
more subsets, or other settings of the solver, take what is there. --dry_run says how many trainings and hours there
are; it does one if none is there, and keeps it.
"""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lmntk.commands.results import add_figure_flag, check_figure, write_figure
from lmntk.config.runs_parser import FORMS, OWN_SETTINGS, RESUME, RunsParser, teller
from lmntk.config.tool_parser import add_solver_flags, run_tool, solver_flags
from lmntk.errors import FileError, KernelMismatchError, SettingError
from lmntk.interrupts import Stopped
from lmntk.runs.behaviour_plan import OPTIMIZERS
from lmntk.runs.found_runs import FoundRun
from lmntk.runs.learning_rate import DEFAULT_RATES, read_rates
from lmntk.runs.processes import run_all
from lmntk.runs.progress import Bar
from lmntk.runs.run_hours import estimate, format_estimate, unmeasured
from lmntk.runs.validation_plan import OPTIMIZER_OF, ValidationPlan
from lmntk.runs.validation_runs import Finished, finish_runs, status_of
from lmntk.storage.wording import quantity

if TYPE_CHECKING:
    from lmntk.analysis.least_squares import LeastSquaresRun
    from lmntk.analysis.validation import Validation

SHARED = ("binary_classification", "random_model_init")
"""The settings of a training that the run of the kernel has too, besides those of the model and the data."""
NOT_TRAINED_ALIKE = {
    "exclude_head": "leaves out the gradients of the head, which a training changes",
    "only_biases": "has the gradients of biases alone, and a training changes all parameters",
    "from_linearhead": "starts at a head that is fitted to all train examples, and each subset would have another",
}
"""Settings of a kernel for which no training stands, with the reason."""


def make_parser() -> RunsParser:
    """Return the parser of the command line."""
    parser = RunsParser(usage="%(prog)s RUN [flags] [-- flags of run.py]", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run with kernels and lstsq")
    add("--subsets", type=int, default=64, metavar="M", help="how many subsets (64)")
    add("--seed", type=int, default=0, help="seed of the subsets, the bootstrap and the permutations (0)")
    add("--train_seeds", type=int, default=1, metavar="S", help="trainings of a subset, whose outputs are averaged (1)")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="of the trainings (the one that the formula stands for)")
    rates = "; ".join(f"{name}: {' '.join(rates)}" for name, rates in DEFAULT_RATES.items())
    add("--learning_rates", nargs="+", default=[], metavar="RATE", help=f"to choose from ({rates})")
    add("--max_steps", type=int, default=100, help="steps of a training (100)")
    add("--batch_size", type=int, default=8, help="examples of a step (8)")
    add("--output", type=Path, help="trainings and their data go here (validation, in the run's folder)")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (1)")
    add("--dry_run", action="store_true", help="say how many trainings and hours there are")
    add("--split", default="test", choices=("dev", "test"), help="what is predicted (test)")
    add("--format", choices=FORMS, default="text", help="how to print the table; csv has a row for each example, json "
        "everything (text)")  # fmt: skip
    add_figure_flag(parser, "draw changes of outputs and the examples' correlations")
    add_solver_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do the trainings that are missing and print the table; return the exit status, 1 if a training failed."""
    return run_tool(make_parser(), _validate, argv, RESUME)


def _validate(given: argparse.Namespace) -> int:
    check_figure(given)
    found = _read_run(given)
    plan = _make_plan(given, found)
    plan.check_choice()
    plan.write_subsets()
    plan.check_stale()
    if given.dry_run:
        return _dry_run(plan, given.jobs)
    status, say = status_of(plan), teller(given.format)
    total = len(status.done) + len(status.todo)
    say(f"{quantity(total, 'training')} below {plan.output}: {len(status.done)} done already, {len(status.todo)} to do")
    if status.todo:
        say(format_estimate(estimate(status.done, status.todo), given.jobs))
    with tqdm(total=len(status.todo), unit="run", smoothing=0, disable=not status.todo) as bar:
        finished = finish_runs(plan, given.jobs, Bar(bar))
        bar.total = bar.n  # trainings with the chosen learning rate may have been there
    return _finish(given, plan, found, finished)


def _read_run(given: argparse.Namespace) -> "LeastSquaresRun":
    """Read the kernels and the record of the run, and check that there is a training of the same kind."""
    from lmntk.analysis.least_squares import find_kernel_run, read_least_squares  # here: torch takes its time to load

    found = read_least_squares(find_kernel_run(given.run), solver_flags(given))
    run, record = found.run, found.run.record
    if record.get("trainer") != "kernel" or run.task is None:
        path = run.paths.record()
        raise FileError(f"{path} must say how the model was asked: give the folder of a run of this program", path=path)
    if given.split not in found.x_splits:
        there = " or ".join(found.x_splits) or "no other split"
        sentence = f"{run.folder} has no kernel of {given.split}, but {there}: take that, or compute it"
        raise SettingError(sentence, setting="split", value=given.split)
    for setting, why in NOT_TRAINED_ALIKE.items():
        if record.get(setting):
            sentence = f"the kernel of {run.folder} {why}: give a run without `{setting}`"
            raise SettingError(sentence, setting=setting, value=record[setting])
    if record.get("few_shot_type") == "prompt-demo":
        raise SettingError(
            f"the prompts of {run.folder} hold demonstrations, which a subset would draw from other train examples: "
            "give a run with `few_shot_type=prompt`",
            setting="few_shot_type",
            value="prompt-demo",
        )
    return found


def _make_plan(given: argparse.Namespace, found: "LeastSquaresRun") -> ValidationPlan:
    from lmntk.analysis.datamodelling import half_subsets
    from lmntk.data.examples import find_user_file

    run = FoundRun(found.run.folder, found.run.record)
    record, task = run.record, found.run.task
    assert task is not None  # `_read_run` has seen to it
    data = run.data[1]
    _check_train_file(found, data)
    optimizer = given.optimizer or OPTIMIZER_OF[str(record.get("kernel_formula", "sgd"))]
    rates = read_rates([f"{optimizer}={','.join(given.learning_rates)}"] if given.learning_rates else [])[optimizer]
    dev = data / task.file_name("dev") if not task.columns else find_user_file(data, "dev")
    seed = int(record.get("seed", 42))
    return ValidationPlan(
        output=(given.output or given.run / "validation").resolve(),
        model=str(run.place(str(record["model_name_or_path"]))),
        task=task,
        few_shot_type=str(record.get("few_shot_type", "prompt")),
        data=data,
        has_dev=dev is not None and dev.is_file(),
        settings=_settings(record),
        subsets=half_subsets(found.problem.classes, given.subsets, given.seed),
        classes=found.problem.classes,
        subset_seed=given.seed,
        optimizer=optimizer,
        rates=rates,
        max_steps=given.max_steps,
        batch_size=given.batch_size,
        seeds=[seed + number for number in range(given.train_seeds)],
        further=given.further,
    )


def _check_train_file(found: "LeastSquaresRun", data: Path) -> None:
    """Check that the train examples are there, and those of the kernel."""
    from lmntk.data.examples import read_examples, split_file
    from lmntk.storage.kernel_metadata import file_hash

    assert found.run.task is not None
    path = split_file(found.run.task, data, "train")
    wanted = found.train.description.get("data_sha256", {}).get("train")
    if wanted not in (None, file_hash(path)) or len(read_examples(found.run.task, path)) != found.problem.num_examples:
        raise KernelMismatchError(
            f"{path} has changed since the kernel of {found.run.folder} was computed: repeat the command that made it",
            path=path,
            differences=["data_sha256"],
        )


def _settings(record: Mapping[str, Any]) -> dict[str, str]:
    """The settings of the kernel's run that a training shares."""
    from lmntk.config.arguments import DataArguments, ModelArguments
    from lmntk.config.recorded_settings import PROMPT_FILES, recorded_settings

    left_out = {*OWN_SETTINGS, "few_shot_type", "tag"}
    if isinstance(record.get("template"), str):  # the record has the prompt that was read from them
        left_out |= {*PROMPT_FILES}
    settings = recorded_settings(record, [ModelArguments, DataArguments], left_out)
    settings |= {name: "True" for name in SHARED if record.get(name)}
    first_layers = record.get("exclude_first_layers") or 0
    if bool(record.get("exclude_embeddings")) != (first_layers > 0):
        sentence = (
            "a training that freezes the first layers freezes the embeddings too, and no other way: give a run with "
            "both `exclude_embeddings` and `exclude_first_layers`, or with neither"
        )
        raise SettingError(sentence, setting="exclude_embeddings", value=record.get("exclude_embeddings"))
    return settings | ({"fix_layers": str(first_layers)} if first_layers else {})


def _dry_run(plan: ValidationPlan, jobs: int) -> int:
    """Say what there is to do, after one training if none is there."""
    status, failures = status_of(plan), []
    if trials := unmeasured(status.done, status.todo):
        print("first one training, since none is there; it is kept", flush=True)
        with tqdm(total=len(trials), unit="run") as bar:
            outcome = run_all(trials, jobs, Bar(bar))
        if outcome.signals:
            raise Stopped(signal.Signals(outcome.signals[0]))
        failures = outcome.failures
        status = status_of(plan)
    total = len(status.done) + len(status.todo)
    print(f"{quantity(total, 'training')}: {len(status.done)} done, {len(status.todo)} to do")
    print(format_estimate(estimate(status.done, status.todo), jobs))
    for run, problem in failures:
        print(f"failed: {run}\n    {problem}")
    return 1 if failures else 0


def _finish(given: argparse.Namespace, plan: ValidationPlan, found: "LeastSquaresRun", finished: Finished) -> int:
    """Print the table, and say what is missing; return the exit status."""
    say = teller(given.format)
    if plan.searches and finished.choice is not None:
        say(str(finished.choice))
    validation = _compare(given, plan, found, finished)
    if validation is not None:
        from lmntk.analysis.validation_tables import format_validation

        say("")
        print(format_validation(validation, given.format), end="", flush=True)
        shown = validation

        def draw() -> bytes:
            from lmntk.report.validation import validation_figure

            return validation_figure(shown)

        write_figure(given.figure, draw, sys.stdout if given.format == "text" else sys.stderr)
    if finished.problems:
        say("\n".join(["missing:", *(f"  {name}\n    {text}" for name, text in finished.problems.items())]))
    return 1 if finished.problems or validation is None else 0


def _compare(
    given: argparse.Namespace, plan: ValidationPlan, found: "LeastSquaresRun", finished: Finished
) -> "Validation | None":
    """Compare predicted with trained outputs; None with fewer than two subsets, over which nothing correlates."""
    import numpy as np

    from lmntk.analysis.saved_run import distinguishing_names
    from lmntk.analysis.validation import Trainings, read_logits, validate
    from lmntk.errors import UsageError

    classes, logits = found.classes(given.split), {}
    for index, runs in finished.runs.items():
        try:
            logits[index] = [read_logits(run.paths.predictions(given.split), plan.task, classes) for run in runs]
        except UsageError as error:
            finished.problems[f"subset {index}"] = str(error)
    if len(logits) < 2 or finished.choice is None:
        finished.problems["the table"] = f"{quantity(len(logits), 'subset')} with trainings; two are necessary"
        return None
    trainings = Trainings(
        plan.subsets[[*logits]],
        np.array([*logits.values()]),
        plan.optimizer,
        finished.choice.rate,
        plan.max_steps,
        rate_by_dev=plan.searches,
    )
    name = distinguishing_names([found.run.folder])[0]
    return validate(found, trainings, given.split, name, given.seed, show_progress=sys.stderr.isatty())
