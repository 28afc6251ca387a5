"""Models on disk: what is saved is read again bit for bit, by transformers too; what does not fit changes nothing."""

import json
import logging
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from lmntk.errors import FileError, ModelError
from lmntk.models.checkpoints import (
    HEAD_FILE,
    WEIGHTS_FILE,
    has_adapters,
    restore_checkpoint,
    save_checkpoint,
    save_tokenizer,
)
from lmntk.models.families import AUTO_CLASSES, family_of, is_causal
from lmntk.models.loading import LoadOptions, load_classifier, load_prompt_model
from lmntk.models.lora_files import LoraSettings
from lmntk.models.pretrained import load_config, load_tokenizer
from tiny_models import TYPICAL, TYPICAL_CAUSAL, add_noise, save_tiny_checkpoint, tiny_config

LABEL_WORDS = (20, 31)
SETTING = "resume_from_checkpoint"
EACH = pytest.mark.parametrize("architecture", TYPICAL)


def prompt(folder, seed=1, **options):
    return load_prompt_model(str(folder), load_config(str(folder)), LABEL_WORDS, LoadOptions(seed=seed, **options))


def classifier(folder, seed=1, first_token=False, **options):
    loaded = LoadOptions(seed=seed, **options)
    return load_classifier(str(folder), load_config(str(folder)), 3, loaded, first_token=first_token)


def first_token(folder, seed=1, **options):
    return classifier(folder, seed, first_token=True, **options)


LOADERS = {"prompt": prompt, "own head": classifier, "linear layer": first_token}
KINDS = pytest.mark.parametrize("build", LOADERS.values(), ids=LOADERS)


def batch_of_tokens():
    ids = torch.randint(6, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "mask_pos": torch.tensor([2, 5, 8]), "attention_mask": mask}


def batch_for(model):
    """Prompts predict where their mask is, plain text at its first token; a causal model at the last of either."""
    batch = batch_of_tokens()
    if is_causal(model.lm.config):
        batch["mask_pos"] = batch["attention_mask"].sum(dim=1) - 1
    elif not model.label_word_ids:
        batch["mask_pos"] = torch.zeros_like(batch["mask_pos"])
    return batch


def logits_of(model):
    with torch.no_grad():
        return model(**batch_for(model))


def trained(build, folder, seed=1, **options):
    """A model whose every weight has moved away from its checkpoint's, as in training."""
    model = build(folder, **options)
    add_noise(model, seed)
    return model


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, other):
    expected, found = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert torch.equal(logits_of(other), logits_of(model))


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@KINDS
@EACH
def test_a_checkpoint_gives_a_model_its_weights_back_bit_for_bit(architecture, build, tmp_path):
    base, saved = save_tiny_checkpoint(architecture, tmp_path / "base"), tmp_path / "deep" / "down" / "saved"
    model = trained(build, base)
    save_checkpoint(model, saved, str(base))
    again = build(base, seed=2)
    assert not torch.equal(logits_of(again), logits_of(model))
    memory = {name: tensor.data_ptr() for name, tensor in again.state_dict().items()}
    restore_checkpoint(again, saved, SETTING)
    assert_same(model, again)
    # An optimizer that holds the parameters goes on with them.
    assert memory == {name: tensor.data_ptr() for name, tensor in again.state_dict().items()}


@KINDS
@EACH
def test_a_saved_model_is_a_checkpoint_that_loads_again_bit_for_bit(architecture, build, tmp_path, caplog):
    base, saved = save_tiny_checkpoint(architecture, tmp_path / "base"), tmp_path / "saved"
    model = trained(build, base)
    save_checkpoint(model, saved, str(base))
    caplog.clear()
    again = build(saved, seed=2)
    assert_same(model, again)
    assert warnings_in(caplog) == []


@EACH
def test_a_decoder_that_was_trained_apart_from_the_embeddings_stays_apart(architecture, tmp_path):
    base, saved = save_tiny_checkpoint(architecture, tmp_path / "base"), tmp_path / "saved"
    model = prompt(base)
    words = model.lm.get_input_embeddings().weight.clone()
    with torch.no_grad():
        model.last_layer.weight[list(LABEL_WORDS)] += 1.0
    save_checkpoint(model, saved, str(base))
    again = prompt(saved)
    assert torch.equal(again.lm.get_input_embeddings().weight, words)
    assert torch.equal(again.last_layer.weight, model.last_layer.weight)
    changed = (again.last_layer.weight != words).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(LABEL_WORDS)
    assert again.last_layer.weight.data_ptr() != again.lm.get_input_embeddings().weight.data_ptr()


