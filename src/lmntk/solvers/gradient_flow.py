"""Training of a linearised model in function space: gradient flow, gradient descent, and the largest stable step.

With the kernel K of the train examples at θ₀, a step of plain gradient descent on all of them with learning rate η
moves the logits of every example x by −η K(x, X) ∂L/∂f, where f are the logits of the train examples (Jacot et al.
2018; Lee et al. 2019). All of it is carried by coefficients α, f(x) = f₀(x) + K(x, X) α: one
trajectory of α gives the logits of train and of every other split. Gradient flow is the limit of small steps; its time
is η times the number of steps.

The losses are those of the trainers, L = mean over the N examples: of the squared error over the C logits from one-hot
targets (±1 for a single logit), or of the cross entropy (for a single logit f, that of the two logits 0 and f).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.linalg import eigh
from scipy.special import log_softmax, softmax

from lmntk.errors import SolverError
from lmntk.solvers.problem import Array, ClassIds, targets

Loss = Literal["squared_error", "cross_entropy"]
LOSSES: tuple[Loss, ...] = ("squared_error", "cross_entropy")

RELATIVE_TOLERANCE = 1e-8
"""Of α in the integration of the cross entropy's flow."""
LOGIT_TOLERANCE = 1e-8
"""The absolute tolerance of α there, times the largest eigenvalue of K: what an error of α can change a logit by."""
SMALL = 0.5
"""Up to this share of the distance that a step removes, 1 − (1 − share)^t is computed by expm1 and log1p."""


class StableSteps(NamedTuple):
    """The largest learning rates of gradient descent on all train examples.

    Attributes:
        squared_error: 2 / λ_max of the Hessian, N C / λ_max(K). For the linearised model it is exact: below it the
            training converges, above it the training diverges.
        cross_entropy_at_start: 2 / λ_max of the Hessian at f₀. Near f₀ it is exact for the linearised model; the
            Hessian changes as the predictions do.
        cross_entropy_anywhere: 2 over the largest curvature that any logits can have: below it the loss of the
            linearised model falls in every step.
    """

    squared_error: float
    cross_entropy_at_start: float
    cross_entropy_anywhere: float


