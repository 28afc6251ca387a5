"""How well the class probabilities that a run wrote match what happened."""

import csv
from dataclasses import dataclass

import numpy as np

from lmntk.analysis.saved_run import REPEAT, SavedRun
from lmntk.errors import FileError
from lmntk.solvers.calibration import ReliabilityBin, expected_calibration_error, reliability_bins


@dataclass(frozen=True)
class Reliability:
    """The reliability of a split's probabilities.

    Attributes:
        bins: The bins that have examples.
        error: The expected calibration error.
    """

    bins: list[ReliabilityBin]
    error: float


def read_reliability(run: SavedRun, split: str) -> Reliability | None:
    """Read the probabilities that `kernel_variance` wrote of a split; None if there are none.

    Raises:
        FileError: The table cannot be read.
    """
    path = run.paths.variance(split)
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name.startswith("probability_")]
        probabilities = np.array([[float(row[name]) for name in names] for row in rows])
        classes = np.array([names.index(f"probability_{row['label']}") for row in rows])
    except (OSError, ValueError, LookupError, csv.Error) as error:
        raise FileError(f"{path} cannot be read as a table of probabilities: {REPEAT}", path=path) from error
    error_of = expected_calibration_error(probabilities, classes)
    return Reliability(reliability_bins(probabilities, classes), error_of)
