"""What there is to say of one stored run: scores, the numbers of its kernel, predictions at other regularisations."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from lmntk import solvers
from lmntk.analysis import statistics
from lmntk.analysis.saved_run import SavedKernel, SavedRun, task_of
from lmntk.analysis.solver_choice import OF_RUN, SolverChoice
from lmntk.analysis.statistics import Components, Spectrum
from lmntk.data.metrics import compute_metrics
from lmntk.data.tasks import Task
from lmntk.errors import UsageError
from lmntk.solvers.problem import Array, ClassIds, two_logits

REGULARIZATIONS = (0.0, *(10.0**power for power in range(-8, 1)))
FEW_REGULARIZATIONS = (0.0, 1e-6, 1e-4, 1e-2, 1.0)
# N·C up to which all points, or a few, take some ten seconds; logistic is fitted fifty times for each point.
USUAL_LIMITS = 1000, 2000
LIMITS = {"logistic": (64, 400), "asym": (500, 1000)}
SPECTRUM_LIMIT = 6000


@dataclass(frozen=True)
class SplitStudy:
    """What was predicted of a split.

    Attributes:
        labels: Class ids, or scores of a regression task, [X].
        predicted: Alike.
        score: By the task's metric.
        logits: [X, C]; None where they come from a file.
    """

    labels: Array | ClassIds
    predicted: Array | ClassIds
    score: float
    logits: Array | None = None


@dataclass(frozen=True)
class Curve:
    """Scores against regularisation.

    Attributes:
        values: λ, ascending.
        scores: Of each split, one for each λ.
        own: The λ of the run.
        complete: Whether all of `REGULARIZATIONS` were tried.
    """

    values: list[float]
    scores: Mapping[str, list[float]]
    own: float
    complete: bool


@dataclass(frozen=True)
class KernelStudy:
    """The numbers of a kernel; examples once each, in the order of their files.

    Attributes:
        shapes: Of the files, by split.
        num_logits: C.
        asymmetric: Whether there are two directions.
        samples: How many samples of each train example its rows are.
        train: K̃, [N, N], see `lmntk.analysis.statistics.logit_differences`.
        others: K̃ of train and each other split, [N, X].
        classes: Class ids by split, train included.
        spectrum: Of the matrix that solvers see; None where it is too large.
        alignments: Centred alignment with the labels, by split.
        components: Of K̃ with each other split.
        solving: How it predicts.
        curve: At other regularisations; None where nothing is predicted.
    """

    shapes: Mapping[str, tuple[int, ...]]
    num_logits: int
    asymmetric: bool
    samples: int
    train: Array
    others: Mapping[str, Array]
    classes: Mapping[str, ClassIds]
    spectrum: Spectrum | None
    alignments: Mapping[str, float]
    components: Mapping[str, Components]
    solving: SolverChoice
    curve: Curve | None

    @property
    def num_classes(self) -> int:
        """How many classes there are: C, or two with a single logit."""
        return max(2, self.num_logits)


@dataclass(frozen=True)
class Study:
    """A run and what was found of it.

    Attributes:
        run: The run.
        name: What the report calls it.
        metric: The name of the task's metric, ``"acc"``.
        splits: What was predicted, by split; test last.
        scores: By split: those of `splits`, else what the result files say.
        kernel: None where the folder has none.
        layer_shares: Which part of the kernel each layer has; empty where not kept.
        remarks: What a reader should know, a sentence each.
    """

    run: SavedRun
    name: str
    metric: str
    splits: Mapping[str, SplitStudy]
    scores: Mapping[str, float]
    kernel: KernelStudy | None = None
    layer_shares: Mapping[str, float] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def study(run: SavedRun, name: str, flags: Mapping[str, object], show: bool = False, curve: bool = True) -> Study:
    """Work out what a report tells of a run.

    Args:
        run: From `lmntk.analysis.saved_run.read_runs`.
        name: What to call it.
        flags: Solver flags by name, which count for more than what the run says of itself; None where not given.
        show: Whether to show progress.
        curve: Whether to predict at other regularisations too.

    Raises:
        UsageError: A file of the folder is damaged, or kernels do not go together; names the folder.
    """
    metric = run.task.main_metrics[0] if run.task else "acc"
    try:
        if not run.kernel_splits:
            return _without_kernel(run, name, metric)
        kernels = {split: run.kernel(split) for split in run.kernel_splits}
        solving = run.solving(flags)
        predictor = _Predictor(run, kernels, solving)
        splits = predictor.predict(solving.settings.regularization)
        line = _curve(predictor, splits, show) if curve else None
        kernel = _look_at(kernels, solving, line)
        shares = run.layer_shares()
    except UsageError as error:
        told = str(error)
        raise UsageError(told if str(run.kernel_folder) in told else f"{run.kernel_folder}: {told}") from error
    scores = {split: found.score for split, found in splits.items()}
    remarks = _differences(run, scores, metric) if solving.source == OF_RUN else []
    if line is not None and not line.complete:
        left_out = "Some" if len(line.values) > 1 else "Scores at other"
        remarks.append(f"{left_out} regularisations are left out: for this kernel {solving.solver} takes long.")
    if kernel.spectrum is None:
        remarks.append("The spectrum is left out: the kernel is too large for it.")
    return Study(run, name, metric, splits, scores, kernel, shares, remarks)


def _without_kernel(run: SavedRun, name: str, metric: str) -> Study:
    found = {split: run.predictions(split) for split in ("dev", *_tests(run))}
    splits = {
        split: SplitStudy(there.labels, there.predicted, score(run.task, split, there.predicted, there.labels))
        for split, there in found.items()
        if there is not None
    }
    scores = {split: value for split in run.metrics if (value := _stored_score(run, split, metric)) is not None}
    remarks = []
    loaded = run.record.get("load_kernels")
    if loaded:
        remarks.append(f"Its kernels were in {loaded}, where there are none now.")
    if not splits:
        remarks.append("No predictions are in the folder, only metrics: it is of an older version.")
    return Study(
        run, name, metric, splits, {split: found.score for split, found in splits.items()} | scores, None, {}, remarks
    )


def _tests(run: SavedRun) -> list[str]:
    second = run.task.second_test_set.lower() if run.task else ""
    return ["test", *([f"test:{second}"] if second else [])]


def score(task: Task | None, split: str, predicted: Array | ClassIds, labels: Array | ClassIds) -> float:
    """Judge predictions by the metric of a split's own task, or by accuracy where the task is unknown."""
    own = task_of(split, task)
    if own is None:
        return float(np.mean(predicted == labels))
    return compute_metrics(own, predicted, labels)[own.metric_prefix + own.main_metrics[0]]