@EACH
def test_transformers_itself_reads_a_prompt_model_and_gives_its_logits_to_1e_5(architecture, tmp_path):
    base, saved = save_tiny_checkpoint(architecture, tmp_path / "base"), tmp_path / "saved"
    model = trained(prompt, base)
    save_checkpoint(model, saved, str(base))
    auto = AUTO_CLASSES[family_of(AutoConfig.from_pretrained(saved))]
    plain, report = auto.from_pretrained(saved, output_loading_info=True)
    # A bias that transformers knows by a second name, which nothing uses beside the first, may be told as missing.
    assert all(name.endswith(".bias") for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    batch = batch_for(model)
    with torch.no_grad():
        found = plain.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = found[torch.arange(3), batch["mask_pos"]][:, list(LABEL_WORDS)]
    torch.testing.assert_close(found, logits_of(model), rtol=1e-5, atol=1e-5)


@EACH
def test_transformers_itself_reads_a_classifier_and_gives_its_logits_to_1e_5(architecture, tmp_path):
    base, saved = save_tiny_checkpoint(architecture, tmp_path / "base"), tmp_path / "saved"
    model = trained(classifier, base)
    save_checkpoint(model, saved, str(base))
    plain = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    batch = batch_of_tokens()
    # Transformers finds a causal model's last token by what pads, which GPT-2's tokenizer does not know.
    plain.config.pad_token_id = padding = 1
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)
    with torch.no_grad():
        found = plain(ids, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, logits_of(model), rtol=1e-5, atol=1e-5)


@EACH
def test_transformers_itself_reads_the_encoder_below_a_linear_layer_to_1e_5(architecture, tmp_path):
    base, saved = save_tiny_checkpoint(architecture, tmp_path / "base"), tmp_path / "saved"
    model = trained(first_token, base)
    save_checkpoint(model, saved, str(base))
    plain, batch = AutoModel.from_pretrained(saved).eval(), batch_for(model)
    with torch.no_grad():
        hidden = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    hidden = hidden[torch.arange(3), batch["mask_pos"]]
    head = load_file(saved / HEAD_FILE)
    found = hidden @ head["classifier.weight"].T + head["classifier.bias"]
    torch.testing.assert_close(found, logits_of(model), rtol=1e-5, atol=1e-5)


def test_berts_ten_segments_are_saved(tmp_path):
    base, saved = save_tiny_checkpoint("bert", tmp_path / "base"), tmp_path / "saved"
    model = prompt(base, random_segment=True)
    save_checkpoint(model, saved, str(base))
    assert json.loads((saved / "config.json").read_text())["type_vocab_size"] == 10
    again = prompt(saved, seed=5, random_segment=True)
    segments = {"token_type_ids": torch.arange(9).expand(3, 9)}
    batch = {**batch_of_tokens(), **segments}
    assert torch.equal(model(**batch), again(**batch))
    assert not torch.equal(model(**batch), logits_of(model))


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_checkpoints_with_old_names_are_saved_with_todays_and_read_again(architecture, tmp_path, caplog):
    base, saved = save_tiny_checkpoint(architecture, tmp_path / "base"), tmp_path / "saved"
    weights = {name: tensor.clone() for name, tensor in load_file(base / WEIGHTS_FILE).items()}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old_name(name):
        for today, before in old.items():
            name = name.replace(today, before)
        return name

    save_file({old_name(n): tensor for n, tensor in weights.items()}, base / WEIGHTS_FILE, metadata={"format": "pt"})
    model = trained(prompt, base)
    save_checkpoint(model, saved, str(base))
    names = set(load_file(saved / WEIGHTS_FILE))
    assert not [name for name in names if name.endswith(("gamma", "beta"))]
    caplog.clear()
    assert_same(model, prompt(saved, seed=2))
    assert warnings_in(caplog) == []
    again = prompt(base)
    restore_checkpoint(again, saved, SETTING)
    assert_same(model, again)


