"""The loss that logistic regression minimises, and Newton's method on it.

Letters: N examples, r features (the last of them 1 where there is an intercept), K columns of weights: one for two
classes, whose scores are log-odds, else one for each class.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit, log_expit, logsumexp

from lmntk.solvers.problem import Array, ClassIds

MOST_STEPS = 200


@dataclass(frozen=True)
class Step:
    """Newton's step at some weights.

    Attributes:
        loss: The loss there.
        gradient: Of the loss, [r, K].
        weights: What the step adds to the weights, [r, K].
        scores: What it adds to the scores of the examples, [N, K].
        spread: The largest difference between a score there and its column's mean.
    """

    loss: float
    gradient: Array
    weights: Array
    scores: Array
    spread: float

    @property
    def gain(self) -> float:
        """By how much the loss falls with the step, to second order."""
        return -float(np.sum(self.gradient * self.weights)) / 2


@dataclass(frozen=True)
class PenalisedLoss:
    """Σ log loss + Σ penalty · weights² / 2.

    Attributes:
        rows: Features, [N, r].
        targets: 0 or 1, [N, K].
        penalty: [r]; 1/C, and 0 for the intercept.
    """

    rows: Array
    targets: Array
    penalty: Array

    def value(self, weights: Array) -> float:
        """The loss."""
        return self._value(weights, self.rows @ weights)

    def step(self, weights: Array) -> Step:
        """Newton's step."""
        scores = self.rows @ weights
        remainder, curvature = _derivatives(scores, self.targets)
        gradient = self.rows.T @ remainder + self.penalty[:, None] * weights
        step = _solve(self._hessian(curvature), -gradient)
        spread = float(np.abs(scores - scores.mean(axis=0)).max())
        return Step(self._value(weights, scores), gradient, step, self.rows @ step, spread)

    def minimum(self, weights: Array) -> tuple[Array, Step]:
        """Go from some weights to those of the minimum; the step from there shows whether it was found."""
        for _ in range(MOST_STEPS):
            step = self.step(weights)
            largest = float(np.abs(step.scores).max())
            if largest <= 1e-2:  # from here on each step squares what is left
                break
            # A step of this length always lowers the loss (Sun & Tran-Dinh 2019, generalised self-concordance).
            sure, length = np.log1p(2 * largest) / (2 * largest), 1.0
            while length > sure and not self.value(weights + length * step.weights) < step.loss - length * step.gain:
                length = max(length / 2, sure)
            weights = weights + length * step.weights
        for _ in range(3):
            weights = weights + self.step(weights).weights
        return weights, self.step(weights)

    def _value(self, weights: Array, scores: Array) -> float:
        penalty = float(np.sum(self.penalty[:, None] * weights**2)) / 2
        return float(np.sum(_log_loss(scores, self.targets))) + penalty

    def _hessian(self, curvature: Array) -> Array:
        """[K, r, K, r] from the scores' [N, K, K], with a part added that changes no step.

        All columns moved alike leave the probabilities as they are. The gradient has no such part, so that adding to
        its curvature, which is the small penalty alone, changes the step by nothing but rounding.
        """
        columns, features = curvature.shape[1], self.rows.shape[1]
        hessian = np.empty((columns, features, columns, features))
        for k in range(columns):
            for m in range(k + 1):
                block = (self.rows * curvature[:, k, m, None]).T @ self.rows
                hessian[k, :, m] = hessian[m, :, k] = block
        diagonal = np.einsum("krkr->kr", hessian)  # a view
        diagonal += self.penalty
        if columns > 1:
            shared = np.einsum("kr->r", diagonal) / columns
            np.einsum("krmr->kmr", hessian)[...] += shared
        return hessian


def target_columns(classes: ClassIds, num_classes: int) -> Array:
    """The targets [N, K] of class ids [N]."""
    return (classes[:, None] == (np.arange(num_classes) if num_classes > 2 else 1)).astype(np.float64)


def _log_loss(scores: Array, targets: Array) -> Array:
    """[N]; small losses keep their digits."""
    if scores.shape[1] == 1:
        return -log_expit(np.where(targets > 0, scores, -scores))[:, 0]
    own = scores[targets > 0][:, None]
    return np.logaddexp(0, logsumexp(np.where(targets > 0, -np.inf, scores - own), axis=1))


def _derivatives(scores: Array, targets: Array) -> tuple[Array, Array]:
    """The first derivatives of the log loss by the scores, [N, K], and the second, [N, K, K]."""
    if scores.shape[1] == 1:
        signs = 1 - 2 * targets
        wrong = expit(signs * scores)
        return signs * wrong, (wrong * expit(-signs * scores))[:, :, None]
    p = np.exp(scores - logsumexp(scores, axis=1, keepdims=True))
    others = np.where(targets > 0, 0, p).sum(axis=1, keepdims=True)  # 1 - p of the own class, with all its digits
    remainder = np.where(targets > 0, -others, p)
    second = -p[:, :, None] * p[:, None, :]
    np.einsum("nkk->nk", second)[...] = p * np.where(targets > 0, others, 1 - p)
    return remainder, second


def _solve(hessian: Array, right_side: Array) -> Array:
    """H⁻¹ [r, K] for a Hessian [K, r, K, r], in units in which its diagonal is 1."""
    columns, features = hessian.shape[:2]
    matrix = hessian.reshape(columns * features, -1)
    scale = 1 / np.sqrt(np.maximum(np.diag(matrix), np.finfo(float).tiny))
    matrix = matrix * scale[:, None] * scale
    ridge = len(matrix) * np.finfo(float).eps
    while True:
        try:
            factor = cho_factor(matrix + ridge * np.eye(len(matrix)), lower=True, check_finite=False)
            break
        except np.linalg.LinAlgError:  # indefinite by rounding: the step gets shorter, its end is the same minimum
            ridge *= 100
    step = scale * cho_solve(factor, scale * right_side.T.reshape(-1), check_finite=False)
    return step.reshape(columns, features).T
