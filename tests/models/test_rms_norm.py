"""RMSNorm in the model's own dtype: what transformers computes, float64 whole; norms of another kind stay."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lmntk.models.rms_norm import use_plain_rms_norms
from tiny_models import add_noise, tiny_config

# Two of Qwen3's are as wide as a head.
WITH_RMS_NORMS = {"llama": 5, "qwen2": 5, "qwen3": 9}
IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def stock_model(architecture):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation="eager").eval()
    add_noise(lm)
    return lm


def by_hand(x, weight, eps):
    return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("architecture", WITH_RMS_NORMS)
def test_a_models_logits_are_those_of_transformers_own_norms_to_float32s_rounding(architecture):
    stock = stock_model(architecture)
    lm = copy.deepcopy(stock)
    use_plain_rms_norms(lm)
    replaced = [name for name, module in lm.named_modules() if type(module) is nn.RMSNorm]
    assert len(replaced) == WITH_RMS_NORMS[architecture]
    assert replaced == [name for name, _ in stock.named_modules() if name.endswith("norm")]
    with torch.no_grad():
        expected, found = stock(IDS).logits, lm(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 1


@pytest.mark.parametrize("architecture", WITH_RMS_NORMS)
def test_the_weights_keep_their_names_and_their_identity(architecture):
    lm = stock_model(architecture)
    before = dict(lm.named_parameters())
    use_plain_rms_norms(lm)
    after = dict(lm.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is parameter for name, parameter in after.items())


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_float64_is_computed_as_float64_to_1e_15(norm_class, eps):
    """What transformers has rounds to float32 on the way: seven digits of sixteen."""
    model = nn.ModuleDict({"norm": norm_class(16, eps=eps)}).double()
    add_noise(model)
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Short enough for eps to count.
    x[0] *= eps**0.5
    expected = by_hand(x, model["norm"].weight, eps)
    assert not torch.allclose(model["norm"](x), expected, rtol=1e-9, atol=0)
    use_plain_rms_norms(model)
    torch.testing.assert_close(model["norm"](x), expected, rtol=1e-15, atol=1e-15)


def test_training_and_dtype_are_what_they_were():
    for training in (True, False):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model = nn.Sequential(LlamaRMSNorm(8).to(dtype)).train(training)
            use_plain_rms_norms(model)
            assert type(model[0]) is nn.RMSNorm
            assert (model[0].training, model[0].weight.dtype) == (training, dtype)


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.5])
def test_norms_that_add_one_to_their_weights_stay(weight):
    """As Gemma's do, under whatever name they hold their ε."""

    class OtherName(GemmaRMSNorm):
        def __init__(self, size):
            super().__init__(size)
            self.variance_epsilon = self.eps

    for norm_class in (GemmaRMSNorm, OtherName):
        model = nn.Sequential(norm_class(8))
        nn.init.constant_(model[0].weight, weight)
        use_plain_rms_norms(model)
        assert type(model[0]) is norm_class


def test_a_whole_gemma_stays_as_it_is():
    config = GemmaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config).eval()
    kept = {name: type(module) for name, module in lm.named_modules()}
    with torch.no_grad():
        expected = lm(IDS).logits
        use_plain_rms_norms(lm)
        assert torch.equal(lm(IDS).logits, expected)
    assert {name: type(module) for name, module in lm.named_modules()} == kept


def test_what_is_no_rms_norm_stays():
    class Scaled(nn.Module):
        """It has a weight and an ε, and divides by the deviation from the mean."""

        def __init__(self, size):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-5

        def forward(self, x):
            return self.weight * nn.functional.layer_norm(x, x.shape[-1:], eps=self.variance_epsilon)

    class Biased(LlamaRMSNorm):
        """It has a bias beside its weight."""

        def __init__(self, size):
            super().__init__(size)
            self.bias = nn.Parameter(torch.zeros(size))

    model = nn.Sequential(Scaled(8), Biased(8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 8))
    kept = list(model)
    use_plain_rms_norms(model)
    assert all(module is old for module, old in zip(model, kept, strict=True))


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_weights_near_zero_do_not_make_other_norms_look_alike(weight):
    class Doubled(LlamaRMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(8), LlamaRMSNorm(8))
    for norm in model:
        nn.init.constant_(norm.weight, weight)
    use_plain_rms_norms(model)
    assert [type(norm) for norm in model] == [Doubled, nn.RMSNorm]
    assert all((norm.weight == weight).all() for norm in model), "the copies are changed, not the norms"
