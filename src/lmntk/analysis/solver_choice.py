"""Which solver settings the predictions of a stored run are worked out with."""

from dataclasses import dataclass, field

from lmntk.solvers.problem import SolverSettings

OF_RUN, OF_FLAGS = "each run's own solver settings", "the solver settings of the flags"
DEFAULTS = "default solver settings, as the folder does not say"
"""Where solver settings come from."""


@dataclass(frozen=True)
class SolverChoice:
    """How kernels become predictions.

    Attributes:
        solver: A key of `lmntk.solvers.SOLVERS`.
        settings: Its numbers.
        adjusts: ``--adjust_for_init``.
        source: Where that is from.
    """

    solver: str = "lstsq"
    settings: SolverSettings = field(default_factory=SolverSettings)
    adjusts: bool = False
    source: str = DEFAULTS


_SETTINGS = {
    "kernel_solver": "",
    "kernel_regularization": "regularization",
    "kernel_gamma": "gamma",
    "kernel_lambda": "lambda_",
    "f0_scaling": "f0_scaling",
    "flattened_targets": "flattened_targets",
    "plain_lbfgs": "plain_lbfgs",
}
