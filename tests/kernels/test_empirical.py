"""The public call on modules and functions of users' own: its numbers, and what it says of what cannot work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import oracle
from lmntk.kernels import ENGINES, FORMULAS
from lmntk.kernels.empirical import empirical_ntk

X, OTHER = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.ones(2, 3).double()


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2)).double()


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), formula=st.sampled_from(sorted(FORMULAS)))
def test_a_module_and_its_function_agree_with_autograd_however_batches_are_cut(sizes: list[int], formula: str) -> None:
    model = mlp()
    batches = list(torch.randn(sum(sizes), 3, dtype=torch.float64).split(sizes))
    of_train, of_x = (
        oracle.gradients(model, list(model.parameters()), [row[None] for batch in side for row in batch])
        for side in (batches, [OTHER])
    )
    truth = oracle.kernel(of_train, of_x, formula)
    params = {name: value.detach() for name, value in model.named_parameters()}
    for found in (
        empirical_ntk(model, batches, [OTHER], formula=formula),
        empirical_ntk(lambda p, x: functional_call(model, p, (x,)), batches, [OTHER], params=params, formula=formula),
    ):
        assert found.shape == truth.shape
        assert oracle.relative_error(found, truth) < 1e-12


def test_gradients_over_some_parameters_only() -> None:
    model = mlp()
    biases = {name: value.detach() for name, value in model.named_parameters() if name.endswith("bias")}
    gradients = oracle.gradients(model, [model[0].bias, model[-1].bias], [row[None] for row in X])
    truth = oracle.kernel(gradients, gradients, "sgd")
    for engine in ENGINES:
        assert oracle.relative_error(empirical_ntk(model, [X], params=biases, engine=engine), truth) < 1e-12


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_gradients_are_taken_at_the_values_that_are_given(engine: str) -> None:
    model, other = mlp(), mlp()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    gradients = oracle.gradients(other, list(other.parameters()), [row[None] for row in X])
    params = {name: value.detach() for name, value in other.named_parameters()}
    found = empirical_ntk(model, [X], params=params, engine=engine)
    assert oracle.relative_error(found, oracle.kernel(gradients, gradients, "sgd")) < 1e-12


class Answer:
    """What is no tensor, as the outputs of transformers' models are."""


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: empirical_ntk(mlp(), [X], formula="sdg"), "there is no formula 'sdg'; choose from sgd, signgd, asym"),
        (lambda: empirical_ntk(mlp(), [X], engine="fast"), "there is no engine 'fast'; choose from auto, "),
        (lambda: empirical_ntk(mlp(), X), r"`train_batches` is one batch, but a list of batches is expected: `\["),
        (lambda: empirical_ntk(mlp(), [X], {"x": X}), "`x_batches` is one batch"),
        (lambda: empirical_ntk(mlp(), []), "`train_batches` holds no example"),
        (lambda: empirical_ntk(mlp(), [(X, OTHER)]), "must agree on the number of examples"),
        (lambda: empirical_ntk(lambda p, x: x, [X]), "a function needs `params`"),
        (lambda: empirical_ntk(mlp(), [X], params={"0.wait": X}), "`params` names '0.wait', which the module lacks"),
        (lambda: empirical_ntk(mlp(), [X], params={}), "no parameters"),
        (
            lambda: empirical_ntk(mlp(), [X], params={"0.bias": X[0, :1]}),
            r"`params` has \[1\] for '0.bias', which is \[4\]",
        ),
        (lambda: empirical_ntk(nn.Tanh(), [X]), "no parameters"),
        (lambda: empirical_ntk(mlp(nn.Dropout(0.1)), [X]), "1, a Dropout, draws anew at every call"),
        (lambda: empirical_ntk(mlp(nn.BatchNorm1d(4)), [X]), "1, a BatchNorm1d, lets examples see each other"),
        (
            lambda: empirical_ntk(mlp(nn.BatchNorm1d(4, track_running_stats=False)).eval(), [X]),
            "give it running statistics",
        ),
        (
            lambda: empirical_ntk(lambda p, x: x @ p["w"], [X], params={"w": X[0]}),
            r"the model returns a tensor \[2\], but it must return .* \[2, C\]",
        ),
        (lambda: empirical_ntk(lambda p, x: Answer(), [X], params={"w": X}), "the model returns a Answer"),
        (lambda: empirical_ntk(lambda p, x: x.sum(0)[None], [X], params={"w": X}), r"a tensor \[1, 3\]"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_dropout_and_batch_norm_are_welcome_in_eval_mode() -> None:
    model = mlp(nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    gradients = oracle.gradients(model, list(model.parameters()), [row[None] for row in X])
    assert oracle.relative_error(empirical_ntk(model, [X]), oracle.kernel(gradients, gradients, "sgd")) < 1e-12


def test_progress_sees_every_block() -> None:
    seen: list[Tensor] = []

    def progress(blocks: Any) -> Any:
        for tile, block in blocks:
            seen.append(block)
            yield tile, block

    kernel = empirical_ntk(mlp(), [X], [OTHER], train_tile=2, x_tile=1, progress=progress)
    assert len(seen) == 4
    assert torch.equal(torch.cat([torch.cat(seen[:2], 3), torch.cat(seen[2:], 3)], 1)[0], kernel.flip(0).flip(2))


def test_layers_are_factored_whether_or_not_gradients_are_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        kernel = empirical_ntk(mlp(), [X], engine="factored")
    assert oracle.relative_error(kernel, empirical_ntk(mlp(), [X], engine="jacobian")) < 1e-12
    assert caplog.messages == []  # nothing about layers that cannot be factored
