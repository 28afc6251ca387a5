"""Which settings of a solver are to be chosen among: numbers, lists of candidates, or ``auto``."""

from collections.abc import Mapping, Sequence
from itertools import product
from numbers import Real
from typing import Any

from lmntk.errors import SettingError
from lmntk.solvers.bounds import SOLVER_BOUNDS
from lmntk.solvers.problem import SolverSettings

AUTO: dict[str, tuple[float, ...]] = {
    "kernel_regularization": (0.0, 0.001, 0.01, 0.1, 1.0),
    "f0_scaling": (10.0, 100.0, 1000.0, 10000.0, 0.0),
    "kernel_gamma": (0.01, 0.1, 1.0, 10.0),
    "kernel_lambda": (0.0, 0.25, 0.5, 0.75, 1.0),
}
"""The candidates that ``auto`` stands for; 0 for `f0_scaling` leaves f₀ out, as an infinite divisor would."""

Given = float | str | Sequence[float | str]
"""The value of such a setting: a number, a list of numbers, or text: ``"0.1"``, ``"0,0.001,0.1"``, ``"auto"``."""

_FIELDS = {bounds.setting: name for name, bounds in SOLVER_BOUNDS.items()}


def read_candidates(setting: str, given: Given) -> tuple[float, ...]:
    """Return the numbers that a setting can take.

    Args:
        setting: A key of `AUTO`.
        given: Its value.

    Raises:
        SettingError: The value is none of `Given`, or a number is there twice. Bounds are not checked.

    Examples:
        >>> read_candidates("kernel_gamma", "auto"), read_candidates("kernel_gamma", "2,1")
        ((0.01, 0.1, 1.0, 10.0), (2.0, 1.0))
    """
    if isinstance(given, str) and given == "auto":
        return AUTO[setting]
    words = given.split(",") if isinstance(given, str) else [given] if isinstance(given, Real) else given
    try:
        numbers = tuple(float(word) for word in words)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        numbers = ()
    if not numbers:
        raise SettingError(
            f"`{setting}` is {given!r}, but it must be a number, several numbers separated by commas without spaces, "
            f"such as {','.join(f'{number:g}' for number in AUTO[setting][:3])}, or auto",
            setting=setting,
            value=given,
        )
    for number in numbers:
        if numbers.count(number) > 1:
            raise SettingError(f"`{setting}` holds {number:g} twice: name it once", setting=setting, value=given)
    return numbers


def used_settings(solver: str, *, f0: bool) -> list[str]:
    """Return which keys of `AUTO` a solver reads.

    Args:
        solver: A key of `lmntk.solvers.SOLVERS`.
        f0: Whether the untrained model's logits are taken into account.

    Examples:
        >>> used_settings("svr", f0=True)
        ['kernel_regularization', 'f0_scaling']
    """
    reads = {"kernel_regularization": True, "f0_scaling": f0}
    return [setting for setting in AUTO if reads.get(setting, solver == "asym")]


def settings_grid(solver: str, given: Mapping[str, Any]) -> list[SolverSettings]:
    """Return every combination of candidates; a setting that the solver does not read keeps one value.

    Args:
        solver: A key of `lmntk.solvers.SOLVERS`.
        given: The value of every key of `AUTO`, and `adjust_for_init`, `flattened_targets` and `plain_lbfgs`.

    Raises:
        SettingError: A value cannot be read; names the setting.
    """
    candidates = {setting: read_candidates(setting, given[setting]) for setting in AUTO}
    used, default = used_settings(solver, f0=given["adjust_for_init"]), numbers_of(SolverSettings())
    for setting, numbers in candidates.items():
        if setting not in used and len(numbers) > 1:
            candidates[setting] = (default[setting],)
    switches: dict[str, Any] = {name: given[name] for name in ("flattened_targets", "plain_lbfgs")}
    fields = [_FIELDS[setting] for setting in candidates]
    combinations = product(*candidates.values())
    return [SolverSettings(**switches | dict(zip(fields, numbers, strict=True))) for numbers in combinations]


def numbers_of(settings: SolverSettings) -> dict[str, float]:
    """Return the numbers of `SolverSettings` under the names of the settings.

    Examples:
        >>> numbers_of(SolverSettings(gamma=2.0))["kernel_gamma"]
        2.0
    """
    return {setting: getattr(settings, _FIELDS[setting]) for setting in AUTO}
