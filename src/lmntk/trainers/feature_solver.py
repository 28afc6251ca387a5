"""Predictions from stored features: ridge regression, its regularization chosen on dev, and the tables of it."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmntk.config.arguments import TrainingArguments
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import SettingError
from lmntk.experiment.experiment import Evaluation
from lmntk.kernels import MemoryBudget
from lmntk.prompts.features import FeatureDataset
from lmntk.solvers.feature_ridge import LARGEST_GRAM, FeatureRidge, direct_bytes, fits_directly, predict
from lmntk.solvers.problem import class_ids, divided_f0, squared_error, targets
from lmntk.storage.feature_files import StoredFeatures
from lmntk.trainers.base import score

logger = logging.getLogger(__name__)

REGULARIZATIONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""The candidates: the eigenvalue that they are relative to grows with the number of examples, the others less."""


@dataclass(frozen=True)
class FeatureSolution:
    """The predictions with the regularization that was chosen.

    Attributes:
        regularizations: The candidates that could be solved.
        scores: For each the main metric on dev and the loss there; empty where nothing was chosen.
        chosen: The one that was taken.
        evaluations: Those of every split but train.
        is_iterative: Whether conjugate gradients were taken.
    """

    regularizations: Sequence[float]
    scores: Sequence[tuple[float, float]]
    chosen: float
    evaluations: Mapping[str, Evaluation]
    is_iterative: bool


def solve_features(
    features: Mapping[str, StoredFeatures],
    datasets: Mapping[str, FeatureDataset],
    args: TrainingArguments,
    regularizations: Sequence[float] = REGULARIZATIONS,
    iterative: bool | None = None,
    memory: float = math.inf,
) -> FeatureSolution:
    """Fit ridge regression to the features of train, as `lstsq` fits their kernel, and predict the other splits.

    Args:
        features: Those of each split, ``"train"`` among them.
        datasets: The data sets of the splits.
        args: Say whether to adjust for the untrained model's logits.
        regularizations: The candidates, chosen among by the main metric on dev, and of equal ones by the loss.
        iterative: Whether to take conjugate gradients; None for what fits.
        memory: The bytes that solving without them may take.

    Raises:
        SettingError: There are several candidates and no dev examples, or several of `f0_scaling`.
        SolverError: No candidate can be solved.
    """
    check_candidates(regularizations, args, [*features])
    train = features["train"]
    ridge = FeatureRidge(train, iterative, memory=memory)
    wanted = targets(_classes(train), train.shape[1]) - _f0(train, args, "train")
    weights = ridge.fit(regularizations, wanted)
    chooses = len(regularizations) > 1
    solved = [place for place, own in enumerate(weights.T) if np.isfinite(own).all()]
    if len(solved) < len(regularizations):
        without = ", ".join(f"{number:g}" for place, number in enumerate(regularizations) if place not in solved)
        logger.warning("`kernel_regularization`: %s could not be solved and is left out", without)
        regularizations, weights = [regularizations[place] for place in solved], weights[:, solved]
    scores: list[tuple[float, float]] = []
    if chooses:
        found = predict(features["dev"], weights)
        data, task = datasets["dev"], datasets["dev"].task
        metric = f"{task.metric_prefix}{task.main_metrics[0]}"
        evaluations = [_evaluate(data, features["dev"], logits, args) for logits in found]
        scores = [(one.metrics[f"eval_{metric}"], one.metrics["eval_loss"]) for one in evaluations]
    best = max(range(len(scores)), key=lambda number: (scores[number][0], -scores[number][1]), default=0)
    chosen = {
        split: _evaluate(datasets[split], own, predict(own, weights[:, best]), args)
        for split, own in features.items()
        if split != "train"
    }
    return FeatureSolution(regularizations, scores, regularizations[best], chosen, ridge.is_iterative)


def solving_memory(args: TrainingArguments) -> int:
    """Return the bytes that solving may take: `kernel_memory_gb`, or a part of the free memory."""
    given = args.kernel_memory_gb
    return (MemoryBudget.default(torch.device("cpu")) if given is None else MemoryBudget.from_gb(given)).bytes


def describe_solving(shape: tuple[int, int, int], iterative: bool, memory: float) -> str:
    """Say how features of N, C and d will be solved, and what it takes.

    >>> describe_solving((9178, 2, 11202), False, 2**31)
    'solving 18,356 equations in 11,202 unknowns by Cholesky, about 1.00 GB of memory'
    >>> describe_solving((9178, 2, 11202), False, 2**29)
    'solving 18,356 equations in 11,202 unknowns by conjugate gradients: Cholesky would take 1.00 GB, of 0.50 allowed'
    """
    n, c, d = shape
    sentence, needed = f"solving {n * c:,} equations in {d:,} unknowns by", direct_bytes(shape) / 2**30
    if iterative:
        return f"{sentence} conjugate gradients"
    if fits_directly(shape, memory):
        return f"{sentence} Cholesky, about {needed:.2f} GB of memory"
    if min(d, n * c) > LARGEST_GRAM:
        return f"{sentence} conjugate gradients: both are above {LARGEST_GRAM:,}"
    return f"{sentence} conjugate gradients: Cholesky would take {needed:.2f} GB, of {memory / 2**30:.2f} allowed"


def check_candidates(regularizations: Sequence[float], args: TrainingArguments, splits: Sequence[str]) -> None:
    """Check, before features are computed, that they can be solved.

    Args:
        regularizations: The candidates.
        args: Say whether to adjust for the untrained model's logits.
        splits: The splits that there are features of.

    Raises:
        SettingError: There are several candidates and no dev examples, or several of `f0_scaling`.
    """
    if len(regularizations) > 1 and "dev" not in splits:
        raise SettingError(
            "`kernel_regularization` is chosen on dev, which these features lack: give one number, or a run with "
            "`do_eval`",
            setting="kernel_regularization",
        )
    if args.adjust_for_init and isinstance(args.f0_scaling, str):
        raise SettingError(
            f"`f0_scaling={args.f0_scaling}` has several candidates, and features are solved with one: give one number",
            setting="f0_scaling",
            value=args.f0_scaling,
        )


def _evaluate(
    data: FeatureDataset, features: StoredFeatures, predictions: np.ndarray, args: TrainingArguments
) -> Evaluation:
    logits = predictions + _f0(features, args, data.mode)
    loss = squared_error(logits, targets(_classes(features), logits.shape[1]))
    averaged = mean_over_samples(logits, data.num_examples)
    labels = np.asarray(data.labels[: data.num_examples])
    found = score(data.task, averaged, labels) | {"loss": loss}
    return Evaluation({f"eval_{name}": value for name, value in found.items()}, averaged, labels)


def _classes(features: StoredFeatures) -> np.ndarray:
    return class_ids(features.labels, features.shape[1])


def _f0(features: StoredFeatures, args: TrainingArguments, split: str) -> np.ndarray:
    """Return f₀ / s, or zeros without `adjust_for_init`."""
    if not args.adjust_for_init:
        return np.zeros(features.shape[:2])
    return divided_f0(features.logits, features.shape[:2], float(args.f0_scaling), split)
