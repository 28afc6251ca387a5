"""Statistics of kernels: spectrum, alignment, principal components and similarity of one, distances between two.

Letters as in `lmntk.solvers.problem`: N training examples, X others, C logits. Most statistics take one number for each
pair of examples, the kernel of the logits' differences that `logit_differences` computes from the C × C numbers.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh, eigvalsh, svdvals

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


def mean_of_directions(kernel: ArrayLike) -> Array:
    """Average the two directions of an asymmetric kernel.

    Args:
        kernel: [2, N, C, X, C], or [N, C, X, C], which is returned unchanged.

    Returns:
        Float64 [N, C, X, C].

    Examples:
        >>> mean_of_directions(np.stack([np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1, 1))])).ravel()
        array([0.5])
    """
    array = np.asarray(kernel, dtype=np.float64)
    return array.mean(axis=0) if array.ndim == 5 else array


def logit_differences(kernel: ArrayLike) -> Array:
    """Return the kernel of the logits' differences: K̃_ij = Σ_ab P_ab K[i, a, j, b] with P = I − 11ᵀ/C.

    P removes the part that all logits of an example share, which does not change its prediction. For two logits, K̃ is
    half the kernel of f₁ − f₀; a single logit is a difference already, and its kernel is returned unchanged.

    Args:
        kernel: [N, C, X, C], or [2, N, C, X, C], whose directions are averaged.

    Returns:
        Float64 [N, X].

    Examples:
        >>> logit_differences(np.eye(2).reshape(1, 2, 1, 2))
        array([[1.]])
    """
    array = mean_of_directions(kernel)
    logits = array.shape[1]
    if logits == 1:
        return array[:, 0, :, 0]
    return np.einsum("iaja->ij", array) - np.einsum("iajb->ij", array) / logits


def logit_differences_of_each(diagonal: Array) -> Array:
    """Return K̃_jj of each example, the diagonal of the kernel of `logit_differences`.

    Args:
        diagonal: K(x, x), [X, C, C], or [2, X, C, C], whose directions are averaged.

    Returns:
        Float64 [X].

    Examples:
        >>> logit_differences_of_each(np.eye(2)[None])
        array([1.])
    """
    array = diagonal.mean(axis=0) if diagonal.ndim == 4 else diagonal
    logits = array.shape[1]
    if logits == 1:
        return array[:, 0, 0]
    return np.einsum("jaa->j", array) - np.einsum("jab->j", array) / logits


def flattened(kernel: ArrayLike) -> Array:
    """Return the matrix that solvers see, [N·C, X·C]: for an asymmetric kernel, its first direction.

    Examples:
        >>> flattened(np.zeros((2, 3, 4, 5, 4))).shape
        (12, 20)
    """
    array = np.asarray(kernel, dtype=np.float64)
    first = array[0] if array.ndim == 5 else array
    return first.reshape(first.shape[0] * first.shape[1], -1)


class Spectrum(NamedTuple):
    """The singular values of a matrix and numbers derived from them.

    Attributes:
        values: The singular values, largest first.
        effective_rank: See `effective_rank`.
        rank: The number of values above n times the machine epsilon times the largest, the cut-off of `lmntk.solvers`.
        condition: The largest value over the smallest; infinite if that is 0.
    """

    values: Array
    effective_rank: float
    rank: int
    condition: float


def spectrum(matrix: Array) -> Spectrum:
    """Compute the singular values of a matrix.

    Examples:
        >>> spectrum(np.diag([4.0, 2.0])).condition
        2.0
    """
    # The singular values of a symmetric matrix are the absolute eigenvalues, which are faster to compute.
    symmetric = matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, matrix.T)
    values = np.sort(np.abs(eigvalsh(matrix)) if symmetric else svdvals(matrix))[::-1]
    if not values[0]:
        return Spectrum(values, 0.0, 0, float("nan"))
    cut_off = np.finfo(np.float64).eps * max(matrix.shape) * values[0]
    condition = values[0] / values[-1] if values[-1] else np.inf
    return Spectrum(values, effective_rank(values), int((values > cut_off).sum()), float(condition))


def effective_rank(values: Array) -> float:
    """Return the effective rank (Roy and Vetterli 2007), exp(−Σ p ln p) with p = values / Σ values.

    Args:
        values: Non-negative numbers, not all 0.

    Examples:
        >>> round(effective_rank(np.array([3.0, 3.0, 3.0, 0.0])), 6)
        3.0
    """
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def one_hot(classes: Integers, count: int) -> Array:
    """Return class ids [N] as rows [N, count] with a single 1.

    Examples:
        >>> one_hot(np.array([1, 0]), 2).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    return np.eye(count)[classes]


