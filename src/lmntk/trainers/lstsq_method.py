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
from lmntk.storage.output_folder import require_room

logger = logging.getLogger(__name__)

ALWAYS_DIRECT_BYTES = 2**29
"""What the direct method may take whatever memory is free: a kernel of 3,600 rows is small."""

COPIES_OF_VARIANCE = 2
"""How many matrices of the kernel's size the variance of predictions takes beside the direct method."""

_NEEDS = "the eigenvectors of the train kernel in memory, which `lstsq_method={}` does not have"


def solver_grid(args: TrainingArguments, rows: int) -> list[SolverSettings]:
    """Return the settings of the solver, one or the candidates, with the method of `lstsq` if it is not the direct one.

    Args:
        args: The arguments of the run.
        rows: N · C, the rows of the train kernel.

    Raises:
        SettingError: Candidates are to be chosen by leave-one-out, and the kernel is too large for the direct method.
    """
    check_method(args, rows)
    grid, blocked = args.solver_grid, blocked_solver(args, rows)
    if blocked is None:
        return grid
    require_room(args.output_dir, _scratch_bytes(blocked, rows), "the Cholesky factor")
    return [dataclasses.replace(settings, blocked=blocked) for settings in grid]


def check_method(args: TrainingArguments, rows: int) -> None:
    """Find what the method that memory chooses cannot do, before any kernel is computed.

    Args:
        args: The arguments of the run.
        rows: N · C, the rows of the train kernel.

    Raises:
        SettingError: Candidates are to be chosen by leave-one-out, and the kernel is too large for the direct method.
    """
    grid, blocked = args.solver_grid, _method(args, rows)
    if blocked is None:
        return
    if len(grid) > 1 and args.select_by == "loo":
        raise SettingError(
            f"`select_by=loo` needs {_NEEDS.format(blocked.method)}: take `select_by=dev`, one number, or "
            "`lstsq_method=direct` on a machine with more memory",
            setting="select_by",
            value="loo",
        )
    if blocked.method == CHOLESKY and not any(settings.regularization for settings in grid):
        logger.warning(
            "`lstsq_method=cholesky` needs a positive definite kernel: with `kernel_regularization=0` an example that "
            "is given twice ends the run after its kernels are computed; take a positive number"
        )


def blocked_solver(args: TrainingArguments, rows: int) -> Blocked | None:
    """Return how `lstsq` solves a system whose kernel stays in its file, and log it; None for another method or solver.

    Args:
        args: The arguments of the run.
        rows: N · C, the rows of the train kernel.
    """
    blocked = _method(args, rows)
    if blocked is None:
        return None
    why = ""
    if args.lstsq_method == AUTO:
        needed, free = _direct_bytes(args, rows) / 2**30, free_bytes(torch.device("cpu")) / 2**30
        why = f"`lstsq_method=direct` takes about {needed:.1f} GB of memory for a train kernel of {rows} rows, and "
        why += f"{free:.1f} GB are free: "
    scratch = _scratch_bytes(blocked, rows) / 2**30
    on_disk = f", and takes {scratch:.1f} GB of disk meanwhile" if scratch else ""
    logger.info("%s`lstsq_method=%s` leaves the kernel in its file%s", why, blocked.method, on_disk)
    return blocked


def _method(args: TrainingArguments, rows: int) -> Blocked | None:
    if args.kernel_solver != "lstsq" or FORMULAS[args.kernel_formula].is_asymmetric:
        return None
    method = args.lstsq_method
    if method == AUTO:
        room = max(ALWAYS_DIRECT_BYTES, free_bytes(torch.device("cpu")))
        method = DIRECT if _direct_bytes(args, rows) <= room else CHOLESKY
    if method == DIRECT:
        return None
    return Blocked(method, Path(args.output_dir), args.cg_tolerance, progress=not args.disable_tqdm)


def _direct_bytes(args: TrainingArguments, rows: int) -> int:
    return direct_bytes(rows) + (COPIES_OF_VARIANCE * 8 * rows**2 if args.kernel_variance else 0)


def _scratch_bytes(blocked: Blocked, rows: int) -> int:
    return 4 * rows**2 if blocked.method == CHOLESKY else 0


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
