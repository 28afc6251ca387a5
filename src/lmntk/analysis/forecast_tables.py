"""Tables of a forecast: text, Markdown, LaTeX, CSV and JSON."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmntk.analysis.learning_curve import CurvePoint, Spread
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.table_blocks import (
    Block,
    Cells,
    as_csv,
    as_json,
    format_blocks,
    number,
    percent,
    with_deviation,
)
from lmntk.analysis.training_forecast import StepNumbers, TrainingForecast
from lmntk.solvers.gradient_flow import Loss, StableSteps

LOSS_NAMES: dict[Loss, str] = {"squared_error": "squared error", "cross_entropy": "cross entropy"}
SHOWN = (1, 2, 5)
"""The steps that a table for readers has: these times powers of ten, the first, the best and the last."""

LARGE = 1e5
"""Losses from here on, of a training that diverges, are written with an exponent."""


@dataclass(frozen=True)
class RealKernel:
    """A kernel run that stands beside the curve.

    Attributes:
        name: What to call it.
        k: Its examples of the rarest class.
        scores: The score of each split.
    """

    name: str
    k: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Forecast:
    """What one kernel tells of more or fewer examples and of training.

    Attributes:
        name: What to call the run.
        metric: The name of the scores, ``"acc"``.
        curve: Scores against k.
        kernels: Real kernels of fewer examples.
        stable: The largest stable steps; None where the kernel does not say.
        trainings: A forecast for each loss.
        discrete: Whether they are of gradient descent, not of gradient flow.
        real: The numbers of a real training with the loss of the only forecast; empty if none was named.
        remarks: Sentences on what is missing or different.
    """

    name: str
    metric: str
    curve: Sequence[CurvePoint]
    kernels: Sequence[RealKernel]
    stable: StableSteps | None
    trainings: Sequence[TrainingForecast]
    discrete: bool
    real: Sequence[StepNumbers]
    remarks: Sequence[str]

    @property
    def has_gcv(self) -> bool:
        """Whether generalised cross-validation is defined for any number of examples."""
        return any(not math.isnan(point.gcv.mean) for point in self.curve)


def format_forecast(found: Forecast, form: str) -> str:
    """Write a forecast.

    Args:
        found: The forecast.
        form: One of `lmntk.analysis.table_blocks.FORMS`. CSV and JSON hold all digits and steps, and fractions instead
            of percent.

    Returns:
        The text, which ends with a line break.
    """
    if form == "csv":
        return as_csv(_lines(found))
    if form == "json":
        return as_json(_as_object(found))
    blocks = [Block([_curve_cells(point, found.has_gcv) for point in found.curve], ())]
    blocks.append(Block([_kernel_cells(one) for one in found.kernels], ["kernel"]))
    if found.stable is not None:
        blocks.append(Block(_stable_cells(found.stable), ["largest stable learning rate", "for the linearised model"]))
    blocks += [_training_block(training, found.real) for training in found.trainings]
    return format_blocks(blocks, _notes(found), form)


def _curve_cells(point: CurvePoint, with_gcv: bool) -> Cells:
    cells = {"k": str(point.k), "draws": str(point.draws)}
    for split, spread in point.scores.items():
        cells |= {split: _mean(spread), f"{split} 95 %": _interval(spread)}
    return cells | {
        "leave-one-out": percent(point.left_out_score.mean),
        "leave-one-out loss": number(point.left_out_loss.mean),
        **({"GCV": number(point.gcv.mean)} if with_gcv else {}),
    }


def _mean(spread: Spread) -> str:
    return with_deviation(percent(spread.mean), percent(spread.deviation))


def _interval(spread: Spread) -> str:
    return f"{percent(spread.low)} to {percent(spread.high)}"


def _kernel_cells(kernel: RealKernel) -> Cells:
    scores = {split: percent(value) for split, value in kernel.scores.items()}
    return {"kernel": kernel.name, "k": str(kernel.k), **scores}


def _stable_cells(stable: StableSteps) -> list[Cells]:
    rows = (
        ("squared error", stable.squared_error, "exact: above it training diverges"),
        ("cross entropy at f₀", stable.cross_entropy_at_start, "exact near f₀"),
        ("cross entropy everywhere", stable.cross_entropy_anywhere, "a bound: below it the loss falls in every step"),
    )
    return [
        {"largest stable learning rate": name, "η": number(value, ".3g"), "for the linearised model": what}
        for name, value, what in rows
    ]


def _training_block(training: TrainingForecast, real: Sequence[StepNumbers]) -> Block:
    marked = {best.step: "best on dev" for best in [training.best] if best is not None}
    by_step = {each.step: each for each in real}
    last = training.steps[-1].step
    usual = {first * 10**power for first in SHOWN for power in range(7)}
    wanted = {0, last, *marked, *usual, *by_step}
    rows = [
        {
            LOSS_NAMES[training.loss]: f"step {each.step}",
            **_step_cells(each, ""),
            **(_step_cells(by_step[each.step], "real ") if each.step in by_step else {}),
            "": marked.get(each.step, ""),
        }
        for each in training.steps
        if each.step in wanted
    ]
    return Block(rows, [LOSS_NAMES[training.loss], ""])


def _step_cells(found: StepNumbers, prefix: str) -> Cells:
    cells = {}
    for split, loss in found.losses.items():
        cells[f"{prefix}{split} loss"] = number(loss, ".3f" if loss < LARGE else ".2e")
    for split, value in found.scores.items():
        if split != "train":
            cells[f"{prefix}{split}"] = percent(value)
    return cells


def _notes(found: Forecast) -> list[str]:
    metric = METRIC_NAMES.get(found.metric, found.metric)
    notes = [
        f"{found.name}: {metric} in percent of balanced random subsets with k examples of each class, mean, standard "
        f"deviation and the interval of 95 % of the draws; leave-one-out{' and GCV' if found.has_gcv else ''} of the "
        "subsets, mean.",
    ]
    for training in found.trainings:
        rates = training.rates
        how = "gradient descent on all train examples" if found.discrete else "gradient flow"
        rate = f"{rates[0]:.3g}" if len(set(rates)) == 1 else f"up to {max(rates, default=0.0):.3g}"
        text = f"{LOSS_NAMES[training.loss]}: {how} for {len(rates)} steps of learning rate {rate}, from f₀"
        if training.best is not None and training.least_loss is not None:
            best, least = training.best, training.least_loss
            text += f"; dev is best at step {best.step} ({percent(best.scores['dev'])}), its loss at step {least.step}"
        if max(rates, default=0.0) > training.stable_step:
            text += f"; the learning rate is above the largest stable one, {training.stable_step:.3g}"
        notes.append(f"{text}.")
    return [*notes, *(f"{remark[0].upper()}{remark[1:]}." for remark in found.remarks)]


def _lines(found: Forecast) -> list[dict[str, Any]]:
    """Return a row for each number of examples, kernel, stable step and step of training; `part` says which."""
    rows = []
    for point in found.curve:
        row: dict[str, Any] = {"part": "curve", "k": point.k, "draws": point.draws}
        spreads = {**point.scores, "left_out_score": point.left_out_score, "left_out_loss": point.left_out_loss}
        for name, spread in {**spreads, "gcv": point.gcv}.items():
            row |= {f"{name}_{field}": value for field, value in dataclasses.asdict(spread).items()}
        rows.append(row)
    for one in found.kernels:
        scores = {f"{split}_score": value for split, value in one.scores.items()}
        rows.append({"part": "kernel", "name": one.name, "k": one.k, **scores})
    for name, value in (found.stable._asdict() if found.stable else {}).items():
        rows.append({"part": "stable_step", "name": name, "learning_rate": value})
    for training in found.trainings:
        rows += [{"part": "forecast", "loss": training.loss, **_step_line(each)} for each in training.steps]
        rows += [{"part": "training", "loss": training.loss, **_step_line(each)} for each in found.real]
    return rows


def _step_line(found: StepNumbers) -> dict[str, Any]:
    losses = {f"{split}_loss": value for split, value in found.losses.items()}
    return {"step": found.step, **losses, **{f"{split}_score": value for split, value in found.scores.items()}}


def _as_object(found: Forecast) -> dict[str, Any]:
    trainings = [
        {
            "loss": training.loss,
            "learning_rates": list(training.rates),
            "best_step": training.best.step if training.best else None,
            "least_dev_loss_step": training.least_loss.step if training.least_loss else None,
            "steps": [each._asdict() for each in training.steps],
        }
        for training in found.trainings
    ]
    return {
        "name": found.name,
        "metric": found.metric,
        "curve": [dataclasses.asdict(point) for point in found.curve],
        "kernels": [dataclasses.asdict(one) for one in found.kernels],
        "stable_steps": found.stable._asdict() if found.stable else None,
        "dynamics": "gradient descent" if found.discrete else "gradient flow",
        "forecasts": trainings,
        "training": [each._asdict() for each in found.real],
        "remarks": list(found.remarks),
    }
