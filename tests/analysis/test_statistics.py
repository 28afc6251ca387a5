"""The measures of kernels, held against closed forms; tolerances are rounding errors of float64."""

import numpy as np
import pytest

from lmntk.analysis import statistics

CLOSE = {"rel": 1e-9, "abs": 1e-9}


def features(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def kernel_of(train: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("iaf,jbf->iajb", train, x)


def test_the_kernel_of_differences_is_that_of_logits_less_their_mean() -> None:
    train, x = features(5, 3, 20), features(4, 3, 20, seed=1)
    centred = [phi - phi.mean(axis=1, keepdims=True) for phi in (train, x)]
    wanted = np.einsum("iaf,jaf->ij", *centred)
    assert statistics.logit_differences(kernel_of(train, x)) == pytest.approx(wanted, **CLOSE)


def test_what_all_logits_share_does_not_count() -> None:
    train, x = features(5, 3, 20), features(4, 3, 20, seed=1)
    shared = features(5, 1, 20, seed=2)
    moved = kernel_of(train + shared, x)
    assert statistics.logit_differences(moved) == pytest.approx(
        statistics.logit_differences(kernel_of(train, x)), **CLOSE
    )


def test_of_two_logits_it_is_half_the_kernel_of_their_difference_and_a_single_logits_kernel_is_itself() -> None:
    train, x = features(5, 2, 20), features(4, 2, 20, seed=1)
    one = kernel_of(train[:, 1:] - train[:, :1], x[:, 1:] - x[:, :1])
    assert statistics.logit_differences(one) == pytest.approx(one[:, 0, :, 0], abs=0)
    assert statistics.logit_differences(kernel_of(train, x)) == pytest.approx(one[:, 0, :, 0] / 2, **CLOSE)


def test_an_asymmetric_kernel_counts_as_the_mean_of_its_directions() -> None:
    first, second = features(5, 2, 4, 2), features(5, 2, 4, 2, seed=1)
    mean = statistics.logit_differences((first + second) / 2)
    assert statistics.logit_differences(np.stack([first, second])) == pytest.approx(mean, **CLOSE)


def test_solvers_see_the_first_direction_flattened() -> None:
    kernel = features(2, 3, 2, 4, 2)
    flat = statistics.flattened(kernel)
    assert flat.shape == (6, 8)
    assert flat[2 * 1 + 1, 2 * 3 + 0] == kernel[0, 1, 1, 3, 0]
    assert np.array_equal(statistics.flattened(kernel[0]), flat)


def test_the_effective_rank_of_n_equal_values_is_n_and_of_one_value_is_one() -> None:
    assert statistics.spectrum(3.0 * np.eye(7)).effective_rank == pytest.approx(7, **CLOSE)
    assert statistics.spectrum(np.ones((5, 5))).effective_rank == pytest.approx(1, abs=1e-6)
    # Shares 1/2, 1/4, 1/4: an entropy of 3/2 ln 2.
    assert statistics.effective_rank(np.array([2.0, 1.0, 1.0, 0.0])) == pytest.approx(2**1.5, **CLOSE)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_spectrum_has_the_singular_values_and_what_they_say(symmetric: bool) -> None:
    left = np.linalg.qr(features(4, 4))[0]
    right = left if symmetric else np.linalg.qr(features(4, 4, seed=1))[0]
    matrix = (left * [8.0, 4.0, 2.0, -1.0]) @ right.T
    matrix = (matrix + matrix.T) / 2 if symmetric else matrix
    found = statistics.spectrum(matrix)
    assert found.values == pytest.approx([8, 4, 2, 1], **CLOSE)
    assert (found.rank, found.condition) == (4, pytest.approx(8, **CLOSE))


def test_a_matrix_with_two_equal_rows_is_not_of_full_rank() -> None:
    phi = features(5, 9)
    phi[1] = phi[0]
    found = statistics.spectrum(phi @ phi.T)
    assert found.rank == 4
    assert found.condition > 1e14


def test_a_kernel_of_zeros_has_no_rank_and_no_condition() -> None:
    found = statistics.spectrum(np.zeros((3, 3)))
    assert (found.rank, found.effective_rank) == (0, 0)
    assert np.isnan(found.condition)


def test_the_labels_own_kernel_is_aligned_with_them_and_a_shift_or_a_factor_changes_nothing() -> None:
    y = statistics.one_hot(np.array([0, 1, 2, 1, 0, 2, 2]), 3)
    assert statistics.alignment(y @ y.T, y @ y.T) == pytest.approx(1, **CLOSE)
    assert statistics.alignment(5 * (y @ y.T) + 3, y @ y.T) == pytest.approx(1, **CLOSE)
    signs = np.array([1.0, -1, 1, 1, -1])
    two = statistics.one_hot((signs > 0).astype(int), 2)
    assert statistics.alignment(np.outer(signs, signs), two @ two.T) == pytest.approx(1, **CLOSE)


def test_a_kernel_that_knows_nothing_of_the_labels_has_alignment_zero_and_a_constant_one_none() -> None:
    first, second = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    assert statistics.alignment(np.outer(first, first), np.outer(second, second)) == pytest.approx(0, abs=1e-12)
    assert np.isnan(statistics.alignment(np.ones((4, 4)), np.outer(first, first)))


def test_alignment_does_not_change_under_rotation_and_scale_of_the_features() -> None:
    phi, psi = features(9, 5), features(9, 7, seed=1)
    rotation = np.linalg.qr(features(5, 5, seed=2))[0]
    turned = 3 * phi @ rotation
    plain = statistics.alignment(phi @ phi.T, psi @ psi.T)
    assert statistics.alignment(turned @ turned.T, psi @ psi.T) == pytest.approx(plain, **CLOSE)
    # Kornblith et al. 2019: linear CKA is ‖ΨᵀΦ‖² / ‖ΦᵀΦ‖ ‖ΨᵀΨ‖ of centred features.
    phi, psi = phi - phi.mean(axis=0), psi - psi.mean(axis=0)
    norms = np.linalg.norm(phi.T @ phi) * np.linalg.norm(psi.T @ psi)
    assert plain == pytest.approx(np.linalg.norm(psi.T @ phi) ** 2 / norms, **CLOSE)


def test_kernel_pca_is_pca_of_the_features_up_to_sign() -> None:
    train, x = features(12, 6) * [5, 3, 1, 1, 1, 1] + 7, features(4, 6, seed=1) + 7
    found = statistics.kernel_components(train @ train.T, train @ x.T)
    centre = train.mean(axis=0)
    _, values, axes = np.linalg.svd(train - centre, full_matrices=False)
    for axis in range(2):
        wanted = np.concatenate([train - centre, x - centre]) @ axes[axis]
        got = np.concatenate([found.train[:, axis], found.others[:, axis]])
        assert got * np.sign(got @ wanted) == pytest.approx(wanted, rel=1e-8, abs=1e-8)
    assert found.shares == pytest.approx(values[:2] ** 2 / np.sum(values**2), **CLOSE)


@pytest.mark.parametrize("train", [np.ones((1, 1)), np.ones((4, 4)), -np.eye(3)], ids=["one", "constant", "negative"])
def test_axes_that_are_not_there_hold_zeros(train: np.ndarray) -> None:
    found = statistics.kernel_components(train, np.ones((len(train), 2)))
    assert np.array_equal(found.train, np.zeros((len(train), 2)))
    assert np.array_equal(found.others, np.zeros((2, 2)))
    assert found.shares.tolist() == [0, 0]


def test_training_examples_are_ordered_as_by_the_cosine_and_the_most_alike_has_one() -> None:
    train, x = features(10, 6), features(3, 6, seed=1)
    found = statistics.similarities(np.sum(train**2, axis=1), train @ x.T)
    cosines = train @ x.T / np.outer(np.linalg.norm(train, axis=1), np.linalg.norm(x, axis=1))
    for column in range(3):
        assert np.array_equal(np.argsort(found[:, column]), np.argsort(cosines[:, column]))
    assert np.abs(found).max(axis=0) == pytest.approx([1, 1, 1], **CLOSE)


def test_an_example_without_a_gradient_is_like_nothing() -> None:
    found = statistics.similarities(np.array([0.0, 4.0]), np.array([[0.0, 0.0], [2.0, 0.0]]))
    assert found.tolist() == [[0, 0], [1, 0]]


def test_a_confusion_matrix_counts_by_label_and_prediction() -> None:
    assert statistics.confusion([0, 0, 2, 1], [0, 1, 2, 1], 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_a_kernel_compared_with_itself_and_with_its_double() -> None:
    kernel = kernel_of(features(5, 2, 20), features(4, 2, 20, seed=1))
    same, double = statistics.compare(kernel, kernel), statistics.compare(2 * kernel, kernel)
    assert same == pytest.approx((0, 0, 1, 1), **CLOSE)
    assert double == pytest.approx((1, 0, 1, 1), **CLOSE)


def test_comparing_gives_the_numbers_of_their_definitions() -> None:
    a, b = features(5, 2, 4, 2), features(5, 2, 4, 2, seed=1)
    found = statistics.compare(a, b)
    assert found.distance == pytest.approx(np.sqrt(np.sum((a - b) ** 2) / np.sum(b**2)), **CLOSE)
    angle = np.arccos(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.scaled_distance == pytest.approx(np.sin(angle), **CLOSE)
    assert found.correlation == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], **CLOSE)
    differences = [statistics.centred(statistics.logit_differences(kernel)) for kernel in (a, b)]
    assert found.alignment == pytest.approx(statistics.cosine(*differences), **CLOSE)


def test_comparing_with_a_kernel_of_zeros_has_no_numbers() -> None:
    kernel = features(3, 1, 2, 1)
    assert np.isnan(statistics.compare(kernel, np.zeros_like(kernel))).all()
    assert statistics.compare(np.zeros_like(kernel), kernel)[:2] == (1, 1)
