#!/usr/bin/env python3
"""What the kernels of a k-shot task cost on one and on many GPUs; the same as `lmntk estimate`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.estimate import main

if __name__ == "__main__":
    sys.exit(main())
