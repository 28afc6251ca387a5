"""How far a training moves from its linearisation and its kernel, step by step.

Letters as in `lmntk.analysis.behaviour`: f_t and f_lin,t are the logits of the model and of the model linearised at θ₀
after t steps, and K_t is the kernel of the train examples at θ_t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lmntk.analysis import statistics
from lmntk.analysis.kernel_distances import KernelDistances, kernel_distances, mean_distances
from lmntk.analysis.pairing import DATA, check_pair, settings_of
from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.analysis.scores import logits_distance, recovery, score
from lmntk.analysis.statistics import Array
from lmntk.analysis.summary import SPECTRUM_LIMIT
from lmntk.analysis.trainings import REPEAT, Training
from lmntk.errors import FileError, KernelMismatchError
from lmntk.solvers.problem import ClassIds, predicted_classes
from lmntk.storage.training_snapshots import TrainingSnapshot, find_snapshots

METHOD = ("trainer", "optimizer", "optimizer_variant")
"""What trainings that are averaged have in common, besides their task, model and prompt."""

LENGTH = ("learning_rate", "max_steps", "per_device_train_batch_size")
"""What they may differ in, with a remark: learning rates are chosen for each seed."""

NUMBERS = ("logits_distance", "equal_predictions", "alignment", "effective_rank", "sign_share", "train_loss")


@dataclass(frozen=True)
class DriftStep:
    """A training after some steps; NaN where a number is not there.

    Attributes:
        step: The number of steps, t.
        scores: The score of the model, by split.
        linearised_scores: The score of the linearised model, by split.
        recovery: (acc_lin,t − acc_PT) / (acc_t − acc_PT) on the chosen split.
        logits_distance: ‖f_t − f_lin,t‖ / ‖f_t − f₀‖ there.
        equal_predictions: The share of examples to which f_t and f_lin,t give the same class there.
        distances: How far K_t is from K₀; None without kernels.
        alignment: The centred alignment of K_t with the labels, see `statistics.alignment`.
        effective_rank: The effective rank of K_t, see `statistics.effective_rank`.
        sign_share: Of the trained parameters that step t moved, the share that it moved against their gradient: 1 for
            SignGD without weight decay.
        train_loss: The loss of f_t on train.
    """

    step: int
    scores: Mapping[str, float]
    linearised_scores: Mapping[str, float]
    recovery: float
    logits_distance: float
    equal_predictions: float
    distances: KernelDistances | None
    alignment: float
    effective_rank: float
    sign_share: float
    train_loss: float


@dataclass(frozen=True)
class Drift:
    """A training, or the mean of several that differ in their seeds.

    Attributes:
        name: What to call it.
        task: The key of the task.
        metric: The name of the scores, ``"acc"``.
        split: The split of the recovery and of the numbers of the logits.
        steps: The steps, ascending; the first is 0.
        remarks: Sentences on what is missing.
    """

    name: str
    task: str
    metric: str
    split: str
    steps: Sequence[DriftStep]
    remarks: Sequence[str] = ()


def training_drift(run: SavedRun, name: str, split: str = "test", show_progress: bool = False) -> Drift:
    """Compute the drift of a training.

    Args:
        run: A run whose folder has snapshots of step 0 and at least one other.
        name: What to call it.
        split: The split of the recovery and of the numbers of the logits.
        show_progress: Whether to show a progress bar.

    Raises:
        FileError: Snapshots are missing or damaged.
        NotFiniteError: A snapshot holds NaN or infinity.
        SettingError: The run's task is a regression task.
    """
    training = Training.of_run(run)
    if len(training.steps) < 2:
        what = "holds a snapshot of step 0 only, but a drift needs another step"
        raise FileError(f"{run.folder} {what}: {REPEAT}", path=run.folder)
    bar = tqdm(training.steps, desc=f"drift of {name}", unit="snapshot", disable=not show_progress, leave=False)
    steps = [_drift_step(training, training.read(step), split) for step in bar]
    remarks = [] if any(step.distances for step in steps) else [f"the snapshots of {name} hold no kernels"]
    return Drift(name, run.key, run.task.main_metrics[0] if run.task else "acc", split, steps, remarks)


def _drift_step(training: Training, snapshot: TrainingSnapshot, split: str) -> DriftStep:
    found, before = training.split(snapshot, split), training.first.splits[split]
    kernel, start = training.kernel(snapshot), training.first.kernel
    train = training.first.splits.get("train")
    of_model, of_linear = map(predicted_classes, (found.logits, found.linearised))
    scores, linearised_scores = (_scores(training, snapshot, split, kind) for kind in ("logits", "linearised"))
    pretrained = score(training.run.task, split, predicted_classes(before.logits), before.labels)
    return DriftStep(
        step=snapshot.step,
        scores=scores,
        linearised_scores=linearised_scores,
        recovery=recovery(linearised_scores[split], scores[split], pretrained),
        logits_distance=logits_distance(found.logits, found.linearised, before.logits),
        equal_predictions=float(np.mean(of_model == of_linear)),
        distances=None if kernel is None or start is None else kernel_distances(kernel, start),
        alignment=float("nan") if kernel is None or train is None else _alignment(kernel, train.labels),
        effective_rank=float("nan") if kernel is None else _effective_rank(kernel),
        sign_share=_number(snapshot.description, "sign_share"),
        train_loss=_number(snapshot.description, "train_loss"),
    )


def _scores(training: Training, snapshot: TrainingSnapshot, chosen: str, kind: str) -> dict[str, float]:
    """Score the logits of one kind on all splits but train, and on the chosen one."""
    found = {split: training.split(snapshot, split) for split in snapshot.splits if split != "train" or split == chosen}
    return {
        split: score(training.run.task, split, predicted_classes(getattr(one, kind)), one.labels)
        for split, one in found.items()
    }


def _number(facts: Mapping[str, Any], name: str) -> float:
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")


def _alignment(kernel: Array, labels: ClassIds) -> float:
    """Align the kernel of the logits' differences, averaged over the samples of each example, with the labels."""
    differences = statistics.logit_differences(kernel)
    samples = len(differences) // len(labels)
    mean = differences.reshape(samples, len(labels), samples, len(labels)).mean(axis=(0, 2))
    targets = statistics.one_hot(labels, int(labels.max()) + 1)
    return statistics.alignment(mean, targets @ targets.T)