def _stored_score(run: SavedRun, split: str, metric: str) -> float | None:
    """The task's metric as the run's result file has it."""
    values = run.metrics.get(split, {})
    names = [name for name in values if name == f"eval_{metric}" or name.endswith(f"/{metric}")]
    return values[names[0]] if names else None


def _differences(run: SavedRun, scores: Mapping[str, float], metric: str) -> list[str]:
    """Say where what the kernels predict now is not what the run wrote."""
    found = {split: (value, _stored_score(run, split, metric)) for split, value in scores.items()}
    return [
        f"From the stored kernel {metric} on {split} is {100 * now:.1f}, but the result file says {100 * then:.1f}: "
        "is it of another run?"
        for split, (now, then) in found.items()
        if then is not None and abs(now - then) > 1e-6
    ]


class _Predictor:
    """Predicts the other splits of a run from its kernels.

    Args:
        run: Which task, and where logits of the untrained model lie.
        kernels: By split.
        solving: How.
    """

    def __init__(self, run: SavedRun, kernels: Mapping[str, SavedKernel], solving: SolverChoice) -> None:
        self.train = kernels["train"]
        self.solving = solving
        self._run = run
        self._kernels = kernels
        self._f0 = {split: run.untrained_logits(split) for split in kernels} if solving.adjusts else {}

    def predict(self, regularization: float) -> dict[str, SplitStudy]:
        """Fit the solver to the kernel of train and predict the other splits."""
        settings = dataclasses.replace(self.solving.settings, regularization=regularization)
        train = self.train
        fitted = solvers.fit(self.solving.solver, train.values, train.labels, settings, self._f0.get("train"))
        found = {}
        for split, kernel in self._kernels.items():
            if split == "train":
                continue
            logits = fitted.predict(kernel.values, kernel.labels, self._f0.get(split), split).logits
            mean = logits.reshape(-1, len(kernel.classes), logits.shape[1]).mean(axis=0)
            predicted = two_logits(mean).argmax(axis=1)
            value = score(self._run.task, split, predicted, kernel.classes)
            found[split] = SplitStudy(kernel.classes, predicted, value, mean)
        return found


