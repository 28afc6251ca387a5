"""From a language model and a k-shot task to predictions: by its kernel, or as it is.

Arguments choose a task and a model; the task gives examples; a prompt turns them into features; a trainer turns
features into predictions; results are written. `python run.py --help` explains every flag.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lmntk import interrupts, startup
from lmntk.errors import UsageError

if TYPE_CHECKING:
    from lmntk.config.arguments import DataArguments, ModelArguments, TrainingArguments

WHEN_STOPPED = "kernels that were finished are kept; the same command goes on from there"

logger = logging.getLogger("lmntk")


def main(argv: list[str]) -> int:
    """Run one command line; return the exit status."""
    return interrupts.exit_status(lambda: _run(argv), WHEN_STOPPED, prints_results=False, wording=wording)


def wording(error: UsageError) -> str:
    """Return the sentence of an error with the flags and commands of run.py."""
    from lmntk.config.arguments import flag_names
    from lmntk.config.flag_names import in_flags
    from lmntk.config.remedies import sentence_of

    return in_flags(sentence_of(error), flag_names())


def _run(argv: list[str]) -> None:
    started = time.perf_counter()
    startup.import_transformers()
    from lmntk.config.arguments import parse_arguments
    from lmntk.config.validation import check_arguments
    from lmntk.distributed import on_all_ranks, on_rank_zero

    model_args, data_args, training_args = parse_arguments(argv)
    on_all_ranks(check_arguments, model_args, data_args, training_args)
    _start_logging(training_args.process_index == 0, data_args.debug_mode)
    _log_settings(model_args, data_args, training_args)

    from lmntk.experiment.build import build
    from lmntk.experiment.run_record import record_run
    from lmntk.trainers import make_trainer
    from lmntk.trainers.loaded_kernels import LoadedKernelTrainer

    with _output_folder(training_args) as training_args:
        inputs = on_all_ranks(build, model_args, data_args, training_args)
        trainer = on_all_ranks(make_trainer, inputs, model_args, training_args)
        startup.end()
        if training_args.dry_run and isinstance(trainer, LoadedKernelTrainer):
            trainer.dry_run(started)
            return
        if training_args.do_train:
            trainer.train()
        splits = {split: data for split, data in inputs.datasets.items() if split != "train"}
        evaluations = {split: trainer.evaluate_split(data) for split, data in splits.items()}
        seconds = time.perf_counter() - started
        arguments = model_args, data_args, trainer.args
        on_rank_zero(record_run, inputs, evaluations, *arguments, seconds, trainer.facts())
        trainer.finish()
        if training_args.kernel_influence and isinstance(trainer, LoadedKernelTrainer):
            on_rank_zero(_write_influence, training_args.output_dir, inputs.task.key, trainer.args.lstsq_method)


def _write_influence(folder: str, task_key: str, method: str) -> None:
    """Write what single train examples do to the predictions of a run that is recorded."""
    from lmntk.analysis.influence import influence_of_folder

    if method not in ("auto", "direct"):  # the kernel was too large for the direct method
        logger.warning("`kernel_influence`: nothing is written: it needs `lstsq_method=direct`, not %s", method)
        return
    try:
        files = influence_of_folder(Path(folder), task_key)
    except UsageError as error:
        logger.warning("`kernel_influence`: nothing is written: %s", error)
    else:
        logger.info("what single train examples do: %s", ", ".join(map(str, files)))


@contextlib.contextmanager
def _output_folder(args: "TrainingArguments") -> Iterator["TrainingArguments"]:
    """Keep the output folder for this run, with `sweep` a new folder in it; a dry run leaves no folder.

    Yields:
        The arguments, with the folder of the run as ``output_dir``.
    """
    from lmntk.distributed import on_rank_zero
    from lmntk.storage.output_folder import output_folder_for

    with contextlib.ExitStack() as entered:
        folder = output_folder_for(args.output_dir, sweep=args.sweep, dry_run=args.dry_run)
        path = on_rank_zero(entered.enter_context, folder)
        yield args.with_changes(output_dir=str(path)) if args.sweep else args


def _log_settings(model_args: "ModelArguments", data_args: "DataArguments", training_args: "TrainingArguments") -> None:
    """Log which flags have no effect, and what ``--as_published`` changes."""
    from lmntk import distributed
    from lmntk.config.validation import published_changes, unused_flags

    if distributed.is_first():
        for sentence in unused_flags(model_args, data_args, training_args):
            logger.warning(sentence)
        for sentence in published_changes(model_args, data_args, training_args):
            logger.info(sentence)


def _start_logging(first_process: bool, debug_mode: bool) -> None:
    """Log progress on the first process, and warnings alone on the others."""
    import transformers

    from lmntk.config.arguments import flag_names
    from lmntk.config.flag_names import FlagFormatter

    level = logging.DEBUG if debug_mode else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(FlagFormatter("%(asctime)s %(message)s", "%H:%M:%S", flag_names()))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logger.setLevel(level if first_process else logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()


def end_process(argv: list[str]) -> NoReturn:
    """Run one command line as the whole work of this process."""
    if {"-h", "--help"}.intersection(argv):
        from lmntk.config.run_help import stored_help

        text = stored_help()
        if text is not None:
            sys.exit(interrupts.exit_status(lambda: print(text, end="")))
    startup.begin()
    status = main(argv)
    if not status:
        from lmntk import distributed

        distributed.shut_down()
    startup.end()
    sys.exit(status)
