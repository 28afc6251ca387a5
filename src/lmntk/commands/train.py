"""Fine-tune a language model, or fit its last layer: run.py with `--trainer standard` unless another is given.

Without a JSON file of settings the defaults are those of run_fewshot.sh: prompts without demonstrations.
"""

from collections.abc import Sequence
from typing import NoReturn

from lmntk.commands.kernel import WHOLE_RUN


def main(argv: Sequence[str]) -> NoReturn:
    """Run one command line, which may begin with a JSON file of settings, and end the process."""
    from lmntk.commands.run import end_process

    end_process([*argv] if argv and argv[0].endswith(".json") else [*WHOLE_RUN, *argv])
