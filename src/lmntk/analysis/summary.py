"""A saved run in numbers: its scores, the statistics of its kernel, its predictions at other regularisations."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from lmntk import solvers
from lmntk.analysis import statistics
from lmntk.analysis.saved_kernel import SavedKernel
from lmntk.analysis.saved_run import SavedRun, second_splits
from lmntk.analysis.scores import score
from lmntk.analysis.solver_choice import SolverChoice, Source, choose_solver
from lmntk.analysis.statistics import Components, Spectrum
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import UsageError
from lmntk.solvers.problem import Array, ClassIds, margins, predicted_classes

REGULARIZATIONS = (0.0, *(10.0**power for power in range(-8, 1)))
FEW_REGULARIZATIONS = (0.0, 1e-6, 1e-4, 1e-2, 1.0)
# N·C up to which all points, or a few, take some ten seconds; logistic is fitted fifty times for each point.
DEFAULT_LIMITS = 1000, 2000
LIMITS = {"logistic": (64, 400), "asym": (500, 1000)}
SPECTRUM_LIMIT = 6000


@dataclass(frozen=True)
class SplitSummary:
    """The predictions of a split.

    Attributes:
        labels: Class ids, or scores of a regression task, [X].
        predicted: The predicted class ids or scores, [X].
        score: The task's metric.
        logits: [X, C]; None for predictions read from a file.
    """

    labels: Array | ClassIds
    predicted: Array | ClassIds
    score: float
    logits: Array | None = None


@dataclass(frozen=True)
class Curve:
    """Scores against regularisation.

    Attributes:
        values: Regularisations λ, ascending.
        scores: By split, one score for each λ.
        own: The λ of the run.
        complete: Whether all of `REGULARIZATIONS` were tried.
    """

    values: list[float]
    scores: Mapping[str, list[float]]
    own: float
    complete: bool


@dataclass(frozen=True)
class KernelSummary:
    """The statistics of a run's kernels; each example counts once, in the order of its file.

    Attributes:
        shapes: The shapes of the kernels in the files, by split.
        num_logits: Logits per example, C.
        asymmetric: Whether the kernels have two directions.
        samples_per_example: How many rows of the file stand for each train example.
        train: K̃, [N, N]; see `lmntk.analysis.statistics.logit_differences`.
        others: K̃ of train and each other split, [N, X].
        own: K̃_jj of the examples of those other splits whose diagonal is stored, [X]; none of an asymmetric kernel,
            whose K̃ is not an inner product, and none of examples with several samples.
        classes: Class ids by split, train included.
        spectrum: The spectrum of the matrix that solvers see; None for a kernel too large for it.
        alignments: Centred alignment with the labels, by split.
        components: The principal components of K̃ with each other split.
        solver: How the kernels predict.
        curve: Scores at other regularisations; None without predictions.
    """

    shapes: Mapping[str, tuple[int, ...]]
    num_logits: int
    asymmetric: bool
    samples_per_example: int
    train: Array
    others: Mapping[str, Array]
    own: Mapping[str, Array]
    classes: Mapping[str, ClassIds]
    spectrum: Spectrum | None
    alignments: Mapping[str, float]
    components: Mapping[str, Components]
    solver: SolverChoice
    curve: Curve | None

    @property
    def num_classes(self) -> int:
        """The number of classes: C, or two for a single logit."""
        return max(2, self.num_logits)


@dataclass(frozen=True)
class RunSummary:
    """A run and its numbers.

    Attributes:
        run: The run.
        name: What to call it.
        metric: The name of the task's metric, ``"acc"``.
        splits: Predictions by split; test last.
        scores: Scores by split: those of `splits`, else those of the result files.
        kernel: The statistics of its kernel; None if the folder has none.
        layer_shares: Each layer's share of the kernel's trace; empty if layers were not kept.
        remarks: Sentences on what is missing or doubtful.
    """

    run: SavedRun
    name: str
    metric: str
    splits: Mapping[str, SplitSummary]
    scores: Mapping[str, float]
    kernel: KernelSummary | None = None
    layer_shares: Mapping[str, float] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def summarise_run(
    run: SavedRun, name: str, settings: Mapping[str, object], show_progress: bool = False, curve: bool = True
) -> RunSummary:
    """Compute the scores of a run and the statistics of its kernel.

    Args:
        run: From `lmntk.analysis.saved_run.read_runs`.
        name: What to call it.
        settings: Solver settings by name that replace those of the run; None counts as absent.
        show_progress: Whether to show a progress bar.
        curve: Whether to predict at other regularisations too.

    Raises:
        UsageError: A file is damaged, or kernels do not match each other; the error names the folder.
    """
    metric = run.task.main_metrics[0] if run.task else "acc"
    try:
        if not run.kernel_splits:
            return _summarise_results(run, name, metric)
        kernels = {split: run.kernel(split) for split in run.kernel_splits}
        predictor = _Predictor(run, kernels, choose_solver(run, settings))
        splits = predictor.predict(predictor.solver.settings.regularization)
        scores_by_regularization = _curve(predictor, splits, show_progress) if curve else None
        own = {split: found for split in kernels if (found := _own_differences(run, split, kernels[split])) is not None}
        kernel = _summarise_kernel(kernels, own, predictor.solver, scores_by_regularization)
        shares = run.layer_shares()
    except UsageError as error:
        if str(run.kernel_folder) in str(error):
            raise
        raise type(error)(f"{run.kernel_folder}: {error}", **error.data) from error
    scores = {split: found.score for split, found in splits.items()}
    remarks = _differences(run, scores, metric) if kernel.solver.source is Source.RUN else []
    remarks += _omissions(kernel)
    return RunSummary(run, name, metric, splits, scores, kernel, shares, remarks)


def _omissions(kernel: KernelSummary) -> list[str]:
    """Say which statistics are missing."""
    remarks = []
    curve = kernel.curve
    if curve is not None and not curve.complete:
        what = "Some regularisations are" if len(curve.values) > 1 else "Scores at other regularisations are"
        remarks.append(f"{what} left out: {kernel.solver.solver} takes long for this kernel.")
    if kernel.spectrum is None:
        remarks.append("The spectrum is left out: the kernel is too large for it.")
    return remarks


def _summarise_results(run: SavedRun, name: str, metric: str) -> RunSummary:
    """Summarise a run without kernels from the files of its predictions and metrics."""
    splits = {}
    for split in ("dev", "test", *map(str, second_splits(run.key))):
        found = run.predictions(split)
        if found is not None:
            value = score(run.task, split, found.predicted, found.labels)
            splits[split] = SplitSummary(found.labels, found.predicted, value)
    stored = {split: _stored_score(run, split, metric) for split in run.metrics}
    scores = {split: found.score for split, found in splits.items()}
    scores |= {split: value for split, value in stored.items() if value is not None}
    remarks = []
    loaded = run.record.get("load_kernels")
    if loaded:
        remarks.append(f"Its kernels were in {loaded}, which holds none now.")
    if not splits:
        remarks.append("The folder holds metrics but no predictions: an older version wrote it.")
    return RunSummary(run, name, metric, splits, scores, remarks=remarks)


def _stored_score(run: SavedRun, split: str, metric: str) -> float | None:
    """The task's metric as the run's result file has it."""
    values = run.metrics.get(split, {})
    names = [name for name in values if name == f"eval_{metric}" or name.endswith(f"/{metric}")]
    return values[names[0]] if names else None


def _differences(run: SavedRun, scores: Mapping[str, float], metric: str) -> list[str]:
    """Say where the predictions from the kernels differ from what the run wrote."""
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
        run: The run: its task, and the logits of the untrained model.
        kernels: Its kernels by split.
        solver: How to predict.
    """

    def __init__(self, run: SavedRun, kernels: Mapping[str, SavedKernel], solver: SolverChoice) -> None:
        self.train = kernels["train"]
        self.solver = solver
        self._run = run
        self._kernels = kernels
        self._f0 = {split: run.untrained_logits(split) for split in kernels} if solver.adjust_for_init else {}

    def predict(self, regularization: float) -> dict[str, SplitSummary]:
        """Fit the solver to the kernel of train and predict the other splits."""
        settings = dataclasses.replace(self.solver.settings, regularization=regularization)
        train = self.train
        fitted = solvers.fit(self.solver.solver, train.values, train.labels, settings, self._f0.get("train"))
        found = {}
        for split, kernel in self._kernels.items():
            if split == "train":
                continue
            labels = kernel.class_ids
            logits = fitted.predict(kernel.values, kernel.labels, self._f0.get(split), split).logits
            mean = mean_over_samples(logits, len(labels))
            predicted = predicted_classes(mean)
            found[split] = SplitSummary(labels, predicted, score(self._run.task, split, predicted, labels), mean)
        return found


