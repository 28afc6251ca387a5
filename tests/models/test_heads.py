"""Classifiers of plain text: logits as transformers has them, new heads drawn and named, kernels against the oracle."""

import functools
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import oracle
from lmntk.errors import ModelError
from lmntk.kernels import FORMULAS, BatchedExamples, KernelProblem, ModuleModel, TileRequest
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.batching import length_buckets
from lmntk.kernels.tuning import DEFAULT_TUNING
from lmntk.models.checkpoints import HEAD_FILE, save_checkpoint
from lmntk.models.families import AUTO_CLASSES, family_of
from lmntk.models.heads import OneTokenClassifier
from lmntk.models.loading import LoadOptions, load_classifier
from lmntk.models.parameters import ParameterFilter, select_parameters
from lmntk.models.pretrained import load_config
from lmntk.models.rms_norm import use_plain_rms_norms
from tiny_models import (
    CAUSAL,
    CLASSIFIERS,
    OTHER_ATTENTION,
    TYPICAL,
    TYPICAL_CAUSAL,
    PaddedPrompts,
    has_noise_for_a_gradient,
    save_tiny_checkpoint,
    save_tiny_classification_checkpoint,
    texts_for,
    tiny_classification_config,
    tiny_classifier,
)

# SPEC: exact means 1e-12 in float64. ModernBERT rotates queries and keys in float32 whatever its dtype, so that forward
# mode rounds differently than reverse mode does.
TOLERANCE, MODERNBERT_JVP_TOLERANCE = 1e-12, 2e-8
KINDS = pytest.mark.parametrize("first_token", [False, True], ids=["own head", "linear layer"])
# One linear layer takes the place of ModernBERT's pooling, whichever it is.
CASES = [(family, False) for family in CLASSIFIERS] + [(architecture, True) for architecture in TYPICAL]
# The last token of the other causal models differs in how it is computed, not in what becomes of it.
MORE_CASES = CASES + [(family, one) for family in CAUSAL for one in (False, True) if family not in TYPICAL_CAUSAL]


def of_cases(cases):
    ids = [f"{family}-{'linear layer' if one else 'own head'}" for family, one in cases]
    return pytest.mark.parametrize(("family", "first_token"), cases, ids=ids)


CLASSIFIERS_AND_LAYERS = of_cases(CASES)
FAMILIES = pytest.mark.parametrize("family", CLASSIFIERS)
FILTERS = {
    "all": ParameterFilter(),
    "no head": ParameterFilter(exclude_head=True),
    "no embeddings": ParameterFilter(exclude_embeddings=True),
}


def sides(family):
    return texts_for(family, [4, 6, 4], seed=1), texts_for(family, [5, 6], seed=2)


def padded_batch(family, side="right"):
    examples = texts_for(family, [9, 4, 12, 7])
    return PaddedPrompts(examples, side).batch(range(len(examples)))


def at(states, batch):
    """The states ``[B, L, d]`` at the position that predicts."""
    return states[torch.arange(len(states)), batch["mask_pos"]]


def bias_of(layer):
    return 0.0 if layer.bias is None else layer.bias


def names_in(last_layer, layer):
    return {f"{last_layer}.{name}" for name, _ in layer.named_parameters()}


def stock_classifier(model, family):
    """What a classifier computes, by transformers alone: its own modules, its own attention, all positions.

    Returns the logits as a function of a batch, and the parameters by their names in `model`.
    """
    config, first_token = tiny_classification_config(family), isinstance(model, OneTokenClassifier)
    attention = OTHER_ATTENTION[config.model_type]
    if first_token:
        lm = AUTO_CLASSES[family_of(config)].from_config(config, attn_implementation=attention).base_model
    else:
        lm = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    use_plain_rms_norms(lm)
    lm = lm.to(torch.float64).eval()
    lm.load_state_dict(model.lm.state_dict())
    named = {f"lm.{name}": parameter for name, parameter in lm.named_parameters()}
    if first_token:
        weight, bias = (model.last_layer.get_parameter(name).detach().clone() for name in ("weight", "bias"))
        named |= {"classifier.weight": weight.requires_grad_(), "classifier.bias": bias.requires_grad_()}

    def logits_of(batch):
        inputs = {name: tensor for name, tensor in batch.items() if name != "mask_pos"}
        found = lm(**inputs)
        logits = at(found.last_hidden_state, batch) @ weight.T + bias if first_token else found.logits
        return logits[:, 1:] - logits[:, :1] if model.binary_classification else logits

    return logits_of, named


