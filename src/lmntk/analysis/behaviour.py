"""Whether the kernel describes fine-tuning: the numbers of one seed, one row over seeds, and verdicts.

Letters as in `lmntk.solvers.problem`. θ₀ is the pre-trained model and θ_T the fine-tuned one; f₀, f_FT and f_lin are
the logits of both and of the model linearised at θ₀, f_lin(x) = f(x; θ₀) + ⟨∂f(x; θ₀)/∂θ, θ_T − θ₀⟩; K₀ and K_T are the
kernels of the train examples at both. A score is the main metric of the task: accuracy, or F1 for MRPC and QQP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmntk.analysis.kernel_distances import KernelDistances, kernel_distances, mean_distances
from lmntk.analysis.pairing import check_pair
from lmntk.analysis.saved_run import SavedRun
from lmntk.analysis.scores import (
    constant_score,
    gain_error,
    logits_distance,
    mean_residual,
    recovery,
    score,
    score_error,
)
from lmntk.analysis.trainings import Training
from lmntk.errors import Bounds, FileError, KernelMismatchError, check_numbers
from lmntk.solvers.problem import ClassIds, predicted_classes
from lmntk.storage.training_snapshots import SplitSnapshot

ROUNDING = 1e-12  # scores are fractions of integers: 0.72 / 0.8 reaches 0.9
THRESHOLD_BOUNDS = {
    "ratio": Bounds("least_ratio", 0.0),
    "recovery": Bounds("least_recovery", 0.0),
    "distance": Bounds("most_distance", 0.0, above=True),
    "standard_errors": Bounds("standard_errors", 0.0),
}
"""The settings of the fields of `Thresholds` and their bounds."""


@dataclass(frozen=True)
class Thresholds:
    """What decides the verdicts.

    Attributes:
        ratio: The least score of the kernel over that of fine-tuning.
        recovery: The least share of fine-tuning's gain that the linearised model has too.
        distance: What the mean of |K_T − K₀| / |K₀| over the entries stays below.
        standard_errors: How many standard errors of the test set a score must be above another to count as above it.

    Raises:
        SettingError: A number is out of bounds.
    """

    ratio: float = 0.9
    recovery: float = 0.5
    distance: float = 2.0
    standard_errors: float = 2.0

    def __post_init__(self) -> None:
        """Check the bounds of the numbers."""
        check_numbers(
            THRESHOLD_BOUNDS.values(), {row.setting: vars(self)[name] for name, row in THRESHOLD_BOUNDS.items()}
        )


@dataclass(frozen=True)
class SeedBehaviour:
    """The numbers of one seed; scores and shares are fractions.

    Attributes:
        task: The key of the task.
        metric: The name of the score, ``"acc"``.
        split: The split that is predicted.
        examples: How many examples it has.
        seed: The seed of the run; None if it is not recorded.
        formula: The kernel's formula; empty if unknown.
        optimizer: What trained θ_T; empty if unknown.
        last_step: T.
        pretrained: The score of the model as it is, acc_PT.
        kernel: The score of the kernel, acc_K.
        kernel_with_f0: The same around f₀, acc_K+f0; None without such a run.
        linearised: The score of the linearised model at θ_T, acc_lin.
        finetuned: The score of the fine-tuned model, acc_FT.
        constant: The score of the best constant prediction.
        errors: The standard errors of the scores ``"kernel"`` and ``"finetuned"``, and of ``"gain"``, the difference
            acc_FT − acc_PT on the same examples.
        logits_distance: ‖f_FT − f_lin‖ / ‖f_FT − f₀‖ on the split.
        equal_predictions: The share of examples to which f_lin and f_FT give the same class.
        agreement: The share of examples to which the kernel and f_FT give the same class.
        chi: The mean of 1 − p_y at θ₀ on train.
        distances: How far K_T is from K₀; None if the snapshots have no kernels.
    """

    task: str
    metric: str
    split: str
    examples: int
    seed: int | None
    formula: str
    optimizer: str
    last_step: int
    pretrained: float
    kernel: float
    kernel_with_f0: float | None
    linearised: float
    finetuned: float
    constant: float
    errors: Mapping[str, float]
    logits_distance: float
    equal_predictions: float
    agreement: float
    chi: float
    distances: KernelDistances | None

    @property
    def ratio(self) -> float:
        """acc_K / acc_FT; NaN if acc_FT is 0."""
        return self.kernel / self.finetuned if self.finetuned else float("nan")

    @property
    def recovery(self) -> float:
        """(acc_lin − acc_PT) / (acc_FT − acc_PT); NaN if acc_FT = acc_PT."""
        return recovery(self.linearised, self.finetuned, self.pretrained)


@dataclass(frozen=True)
class Verdict:
    """The answer to one question, and why there is none.

    Attributes:
        answer: ``"yes"``, ``"no"`` or ``"undecided"``.
        reason: Why it is undecided; else empty.
    """

    answer: Literal["yes", "no", "undecided"]
    reason: str = ""

    def __str__(self) -> str:
        """``yes``, ``no``, or ``undecided: reason``."""
        return f"{self.answer}: {self.reason}" if self.reason else self.answer


@dataclass(frozen=True)
class BehaviourRow:
    """The numbers of a task over seeds, and the verdicts.

    Attributes:
        name: What to call the row, such as the task.
        seeds: The numbers of each seed.
        thresholds: What decided the verdicts.
        solves: Condition 1, the kernel solves the task.
        linear: Condition 2, the linearised model has what fine-tuning gains.
        fixed: Condition 3, the features are fixed: the kernel moves little.
        whole: All three.
    """

    name: str
    seeds: tuple[SeedBehaviour, ...]
    thresholds: Thresholds
    solves: Verdict
    linear: Verdict
    fixed: Verdict
    whole: Verdict

    def values(self, name: str) -> list[float]:
        """Return an attribute of `SeedBehaviour` seed by seed; seeds that lack it are left out."""
        return [float(value) for seed in self.seeds if (value := getattr(seed, name)) is not None]

    def mean(self, name: str) -> float:
        """Return the mean of an attribute over seeds; NaN if no seed has it."""
        values = self.values(name)
        return float(np.mean(values)) if values else float("nan")

    def deviation(self, name: str) -> float:
        """Return the population standard deviation over seeds; NaN for fewer than two."""
        return _deviation(self.values(name))

    def mean_error(self, name: str) -> float:
        """Return the mean over seeds of a standard error, one of `SeedBehaviour.errors`.

        It is at least the standard error of the mean over seeds that share their test examples.
        """
        return float(np.mean([seed.errors[name] for seed in self.seeds]))

    @property
    def ratio(self) -> float:
        """acc_K / acc_FT of the means over seeds; NaN if acc_FT is 0."""
        finetuned = self.mean("finetuned")
        return self.mean("kernel") / finetuned if finetuned else float("nan")

    @property
    def recovery(self) -> float:
        """(acc_lin − acc_PT) / (acc_FT − acc_PT) of the means over seeds; NaN if acc_FT = acc_PT."""
        return recovery(self.mean("linearised"), self.mean("finetuned"), self.mean("pretrained"))

    @property
    def recoveries(self) -> list[float]:
        """The recovery of each seed in which acc_FT is above acc_PT by `Thresholds.standard_errors`."""
        z = self.thresholds.standard_errors
        return [seed.recovery for seed in self.seeds if seed.finetuned - seed.pretrained > z * seed.errors["gain"]]

    @property
    def recovery_deviation(self) -> float:
        """The population standard deviation of `recoveries`; NaN for fewer than two."""
        return _deviation(self.recoveries)

    @property
    def distances(self) -> KernelDistances | None:
        """How far the kernel moved, the mean over seeds; None if a seed lacks it."""
        found = [seed.distances for seed in self.seeds]
        return None if None in found else mean_distances([one for one in found if one is not None])


def seed_behaviour(
    training: SavedRun, kernel: SavedRun, with_f0: SavedRun | None = None, split: str = "test"
) -> SeedBehaviour:
    """Compute the numbers of one seed.

    Args:
        training: A run whose folder has snapshots of the steps 0 and T.
        kernel: A run with predictions from the kernel at θ₀; it may be the same run.
        with_f0: The same, fitted around f₀.
        split: The split that is predicted.

    Raises:
        FileError: A snapshot or the predictions are missing or damaged.
        KernelMismatchError: The runs are of different data, models, prompts or parameters.
        NotFiniteError: A snapshot holds NaN or infinity.
    """
    found = Training.of_run(training)
    if "linearised" in (found.description.get("trainer"), training.record.get("trainer")):
        what = f"{training.folder} trained the linearised model, which its kernel describes by construction"
        remedy = "give a run of `trainer=standard`"
        raise KernelMismatchError(f"{what}: {remedy}", path=training.folder, differences=["trainer"])
    before = found.split(found.first, split)
    predicted = _predictions(found, kernel, before, split)
    of_f0 = None if with_f0 is None else _predictions(found, _around_f0(with_f0), before, split)
    last = found.read_last()
    after = found.split(last, split)
    task, labels = training.task, before.labels
    untrained, tuned, linear = map(predicted_classes, (before.logits, after.logits, after.linearised))
    start, end = found.kernel(found.first), found.kernel(last)
    train, record = found.first.splits.get("train"), {**training.record, **found.description}
    return SeedBehaviour(
        task=training.key,
        metric=task.main_metrics[0] if task else "acc",
        split=split,
        examples=len(labels),
        seed=record.get("seed"),
        formula=str(record.get("kernel_formula", "")),
        optimizer=str(record.get("optimizer_variant") or record.get("optimizer", "")),
        last_step=last.step,
        pretrained=score(task, split, untrained, labels),
        kernel=score(task, split, predicted, labels),
        kernel_with_f0=None if of_f0 is None else score(task, split, of_f0, labels),
        linearised=score(task, split, linear, labels),
        finetuned=score(task, split, tuned, labels),
        constant=constant_score(task, split, labels, max(2, before.logits.shape[1])),
        errors={
            "kernel": score_error(task, split, predicted, labels),
            "finetuned": score_error(task, split, tuned, labels),
            "gain": gain_error(task, split, tuned, untrained, labels),
        },
        logits_distance=logits_distance(after.logits, after.linearised, before.logits),
        equal_predictions=float(np.mean(linear == tuned)),
        agreement=float(np.mean(predicted == tuned)),
        chi=float("nan") if train is None else mean_residual(train.logits, train.labels),
        distances=None if start is None or end is None else kernel_distances(end, start),
    )


def _around_f0(run: SavedRun) -> SavedRun:
    """Return a run that must not record that it left out f₀."""
    if run.record.get("adjust_for_init") is False:
        sentence = f"{run.folder} does not fit its kernel around f₀: give a run with `adjust_for_init`"
        raise KernelMismatchError(sentence, path=run.folder, differences=["adjust_for_init"])
    return run


def _predictions(training: Training, run: SavedRun, examples: SplitSnapshot, split: str) -> ClassIds:
    """Read the class ids, [X], that a kernel run of a training's data predicts."""
    if run.record.get("trainer", "kernel") != "kernel":
        what = f"{run.folder} is a run of `trainer={run.record['trainer']}`"
        raise KernelMismatchError(f"{what}: give one of `trainer=kernel`", path=run.folder, differences=["trainer"])
    check_pair(training.run, run, training.description, run.description)
    found = run.predictions(split)
    if found is None:
        remedy = f"repeat the run's command with `{'do_eval' if split == 'dev' else 'do_predict'}`"
        path = run.paths.predictions(split)
        raise FileError(f"{run.folder} holds no predictions of {split} ({path.name}): {remedy}", path=path)
    if len(found.labels) != len(examples.labels):
        what = f"{len(examples.labels)} and {len(found.labels)} examples of {split}"
    elif len(different := np.flatnonzero(found.labels != examples.labels)):
        what = f"different labels of {split}, first for example {different[0]} (counted from 0)"
    else:
        return found.predicted.astype(np.int64)
    raise KernelMismatchError(
        f"{training.run.folder} and {run.folder} have {what}: give runs of one task and data",
        path=run.folder,
        differences=["labels"],
    )


