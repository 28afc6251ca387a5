"""Forecast from one kernel how fewer examples would do, and how gradient descent would train the model.

    lmntk forecast result/SST-2-roberta-base-prompt-kernel-k64/64-42 --k 4,8,16,32,64 --figure forecast.png
    lmntk forecast KERNEL_RUN --training TRAINING_RUN --figure forecast.png

It reads the folder of a run with --trainer kernel and computes no kernel:

  fewer examples     the scores of balanced random subsets with k examples of each class: sub-matrices of the kernel
  largest step       up to which learning rate gradient descent on all train examples is stable
  training           losses and scores by step, as gradient flow from the untrained model goes in function space:
                     closed form for the squared error, integrated for the cross entropy; --discrete takes steps

A training that --training names, made with --optimizer sgd and --kernel_steps 0,1,2,5,…,last, gives loss, learning
rates and steps, and is drawn beside its forecast. Without --training and --learning_rate, the rate is half of the
largest stable one. Steps are forecast for kernels with --kernel_formula sgd; of others only the subsets are shown.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmntk.commands.results import add_figure_flag, add_output_flag, check_figure, write_results
from lmntk.config.tool_parser import Parser, add_solver_flags, run_tool, solver_flags
from lmntk.errors import Bounds, FileError, KernelMismatchError, SettingError, check_numbers

if TYPE_CHECKING:
    from lmntk.analysis.forecast_tables import Forecast, RealKernel
    from lmntk.analysis.saved_run import SavedRun
    from lmntk.analysis.training_forecast import KernelTraining, RealTraining, TrainingForecast

FORMS = ("text", "markdown", "latex", "csv", "json")
STEPS = 100
OF_STABLE = 0.5
"""The learning rate of a forecast for which none is given, as a share of the largest stable one."""
BOUNDS = (Bounds("draws", 1), Bounds("steps", 1), Bounds("learning_rate", 0, above=True), Bounds("seed", 0))


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of a run with --trainer kernel")
    add_solver_flags(parser)
    add("--k", type=_numbers, metavar="K,K", help="examples of each class (1,2,4,… up to all)")
    add("--draws", type=int, default=100, help="random subsets for each k (100)")
    add("--seed", type=int, default=0, help="seed of the subsets (0)")
    add("--kernel_runs", type=Path, nargs="+", default=[], metavar="RUN", help="real kernels of fewer examples, shown "
        "beside the curve")  # fmt: skip
    add("--training", type=Path, metavar="RUN", help="a training with snapshots, shown beside its forecast")
    add("--learning_rate", type=float, help="learning rate (half of the largest stable one)")
    add("--steps", type=int, help=f"steps of the training ({STEPS}, or those of --training)")
    add("--loss", choices=("squared_error", "cross_entropy"), help="the loss (that of --training, else both)")
    add("--discrete", action="store_true", help="steps of gradient descent instead of gradient flow")
    add("--format", choices=FORMS, default="text", help="how to write the tables; csv and json hold all digits (text)")
    add_output_flag(parser)
    add_figure_flag(parser, "draw the forecast")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        sentence = f"'{text}' is not a list of whole numbers without spaces, such as 4,8,16"
        raise argparse.ArgumentTypeError(sentence) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Print the forecast of a kernel; return the exit status."""
    return run_tool(make_parser(), _show, argv)


def _show(given: argparse.Namespace) -> None:
    check_figure(given)
    check_numbers(BOUNDS, vars(given))
    if given.training is not None and given.learning_rate is not None:
        sentence = "`learning_rate` belongs to a forecast alone: `training` has its own learning rates"
        raise SettingError(sentence, setting="learning_rate", value=given.learning_rate)
    from lmntk.analysis.forecast_tables import format_forecast  # here, since torch takes seconds to load

    found = _forecast(given)
    table = format_forecast(found, given.format)

    def draw() -> bytes:
        from lmntk.report.forecast import forecast_figure

        return forecast_figure(found)

    write_results(given, table, draw)


