"""LoRA adapters: where they are, what counts of them, their kernels against merged weights, their way to disk and back.

The oracle knows nothing of peft: it differentiates transformers' own model at ``W + (alpha / rank) B A``.
"""

import dataclasses
import functools
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import oracle
from engine_problems import problem_of
from lmntk.errors import ModelError, SettingError
from lmntk.kernels import FORMULAS, TileRequest
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.models.checkpoints import HEAD_FILE, restore_checkpoint, restore_extras, save_checkpoint
from lmntk.models.families import AUTO_CLASSES, family_of
from lmntk.models.loading import LoadOptions, load_classifier, load_prompt_model
from lmntk.models.lora import add_adapters, is_adapter
from lmntk.models.lora_files import CONFIG_FILE, WEIGHTS_FILE, LoraSettings, stored_adapters
from lmntk.models.parameters import ParameterFilter, select_parameters
from lmntk.models.pretrained import load_config
from tiny_models import (
    CAUSAL,
    LABEL_WORDS,
    TYPICAL,
    add_noise,
    prompts_for,
    randomise_adapters,
    save_tiny_checkpoint,
    tiny_adapted_prompt_model,
    tiny_lm,
    tiny_prompt_model,
)

# SPEC: exact means 1e-12 in float64. ModernBERT rotates queries and keys in float32 whatever its dtype, so that a
# product of a sum may come out of it otherwise than a sum of two products: 2e-8 there against merged weights, 1e-12
# against the same modules with the attention that transformers has.
TOLERANCE, MERGED_MODERNBERT_TOLERANCE = 1e-12, 2e-8
SETTINGS = LoraSettings(rank=3, alpha=12)
TRAINED = ParameterFilter(only_adapters=True)
EACH = pytest.mark.parametrize("architecture", TYPICAL)

PROJECTIONS = {
    "bert": [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")],
    "roberta": [
        f"roberta.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "value")
    ],
    "distilbert": [
        f"distilbert.transformer.layer.{layer}.attention.{name}" for layer in (0, 1) for name in ("q_lin", "v_lin")
    ],
    "modernbert": [f"model.layers.{layer}.attn.Wqkv" for layer in (0, 1, 2)],
    "gpt2": [f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)],
    "opt": [f"model.decoder.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")],
    "llama": [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")],
}


def outputs_of(architecture, projection):
    """How many numbers a projection gives: queries, keys and values at once, or of two groups of four heads."""
    if projection.endswith(("Wqkv", "c_attn")):
        return 48
    return 8 if architecture == "llama" and projection.endswith("v_proj") else 16


def sides(architecture):
    return prompts_for(architecture, [4, 6, 4], seed=1), prompts_for(architecture, [5, 6], seed=2)


def load(folder, **options):
    return load_prompt_model(str(folder), load_config(str(folder)), (20, 31), LoadOptions(**options))


def adapters_of(module):
    return {name: parameter for name, parameter in module.named_parameters() if is_adapter(name)}


def batch_of_tokens():
    ids = torch.randint(6, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "mask_pos": torch.tensor([2, 5, 8])}


def batch_of_texts(architecture):
    """The same as a classifier takes it: at the first token, or the last."""
    return {**batch_of_tokens(), "mask_pos": torch.full((3,), 8 if architecture in CAUSAL else 0)}


@EACH
def test_adapters_are_on_the_query_and_value_projections_and_nowhere_else(architecture):
    plain, lm = tiny_lm(architecture), tiny_lm(architecture)
    add_adapters(lm, SETTINGS)
    shapes = {name: tuple(parameter.shape) for name, parameter in adapters_of(lm).items()}
    assert shapes == {
        f"{projection}.lora_{matrix}.default.weight": shape
        for projection in PROJECTIONS[architecture]
        for matrix, shape in (("A", (3, 16)), ("B", (outputs_of(architecture, projection), 3)))
    }
    others = {
        name.replace(".base_layer", ""): tensor for name, tensor in lm.state_dict().items() if ".lora_" not in name
    }
    assert others.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in plain.state_dict().items())


@EACH
def test_adapters_change_no_logit_at_the_start(architecture):
    model = tiny_adapted_prompt_model(architecture, SETTINGS, at_start=True)
    plain = tiny_prompt_model(architecture)
    for name, parameter in adapters_of(model).items():
        assert parameter.any() == (".lora_A." in name)
    train, _ = sides(architecture)
    for prompt in train:
        assert torch.equal(model(**prompt), plain(**prompt))
    randomise_adapters(model)
    assert not torch.allclose(model(**train[0]), plain(**train[0]), atol=1e-4)