@KINDS
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_second_generation_is_the_first(architecture, build, tmp_path):
    base = save_tiny_checkpoint(architecture, tmp_path / "base")
    model = trained(build, base)
    save_checkpoint(model, tmp_path / "one", str(base))
    save_checkpoint(build(tmp_path / "one"), tmp_path / "two", str(tmp_path / "one"))
    assert_same(model, build(tmp_path / "two"))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_saving_changes_nothing_of_the_model(architecture, tmp_path):
    base = save_tiny_checkpoint(architecture, tmp_path / "base")
    for build in LOADERS.values():
        model = trained(build, base)
        before, logits = state_of(model), logits_of(model)
        save_checkpoint(model, tmp_path / "saved", str(base))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(logits_of(model), logits)


def test_of_an_earlier_model_in_the_folder_nothing_stays_that_would_be_taken_for_this_ones(tmp_path):
    base, saved = save_tiny_checkpoint("roberta", tmp_path / "base"), tmp_path / "saved"
    lora = LoraSettings(rank=3, alpha=6)
    builders = [
        lambda: trained(first_token, base),
        lambda: trained(prompt, base, lora=lora),
        lambda: trained(classifier, base),
        lambda: trained(first_token, base, lora=lora),
        lambda: trained(prompt, base),
    ]
    for build in builders:
        model = build()
        save_checkpoint(model, saved, str(base))
        fresh = tmp_path / "fresh"
        save_checkpoint(model, fresh, str(base))
        assert (fresh / "adapter_config.json").exists() == has_adapters(model)
        for name in (HEAD_FILE, "adapter_config.json", "adapter_model.safetensors"):
            assert (saved / name).exists() == (fresh / name).exists(), name
        if not has_adapters(model):
            assert load_file(saved / WEIGHTS_FILE).keys() == load_file(fresh / WEIGHTS_FILE).keys()
        for path in fresh.iterdir():
            path.unlink()


