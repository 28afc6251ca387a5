"""Which arguments of `lmntk.KernelClassifier` go together."""

import logging
import numbers
from typing import Any

from lmntk import solvers
from lmntk.config.kernel_checks import problems_of_number_type, problems_of_projection, refuse
from lmntk.errors import SettingError, suggest
from lmntk.kernels import ENGINES, ESTIMATES, FORMULAS
from lmntk.kernels.contraction import NUMBER_TYPES
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.solvers.candidates import settings_grid

logger = logging.getLogger(__name__)


def check_arguments(given: Any) -> None:
    """Find what cannot work before anything is loaded.

    Args:
        given: The classifier.

    Raises:
        SettingError: Names the argument and the remedy.
        SolverError: The solver cannot work with such a kernel.
    """
    for setting, value, known in (
        ("formula", given.formula, FORMULAS),
        ("solver", given.solver, solvers.SOLVERS),
        ("kernel_engine", given.kernel_engine, ("auto", *ENGINES, *ESTIMATES)),
        ("kernel_dtype", given.kernel_dtype, NUMBER_TYPES),
        ("model_family", given.model_family, (None, "masked", "causal")),
    ):
        if value not in known:
            options = [name for name in known if name]
            raise SettingError(f"`{setting}`: {suggest(str(value), options, setting)}", setting=setting, value=value)
    if given.kernel_parts is not None and not ENGINES.get(given.kernel_engine, FactoredEngine).keeps_parts_apart:
        sentence = f"`kernel_parts` does not work with `kernel_engine={given.kernel_engine}`: leave one of them out"
        raise SettingError(sentence, setting="kernel_parts", value=given.kernel_parts)
    _check_kernel(given)
    if not isinstance(given.template, str | None):
        raise SettingError(f"`template` is {given.template!r}, not a string", setting="template", value=given.template)
    check_selection(given)
    asymmetric = FORMULAS[given.formula].is_asymmetric
    if asymmetric and not given.binary_classification:
        raise SettingError(f"`formula={given.formula}` needs `binary_classification=True`", setting="formula")
    solvers.check_requirements(
        given.solver,
        asymmetric=asymmetric,
        num_logits=1 if given.binary_classification else 2,
        f0=given.adjust_for_init,
    )


def check_selection(given: Any) -> None:
    """Read the solver's settings; among several, leave-one-out chooses, which is for `lstsq`."""
    grid = settings_grid(given.solver, vars(given))
    for settings, needed, is_used in (
        (("kernel_gamma", "kernel_lambda"), "`solver='asym'`", given.solver == "asym"),
        (("f0_scaling",), "`adjust_for_init=True`", given.adjust_for_init),
    ):
        for setting in () if is_used else settings:
            if not isinstance(getattr(given, setting), numbers.Real):
                logger.warning("`%s` has no effect without %s, so nothing is chosen among it", setting, needed)
    if len(grid) > 1 and given.solver != "lstsq":
        raise SettingError(
            f"candidates of the solver's settings are chosen among by leave-one-out, which needs `solver='lstsq'`: "
            f"give `solver={given.solver}` one number for each setting",
            setting="solver",
            value=given.solver,
        )


def _check_kernel(given: Any) -> None:
    """Refuse what numbers of 8 bits are too coarse for, a projection that nothing uses, and what it cannot keep."""
    for problems in (problems_of_number_type, problems_of_projection):
        for setting, problem in problems(given, "formula"):
            refuse(given, setting, problem)
