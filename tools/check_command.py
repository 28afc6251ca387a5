#!/usr/bin/env python3
"""Check a command line of run.py, with its data and prompts, without starting the run.

No model is opened; a GGUF file is converted, as the run itself would do first.

    python tools/check_command.py --model_name_or_path roberta-base --task_name SST-2 --data_dir … --output_dir … …

It prints nothing if run.py would start, else the error. run_fewshot.sh calls it before it starts several processes,
each of which would fail in the same way; call it before you put a job into a queue.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.run import wording


def main(argv: list[str]) -> None:
    """Read everything that a run reads, except the model's weights."""
    from lmntk.config.arguments import parse_arguments
    from lmntk.config.validation import check_arguments
    from lmntk.experiment.build import check_inputs

    arguments = parse_arguments(argv)
    check_arguments(*arguments)
    logging.getLogger("lmntk").setLevel(logging.ERROR)  # the run itself prints the warnings
    check_inputs(*arguments)


if __name__ == "__main__":
    sys.exit(interrupts.exit_status(lambda: main(sys.argv[1:]), wording=wording))
