#!/usr/bin/env python
"""Compute sentence embeddings of k-shot data; the same as `lmntk embed`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.embed import main

if __name__ == "__main__":
    sys.exit(main())
