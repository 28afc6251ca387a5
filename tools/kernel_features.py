#!/usr/bin/env python3
"""The same as `lmntk features`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    from lmntk import interrupts

    interrupts.begin()
    from lmntk.commands.features import main

    sys.exit(main())