def test_adapters_saved_beside_the_weights_that_they_stand_on_leave_these_alone(tmp_path):
    base = save_tiny_checkpoint("roberta", tmp_path / "base")
    before = (base / WEIGHTS_FILE).read_bytes()
    save_checkpoint(trained(prompt, base, lora=LoraSettings(3, 6)), base, str(base))
    assert (base / WEIGHTS_FILE).read_bytes() == before
    assert (base / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("limit", [10, 2000])
def test_a_disk_that_is_full_for_a_tokenizer_is_told(tmp_path, limit):
    """A limit on the size of files stands for the full disk."""
    tokenizer = load_tokenizer(str(save_tiny_checkpoint("roberta", tmp_path / "model")))
    (tmp_path / "saved").mkdir()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(FileError, match="cannot write the tokenizer") as caught:
            save_tokenizer(tokenizer, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.data == {"path": tmp_path / "saved"}


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    base, saved = save_tiny_checkpoint("bert", tmp_path / "base"), tmp_path / "saved"
    saved.mkdir()
    (saved / "trainer_state.json").write_text("{}")
    (saved / "notes.safetensors").write_text("mine")
    save_checkpoint(trained(prompt, base), saved, str(base))
    assert (saved / "trainer_state.json").read_text() == "{}"
    assert (saved / "notes.safetensors").read_text() == "mine"


def assert_refused(model, folder, *parts):
    """One sentence that names the setting, the folder and all parts; and no weight of the model is changed."""
    before = state_of(model)
    with pytest.raises(ModelError) as caught:
        restore_checkpoint(model, folder, SETTING)
    message = str(caught.value)
    assert folder in (caught.value.data["path"], caught.value.data["path"].parent)
    assert "\n" not in message
    for part in (SETTING, folder, *parts):
        assert str(part) in message, message
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [], "half loaded"


@KINDS
@pytest.mark.parametrize("other", ["roberta", "distilbert", "modernbert", *TYPICAL_CAUSAL])
def test_a_checkpoint_of_another_architecture_is_refused(build, other, tmp_path):
    model = build(save_tiny_checkpoint("bert", tmp_path / "base"))
    theirs = save_tiny_checkpoint(other, tmp_path / other)
    save_checkpoint(build(theirs), tmp_path / "saved", str(theirs))
    assert_refused(model, tmp_path / "saved", "another model or architecture")


@KINDS
@pytest.mark.parametrize("change", [{"intermediate_size": 40}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_a_checkpoint_of_another_size_is_refused(build, change, tmp_path):
    base = save_tiny_checkpoint("bert", tmp_path / "base")
    config = load_config(str(base))
    for name, value in change.items():
        setattr(config, name, value)
    options = LoadOptions(random_init=True)
    if build is prompt:
        other = load_prompt_model(str(base), config, LABEL_WORDS, options)
    else:
        other = load_classifier(str(base), config, 3, options, first_token=build is first_token)
    save_checkpoint(other, tmp_path / "saved", str(base))
    assert_refused(build(base), tmp_path / "saved", "does not fit")


@pytest.mark.parametrize("build", [classifier, first_token], ids=["own head", "linear layer"])
def test_a_checkpoint_for_other_classes_is_refused(build, tmp_path):
    base = save_tiny_checkpoint("bert", tmp_path / "base")
    other = load_classifier(str(base), load_config(str(base)), 4, first_token=build is first_token)
    add_noise(other)
    save_checkpoint(other, tmp_path / "saved", str(base))
    assert_refused(build(base), tmp_path / "saved")


def test_a_checkpoint_of_another_kind_of_head_is_refused(tmp_path):
    base = save_tiny_checkpoint("bert", tmp_path / "base")
    for saved_as, build in LOADERS.items():
        save_checkpoint(trained(build, base), tmp_path / saved_as, str(base))
    for saved_as in LOADERS:
        for asked, build in LOADERS.items():
            if asked != saved_as:
                assert_refused(build(base), tmp_path / saved_as)


@pytest.mark.parametrize("damage", ["cut in the middle", "cut in its header", "empty", "missing"])
def test_a_damaged_file_of_weights_is_refused(damage, tmp_path):
    build = first_token  # whose head, beside it, is whole
    base, saved = save_tiny_checkpoint("roberta", tmp_path / "base"), tmp_path / "saved"
    save_checkpoint(trained(build, base), saved, str(base))
    path = saved / WEIGHTS_FILE
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: {"cut in the middle": len(whole) // 2, "cut in its header": 100, "empty": 0}[damage]])
    assert_refused(build(base), saved, WEIGHTS_FILE)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_file_of_the_head_is_refused_before_anything_is_loaded(damage, tmp_path):
    base, saved = save_tiny_checkpoint("roberta", tmp_path / "base"), tmp_path / "saved"
    save_checkpoint(trained(first_token, base), saved, str(base))
    path = saved / HEAD_FILE
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    assert_refused(first_token(base), saved, HEAD_FILE)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    model = prompt(save_tiny_checkpoint("bert", tmp_path / "base"))
    assert_refused(model, tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_head_beside_adapters_is_refused_before_anything_is_loaded(damage, tmp_path):
    base, saved, lora = (
        save_tiny_checkpoint("roberta", tmp_path / "base"),
        tmp_path / "saved",
        LoraSettings(rank=3, alpha=6),
    )
    save_checkpoint(trained(prompt, base, lora=lora), saved, str(base))
    path = saved / HEAD_FILE
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    assert_refused(prompt(base, lora=lora), saved, HEAD_FILE)


def test_adapters_and_whole_models_are_told_apart(tmp_path):
    base, lora = save_tiny_checkpoint("roberta", tmp_path / "base"), LoraSettings(rank=3, alpha=6)
    save_checkpoint(prompt(base, lora=lora), tmp_path / "adapters", str(base))
    save_checkpoint(prompt(base), tmp_path / "whole", str(base))
    assert_refused(prompt(base), tmp_path / "adapters", "holds LoRA adapters: add `apply_lora=True`")
    assert_refused(prompt(base, lora=lora), tmp_path / "whole", "holds no LoRA adapters: leave `apply_lora` out")


def test_a_checkpoint_with_another_vocabulary_is_refused(tmp_path):
    base = save_tiny_checkpoint("bert", tmp_path / "base")
    other = tiny_config("bert", vocab_size=50)
    drawn = load_prompt_model(str(base), other, LABEL_WORDS, LoadOptions(random_init=True))
    save_checkpoint(drawn, tmp_path / "saved", str(base))
    assert_refused(prompt(base), tmp_path / "saved", "another model or architecture")