def _effective_rank(kernel: Array) -> float:
    matrix = statistics.flattened(kernel)
    return statistics.spectrum(matrix).effective_rank if len(matrix) <= SPECTRUM_LIMIT else float("nan")


def find_trainings(folders: Sequence[Path]) -> list[SavedRun]:
    """Find the run of each folder that has snapshots.

    Raises:
        FileError: A folder is not that of a run, or has no snapshots.
        KernelMismatchError: A folder has snapshots of several tasks.
    """
    found = []
    for folder in folders:
        runs = read_runs(folder)
        with_snapshots = [run for run in runs if find_snapshots(run.paths)]
        if len(with_snapshots) > 1:
            tasks = [run.key for run in with_snapshots]
            sentence = f"{folder} holds snapshots of {' and '.join(tasks)}: move those of one task to another folder"
            raise KernelMismatchError(sentence, path=folder, differences=tasks)
        found.append((with_snapshots or runs)[0])
    return found


def drift_of_runs(
    runs: Sequence[SavedRun], names: Sequence[str], split: str = "test", show_progress: bool = False
) -> list[Drift]:
    """Compute the drift of trainings that differ in their seeds at most.

    Args:
        runs: The runs.
        names: What to call them.
        split: The split of the recovery and of the numbers of the logits.
        show_progress: Whether to show progress bars.

    Raises:
        FileError: Snapshots are missing or damaged.
        KernelMismatchError: The runs are of different tasks, models, prompts or parameters.
    """
    first, *others = [Training.of_run(run) for run in runs]
    for other in others:
        # New adapters and heads are drawn by the seed: two seeds have different weights at the start.
        settings = settings_of(first.run, first.description)
        drawn = settings.get("apply_lora") or settings.get("few_shot_type") == "finetune"
        weights = ("weights_sha256",) if drawn else ()
        check_pair(first.run, other.run, first.description, other.description, without=(*DATA, *weights))
        differing = _differing([first, other], METHOD)
        if differing:
            sentence = (
                f"{first.run.folder} and {other.run.folder} differ in {differing[0]}: give each a call of its own"
            )
            raise KernelMismatchError(sentence, path=other.run.folder, differences=differing)
    remarks = [f"the trainings differ in {what}" for what in _differing([first, *others], LENGTH)]
    drifts = [training_drift(run, name, split, show_progress) for run, name in zip(runs, names, strict=True)]
    return [replace(drift, remarks=(*drift.remarks, *remarks)) for drift in drifts]


