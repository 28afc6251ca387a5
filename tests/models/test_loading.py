"""Loading checkpoints: the decoder untied, the bias counted once, what is missing named, old names understood."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from lmntk.errors import ModelError
from lmntk.models import loading
from lmntk.models.families import AUTO_CLASSES, family_of, max_positions
from lmntk.models.loading import LoadOptions, load_prompt_model
from lmntk.models.pretrained import load_config, load_tokenizer
from tiny_models import (
    ARCHITECTURES,
    CAUSAL,
    TYPICAL_CAUSAL,
    PaddedPrompts,
    prompts_for,
    save_tiny_checkpoint,
    tiny_config,
    tiny_prompt_model,
)

LABEL_WORDS = (20, 31)


def load(folder, binary_classification=False, **options):
    return load_prompt_model(
        str(folder),
        load_config(str(folder)),
        LABEL_WORDS,
        LoadOptions(**options),
        binary_classification=binary_classification,
    )


def rewrite_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def load_with_transformers(folder):
    return AUTO_CLASSES[family_of(AutoConfig.from_pretrained(folder))].from_pretrained(folder).eval()


def some_tokens(size=3, length=9):
    return torch.randint(6, 100, (size, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logits_are_the_language_models_own_at_the_position_that_predicts(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    model, plain, ids = load(tmp_path), load_with_transformers(tmp_path), some_tokens()
    positions = torch.tensor([2, 5, 8])
    with torch.no_grad():
        expected = plain(input_ids=ids).logits[torch.arange(3), positions][:, list(LABEL_WORDS)]
        found = model(ids, positions)
    assert found.shape == (3, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_does_not_change_logits(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    model = load(tmp_path, dtype=torch.float64)
    ids = some_tokens(2, 7)
    positions = torch.tensor([2, 5])
    # GPT-2's tokenizer has no token for it.
    pad = model.lm.config.pad_token_id or 0
    padded = torch.cat([ids, torch.full((2, 4), pad)], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 4] * 2)
    torch.testing.assert_close(model(padded, positions, attention_mask=mask), model(ids, positions), atol=1e-7, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_causal_models_logits_depend_on_no_padding_on_either_side_to_1e_12(architecture, side):
    model, prompts = tiny_prompt_model(architecture), prompts_for(architecture, [9, 4, 12, 7])
    batch = PaddedPrompts(prompts, side).batch(range(4))
    assert len(set(batch["mask_pos"].tolist())) == (1 if side == "left" else 4)
    alone = torch.cat([model(**prompt) for prompt in prompts])
    # What stands in the padding is nothing either.
    batch["input_ids"] = torch.where(batch["attention_mask"] == 0, some_tokens(4, 12) % 60, batch["input_ids"])
    torch.testing.assert_close(model(**batch), alone, rtol=1e-12, atol=1e-12)
    assert alone.abs().max() > 0.1


@pytest.mark.parametrize("architecture", CAUSAL)
def test_what_stands_behind_the_position_changes_no_logit_of_a_causal_model(architecture):
    model, ids, positions = tiny_prompt_model(architecture), some_tokens() % 60, torch.tensor([2, 5, 7])
    others = torch.where(torch.arange(9) > positions[:, None], (ids + 7) % 60, ids)
    assert not torch.equal(ids, others)
    torch.testing.assert_close(model(others, positions), model(ids, positions), rtol=1e-12, atol=1e-12)
    before = torch.where(torch.arange(9) == 0, (ids + 7) % 60, ids)
    assert not torch.isclose(model(before, positions), model(ids, positions)).any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tied_decoder_starts_as_the_word_embeddings_and_is_a_parameter_of_its_own(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    model = load(tmp_path)
    decoder, words = model.lm.get_output_embeddings().weight, model.lm.get_input_embeddings().weight
    assert torch.equal(decoder, words)
    assert decoder.data_ptr() != words.data_ptr()
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    grown_segments = 8 * 16 if architecture == "bert" else 0
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == stored + decoder.numel() + grown_segments


def test_a_stored_decoder_is_kept_though_the_config_says_tied(tmp_path):
    save_tiny_checkpoint("roberta", tmp_path)
    other = torch.randn(load_config(str(tmp_path)).vocab_size, 16)
    rewrite_weights(tmp_path, lambda weights: {**weights, "lm_head.decoder.weight": other})
    assert json.loads((tmp_path / "config.json").read_text()).get("tie_word_embeddings", True)
    model = load(tmp_path)
    assert torch.equal(model.lm.get_output_embeddings().weight, other)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", TYPICAL_CAUSAL)
def test_a_causal_models_stored_decoder_is_kept_whatever_the_config_says(architecture, tied, tmp_path, caplog):
    save_tiny_checkpoint(architecture, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = torch.randn(load_config(str(tmp_path)).vocab_size, 16)
    rewrite_weights(tmp_path, lambda weights: {**weights, "lm_head.weight": other})
    model = load(tmp_path)
    assert torch.equal(model.lm.get_output_embeddings().weight, other)
    assert not torch.equal(model.lm.get_input_embeddings().weight, other)
    assert caplog.records == []


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_the_bias_that_heads_know_under_two_names_is_one_parameter(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    model = load(tmp_path)
    bias = model.lm.get_output_embeddings().bias
    stored = load_file(tmp_path / "model.safetensors")
    key = "cls.predictions.bias" if architecture == "bert" else "lm_head.bias"
    assert torch.equal(bias, stored[key])
    assert sum(parameter is bias for parameter in model.parameters()) == 1


def test_missing_head_weights_are_named_in_a_warning(tmp_path, caplog):
    save_tiny_checkpoint("bert", tmp_path)
    rewrite_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if "transform" not in k})
    with caplog.at_level(logging.WARNING, logger="lmntk"):
        load(tmp_path)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "RANDOM" in message
    assert "cls.predictions.transform.dense.weight" in message
    assert "decoder" not in message


@pytest.mark.parametrize(("architecture", "ending"), [("gpt2", "ln_f.weight"), ("llama", "model.norm.weight")])
def test_missing_weights_of_a_causal_model_are_named_in_a_warning(architecture, ending, tmp_path, caplog):
    save_tiny_checkpoint(architecture, tmp_path)
    rewrite_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if not k.endswith(ending)})
    load(tmp_path)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "RANDOM" in message
    assert ending in message
    assert "lm_head" not in message


@pytest.mark.parametrize("architecture", ["bert", *TYPICAL_CAUSAL])
def test_a_complete_checkpoint_warns_of_nothing(architecture, tmp_path, caplog):
    save_tiny_checkpoint(architecture, tmp_path)
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert caplog.records == []


def test_old_layer_norm_names_load(tmp_path):
    save_tiny_checkpoint("bert", tmp_path)
    new = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}

    def old_name(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite_weights(tmp_path, lambda weights: {old_name(name): tensor for name, tensor in weights.items()})
    assert any(name.endswith("gamma") for name in load_file(tmp_path / "model.safetensors"))
    loaded = {name.removeprefix("lm."): parameter for name, parameter in load(tmp_path).named_parameters()}
    norms = [name for name in new if "LayerNorm" in name]
    assert len(norms) == 12
    assert all(torch.equal(loaded[name], new[name]) for name in norms)


def test_gpt2s_names_on_the_hub_load(tmp_path, caplog):
    """They lack the encoder's prefix, and the causal masks of old stand among them."""
    save_tiny_checkpoint("gpt2", tmp_path)
    model, ids, positions = load(tmp_path), some_tokens(), torch.tensor([2, 5, 8])
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in (0, 1)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in (0, 1)}
    rewrite_weights(
        tmp_path, lambda weights: {n.removeprefix("transformer."): t.clone() for n, t in weights.items()} | masks
    )
    again = load(tmp_path)
    assert torch.equal(again(ids, positions), model(ids, positions))
    assert torch.equal(again.lm.get_output_embeddings().weight, again.lm.get_input_embeddings().weight)
    assert caplog.records == []