@FAMILIES
def test_the_logits_are_those_of_transformers_own_classifier_to_1e_9(family, tmp_path):
    save_tiny_classification_checkpoint(family, tmp_path, num_labels=3)
    model = load_classifier(str(tmp_path), load_config(str(tmp_path)), 3, LoadOptions(dtype=torch.float64))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    use_plain_rms_norms(plain)
    for batch in (padded_batch(family), *sides(family)[0]):
        inputs = {name: tensor for name, tensor in batch.items() if name != "mask_pos"}
        with torch.no_grad():
            found, expected = model(**batch), plain(**inputs).logits
        assert found.shape == (len(batch["mask_pos"]), 3)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("architecture", TYPICAL_CAUSAL)
@pytest.mark.parametrize("padding", [0, 63, None], ids=str)
def test_a_causal_models_last_token_is_found_whatever_pads_to_1e_9(architecture, padding, tmp_path):
    """Without a padding token, as GPT-2 is, transformers takes one text at a time."""
    save_tiny_classification_checkpoint(architecture, tmp_path, num_labels=3)
    config = load_config(str(tmp_path))
    config.pad_token_id = padding
    model = load_classifier(str(tmp_path), config, 3, LoadOptions(dtype=torch.float64))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config, dtype=torch.float64).eval()
    use_plain_rms_norms(plain)
    batch = padded_batch(architecture)
    ids, mask = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding or 0), batch["attention_mask"]
    with torch.no_grad():
        alone = torch.cat([plain(row[None, :length]).logits for row, length in zip(ids, mask.sum(dim=1), strict=True)])
        torch.testing.assert_close(model(**{**batch, "input_ids": ids}), alone, rtol=1e-9, atol=1e-9)
        if padding is not None:
            torch.testing.assert_close(plain(ids, attention_mask=mask).logits, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", TYPICAL_CAUSAL)
def test_a_text_that_ends_in_the_padding_token_is_read_to_its_end(architecture):
    """Where transformers goes by tokens, it takes an earlier one."""
    model, batch = tiny_classifier(architecture), padded_batch(architecture)
    logits_of, _ = stock_classifier(model, architecture)
    model.lm.config.pad_token_id = last = 33
    batch["input_ids"][torch.arange(4), batch["mask_pos"]] = last
    torch.testing.assert_close(model(**batch), logits_of(batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first_token", [False, True], ids=["own head", "linear layer"])
@pytest.mark.parametrize("architecture", TYPICAL_CAUSAL)
def test_causal_texts_may_be_padded_on_the_left_to_1e_12(architecture, first_token):
    model = tiny_classifier(architecture, first_token)
    batch = padded_batch(architecture, "left")
    assert batch["mask_pos"].tolist() == [11] * 4
    torch.testing.assert_close(model(**batch), model(**padded_batch(architecture)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", TYPICAL)
def test_the_linear_layer_sees_the_last_hidden_state_of_the_first_token_or_a_causal_models_last_to_1e_9(
    architecture, tmp_path
):
    save_tiny_checkpoint(architecture, tmp_path)
    model = load_classifier(
        str(tmp_path), load_config(str(tmp_path)), 3, LoadOptions(dtype=torch.float64), first_token=True
    )
    plain = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    use_plain_rms_norms(plain)
    weights, biases = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    batch = padded_batch(architecture)
    assert not model(**batch).any(), "the head is zero until it is fitted"
    model.set_last_layer(weights, biases)
    with torch.no_grad():
        hidden = at(plain(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state, batch)
        found = model(**batch)
    torch.testing.assert_close(model.last_layer_inputs(batch), hidden, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, hidden @ weights.T + biases, rtol=1e-9, atol=1e-9)


@of_cases(MORE_CASES)
def test_in_memory_too_padded_logits_are_those_of_transformers_to_1e_9(family, first_token):
    model = tiny_classifier(family, first_token)
    logits_of, _ = stock_classifier(model, family)
    torch.testing.assert_close(model(**padded_batch(family)), logits_of(padded_batch(family)), rtol=1e-9, atol=1e-9)


@CLASSIFIERS_AND_LAYERS
def test_binary_classification_makes_the_logit_the_difference_of_the_two(family, first_token):
    two, one = tiny_classifier(family, first_token), tiny_classifier(family, first_token, binary=True)
    assert (two.num_logits, one.num_logits, one.num_classes) == (2, 1, 2)
    logits, difference = two(**padded_batch(family)), one(**padded_batch(family))
    assert difference.shape == (4, 1)
    assert torch.equal(difference[:, 0], logits[:, 1] - logits[:, 0])


@CLASSIFIERS_AND_LAYERS
def test_classes_have_no_label_words(family, first_token):
    model = tiny_classifier(family, first_token)
    assert model.label_word_ids == []
    assert model.num_classes == model.num_logits == 2


@CLASSIFIERS_AND_LAYERS
def test_the_features_are_what_goes_into_the_last_layer_to_1e_12(family, first_token):
    model = tiny_classifier(family, first_token)
    features = model.last_layer_inputs(padded_batch(family))
    assert features.shape == (4, 16)
    by_hand = features @ model.last_layer.weight.T + bias_of(model.last_layer)
    torch.testing.assert_close(by_hand, model(**padded_batch(family)), rtol=1e-12, atol=1e-12)


@CLASSIFIERS_AND_LAYERS
def test_a_fitted_last_layer_gives_the_logits_that_were_fitted(family, first_token):
    model = tiny_classifier(family, first_token)
    features = model.last_layer_inputs(padded_batch(family))
    weights, biases = torch.randn(2, 16, dtype=torch.float64), torch.tensor([0.5, -2.0], dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.set_last_layer(weights, biases)
    expected = features @ weights.T + (0.0 if model.last_layer.bias is None else biases)
    torch.testing.assert_close(model(**padded_batch(family)), expected, rtol=1e-12, atol=1e-12)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    (last,) = [name for name, module in model.named_modules() if module is model.last_layer]
    assert changed == names_in(last, model.last_layer)


def load(folder, num_classes=2, first_token=False, binary_classification=False, **options):
    head = {"first_token": first_token, "binary_classification": binary_classification}
    return load_classifier(str(folder), load_config(str(folder)), num_classes, LoadOptions(**options), **head)


def heads_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(model.base_prefix)}


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


NEW_HEADS = {
    "bert": ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"],
    "roberta": [f"classifier.{name}" for name in ("dense.bias", "dense.weight", "out_proj.bias", "out_proj.weight")],
    "distilbert": ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"],
    "modernbert": ["classifier.bias", "classifier.weight"],
    **dict.fromkeys(CAUSAL, ["score.weight"]),
}


@pytest.mark.parametrize("architecture", TYPICAL)
def test_a_new_head_is_drawn_with_the_seed_and_named_in_one_warning(architecture, tmp_path, caplog):
    save_tiny_checkpoint(architecture, tmp_path)
    first = load(tmp_path, 3, seed=1)
    (message,) = messages(caplog)
    assert message.startswith("the classification head is new, drawn at random with `seed=1`: ")
    named = message.rpartition(": ")[2].split(", ")
    # ModernBERT's transform before the classifier is the language model's own, and in its checkpoint.
    assert named == NEW_HEADS[architecture]
    torch.rand(7)  # where the global generator stands does not matter
    again, other = load(tmp_path, 3, seed=1), load(tmp_path, 3, seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        drawn = name.removeprefix("lm.") in named and name.endswith("weight")
        assert torch.equal(tensor, other.state_dict()[name]) != drawn, name


@FAMILIES
def test_a_checkpoint_with_a_head_for_these_classes_warns_of_nothing(family, tmp_path, caplog):
    save_tiny_classification_checkpoint(family, tmp_path, num_labels=3)
    model = load(tmp_path, 3)
    assert messages(caplog) == []
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, stored[name.removeprefix("lm.")]) for name, tensor in heads_of(model).items())


@FAMILIES
def test_a_checkpoint_with_a_head_for_other_classes_gets_a_new_one_that_is_named(family, tmp_path, caplog):
    save_tiny_classification_checkpoint(family, tmp_path, num_labels=3)
    model = load(tmp_path, 4, seed=5)
    (message,) = messages(caplog)
    last = {"roberta": "classifier.out_proj", **dict.fromkeys(CAUSAL, "score")}.get(family, "classifier")
    named = names_in(last, model.last_layer)
    assert message.rpartition(": ")[2] == ", ".join(sorted(named))
    assert named == {f"{last}.weight"} | (set() if family in CAUSAL else {f"{last}.bias"})
    assert "`seed=5`" in message
    assert model.num_classes == 4
    assert model(**padded_batch(family)).shape == (4, 4)
    assert torch.isfinite(model(**padded_batch(family))).all()
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("lm.")
        if not name.startswith(last) and "token_type" not in name:
            assert torch.equal(tensor, stored[name]), name
    again = load(tmp_path, 4, seed=5)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_the_encoder_lacks_is_told_apart_from_the_new_head(tmp_path, caplog):
    save_tiny_checkpoint("bert", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.output" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)
    (random,) = [message for message in messages(caplog) if "RANDOM" in message]
    assert "bert.encoder.layer.1.output.dense.weight" in random
    assert "classifier" not in random
    assert "pooler" not in random
    (new,) = [message for message in messages(caplog) if "classification head" in message]
    assert "encoder" not in new
    caplog.clear()
    load(tmp_path, first_token=True)
    (random,) = messages(caplog)
    assert "bert.encoder.layer.1.output.dense.weight" in random
    assert "cls." not in random


@KINDS
@pytest.mark.parametrize("architecture", TYPICAL)
def test_random_initialisation_draws_everything_with_the_seed(architecture, first_token, tmp_path, caplog):
    save_tiny_checkpoint(architecture, tmp_path)
    first, again, other = (load(tmp_path, first_token=first_token, random_init=True, seed=seed) for seed in (1, 1, 2))
    stored = load_file(tmp_path / "model.safetensors")
    drawn = 0
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        if tensor.dim() == 2 and not name.startswith("classifier."):
            drawn += 1
            assert not torch.equal(tensor, other.state_dict()[name]), name
            assert all(tensor.shape != old.shape or not torch.equal(tensor, old) for old in stored.values()), name
    assert drawn >= 10
    assert messages(caplog) == []


@KINDS
@pytest.mark.parametrize("architecture", TYPICAL)
def test_a_score_has_one_logit(architecture, first_token, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    model = load(tmp_path, 1, first_token=first_token)
    assert model.num_classes == model.num_logits == 1
    assert model(**padded_batch(architecture)).shape == (4, 1)


@pytest.mark.parametrize("architecture", TYPICAL)
def test_a_linear_layer_beside_the_weights_is_read_again(architecture, tmp_path, caplog):
    save_tiny_checkpoint(architecture, tmp_path / "base")
    model = load(tmp_path / "base", 3, first_token=True)
    model.set_last_layer(torch.randn(3, 16), torch.randn(3))
    save_checkpoint(model, tmp_path / "saved", str(tmp_path / "base"))
    assert (tmp_path / "saved" / HEAD_FILE).is_file()
    again = load(tmp_path / "saved", 3, first_token=True)
    assert isinstance(again, OneTokenClassifier)
    assert model(**padded_batch(architecture)).any()
    assert torch.equal(again(**padded_batch(architecture)), model(**padded_batch(architecture)))
    assert messages(caplog) == []
    drawn = load(tmp_path / "saved", 3, first_token=True, random_init=True)
    assert not drawn(**padded_batch(architecture)).any(), "random_init leaves the head at zero"


def test_a_linear_layer_for_other_classes_is_told_in_one_sentence(tmp_path):
    save_tiny_checkpoint("bert", tmp_path / "base")
    save_checkpoint(load(tmp_path / "base", 3, first_token=True), tmp_path / "saved", str(tmp_path / "base"))
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "saved", 4, first_token=True)
    assert caught.value.data == {"path": tmp_path / "saved" / HEAD_FILE}
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("architecture", "token"), [("bert", "first"), ("llama", "last")])
def test_an_architecture_without_a_classification_head_is_told_the_way_out(architecture, token, monkeypatch):
    monkeypatch.setattr(AutoModelForSequenceClassification, "_model_mapping", {})
    with pytest.raises(ModelError, match=f"add `from_linearhead=True`.* on the {token} token") as caught:
        load_classifier("nowhere", tiny_classification_config(architecture), 2)
    assert caught.value.data == {"model": architecture}


def test_a_causal_model_whose_head_reads_another_token_is_told_the_way_out(tmp_path):
    """BERT, read from left to right, has a classification head all the same: on its first token, which sees no more."""
    save_tiny_checkpoint("bert", tmp_path)
    config = load_config(str(tmp_path), family="causal")
    with pytest.raises(ModelError, match="add `from_linearhead=True`") as caught:
        load_classifier(str(tmp_path), config, 2)
    assert caught.value.data == {"model": "bert"}
    model = load_classifier(str(tmp_path), config, 2, first_token=True)
    assert model(**padded_batch("llama")).shape == (4, 2)


def test_the_configuration_that_was_handed_in_stays_as_it_was(tmp_path):
    save_tiny_checkpoint("bert", tmp_path)
    config = load_config(str(tmp_path))
    before = config.to_dict()
    load_classifier(str(tmp_path), config, 5)
    load_classifier(str(tmp_path), config, 5, first_token=True)
    assert config.to_dict() == before


def names_of(model, chosen, noise=True):
    return [name for name in select_parameters(model, chosen) if noise or not has_noise_for_a_gradient(name)]


@functools.cache
def gradients_by_name(family, first_token, binary):
    """The oracle's gradients of both sides, ``[N, C, p]`` for each parameter, of transformers' own modules."""
    logits_of, named = stock_classifier(tiny_classifier(family, first_token, binary=binary), family)
    sizes = [parameter.numel() for parameter in named.values()]
    found = [oracle.gradients(logits_of, list(named.values()), side).split(sizes, dim=-1) for side in sides(family)]
    return [dict(zip(named, parts, strict=True)) for parts in found]


def problem_of(model, names, train, x, formula):
    model.requires_grad_(False)
    tokens = {int(token) for prompt in train for token in prompt["input_ids"][0]}
    logits_fn, params = model.as_function(names, tokens)
    return KernelProblem(
        train=BatchedExamples(train),
        x=BatchedExamples(x),
        formula=FORMULAS[formula],
        num_logits=model.num_logits,
        model=ModuleModel(logits_fn, model),
        params=params,
    )


def engine_error(engine, family, first_token, chosen, formula, size=3):
    binary = formula == "asymmetric_signgd"
    model = tiny_classifier(family, first_token, binary=binary)
    names = names_of(model, chosen, noise=formula == "sgd")
    of_sides = gradients_by_name(family, first_token, binary)
    truth = oracle.kernel(*(torch.cat([side[name] for name in names], -1)[:size] for side in of_sides), formula)
    problem = problem_of(model, names, *(side[:size] for side in sides(family)), formula)
    chosen_engine = make_engine(problem, engine)
    plan = chosen_engine.plan(TileRequest(2, 2))
    found = assemble(chosen_engine.blocks(plan), plan, problem)
    assert found.dtype == torch.float64
    return oracle.relative_error(found, truth.reshape(found.shape))


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("chosen", FILTERS)
@of_cases([case for case in CASES if case[0] not in CAUSAL])
def test_the_factored_engine_gives_every_classifiers_kernel_to_1e_12(family, first_token, chosen, formula):
    assert engine_error("factored", family, first_token, FILTERS[chosen], formula) <= TOLERANCE


@pytest.mark.parametrize("formula", FORMULAS)
@of_cases([case for case in CASES if case[0] in CAUSAL])
def test_the_factored_engine_gives_every_causal_classifiers_kernel_to_1e_12(family, first_token, formula):
    assert engine_error("factored", family, first_token, FILTERS["all"], formula) <= TOLERANCE


@pytest.mark.parametrize("formula", FORMULAS)
@CLASSIFIERS_AND_LAYERS
def test_the_jacobian_engine_gives_every_classifiers_kernel_to_1e_12(family, first_token, formula):
    assert engine_error("jacobian", family, first_token, FILTERS["all"], formula, size=2) <= TOLERANCE


@CLASSIFIERS_AND_LAYERS
def test_forward_mode_too_gives_every_classifiers_kernel_to_1e_12(family, first_token):
    tolerance = MODERNBERT_JVP_TOLERANCE if family.startswith("modernbert") else TOLERANCE
    assert engine_error("jvp", family, first_token, FILTERS["all"], "sgd", size=1) <= tolerance


def longer_sides(family):
    return texts_for(family, [12, 13, 5], seed=3), texts_for(family, [13, 9, 12], seed=4)


@functools.cache
def gradients_of_mixed_lengths(family, first_token):
    model = tiny_classifier(family, first_token)
    logits_of, named = stock_classifier(model, family)
    parameters = [named[name] for name in names_of(model, ParameterFilter(), noise=False)]
    return [oracle.gradients(logits_of, parameters, side) for side in longer_sides(family)]


@pytest.mark.parametrize("formula", FORMULAS)
@CLASSIFIERS_AND_LAYERS
def test_padded_batches_give_the_kernel_of_the_texts_alone_to_1e_12(family, first_token, formula):
    model = tiny_classifier(family, first_token)
    names = names_of(model, ParameterFilter(), noise=False)
    train, x = longer_sides(family)
    problem = problem_of(model, names, train, x, formula)
    problem = replace(problem, train=PaddedPrompts(train), x=PaddedPrompts(x))
    engine = make_engine(problem, "factored")
    plan = engine.plan()
    for examples, tile in ((problem.train, plan.tile_rows[0][0]), (problem.x, plan.tile_rows[0][1][0])):
        lengths = [
            {examples.shapes[index] for index in bucket}
            for bucket in length_buckets(examples, tile, DEFAULT_TUNING.batch_tokens)
        ]
        assert max(map(len, lengths)) > 1, "a batch is padded"
    found = assemble(engine.blocks(plan), plan, problem)
    truth = oracle.kernel(*gradients_of_mixed_lengths(family, first_token), formula).reshape(found.shape)
    assert oracle.relative_error(found, truth) <= TOLERANCE


@CLASSIFIERS_AND_LAYERS
def test_the_head_that_is_excluded_is_all_behind_the_encoder(family, first_token):
    model = tiny_classifier(family, first_token)
    gone = set(select_parameters(model, FILTERS["all"])) - set(select_parameters(model, FILTERS["no head"]))
    assert gone == set(heads_of(model))
    (last,) = [name for name, module in model.named_modules() if module is model.last_layer]
    assert names_in(last, model.last_layer) <= gone


@CLASSIFIERS_AND_LAYERS
def test_every_layer_of_a_classifier_has_factors(family, first_token):
    model = tiny_classifier(family, first_token)
    problem = problem_of(model, names_of(model, ParameterFilter()), *sides(family), "sgd")
    assert not make_engine(problem, "factored").fallback_parameters


@pytest.mark.parametrize("first_token", [False, True], ids=["own head", "first token"])
def test_the_head_of_a_bfloat16_model_gives_float32_logits_and_has_factors(first_token, tmp_path):
    family = "roberta"
    save_tiny_classification_checkpoint(family, tmp_path)
    model = load(tmp_path, first_token=first_token, dtype=torch.bfloat16).requires_grad_(False)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    (last,) = [name for name, module in model.named_modules() if module is model.last_layer]
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {f"{last}.weight", f"{last}.bias"}
    (batch, *_) = sides(family)[0]
    assert model(**batch).dtype == torch.float32
    problem = problem_of(model, names_of(model, ParameterFilter()), *sides(family), "sgd")
    engine = make_engine(problem, "factored")
    assert not engine.fallback_parameters
    plan = engine.plan()
    exact = load(tmp_path, first_token=first_token, dtype=torch.float64).requires_grad_(False)
    truth = problem_of(exact, names_of(exact, ParameterFilter()), *sides(family), "sgd")
    of_truth = make_engine(truth, "factored")
    expected = assemble(of_truth.blocks(plan), plan, truth)
    assert oracle.relative_error(assemble(engine.blocks(plan), plan, problem), expected) < 3e-2
