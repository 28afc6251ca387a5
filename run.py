#!/usr/bin/env python3
"""From a language model and a k-shot task to predictions: by its kernel, by training, or as it is.

`python run.py --help` explains every flag; the work is done in `src/lmntk/commands/run.py`.
"""

import sys
from pathlib import Path

# A plain checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.run import end_process, main  # noqa: F401 (main is called from Python)

if __name__ == "__main__":
    end_process(sys.argv[1:])