def centred(matrix: Array) -> Array:
    """Subtract the means of rows and columns: H A H with H = I − 11ᵀ/n on both sides.

    Examples:
        >>> centred(np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [[0.5, -0.5], [-0.5, 0.5]]
    """
    return matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()


def alignment(first: Array, second: Array) -> float:
    """Return the centred alignment of two kernels of the same examples: the cosine of H A H and H B H, −1 to 1.

    With B = Y Yᵀ of one-hot targets it is the kernel-target alignment of Cortes, Mohri and Rostamizadeh (2012), with
    another kernel the centred kernel alignment, CKA, of Kornblith et al. (2019).

    Args:
        first: A, [N, X].
        second: B, [N, X].

    Returns:
        The alignment; NaN if A or B is 0 after centring.

    Examples:
        >>> round(alignment(np.eye(3), 2 * np.eye(3) + 1), 6)
        1.0
    """
    return cosine(centred(first), centred(second))


def cosine(first: Array, second: Array) -> float:
    """Return ⟨A, B⟩ / ‖A‖ ‖B‖ over all entries; NaN if one is 0.

    Examples:
        >>> round(cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])), 4)
        0.7071
    """
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    if min(norms) == 0:
        return float("nan")
    return float(np.sum(first / norms[0] * (second / norms[1])))


class Components(NamedTuple):
    """Examples on the principal axes of the training examples.

    Attributes:
        train: Coordinates of the training examples, [N, axes].
        others: Coordinates of the other examples, [X, axes].
        shares: The share of the training examples' variance on each axis, [axes].
    """

    train: Array
    others: Array
    shares: Array


def kernel_components(train: Array, others: Array, axes: int = 2) -> Components:
    """Compute kernel PCA (Schölkopf, Smola and Müller 1998), fitted to the training examples alone.

    An axis whose eigenvalue is not above 0, because of few examples or an indefinite kernel, holds zeros.

    Args:
        train: The symmetric kernel of the training examples, [N, N].
        others: The kernel of training examples and others, [N, X].
        axes: The number of axes.

    Examples:
        >>> kernel_components(np.eye(2), np.eye(2), axes=1).train.round(4).tolist()
        [[0.7071], [-0.7071]]
    """
    values, vectors = eigh(centred(train))
    values, vectors = values[::-1][:axes], vectors[:, ::-1][:, :axes]
    values, vectors = np.pad(values, (0, axes - len(values))), np.pad(vectors, ((0, 0), (0, axes - vectors.shape[1])))
    smallest = np.finfo(np.float64).eps * len(train) * np.abs(train).max()
    kept = values > smallest
    scale = np.where(kept, np.sqrt(np.where(kept, values, 1)), 0)
    inverse = np.divide(1, scale, out=np.zeros(axes), where=kept)
    # The sign of an axis depends on rounding: make its largest entry positive.
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, np.arange(axes)] < 0, -1, 1)
    about_train = others - train.mean(axis=1, keepdims=True)
    about_train = about_train - about_train.mean(axis=0)
    variance = np.trace(centred(train))
    shares = np.where(kept, values, 0) / variance if variance > smallest else np.zeros(axes)
    return Components(vectors * scale, about_train.T @ vectors * inverse, shares)


