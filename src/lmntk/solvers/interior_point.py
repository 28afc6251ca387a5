"""The problem of a support vector machine, a quadratic program, solved by an interior-point method.

Of n samples with the kernel K, in P copies of signs s = ±1,

    minimise ½ βᵀ K β + Σ l x  over 0 ≤ x ≤ 1 with Σ β = 0, where β = Σ_P s x.

The machine's value for another sample is Σ β K + b with b the multiplier of Σ β = 0. Regression has two copies, s = 1
and -1, with l = ε - s y; classification has one, s = y, with l = -1.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh

from lmntk.solvers.problem import Array

MOST_STEPS = 60
RESIDUAL = 1e-8  # of the optimality conditions, in units of the machine's values
ROUNDING = 1e-6  # times the kernel's largest eigenvalue: what a float32 kernel is off by
EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Solution:
    """β [n], b, and by how much the optimality conditions are missed at most."""

    coefficients: Array
    bias: float
    residual: float


@dataclass(frozen=True)
class BoxProgram:
    """The problem with K / scale and 0 ≤ x ≤ scale, which is the same one with β · scale.

    Attributes:
        root: [n, r], K / scale = root · rootᵀ: without the rounding, so that large β do not make more of it.
        scale: The kernel's largest value, or 1 if that is more.
        signs: s, [P, n].
        linear: l, [P, n].
        exact: Whether K is symmetric and positive semidefinite but for rounding.
    """

    root: Array
    scale: float
    signs: Array
    linear: Array
    exact: bool

    @classmethod
    def of(cls, kernel: Array, signs: Array, linear: Array) -> "BoxProgram":
        """The problem of a kernel [n, n]."""
        scale = max(1.0, float(np.abs(kernel).max()))
        scaled = kernel / scale
        eigenvalues, vectors = eigh((scaled + scaled.T) / 2)
        largest = max(eigenvalues[-1], 0.0)
        exact = max(np.abs(scaled - scaled.T).max(), -eigenvalues[0]) <= ROUNDING * largest
        kept = eigenvalues > EPSILON * len(kernel) * largest
        return cls(vectors[:, kept] * np.sqrt(eigenvalues[kept]), scale, signs, linear, bool(exact))

    def solve(self) -> Solution:
        """Go to the solution by Mehrotra's predictor and corrector (Nocedal & Wright 2006, chapter 16.6).

        Returns:
            The best point on the way; its residual is infinite if the kernel is no symmetric, positive one.
        """
        best = Solution(np.zeros(len(self.root)), 0.0, np.inf)
        # x, what it lacks to the scale, and the multipliers of both, which all stay positive; and b.
        point = np.ones((4, *self.signs.shape))
        point[:2] = self.scale / 2
        bias = 0.0
        for _ in range(MOST_STEPS if self.exact else 0):
            residual = self.residual(point, bias)
            if residual < best.residual:
                best = Solution((self.signs * point[0]).sum(axis=0) / self.scale, bias, residual)
            # With very large values float64 has no more digits, and what is near 0 grows again.
            if residual <= RESIDUAL or best.residual < min(residual, 1e-6):
                break
            try:
                step, bias_step = self._step(point, bias)
            except LinAlgError:
                break
            length = 0.995 * _longest(point, step)
            point, bias = point + length * step, bias + length * bias_step
        return best

    def gradient(self, x: Array, bias: float) -> Array:
        """Of the objective and the equality by x, [P, n]."""
        return self.signs * (self._times((self.signs * x).sum(axis=0)) + bias) + self.linear

    def residual(self, point: Array, bias: float) -> float:
        """How far x goes down its gradient, by a step of 1, before it meets the box; or Σ β, if that is more."""
        x, room = point[:2]
        free = np.clip(self.gradient(x, bias), -room, x)
        return float(max(np.abs(free).max(), np.abs((self.signs * x).sum()) / self.scale))

    def _times(self, vector: Array) -> Array:
        return self.root @ (self.root.T @ vector)

    def _step(self, point: Array, bias: float) -> tuple[Array, float]:
        """Newton's step, corrected for its curvature, to smaller products of x and its multipliers."""
        x, room, x_multiplier, room_multiplier = point
        dual = self.gradient(x, bias) - x_multiplier + room_multiplier
        surplus = float((self.signs * x).sum())
        diagonal = x_multiplier / x + room_multiplier / room
        weights = (1 / diagonal).sum(axis=0)
        # What is added to the diagonal lets Cholesky's method pass where K is singular; two corrections take it out.
        shift = EPSILON * float(np.sum(self.root**2))
        factor = cho_factor(self.root @ self.root.T + np.diag(1 / weights + shift))
        smallest = diagonal.argmin(axis=0), np.arange(len(weights))

        def inverse(right_side: Array) -> Array:
            """Solve (K + 1 / weights) v = right side."""
            found = cho_solve(factor, right_side)
            for _ in range(2):
                found = found + cho_solve(factor, right_side - found / weights - self._times(found))
            return found

        constant = inverse(np.ones(len(weights)))

        def newton(x_pull: Array, room_pull: Array) -> tuple[Array, float]:
            right_side = x_pull - room_pull - dual
            of_beta = inverse((self.signs * right_side / diagonal).sum(axis=0) / weights)
            bias_step = (of_beta.sum() + surplus) / constant.sum()
            beta_step = of_beta - bias_step * constant
            x_step = (right_side - self.signs * (self._times(beta_step) + bias_step)) / diagonal
            # A free x has a small diagonal, by which nothing exact is divided: it is what is left of β.
            x_step[smallest] += self.signs[smallest] * (beta_step - (self.signs * x_step).sum(axis=0))
            multipliers = x_pull - x_multiplier / x * x_step, room_pull + room_multiplier / room * x_step
            return np.stack([x_step, -x_step, *multipliers]), float(bias_step)

        straight, _ = newton(-x_multiplier, -room_multiplier)
        gap, ahead = _gap(point), _gap(point + _longest(point, straight) * straight)
        aim = ahead * (ahead / gap) ** 2
        bent = straight[:2] * straight[2:]
        return newton((aim - bent[0]) / x - x_multiplier, (aim - bent[1]) / room - room_multiplier)


def _gap(point: Array) -> float:
    return float(np.mean(point[:2] * point[2:]))


def _longest(point: Array, step: Array) -> float:
    """How much of a step leaves everything positive."""
    return float(1 / np.max(-step / point, initial=1.0))
