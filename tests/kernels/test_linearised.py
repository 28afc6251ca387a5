"""The linearised model is the tangent of the model at θ₀: exact against finite differences, and for autograd too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import lmntk
from lmntk.kernels.linearised import Linearisation, linearised
from lmntk.models.lora_files import LoraSettings
from tiny_models import (
    ARCHITECTURES,
    CLASSIFIERS,
    TYPICAL,
    prompts_for,
    texts_for,
    tiny_adapted_prompt_model,
    tiny_classifier,
    tiny_prompt_model,
)

LENGTHS = [7, 4, 7, 5]


def moved(model: nn.Module, scale: float = 0.1, seed: int = 1) -> dict[str, Tensor]:
    """All parameters at another place, embeddings and decoder included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in model.named_parameters()
    }


def directional(function: Callable[[float], Tensor], size: float, steps: int) -> Tensor:
    """The derivative at 0 by central differences, extrapolated to a step of zero (Richardson): errors h², h⁴ … go."""
    rows = [(function(size / 2**i) - function(-size / 2**i)) / (2 * size / 2**i) for i in range(steps)]
    for order in range(1, steps):
        rows = [(4**order * fine - coarse) / (4**order - 1) for coarse, fine in zip(rows[:-1], rows[1:], strict=True)]
    return rows[-1]


# A small step crosses no kink of OPT's ReLU. ModernBERT turns its queries and keys in float32: it needs a large one.
EXACT = {"size": 2.0**-13, "steps": 2, "allowed": 1e-10}
OF_FLOAT32 = {"size": 2.0**-4, "steps": 3, "allowed": 1e-5}


def check(model: nn.Module, prompts: list[dict[str, Tensor]], end: dict[str, Tensor] | None = None) -> None:
    """Compare f_lin with f(x; θ₀) and the derivative along θ − θ₀ without automatic differentiation, in float64.

    The error is relative to the largest logit: 1e-10, the size of rounding in a difference over so small a step.
    """
    end = moved(model) if end is None else end
    start = {name: p.detach() for name, p in model.named_parameters()}
    config = getattr(getattr(model, "lm", None), "config", None)
    chosen = OF_FLOAT32 if getattr(config, "model_type", "") == "modernbert" else EXACT

    def at(step: float) -> Tensor:
        params = {name: start[name] + step * (value - start[name]) for name, value in end.items()}
        with torch.no_grad():
            return torch.cat([functional_call(model, params, kwargs=prompt) for prompt in prompts])

    found = linearised(model, prompts, end)
    expected = at(0.0) + directional(at, chosen["size"], chosen["steps"])
    assert (found - expected).abs().max() < chosen["allowed"] * expected.abs().max()
    assert (found - at(0.0)).abs().max() > 1e-3 * at(0.0).abs().max(), "nothing has moved"


