"""Which parameters count, by architecture and filter."""

import pytest

from lmntk.errors import SettingError
from lmntk.models.parameters import ParameterFilter, count_parameters, dropout_probabilities, select_parameters
from tiny_models import ARCHITECTURES, CAUSAL, MASKED, TYPICAL_CAUSAL, WITHOUT_BIASES, tiny_prompt_model

HEADS = {
    "bert": "lm.cls.",
    "roberta": "lm.lm_head.",
    "distilbert": "lm.vocab_",
    "modernbert": ("lm.head.", "lm.decoder."),
    **dict.fromkeys(CAUSAL, "lm.lm_head."),
}


@pytest.mark.parametrize("architecture", MASKED)
def test_excluding_the_embeddings_takes_their_norm_along_and_nothing_else(architecture):
    model = tiny_prompt_model(architecture)
    kept = set(select_parameters(model, ParameterFilter(exclude_embeddings=True)))
    gone = set(select_parameters(model, ParameterFilter())) - kept
    assert gone == {name for name, _ in model.named_parameters() if ".embeddings." in name}
    assert any("norm" in name.lower() for name in gone)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_embeddings_of_a_causal_model_are_those_of_words_and_positions(architecture):
    model = tiny_prompt_model(architecture)
    kept = set(select_parameters(model, ParameterFilter(exclude_embeddings=True)))
    gone = set(select_parameters(model, ParameterFilter())) - kept
    names = {
        "gpt2": {"lm.transformer.wte.weight", "lm.transformer.wpe.weight"},
        "opt": {"lm.model.decoder.embed_tokens.weight", "lm.model.decoder.embed_positions.weight"},
    }
    assert gone == names.get(model.lm.config.model_type, {"lm.model.embed_tokens.weight"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_excluding_the_head_takes_its_transform_and_decoder(architecture):
    model = tiny_prompt_model(architecture)
    kept = set(select_parameters(model, ParameterFilter(exclude_head=True)))
    gone = set(select_parameters(model, ParameterFilter())) - kept
    assert gone == {name for name, _ in model.named_parameters() if name.startswith(HEADS[architecture])}
    decoder = ("decoder.weight", "projector.weight", "lm_head.weight")
    assert any(name.endswith(decoder) for name in gone)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "gpt2", "opt", "opt-projected", "qwen2"])
def test_only_biases_are_those_whose_names_say_so(architecture):
    model = tiny_prompt_model(architecture)
    kept = select_parameters(model, ParameterFilter(only_biases=True))
    assert set(kept) == {name for name, _ in model.named_parameters() if name.endswith("bias")}


@pytest.mark.parametrize("architecture", WITHOUT_BIASES)
def test_only_biases_of_a_model_that_has_none_are_refused(architecture):
    with pytest.raises(SettingError, match="`only_biases` "):
        select_parameters(tiny_prompt_model(architecture), ParameterFilter(only_biases=True))


@pytest.mark.parametrize("architecture", ["bert", *TYPICAL_CAUSAL])
def test_the_first_layers_are_counted_from_the_input(architecture):
    model = tiny_prompt_model(architecture)
    layers = {"bert": "layer", "gpt2": "h"}.get(architecture, "layers")
    kept = select_parameters(model, ParameterFilter(exclude_first_layers=1))
    assert not any(f".{layers}.0." in name for name in kept)
    assert any(f".{layers}.1." in name for name in kept)
    assert set(dict(model.named_parameters())) - set(kept) == {
        name for name, _ in model.named_parameters() if f".{layers}.0." in name
    }


def test_filters_combine():
    model = tiny_prompt_model("bert")
    chosen = ParameterFilter(exclude_embeddings=True, exclude_head=True, only_biases=True, exclude_first_layers=1)
    kept = select_parameters(model, chosen)
    assert set(kept) == {
        name for name, _ in model.named_parameters() if ".encoder.layer.1." in name and name.endswith("bias")
    }
    assert count_parameters(kept) == 8 * 16 + 24 - 16


def test_dropout_is_found_in_modules_and_in_numbers_that_layers_keep():
    assert dropout_probabilities(tiny_prompt_model("bert")) == {"dropout": 0.1}
    model = tiny_prompt_model("modernbert")
    assert dropout_probabilities(model) == {}
    for layer in model.lm.model.layers:
        layer.attn.attention_dropout = 0.25
    assert dropout_probabilities(model) == {"attention_dropout": 0.25}


def test_an_empty_selection_names_the_settings():
    model = tiny_prompt_model("modernbert")
    with pytest.raises(SettingError) as caught:
        select_parameters(model, ParameterFilter(exclude_head=True, only_biases=True))
    assert caught.value.data == {"setting": ["exclude_head", "only_biases"]}


def test_more_layers_than_there_are_cannot_be_excluded():
    with pytest.raises(SettingError, match="2 layers") as caught:
        select_parameters(tiny_prompt_model("bert"), ParameterFilter(exclude_first_layers=3))
    assert caught.value.data == {"setting": "exclude_first_layers", "value": 3}
