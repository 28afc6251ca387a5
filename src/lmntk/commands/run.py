"""From a language model and a k-shot task to predictions: by its kernel, or as it is.

Arguments choose a task and a model; the task gives examples; a prompt turns them into features; a trainer turns
features into predictions; results are written. `python run.py --help` explains every flag.
"""

import contextlib
import logging
import sys
import time
from typing import Any, NoReturn

from lmntk import interrupts
from lmntk.errors import UsageError

WHEN_STOPPED = "kernels that were finished are kept; the same command goes on from there"

logger = logging.getLogger("lmntk")


def main(argv: list[str]) -> int:
    """Run one command line; return the exit status."""
    return interrupts.exit_status(lambda: _run(argv), WHEN_STOPPED, prints_results=False, wording=_wording)


def _wording(error: UsageError) -> str:
    from lmntk.config.arguments import flag_names
    from lmntk.config.flag_names import in_flags
    from lmntk.config.remedies import sentence_of

    return in_flags(sentence_of(error), flag_names())


def _run(argv: list[str]) -> None:
    started = time.perf_counter()
    from lmntk import distributed
    from lmntk.config.arguments import parse_arguments
    from lmntk.config.validation import check_arguments, published_changes, unused_flags

    model_args, data_args, training_args = parse_arguments(argv)
    distributed.on_all_ranks(lambda: check_arguments(model_args, data_args, training_args))
    _start_logging(training_args.process_index == 0, data_args.debug_mode)
    if distributed.is_first():
        for sentence in unused_flags(model_args, data_args, training_args):
            logger.warning(sentence)
        for sentence in published_changes(model_args, data_args, training_args):
            logger.info(sentence)

    from lmntk.experiment.build import build
    from lmntk.experiment.run_record import record_run
    from lmntk.storage.output_folder import claimed, no_leftover_folders, timestamped_folder

    with contextlib.ExitStack() as stack:
        if training_args.sweep and not training_args.dry_run:
            own = timestamped_folder(training_args.output_dir)
            training_args.output_dir = distributed.on_rank_zero(lambda: str(stack.enter_context(own)))
        folder = (no_leftover_folders if training_args.dry_run else claimed)(training_args.output_dir)
        distributed.on_rank_zero(lambda: stack.enter_context(folder))
        run = distributed.on_all_ranks(lambda: build(model_args, data_args, training_args))
        trainer = distributed.on_all_ranks(lambda: _make_trainer(run, model_args, training_args))
        if training_args.dry_run:
            trainer.dry_run(started)
            return
        if training_args.do_train:
            trainer.train()
        metrics = {split: trainer.evaluate(data) for split, data in run.datasets.items() if split != "train"}
        arguments, seconds = (model_args, data_args, training_args), time.perf_counter() - started
        distributed.on_rank_zero(lambda: record_run(run, metrics, trainer.averaged, trainer.labels, arguments, seconds))
        trainer.finish()


def _make_trainer(run: Any, model_args: Any, training_args: Any) -> Any:
    from lmntk.trainers.base import ZeroShotTrainer
    from lmntk.trainers.finetune import FineTuneTrainer
    from lmntk.trainers.kernel import KernelTrainer
    from lmntk.trainers.linear_head import HeadSettings, LinearHeadTrainer, fit_linear_head

    kind = training_args.active_trainer
    if kind in ("kernel", "standard") and training_args.from_linearhead and run.model is not None:
        fit_linear_head(run, training_args.device, HeadSettings.of(training_args))
    try:
        if kind == "kernel":
            return KernelTrainer(run, model_args, training_args)
        if kind == "standard":
            return FineTuneTrainer(run, model_args, training_args)
        if kind == "linearhead":
            return LinearHeadTrainer(run, training_args)
        return ZeroShotTrainer(run, run.model, training_args, l2_loss=model_args.l2_loss)
    except (
        ValueError,
        ImportError,
        OSError,
    ) as error:  # whatever a stock trainer says of flags like --report_to wandb or --push_to_hub
        raise UsageError(" ".join(str(error).split())) from error


def _start_logging(first_process: bool, debug_mode: bool) -> None:
    """Tell what happens on the first process, and on the others only what goes wrong."""
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
        # transformers imports it wherever it is installed, which takes twice as long as all that the help needs.
        sys.modules["peft"] = None  # type: ignore[assignment]
    status = main(argv)
    if not status:
        from lmntk import distributed

        distributed.shut_down()
    sys.exit(status)
