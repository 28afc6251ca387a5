"""How far a projected kernel is from the exact one, and what width a tolerance asks for."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from lmntk import solvers
from lmntk.errors import SettingError
from lmntk.kernels.engines.projected import ProjectedEngine
from lmntk.kernels.projection import Projection
from lmntk.kernels.projection_check import NUM_DRAWS, EntryError, ProjectionCheck, SampledKernels
from lmntk.kernels.timing import seconds_of
from lmntk.solvers.problem import SolverSettings, predicted_classes, signed
from lmntk.storage.wording import duration, quantity

NUM_TIMED_EXAMPLES = 8

logger = logging.getLogger(__name__)

WIDTHS = tuple(width for power in range(3, 14) for width in (2**power, 3 * 2 ** (power - 1)))
"""The widths that a tolerance chooses among: 8, 12, 16, 24, 32, 48 and so on."""


@dataclass(frozen=True)
class LogitError:
    """Relative errors of the logits that least squares predicts from the kernels of the sub-sample.

    Attributes:
        own: ‖f̂ − f‖ / ‖f‖ of the kernel's own draw.
        mean: The mean of the errors of all draws.
        std: Their standard deviation.
        equal_classes: The share of examples whose predicted class stays the same, in the mean of all draws.
        regularization: λ, in units of the largest singular value of the train examples' kernel.
    """

    own: float
    mean: float
    std: float
    equal_classes: float
    regularization: float


@dataclass(frozen=True)
class ProjectionError:
    """The error of a projected kernel as a sub-sample shows it.

    Attributes:
        width: The width of the projection.
        examples: The train examples of the sub-sample, and those of the other side, which may be train again.
        draws: How many seeds were drawn, that of the kernel first.
        entries: The errors of its entries.
        logits: Those of predictions; None for train with itself, or if the sub-sample is of one class.
    """

    width: int
    examples: tuple[int, int]
    draws: int
    entries: EntryError
    logits: LogitError | None

    @property
    def description(self) -> dict[str, Any]:
        """What the description of a kernel says, as JSON can hold it, rounded to four digits."""

        def rounded(errors: Any) -> dict[str, float]:
            return {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(errors).items()}

        logits = None if self.logits is None else rounded(self.logits)
        return {"examples": list(self.examples), "draws": self.draws, **rounded(self.entries), "logits": logits}

    def __str__(self) -> str:
        n, x = self.examples
        entries, logits = self.entries, self.logits
        sentence = (
            f"error of the projection of width {self.width} on {n} × {x} examples: entries {entries.own:.1%} "
            f"± {entries.sampling:.1%} ({entries.mean:.1%} ± {entries.std:.1%} over {self.draws} seeds)"
        )
        if logits is None:
            return sentence
        return (
            f"{sentence};\n  logits of least squares with λ = {logits.regularization:g} {logits.own:.1%} "
            f"({logits.mean:.1%} ± {logits.std:.1%}), {logits.equal_classes:.1%} of the predicted classes equal"
        )


def draws_of(projection: Projection) -> list[Projection]:
    """Return a kernel's own projection, and others of the same width."""
    return [Projection(projection.width, projection.seed + number) for number in range(NUM_DRAWS)]


def measure_error(
    engine: ProjectedEngine,
    size: int,
    labels: tuple[Sequence[float], Sequence[float]],
    regularization: float = 0.0,
    progress: bool = False,
) -> ProjectionError:
    """Measure the error of the kernel that an engine is to compute.

    Args:
        engine: The engine.
        size: How many examples of each side are looked at.
        labels: The class ids of the train examples, and of those of the other side.
        regularization: λ of the predictions.
        progress: Whether to show a progress bar.
    """
    projection = engine.problem.projection
    assert projection is not None
    check = ProjectionCheck(engine, size)
    draws = draws_of(projection)
    found = check.kernels(draws, lambda names: tqdm(names, "projection check", unit="layer", disable=not progress))
    classes = [np.asarray(side)[list(chosen)] for side, chosen in zip(labels, (check.train, check.x), strict=True)]
    has_logits = bool(check.x) and len({*classes[0].tolist()}) > 1
    logits = logit_error(found, (classes[0], classes[1]), regularization) if has_logits else None
    sizes = len(check.train), len(check.x or check.train)
    return ProjectionError(projection.width, sizes, len(draws), check.entry_error(found), logits)


