"""Predict with the kernel of a language model: run.py with `--trainer kernel`, for train, dev and test.

Without a JSON file of settings the defaults are those of run_fewshot.sh: prompts without demonstrations.
"""

from collections.abc import Sequence
from typing import NoReturn

WHOLE_RUN = ("--few_shot_type", "prompt", "--do_train", "--do_eval", "--do_predict")


def main(argv: Sequence[str]) -> NoReturn:
    """Run one command line, which may begin with a JSON file of settings, and end the process."""
    from lmntk.commands.run import end_process

    names_file = bool(argv) and argv[0].endswith(".json")  # run.py takes a file as its first word
    start, rest = (argv[:1], argv[1:]) if names_file else (WHOLE_RUN, argv)
    end_process([*start, "--trainer", "kernel", *rest])