def behaviour_row(name: str, seeds: Sequence[SeedBehaviour], thresholds: Thresholds) -> BehaviourRow:
    """Decide over seeds whether the kernel describes fine-tuning.

    The three conditions are those of third-party re-implementations of the paper's analysis (arXiv 2210.05643):

    1. The kernel solves the task: acc_K / acc_FT is at least `Thresholds.ratio`, and acc_K is above the best constant
       prediction. It is undecided where fine-tuning is not above that either.
    2. Linearisation: (acc_lin − acc_PT) / (acc_FT − acc_PT) is at least `Thresholds.recovery`. It is undecided where
       acc_FT is not above acc_PT.
    3. Fixed features: the mean of |K_T − K₀| / |K₀| over the entries of train × train is below `Thresholds.distance`.

    All are decided on means over seeds. A score is above another if it is so by `Thresholds.standard_errors` standard
    errors, see `BehaviourRow.mean_error`.

    Args:
        name: What to call the row.
        seeds: The numbers of each seed, at least one.
        thresholds: What decides.

    Raises:
        ValueError: There are no seeds.
        KernelMismatchError: The seeds are of different tasks, formulas or optimizers.
    """
    if not seeds:
        raise ValueError("a row needs at least one seed")
    for what in ("task", "metric", "split", "formula", "optimizer"):
        values = sorted({str(getattr(seed, what)) for seed in seeds})
        if len(values) > 1:
            sentence = f"the seeds of {name} differ in their {what} ({', '.join(values)}): give each a row of its own"
            raise KernelMismatchError(sentence, differences=[what])
    bare = BehaviourRow(name, tuple(seeds), thresholds, *[Verdict("undecided")] * 4)
    parts = _solves(bare), _linear(bare), _fixed(bare)
    return BehaviourRow(name, tuple(seeds), thresholds, *parts, _whole(parts))


