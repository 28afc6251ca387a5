"""The engines: several ways to the same kernel, behind one signature.

An engine is built for one kernel (model, parameters, examples, formula) and a memory budget. For a plan it yields
blocks `(tile, values)`: float64 ``[S, n, C, x, C]`` for the tile's n train and x X examples. An engine that takes the
parameters in groups yields every tile once per group, group after group, and the blocks of one tile add up to it.
Engines know nothing of progress, files or processes.
"""

from lmntk.kernels.engines.base import Engine
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.engines.jacobian import JacobianEngine
from lmntk.kernels.engines.jvp import JvpEngine
from lmntk.kernels.engines.projected import ProjectedEngine
from lmntk.kernels.problem import Block, KernelProblem
from lmntk.kernels.projection import DEFAULT_WIDTH, Projection

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (FactoredEngine, JacobianEngine, JvpEngine)}
"""The engines that compute one and the same kernel."""

ESTIMATES: dict[str, type[Engine]] = {ProjectedEngine.name: ProjectedEngine}
"""The engines that estimate it; they are never chosen by themselves."""


def projection_of(engine: str, width: int | None, seed: int) -> Projection | None:
    """Return how an engine estimates the kernel; None for an exact one.

    Args:
        engine: A key of `ENGINES` or `ESTIMATES`, or ``"auto"``.
        width: The width that a user asks for; None for the default.
        seed: The seed.
    """
    return Projection(DEFAULT_WIDTH if width is None else width, seed) if engine in ESTIMATES else None


__all__ = [
    "ENGINES",
    "ESTIMATES",
    "Block",
    "Engine",
    "FactoredEngine",
    "JacobianEngine",
    "JvpEngine",
    "KernelProblem",
    "ProjectedEngine",
    "projection_of",
]
