#!/usr/bin/env python
"""Draw k-shot splits; the same as `lmntk splits`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.splits import main

if __name__ == "__main__":
    sys.exit(main())