def _differing(trainings: Sequence[Training], settings: Sequence[str]) -> list[str]:
    """Return the settings in which trainings differ, with their values."""
    known = [{**training.run.record, **training.description} for training in trainings]
    texts = [{name: str(value) for name, value in each.items() if value is not None} for each in known]
    values = {name: list(dict.fromkeys(each.get(name, "") for each in texts)) for name in settings}
    return [f"`{name}` ({', '.join(found)})" for name, found in values.items() if len(found) > 1]


def mean_drift(drifts: Sequence[Drift]) -> Drift:
    """Average trainings over the steps that all of them have; the recovery is that of the mean scores.

    Args:
        drifts: From `drift_of_runs`, at least one.

    Raises:
        KernelMismatchError: They share no step but 0.
    """
    if len(drifts) == 1:
        return drifts[0]
    by_step = [{step.step: step for step in drift.steps} for drift in drifts]
    shared = [step for step in by_step[0] if all(step in steps for steps in by_step)]
    names = ", ".join(drift.name for drift in drifts)
    if len(shared) < 2:
        raise KernelMismatchError(
            f"the trainings {names} share no step but 0: give trainings with the same `kernel_steps` and as many steps",
            differences=["kernel_steps"],
        )
    steps: list[DriftStep] = []
    for step in shared:
        steps.append(_mean_step([found[step] for found in by_step], steps[0] if steps else None, drifts[0].split))
    omitted = sorted({step for found in by_step for step in found} - set(shared))
    remarks = list(dict.fromkeys(remark for drift in drifts for remark in drift.remarks))
    if omitted:
        remarks.append(f"not all trainings have the steps {', '.join(map(str, omitted))}, which are left out")
    first = drifts[0]
    return Drift(f"mean of {len(drifts)} trainings", first.task, first.metric, first.split, steps, remarks)


def _mean_step(found: Sequence[DriftStep], start: DriftStep | None, split: str) -> DriftStep:
    """Average one step of several trainings; `start` is their mean step 0, None for that itself."""
    scores = _mean_of_scores([step.scores for step in found])
    linearised_scores = _mean_of_scores([step.linearised_scores for step in found])
    distances = [step.distances for step in found if step.distances is not None]
    return DriftStep(
        step=found[0].step,
        scores=scores,
        linearised_scores=linearised_scores,
        recovery=recovery(linearised_scores[split], scores[split], (start.scores if start else scores)[split]),
        distances=mean_distances(distances) if len(distances) == len(found) else None,
        **{name: float(np.mean([getattr(step, name) for step in found])) for name in NUMBERS},
    )


def _mean_of_scores(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the scores of the splits that all trainings have."""
    shared = [split for split in found[0] if all(split in scores for scores in found)]
    return {split: float(np.mean([scores[split] for scores in found])) for split in shared}
