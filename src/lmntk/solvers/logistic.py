"""Cross-validated logistic regression on kernels and linear heads, as the published program asks scikit-learn for it.

scikit-learn's L-BFGS may stop far above the minimum of its loss without a word, where features are as large as a
kernel's values or as small as those of a scaled one. Each of its fits is therefore compared with the minimum, and
Newton's method continues where it fell short.

Letters: N examples, F features, r = min(N, F) of them after a rotation (and one more, 1, for the intercept), K columns
of weights: one for two classes, else one for each class.
"""

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import qr
from scipy.special import log_expit, log_softmax

from lmntk.errors import SolverError
from lmntk.solvers import lbfgs
from lmntk.solvers.cross_validation import cross_validated, cross_validation_folds
from lmntk.solvers.penalised_loss import PenalisedLoss, Step, target_columns
from lmntk.solvers.problem import Array, ClassIds, FitInputs, Predict, PredictInputs, Prediction, one_hot_rows

logger = logging.getLogger(__name__)

MAX_ITERATIONS = 500  # of L-BFGS: Newton's method finishes what takes longer
MAX_ITERATIONS_ALONE = 10000
MOST_UNKNOWNS = 2048  # of Newton's method, each of whose steps solves so many equations
LARGEST_FEATURE = 1e100  # beyond it float64 has no room for squares and probabilities

# When a fit is near its minimum. L-BFGS ends where no entry of the gradient of the mean loss is above scikit-learn's
# tolerance, which is its answer for features of order 1. With small features all gradients are below it, and nothing
# is fitted; with large ones the scores may still be far off. There L-BFGS also ends, without a word, because the loss
# hardly falls.
TOLERANCE = 1e-4
TOLERANCE_OF_SMALL_FEATURES = 1e-2  # times the largest of them
LARGE_FEATURES = 100.0
CHANGE_OF_SCORES, CHANGE_WITHIN_TOLERANCE = 1e-2, 0.5  # times what the scores differ by, if that is more than 1
SHARE_OF_LOSS = 1e-6


def logistic(train: FitInputs) -> Predict:
    """Logistic regression on the rows of the kernel, its C chosen by cross-validation; loss: cross entropy.

    The logit of a single-logit kernel is log p(1) - log p(0); more logits are log-probabilities.
    """
    if train.is_flattened:
        return _flattened(train)
    folds = cross_validation_folds(train.classes, max(2, train.num_logits))
    # Row i of a symmetric kernel, [C_i, N, C_n], and column j of the other, [N, C_n, C_j], in one order: n, C_n, own C.
    features = train.kernel.transpose(0, 2, 3, 1).reshape(len(train.kernel), -1)
    fit = lbfgs.fit_rows if train.settings.plain_lbfgs else fit_rows
    weights, intercepts = fit(features, train.classes, folds)

    def predict(x: PredictInputs) -> Prediction:
        scores = x.kernel[0].transpose(2, 0, 1, 3).reshape(len(x.classes), -1) @ weights.T + intercepts
        # From the scores, not from the probabilities: those round to 0 and 1, whose logarithm is lost.
        if scores.shape[1] == 1:
            log_probabilities = np.concatenate([log_expit(-scores), log_expit(scores)], axis=1)
        else:
            log_probabilities = log_softmax(scores, axis=1)
        loss = -float(np.mean(log_probabilities[np.arange(len(scores)), x.classes]))
        return Prediction(scores if train.num_logits == 1 else log_probabilities, loss, {})

    return predict


def _flattened(train: FitInputs) -> Predict:
    """Logistic regression on the rows of the flattened kernel; logits: log-odds; loss: a mean over all rows."""
    rows = one_hot_rows(train.classes, train.num_logits)
    fit = lbfgs.fit_rows if train.settings.plain_lbfgs else fit_rows
    weights, intercepts = fit(train.flat(), rows, cross_validation_folds(rows, 2))

    def predict(x: PredictInputs) -> Prediction:
        log_odds = x.flat().T @ weights[0] + intercepts[0]
        wanted = one_hot_rows(x.classes, train.num_logits)
        loss = -float(np.mean(log_expit(np.where(wanted, log_odds, -log_odds))))
        return Prediction(log_odds.reshape(-1, train.num_logits), loss, {})

    return predict


