"""Which arguments of `lmntk.KernelClassifier` go together."""

import logging
import numbers
from typing import Any

from lmntk import solvers
from lmntk.errors import SettingError, suggest
from lmntk.kernels import ENGINES, ESTIMATES, FORMULAS
from lmntk.kernels.contraction import NUMBER_TYPES
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.projection_check import DEFAULT_EXAMPLES, FEWEST_EXAMPLES
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
    _check_number_type(given)
    _check_projection(given)
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


def _check_number_type(given: Any) -> None:
    """Refuse what numbers of 8 significant bits are too coarse for."""
    if given.kernel_dtype != "bfloat16":
        return
    if FORMULAS[given.formula].signed:
        sentence = f"`formula={given.formula}` takes signs of gradients, of which `kernel_dtype=bfloat16` has one in a"
        raise SettingError(f"{sentence} hundred wrong: take `kernel_dtype=float32`, or sgd", setting="formula")
    if given.kernel_engine in ENGINES and not ENGINES[given.kernel_engine].multiplies_gradients:
        sentence = (
            f"`kernel_engine={given.kernel_engine}` adds products inside the model, which `kernel_dtype=bfloat16`"
        )
        raise SettingError(f"{sentence} rounds: take another engine, or float32", setting="kernel_engine")


def _check_projection(given: Any) -> None:
    """Refuse a projection that nothing uses, and what it cannot keep."""
    if given.kernel_engine not in ESTIMATES:
        defaults = {"projection_width": None, "projection_seed": 0}
        defaults |= {"projection_tolerance": None, "projection_check": DEFAULT_EXAMPLES}
        for setting, default in defaults.items():
            if getattr(given, setting) != default:
                sentence = f"`{setting}` is for `kernel_engine=projected`: add it, or leave this out"
                raise SettingError(sentence, setting=setting)
        return
    tolerance = given.projection_tolerance
    for setting, wrong, problem in (
        (
            "formula",
            FORMULAS[given.formula].signed,
            "needs signs, which a projection does not keep: take `formula=sgd`",
        ),
        (
            "projection_width",
            given.projection_width is not None and given.projection_width < 1,
            "keeps nothing of a gradient: take 1 or more",
        ),
        (
            "projection_check",
            given.projection_check < FEWEST_EXAMPLES,
            "is too few: the error of an estimate is always measured, on 2 texts or more",
        ),
        (
            "projection_tolerance",
            tolerance is not None and not tolerance > 0,
            "is not an error that an estimate reaches: take one such as 0.05",
        ),
    ):
        if wrong:
            value = getattr(given, setting)
            raise SettingError(f"`{setting}={value}` {problem}", setting=setting, value=value)