def _curve(predictor: _Predictor, own: Mapping[str, SplitSummary], show_progress: bool) -> Curve | None:
    """Predict at other regularisations; `own` holds the predictions at the run's."""
    if not own:
        return None
    tried = _regularizations(predictor.train, predictor.solver.solver)
    at_own = predictor.solver.settings.regularization
    values = sorted({*tried, at_own})
    scores: dict[str, list[float]] = {split: [] for split in own}
    for value in tqdm(values, desc="regularisation", unit="fit", disable=not show_progress, leave=False):
        for split, found in (own if value == at_own else predictor.predict(value)).items():
            scores[split].append(found.score)
    return Curve(values, scores, at_own, tried == REGULARIZATIONS)


def _regularizations(train: SavedKernel, solver: str) -> tuple[float, ...]:
    """The points of the curve that take no more than some ten seconds."""
    size = train.values.shape[-2] * train.num_logits
    limit_of_all, limit_of_few = LIMITS.get(solver, DEFAULT_LIMITS)
    if size <= limit_of_all:
        return REGULARIZATIONS
    return FEW_REGULARIZATIONS if size <= limit_of_few else ()


def _own_differences(run: SavedRun, split: str, kernel: SavedKernel) -> Array | None:
    """Return K̃_jj of the examples of a split; None where that is not known."""
    if split == "train" or kernel.values.ndim == 5 or kernel.samples_per_example[1] > 1:
        return None
    diagonal = run.diagonal(split, kernel)
    return None if diagonal is None else statistics.logit_differences_of_each(diagonal)


