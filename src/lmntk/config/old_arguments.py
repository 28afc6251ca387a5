"""Flags of transformers 4.4, the published program's version, that transformers has dropped since."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from lmntk.config.flag_fields import flag
from lmntk.errors import Bounds, check_numbers

# Flags without effect, and why.
IGNORED = {
    "fp16_opt_level": "--fp16 is torch's mixed precision, which has no levels",
    "fp16_backend": "--fp16 is always torch's mixed precision",
    "tpu_num_cores": "this program does not run on TPUs",
    "tpu_metrics_debug": "this program does not run on TPUs",
    "past_index": "the models keep no state between batches",
    "sharded_ddp": "it belonged to fairscale; --fsdp is torch's own",
}
_ALONE = {"nargs": "?", "const": "True"}  # the value may be left out


@dataclass
class OldArguments:
    """Flags of transformers 4.4 that transformers has dropped; those in `IGNORED` have no effect."""

    _argument_group_name = "Flags of transformers 4.4, for old scripts"

    warmup_ratio: float = flag(
        "Share of the steps over which the learning rate rises; --warmup_steps overrides it.", 0.0
    )
    logging_dir: str | None = flag("Folder for the logs of --report_to tensorboard.")
    adafactor: bool = flag("Train with Adafactor: --optim adafactor.", False)
    group_by_length: bool = flag(
        "Train on batches of prompts of similar length: --train_sampling_strategy group_by_length.", False
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
    """Set the current flags to what old flags mean, before transformers reads them.

    Args:
        args: The arguments, old ones and those of transformers.

    Raises:
        SettingError: `warmup_ratio` is not a share.
    """
    check_numbers([Bounds("warmup_ratio", 0, 1)], vars(args))
    if args.warmup_ratio and not args.warmup_steps:
        # transformers takes a number below 1 as a share of all steps, and 1 as one step.
        args.warmup_steps = min(args.warmup_ratio, 1 - 1e-9)
    if args.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = args.logging_dir
    if args.adafactor:
        args.optim = "adafactor"
    if args.group_by_length:
        args.train_sampling_strategy = "group_by_length"
