"""The linear head: a regression of the last layer on its inputs; all other weights stay pre-trained."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.trainer_utils import TrainOutput

from lmntk import distributed
from lmntk.config.arguments import ModelArguments, TrainingArguments
from lmntk.errors import NotFiniteError
from lmntk.experiment.experiment import Experiment
from lmntk.prompts.features import sampled_order
from lmntk.solvers.cross_validation import cross_validation_folds
from lmntk.trainers.base import OVERFLOW, ZeroShotTrainer, log_odds

logger = logging.getLogger(__name__)

# Prompts whose last layer's inputs are computed together.
BATCH_SIZE = 32


@dataclass(frozen=True)
class HeadSettings:
    """How a linear head of classes is fitted; each attribute is named like the argument that sets it.

    Attributes:
        linear_head_halved: Whether a head of two classes takes half the log-odds of a fit with twice the C.
        linear_head_order: The order of the examples: ``"file"``, or ``"sampler"`` for that of the training sampler.
        plain_lbfgs: Whether to take the weights at which L-BFGS ends, even short of the minimum.
        seed: The seed of the training sampler.
    """

    linear_head_halved: bool = False
    linear_head_order: str = "file"
    plain_lbfgs: bool = False
    seed: int = 42

    @classmethod
    def of(cls, args: TrainingArguments) -> "HeadSettings":
        """Take the settings from the arguments of a run."""
        return cls(args.linear_head_halved, args.linear_head_order, args.plain_lbfgs, args.seed)


class LinearHeadTrainer(ZeroShotTrainer):
    """A `Trainer` that fits the last layer by regression and predicts with it.

    Args:
        experiment: What was built from the arguments.
        model_args: The arguments of the model.
        args: The arguments of the run.
    """

    def __init__(self, experiment: Experiment, model_args: ModelArguments, args: TrainingArguments) -> None:
        # The fit minimises the cross entropy, so that is the loss to report.
        super().__init__(experiment, replace(model_args, l2_loss=False), args)
        self._experiment = experiment
        self._settings = HeadSettings.of(args)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fit the last layer."""
        fit_linear_head(self._experiment, self.args.device, self._settings)
        return TrainOutput(0, 0.0, {})


def fit_linear_head(experiment: Experiment, device: torch.device, settings: HeadSettings = HeadSettings()) -> None:
    """Replace the rows of the classes in the model's last layer by those of a regression on the train split.

    For classes it is a cross-validated multinomial logistic regression; with two classes each row gets one half of the
    weights, with opposite signs. For scores it is least squares, on the log-odds if two label words stand for the ends
    of the scale.

    Args:
        experiment: Its model is changed, in the same way on every process.
        device: The device of the model.
        settings: How the head of classes is fitted.

    Raises:
        UsageError: A class has fewer than two training examples.
    """
    model = experiment.model
    model.to(device)
    model.eval()
    weights, biases = distributed.on_rank_zero(_fit, experiment, device, settings)
    model.set_last_layer(torch.from_numpy(weights), torch.from_numpy(biases))


def _fit(experiment: Experiment, device: torch.device, settings: HeadSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return weights ``[classes, d]`` and biases ``[classes]``."""
    model = experiment.model
    data = experiment.datasets["train"]
    starts = range(0, len(data), BATCH_SIZE)
    found = []
    for start in tqdm(starts, desc="features of train", unit="batch", disable=len(starts) < 20):
        batch = experiment.collator(data.features[start : start + BATCH_SIZE])
        moved = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        found.append(model.last_layer_inputs(moved).cpu().double().numpy())
    features = np.concatenate(found)
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if broken.size:
        example = int(broken[0] % data.num_examples)
        raise NotFiniteError(
            f"train example {example} (counted from 0) gives the last layer inputs that are NaN or infinite, though "
            f"all weights are finite, so that no linear head can be fitted: {OVERFLOW}",
            example=example,
            split="train",
        )
    has_bias = getattr(model.last_layer, "bias", None) is not None
    logger.info("fitting the last layer to %d × %d features of train", *features.shape)
    if experiment.task.regression:
        return _fit_scores(features, np.asarray(data.labels), model.num_classes, has_bias)
    from lmntk.solvers import lbfgs, logistic  # here, since scipy.optimize takes half a second to load

    classes = np.asarray(data.labels, dtype=np.int64)
    # An example counts once, although each template shows it.
    folds = cross_validation_folds(classes[: data.num_examples], model.num_classes, "leave the linear head out")
    if settings.linear_head_order == "sampler":
        order = sampled_order(len(classes), settings.seed)
        features, classes = features[order], classes[order]
    if settings.linear_head_halved and model.num_classes == 2:
        return _halves(*lbfgs.fit_two_rows(features, classes, folds, has_bias))
    fit = lbfgs.fit_rows if settings.plain_lbfgs else logistic.fit_rows
    weights, biases = fit(features, classes, folds, fit_intercept=has_bias)
    return _halves(weights, biases) if model.num_classes == 2 else (weights, biases)


def _fit_scores(
    features: np.ndarray, scores: np.ndarray, num_classes: int, has_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LinearRegression  # here, since it takes a second to load

    targets = scores if num_classes == 1 else log_odds(scores)
    regression = LinearRegression(fit_intercept=has_bias).fit(features, targets)
    weights, biases = regression.coef_[None], np.atleast_1d(regression.intercept_)
    return (weights, biases) if num_classes == 1 else _halves(weights, biases)


def _halves(weights: np.ndarray, biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the weights of one class against the other into two rows, (−w/2, +w/2)."""
    return np.concatenate([-weights / 2, weights / 2]), np.concatenate([-biases / 2, biases / 2])
