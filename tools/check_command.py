#!/usr/bin/env python3
"""Say whether run.py takes a command line, without starting it: its flags, data and prompts.

No model is opened; a GGUF file is converted, as the run itself would do first.

    python tools/check_command.py --model_name_or_path roberta-base --task_name SST-2 --data_dir … --output_dir … …

It prints nothing where run.py would start. run_fewshot.sh asks it before it starts several processes, each of which
would meet the same mistake; before a job is put into a queue it may be asked too.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.config.tool_parser import exit_status


def main(argv: list[str]) -> None:
    """Read all that a run reads but its model."""
    from lmntk.config.arguments import parse_arguments
    from lmntk.config.validation import check_arguments
    from lmntk.experiment.build import build

    arguments = parse_arguments(argv)
    check_arguments(*arguments)
    logging.getLogger("lmntk").setLevel(logging.ERROR)  # the run itself says what is odd
    build(*arguments, opens_model=False)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
