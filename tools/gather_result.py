#!/usr/bin/env python
"""Gather results from the log; the same as `lmntk gather`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.commands.gather import main


def note(text: str) -> None:
    """Print a note for compare_kernels.py, until that has its own."""
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
