"""Write projected gradients of every text as features, and predict from them: for thousands of texts.

    lmntk features result/SST-2-roberta-base-prompt-kernel/16-42
    lmntk features --solve -- --trainer kernel --task_name SST-2 --data_dir data/all/SST-2 --output_dir result/large
        --model_name_or_path roberta-base --few_shot_type prompt --do_train --do_eval --do_predict

It takes the folder of a finished kernel run; or, after --, the flags of run.py, of which it computes no kernel. It
loads the model and writes features_<split>_<task>.safetensors: float32 [N, C, d], whose inner products estimate the
kernel of all parameters without bias. docs/explanation/features.md explains them, docs/reference/kernel-files.md the
file. --solve predicts by ridge regression on the features, which is lstsq with their kernel, but never forms that
kernel. The same command goes on where a stopped one was; features of another width, seed, model or data are replaced
with --overwrite alone.
"""

import argparse
import csv
import dataclasses
import io
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import Bounds, SettingError, check_numbers

if TYPE_CHECKING:
    from lmntk.config.record_arguments import Arguments
    from lmntk.trainers.feature_error import FeatureError
    from lmntk.trainers.feature_solver import FeatureSolution
    from lmntk.trainers.features import FeatureJob

logger = logging.getLogger(__name__)

BOUNDS = (Bounds("width", 1, 4096), Bounds("dimension", 1, 10**7), Bounds("check", 0, 1000))
WITH_SOLVE = ("kernel_regularization", "conjugate_gradients")
GOES_ON = "what was written is kept; the same command goes on from there"


