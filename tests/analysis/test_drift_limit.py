"""The drift of a small network in float64, as its learning rate goes to zero: no model but numpy."""

from pathlib import Path

import numpy as np
import pytest

from lmntk.analysis.drift import DriftStep, training_drift
from training_folders import split_of, write_training

STEPS = 5
X = np.random.default_rng(0).normal(size=(30, 4))
LABELS = (X[:, 0] + 0.3 * X[:, 1] > 0).astype(int)
TRAIN = slice(0, 20)


def outputs(theta: np.ndarray) -> np.ndarray:
    """Σ_h v_h tanh(w_h · x) of six hidden units, [30]."""
    w, v = theta[:24].reshape(6, 4), theta[24:]
    return np.tanh(X @ w.T) @ v


def jacobian(theta: np.ndarray) -> np.ndarray:
    """∂f(x)/∂θ, [30, 30]."""
    w, v = theta[:24].reshape(6, 4), theta[24:]
    hidden = np.tanh(X @ w.T)
    inner = ((1 - hidden**2) * v)[:, :, None] * X[:, None, :]
    return np.concatenate([inner.reshape(30, 24), hidden], axis=1)


def train(folder: Path, rate: float) -> DriftStep:
    """Gradient descent on the squared error from f₀ = 0; the numbers after the last step."""
    start = np.random.default_rng(1).normal(size=30)
    zero, tangent, theta = outputs(start), jacobian(start), start
    snapshots = {}
    for step in range(STEPS + 1):
        f, linear = outputs(theta) - zero, tangent @ (theta - start)
        gradients = jacobian(theta)[TRAIN]
        splits = {
            name: split_of(LABELS[part], f[part, None], linear[part, None])
            for name, part in (("train", TRAIN), ("test", slice(20, None)))
        }
        snapshots[step] = (splits, (gradients @ gradients.T)[:, None, :, None])
        theta = theta - rate * gradients.T @ (f[TRAIN] - (2 * LABELS[TRAIN] - 1))
    return training_drift(write_training(folder, snapshots, binary_classification=True), "run").steps[-1]


def test_as_the_learning_rate_goes_to_zero_recovery_is_1_and_distances_go_to_0_linearly(tmp_path: Path) -> None:
    rates = [2.0**-power for power in range(13, 18)]
    found = [train(tmp_path / str(index), rate) for index, rate in enumerate(rates)]
    assert found[-1].recovery == 1.0 and found[-1].equal_predictions == 1.0
    for larger, smaller in zip(found, found[1:], strict=False):
        assert larger.distances is not None and smaller.distances is not None
        # Half the rate, half the distance, up to the terms of the next order.
        assert smaller.logits_distance / larger.logits_distance == pytest.approx(0.5, abs=0.02)
        for name in ("mean", "median", "frobenius"):
            ratio = getattr(smaller.distances, name) / getattr(larger.distances, name)
            assert ratio == pytest.approx(0.5, abs=0.02)
        # The cosine of two kernels is 1 minus a square.
        assert (1 - smaller.distances.cka) / (1 - larger.distances.cka) == pytest.approx(0.25, abs=0.02)
    assert found[-1].logits_distance < 0.005