def test_bert_gets_ten_segments_from_its_own_rows(tmp_path):
    save_tiny_checkpoint("bert", tmp_path)
    repeated = load(tmp_path).lm.base_model.embeddings.token_type_embeddings.weight
    stored = load_file(tmp_path / "model.safetensors")["bert.embeddings.token_type_embeddings.weight"]
    assert repeated.shape == (10, 16)
    assert torch.equal(repeated[:2], stored)
    assert torch.equal(repeated[2:], stored[1].expand(8, 16))
    drawn = load(tmp_path, random_segment=True).lm.base_model.embeddings.token_type_embeddings.weight
    assert torch.equal(drawn[:2], stored)
    assert len({tuple(row.tolist()) for row in drawn}) == 10


QUERIES = {
    "bert": "lm.bert.encoder.layer.0.attention.self.query.weight",
    "gpt2": "lm.transformer.h.0.attn.c_attn.weight",
    "opt": "lm.model.decoder.layers.0.self_attn.q_proj.weight",
    "llama": "lm.model.layers.0.self_attn.q_proj.weight",
}


@pytest.mark.parametrize("architecture", QUERIES)
def test_random_initialisation_depends_on_the_seed_alone(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    first, again, other = (load(tmp_path, random_init=True, seed=seed) for seed in (1, 1, 2))
    query = QUERIES[architecture]
    assert torch.equal(first.get_parameter(query), again.get_parameter(query))
    assert not torch.equal(first.get_parameter(query), other.get_parameter(query))
    assert torch.equal(first.lm.get_output_embeddings().weight, first.lm.get_input_embeddings().weight)


def test_binary_classification_makes_the_logit_the_difference_of_the_two(tmp_path):
    save_tiny_checkpoint("bert", tmp_path)
    ids, position = torch.randint(6, 100, (2, 7)), torch.tensor([1, 2])
    two, one = load(tmp_path)(ids, position), load(tmp_path, binary_classification=True)(ids, position)
    assert one.shape == (2, 1)
    assert torch.equal(one[:, 0], two[:, 1] - two[:, 0])


def test_a_folder_without_weights_is_told_in_one_sentence(tmp_path):
    save_tiny_checkpoint("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"`model_name_or_path`: the folder '.*' holds no weights"):
        load(tmp_path)


def test_a_folder_without_a_model_is_told_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"`model_name_or_path`: the folder '.*' holds no model"):
        load_config(str(tmp_path))
    with pytest.raises(ModelError, match=r"`tokenizer_name`: the folder '.*' holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_weights_of_another_shape_are_told_in_one_sentence(tmp_path):
    save_tiny_checkpoint("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    with pytest.raises(ModelError, match="config.json"):
        load(tmp_path)


def test_weights_of_another_architecture_are_no_model(tmp_path):
    save_tiny_checkpoint("roberta", tmp_path)
    rewrite_weights(tmp_path, lambda weights: {"nothing.known": torch.zeros(2)})
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert caught.value.data == {"path": str(tmp_path)}


@pytest.mark.parametrize("architecture", ["bert", *TYPICAL_CAUSAL])
def test_a_checkpoint_in_bfloat16_loads_as_the_float32_model_of_the_rounded_weights(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    whole = load(tmp_path)
    rewrite_weights(tmp_path, lambda weights: {name: tensor.bfloat16() for name, tensor in weights.items()})
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rounded, ids, positions = load(tmp_path), some_tokens(), torch.tensor([2, 5, 8])
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(parameter.bfloat16())
        assert torch.equal(rounded(ids, positions), whole(ids, positions))
        # Rounding twice, as in bfloat16 itself, would show in the third digit.
        exact = load(tmp_path, dtype=torch.float64)(ids, positions)
        torch.testing.assert_close(rounded(ids, positions).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_rms_norms_compute_in_the_models_own_dtype(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    model = load(tmp_path, dtype=torch.float64)
    norms = {type(module) for name, module in model.named_modules() if name.endswith("norm")}
    assert norms == {nn.RMSNorm}
    plain, ids, positions = load_with_transformers(tmp_path), some_tokens(), torch.tensor([2, 5, 8])
    with torch.no_grad():
        expected = plain(ids).logits[torch.arange(3), positions][:, list(LABEL_WORDS)]
        torch.testing.assert_close(load(tmp_path)(ids, positions), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "longest"),
    [("bert", 64), ("roberta", 299), ("distilbert", 64), ("gpt2", 64), ("opt", 64), ("llama", 64), ("qwen2", 64)],
)
def test_positions_reserved_for_padding_do_not_count(architecture, longest):
    assert max_positions(tiny_config(architecture)) == longest


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_bfloat16_model_gives_float32_logits_of_the_label_words(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    model, exact = (load(tmp_path, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids, positions = some_tokens(), torch.tensor([2, 5, 8])
    with torch.no_grad():
        found, expected = model(ids, positions), exact(ids, positions)
        differences = load(tmp_path, dtype=torch.bfloat16, binary_classification=True)(ids, positions)
    assert found.dtype == differences.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float()), "they are not rounded again"
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    assert torch.equal(differences, found[:, 1:] - found[:, :1])


def test_padding_is_judged_before_weights_are_rounded(tmp_path, monkeypatch):
    save_tiny_checkpoint("bert", tmp_path)
    seen = []
    monkeypatch.setattr(
        loading, "find_out_about_padding", lambda model, *others: seen.append(next(model.parameters()).dtype)
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        load(tmp_path, dtype=dtype)
    assert seen == [torch.float32, torch.float32, torch.float64]
