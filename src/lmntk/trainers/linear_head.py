"""The linear head: the last layer alone, fitted to what goes into it; all else stays as it was pre-trained."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.trainer_utils import TrainOutput

from lmntk import distributed
from lmntk.config.arguments import TrainingArguments
from lmntk.errors import UsageError
from lmntk.experiment.build import Experiment
from lmntk.models.classifier import PromptClassifier
from lmntk.prompts.features import sampled_order
from lmntk.solvers import lbfgs
from lmntk.solvers.logistic import cross_validation_folds, fit_rows
from lmntk.trainers.base import LOGITS_TOGETHER, TOO_LARGE, ZeroShotTrainer, log_odds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadSettings:
    """How a linear head of classes is fitted; each name is also the flag that sets it.

    Attributes:
        linear_head_halved: Of two classes take half the log-odds of a fit with twice the C.
        linear_head_order: ``"file"``, or ``"sampler"`` for the order in which the training sampler hands examples out.
        plain_lbfgs: Take the weights at which L-BFGS ends.
        seed: The sampler's.
    """

    linear_head_halved: bool = False
    linear_head_order: str = "file"
    plain_lbfgs: bool = False
    seed: int = 42

    @classmethod
    def of(cls, args: TrainingArguments) -> "HeadSettings":
        """Take them from a command's flags."""
        return cls(args.linear_head_halved, args.linear_head_order, args.plain_lbfgs, args.seed)


class LinearHeadTrainer(ZeroShotTrainer):
    """A `Trainer` that fits the last layer by regression and predicts with it.

    Args:
        run: What was built from the flags.
        args: The flags of the run.
        **kwargs: What else `FewShotTrainer` takes.
    """

    def __init__(self, run: Experiment, args: TrainingArguments, **kwargs: Any) -> None:
        assert run.model is not None
        super().__init__(run, run.model, args, **kwargs)
        self._run = run
        self._settings = HeadSettings.of(args)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fit the last layer."""
        fit_linear_head(self._run, self.args.device, self._settings)
        return TrainOutput(0, 0.0, {})


def fit_linear_head(run: Experiment, device: torch.device, settings: HeadSettings = HeadSettings()) -> None:
    """Replace the rows of the classes in the model's last layer by those of a regression on the train split.

    Classes: cross-validated logistic regression, multinomial; of two classes each takes one half of the weights, with
    opposite signs. Scores: least squares, on the log-odds where two label words stand for the ends of the scale.

    Args:
        run: Its model is changed, on every process alike.
        device: Where the model computes.
        settings: How it is fitted.

    Raises:
        UsageError: A class with fewer than two training examples.
    """
    model = run.model
    assert isinstance(model, PromptClassifier)
    model.to(device)
    model.eval()
    weights, biases = distributed.on_rank_zero(lambda: _fit(run, model, device, settings))
    model.set_last_layer(torch.from_numpy(weights), torch.from_numpy(biases))


def _fit(
    run: Experiment, model: PromptClassifier, device: torch.device, settings: HeadSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[classes, d]`` and biases ``[classes]``."""
    data = run.datasets["train"]
    starts = range(0, len(data), LOGITS_TOGETHER)
    found = []
    for start in tqdm(starts, desc="features of train", unit="batch", disable=len(starts) < 20):
        batch = run.collator(data.features[start : start + LOGITS_TOGETHER])
        moved = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        found.append(model.last_layer_inputs(moved).cpu().double().numpy())
    features = np.concatenate(found)
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if broken.size:
        raise UsageError(
            f"train example {broken[0] % data.num_examples} (counted from 0) gives the last layer inputs that are no "
            f"numbers, though all weights are finite, so that no linear head can be fitted: {TOO_LARGE}"
        )
    has_bias = getattr(model.last_layer, "bias", None) is not None
    logger.info("fitting the last layer to %d × %d features of train", *features.shape)
    if run.task.regression:
        return _fit_scores(features, np.asarray(data.labels), model.num_classes, has_bias)
    classes = np.asarray(data.labels, dtype=np.int64)
    # Several templates show an example several times: it counts once.
    folds = cross_validation_folds(classes[: data.num_examples], model.num_classes, "leave the linear head out")
    if settings.linear_head_order == "sampler":
        order = sampled_order(len(classes), settings.seed)
        features, classes = features[order], classes[order]
    if settings.linear_head_halved and model.num_classes == 2:
        return _halves(*lbfgs.fit_two_rows(features, classes, folds, has_bias))
    fit = lbfgs.fit_rows if settings.plain_lbfgs else fit_rows
    weights, biases = fit(features, classes, folds, fit_intercept=has_bias)
    return _halves(weights, biases) if model.num_classes == 2 else (weights, biases)


def _fit_scores(
    features: np.ndarray, scores: np.ndarray, num_classes: int, has_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LinearRegression  # here, since it takes a second that --help need not wait

    targets = scores if num_classes == 1 else log_odds(scores)
    regression = LinearRegression(fit_intercept=has_bias).fit(features, targets)
    weights, biases = regression.coef_[None], np.atleast_1d(regression.intercept_)
    return (weights, biases) if num_classes == 1 else _halves(weights, biases)


def _halves(weights: np.ndarray, biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One class's score against the other's as two rows, (−w/2, +w/2)."""
    return np.concatenate([-weights / 2, weights / 2]), np.concatenate([-biases / 2, biases / 2])
