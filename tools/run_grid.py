#!/usr/bin/env python
"""Start a grid of runs; the same as `lmntk grid`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.grid import main

if __name__ == "__main__":
    sys.exit(main())
