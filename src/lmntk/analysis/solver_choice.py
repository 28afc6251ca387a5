"""The solver settings that the predictions of a saved run are recomputed with."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmntk.analysis.saved_run import SavedRun
from lmntk.errors import FileError
from lmntk.solvers.bounds import SOLVER_BOUNDS
from lmntk.solvers.problem import SolverSettings

_FIELDS = {bounds.setting: name for name, bounds in SOLVER_BOUNDS.items()} | {
    name: name for name in ("flattened_targets", "plain_lbfgs")
}
"""Fields of `SolverSettings` by the names of the settings in a run's record."""


class Source(enum.Enum):
    """Where solver settings come from."""

    RUN = "each run's own solver settings"
    FLAGS = "the given solver settings"
    DEFAULT = "default solver settings (the folder records none)"


@dataclass(frozen=True)
class SolverChoice:
    """How predictions are made from saved kernels.

    Attributes:
        solver: A key of `lmntk.solvers.SOLVERS`.
        settings: The solver's numbers.
        adjust_for_init: Whether the untrained model's logits are fitted around, as with the setting of that name.
        source: Where all this comes from.
    """

    solver: str = "lstsq"
    settings: SolverSettings = field(default_factory=SolverSettings)
    adjust_for_init: bool = False
    source: Source = Source.DEFAULT


def records_solver(run: SavedRun) -> bool:
    """Whether a folder records how its kernels predict; one with kernels alone does not."""
    return run.record.get("trainer") == "kernel"


def choose_solver(run: SavedRun, given: Mapping[str, Any]) -> SolverChoice:
    """Return how a run predicted from its kernels, with given settings in place of the run's own.

    Args:
        run: A run, or a folder with kernels alone, for which the defaults count.
        given: Settings by name, such as ``kernel_solver``; None counts as absent.

    Raises:
        FileError: The run's record holds solver settings that are not numbers.
    """
    given = {name: value for name, value in given.items() if value is not None}
    record = run.record if records_solver(run) else {}
    settings = {**record, **given}
    try:
        numbers: dict[str, Any] = {field: float(settings[name]) for name, field in _FIELDS.items() if name in settings}
    except (TypeError, ValueError) as error:
        path = run.paths.record()
        raise FileError(
            f"{path} holds solver settings that are not numbers: repeat the run's command", path=path
        ) from error
    source = Source.DEFAULT
    if given or record:
        source = Source.FLAGS if given else Source.RUN
    return SolverChoice(
        solver=str(settings.get("kernel_solver", "lstsq")),
        settings=SolverSettings(**numbers),
        adjust_for_init=bool(record.get("adjust_for_init")),
        source=source,
    )