def describe_check(engine: ProjectedEngine, size: int, tolerance: float | None = None) -> float:
    """Log what measuring the error of an engine's kernel would take, by the time of a few examples; return the seconds.

    Args:
        engine: The engine.
        size: How many examples of each side would be looked at.
        tolerance: The largest error of the entries of train × train with which the run would go on.
    """
    projection, sides = engine.problem.projection, (engine.problem.train, engine.problem.x_examples)
    assert projection is not None
    n, x = (min(size, len(side)) for side in sides)
    few = ProjectionCheck(engine, NUM_TIMED_EXAMPLES)
    seconds = seconds_of(lambda: few.kernels(draws_of(projection)))
    seconds *= max(1.0, max(n, x) / NUM_TIMED_EXAMPLES)
    stops = "" if tolerance is None or engine.problem.x is not None else f", and stop if it is above {tolerance:g}"
    logger.info(
        "would measure the error of the estimate on %d × %d examples, about %s%s", n, x, duration(seconds), stops
    )
    return seconds


def logit_error(found: SampledKernels, classes: tuple[np.ndarray, np.ndarray], regularization: float) -> LogitError:
    """Return the errors of what least squares on the sub-sample predicts from estimates of its kernels.

    Args:
        found: The kernels of the sub-sample.
        classes: The class ids of its train examples, ``[n]``, and of its others.
        regularization: λ, as the solver takes it.
    """
    n, c = found.exact.shape[:2]
    own, other = (signed(side) if c == 1 else side for side in classes)
    settings = SolverSettings(regularization=regularization)

    def predicted(kernel: np.ndarray) -> np.ndarray:
        return solvers.fit("lstsq", kernel[:, :, :n], own, settings).predict(kernel[:, :, n:], other).logits

    exact = predicted(found.exact.numpy())
    drawn = [predicted(kernel.numpy()) for kernel in found.drawn]
    errors = np.array([np.linalg.norm(logits - exact) / np.linalg.norm(exact) for logits in drawn])
    equal = np.mean([predicted_classes(logits) == predicted_classes(exact) for logits in drawn])
    std = float(errors.std(ddof=1)) if len(errors) > 1 else 0.0
    return LogitError(float(errors[0]), float(errors.mean()), std, float(equal), regularization)


def choose_width(engine: ProjectedEngine, size: int, tolerance: float, above: int = 0, progress: bool = False) -> int:
    """Return the smallest of `WIDTHS` that keeps the error of the train kernel's entries within a tolerance.

    Both the error of the run's own seed and the mean over seeds plus a standard deviation must be within it.

    Args:
        engine: An engine of the train examples with themselves, whose projection has the run's seed.
        size: How many examples are looked at.
        tolerance: The largest relative error of the entries.
        above: Leave out widths up to this one.
        progress: Whether to show a progress bar.

    Raises:
        SettingError: No width that shortens a side of a weight reaches the tolerance.
    """
    projection = engine.problem.projection
    assert projection is not None
    check = ProjectionCheck(engine, size)
    if not check.longest_side:
        raise SettingError(
            f"`projection_tolerance={tolerance:g}`: none of the weights is projected, so that the kernel is exact: "
            "take `kernel_engine=factored`",
            setting="projection_tolerance",
            value=tolerance,
        )
    logger.info("choosing the projection's width by its error on %s of train", quantity(len(check.train), "example"))
    widths = [width for width in WIDTHS if above < width < check.longest_side]
    reached = ""
    for width in tqdm(widths, "projection width", unit="width", disable=not progress, leave=False):
        error = check.entry_error(check.kernels(draws_of(Projection(width, projection.seed))))
        if error.upper <= tolerance:
            said = "`projection_tolerance=%g`: the width %d has an error of %.2g (%.2g, and %.2g ± %.2g over seeds)"
            logger.info(said, tolerance, width, error.upper, error.own, error.mean, error.std)
            return width
        reached = f": the largest width below their sides, {width}, has an error of {error.upper:.2g}"
    raise SettingError(
        f"`projection_tolerance={tolerance:g}` is not reached by projecting weights whose longest side is "
        f"{check.longest_side}{reached}; take the exact kernel with `kernel_engine=factored`, or a larger tolerance",
        setting="projection_tolerance",
        value=tolerance,
    )


def check_tolerance(error: ProjectionError, tolerance: float, engine: ProjectedEngine, size: int) -> None:
    """Refuse a width that is too small for a tolerance, before the kernel is computed.

    Raises:
        SettingError: Says the error that was found, and the width that would do.
    """
    if error.entries.upper <= tolerance:
        return
    enough = choose_width(engine, size, tolerance, above=error.width)
    raise SettingError(
        f"`projection_width={error.width}` is too small for `projection_tolerance={tolerance:g}`: the relative error "
        f"of the entries is {error.entries.upper:.2g}; take `projection_width={enough}`, leave it out, or allow more",
        setting="projection_width",
        value=error.width,
    )
