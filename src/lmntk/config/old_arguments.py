"""Flags of transformers 4.4, the published program's version, that transformers has dropped since."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from lmntk.config.flag_fields import flag
from lmntk.errors import UsageError

# Those to which nothing answers.
IGNORED = {
    "fp16_opt_level": "--fp16 is torch's mixed precision, which has no levels",
    "fp16_backend": "--fp16 is torch's mixed precision, and there is no other",
    "tpu_num_cores": "this program does not run on TPUs",
    "tpu_metrics_debug": "this program does not run on TPUs",
    "past_index": "the models here keep nothing from one batch to the next",
    "sharded_ddp": "it was fairscale's; --fsdp is torch's own",
}
_ALONE = {"nargs": "?", "const": "True"}  # may stand without a value


@dataclass
class OldArguments:
    """Flags of transformers 4.4 that transformers has dropped; nothing reads those of `IGNORED`."""

    _argument_group_name = "Flags of transformers 4.4, for old scripts"

    warmup_ratio: float = flag("Share of the steps over which the learning rate rises; --warmup_steps goes first.", 0.0)
    logging_dir: str | None = flag("Folder for the logs of --report_to tensorboard.")
    adafactor: bool = flag("Train with Adafactor: --optim adafactor.", False)
    group_by_length: bool = flag(
        "Train on batches of prompts of like length: --train_sampling_strategy group_by_length.", False
    )
    fp16_opt_level: str | None = flag("Accepted for old scripts, and ignored.")
    fp16_backend: str | None = flag("Accepted for old scripts, and ignored.")
    tpu_num_cores: int | None = flag("Accepted for old scripts, and ignored.")
    tpu_metrics_debug: str | None = dataclasses.field(
        default=None, metadata={"help": "Accepted for old scripts, and ignored; so is --debug True.", **_ALONE}
    )
    past_index: int | None = flag("Accepted for old scripts, and ignored.")
    sharded_ddp: str | None = dataclasses.field(
        default=None, metadata={"help": "Accepted for old scripts, and ignored.", **_ALONE}
    )


def translate_old_flags(args: Any) -> None:
    """Say what old flags mean by the flags of today, before transformers reads these.

    Args:
        args: `OldArguments`, and transformers' own beside them.

    Raises:
        UsageError: A share of the steps that is none.
    """
    if not 0 <= args.warmup_ratio <= 1:
        raise UsageError(f"--warmup_ratio is {args.warmup_ratio}, but it must be from 0 to 1")
    if args.warmup_ratio and not args.warmup_steps:
        # Below 1 it is a share of all steps; 1 would be one step.
        args.warmup_steps = min(args.warmup_ratio, 1 - 1e-9)
    if args.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = args.logging_dir
    if args.adafactor:
        args.optim = "adafactor"
    if args.group_by_length:
        args.train_sampling_strategy = "group_by_length"
