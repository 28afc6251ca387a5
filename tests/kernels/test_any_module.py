"""Modules that `torch.func` cannot vectorise, and embeddings whose gradients torch changes: every engine takes them."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import oracle
from lmntk.kernels import ENGINES, FORMULAS
from lmntk.kernels.empirical import empirical_ntk

ALL_ENGINES = ("auto", *ENGINES)
SERIES = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.tensor([[1, 2, 1], [3, 3, 3], [4, 1, 0], [2, 4, 2]])


class Series(nn.Module):
    """Reads two logits off what a layer makes of a series of vectors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(6, 2)

    def forward(self, series: Tensor) -> Tensor:
        found = self.layer(series)
        found = found[0] if isinstance(found, tuple) else found
        return self.out(torch.tanh(found[:, -1]))


class Routed(nn.Module):
    """Looks at values to decide which layer an example goes through, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, series: Tensor) -> Tensor:
        rows = []
        for row in series:
            layer = self.first if row.sum() > 0 else self.second
            rows.append(sum(layer(row * (k + 1)) for k in range(1 + int(row[0, 0] > 0))))
        return torch.stack(rows)


class Padded(nn.Module):
    """torch's own encoder, told by a mask where the padding is."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.into, self.encoder = nn.Linear(5, 6), nn.TransformerEncoder(layer, 2)

    def forward(self, series: Tensor) -> Tensor:
        padding = torch.zeros(series.shape[:2], dtype=torch.bool, device=series.device)
        padding[:, 1] = series[:, 1, 0] > 0
        return self.encoder(self.into(series), src_key_padding_mask=padding)


class Packed(nn.Module):
    """A recurrent layer over series of several lengths, which torch sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.rnn = nn.Linear(5, 5), nn.GRU(5, 6, batch_first=True)

    def forward(self, series: Tensor) -> Tensor:
        lengths = 1 + (series[:, :2, 0] > 0).sum(dim=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.into(series), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.rnn(packed)[1].transpose(0, 1)


LAYERS = {
    "gru": lambda: nn.GRU(5, 6, batch_first=True),
    "lstm": lambda: nn.LSTM(5, 3, batch_first=True, bidirectional=True, num_layers=2),
    "rnn": lambda: nn.RNN(5, 6, batch_first=True),
    "prelu": lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU()),
    "convolution and norm": lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(5, 6)),
    "routed": Routed,
    "encoder with padding": Padded,
    "packed": Packed,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)),
}


def series_model(kind: str) -> Series:
    torch.manual_seed(1)
    model = Series(LAYERS[kind]()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("formula", ["sgd", "asymmetric_signgd"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_engine_takes_any_module(kind: str, engine: str, formula: str) -> None:
    model = series_model(kind)
    gradients = oracle.gradients(model, list(model.parameters()), [row[None] for row in SERIES])
    truth = oracle.kernel(gradients[:3], gradients[1:], formula)
    found = empirical_ntk(model, [SERIES[:3]], [SERIES[1:]], formula=formula, engine=engine)
    # Where forward mode and backward mode round a gradient to either side of zero, its sign may differ.
    assert oracle.relative_error(found, truth) < 1e-12


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_function_that_cannot_be_vectorised_is_taken_too(formula: str) -> None:
    model = series_model("routed")
    gradients = oracle.gradients(model, list(model.parameters()), [row[None] for row in SERIES])
    params = {name: value.detach() for name, value in model.named_parameters()}
    found = empirical_ntk(lambda p, x: functional_call(model, p, (x,)), [SERIES], params=params, formula=formula)
    assert oracle.relative_error(found, oracle.kernel(gradients, gradients, formula)) < 1e-12


def test_what_is_slow_says_so_once_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        empirical_ntk(series_model("routed"), [SERIES], engine="jacobian", train_tile=2)
    (message,) = caplog.messages
    assert message.startswith("torch cannot vectorise the model over examples (vmap: It looks like you're ")
    assert message.endswith("gradients are taken one example and one logit at a time, which is slow")


def test_a_small_budget_holds_without_vectorising() -> None:
    """Parameters come in groups there too."""
    model = series_model("gru")
    whole = empirical_ntk(model, [SERIES], engine="jacobian")
    blocks: list[object] = []

    def progress(found):
        for block in found:
            blocks.append(block)
            yield block

    tight = empirical_ntk(model, [SERIES], engine="jacobian", memory_gb=12_000 / 2**30, progress=progress)
    assert len(blocks) > 3
    assert oracle.relative_error(tight, whole) < 1e-14


class Words(nn.Module):
    """The mean of some embeddings, and two logits of it."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.words = embedding
        self.out = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.words(ids)
        return self.out(torch.tanh(found if found.dim() == 2 else found.mean(dim=1)))


