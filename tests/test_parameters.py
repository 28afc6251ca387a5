"""Which parameters count, by architecture and filter."""

import pytest

from lmntk.errors import UsageError
from lmntk.parameters import ParameterFilter, count_parameters, select_parameters
from tiny_models import ARCHITECTURES, tiny_prompt_model

HEADS = {
    "bert": "lm.cls.",
    "roberta": "lm.lm_head.",
    "distilbert": "lm.vocab_",
    "modernbert": ("lm.head.", "lm.decoder."),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_excluding_the_embeddings_takes_their_norm_along_and_nothing_else(architecture):
    model = tiny_prompt_model(architecture)
    kept = set(select_parameters(model, ParameterFilter(exclude_embeddings=True)))
    gone = set(select_parameters(model, ParameterFilter())) - kept
    assert gone == {name for name, _ in model.named_parameters() if ".embeddings." in name}
    assert any("norm" in name.lower() for name in gone)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_excluding_the_head_takes_its_transform_and_decoder(architecture):
    model = tiny_prompt_model(architecture)
    kept = set(select_parameters(model, ParameterFilter(exclude_head=True)))
    gone = set(select_parameters(model, ParameterFilter())) - kept
    assert gone == {name for name, _ in model.named_parameters() if name.startswith(HEADS[architecture])}
    assert any("decoder.weight" in name or "projector.weight" in name for name in gone)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_only_biases_are_those_whose_names_say_so(architecture):
    model = tiny_prompt_model(architecture)
    kept = select_parameters(model, ParameterFilter(only_biases=True))
    assert set(kept) == {name for name, _ in model.named_parameters() if name.endswith("bias")}


def test_the_first_layers_are_counted_from_the_input():
    model = tiny_prompt_model("bert")
    kept = select_parameters(model, ParameterFilter(exclude_first_layers=1))
    assert not any("layer.0." in name for name in kept)
    assert any("layer.1." in name for name in kept)
    assert any("embeddings" in name for name in kept)


def test_filters_combine():
    model = tiny_prompt_model("bert")
    chosen = ParameterFilter(exclude_embeddings=True, exclude_head=True, only_biases=True, exclude_first_layers=1)
    kept = select_parameters(model, chosen)
    assert set(kept) == {
        name for name, _ in model.named_parameters() if ".encoder.layer.1." in name and name.endswith("bias")
    }
    assert count_parameters(kept) == 8 * 16 + 24 - 16


def test_an_empty_selection_names_the_flags():
    model = tiny_prompt_model("modernbert")
    with pytest.raises(UsageError, match="--exclude_head --only_biases together leave no parameter"):
        select_parameters(model, ParameterFilter(exclude_head=True, only_biases=True))


def test_more_layers_than_there_are_cannot_be_excluded():
    with pytest.raises(UsageError, match="--exclude_first_layers 3: the model has 2 layers"):
        select_parameters(tiny_prompt_model("bert"), ParameterFilter(exclude_first_layers=3))
