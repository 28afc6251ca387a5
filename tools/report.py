#!/usr/bin/env python3
"""Write a page that shows the kernels and results of some runs side by side: see `lmntk.commands.report`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
