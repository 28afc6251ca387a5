"""The last layer computes one position only, and nobody notices: logits, gradients, dropout, copies."""

import copy

import pytest
import torch
from transformers import AutoModelForMaskedLM, CamembertConfig, ElectraConfig, XLMRobertaConfig

from lmntk.models.attention import use_plain_attention
from lmntk.models.last_layer import narrow_last_layer
from lmntk.models.prompt_model import PromptModel
from tiny_models import ARCHITECTURES, PaddedPrompts, tiny_config, tiny_prompt_model, tiny_prompts

LENGTHS = [9, 4, 12, 7]
# Behind the attention: what sees one position only.
FEED_FORWARD = {
    "bert": "intermediate.dense",
    "roberta": "intermediate.dense",
    "distilbert": "ffn.lin1",
    "modernbert": "mlp.Wi",
}


def padded_batch():
    return PaddedPrompts(tiny_prompts(LENGTHS)).batch(range(len(LENGTHS)))


def last_layer(model):
    (layer,) = [module for module in model.modules() if "forward" in vars(module)]
    return layer


def whole(model):
    """The same model with its last layer as transformers has it."""
    vars(last_layer(model)).pop("forward")
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_all_positions(architecture):
    batch = padded_batch()
    found = []
    for model in (tiny_prompt_model(architecture), whole(tiny_prompt_model(architecture))):
        logits = model(**batch)
        gradients = torch.autograd.grad(logits[:, 1].sum(), list(model.parameters()), materialize_grads=True)
        found.append([logits, *gradients])
    for narrowed, expected in zip(*found, strict=True):
        torch.testing.assert_close(narrowed, expected, rtol=1e-9, atol=1e-11)
    assert found[0][0].abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_behind_the_attention_one_position_is_computed(architecture):
    shapes = []
    model = tiny_prompt_model(architecture)
    module = last_layer(model).get_submodule(FEED_FORWARD[architecture])
    module.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(output.shape[:2])))
    model(**padded_batch())
    model.train()
    model(**padded_batch())
    assert shapes == [(len(LENGTHS), 1), (len(LENGTHS), max(LENGTHS))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_training_dropout_draws_what_it_always_drew(architecture):
    batch = padded_batch()
    found = []
    for model in (tiny_prompt_model(architecture), whole(tiny_prompt_model(architecture))):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.4
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
    assert not [module for module in model.modules() if "forward" in vars(module)]
    lm = whole(tiny_prompt_model("bert")).lm
    lm.config.model_type = "deberta"
    narrow_last_layer(lm, model._position)
    assert not [module for module in lm.modules() if "forward" in vars(module)]


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