@pytest.mark.parametrize("binary", [False, True], ids=["two logits", "one logit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tangent_of_every_architecture_is_that_of_finite_differences(architecture: str, binary: bool) -> None:
    check(tiny_prompt_model(architecture, binary=binary).eval(), prompts_for(architecture, LENGTHS))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_tangent_of_a_classification_head_is_that_of_finite_differences(family: str) -> None:
    check(tiny_classifier(family, num_labels=3), texts_for(family, LENGTHS))


@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_the_tangent_in_adapters_is_that_of_finite_differences(architecture: str) -> None:
    model = tiny_adapted_prompt_model(architecture, LoraSettings(2, 4), at_start=True)
    adapters = {name: value for name, value in moved(model).items() if "lora_" in name}
    assert adapters
    check(model, prompts_for(architecture, LENGTHS), adapters)


@pytest.mark.parametrize("architecture", TYPICAL)
def test_word_embeddings_and_decoder_alone_move_the_tangent_too(architecture: str) -> None:
    model = tiny_prompt_model(architecture).eval()
    decoder = model.last_layer.weight
    for wanted in (model.lm.get_input_embeddings().weight, decoder):
        (name,) = [name for name, p in model.named_parameters() if p is wanted]
        check(model, prompts_for(architecture, LENGTHS), {name: moved(model)[name]})


class Tied(nn.Module):
    """Embeddings that are the decoder too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.middle = nn.Linear(5, 5)
        self.decoder = nn.Linear(5, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.middle(self.embedding(ids).mean(dim=1))))


def test_a_weight_that_is_embedding_and_decoder_counts_in_both() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    ids = torch.tensor([[1, 2, 3], [4, 4, 8]])
    check(model, [{"ids": row[None]} for row in ids])


class Fused(nn.Module):
    """Attention by torch's fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).unflatten(-1, (2, 3)).transpose(1, 2)
        return self.last(F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2).mean(dim=1))


class Recurrent(nn.Module):
    """A recurrent network, which torch differentiates backwards only."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(4, 3, batch_first=True)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cells(x)[0][:, -1])


def test_fused_attention_is_differentiated_forwards(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    check(Fused().double(), [{"x": torch.randn(1, 4, 6).double()} for _ in range(3)])
    assert not caplog.messages


def test_a_model_without_forward_derivatives_gets_the_same_from_gradients() -> None:
    torch.manual_seed(0)
    check(Recurrent().double(), [{"x": torch.randn(1, 5, 4).double()} for _ in range(3)])


def test_batches_of_any_size_and_order_give_each_example_its_own_logits() -> None:
    model = tiny_prompt_model("roberta").eval()
    prompts = prompts_for("roberta", [5, 5, 5, 9])
    together = {name: torch.cat([prompt[name] for prompt in prompts[:3]]) for name in prompts[0]}
    end = moved(model)
    one = linearised(model, prompts, end)
    two = linearised(model, [prompts[3], together], end)
    torch.testing.assert_close(two, one[[3, 0, 1, 2]], rtol=0, atol=1e-12)


def test_at_the_start_it_is_the_model_and_in_a_linear_model_it_is_the_model_everywhere() -> None:
    model = tiny_prompt_model("bert").eval()
    prompts = prompts_for("bert", LENGTHS)
    start = {name: p.detach() for name, p in model.named_parameters()}
    found = linearised(model, prompts, start)
    expected = torch.cat([model(**prompt) for prompt in prompts]).detach()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    line = nn.Linear(3, 2).double()
    x, end = torch.randn(4, 3).double(), moved(line, scale=10.0)
    torch.testing.assert_close(linearised(line, [x], end), functional_call(line, end, (x,)), rtol=1e-12, atol=0)


def test_a_function_takes_its_start_as_params_and_what_is_not_named_does_not_move() -> None:
    def product(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (params["a"] * params["b"] * x)[:, None]

    start = {"a": torch.tensor([2.0]).double(), "b": torch.tensor([3.0]).double()}
    found = lmntk.linearised(product, [torch.tensor([1.0, 10.0]).double()], {"a": start["a"] + 1}, params=start)
    assert found.flatten().tolist() == [9.0, 90.0]


def test_autograd_of_the_tangent_is_the_jacobian_at_the_start_wherever_theta_is() -> None:
    model = tiny_prompt_model("roberta").eval()
    prompt = prompts_for("roberta", [6])[0]
    start = {name: p.detach() for name, p in model.named_parameters()}
    tangent = Linearisation(lambda params, batch: functional_call(model, params, kwargs=batch), start)
    end = {name: value.requires_grad_() for name, value in moved(model).items()}
    weights = torch.tensor([[1.0, -2.0]]).double()
    found = torch.autograd.grad((tangent(end, prompt) * weights).sum(), list(end.values()), allow_unused=True)
    logits = model(**prompt)
    expected = torch.autograd.grad((logits * weights).sum(), list(model.parameters()), allow_unused=True)
    for name, one, other in zip(start, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("trained", "batches", "words"),
    [
        ({"no": torch.zeros(2)}, [torch.zeros(1, 3)], "`trained` names 'no', which the model lacks"),
        ({"bias": torch.zeros(3)}, [torch.zeros(1, 3)], r"`trained` has \[3\] for 'bias', which is \[2\]"),
        ({}, [torch.zeros(1, 3)], "`trained` is empty"),
        ({"bias": torch.zeros(2)}, [], "`batches` holds no example"),
        ({"bias": torch.zeros(2)}, torch.zeros(1, 3), "`batches` is one batch"),
        ({"bias": torch.zeros(2)}, [torch.zeros(1, 2, 3)], "must return its outputs as a tensor"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(trained: dict, batches: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linearised(nn.Linear(3, 2), batches, trained)


class TiedAndBuffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.embedding(ids).mean(1))) * self.scale


def test_names_that_are_not_trained_parameters_are_told_apart() -> None:
    model, batch = TiedAndBuffered(), torch.zeros(2, 3, dtype=torch.long)
    here = dict(model.named_parameters())
    assert linearised(model, [batch], here).shape == (2, 6)
    for name in ("decoder.weight", "scale"):
        given = here | {name: model.state_dict()[name]}
        with pytest.raises(ValueError, match=f"names '{name}', which is a buffer .* pass dict.model.named_parameters"):
            linearised(model, [batch], given)
    line = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="names 'weight', which `params` lacks"):
        linearised(line, [torch.zeros(1, 3)], dict(line.named_parameters()), params={"bias": line.bias})
    with pytest.raises(ValueError, match="names 'b', which `params` lacks"):
        linearised(
            lambda params, x: x * params["a"], [torch.zeros(1, 3)], {"b": torch.ones(1)}, params={"a": torch.ones(1)}
        )


def test_a_function_without_a_start_and_a_model_with_dropout_are_refused() -> None:
    with pytest.raises(ValueError, match="a function needs `params`"):
        linearised(lambda params, x: x, [torch.zeros(1, 3)], {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="draws anew at every call"):
        linearised(nn.Sequential(nn.Linear(3, 2), nn.Dropout()), [torch.zeros(1, 3)], {"0.bias": torch.zeros(2)})
