"""Random kernels with labels, and solvers called on them in one go."""

from typing import Any

import numpy as np

from lmntk.solvers import fit
from lmntk.solvers.problem import Prediction, SolverSettings

CLOSE = 1e-9
PLAIN = SolverSettings()


def predict(
    solver: str, train: Any, train_labels: Any, x: Any, x_labels: Any, settings: SolverSettings, *f0: Any, **names: str
) -> Prediction:
    """Fit and predict in one go; `f0`: the logits of the untrained model on the train and the X examples, or none."""
    return fit(solver, train, train_labels, settings, *f0[:1]).predict(x, x_labels, *f0[1:], **names)


class Case:
    """A kernel of random features with labels: N = 20, X = 7; feature f is of order 10^(-decay · f / features)."""

    def __init__(
        self, logits: int, features: int = 300, asymmetric: bool = False, n: int = 20, decay: float = 0.0
    ) -> None:
        rng = np.random.default_rng(0)
        x = 7
        classes = np.arange(n + x) % max(2, logits)
        phi = rng.normal(size=(n + x, logits, features)) + 0.4 * rng.normal(size=(max(2, logits), 1, features))[classes]
        phi *= np.logspace(0, -decay, features)
        kernel = np.einsum("iaf,jbf->iajb", phi, phi, optimize=True) / features
        if asymmetric:
            other = np.einsum("iaf,jbf->iajb", np.sign(phi), phi) / features
            kernel = np.stack([other, np.einsum("iajb->jbia", other)])
        labels = 2.0 * classes - 1 if logits == 1 else classes
        self.logits, self.n, self.x = logits, n, x
        self.train, self.test = kernel[..., :n, :, :n, :], kernel[..., :n, :, n:, :]
        self.train_labels, self.test_labels = labels[:n], labels[n:]
        self.train_f0, self.test_f0 = np.split(rng.normal(size=(n + x, logits)), [n])

    def predict(self, solver: str, settings: SolverSettings = PLAIN, f0: bool = False) -> Prediction:
        """Call the solver under test."""
        untrained = (self.train_f0, self.test_f0) if f0 else ()
        return predict(solver, self.train, self.train_labels, self.test, self.test_labels, settings, *untrained)

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Targets [n, C], written one by one."""
        if self.logits == 1:
            return labels[:, None].astype(float)
        targets = np.zeros((len(labels), self.logits))
        for row, label in zip(targets, labels, strict=True):
            row[label] = 1
        return targets

    def flat(self, kernel: np.ndarray) -> np.ndarray:
        """A direction of the kernel as a matrix, entry by entry: [N·C, X·C]."""
        n, c, x, _ = kernel.shape
        matrix = np.empty((n * c, x * c))
        for index in np.ndindex(kernel.shape):
            i, a, j, b = index
            matrix[i * c + a, j * c + b] = kernel[index]
        return matrix


def sum_of_squares_per_logit(case: Case, logits: np.ndarray) -> float:
    return ((logits - case.targets(case.test_labels)) ** 2).sum() / (case.x * case.logits)
