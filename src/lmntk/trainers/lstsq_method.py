"""Which method of `lstsq` a run takes: the direct one, unless another is asked for or memory is too small for it."""

import dataclasses
import logging
from pathlib import Path

import torch

from lmntk.config.arguments import TrainingArguments
from lmntk.errors import SettingError
from lmntk.kernels import FORMULAS
from lmntk.kernels.memory import free_bytes
from lmntk.solvers.blocked import AUTO, CHOLESKY, DIRECT, Blocked, direct_bytes
from lmntk.solvers.problem import SolverSettings

logger = logging.getLogger(__name__)

_NEEDS = "the eigenvectors of the train kernel in memory, which `lstsq_method={}` does not have"


def solver_grid(args: TrainingArguments, rows: int) -> list[SolverSettings]:
    """Return the settings of the solver, one or the candidates, with the method of `lstsq` if it is not the direct one.

    Args:
        args: The arguments of the run.
        rows: N · C, the rows of the train kernel.

    Raises:
        SettingError: Candidates are to be chosen by leave-one-out, and the kernel is too large for the direct method.
    """
    grid, blocked = args.solver_grid, blocked_solver(args, rows)
    if blocked is None:
        return grid
    if len(grid) > 1 and args.select_by == "loo":
        raise SettingError(
            f"`select_by=loo` needs {_NEEDS.format(blocked.method)}: take `select_by=dev`, one number, or "
            "`lstsq_method=direct` on a machine with more memory",
            setting="select_by",
            value="loo",
        )
    return [dataclasses.replace(settings, blocked=blocked) for settings in grid]


def blocked_solver(args: TrainingArguments, rows: int) -> Blocked | None:
    """Return how `lstsq` solves a system whose kernel stays in its file; None for the direct method and other solvers.

    Args:
        args: The arguments of the run.
        rows: N · C, the rows of the train kernel.
    """
    if args.kernel_solver != "lstsq" or FORMULAS[args.kernel_formula].is_asymmetric:
        return None
    method = args.lstsq_method
    if method == AUTO:
        needed, free = direct_bytes(rows), free_bytes(torch.device("cpu"))
        method = DIRECT if needed <= free else CHOLESKY
        if method == CHOLESKY:
            logger.info(
                "`lstsq_method=direct` takes about %.1f GB of memory for a train kernel of %d rows, and %.1f GB are "
                "free: `lstsq_method=cholesky` leaves the kernel in its file, and takes %.1f GB of disk meanwhile",
                needed / 2**30,
                rows,
                free / 2**30,
                4 * rows**2 / 2**30,
            )
    if method == DIRECT:
        return None
    return Blocked(method, Path(args.output_dir), args.cg_tolerance, progress=not args.disable_tqdm)


def method_of(settings: SolverSettings) -> dict[str, str]:
    """Return the method of `lstsq` as a setting; empty if it is the direct one, or the solver another."""
    return {} if settings.blocked is None else {"lstsq_method": settings.blocked.method}


def lacks_eigenvectors(settings: SolverSettings, left_out: str) -> bool:
    """Return whether a run's method has no eigenvectors, and log what is left out therefore.

    Args:
        settings: The settings of the solver.
        left_out: What needs them: ``"the metrics nll and ece"``.
    """
    if settings.blocked is not None:
        logger.warning("%s are left out: they need %s", left_out, _NEEDS.format(settings.blocked.method))
    return settings.blocked is not None