def _solves(row: BehaviourRow) -> Verdict:
    if not _is_above_constant(row, "finetuned"):
        return Verdict("undecided", "fine-tuning does not solve the task")
    return _yes_or_no(_reaches(row.ratio, row.thresholds.ratio) and _is_above_constant(row, "kernel"))


def _linear(row: BehaviourRow) -> Verdict:
    gain = row.mean("finetuned") - row.mean("pretrained")
    least = row.thresholds.standard_errors
    if not gain > least * row.mean_error("gain"):
        return Verdict("undecided", f"the gain of fine-tuning is not above {least:g} standard errors")
    return _yes_or_no(_reaches(row.recovery, row.thresholds.recovery))


def _fixed(row: BehaviourRow) -> Verdict:
    found = row.distances
    if found is None:
        return Verdict("undecided", "the snapshots hold no kernels")
    if not np.isfinite(found.mean):
        return Verdict("undecided", "the kernel at θ₀ has entries that are 0")
    return _yes_or_no(found.mean < row.thresholds.distance)


def _whole(parts: Sequence[Verdict]) -> Verdict:
    answers = [part.answer for part in parts]
    if "no" in answers:
        return Verdict("no")
    reasons = "; ".join(part.reason for part in parts if part.reason)
    return Verdict("undecided", reasons) if "undecided" in answers else Verdict("yes")


def _is_above_constant(row: BehaviourRow, name: str) -> bool:
    """Whether a score is above the best constant prediction."""
    margin = row.thresholds.standard_errors * row.mean_error(name)
    return row.mean(name) - row.mean("constant") > margin


def _reaches(value: float, least: float) -> bool:
    """Whether a value is at least a threshold, up to rounding."""
    return value >= least - ROUNDING


def _yes_or_no(holds: bool) -> Verdict:
    return Verdict("yes" if holds else "no")


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values)) if len(values) > 1 else float("nan")