def _curve(predictor: _Predictor, own: Mapping[str, SplitStudy], show: bool) -> Curve | None:
    """Predict at other regularisations; `own` is what was predicted at the run's."""
    if not own:
        return None
    tried = _regularizations(predictor.train, predictor.solving.solver)
    at_own = predictor.solving.settings.regularization
    values = sorted({*tried, at_own})
    scores: dict[str, list[float]] = {split: [] for split in own}
    for value in tqdm(values, desc="regularisation", unit="fit", disable=not show, leave=False):
        for split, found in (own if value == at_own else predictor.predict(value)).items():
            scores[split].append(found.score)
    return Curve(values, scores, at_own, tried == REGULARIZATIONS)


def _regularizations(train: SavedKernel, solver: str) -> tuple[float, ...]:
    """The points of the curve that take no more than some ten seconds."""
    size = train.values.shape[-2] * train.num_logits
    for_all, for_few = LIMITS.get(solver, USUAL_LIMITS)
    return REGULARIZATIONS if size <= for_all else FEW_REGULARIZATIONS if size <= for_few else ()


def _look_at(kernels: Mapping[str, SavedKernel], solving: SolverChoice, curve: Curve | None) -> KernelStudy:
    train = kernels["train"]
    matrices = {
        split: kernel.each_once(statistics.logit_differences(kernel.values)) for split, kernel in kernels.items()
    }
    classes = {split: kernel.classes for split, kernel in kernels.items()}
    one_hot = {split: statistics.one_hot(ids, max(2, train.num_logits)) for split, ids in classes.items()}
    flat = statistics.flattened(train.values)
    others = {split: matrix for split, matrix in matrices.items() if split != "train"}
    return KernelStudy(
        shapes={split: kernel.values.shape for split, kernel in kernels.items()},
        num_logits=train.num_logits,
        asymmetric=train.values.ndim == 5,
        samples=train.samples[0],
        train=matrices["train"],
        others=others,
        classes=classes,
        spectrum=statistics.spectrum(flat) if len(flat) <= SPECTRUM_LIMIT else None,
        alignments={
            split: statistics.alignment(matrix, one_hot["train"] @ one_hot[split].T)
            for split, matrix in matrices.items()
        },
        components={split: statistics.kernel_components(matrices["train"], other) for split, other in others.items()},
        solving=solving,
        curve=curve,
    )


def typical_examples(found: SplitStudy, each: int = 2) -> list[int]:
    """Choose examples to look at: the most confidently right, the most confidently wrong, the least decided.

    Args:
        found: Of classes, with logits.
        each: How many of each kind.
    """
    assert found.logits is not None
    margins = statistics.margins(found.logits)
    right = found.predicted == found.labels
    surest = np.argsort(-margins, kind="stable")
    chosen = [*surest[right[surest]][:each], *surest[~right[surest]][:each]]
    undecided = [index for index in surest[::-1] if index not in chosen][:each]
    return [int(index) for index in [*chosen, *undecided]]
