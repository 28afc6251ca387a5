"""Gradient flow and descent of a linearised model: against the same steps taken in weight space, one by one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lmntk.solvers.gradient_flow import LOSSES, LinearisedTraining, Loss, logits_of, mean_loss
from lmntk.trainers.base import class_loss

N, X, FEATURES = 6, 4, 40
ROUNDING = 1e-9  # of some hundred float64 steps, logits of order 1


class Model:
    """A linear model f(x; θ) = f₀(x) + φ(x) θ, whose kernel is φ φᵀ, trained by autograd."""

    def __init__(self, logits: int, n: int = N) -> None:
        rng = np.random.default_rng(logits)
        self.features = rng.normal(size=(n + X, logits, FEATURES)) / np.sqrt(FEATURES)
        self.f0 = rng.normal(size=(n + X, logits))
        self.classes = np.arange(n + X) % max(2, logits)
        kernel = np.einsum("iaf,jbf->iajb", self.features, self.features)
        self.n = n
        self.x_kernel = kernel[:n, :, n:]
        self.training = LinearisedTraining(kernel[:n, :, :n], self.classes[:n], self.f0[:n])

    def descend(self, loss: Loss, rate: float, steps: int) -> tuple[list[np.ndarray], list[float]]:
        """The logits of all examples and the loss on train after each step."""
        theta = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        logits, losses = [], []
        for _ in range(steps + 1):
            found = torch.from_numpy(self.f0) + torch.from_numpy(self.features) @ theta
            value = self.loss(loss, found[: self.n])
            logits.append(found.detach().numpy().copy())
            losses.append(value.item())
            (slope,) = torch.autograd.grad(value, theta)
            with torch.no_grad():
                theta -= rate * slope
        return logits, losses

    def loss(self, loss: Loss, logits: Tensor) -> Tensor:
        return class_loss(logits, torch.from_numpy(self.classes[: self.n]), squared=loss == "squared_error")


@pytest.mark.parametrize("logits", [1, 2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_descent_has_the_logits_and_the_loss_of_steps_in_weight_space(loss: Loss, logits: int) -> None:
    model = Model(logits)
    wanted, losses = model.descend(loss, 0.3, 60)
    alpha = model.training.descent(loss, [0.3] * 60)
    train = logits_of(alpha, model.training.kernel, model.f0[:N])
    test = logits_of(alpha, model.x_kernel, model.f0[N:])
    np.testing.assert_allclose(np.concatenate([train, test], axis=1), wanted, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(mean_loss(loss, train, model.classes[:N]), losses, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("logits", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_descent_with_small_steps_approaches_the_flow(loss: Loss, logits: int) -> None:
    """The distance of Euler's method from the flow is of first order in the step: half the step, half the distance."""
    training = Model(logits).training
    flow = training.flow(loss, [0.0, 5.0, 20.0])
    distances = []
    for parts in (100, 200):
        alpha = training.descent(loss, [1 / parts] * (20 * parts))
        distances.append(np.abs(alpha[[0, 5 * parts, 20 * parts]] - flow).max())
    assert distances[0] < 5e-3 and distances[0] / distances[1] == pytest.approx(2, rel=0.01)


def test_the_flow_of_the_squared_error_ends_at_the_solution_of_the_kernel_around_f0() -> None:
    model = Model(2)
    flat = model.training.kernel.reshape(2 * N, 2 * N)
    solution = np.linalg.solve(flat, (np.eye(2)[model.classes[:N]] - model.f0[:N]).reshape(-1))
    (found,) = model.training.flow("squared_error", [1e9])
    np.testing.assert_allclose(found.reshape(-1), solution, rtol=0, atol=1e-9)


def test_what_the_kernel_cannot_move_stays_where_it_is() -> None:
    """An eigenvalue of 0: the limit of (1 − e^(−wt)) / w is t, and the logits of train do not see it."""
    kernel = np.diag([2.0, 0.0]).reshape(2, 1, 2, 1)
    training = LinearisedTraining(kernel, np.array([0, 1]), np.zeros((2, 1)))
    for alpha in (training.flow("squared_error", [3.0])[0], training.descent("squared_error", [1.5, 1.5])[2]):
        assert alpha[1, 0] == pytest.approx(3.0, rel=1e-12)
        assert logits_of(alpha[None], kernel, np.zeros((2, 1)))[0, 1, 0] == 0


@pytest.mark.parametrize("logits", [1, 2])
def test_the_squared_error_is_stable_just_below_its_largest_step_and_not_above(logits: int) -> None:
    model = Model(logits)
    limit = model.training.stable_steps.squared_error
    below, above = (model.descend("squared_error", factor * limit, 300)[1] for factor in (0.99, 1.01))
    assert all(after < before for before, after in zip(below, below[1:], strict=False))
    assert above[-1] > 10 * min(above)


@pytest.mark.parametrize("logits", [1, 2, 3])
def test_the_steps_of_the_cross_entropy_are_those_of_its_hessian_in_weight_space(logits: int) -> None:
    """At f₀ that of autograd; anywhere no logits have a larger one, and its bound is reached at even odds of two."""
    model = Model(logits)
    phi = torch.from_numpy(model.features[:N])

    def curvature(f0: np.ndarray) -> float:
        def loss(theta: Tensor) -> Tensor:
            return model.loss("cross_entropy", torch.from_numpy(f0) + phi @ theta)

        hessian = torch.autograd.functional.hessian(loss, torch.zeros(FEATURES, dtype=torch.float64))
        return float(torch.linalg.eigvalsh(hessian)[-1])

    stable = model.training.stable_steps
    assert stable.cross_entropy_at_start == pytest.approx(2 / curvature(model.f0[:N]), rel=1e-9)
    rng = np.random.default_rng(0)
    found = [curvature(scale * rng.normal(size=(N, logits))) for scale in (0, 0.1, 1, 5)]
    assert stable.cross_entropy_anywhere <= 2 / max(found) * (1 + 1e-12)
    if logits < 3:
        assert stable.cross_entropy_anywhere == pytest.approx(2 / found[0], rel=1e-9)


@pytest.mark.parametrize("logits", [1, 3])
def test_the_losses_are_those_of_the_trainers(logits: int) -> None:
    model = Model(logits)
    for loss in LOSSES:
        wanted = model.loss(loss, torch.from_numpy(model.f0[:N])).item()
        assert not np.signbit(mean_loss(loss, np.array([[900.0, 0.0]]), np.array([0])))
        assert mean_loss(loss, model.f0[:N], model.classes[:N]) == pytest.approx(wanted, rel=1e-12)
