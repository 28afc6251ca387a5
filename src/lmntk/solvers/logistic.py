"""Cross-validated logistic regression, as the published program asks scikit-learn for it: of kernels, linear heads.

scikit-learn's L-BFGS may stop far above the minimum of its loss without a word, where features are as large as a
kernel's values or as small as those of a scaled one. So each of its fits is held to the minimum, and taken there by
Newton's method where it fell short.

Letters: N examples, F features, r = min(N, F) of them after a rotation (and one more, 1, for the intercept), K columns
of weights: one for two classes, else one for each class.
"""

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import qr

from lmntk.errors import UsageError
from lmntk.solvers.penalised_loss import PenalisedLoss, Step, target_columns
from lmntk.solvers.problem import Array, ClassIds

logger = logging.getLogger(__name__)

MOST_FOLDS = 5
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


def cross_validation_folds(
    train_classes: ClassIds, num_classes: int, way_out: str = "take --kernel_solver lstsq"
) -> int:
    """Choose the folds of cross-validation: five, or as many as the smallest class has examples.

    Args:
        train_classes: Class ids, [N].
        num_classes: The number of classes.
        way_out: What the error names beside more examples.

    Raises:
        UsageError: A class with fewer than two examples, which no split can both train and test on.
    """
    counts = np.bincount(train_classes, minlength=num_classes)
    label, smallest = int(counts.argmin()), int(counts.min())
    if smallest < 2:
        raise UsageError(
            f"class {label} has {smallest} training example{'' if smallest else 's'}, but logistic regression is "
            f"cross-validated and needs two of each: raise K, or {way_out}"
        )
    if smallest < MOST_FOLDS:
        logger.warning("class %d has %d training examples: %d folds instead of %d", label, *[smallest] * 2, MOST_FOLDS)
    return min(MOST_FOLDS, smallest)


def cross_validated(folds: int, **options: Any) -> Any:
    """The published program's `LogisticRegressionCV`, not fitted yet.

    Args:
        folds: How many the cross-validation takes.
        **options: Further arguments of scikit-learn.
    """
    from sklearn.linear_model import LogisticRegressionCV

    return LogisticRegressionCV(
        random_state=0,
        cv=folds,
        # What the defaults have always been (L2, accuracy), spelled out because scikit-learn is about to change them.
        l1_ratios=(0.0,),
        scoring="accuracy",
        use_legacy_attributes=False,
        **options,
    )


def fit_rows(features: Array, classes: ClassIds, folds: int, fit_intercept: bool = True) -> tuple[Array, Array]:
    """Fit by scikit-learn, and hold each fit, of the cross-validation and the last one, to its minimum.

    Args:
        features: [N, F].
        classes: Class ids, [N]; of each there are `folds` examples or more.
        folds: How many the cross-validation takes.
        fit_intercept: Whether scores have a constant, which is not penalised.

    Returns:
        Weights [K, F] and intercepts [K].

    Raises:
        UsageError: Features beyond `LARGEST_FEATURE`.
    """
    if (largest := np.abs(features).max()) > LARGEST_FEATURE:
        raise UsageError(
            f"logistic regression takes features up to {LARGEST_FEATURE:g}, but the largest here is {largest:.1e}: "
            "take another model, or another solver"
        )
    rotated = Rotated.of(features, fit_intercept)
    targets = target_columns(classes, int(classes.max()) + 1)
    if rotated.rows.shape[1] * targets.shape[1] > MOST_UNKNOWNS:
        return _fit_large(rotated, classes, folds)
    model = _fitted(cross_validated(folds, max_iter=MAX_ITERATIONS, fit_intercept=fit_intercept), features, classes)
    holder = Holder(rotated, targets)
    scores = model.scores_[:, 0].copy()  # [folds, Cs]
    for fold, (learn, check) in enumerate(_splits(classes, folds)):
        for index, c in enumerate(model.Cs_):
            repaired = holder.hold(rotated.weights(model.coefs_paths_[fold, 0, index]), c, learn)
            if repaired is not None:
                scores[fold, index] = np.mean(_predicted(rotated.rows[check] @ repaired) == classes[check])
    best = model.Cs_[scores.sum(axis=0).argmax()]
    found = np.c_[model.coef_, model.intercept_] if fit_intercept else model.coef_
    weights = holder.hold(rotated.weights(found), best, slice(None))
    holder.tell()
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
class Holder:
    """What holds fits to their minimum, and counts them.

    Attributes:
        rotated: The features.
        targets: [N, K].
        fits: How many there were.
        short: How many were short of the minimum.
        lost: How many of these did not get there either.
    """

    rotated: Rotated
    targets: Array
    fits: int = field(default=0, init=False)
    short: int = field(default=0, init=False)
    lost: int = field(default=0, init=False)

    def hold(self, weights: Array, c: float, examples: ClassIds | slice) -> Array | None:
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

    def tell(self) -> None:
        """Say where numbers are not scikit-learn's, and warn where they are not the minimum's either."""
        examples = len(self.targets)
        if self.lost:
            logger.warning(
                "logistic regression on %d train examples: %d of %d fits did not reach the minimum of their loss; do "
                "not trust the predictions, take another solver",
                *(examples, self.lost, self.fits),
            )
        elif self.short:
            logger.info(
                "logistic regression on %d train examples: L-BFGS stopped short of the minimum in %d of %d fits, so "
                "Newton's method went on to it",
                *(examples, self.short, self.fits),
            )


def _fit_large(rotated: Rotated, classes: ClassIds, folds: int) -> tuple[Array, Array]:
    """L-BFGS alone, where Newton's method has too many unknowns; on the rotated features, which are fewer."""
    features = rotated.rows[:, : rotated.rank] * rotated.scale
    intercept = rotated.rows.shape[1] > rotated.rank
    model = _fitted(cross_validated(folds, max_iter=MAX_ITERATIONS_ALONE, fit_intercept=intercept), features, classes)
    logger.warning(
        "logistic regression on %d train examples has more than %d unknowns, too many for Newton's method: that L-BFGS "
        "got to the minimum is not checked",
        *(len(classes), MOST_UNKNOWNS),
    )
    return model.coef_ @ rotated.directions.T, model.intercept_


def _fitted(model: Any, features: Array, classes: ClassIds) -> Any:
    """Fit, without scikit-learn's warnings: whoever calls looks at what comes of it."""
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
