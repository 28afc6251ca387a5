"""Predict with the kernel of a language model: run.py with `--trainer kernel`."""

from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str]) -> NoReturn:
    """Run one command line, which may begin with a JSON file of settings, and end the process."""
    from lmntk.commands.run import end_process

    num_files = 1 if argv and argv[0].endswith(".json") else 0  # run.py takes a file as its first word
    end_process([*argv[:num_files], "--trainer", "kernel", *argv[num_files:]])
