"""Greedy choices from a pool, against fitting every candidate anew."""

import numpy as np
import pytest

from lmntk.solvers.greedy_choice import GrowingFit, by_blocks, choose_greedily, herd, in_turn

E, Z, RIDGE = 8, 5, 0.05
CLOSE = 1e-9
CLASSES = np.arange(E) % 2


class Pool:
    """A pool with B rows an example, fitted with numpy's solver."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(rows)
        phi = rng.normal(size=(E, rows, 60))
        other = rng.normal(size=(Z, 60))
        self.rows = rows
        self.kernel = np.einsum("iaf,jbf->iajb", phi, phi) / 60
        self.others = np.einsum("iaf,zf->iaz", phi, other) / 60
        self.wanted, self.elsewhere = rng.normal(size=(E, rows)), rng.normal(size=Z)

    def grown(self, *examples: int) -> GrowingFit:
        fit = GrowingFit(self.kernel, self.wanted, RIDGE, self.others, self.elsewhere)
        for example in examples:
            fit.add(example)
        return fit

    def _alpha(self, chosen: list[int]) -> np.ndarray:
        size = len(chosen) * self.rows
        matrix = self.kernel[chosen][:, :, chosen].reshape(size, size) + RIDGE * np.eye(size)
        return np.linalg.solve(matrix, self.wanted[chosen].reshape(-1)).reshape(len(chosen), self.rows)

    def predict(self, chosen: list[int], example: int) -> np.ndarray:
        return np.einsum("ia,iab->b", self._alpha(chosen), self.kernel[chosen][:, :, example]) if chosen else 0.0

    def loss(self, chosen: list[int]) -> float:
        errors = [self.wanted[e] - self.predict([c for c in chosen if c != e], e) for e in range(E)]
        return float(np.mean(np.square(errors)))

    def loss_elsewhere(self, chosen: list[int]) -> float:
        return float(np.mean((self.elsewhere - np.einsum("ia,iaz->z", self._alpha(chosen), self.others[chosen])) ** 2))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("before", [[], [2], [5, 0, 3]])
def test_the_losses_with_a_candidate_are_those_of_fits_without_each_example(rows: int, before: list[int]) -> None:
    pool = Pool(rows)
    fit = pool.grown(*before)
    for candidate in sorted({*range(E)} - {*before}):
        assert fit.loss_with(candidate) == pytest.approx(pool.loss([*before, candidate]), rel=CLOSE)
        wanted = pool.loss_elsewhere([*before, candidate])
        assert fit.loss_elsewhere_with(candidate) == pytest.approx(wanted, rel=CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_variances_are_those_of_a_gaussian_process(rows: int) -> None:
    pool, chosen = Pool(rows), [6, 1, 4]
    size = len(chosen) * rows
    matrix = pool.kernel[chosen][:, :, chosen].reshape(size, size) + RIDGE * np.eye(size)
    found = pool.grown(*chosen).variances()
    for example in range(E):
        column = pool.kernel[chosen][:, :, example].reshape(size, rows)
        covariance = pool.kernel[example, :, example] - column.T @ np.linalg.solve(matrix, column)
        assert found[example] == pytest.approx(np.trace(covariance), rel=CLOSE)


def test_choices_take_turns_and_each_is_the_best_of_its_class() -> None:
    pool = Pool(1)
    fit = pool.grown()
    chosen = choose_greedily(lambda example: -fit.loss_with(example), fit.add, CLASSES, 3, lambda: None)
    assert CLASSES[chosen].tolist() == [0, 1, 0, 1, 0, 1] and fit.chosen == chosen
    for step, example in enumerate(chosen):
        free = [e for e in range(E) if CLASSES[e] == CLASSES[example] and e not in chosen[:step]]
        assert example == min(free, key=lambda e: pool.loss([*chosen[:step], e]))


def test_two_equal_examples_can_both_be_chosen() -> None:
    kernel = np.ones((2, 1, 2, 1))
    fit = GrowingFit(kernel, np.ones((2, 1)), 1e-10)
    fit.add(0)
    fit.add(1)
    assert np.isfinite(fit.variances()).all() and fit.loss_with(0) < 1e-6


def test_herding_brings_the_mean_of_the_chosen_to_that_of_their_class() -> None:
    """Each choice is the best single one: no other free example of its class gives a nearer mean."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 6)) * rng.uniform(0.5, 2, size=(20, 1))
    classes = np.arange(20) % 2
    chosen = herd(features @ features.T, classes, 4)
    assert classes[chosen].tolist() == [0, 1] * 4
    for label in (0, 1):
        own = [example for example in chosen if classes[example] == label]
        mean = features[classes == label].mean(axis=0)

        def distance(examples: list[int], mean: np.ndarray = mean) -> float:
            return float(np.linalg.norm(features[examples].mean(axis=0) - mean))

        for step in range(4):
            free = [e for e in range(20) if classes[e] == label and e not in own[:step]]
            assert own[step] == min(free, key=lambda e: distance([*own[:step], e]))


def test_samples_of_an_example_become_one_block() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 2, 6, 2))  # three examples, two samples, two logits
    found = by_blocks(kernel, 2)
    assert found.shape == (3, 4, 3, 4)
    assert found[1, 3, 2, 0] == kernel[1 + 3, 1, 2, 0] and found[0, 1, 2, 2] == kernel[0, 1, 2 + 3, 0]
    assert in_turn([3, 1, 2, 0], np.array([0, 0, 1, 1]), 2) == [1, 3, 0, 2]
