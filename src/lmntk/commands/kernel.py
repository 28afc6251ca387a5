"""Predict with the kernel of a language model: run.py with `--trainer kernel`."""

from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str]) -> NoReturn:
    """Run one command line, and end the process."""
    from lmntk.commands.run import end_process

    end_process(["--trainer", "kernel", *argv])
