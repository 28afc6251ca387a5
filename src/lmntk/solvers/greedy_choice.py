"""Which examples of a pool to label or train on: greedily, by what they change, for a fixed kernel.

Letters: E examples of the pool, each with B rows of the kernel (its logits, of each of its samples).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lmntk.solvers.problem import Array, ClassIds

LEAST_RIDGE = 1e-10
"""The least term on the diagonal, as a share of the kernel's norm, so that equal examples can both be chosen."""


class GrowingFit:
    """A kernel ridge regression on a growing set of examples of a pool, updated by one block of rows each time.

    With M the rows chosen so far and A = K_MM + ρ I, it keeps W = A⁻¹ K_M·, the residual kernel R = K − K_·M W (the
    posterior covariance of a Gaussian process), B = A⁻¹ and α = A⁻¹ y_M; the inverse of a bordered matrix gives the
    next ones. Its choices are those of one ρ, whatever the number of examples.

    Args:
        kernel: The kernel of the pool, ``[E, B, E, B]``.
        wanted: What is to be predicted: targets less f₀ / s, ``[E, B]``.
        ridge: ρ, at least `LEAST_RIDGE` times the norm.
        others: The kernel of the pool with examples outside it, ``[E, B, Z]``, for `losses_elsewhere`.
        wanted_elsewhere: What is to be predicted there, ``[Z]``.

    Attributes:
        chosen: The examples, in the order in which they were added.
    """

    def __init__(
        self,
        kernel: Array,
        wanted: Array,
        ridge: float,
        others: Array | None = None,
        wanted_elsewhere: Array | None = None,
    ) -> None:
        self._examples, self._rows = wanted.shape
        self._ridge = ridge * np.eye(self._rows)
        # Symmetric, so that a block of columns is the transpose of that of rows.
        self._residual = (kernel + kernel.transpose(2, 3, 0, 1)) / 2
        self._errors = wanted.copy()
        self._others = np.zeros((*wanted.shape, 0)) if others is None else others.copy()
        self._elsewhere = np.zeros(0) if wanted_elsewhere is None else wanted_elsewhere.copy()
        self._solved = np.zeros((0, self._rows, *wanted.shape))  # W, [m, B, E, B]
        self._inverse = np.zeros((0, self._rows, self._rows))  # the diagonal blocks of A⁻¹
        self._alpha = np.zeros((0, self._rows))
        self.chosen: list[int] = []

    def add(self, example: int) -> None:
        """Fit to a further example of the pool."""
        inverse, pull, column = self._step(example)
        rows = column.transpose(2, 0, 1)  # R_j·, [B, E, B]
        weights = self._solved[:, :, example]  # W_j, [m, B, B]
        scaled = np.einsum("ab,bej->aej", inverse, rows)
        self._solved = np.concatenate([self._solved - np.einsum("mab,bej->maej", weights, scaled), scaled[None]])
        self._inverse = np.concatenate([self._inverse + weights @ inverse @ weights.transpose(0, 2, 1), inverse[None]])
        self._alpha = np.concatenate([self._alpha - weights @ pull, pull[None]])
        self._elsewhere = self._elsewhere - pull @ self._others[example]
        self._others = self._others - np.einsum("ejb,bz->ejz", column, inverse @ self._others[example])
        self._errors = self._errors - column @ pull
        self._residual = self._residual - np.einsum("eja,akl->ejkl", column, scaled)
        self.chosen.append(example)

    def variances(self) -> Array:
        """Return the posterior variance of each example, summed over its rows, ``[E]``."""
        return np.einsum("ebeb->e", self._residual)

    def loss_with(self, example: int) -> float:
        """Return the mean squared error over the pool after `add`, each example predicted by the other chosen ones.

        The chosen ones are left out in closed form, by the diagonal blocks of A⁻¹ (see `RidgeSystem.left_out`).
        """
        inverse, pull, column = self._step(example)
        errors = self._errors - column @ pull
        weights = self._solved[:, :, example]
        blocks = self._inverse + weights @ inverse @ weights.transpose(0, 2, 1)
        left_out = np.linalg.solve(blocks, (self._alpha - weights @ pull)[:, :, None])[:, :, 0]
        errors[self.chosen] = left_out
        errors[example] = self._errors[example]
        return float(np.mean(errors**2))

    def loss_elsewhere_with(self, example: int) -> float:
        """Return the mean squared error over the examples outside the pool after `add`."""
        _, pull, _ = self._step(example)
        return float(np.mean((self._elsewhere - pull @ self._others[example]) ** 2))

    def _step(self, example: int) -> tuple[Array, Array, Array]:
        """Return S⁻¹ with S = R_jj + ρ I, the example's own coefficients S⁻¹ (y − f)_j, and R_·j, ``[E, B, B]``."""
        column = self._residual[:, :, example]
        inverse = np.linalg.inv(column[example] + self._ridge)
        return inverse, inverse @ self._errors[example], column


