"""Masked or causal: what a checkpoint is, what --model_family makes of it, and how much it reads."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
    RobertaConfig,
    T5Config,
    XLMConfig,
)

from command_line import Workplace
from lmntk.config.arguments import parse_arguments
from lmntk.errors import ModelError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.models.families import choose_family, family_of, is_causal, max_positions
from lmntk.prompts.features import Collator
from tiny_models import CAUSAL, MASKED, save_tiny_checkpoint, tiny_config


@pytest.mark.parametrize("architecture", MASKED + CAUSAL)
def test_the_architecture_says_which_family_it_is(architecture: str) -> None:
    config = tiny_config(architecture)
    assert family_of(config) == ("causal" if architecture in CAUSAL else "masked")
    assert is_causal(config) == (architecture in CAUSAL)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (BertConfig(), "masked"),
        (BertConfig(architectures=["BertForMaskedLM"]), "masked"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "masked"),
        (BertConfig(is_decoder=True), "causal"),
        (BertConfig(architectures=["BertLMHeadModel"]), "causal"),
        (BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), "causal"),
        (RobertaConfig(architectures=["RobertaForCausalLM"]), "causal"),
        (BartConfig(), "masked"),
        # Both of XLM's forms are one class, and it has no is_decoder.
        (XLMConfig(), "masked"),
        (XLMConfig(architectures=["XLMWithLMHeadModel"]), "masked"),
        # What transformers has in one form only is that, whatever the configuration says.
        (GPT2Config(is_decoder=False), "causal"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "causal"),
    ],
)
def test_what_both_families_have_is_causal_where_it_is_a_decoder_or_was_saved_as_one(
    config: PretrainedConfig, family: str
) -> None:
    assert family_of(config) == family
    choose_family(config, None)
    assert family_of(config) == family


def test_whatever_transformers_has_in_both_forms_is_masked_unless_it_says_otherwise() -> None:
    both = {*AutoModelForMaskedLM._model_mapping.keys()} & {*AutoModelForCausalLM._model_mapping.keys()}
    assert len(both) > 15
    for kind in both:
        assert family_of(kind()) == "masked"


def test_a_model_that_is_asked_as_a_causal_one_is_a_decoder_then() -> None:
    config = BertConfig(architectures=["BertLMHeadModel"])
    choose_family(config, None)
    assert config.is_decoder, "it would see what comes behind"
    config = BertConfig(architectures=["BertForMaskedLM"])
    choose_family(config, "causal")
    assert config.is_decoder
    assert family_of(config) == "causal"
    choose_family(config, "masked")
    assert not config.is_decoder
    assert family_of(config) == "masked"


@pytest.mark.parametrize(
    "config", [BertConfig(is_decoder=True), BertConfig(architectures=["BertLMHeadModel"])], ids=["decoder", "saved"]
)
def test_a_causal_bert_can_be_asked_as_a_masked_one(config: PretrainedConfig) -> None:
    choose_family(config, "masked")
    assert not config.is_decoder
    assert family_of(config) == "masked"


@pytest.mark.parametrize(
    ("config", "family"), [(GPT2Config(), "masked"), (LlamaConfig(), "masked"), (ModernBertConfig(), "causal")]
)
def test_a_form_that_an_architecture_has_not_is_refused(config: PretrainedConfig, family: str) -> None:
    config.name_or_path = "some/model"
    with pytest.raises(ModelError, match=f"`model_family={family}`: 'some/model'") as error:
        choose_family(config, family)
    assert error.value.data == {"model": config.model_type}


def test_an_architecture_of_neither_form_is_refused() -> None:
    with pytest.raises(ModelError) as error:
        family_of(T5Config())
    assert error.value.data == {"model": "t5"}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (BertConfig(), 512),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (GPT2Config(), 1024),
        (OPTConfig(), 2048),
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (MistralConfig(max_position_embeddings=32768, sliding_window=4096), 4096),
        (MistralConfig(max_position_embeddings=1024, sliding_window=4096), 1024),
        (MistralConfig(max_position_embeddings=32768, sliding_window=None), 32768),
        (Qwen2Config(max_position_embeddings=8192, sliding_window=256, use_sliding_window=True), 256),
        (Qwen2Config(max_position_embeddings=8192, sliding_window=256, use_sliding_window=False), 8192),
        (Gemma3TextConfig(max_position_embeddings=8192, sliding_window=512), 512),
        # Of a masked model only some layers look no further.
        (ModernBertConfig(max_position_embeddings=8192), 8192),
        (RecurrentGemmaConfig(attention_window_size=128), 128),
        # An encoder of sentences need be no language model.
        (T5Config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_a_causal_model_reads_as_far_as_its_window(config: PretrainedConfig, longest: int | None) -> None:
    assert max_positions(config) == longest


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    save_tiny_checkpoint("bert", place.folder / "bert")
    return place


def built(place: Workplace, model: Path, *flags: str) -> Experiment:
    return build(*parse_arguments(place.argv("--model_name_or_path", str(model), *flags)))


def logits_of(run: Experiment) -> torch.Tensor:
    assert run.model is not None
    with torch.no_grad():
        return run.model(**{k: v for k, v in batch_of(run).items() if k != "labels"})


def batch_of(run: Experiment) -> dict[str, torch.Tensor]:
    return Collator(0, segments=False)(run.datasets["test"].features)


def test_a_bert_that_is_asked_as_a_causal_model_reads_to_its_last_token(place: Workplace) -> None:
    run = built(place, place.folder / "bert", "--model_family", "causal")
    assert run.model is not None and run.tokenizer is not None
    decoder = BertLMHeadModel.from_pretrained(place.folder / "bert", is_decoder=True, attn_implementation="eager")
    for feature, logits in zip(run.datasets["test"].features, logits_of(run), strict=True):
        # BERT's tokenizer has no token for the beginning.
        assert run.tokenizer.decode(feature.input_ids).endswith(" it was")
        assert not {run.tokenizer.cls_token_id, run.tokenizer.mask_token_id} & set(feature.input_ids)
        with torch.no_grad():
            theirs = decoder.eval()(input_ids=torch.tensor([feature.input_ids])).logits[0, -1]
        # float32 both, in another order of operations.
        torch.testing.assert_close(logits, theirs[run.model.label_word_ids], rtol=1e-4, atol=1e-5)


def test_a_run_with_model_family_causal_leaves_a_kernel(place: Workplace) -> None:
    bert = ["--model_name_or_path", str(place.folder / "bert")]
    folder = place.run(*bert, "--model_family", "causal", output="causal")
    assert (folder / "test_kernels_sst-2.pt").is_file()


def test_a_bert_that_was_saved_as_a_causal_model_is_one_without_a_flag(place: Workplace, tmp_path: Path) -> None:
    asked = built(place, place.folder / "bert", "--model_family", "causal")
    decoder = BertLMHeadModel.from_pretrained(place.folder / "bert", is_decoder=True)
    decoder.save_pretrained(tmp_path)
    flags = ["--tokenizer_name", str(place.folder / "bert")]
    torch.testing.assert_close(logits_of(built(place, tmp_path, *flags)), logits_of(asked), rtol=0, atol=0)
    masked = built(place, tmp_path, *flags, "--model_family", "masked")
    torch.testing.assert_close(logits_of(masked), logits_of(built(place, place.folder / "bert")), rtol=0, atol=0)


def test_model_family_masked_is_refused_for_gpt2_in_one_sentence(place: Workplace, tmp_path: Path) -> None:
    model = save_tiny_checkpoint("gpt2", tmp_path / "gpt2")
    outcome = place.call(place.argv("--model_name_or_path", str(model), "--model_family", "masked", output="refused"))
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: --model_family masked: '{model}' is of type gpt2")
    assert outcome.err.endswith("another --model_name_or_path\n")
    assert outcome.err.count("\n") == 1
