#!/usr/bin/env python3
"""Compare two kernels: see `lmntk.commands.compare`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