@EACH
def test_adapters_are_drawn_with_the_seed(architecture, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    first, again, other = (load(tmp_path, lora=SETTINGS, seed=seed) for seed in (1, 1, 2))
    for name, parameter in adapters_of(first).items():
        assert torch.equal(parameter, again.get_parameter(name))
        assert torch.equal(parameter, other.get_parameter(name)) == (".lora_B." in name)
    rest = {name for name in first.state_dict() if not is_adapter(name)}
    assert all(torch.equal(first.state_dict()[name], other.state_dict()[name]) for name in rest)
    assert len({tuple(parameter.flatten().tolist()) for parameter in adapters_of(first).values()}) > 2


@EACH
@pytest.mark.parametrize("first_token", [False, True], ids=["own head", "linear layer"])
def test_classifiers_take_adapters_too(architecture, first_token, tmp_path):
    save_tiny_checkpoint(architecture, tmp_path)
    plain, model = (
        load_classifier(
            str(tmp_path),
            load_config(str(tmp_path)),
            3,
            LoadOptions(lora=lora, dtype=torch.float64),
            first_token=first_token,
        )
        for lora in (None, SETTINGS)
    )
    assert len(adapters_of(model)) == 2 * len(PROJECTIONS[architecture])
    add_noise(model.last_layer), add_noise(plain.last_layer)
    batch = batch_of_texts(architecture)
    assert torch.equal(model(**batch), plain(**batch))


def test_an_architecture_without_known_projections_is_told_the_way_out():
    lm = tiny_lm("modernbert")
    for layer in lm.model.layers:
        layer.attn.qkv_of_tomorrow = layer.attn.Wqkv
        del layer.attn.Wqkv
    with pytest.raises(ModelError, match="`apply_lora`") as caught:
        add_adapters(lm, SETTINGS)
    assert caught.value.data == {"model": "modernbert"}
    assert not adapters_of(lm)


@EACH
def test_only_adapters_and_the_head_count(architecture):
    model = tiny_adapted_prompt_model(architecture, SETTINGS)
    head = {name for name, _ in model.named_parameters() if not name.startswith(model.base_prefix)}
    assert set(select_parameters(model, TRAINED)) == set(adapters_of(model)) | head
    assert len(head) >= (1 if architecture in CAUSAL else 2)


@EACH
def test_only_adapters_combines_with_the_other_filters(architecture):
    model = tiny_adapted_prompt_model(architecture, SETTINGS)

    def kept(**others):
        return set(select_parameters(model, ParameterFilter(only_adapters=True, **others)))

    adapters, everything = set(adapters_of(model)), kept()
    assert kept(exclude_head=True) == adapters
    assert kept(exclude_embeddings=True) == everything
    if architecture in CAUSAL:  # their decoder has none
        with pytest.raises(SettingError) as caught:
            kept(only_biases=True)
        assert caught.value.data == {"setting": ["only_biases", "apply_lora"]}
    else:
        assert kept(only_biases=True) == {name for name in everything - adapters if "bias" in name}
    first_layer = {name for name in adapters if ".0." in name}
    assert kept(exclude_first_layers=1) == everything - first_layer
    assert kept(exclude_first_layers=1, exclude_head=True) == adapters - first_layer
    with pytest.raises(SettingError, match="`exclude_head` `only_biases` `apply_lora` "):
        kept(exclude_head=True, only_biases=True)


def test_without_the_filter_the_weights_below_the_adapters_count_as_well():
    model = tiny_adapted_prompt_model("bert", SETTINGS)
    names = set(select_parameters(model, ParameterFilter()))
    assert names == {name for name, _ in model.named_parameters()}
    biases = set(select_parameters(model, ParameterFilter(only_biases=True, exclude_head=True)))
    plain = {name for name, _ in tiny_prompt_model("bert").named_parameters()}
    assert {name.replace(".base_layer", "") for name in biases} == {
        name for name in plain if "bias" in name and name.startswith("lm.bert.")
    }


def merged_gradients(architecture, model, names, prompts, settings=SETTINGS):
    """The oracle's gradients of a plain model's logits by the adapters (and head) of which its weights are made."""
    lm = tiny_lm(architecture, our_attention=False).double()
    leaves = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    values = {**dict(model.named_parameters()), **leaves}
    weights = {name.removeprefix("lm."): leaves[name] for name in names if not is_adapter(name)}
    for projection in PROJECTIONS[architecture]:
        a, b = (values[f"lm.{projection}.lora_{matrix}.default.weight"] for matrix in "AB")
        stored, change = lm.get_parameter(f"{projection}.weight").detach(), settings.alpha / settings.rank * b @ a
        # GPT-2's weights are transposed.
        weights[f"{projection}.weight"] = stored + (change.T if projection.endswith("c_attn") else change)

    def logits_of(prompt):
        found = functional_call(lm, weights, kwargs={"input_ids": prompt["input_ids"]}).logits
        logits = found[torch.arange(len(found)), prompt["mask_pos"]][:, list(LABEL_WORDS)]
        return logits[:, 1:] - logits[:, :1] if model.binary_classification else logits

    return oracle.gradients(logits_of, list(leaves.values()), prompts)


def adapted_gradients(architecture, model, names, prompts):
    """The oracle's gradients of the same modules with the attention that transformers has, all positions computed."""
    lm = tiny_lm(architecture, our_attention=False)
    add_adapters(lm, SETTINGS)
    own, values = dict(lm.double().requires_grad_(True).named_parameters()), dict(model.lm.named_parameters())
    with torch.no_grad():
        for name in own.keys() & values.keys():
            own[name].copy_(values[name])
    assert {f"lm.{name}" for name in own} >= set(names)

    def logits_of(prompt):
        logits = lm(input_ids=prompt["input_ids"]).logits[:, prompt["mask_pos"][0]][:, list(LABEL_WORDS)]
        return logits[:, 1:] - logits[:, :1] if model.binary_classification else logits

    return oracle.gradients(logits_of, [own[name.removeprefix("lm.")] for name in names], prompts)


def kernel_of(engine, model, names, formula, train, x):
    """The kernel as an engine computes it: ``[N, C, X, C]``, in two directions ``[2, N, C, X, C]``."""
    problem = problem_of(model, names, train, x, formula)
    chosen = make_engine(problem, engine)
    plan = chosen.plan(TileRequest(2, 2))
    kernel = assemble(chosen.blocks(plan), plan, problem)
    return kernel if problem.formula.is_asymmetric else kernel[0]


@functools.cache
def gradients_of(architecture, binary, at_start, merged):
    model = tiny_adapted_prompt_model(architecture, SETTINGS, binary, at_start)
    find = merged_gradients if merged else adapted_gradients
    return [find(architecture, model, list(select_parameters(model, TRAINED)), side) for side in sides(architecture)]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("engine", ["factored", "jacobian"])
@EACH
def test_the_kernel_of_adapters_and_head_is_the_oracles_to_1e_12(architecture, engine, formula):
    binary = formula == "asymmetric_signgd"
    model = tiny_adapted_prompt_model(architecture, SETTINGS, binary)
    truth = oracle.kernel(*gradients_of(architecture, binary, False, merged=architecture != "modernbert"), formula)
    found = kernel_of(engine, model, list(select_parameters(model, TRAINED)), formula, *sides(architecture))
    assert oracle.relative_error(found, truth) <= TOLERANCE


@EACH
def test_the_kernel_at_the_start_is_the_oracles_to_1e_12(architecture):
    model = tiny_adapted_prompt_model(architecture, SETTINGS, at_start=True)
    truth = oracle.kernel(*gradients_of(architecture, False, True, merged=True), "sgd")
    found = kernel_of("factored", model, list(select_parameters(model, TRAINED)), "sgd", *sides(architecture))
    assert oracle.relative_error(found, truth) <= TOLERANCE


@EACH
def test_adapters_alone_give_the_kernel_of_adapters_alone_to_1e_12(architecture):
    model = tiny_adapted_prompt_model(architecture, SETTINGS)
    names = list(select_parameters(model, ParameterFilter(only_adapters=True, exclude_head=True)))
    train, x = (side[:2] for side in sides(architecture))
    of_train, of_x = (adapted_gradients(architecture, model, names, side) for side in (train, x))
    assert of_train.shape[-1] == sum(parameter.numel() for parameter in adapters_of(model).values())
    truth = oracle.kernel(of_train, of_x, "sgd")
    found = kernel_of("factored", model, names, "sgd", train, x)
    assert oracle.relative_error(found, truth) <= TOLERANCE


@pytest.mark.parametrize("architecture", ["roberta", "gpt2", "llama"])
def test_forward_mode_too_gives_the_kernel_of_adapters_to_1e_12(architecture):
    model = tiny_adapted_prompt_model(architecture, SETTINGS)
    names = list(select_parameters(model, ParameterFilter(only_adapters=True, exclude_head=True)))
    train, x = (side[:2] for side in sides(architecture))
    truth = oracle.kernel(*(merged_gradients(architecture, model, names, side) for side in (train, x)), "sgd")
    found = kernel_of("jvp", model, names, "sgd", train, x)
    assert oracle.relative_error(found, truth) <= TOLERANCE


def test_modernberts_kernel_is_that_of_merged_weights_to_2e_8():
    model = tiny_adapted_prompt_model("modernbert", SETTINGS)
    truth = oracle.kernel(*gradients_of("modernbert", False, False, merged=True), "sgd")
    found = kernel_of("factored", model, list(select_parameters(model, TRAINED)), "sgd", *sides("modernbert"))
    assert oracle.relative_error(found, truth) <= MERGED_MODERNBERT_TOLERANCE


@EACH
def test_the_scale_of_the_adapters_shows_in_their_kernel_squared_to_1e_12(architecture):
    kernels = []
    for settings in (LoraSettings(rank=3, alpha=3), LoraSettings(rank=3, alpha=12)):
        model = tiny_adapted_prompt_model(architecture, settings, at_start=True)
        names = list(select_parameters(model, ParameterFilter(only_adapters=True, exclude_head=True)))
        kernels.append(kernel_of("factored", model, names, "sgd", *sides(architecture)))
    assert oracle.relative_error(kernels[1], (12 / 3) ** 2 * kernels[0]) <= TOLERANCE


def test_every_adapter_has_factors():
    for architecture in TYPICAL:
        model = tiny_adapted_prompt_model(architecture, SETTINGS)
        problem = problem_of(model, list(select_parameters(model, TRAINED)), *sides(architecture))
        # RoBERTa's head has a bias of its own that nothing uses.
        assert set(make_engine(problem, "factored").fallback_parameters) <= {"lm.lm_head.bias"}


@pytest.fixture(params=TYPICAL)
def saved(request, tmp_path):
    """A prompt model with random adapters and a changed head, saved beside the checkpoint that it stands on."""
    save_tiny_checkpoint(request.param, tmp_path / "base")
    return save_adapted(tmp_path)


def save_adapted(folder):
    model = load(folder / "base", lora=SETTINGS)
    randomise_adapters(model)
    with torch.no_grad():
        model.last_layer.weight.mul_(1.5)
    save_checkpoint(model, folder / "saved", str(folder / "base"))
    return model, folder


def load_adapted(folder, **options):
    settings, base = stored_adapters(folder / "saved")
    return load(base, lora=settings, **options)


def test_adapters_and_head_on_disk_give_the_same_logits_and_the_same_weights_bit_for_bit(saved):
    model, folder = saved
    again = load_adapted(folder, seed=7)
    assert torch.equal(again(**batch_of_tokens()), model(**batch_of_tokens()))
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_folder_holds_adapters_and_head_and_says_what_they_stand_on(saved):
    model, folder = saved
    assert {path.name for path in (folder / "saved").iterdir()} >= {CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE}
    assert not (folder / "saved" / "model.safetensors").exists()
    settings = dataclasses.replace(SETTINGS, folder=folder / "saved")
    assert stored_adapters(folder / "saved") == (settings, str((folder / "base").resolve()))
    assert stored_adapters(folder / "base") is None
    assert len(load_file(folder / "saved" / WEIGHTS_FILE)) == len(adapters_of(model))


def test_peft_itself_reads_the_folder_and_finds_the_same_hidden_states(saved):
    model, folder = saved
    auto = AUTO_CLASSES[family_of(model.lm.config)]
    base = auto.from_pretrained(folder / "base", attn_implementation="eager")
    read = peft.PeftModel.from_pretrained(base, folder / "saved").eval()
    randomless = load(folder / "base", lora=None)
    batch = batch_of_tokens()
    with torch.no_grad():
        expected = read.base_model.model.base_model(input_ids=batch["input_ids"]).last_hidden_state
        found = model.lm.base_model(input_ids=batch["input_ids"]).last_hidden_state
        unchanged = randomless.lm.base_model(input_ids=batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(unchanged, expected, atol=1e-3)


def test_a_checkpoint_is_restored_into_the_model_that_is_trained(saved):
    model, folder = saved
    other = load(folder / "base", lora=SETTINGS, seed=9)
    restore_checkpoint(other, folder / "saved", "resume_from_checkpoint")
    assert torch.equal(other(**batch_of_tokens()), model(**batch_of_tokens()))


@pytest.fixture
def roberta(tmp_path):
    save_tiny_checkpoint("roberta", tmp_path / "base")
    return save_adapted(tmp_path)


def test_saving_asks_the_hub_for_nothing(roberta, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    model, folder = roberta
    save_checkpoint(model, folder / "of the hub", "roberta-base")
    settings = dataclasses.replace(SETTINGS, folder=folder / "of the hub")
    assert stored_adapters(folder / "of the hub") == (settings, "roberta-base")


def test_a_classifier_with_adapters_comes_back_whole_whatever_the_seed(tmp_path):
    """BERT's pooler is new beside a language model's weights: it belongs to what is kept, though it never trains."""
    for architecture in TYPICAL:
        batch = batch_of_texts(architecture)
        base, saved = tmp_path / architecture, tmp_path / f"{architecture} saved"
        save_tiny_checkpoint(architecture, base)
        for first_token in (False, True):
            first, again = (
                load_classifier(
                    str(base), load_config(str(base)), 3, LoadOptions(lora=SETTINGS, seed=seed), first_token=first_token
                )
                for seed in (1, 2)
            )
            randomise_adapters(first)
            add_noise(first.last_layer)
            save_checkpoint(first, saved, str(base))
            restore_extras(again, saved)
            assert torch.equal(first(**batch), again(**batch)), (architecture, first_token)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_refused(model, action, *parts):
    """One sentence that names all parts, and no weight changed."""
    before = state_of(model)
    with pytest.raises(ModelError) as caught:
        action()
    assert str(caught.value.data["path"]) in str(caught.value)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == [], "half loaded"


def test_adapters_of_another_rank_are_told_in_one_sentence(roberta):
    _, folder = roberta
    other = load(folder / "base", lora=LoraSettings(rank=5, alpha=12))
    assert_refused(other, lambda: restore_extras(other, folder / "saved"), folder / "saved" / WEIGHTS_FILE)

    def refused():
        restore_checkpoint(other, folder / "saved", "setting")

    assert_refused(other, refused, "`setting`: ", "does not fit")


def test_adapters_of_another_architecture_are_told_in_one_sentence(roberta):
    _, folder = roberta
    for architecture in ("bert", "distilbert", "modernbert", "gpt2", "llama"):
        save_tiny_checkpoint(architecture, folder / architecture)
        other = load(folder / architecture, lora=SETTINGS)
        assert_refused(other, lambda other=other: restore_extras(other, folder / "saved"), folder / "saved")


def test_adapters_of_fewer_or_more_layers_are_told_in_one_sentence(roberta):
    _, folder = roberta
    model = load(folder / "base", lora=SETTINGS)
    path = folder / "saved" / WEIGHTS_FILE
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in whole.items() if "layer.1." not in name}, path)
    assert_refused(model, lambda: restore_extras(model, folder / "saved"), path, "layer.1.")
    more = {re.sub(r"layer\.1\.", "layer.2.", name): tensor.clone() for name, tensor in whole.items()}
    save_file({**whole, **more}, path)
    assert_refused(model, lambda: restore_extras(model, folder / "saved"), path, "layer.2.")


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_file_of_adapters_is_told_in_one_sentence(roberta, damage):
    _, folder = roberta
    model, path = load(folder / "base", lora=SETTINGS), folder / "saved" / WEIGHTS_FILE
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -100])
    assert_refused(model, lambda: restore_extras(model, folder / "saved"), path)


@pytest.mark.parametrize("damage", ["cut", "of other classes"])
def test_a_damaged_head_is_told_before_the_adapters_are_loaded(roberta, damage):
    _, folder = roberta
    model, path = load(folder / "base", lora=SETTINGS), folder / "saved" / HEAD_FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"classifier.weight": torch.zeros(2, 16)}, path)
    assert_refused(model, lambda: restore_extras(model, folder / "saved"), path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"r": 3}', '{"r": "three", "lora_alpha": 1}', "\udcff"])
def test_a_broken_configuration_of_adapters_is_told_in_one_sentence(tmp_path, text):
    (tmp_path / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError) as caught:
        stored_adapters(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.data == {"path": tmp_path / CONFIG_FILE}
    assert str(tmp_path / CONFIG_FILE) in str(caught.value)


def test_adapters_without_a_base_are_told_in_one_sentence(roberta):
    _, folder = roberta
    path = folder / "saved" / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="cannot be read as the configuration of LoRA adapters"):
        stored_adapters(folder / "saved")