def _forecast(given: argparse.Namespace) -> "Forecast":
    from lmntk.analysis.forecast_tables import Forecast
    from lmntk.analysis.learning_curve import largest_k, learning_curve, usual_ks
    from lmntk.analysis.least_squares import find_kernel_run, read_least_squares
    from lmntk.analysis.only_run import only_run
    from lmntk.analysis.saved_run import distinguishing_names
    from lmntk.analysis.training_forecast import RealTraining

    run = find_kernel_run(given.folder)
    problem = read_least_squares(run, solver_flags(given))
    trainable, remarks = _trainable(given, run)
    real = None if given.training is None else RealTraining.of_run(only_run(given.training), run)
    remarks += real.remarks if real else []
    ks = given.k or usual_ks(largest_k(problem.problem.classes))
    show = sys.stderr.isatty()
    curve = learning_curve(problem, ks, given.draws, given.seed, show_progress=show)
    if any(math.isnan(point.left_out_loss.mean) for point in curve):
        remarks.append("leave-one-out and GCV are missing where the kernel of a subset is singular: a larger "
                       "`kernel_regularization` makes it regular")  # fmt: skip
    if problem.problem.samples > 1:
        remarks.append("GCV is left out: it takes the prompts of an example for independent examples")
    return Forecast(
        distinguishing_names([given.folder])[0],
        run.task.main_metrics[0] if run.task else "acc",
        curve,
        _real_kernels(given, run),
        trainable.stable_steps if trainable else None,
        _trainings(given, trainable, real) if trainable else [],
        given.discrete,
        real.steps if real else [],
        remarks,
    )


def _trainable(given: argparse.Namespace, run: "SavedRun") -> "tuple[KernelTraining | None, list[str]]":
    """Return what training is forecast from, or why it is not; an error where training is asked for."""
    from lmntk.analysis.training_forecast import KernelTraining

    try:
        return KernelTraining.of_run(run), []
    except (KernelMismatchError, FileError) as error:
        asked = (given.training, given.learning_rate, given.steps, given.loss)
        if given.discrete or any(value is not None for value in asked):
            raise
        return None, [str(error)]


def _real_kernels(given: argparse.Namespace, pool: "SavedRun") -> "list[RealKernel]":
    from lmntk.analysis.forecast_tables import RealKernel
    from lmntk.analysis.learning_curve import largest_k
    from lmntk.analysis.least_squares import find_kernel_run, read_least_squares
    from lmntk.analysis.pairing import DATA, check_pair
    from lmntk.analysis.saved_run import distinguishing_names

    found = []
    names = distinguishing_names(given.kernel_runs) if given.kernel_runs else []
    for name, folder in zip(names, given.kernel_runs, strict=True):
        run = read_least_squares(find_kernel_run(folder), solver_flags(given))
        check_pair(run.run, pool, run.run.description, pool.description, without=DATA)
        scores = {split: run.score(split, run.predict(split)) for split in run.x_splits}
        found.append(RealKernel(name, largest_k(run.problem.classes), scores))
    return sorted(found, key=lambda one: one.k)


def _trainings(
    given: argparse.Namespace, kernel: "KernelTraining", real: "RealTraining | None"
) -> "list[TrainingForecast]":
    """Forecast the training with each loss that is asked for."""
    if real is not None:
        if given.loss not in (None, real.loss):
            sentence = f"`loss={given.loss}`: {given.training} was trained with {real.loss}"
            raise SettingError(sentence, setting="loss", value=given.loss)
        if given.steps is not None and given.steps > len(real.rates):
            sentence = f"`steps={given.steps}`: {given.training} has {len(real.rates)} steps: take no more"
            raise SettingError(sentence, setting="steps", value=given.steps)
        rates = list(real.rates)[: given.steps]
        return [kernel.forecast(real.loss, rates, discrete=given.discrete, wanted=real.training.steps)]
    from lmntk.solvers.gradient_flow import LOSSES

    stable = kernel.stable_steps
    limits = {"squared_error": stable.squared_error, "cross_entropy": stable.cross_entropy_at_start}
    found = []
    for loss in LOSSES if given.loss is None else [given.loss]:
        rate = given.learning_rate or OF_STABLE * limits[loss]
        found.append(kernel.forecast(loss, [rate] * (given.steps or STEPS), discrete=given.discrete))
    return found
