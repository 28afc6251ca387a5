"""Fine-tune a language model, or fit its last layer: run.py with `--trainer standard` unless another is given."""

from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str]) -> NoReturn:
    """Run one command line, which may begin with a JSON file of settings, and end the process."""
    from lmntk.commands.run import end_process

    end_process([*argv])  # run.py's own default is the standard trainer