EMBEDDINGS = {
    "padding": lambda **kw: nn.Embedding(6, 4, padding_idx=1, **kw),
    "by frequency": lambda **kw: nn.Embedding(6, 4, scale_grad_by_freq=True, **kw),
    "by frequency, in a bag": lambda **kw: nn.EmbeddingBag(6, 4, scale_grad_by_freq=True, mode="sum", **kw),
    "sparse": lambda **kw: nn.Embedding(6, 4, sparse=True, **kw),
    "sparse, in a bag": lambda **kw: nn.EmbeddingBag(6, 4, sparse=True, mode="mean", **kw),
    "norms that are limited": lambda **kw: nn.Embedding(6, 4, max_norm=1.0, **kw),
    "norms that are limited, in a bag": lambda **kw: nn.EmbeddingBag(6, 4, max_norm=1.0, mode="sum", **kw),
}


def plain_gradients(model: Words, ids: Tensor) -> Tensor:
    """The derivative by the rows as they are: as though the embedding had none of torch's options but padding."""
    weight = model.words.weight.detach().clone()
    if model.words.max_norm is not None:
        torch.embedding_renorm_(weight, ids.flatten(), model.words.max_norm, 2.0)
    bag = isinstance(model.words, nn.EmbeddingBag)
    plain = Words(nn.Embedding(6, 4, padding_idx=model.words.padding_idx, _weight=weight))
    plain.out = model.out

    def call(row: Tensor) -> Tensor:
        found = plain.words(row)
        return plain.out(torch.tanh(found.sum(dim=1) if bag and model.words.mode == "sum" else found.mean(dim=1)))

    return oracle.gradients(call, list(plain.parameters()), ids.split(1))


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_what_torch_does_to_an_embeddings_gradient_is_left_out(kind: str, engine: str, formula: str) -> None:
    torch.manual_seed(2)
    model = Words(EMBEDDINGS[kind]()).double()
    gradients = plain_gradients(model, IDS)
    before = model.words.weight.detach().clone()
    options = {name: getattr(model.words, name) for name in ("max_norm", "sparse", "scale_grad_by_freq")}
    found = empirical_ntk(model, [IDS], formula=formula, engine=engine)
    assert oracle.relative_error(found, oracle.kernel(gradients, gradients, formula)) < 1e-12
    assert torch.equal(model.words.weight, before)
    assert {name: getattr(model.words, name) for name in options} == options


def test_finite_differences_agree_with_the_kernel_of_a_scaled_embedding() -> None:
    torch.manual_seed(3)
    model = Words(EMBEDDINGS["by frequency"]()).double()
    params = {"words.weight": model.words.weight.detach()}
    found = empirical_ntk(model, [IDS], params=params)
    rows = []
    for number in range(params["words.weight"].numel()):
        step = torch.zeros_like(params["words.weight"])
        step.view(-1)[number] = 1e-6
        ends = [
            functional_call(model, {"words.weight": (params["words.weight"] + sign * step)}, (IDS,)) for sign in (1, -1)
        ]
        rows.append((ends[0] - ends[1]).detach() / 2e-6)
    differences = torch.stack(rows, dim=-1)
    assert oracle.relative_error(found, oracle.kernel(differences, differences, "sgd")) < 1e-8


@pytest.mark.parametrize("engine", ["jacobian", "jvp"])
def test_dropout_that_hides_in_a_function_is_refused_and_not_averaged_over(engine: str) -> None:
    class Drops(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(x), 1e-9, self.training)

    torch.manual_seed(0)
    model, x = Drops(4, 2), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"draws random numbers as it computes: call its eval\(\) first"):
        empirical_ntk(model, [x], [x], engine=engine)
    assert empirical_ntk(model.eval(), [x], [x], engine=engine).shape == (5, 2, 5, 2)