def make_parser() -> Parser:
    """Return the parser of the command line, up to ``--``."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="RUN", help="folder of a kernel run; or give run.py's flags after --")
    add("--width", type=int, help="k: k * k numbers of each weight's gradient (that of --projection_tolerance or of a "
        "projected run, else 16)")  # fmt: skip
    add("--seed", type=int, help="seed of the random matrices (that of a projected run, else 0)")
    add("--dimension", type=int, metavar="D", help="hash all numbers of a text's logit to so many (keep all)")
    add("--check", type=int, metavar="N", help="measure the error on N train texts, 2 or more (32)")
    add("--overwrite", action="store_true", help="replace features of another width, seed, model or data")
    add("--solve", action="store_true", help="predict dev and test by ridge regression on the features")
    add("--kernel_regularization", metavar="LAMBDA", help="with --solve: a number above 0, or several with commas to "
        "choose among on dev (1e-06 to 0.1)")  # fmt: skip
    add("--conjugate_gradients", action="store_true", help="with --solve: form no matrix of d or N * C rows (where "
        "both are large, or exceed the memory)")  # fmt: skip
    add("--data_dir", type=Path, help="where the data files of RUN are now (where it recorded them)")
    add("--output_dir", type=Path, help="write the files here (RUN)")
    add("--dry_run", action="store_true", help="say what the features take, and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write features; return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    place = words.index("--") if "--" in words else len(words)
    own, of_run = words[:place], words[place + 1 :]
    return run_tool(make_parser(), lambda given: _work(given, of_run), own, GOES_ON)


def _work(given: argparse.Namespace, of_run: Sequence[str]) -> None:
    check_numbers(BOUNDS, vars(given))
    _check_flags(given, of_run)
    from lmntk import startup

    startup.import_transformers()
    from lmntk.storage.output_folder import output_folder_for
    from lmntk.trainers.feature_settings import FeatureSettings
    from lmntk.trainers.feature_solver import check_candidates, describe_solving, solve_features, solving_memory
    from lmntk.trainers.features import FeatureJob

    started = time.perf_counter()
    arguments, folder, train_kernel = _arguments(given, of_run)
    candidates = _candidates(given, arguments)
    dry_run = given.dry_run or arguments[2].dry_run
    own = {field.name: getattr(given, field.name) for field in dataclasses.fields(FeatureSettings)}
    with output_folder_for(folder, sweep=False, dry_run=dry_run):
        job = FeatureJob(arguments, FeatureSettings(**own), folder, show_progress=sys.stderr.isatty())
        if train_kernel is not None:
            job.check_run(train_kernel)
        if given.solve:
            check_candidates(candidates, arguments[2], [*job.experiment.datasets])
        _announce(job, given.dimension)
        memory = solving_memory(arguments[2])
        if given.solve:
            print(describe_solving(job.table("train").shape, given.conjugate_gradients, memory), file=sys.stderr)
        if dry_run:
            return
        job.prepare()
        error = job.error()
        print(error)
        features = {split: job.write(split) for split in job.experiment.datasets}
        if given.solve:
            iterative = True if given.conjugate_gradients else None
            found = solve_features(features, job.experiment.datasets, arguments[2], candidates, iterative, memory)
            _report(job, found, error)
    for stored in features.values():
        print(stored.path)
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)


def _check_flags(given: argparse.Namespace, of_run: Sequence[str]) -> None:
    """Refuse flags that do not go together."""
    if (given.folder is None) == (not of_run):
        both = "give the folder of a run, or run.py's flags after --, not both"
        raise SettingError(both if of_run else "give the folder of a kernel run, or run.py's flags after --")
    for name in ("data_dir", "output_dir"):
        if of_run and getattr(given, name) is not None:
            raise SettingError(f"`{name}` stands among run.py's flags, after --: give it there", setting=name)
    for name in WITH_SOLVE:
        if not given.solve and getattr(given, name):
            raise SettingError(f"`{name}` is for `solve`: add it, or leave this out", setting=name)
    if given.kernel_regularization not in (None, "auto"):
        _read_candidates(given.kernel_regularization)


def _read_candidates(text: Any) -> tuple[float, ...]:
    from lmntk.solvers.candidates import read_candidates
    from lmntk.solvers.feature_ridge import RIDGE_BOUNDS

    numbers = read_candidates("kernel_regularization", text)
    check_numbers(RIDGE_BOUNDS, {"kernel_regularization": list(numbers)})
    return numbers


def _candidates(given: argparse.Namespace, arguments: "Arguments") -> Sequence[float]:
    """Return the candidates of the regularization, which may stand on either side of ``--``."""
    from lmntk.solvers.problem import SolverSettings
    from lmntk.trainers.feature_solver import REGULARIZATIONS

    of_run, own = arguments[2].kernel_regularization, given.kernel_regularization
    is_given = of_run != SolverSettings.regularization
    if is_given and own is not None:
        raise SettingError(
            "`kernel_regularization` stands on both sides of --: give it once", setting="kernel_regularization"
        )
    if given.folder is None and arguments[2].adjust_for_init and not given.solve:
        sentence = "`adjust_for_init` is for `solve`: add it before --, or leave this out"
        raise SettingError(sentence, setting="adjust_for_init")
    if is_given and not given.solve:
        sentence = "`kernel_regularization` is for `solve`: add it before --, or leave this out"
        raise SettingError(sentence, setting="kernel_regularization")
    asked = of_run if is_given else own
    return REGULARIZATIONS if asked in (None, "auto") else _read_candidates(asked)


def _arguments(given: argparse.Namespace, of_run: Sequence[str]) -> "tuple[Arguments, Path, Path | None]":
    """Return the arguments of the run, where files go, and the kernel of train that must fit."""
    if of_run:
        from lmntk.config.arguments import parse_arguments
        from lmntk.config.validation import check_arguments, unused_flags
        from lmntk.trainers.feature_settings import check_settings

        arguments = parse_arguments(of_run)
        check_settings(arguments[2])
        check_arguments(*arguments)
        for sentence in unused_flags(*arguments):
            logger.warning(sentence)
        return arguments, Path(arguments[2].output_dir), None
    from lmntk.analysis.least_squares import find_kernel_run
    from lmntk.trainers.feature_settings import arguments_of_run

    if given.folder.is_dir() and any(given.folder.glob("features_*")) and not any(given.folder.glob("*_kernels_*")):
        raise SettingError(f"{given.folder} holds features without a kernel: repeat the flags of run.py after --")
    run = find_kernel_run(given.folder)
    train_kernel = run.kernel_paths.kernel("train")
    folder = given.folder if given.output_dir is None else given.output_dir
    return arguments_of_run(run.record, train_kernel, given.data_dir), folder, train_kernel


def _announce(job: "FeatureJob", asked_dimension: int | None) -> None:
    """Say what the features take, and what they replace."""
    from lmntk.storage.wording import data_size, duration, quantity

    replaced = job.replaced_files()
    cost, names = job.cost(), job.experiment.datasets
    sizes = ", ".join(f"{split} {len(data):,}" for split, data in names.items())
    by_autograd = f", {cost.fallback_parameters:,} of them by autograd" if cost.fallback_parameters else ""
    drawn = f"width {job.projection.width} and seed {job.projection.seed}"
    numbers = f"{quantity(cost.dimension, 'number')} for each logit of a prompt ({sizes}){by_autograd}"
    seconds = f"about {duration(max(cost.seconds, 0.1))} for {quantity(cost.prompts, 'prompt')}"
    sentence = f"features of {drawn}: {numbers}; {data_size(cost.bytes)} in {job.paths.folder}, {seconds}"
    print(sentence, file=sys.stderr)
    if asked_dimension is not None and job.map.num_columns <= asked_dimension:
        print(f"--dimension {asked_dimension} is no less than these numbers: all are kept", file=sys.stderr)
    if replaced:
        print(f"--overwrite: {', '.join(map(str, replaced))} will be replaced", file=sys.stderr)


def _report(job: "FeatureJob", found: "FeatureSolution", error: "FeatureError") -> None:
    """Print and write the scores, and write the predictions, in place of those of an earlier command."""
    from lmntk.experiment.run_record import prediction_rows
    from lmntk.storage.atomic import write_text
    from lmntk.storage.tables import format_table

    task = job.experiment.task
    metric = task.main_metrics[0]
    rows: list[dict[str, Any]] = [
        {"kernel_regularization": f"{number:g}", f"dev {metric}": f"{score:.6g}", "dev loss": f"{loss:.6g}"}
        for number, (score, loss) in zip(found.regularizations, found.scores, strict=bool(found.scores))
    ]
    job.clear_results()
    if rows:
        print(format_table(rows), end="")
        of_features: dict[str, Any] = {"width": job.projection.width, "seed": job.projection.seed}
        of_features |= {"dimension": job.map.dimension, "error": f"{error.entries.own:.4g}"}
        write_text(job.paths.feature_results(), format_table([row | of_features for row in rows], "csv"))
    way = "conjugate gradients" if found.is_iterative else "Cholesky"
    print(f"kernel_regularization {found.chosen:g}, by {way}:")
    for split, evaluation in found.evaluations.items():
        text = io.StringIO()
        table = prediction_rows(job.experiment.datasets[split].task, evaluation.logits, evaluation.labels.tolist())
        csv.writer(text, lineterminator="\n").writerows(table)
        path = job.paths.feature_predictions(split)
        write_text(path, text.getvalue())
        numbers = ", ".join(f"{name.removeprefix('eval_')} = {value:.6g}" for name, value in evaluation.metrics.items())
        print(f"{split}: {numbers} → {path}")
