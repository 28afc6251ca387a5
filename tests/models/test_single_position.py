"""The last layer computes one position only, and nobody notices: logits, gradients, dropout, copies."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    CamembertConfig,
    ElectraConfig,
    GPTNeoXConfig,
    MistralConfig,
    XLMRobertaConfig,
)

from lmntk.models.attention import use_plain_attention
from lmntk.models.prompt_model import PromptModel
from lmntk.models.rms_norm import use_plain_rms_norms
from lmntk.models.single_position import SinglePosition
from tiny_models import ARCHITECTURES, PaddedPrompts, tiny_config, tiny_prompt_model, tiny_prompts

LENGTHS = [9, 4, 12, 7]
# Behind the attention: what sees one position only.
FEED_FORWARD = {
    "bert": "intermediate.dense",
    "roberta": "intermediate.dense",
    "distilbert": "ffn.lin1",
    "modernbert": "mlp.Wi",
    "gpt2": "mlp.c_fc",
    "opt": "fc1",
    "opt-projected": "fc1",
    "llama": "mlp.gate_proj",
    "qwen2": "mlp.gate_proj",
    "qwen3": "mlp.gate_proj",
}


def padded_batch():
    return PaddedPrompts(tiny_prompts(LENGTHS)).batch(range(len(LENGTHS)))


def replaced_layers(model):
    return model.single_position.layers


def last_layer(model):
    """The layer that computes one position; OPT's others are replaced too, to keep examples apart."""
    *others, layer = replaced_layers(model)
    assert not others or model.lm.config.model_type == "opt"
    return layer


def whole(model):
    """The same model with its layers as transformers has them."""
    replaced_layers(model).clear()
    return model


