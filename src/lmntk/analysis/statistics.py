"""What a kernel looks like in numbers: spectrum, alignment, principal components, similarity; and two kernels compared.

Letters as in `lmntk.solvers.problem`: N training examples, X others, C logits. Most of these measures take one number
for a pair of examples, the kernel of the logits' differences that `logit_differences` makes of the C × C numbers.
Nothing here knows a file, a task or a picture.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh, eigvalsh, svdvals

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


def mean_of_directions(kernel: ArrayLike) -> Array:
    """Make one kernel [N, C, X, C] of an asymmetric one's two directions; another is returned as it is."""
    array = np.asarray(kernel, dtype=np.float64)
    return array.mean(axis=0) if array.ndim == 5 else array


def logit_differences(kernel: ArrayLike) -> Array:
    """Give the kernel of the logits' differences, [N, X]: K̃_ij = Σ_ab P_ab K[i, a, j, b] with P = I − 11ᵀ/C.

    What all logits of an example share does not change its prediction, and P takes it out. Of two logits this is half
    the kernel of f₁ − f₀; a single logit is a difference already, and its kernel is returned.

    Args:
        kernel: [N, C, X, C], or [2, N, C, X, C], whose directions are averaged.
    """
    array = mean_of_directions(kernel)
    logits = array.shape[1]
    if logits == 1:
        return array[:, 0, :, 0]
    return np.einsum("iaja->ij", array) - np.einsum("iajb->ij", array) / logits


def flattened(kernel: ArrayLike) -> Array:
    """Give the matrix that solvers see, [N·C, X·C]; of an asymmetric kernel its first direction."""
    array = np.asarray(kernel, dtype=np.float64)
    first = array[0] if array.ndim == 5 else array
    return first.reshape(first.shape[0] * first.shape[1], -1)


class Spectrum(NamedTuple):
    """The singular values of a matrix, largest first, and what they say.

    Attributes:
        values: All of them.
        effective_rank: exp of the entropy of the values over their sum (Roy and Vetterli 2007).
        rank: How many are above n times the machine epsilon of the largest, the cut-off of `lmntk.solvers`.
        condition: The largest over the smallest; infinite where that is 0.
    """

    values: Array
    effective_rank: float
    rank: int
    condition: float


def spectrum(matrix: Array) -> Spectrum:
    """Find a matrix's singular values; those of a symmetric one are the sizes of its eigenvalues, which are quicker."""
    symmetric = matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, matrix.T)
    values = np.sort(np.abs(eigvalsh(matrix)) if symmetric else svdvals(matrix))[::-1]
    if not values[0]:
        return Spectrum(values, 0.0, 0, float("nan"))
    cut_off = np.finfo(np.float64).eps * max(matrix.shape) * values[0]
    condition = values[0] / values[-1] if values[-1] else np.inf
    return Spectrum(values, effective_rank(values), int((values > cut_off).sum()), float(condition))


def effective_rank(values: Array) -> float:
    """Return exp(−Σ p ln p) with p the non-negative `values` over their sum: n for n equal ones, 1 for a single one."""
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def one_hot(classes: Integers, count: int) -> Array:
    """Give class ids [N] as rows [N, count] with a single 1."""
    return np.eye(count)[classes]


def centred(matrix: Array) -> Array:
    """Take the means of rows and columns out: H A H with H = I − 11ᵀ/n on both sides."""
    return matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()


def alignment(first: Array, second: Array) -> float:
    """Return the centred alignment of two kernels of the same examples: the cosine of H A H and H B H, −1 to 1.

    With B = Y Yᵀ of one-hot targets it is the kernel-target alignment of Cortes, Mohri and Rostamizadeh (2012), with
    another kernel the centred kernel alignment, CKA, of Kornblith et al. (2019). Kernels of train and other examples,
    [N, X], are compared the same way. NaN where nothing is left of one of them.
    """
    return cosine(centred(first), centred(second))


def cosine(first: Array, second: Array) -> float:
    """Return ⟨A, B⟩ / ‖A‖ ‖B‖ over all entries; NaN where one is 0, but for rounding of what made it."""
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    if min(norms) == 0:
        return float("nan")
    return float(np.sum(first / norms[0] * (second / norms[1])))


