"""Write projected gradients of every text as features, and predict from them: for thousands of texts.

    lmntk features result/SST-2-roberta-base-prompt-kernel/16-42
    lmntk features --solve -- --trainer kernel --task_name SST-2 --data_dir data/all/SST-2 --output_dir result/large
        --model_name_or_path roberta-base --few_shot_type prompt --do_train --do_eval --do_predict

It takes the folder of a finished kernel run; or, after --, the flags of run.py, of which it computes no kernel. It
loads the model and writes features_<split>_<task>.safetensors: float32 [N, C, d], whose inner products estimate the
kernel of all parameters without bias. docs/explanation/features.md explains them, docs/reference/kernel-files.md the
file. --solve predicts by ridge regression on the features, which is lstsq with their kernel, but never forms that
kernel. The same command goes on where a stopped one was.
"""

import argparse
import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import Bounds, SettingError, check_numbers

if TYPE_CHECKING:
    from lmntk.config.record_arguments import Arguments
    from lmntk.trainers.feature_solver import FeatureSolution
    from lmntk.trainers.features import FeatureJob

BOUNDS = (Bounds("width", 1, 4096), Bounds("dimension", 1, 10**7), Bounds("check", 0, 1000))
WITH_SOLVE = ("kernel_regularization", "conjugate_gradients")
GOES_ON = "what was written is kept; the same command goes on from there"


def make_parser() -> Parser:
    """Return the parser of the command line, up to ``--``."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="RUN", help="folder of a kernel run; or give run.py's flags after --")
    add("--width", type=int, help="k: k * k numbers of each weight's gradient (that of a projected run, else 16)")
    add("--seed", type=int, help="seed of the random matrices (that of a projected run, else 0)")
    add("--dimension", type=int, metavar="D", help="hash all numbers of a text's logit to so many (keep all)")
    add("--check", type=int, default=32, metavar="N", help="compare with the exact kernel of N train texts; 0: do not "
        "(32)")  # fmt: skip
    add("--solve", action="store_true", help="predict dev and test by ridge regression on the features")
    add("--kernel_regularization", metavar="LAMBDA", help="with --solve: a number above 0, or several with commas to "
        "choose among on dev (1e-06 to 0.1)")  # fmt: skip
    add("--conjugate_gradients", action="store_true", help="with --solve: form no matrix of d or N * C rows (where "
        "both are large)")  # fmt: skip
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
    regularizations = _check_flags(given, of_run)
    from lmntk import startup

    startup.import_transformers()
    from lmntk.storage.output_folder import output_folder_for
    from lmntk.trainers.features import FeatureJob

    started = time.perf_counter()
    arguments, folder, train_kernel = _arguments(given, of_run)
    with output_folder_for(folder, sweep=False, dry_run=given.dry_run):
        job = FeatureJob(arguments, given.width, given.seed, given.dimension, folder)
        if train_kernel is not None:
            job.check_run(train_kernel)
        _announce(job)
        if given.dry_run:
            return
        show = sys.stderr.isatty()
        features = {split: job.write(split, show) for split in job.experiment.datasets}
        if given.check:
            print(f"relative error of the features' kernel on {min(given.check, len(features['train'].labels))} train "
                  f"texts: {job.error(given.check):.1%}")  # fmt: skip
        if given.solve:
            from lmntk.trainers.feature_solver import REGULARIZATIONS, solve_features

            n, c, d = features["train"].shape
            print(f"solving {n * c:,} equations in {d:,} unknowns", file=sys.stderr)
            candidates = REGULARIZATIONS if regularizations is None else regularizations
            iterative = True if given.conjugate_gradients else None
            found = solve_features(features, job.experiment.datasets, arguments[2], candidates, iterative)
            _report(job, found)
    for own in features.values():
        print(own.path)
    print(f"{time.perf_counter() - started:.0f} s in all", file=sys.stderr)


def _check_flags(given: argparse.Namespace, of_run: Sequence[str]) -> tuple[float, ...] | None:
    """Refuse flags that do not go together; return the regularizations that were asked for."""
    if (given.folder is None) == (not of_run):
        both = "give the folder of a run, or run.py's flags after --, not both"
        raise SettingError(both if of_run else "give the folder of a kernel run, or run.py's flags after --")
    for name in ("data_dir", "output_dir"):
        if of_run and getattr(given, name) is not None:
            raise SettingError(f"`{name}` stands among run.py's flags, after --: give it there", setting=name)
    for name in WITH_SOLVE:
        if not given.solve and getattr(given, name):
            raise SettingError(f"`{name}` is for `solve`: add it, or leave this out", setting=name)
    if given.kernel_regularization is None:
        return None
    from lmntk.solvers.candidates import read_candidates
    from lmntk.solvers.feature_ridge import RIDGE_BOUNDS

    numbers = read_candidates("kernel_regularization", given.kernel_regularization)
    check_numbers(RIDGE_BOUNDS, {"kernel_regularization": list(numbers)})
    return numbers


def _arguments(given: argparse.Namespace, of_run: Sequence[str]) -> "tuple[Arguments, Path, Path | None]":
    """Return the arguments of the run, where files go, and the kernel of train that must fit."""
    if of_run:
        from lmntk.config.arguments import parse_arguments
        from lmntk.config.validation import check_arguments

        arguments = parse_arguments(of_run)
        check_arguments(*arguments)
        return arguments, Path(arguments[2].output_dir), None
    from lmntk.analysis.least_squares import find_kernel_run
    from lmntk.trainers.features import arguments_of_run

    run = find_kernel_run(given.folder)
    train_kernel = run.kernel_paths.kernel("train")
    folder = given.folder if given.output_dir is None else given.output_dir
    return arguments_of_run(run.record, train_kernel, given.data_dir), folder, train_kernel


def _announce(job: "FeatureJob") -> None:
    """Say what the features take."""
    from lmntk.storage.wording import data_size, duration, quantity

    cost, names = job.cost(), job.experiment.datasets
    sizes = ", ".join(f"{split} {len(data):,}" for split, data in names.items())
    by_autograd = f", {cost.fallback_parameters:,} of them by autograd" if cost.fallback_parameters else ""
    drawn = f"width {job.projection.width} and seed {job.projection.seed}"
    numbers = f"{quantity(cost.dimension, 'number')} for each logit of a prompt ({sizes}){by_autograd}"
    seconds = f"about {duration(max(cost.seconds, 0.1))} for {quantity(cost.prompts, 'prompt')}"
    sentence = f"features of {drawn}: {numbers}; {data_size(cost.bytes)} in {job.paths.folder}, {seconds}"
    print(sentence, file=sys.stderr)


def _report(job: "FeatureJob", found: "FeatureSolution") -> None:
    """Print and write the scores, and write the predictions."""
    from lmntk.experiment.run_record import prediction_rows
    from lmntk.storage.atomic import write_text
    from lmntk.storage.tables import format_table

    task = job.experiment.task
    metric = task.main_metrics[0]
    rows: list[dict[str, Any]] = [
        {"kernel_regularization": f"{number:g}", f"dev {metric}": f"{score:.6g}", "dev loss": f"{loss:.6g}"}
        for number, (score, loss) in zip(found.regularizations, found.scores, strict=bool(found.scores))
    ]
    if rows:
        print(format_table(rows), end="")
        write_text(job.paths.feature_results(), format_table(rows, "csv"))
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
