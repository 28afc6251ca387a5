"""How `lstsq` solves a system that is not held in memory: its settings, and when a system is that large."""

from dataclasses import dataclass
from pathlib import Path

from lmntk.errors import Bounds, check_numbers

AUTO, DIRECT, CHOLESKY, CG = "auto", "direct", "cholesky", "cg"
METHODS = {
    DIRECT: "minimum-norm solution in memory",
    CHOLESKY: "Cholesky in a scratch file",
    CG: "conjugate gradients",
}
"""The methods of `lstsq` with a few words for each; `AUTO` is `DIRECT` where that fits into memory, else `CHOLESKY`."""

DEFAULT_TOLERANCE = 1e-8
TOLERANCE_BOUNDS = Bounds("cg_tolerance", 1e-15, 0.1)

DIRECT_COPIES = 5
"""How many matrices of the kernel's size the direct method, with its leave-one-out metrics, holds at once."""


@dataclass(frozen=True)
class Blocked:
    """A way to solve A α = y, with A = K + λ‖K‖₂ I, that reads the kernel K in blocks.

    Attributes:
        method: `CHOLESKY` or `CG`.
        folder: Where the scratch file of `CHOLESKY` may be; half of the kernel's size is needed there.
        tolerance: `CG` stops where ‖y − Aα‖ is at most this part of ‖y‖.
        progress: Whether to show a progress bar.

    Raises:
        SettingError: The tolerance is out of bounds.
    """

    method: str
    folder: Path
    tolerance: float = DEFAULT_TOLERANCE
    progress: bool = False

    def __post_init__(self) -> None:
        """Check the tolerance."""
        check_numbers([TOLERANCE_BOUNDS], {"cg_tolerance": self.tolerance})


def direct_bytes(rows: int) -> int:
    """Return the memory that the direct method takes for a kernel of so many rows, N · C, beside the kernel's file."""
    return DIRECT_COPIES * 8 * rows**2