def similarities(diagonal: Array, columns: Array) -> Array:
    """Return the similarity of training examples and others: K̃_ij / √K̃_ii, relative to the largest of its column.

    Within a column the order is that of the cosine, which also needs K̃_jj, the kernel of the others with themselves.

    Args:
        diagonal: K̃_ii of the training examples, [N]; the similarities of one that is not above 0 are 0.
        columns: K̃_ij, [N, X].

    Returns:
        Similarities from −1 to 1, [N, X].

    Examples:
        >>> similarities(np.array([1.0, 4.0]), np.array([[1.0], [1.0]])).tolist()
        [[1.0], [0.5]]
    """
    lengths = np.sqrt(np.maximum(diagonal, 0))[:, None]
    values = np.divide(columns, lengths, out=np.zeros(columns.shape), where=lengths > 0)
    largest = np.abs(values).max(axis=0)
    return np.divide(values, largest, out=np.zeros(columns.shape), where=largest > 0)


def cosines(diagonal: Array, columns: Array, own: Array) -> Array:
    """Return the cosines of training examples and others, K̃_ij / √(K̃_ii K̃_jj).

    Args:
        diagonal: K̃_ii of the training examples, [N].
        columns: K̃_ij, [N, X].
        own: K̃_jj of the others, [X].

    Returns:
        [N, X], from −1 to 1 but for rounding; 0 where K̃_ii or K̃_jj is not above 0.

    Examples:
        >>> cosines(np.array([1.0, 4.0]), np.array([[1.0], [1.0]]), np.array([4.0])).tolist()
        [[0.5], [0.25]]
    """
    lengths = np.sqrt(np.maximum(diagonal, 0))[:, None] * np.sqrt(np.maximum(own, 0))
    return np.divide(columns, lengths, out=np.zeros(columns.shape), where=lengths > 0)


def distances(diagonal: Array, columns: Array, own: Array) -> Array:
    """Return the distances of training examples and others as the kernel has them, √(K̃_ii + K̃_jj − 2 K̃_ij), [N, X].

    Arguments are those of `cosines`; a square that rounding takes below 0 counts as 0.

    Examples:
        >>> distances(np.array([1.0]), np.array([[2.0]]), np.array([4.0])).tolist()
        [[1.0]]
    """
    return np.sqrt(np.maximum(diagonal[:, None] + own - 2 * columns, 0))


def confusion(labels: ArrayLike, predictions: ArrayLike, count: int) -> Integers:
    """Count examples by label and prediction.

    Args:
        labels: Class ids below `count`, [X].
        predictions: Class ids below `count`, [X].
        count: The number of classes.

    Returns:
        Numbers of examples, [label, prediction].

    Examples:
        >>> confusion([0, 1, 1], [0, 0, 1], 2).tolist()
        [[1, 0], [1, 1]]
    """
    counts = np.zeros((count, count), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)), 1)
    return counts


class Comparison(NamedTuple):
    """The distance and similarity of two kernels A and B.

    Attributes:
        distance: ‖A − B‖ / ‖B‖.
        scaled_distance: The same for the multiple of A that is nearest to B.
        alignment: CKA of their kernels of the logits' differences.
        correlation: Pearson correlation of all entries.
    """

    distance: float
    scaled_distance: float
    alignment: float
    correlation: float


def compare(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Compare two kernels of one shape.

    Args:
        first: A, [N, C, X, C] or [2, N, C, X, C].
        second: B, of the same shape.

    Examples:
        >>> kernel = np.array([1.0, 2.0, 2.0, 5.0]).reshape(2, 1, 2, 1)
        >>> found = compare(2 * kernel, kernel)
        >>> found.distance, found.scaled_distance
        (1.0, 0.0)
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    size = float(np.linalg.norm(b))
    distance = float(np.linalg.norm(a - b)) / size if size else float("nan")
    # The error of the nearest multiple is the sine of the angle; a cosine near 1 would be too coarse.
    nearest = float(np.sum(a * b) / np.sum(a * a)) if np.any(a) else 0.0
    scaled = float(np.linalg.norm(nearest * a - b)) / size if size else float("nan")
    return Comparison(
        distance,
        scaled,
        alignment(logit_differences(a), logit_differences(b)),
        cosine(a - a.mean(), b - b.mean()),
    )