def set_dropout(model, probability):
    """Let everything drop that can: some architectures hold a module for it, others a number, or both."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def logits_and_gradients(model):
    logits = model(**padded_batch())
    return [logits, *torch.autograd.grad(logits[:, 1].sum(), list(model.parameters()), materialize_grads=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_all_positions(architecture):
    found = [logits_and_gradients(tiny_prompt_model(architecture))]
    found.append(logits_and_gradients(whole(tiny_prompt_model(architecture))))
    for narrowed, expected in zip(*found, strict=True):
        torch.testing.assert_close(narrowed, expected, rtol=1e-9, atol=1e-11)
    assert found[0][0].abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_behind_the_attention_one_position_is_computed(architecture):
    rows = []
    model = tiny_prompt_model(architecture)
    module = last_layer(model).get_submodule(FEED_FORWARD[architecture])
    module.register_forward_hook(lambda module, arguments, output: rows.append(output.shape[:-1].numel()))
    model(**padded_batch())
    model.train()
    model(**padded_batch())
    assert rows == [len(LENGTHS), len(LENGTHS) * max(LENGTHS)]


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"modernbert", "gpt2"}))
def test_where_queries_have_a_projection_of_their_own_one_is_computed(architecture):
    rows = {}

    def count(module, arguments, output):
        rows[module] = output.shape[:-1].numel()

    model = tiny_prompt_model(architecture)
    linear = [module for module in last_layer(model).modules() if isinstance(module, torch.nn.Linear)]
    for module in linear:
        module.register_forward_hook(count)
    model(**padded_batch())
    assert list(rows) and set(rows) == set(linear)
    # Keys and values.
    assert sorted(rows.values())[-2:] == [len(LENGTHS) * max(LENGTHS)] * 2
    assert set(sorted(rows.values())[:-2]) == {len(LENGTHS)}


@pytest.mark.parametrize("architecture", ["opt", "opt-projected"])
def test_every_layer_of_opt_keeps_its_examples_apart(architecture):
    shapes = []
    model = tiny_prompt_model(architecture)
    for layer in replaced_layers(model):
        layer.fc1.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(output.shape[:-1])))
    model(**padded_batch())
    assert shapes == [(len(LENGTHS), max(LENGTHS)), (len(LENGTHS), 1)]


def test_a_forward_that_a_layer_had_of_its_own_is_there_again():
    model = tiny_prompt_model("bert")
    layer = last_layer(model)
    layer.forward = own = layer.forward
    model(**padded_batch())
    assert vars(layer)["forward"] is own
    del layer.forward
    model(**padded_batch())
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_training_dropout_draws_what_it_always_drew(architecture):
    batch = padded_batch()
    found = []
    for model in (tiny_prompt_model(architecture), whole(tiny_prompt_model(architecture))):
        set_dropout(model, 0.4)
        torch.manual_seed(3)
        found.append(model.train()(**batch))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert not torch.equal(found[0], model.eval()(**batch)), "nothing was dropped"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_computes_with_its_own_weights(architecture):
    batch = padded_batch()
    model = tiny_prompt_model(architecture)
    before = model(**batch)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(**batch), before, rtol=0, atol=0)
    with torch.no_grad():
        last_layer(copied).get_submodule(FEED_FORWARD[architecture]).weight.zero_()
    assert not torch.allclose(copied(**batch), before)
    torch.testing.assert_close(model(**batch), before, rtol=0, atol=0)


def test_other_attention_and_other_architectures_are_left_alone():
    model = tiny_prompt_model("bert", our_attention=False)
    assert not replaced_layers(model)
    lm = tiny_prompt_model("bert").lm
    lm.config.model_type = "deberta"
    assert not SinglePosition(lm).layers


@pytest.mark.parametrize("architecture", ["bert", "opt"])
def test_outside_of_a_call_the_layers_are_those_of_transformers(architecture):
    model = tiny_prompt_model(architecture)
    seen = []
    last_layer(model).register_forward_hook(
        lambda *_: seen.extend("forward" in vars(m) for m in replaced_layers(model))
    )
    model(**padded_batch())
    with pytest.raises(RuntimeError):
        model(**(padded_batch() | {"mask_pos": torch.tensor([99] * len(LENGTHS))}))
    assert seen and all(seen)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model.lm.base_model._forward_hooks


@pytest.mark.parametrize("config_class", [CamembertConfig, ElectraConfig, XLMRobertaConfig])
def test_the_relatives_of_bert_have_the_same_last_layer(config_class):
    values = tiny_config("roberta").to_dict()
    values.pop("model_type")
    torch.manual_seed(0)
    lm = AutoModelForMaskedLM.from_config(config_class(**values, embedding_size=16), attn_implementation="eager")
    use_plain_attention(lm.eval())
    model, batch = PromptModel(lm.double(), [11, 7]), padded_batch()
    narrowed = model(**batch)
    torch.testing.assert_close(narrowed, whole(model)(**batch), rtol=1e-9, atol=1e-11)
    assert narrowed.abs().max() > 0.01


def causal_model(config):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    use_plain_attention(lm)
    use_plain_rms_norms(lm)
    return PromptModel(lm.double(), [11, 7])


def config_like(architecture, config_class=None, **changes):
    config = tiny_config(architecture)
    values = {**config.to_dict(), "tie_word_embeddings": False, **changes}
    values.pop("model_type")
    return (config_class or type(config))(**values)


@pytest.mark.parametrize(
    "config",
    [
        config_like("llama", MistralConfig, sliding_window=64),
        config_like("llama", MistralConfig, head_dim=6, num_key_value_heads=1),
        config_like("gpt2", scale_attn_by_inverse_layer_idx=True),
        config_like("gpt2", scale_attn_weights=False),
        config_like("opt", enable_bias=False, layer_norm_elementwise_affine=False),
    ],
    ids=["mistral", "heads of a width of their own", "scaled by layer", "unscaled", "no biases"],
)
def test_the_relatives_of_causal_models_have_the_same_last_layer(config):
    model = causal_model(config)
    assert last_layer(model)
    found = logits_and_gradients(model)
    for narrowed, expected in zip(found, logits_and_gradients(whole(model)), strict=True):
        torch.testing.assert_close(narrowed, expected, rtol=1e-9, atol=1e-11)
    assert found[0].abs().max() > 0.01


def test_an_unknown_causal_architecture_is_asked_at_its_position_all_the_same():
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    model, batch = causal_model(config), padded_batch()
    assert not replaced_layers(model)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.lm.get_parameter(name))
    expected = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = expected[torch.arange(len(LENGTHS)), batch["mask_pos"]][:, [11, 7]]
    torch.testing.assert_close(model(**batch), expected, rtol=1e-9, atol=1e-11)
    assert expected.abs().max() > 0.01