def fit_rows(features: Array, classes: ClassIds, folds: int, fit_intercept: bool = True) -> tuple[Array, Array]:
    """Fit by scikit-learn, and take each fit, those of the cross-validation and the last one, to its minimum.

    Args:
        features: [N, F].
        classes: Class ids, [N]; of each there are `folds` examples or more.
        folds: The number of folds.
        fit_intercept: Whether scores have a constant, which is not penalised.

    Returns:
        Weights [K, F] and intercepts [K].

    Raises:
        SolverError: A feature exceeds `LARGEST_FEATURE`.
    """
    if (largest := np.abs(features).max()) > LARGEST_FEATURE:
        raise SolverError(
            f"logistic regression takes features up to {LARGEST_FEATURE:g}, but the largest here is {largest:.1e}: "
            "take another model, or another solver",
            solver="logistic",
        )
    rotated = Rotated.of(features, fit_intercept)
    targets = target_columns(classes, int(classes.max()) + 1)
    if rotated.rows.shape[1] * targets.shape[1] > MOST_UNKNOWNS:
        return _fit_large(rotated, classes, folds)
    model = _fitted(cross_validated(folds, max_iter=MAX_ITERATIONS, fit_intercept=fit_intercept), features, classes)
    check = MinimumCheck(rotated, targets)
    scores = model.scores_[:, 0].copy()  # [folds, Cs]
    for fold, (learn, held_out) in enumerate(_splits(classes, folds)):
        for index, c in enumerate(model.Cs_):
            repaired = check.reach_minimum(rotated.weights(model.coefs_paths_[fold, 0, index]), c, learn)
            if repaired is not None:
                scores[fold, index] = np.mean(_predicted(rotated.rows[held_out] @ repaired) == classes[held_out])
    best = model.Cs_[scores.sum(axis=0).argmax()]
    found = np.c_[model.coef_, model.intercept_] if fit_intercept else model.coef_
    weights = check.reach_minimum(rotated.weights(found), best, slice(None))
    check.report()
    return (model.coef_, model.intercept_) if weights is None else rotated.unrotated(weights)


@dataclass(frozen=True)
class Rotated:
    """Features in as few dimensions as the examples span, of order 1; a loss and its minimum stay what they are.

    Attributes:
        rows: [N, r], with a last column of ones where there is an intercept.
        directions: [F, r], orthonormal.
        scale: What the features were divided by.
        largest: The largest feature.
    """

    rows: Array
    directions: Array
    scale: float
    largest: float

    @classmethod
    def of(cls, features: Array, intercept: bool) -> "Rotated":
        """Rotate by a QR decomposition with pivots, which leaves small examples and dimensions their digits."""
        directions, triangle, order = qr(features.T, mode="economic", pivoting=True, check_finite=False)
        rows = np.empty((len(features), len(triangle)))
        rows[order] = triangle.T
        scale = float(np.abs(rows).max()) or 1.0
        rows = np.c_[rows / scale, np.ones((len(rows), int(intercept)))]
        return cls(rows, directions, scale, float(np.abs(features).max()))

    @property
    def rank(self) -> int:
        """r, without the intercept."""
        return self.directions.shape[1]

    def loss(self, targets: Array, c: float, examples: ClassIds | slice) -> PenalisedLoss:
        """What scikit-learn minimises on some of the examples, over C."""
        penalty = np.zeros(self.rows.shape[1])
        # With features beyond 1e±150 the square of the scale would be 0, or infinite.
        penalty[: self.rank] = np.clip(1 / c / self.scale / self.scale, 1e-250, 1e250)
        return PenalisedLoss(self.rows[examples], targets[examples], penalty)

    def weights(self, found: Array) -> Array:
        """Weights and intercepts of the features, [K, F (+ 1)], as those of the rows, [r (+ 1), K]."""
        features = len(self.directions)
        return np.r_[self.directions.T @ found[:, :features].T * self.scale, found[:, features:].T]

    def unrotated(self, weights: Array) -> tuple[Array, Array]:
        """Weights of the rows as those of the features, [K, F], and intercepts, [K]."""
        intercepts = weights[self.rank] if len(weights) > self.rank else np.zeros(weights.shape[1])
        return (self.directions @ (weights[: self.rank] / self.scale)).T, intercepts

    def largest_gradient(self, step: Step) -> float:
        """The largest entry of the gradient of the mean loss by the weights of the features: L-BFGS looks at it."""
        of_features = self.directions @ step.gradient[: self.rank] * self.scale
        return float(
            max(np.abs(of_features).max(), np.abs(step.gradient[self.rank :]).max(initial=0)) / len(step.scores)
        )