@dataclass(frozen=True, eq=False)
class LinearisedTraining:
    """A linearised model and its train examples.

    Attributes:
        kernel: K, symmetric, float64 ``[N, C, N, C]``.
        classes: The class ids of the train examples, ``[N]``.
        f0: The logits before training, float64 ``[N, C]``.
    """

    kernel: Array
    classes: ClassIds
    f0: Array

    def flow(self, loss: Loss, times: ArrayLike) -> Array:
        """Return α of gradient flow at some times.

        For the squared error it is Q diag((1 − e^{−2 w τ / N C}) / w) Qᵀ (y − f₀) with K = Q diag(w) Qᵀ. For the cross
        entropy dα/dτ = (y − p(f₀ + K α)) / N, N C ordinary differential equations, is integrated by LSODA with
        `RELATIVE_TOLERANCE` and `LOGIT_TOLERANCE`.

        Args:
            loss: The loss.
            times: Learning rate times steps, ascending from 0 on, ``[T]``.

        Returns:
            float64 ``[T, N, C]``.

        Raises:
            SolverError: The integration fails.
        """
        points = np.asarray(times, dtype=np.float64)
        if loss == "squared_error":
            exponents = -points[:, None] * self._curvatures
            return self._of_squared_error(-np.expm1(exponents), points)
        return self._integrate(points)

    def descent(self, loss: Loss, rates: Sequence[float] | Array) -> Array:
        """Return α of gradient descent on all train examples after each step, 0 steps included.

        For the squared error it is the closed form with ∏_s (1 − 2 η_s w / N C) in place of the exponential; for the
        cross entropy the steps are taken one by one.

        Args:
            loss: The loss.
            rates: The learning rate of each step, ``[T]``.

        Returns:
            float64 ``[T + 1, N, C]``; infinite or NaN where a training has diverged beyond float64.
        """
        learning_rates = np.asarray(rates, dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            if loss == "squared_error":
                times = np.concatenate([[0.0], np.cumsum(learning_rates)])
                return self._of_squared_error(self._removed(learning_rates), times)
            alpha = np.zeros((len(learning_rates) + 1, self.f0.size))
            for step, rate in enumerate(learning_rates):
                alpha[step + 1] = alpha[step] + rate * self._pull(alpha[step])
            return alpha.reshape(-1, *self.f0.shape)

    @functools.cached_property
    def stable_steps(self) -> StableSteps:
        """The largest stable learning rates of full-batch gradient descent.

        The Hessian of L with respect to the train logits, H, gives 2 / λ_max(H^{1/2} K H^{1/2}). H is 2 / N C for the
        squared error, and for the cross entropy (diag(p) − p pᵀ) / N, at most ½ (I − 11ᵀ/C) / N (Böhning 1992), for a
        single logit p (1 − p) / N, at most ¼ / N.
        """
        examples, logits = self.f0.shape
        root = _root_of_curvature(_probabilities(self.f0))
        most = np.eye(logits) - 1 / logits if logits > 1 else np.eye(1)
        bound = 1 / 2 if logits > 1 else 1 / 4
        at_start = _largest(np.einsum("iba,ibjc,jcd->iajd", root, self.kernel, root, optimize=True))
        anywhere = bound * _largest(np.einsum("ab,ibjc,cd->iajd", most, self.kernel, most, optimize=True))
        largest = float(self._eigen[0].max())
        curvatures = (2 * largest / self.f0.size, at_start / examples, anywhere / examples)
        return StableSteps(*(2 / value if value > 0 else float("inf") for value in curvatures))

    @functools.cached_property
    def _matrix(self) -> Array:
        flat = self.kernel.reshape(self.f0.size, self.f0.size)
        return (flat + flat.T) / 2

    @functools.cached_property
    def _eigen(self) -> tuple[Array, Array]:
        values, vectors = eigh(self._matrix)
        return np.maximum(values, 0), vectors  # a kernel has no others: those below 0 are rounding

    @property
    def _curvatures(self) -> Array:
        """The eigenvalues of the squared error's Hessian in weight space, ``[N C]``."""
        return 2 * self._eigen[0] / self.f0.size

    def _of_squared_error(self, removed: Array, times: Array) -> Array:
        """Return α for the share of the distance to y that is removed along each eigenvector, ``[T, N C]``."""
        values, vectors = self._eigen
        distance = vectors.T @ (targets(self.classes, self.f0.shape[1]) - self.f0).reshape(-1)
        # Along an eigenvalue of 0 the logits of train never move, but α grows with the time.
        limit = 2 * times[:, None] / self.f0.size
        known = values > np.finfo(np.float64).tiny
        shares = np.where(known, removed / np.where(known, values, 1), limit)
        return ((shares * distance) @ vectors.T).reshape(-1, *self.f0.shape)

    def _removed(self, rates: Array) -> Array:
        """Return 1 − ∏_s (1 − η_s h) after each step for each curvature h, ``[T + 1, N C]``."""
        removed = np.zeros((len(rates) + 1, self.f0.size))
        shares = rates[:, None] * self._curvatures
        small = shares.max(axis=0, initial=0.0) <= SMALL
        removed[1:, small] = -np.expm1(np.cumsum(np.log1p(-shares[:, small]), axis=0))
        removed[1:, ~small] = 1 - np.cumprod(1 - shares[:, ~small], axis=0)
        return removed

    def _pull(self, alpha: Array) -> Array:
        """Return −∂L/∂f of the cross entropy, which is dα/dτ, flat ``[N C]``."""
        logits = self.f0 + (self._matrix @ alpha).reshape(self.f0.shape)
        return ((self._wanted - _probabilities(logits)) / len(self.classes)).reshape(-1)

    @functools.cached_property
    def _wanted(self) -> Array:
        """The probabilities to learn, ``[N, C]``: one-hot, or 0 and 1 of a single logit."""
        if self.f0.shape[1] == 1:
            return self.classes[:, None].astype(np.float64)
        return targets(self.classes, self.f0.shape[1])

    def _jacobian(self, alpha: Array) -> Array:
        """Return the derivative of `_pull`, ``[N C, N C]``."""
        logits = self.f0 + (self._matrix @ alpha).reshape(self.f0.shape)
        root = _root_of_curvature(_probabilities(logits))
        blocks = -(root @ root.transpose(0, 2, 1)) / len(self.classes)
        rows = self._matrix.reshape(*self.f0.shape, -1)
        return np.einsum("iab,ibj->iaj", blocks, rows).reshape(self.f0.size, -1)

    def _integrate(self, times: Array) -> Array:
        found = np.zeros((len(times), self.f0.size))
        later = times > 0
        if later.any():
            largest = float(self._eigen[0].max()) or 1.0
            solution = solve_ivp(
                lambda _, alpha: self._pull(alpha), (0.0, float(times[-1])), found[0], method="LSODA",
                t_eval=times[later], jac=lambda _, alpha: self._jacobian(alpha), rtol=RELATIVE_TOLERANCE,
                atol=LOGIT_TOLERANCE / largest,
            )  # fmt: skip
            if not solution.success:
                raise SolverError(
                    f"the gradient flow of the cross entropy cannot be integrated ({solution.message}): take a smaller "
                    "`learning_rate` or fewer `steps`",
                    solver="LSODA",
                )
            found[later] = solution.y.T
        return found.reshape(-1, *self.f0.shape)


def logits_of(alpha: Array, x_kernel: Array, x_f0: Array) -> Array:
    """Return the logits of X examples, f₀(x) + K(x, X) α.

    Args:
        alpha: Coefficients, ``[T, N, C]``.
        x_kernel: The kernel of train and X, ``[N, C, X, C]``.
        x_f0: The logits of X before training, ``[X, C]``.

    Returns:
        float64 ``[T, X, C]``.
    """
    flat = x_kernel.reshape(alpha[0].size, x_f0.size)
    with np.errstate(over="ignore", invalid="ignore"):
        return (alpha.reshape(len(alpha), -1) @ flat).reshape(-1, *x_f0.shape) + x_f0


def mean_loss(loss: Loss, logits: Array, classes: ClassIds) -> Array:
    """Return the loss of several sets of logits, as the trainers define it.

    Args:
        loss: The loss.
        logits: ``[..., X, C]``.
        classes: Class ids, ``[X]``.

    Returns:
        float64 of the leading shape.

    Examples:
        >>> mean_loss("squared_error", np.array([[0.5], [1.0]]), np.array([0, 1])).item()
        1.125
        >>> round(mean_loss("cross_entropy", np.zeros((1, 4)), np.array([2])).item(), 4)
        1.3863
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if loss == "squared_error":
            return np.mean((logits - targets(classes, logits.shape[-1])) ** 2, axis=(-2, -1))
        both = np.concatenate([np.zeros_like(logits), logits], axis=-1) if logits.shape[-1] == 1 else logits
        own = log_softmax(both, axis=-1)[..., np.arange(len(classes)), classes]
        return 0 - np.mean(own, axis=-1)  # not −: that makes −0 of 0


def _probabilities(logits: Array) -> Array:
    """Return the probabilities that logits ``[N, C]`` give; of a single one, that of class 1."""
    if logits.shape[1] == 1:
        return softmax(np.concatenate([np.zeros_like(logits), logits], axis=1), axis=1)[:, 1:]
    return softmax(logits, axis=1)


def _root_of_curvature(probabilities: Array) -> Array:
    """Return S with S Sᵀ = diag(p) − p pᵀ for each example, ``[N, C, C]``; for a single logit S² = p (1 − p).

    With u = √p, of norm 1, S = diag(u) (I − u uᵀ).
    """
    if probabilities.shape[1] == 1:
        return np.sqrt(probabilities * (1 - probabilities))[:, :, None]
    roots = np.sqrt(probabilities)
    return roots[:, :, None] * (np.eye(roots.shape[1]) - roots[:, :, None] * roots[:, None, :])


def _largest(kernel: Array) -> float:
    """Return the largest eigenvalue of a kernel ``[N, C, N, C]``."""
    size = kernel.shape[0] * kernel.shape[1]
    matrix = kernel.reshape(size, size)
    values = eigh((matrix + matrix.T) / 2, eigvals_only=True, subset_by_index=[size - 1, size - 1])
    return float(values[0])
