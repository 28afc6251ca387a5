#!/usr/bin/env python3
"""From a language model and a k-shot task to predictions: by its kernel, or as it is.

Arguments choose a task and a model; the task gives examples; a prompt turns them into features; a trainer turns
features into predictions; results are written. `python run.py --help` explains every flag.
"""

import contextlib
import dataclasses
import logging
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from lmntk import stopping  # noqa: E402 (a plain checkout need not be installed)

logger = logging.getLogger("lmntk")


def main(argv: list[str]) -> int:
    """Run one command line; return the exit status."""
    return stopping.exit_status(lambda: _run(argv))


def _run(argv: list[str]) -> None:
    started = time.perf_counter()
    from lmntk import distributed
    from lmntk.arguments import parse_arguments
    from lmntk.checks import check_arguments

    model_args, data_args, training_args = parse_arguments(argv)
    distributed.all_do(lambda: check_arguments(model_args, data_args, training_args))
    _start_logging(training_args.process_index == 0, data_args.debug_mode)

    from lmntk.build import build
    from lmntk.output_folder import claimed, left_alone

    with contextlib.ExitStack() as stack:
        folder = (left_alone if training_args.dry_run else claimed)(training_args.output_dir)
        distributed.first_does(lambda: stack.enter_context(folder))
        run = distributed.all_do(lambda: build(model_args, data_args, training_args))
        trainer = distributed.all_do(lambda: _make_trainer(run, model_args, training_args))
        if training_args.dry_run:
            trainer.dry_run(started)
            return
        if training_args.do_train:
            trainer.train()
        metrics = {split: trainer.evaluate(run.datasets[split]) for split in ("dev", "test") if split in run.datasets}
        _record(run, metrics, [model_args, data_args, training_args], time.perf_counter() - started)
        trainer.finish()


def _make_trainer(run: Any, model_args: Any, training_args: Any) -> Any:
    from lmntk.errors import UsageError
    from lmntk.trainers.kernel import KernelTrainer
    from lmntk.trainers.prompt import PromptTrainer

    try:
        if training_args.trainer == "kernel" and not training_args.no_train:
            return KernelTrainer(run, model_args, training_args)
        return PromptTrainer(model=run.model, args=training_args, data_collator=run.collator)
    except UsageError:
        raise
    except Exception as error:  # whatever a stock trainer says of flags like --report_to wandb or --push_to_hub
        raise UsageError(" ".join(str(error).split())) from error


def _start_logging(first_process: bool, debug_mode: bool) -> None:
    """Tell what happens on the first process, and on the others only what goes wrong."""
    import transformers

    level = logging.DEBUG if debug_mode else logging.INFO
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(level if first_process else logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()


def _record(run: Any, metrics: dict[str, dict[str, float]], arguments: list[Any], seconds: float) -> None:
    """Write the result files and the line in the log, and say where they are."""
    from lmntk import descriptions, distributed, results

    if not distributed.is_first():
        return
    output_dir, task_key = Path(arguments[-1].output_dir), run.task.key
    record: dict[str, Any] = {}
    for group in arguments:
        flags = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
        # A log is passed on to others; the hub's token is a password.
        record |= {name: value for name, value in flags.items() if not name.endswith("_token")}
    # What came from the task's row is as much an argument as what was given.
    templates = run.prompts.templates
    record |= vars(run.prompts.limits) | {
        "template": templates[0] if len(templates) == 1 else list(templates),
        "mapping": str(dict(run.prompts.mapping)),
    }
    for split, values in metrics.items():
        path = output_dir / f"{'eval' if split == 'dev' else split}_results_{task_key}.txt"
        results.write_metrics(path, values)
        logger.info("%s: %s → %s", split, ", ".join(f"{name} = {value:.6g}" for name, value in values.items()), path)
        record |= {f"{task_key}_{split}_{name}": value for name, value in values.items()}
    record |= {
        "time": datetime.now().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": descriptions.versions(),
    }
    results.append_log(Path("log"), record)
    logger.info("results are in %s, and a line in %s; %.0f s in all", output_dir, Path("log").resolve(), seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