@dataclass
class MinimumCheck:
    """Takes fits to their minimum, and counts them.

    Attributes:
        rotated: The features.
        targets: [N, K].
        fits: The number of fits.
        short: The number of fits that stopped short of the minimum.
        lost: The number of those that Newton's method did not take there.
    """

    rotated: Rotated
    targets: Array
    fits: int = field(default=0, init=False)
    short: int = field(default=0, init=False)
    lost: int = field(default=0, init=False)

    def reach_minimum(self, weights: Array, c: float, examples: ClassIds | slice) -> Array | None:
        """Return the weights of the minimum, [r (+ 1), K], where the given ones are short of it, else None."""
        loss = self.rotated.loss(self.targets, c, examples)
        self.fits += 1
        step = loss.step(weights) if np.isfinite(weights).all() else None
        if step is not None and self.is_near(step):
            return None
        self.short += 1
        zero = np.zeros_like(weights)
        start = zero if step is None or not step.loss < loss.value(zero) else weights
        found, last = loss.minimum(start)
        self.lost += last.gain > SHARE_OF_LOSS * last.loss
        return found

    def is_near(self, step: Step) -> bool:
        """Whether a fit is near enough to its minimum, by the gradient and Newton's step there."""
        gradient = self.rotated.largest_gradient(step)
        within = gradient <= TOLERANCE
        lenient = within and self.rotated.largest <= LARGE_FEATURES
        change = np.abs(step.scores).max() / max(1.0, step.spread)
        if change > (CHANGE_WITHIN_TOLERANCE if lenient else CHANGE_OF_SCORES):
            return False
        if within:
            return gradient <= TOLERANCE_OF_SMALL_FEATURES * self.rotated.largest
        return step.gain <= SHARE_OF_LOSS * step.loss

    def report(self) -> None:
        """Log how many fits Newton's method improved, and warn about those that did not reach the minimum."""
        examples = len(self.targets)
        if self.lost:
            logger.warning(
                "logistic regression on %d train examples: %d of %d fits did not reach the minimum of their loss; do "
                "not trust the predictions, take another solver",
                examples,
                self.lost,
                self.fits,
            )
        elif self.short:
            logger.info(
                "logistic regression on %d train examples: L-BFGS stopped short of the minimum in %d of %d fits, so "
                "Newton's method went on to it",
                examples,
                self.short,
                self.fits,
            )


def _fit_large(rotated: Rotated, classes: ClassIds, folds: int) -> tuple[Array, Array]:
    """L-BFGS alone, where Newton's method has too many unknowns; on the rotated features, which are fewer."""
    features = rotated.rows[:, : rotated.rank] * rotated.scale
    intercept = rotated.rows.shape[1] > rotated.rank
    model = _fitted(cross_validated(folds, max_iter=MAX_ITERATIONS_ALONE, fit_intercept=intercept), features, classes)
    logger.warning(
        "logistic regression on %d train examples has more than %d unknowns, too many for Newton's method: that L-BFGS "
        "got to the minimum is not checked",
        len(classes),
        MOST_UNKNOWNS,
    )
    return model.coef_ @ rotated.directions.T, model.intercept_


def _fitted(model: Any, features: Array, classes: ClassIds) -> Any:
    """Fit without scikit-learn's warnings: the callers check the result."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return model.fit(features, classes)


def _splits(classes: ClassIds, folds: int) -> Any:
    """The examples that scikit-learn learns from, and checks with, in each fold."""
    from sklearn.model_selection import StratifiedKFold

    return StratifiedKFold(folds).split(classes, classes)


def _predicted(scores: Array) -> Array:
    """Class ids [N] of scores [N, K]."""
    return (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(axis=1)
