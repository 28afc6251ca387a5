#!/usr/bin/env python
"""Average the logits of several models; the same as `lmntk ensemble`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.ensemble import main

if __name__ == "__main__":
    sys.exit(main())
