#!/usr/bin/env python3
"""Fetch the published kernels of RoBERTa-base: see `lmntk.commands.download`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.download import main

if __name__ == "__main__":
    sys.exit(main())