def by_blocks(kernel: Array, samples: int) -> Array:
    """Return a train kernel ``[N, C, N, C]``, sample by sample, as ``[E, B, E, B]`` with B = samples · C.

    Examples:
        >>> by_blocks(np.arange(16.0).reshape(4, 1, 4, 1), 2)[0, :, 1, :].tolist()
        [[1.0, 3.0], [9.0, 11.0]]
    """
    examples, logits = kernel.shape[0] // samples, kernel.shape[1]
    parts = kernel.reshape(samples, examples, logits, samples, examples, logits)
    return parts.transpose(1, 0, 2, 4, 3, 5).reshape(examples, samples * logits, examples, samples * logits)


def turns(classes: ClassIds, k: int) -> Iterator[int]:
    """Yield k times each class, in turn, so that every beginning of a choice is balanced up to one example.

    Examples:
        >>> list(turns(np.array([0, 1, 1, 0]), 2))
        [0, 1, 0, 1]
    """
    for _ in range(k):
        yield from (int(label) for label in np.unique(classes))


def choose_greedily(
    score: Callable[[int], float], add: Callable[[int], object], classes: ClassIds, k: int, done: Callable[[], object]
) -> list[int]:
    """Choose k examples of each class, one after the other, each with the largest score.

    Args:
        score: The score of an example, given those that were added; of equal ones the first is chosen.
        add: Told of each choice.
        classes: The class of each example of the pool, ``[E]``.
        k: Examples of each class.
        done: Called after each choice.
    """
    chosen: list[int] = []
    for label in turns(classes, k):
        free = [int(example) for example in np.flatnonzero(classes == label) if example not in chosen]
        best = max(free, key=score)
        add(best)
        chosen.append(best)
        done()
    return chosen


def herd(similarities: Array, classes: ClassIds, k: int) -> list[int]:
    """Choose k examples of each class whose mean feature is close to that of their class in the pool.

    Kernel herding (Chen, Welling and Smola 2010), without repetition, for features of any length:
    each example brings the mean of the chosen ones as near to the class's mean as one example can.

    Args:
        similarities: The kernel of the examples, ``[E, E]``.
        classes: The class of each, ``[E]``.
        k: Examples of each class.

    Examples:
        >>> points = np.array([0.0, 1.0, 4.0, 10.0])
        >>> herd(np.outer(points, points), np.zeros(4, dtype=int), 1)
        [2]
    """
    chosen: list[int] = []
    own = np.diag(similarities) / 2
    for label in turns(classes, k):
        members = np.flatnonzero(classes == label)
        before = [example for example in chosen if classes[example] == label]
        mean = similarities[:, members].mean(axis=1)
        scores = mean - (similarities[:, before].sum(axis=1) + own) / (len(before) + 1)
        free = [int(example) for example in members if example not in before]
        chosen.append(max(free, key=lambda example: scores[example]))
    return chosen


def in_turn(drawn: Sequence[int], classes: ClassIds, k: int) -> list[int]:
    """Order examples, k of each class, so that the classes take turns."""
    queues = {int(label): [index for index in drawn if classes[index] == label] for label in np.unique(classes)}
    return [queues[label].pop(0) for label in turns(classes, k)]
