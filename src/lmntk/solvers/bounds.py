"""The values that the numbers of flags can take."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lmntk.errors import UsageError


class Bounds(NamedTuple):
    """The values that a number can take; None, where it is a flag's default, always passes."""

    flag: str
    least: float
    most: float = math.inf
    above: bool = False  # `least` itself is too little
    or_zero: bool = False  # 0 is allowed beside them

    def hold(self, value: float) -> bool:
        """Whether a value is allowed; infinity and nan never are."""
        if self.or_zero and value == 0:
            return True
        enough = value > self.least if self.above else value >= self.least
        return enough and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        """The allowed values, for a sentence."""
        zero = "0, or " if self.or_zero else ""
        if self.most < math.inf:
            return f"above {self.least}, up to {self.most}" if self.above else f"{zero}from {self.least} to {self.most}"
        return f"above {self.least}" if self.above else f"{self.least} or more"


def check_numbers(table: Iterable[Bounds], values: Mapping[str, Any]) -> None:
    """Hold the values of flags, numbers or lists of them, to their bounds.

    Raises:
        UsageError: Names the first flag with a number out of bounds.
    """
    for bounds in table:
        given = values[bounds.flag]
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not bounds.hold(value):
                raise UsageError(f"--{bounds.flag} is {value}, but it must be {bounds}")


SOLVER_BOUNDS = {
    # With more, float64 has nothing left of the kernel beside its diagonal.
    "regularization": Bounds("kernel_regularization", 0, 1e12),
    "gamma": Bounds("kernel_gamma", 1e-100, 1e100),
    "lambda_": Bounds("kernel_lambda", 0, 1),
    "f0_scaling": Bounds("f0_scaling", 1e-100, 1e100, or_zero=True),
}
"""By the names of `lmntk.solvers.problem.SolverSettings`. Beyond 1e±100 squares are infinite, or 0."""

LARGEST_IN_KERNEL = Bounds("", 1e-100, 1e100, or_zero=True)
"""Of no flag: what the largest value of a kernel can be, its sign left out, for the same reason."""

MOST_OF_F0 = 1e50
"""What the untrained model's logits over --f0_scaling can be: `asym` multiplies two of them and a kernel's value."""