def _summarise_kernel(
    kernels: Mapping[str, SavedKernel], own: Mapping[str, Array], solver: SolverChoice, curve: Curve | None
) -> KernelSummary:
    train = kernels["train"]
    matrices = {
        split: kernel.average_over_samples(statistics.logit_differences(kernel.values))
        for split, kernel in kernels.items()
    }
    classes = {split: kernel.class_ids for split, kernel in kernels.items()}
    one_hot = {split: statistics.one_hot(ids, max(2, train.num_logits)) for split, ids in classes.items()}
    flat = statistics.flattened(train.values)
    others = {split: matrix for split, matrix in matrices.items() if split != "train"}
    return KernelSummary(
        shapes={split: kernel.values.shape for split, kernel in kernels.items()},
        num_logits=train.num_logits,
        asymmetric=train.values.ndim == 5,
        samples_per_example=train.samples_per_example[0],
        train=matrices["train"],
        others=others,
        own=own,
        classes=classes,
        spectrum=statistics.spectrum(flat) if len(flat) <= SPECTRUM_LIMIT else None,
        alignments={
            split: statistics.alignment(matrix, one_hot["train"] @ one_hot[split].T)
            for split, matrix in matrices.items()
        },
        components={split: statistics.kernel_components(matrices["train"], other) for split, other in others.items()},
        solver=solver,
        curve=curve,
    )


def typical_examples(found: SplitSummary, each: int = 2) -> list[int]:
    """Choose examples to look at: the surest right predictions, the surest wrong ones, and the least sure ones.

    Args:
        found: Predictions of classes, with logits.
        each: How many of each kind.

    Returns:
        Indices of examples, each once.
    """
    assert found.logits is not None
    sureness = margins(found.logits, predicted_classes(found.logits))
    right = found.predicted == found.labels
    surest = np.argsort(-sureness, kind="stable")
    chosen = [*surest[right[surest]][:each], *surest[~right[surest]][:each]]
    undecided = [index for index in surest[::-1] if index not in chosen][:each]
    return [int(index) for index in [*chosen, *undecided]]