class Components(NamedTuple):
    """Examples on the principal axes of the training examples.

    Attributes:
        train: [N, axes].
        others: [X, axes].
        shares: Which part of the training examples' variance each axis holds, [axes].
    """

    train: Array
    others: Array
    shares: Array


def kernel_components(train: Array, others: Array, axes: int = 2) -> Components:
    """Do kernel PCA (Schölkopf, Smola and Müller 1998), fitted to the training examples alone.

    An axis whose eigenvalue is not above 0, of too few examples or an indefinite kernel, holds zeros.

    Args:
        train: Symmetric kernel [N, N] of one number a pair.
        others: Its columns for other examples, [N, X].
        axes: How many to find.
    """
    values, vectors = eigh(centred(train))
    values, vectors = values[::-1][:axes], vectors[:, ::-1][:, :axes]
    values, vectors = np.pad(values, (0, axes - len(values))), np.pad(vectors, ((0, 0), (0, axes - vectors.shape[1])))
    smallest = np.finfo(np.float64).eps * len(train) * np.abs(train).max()
    kept = values > smallest
    scale = np.where(kept, np.sqrt(np.where(kept, values, 1)), 0)
    inverse = np.divide(1, scale, out=np.zeros(axes), where=kept)
    # Which sign an axis has is a matter of rounding: make its largest entry positive.
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[largest, np.arange(axes)] < 0, -1, 1)
    about_train = others - train.mean(axis=1, keepdims=True)
    about_train = about_train - about_train.mean(axis=0)
    variance = np.trace(centred(train))
    shares = np.where(kept, values, 0) / variance if variance > smallest else np.zeros(axes)
    return Components(vectors * scale, about_train.T @ vectors * inverse, shares)


def similarities(diagonal: Array, columns: Array) -> Array:
    """Return how alike training examples and others are: K̃_ij / √K̃_ii, each column scaled to its largest size, [N, X].

    Within a column the order is that of the cosine, which wants K̃_jj too: the kernel of the others with themselves.

    Args:
        diagonal: K̃_ii of the training examples, [N]; one that is not above 0 is like nothing.
        columns: K̃_ij, [N, X].
    """
    lengths = np.sqrt(np.maximum(diagonal, 0))[:, None]
    values = np.divide(columns, lengths, out=np.zeros(columns.shape), where=lengths > 0)
    largest = np.abs(values).max(axis=0)
    return np.divide(values, largest, out=np.zeros(columns.shape), where=largest > 0)


def confusion(labels: ArrayLike, predictions: ArrayLike, count: int) -> Integers:
    """Count examples by label and prediction, class ids below `count`: [label, prediction]."""
    counts = np.zeros((count, count), dtype=np.int64)
    np.add.at(counts, (np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)), 1)
    return counts


def margins(logits: Array) -> Array:
    """Return how far each example's largest logit is above the next, [X]; the size of a single logit, doubled."""
    if logits.shape[1] == 1:
        return 2 * np.abs(logits[:, 0])
    ordered = np.sort(logits, axis=1)
    return ordered[:, -1] - ordered[:, -2]


class Comparison(NamedTuple):
    """How alike two arrays of the same kernel's entries are.

    Attributes:
        distance: ‖A − B‖ / ‖B‖.
        scaled_distance: The same for the multiple of A that is nearest to B.
        alignment: CKA of their kernels of the logits' differences.
        correlation: Pearson's, of all entries.
    """

    distance: float
    scaled_distance: float
    alignment: float
    correlation: float


def compare(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Compare two kernels of one shape, [N, C, X, C] or with a leading 2, entry by entry and by what they mean."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    size = float(np.linalg.norm(b))
    distance = float(np.linalg.norm(a - b)) / size if size else float("nan")
    # Of the nearest multiple the error is the sine of the angle; from the difference, where a cosine near 1 rounds.
    nearest = float(np.sum(a * b) / np.sum(a * a)) if np.any(a) else 0.0
    scaled = float(np.linalg.norm(nearest * a - b)) / size if size else float("nan")
    return Comparison(
        distance,
        scaled,
        alignment(logit_differences(a), logit_differences(b)),
        cosine(a - a.mean(), b - b.mean()),
    )
