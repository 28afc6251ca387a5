"""Adapters that peft has written, in every form: logits against peft's own model, kernels against autograd on it."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import oracle
from command_line import Workplace
from engine_problems import problem_of
from lmntk.errors import ModelError, NotFiniteError
from lmntk.kernels import TileRequest
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.models.checkpoints import has_adapters, restore_checkpoint, save_checkpoint
from lmntk.models.families import AUTO_CLASSES, family_of
from lmntk.models.loading import LoadOptions, load_classifier, load_prompt_model
from lmntk.models.lora_files import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE, stored_adapters
from lmntk.models.parameters import ParameterFilter, select_parameters
from lmntk.models.pretrained import load_config
from lmntk.models.rms_norm import use_plain_rms_norms
from tiny_models import OTHER_ATTENTION, prompts_for, save_tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # what peft advises on training

SEED, LABEL_WORDS = 42, (20, 31)
# Float32 logits of size 1 to 10, whose sums have another order on each processor, and which change by a tenth where an
# adapter is not read; float64 kernels as SPEC has it.
LOGITS_TOLERANCE, KERNEL_TOLERANCE = 2e-5, 1e-12
PROJECTIONS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "olora", "pissa", "pissa_niter_4", "mica")
BLOCKS = {"target_modules_bd_b": ["query", "value", "q_proj", "v_proj"], "nblocks": 2}
FORMS = {
    **{f"init {init}": {"init_lora_weights": init} for init in INITIALISATIONS},
    "other projections": {"target_modules": ["key", "dense", "c_proj", "k_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "a pattern of names": {"target_modules": r".*1\..*\.(query|c_attn|q_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "embeddings": {"target_modules": ["word_embeddings", "wte", "embed_tokens"]},
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "biases of their own": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks and scales by name": {"rank_pattern": {".*1.*": 2}, "alpha_pattern": {".*0.*": 3}},
    "dropout": {"lora_dropout": 0.5},
    "a head of their own": {"modules_to_save": ["cls", "lm_head"]},
    "embeddings of their own": {"modules_to_save": ["word_embeddings", "wte", "embed_tokens"]},
    "blocks": {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(**BLOCKS)},
    "kasa": {"kasa_config": peft.tuners.lora.config.KasaConfig()},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
}
# peft has them not for GPT-2's transposed layers, or not for its list of layers.
NOT_OF_GPT2 = {"init olora", "blocks", "kasa", "repeated layers"}
EACH = [(name, "bert") for name in FORMS] + [("repeated layers", "llama"), ("dora", "llama"), ("init pissa", "llama")]
EACH += [(name, "gpt2") for name in ("init True", "init pissa", "init mica", "all linear", "all biases", "dora")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: save_tiny_checkpoint(name, tmp_path_factory.mktemp(name)) for name in PROJECTIONS}


def read(base, dtype=torch.float32):
    """A model as transformers reads it, its decoder untied."""
    config = load_config(str(base))
    lm = AUTO_CLASSES[family_of(config)].from_pretrained(base, attn_implementation=OTHER_ATTENTION[config.model_type])
    decoder = lm.get_output_embeddings()
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    return lm.to(dtype)


def shake(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))


def write(base, folder, architecture, safe=True, **settings):
    """What a user of peft has after some training."""
    torch.manual_seed(SEED)
    config = peft.LoraConfig(r=4, lora_alpha=16, **{"target_modules": PROJECTIONS[architecture], **settings})
    model = peft.get_peft_model(read(base), config)
    shake(model)
    model.save_pretrained(folder, safe_serialization=safe)
    return folder


def rewrite(folder, **settings):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def by_peft(base, folder):
    torch.manual_seed(SEED)
    return peft.PeftModel.from_pretrained(read(base), folder, is_trainable=True).eval()


def load(folder, **options):
    settings, base = stored_adapters(folder)
    return load_prompt_model(base, load_config(base), LABEL_WORDS, LoadOptions(lora=settings, seed=SEED, **options))


def tokens():
    ids = torch.randint(6, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "mask_pos": torch.full((3,), 8)}


def logits_of(model, batch):
    return model(input_ids=batch["input_ids"]).logits[:, 8, list(LABEL_WORDS)].detach()


def assert_close(found, expected, tolerance=LOGITS_TOLERANCE):
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("form", "architecture"), EACH)
def test_the_logits_are_those_of_peft_itself_and_so_is_what_counts(form, architecture, bases, tmp_path):
    folder = write(bases[architecture], tmp_path, architecture, **FORMS[form])
    model, truth = load(folder), by_peft(bases[architecture], folder)
    assert_close(model(**tokens()), logits_of(truth, tokens()))
    assert not torch.allclose(logits_of(read(bases[architecture]), tokens()), logits_of(truth, tokens()), atol=1e-2)
    counted = select_parameters(model, ParameterFilter(only_adapters=True, exclude_head=True))
    trained = {plain(name) for name, parameter in truth.named_parameters() if parameter.requires_grad}
    prefix = model.base_prefix.removeprefix("lm.")
    assert {name.removeprefix("lm.") for name in counted} == {name for name in trained if name.startswith(prefix)}


def plain(name):
    """A parameter's name in peft's model without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


KERNELS = ["init pissa", "init mica", "biases of adapted layers", "biases of their own", "dora", "kasa", "blocks"]
KERNELS += ["ranks and scales by name", "embeddings", "embeddings of their own", "repeated layers", "all linear"]


@pytest.mark.parametrize(
    ("form", "architecture", "engine", "formula"),
    [(form, "bert", "factored", "sgd") for form in KERNELS]
    + [(form, "bert", "jacobian", "signgd") for form in ("dora", "biases of adapted layers")]
    + [("dora", "gpt2", "factored", "sgd"), ("all biases", "gpt2", "factored", "sgd")]
    + [("dora", "bert", "jvp", "sgd"), ("init pissa", "bert", "jvp", "sgd")],
)
def test_the_kernel_over_what_peft_trains_and_the_head_is_the_oracles_on_pefts_model_to_1e_12(
    form, architecture, engine, formula, bases, tmp_path
):
    folder = write(bases[architecture], tmp_path, architecture, **FORMS[form])
    model = load(folder, dtype=torch.float64)
    names = list(select_parameters(model, ParameterFilter(only_adapters=True)))
    truth = by_peft(bases[architecture], folder).double().requires_grad_(True)
    use_plain_rms_norms(truth)
    named = truth.named_parameters(remove_duplicate=False)
    own = {plain(name): parameter for name, parameter in named if "original_module" not in name}
    sides = [prompts_for(architecture, [4, 6, 4], seed=1), prompts_for(architecture, [5, 6], seed=2)]

    def asked(prompt):
        logits = truth(input_ids=prompt["input_ids"]).logits
        return logits[:, prompt["mask_pos"][0]][:, list(LABEL_WORDS)]

    gradients = [oracle.gradients(asked, [own[name.removeprefix("lm.")] for name in names], side) for side in sides]
    problem = problem_of(model, names, *sides, formula)
    chosen = make_engine(problem, engine)
    plan = chosen.plan(TileRequest(2, 2))
    found = assemble(chosen.blocks(plan), plan, problem)[0]
    assert oracle.relative_error(found, oracle.kernel(*gradients, formula)) <= KERNEL_TOLERANCE


@pytest.mark.parametrize("form", ["init pissa", "all biases", "dora", "a head of their own", "embeddings of their own"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_what_is_saved_of_them_is_read_again_by_us_and_by_peft(form, architecture, bases, tmp_path):
    model = load(write(bases[architecture], tmp_path / "theirs", architecture, **FORMS[form]))
    before = model(**tokens())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name in select_parameters(model, ParameterFilter(only_adapters=True, exclude_head=True))
        )
    shake(model)
    trained = model(**tokens())
    save_checkpoint(model, tmp_path / "ours", str(bases[architecture]))
    assert_close(load(tmp_path / "ours")(**tokens()), trained.detach(), 0)
    assert_close(logits_of(by_peft(bases[architecture], tmp_path / "ours"), tokens()), trained.detach())
    assert not torch.allclose(before, trained, atol=1e-3)
    resumed = load(tmp_path / "theirs")
    restore_checkpoint(resumed, tmp_path / "ours", "resume_from_checkpoint")
    assert_close(resumed(**tokens()), trained.detach(), 0)


def test_weights_that_peft_has_pickled_are_read_too(bases, tmp_path):
    folder = write(bases["bert"], tmp_path, "bert", safe=False)
    assert not (folder / WEIGHTS_FILE).exists()
    assert_close(load(folder)(**tokens()), logits_of(by_peft(bases["bert"], folder), tokens()))


@pytest.mark.parametrize(
    "content", [b"", b"no zip", {"a": 1}, [torch.zeros(1)]], ids=["empty", "text", "no tensors", "list"]
)
def test_pickled_weights_that_are_none_are_told_in_one_sentence(content, bases, tmp_path):
    path = write(bases["bert"], tmp_path, "bert", safe=False) / PICKLED_WEIGHTS_FILE
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert caught.value.data == {"path": path}
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_that_peft_converted_to_plain_ones_give_the_logits_of_the_model_that_was_trained(bases, tmp_path):
    torch.manual_seed(SEED)
    settings = {"target_modules": PROJECTIONS["bert"], "init_lora_weights": "pissa"}
    model = peft.get_peft_model(read(bases["bert"]), peft.LoraConfig(r=4, lora_alpha=16, **settings))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    shake(model)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = load(tmp_path / "end")
    assert stored_adapters(tmp_path / "end")[0].rank == 8
    assert_close(converted(**tokens()), logits_of(model.eval(), tokens()))


def test_adapters_of_a_classifier_bring_its_head(bases, tmp_path, caplog):
    base = bases["bert"]
    config = load_config(str(base))
    config.num_labels = 3
    torch.manual_seed(SEED)
    lm = AutoModelForSequenceClassification.from_pretrained(base, config=config, attn_implementation="eager")
    model = peft.get_peft_model(
        lm, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "key"], bias="all")
    )
    shake(model)
    model.save_pretrained(tmp_path)
    settings, stored = stored_adapters(tmp_path)
    found = load_classifier(stored, load_config(stored), 3, LoadOptions(lora=settings))
    # The checkpoint of a language model has no pooler, and peft does not keep one: both are drawn with a seed.
    found.lm.bert.pooler.load_state_dict(lm.bert.pooler.state_dict())
    batch = {**tokens(), "mask_pos": torch.zeros(3, dtype=torch.long)}
    assert_close(found(**batch), model.eval()(input_ids=batch["input_ids"]).logits.detach())
    drawn = next(message for message in caplog.messages if "drawn at random" in message)
    assert "pooler" in drawn and "classifier" not in drawn
    assert "holds adapters but no head" not in caplog.text
    with pytest.raises(ModelError, match="`few_shot_type`"):
        load(tmp_path)
    with pytest.raises(ModelError, match="classifier.* does not fit"):
        load_classifier(stored, load_config(stored), 2, LoadOptions(lora=settings))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_adapters_of_an_encoder_alone_and_of_a_model_with_a_head_go_on_either(architecture, bases, tmp_path):
    base = bases[architecture]
    lm = read(base)
    torch.manual_seed(SEED)
    config = peft.LoraConfig(r=4, target_modules=PROJECTIONS[architecture], fan_in_fan_out=architecture == "gpt2")
    encoder = peft.get_peft_model(lm.base_model, config)
    shake(encoder)
    encoder.save_pretrained(tmp_path / "alone")
    truth = logits_of(lm.eval(), tokens())
    assert_close(load(tmp_path / "alone")(**tokens()), truth)
    whole = peft.get_peft_model(read(base), config)
    whole.load_state_dict({f"base_model.model.{name}": tensor for name, tensor in lm.state_dict().items()})
    whole.save_pretrained(tmp_path / "whole")
    states = []
    for folder in (tmp_path / "alone", tmp_path / "whole"):
        assert_close(load(folder)(**tokens()), truth)
        settings, stored = stored_adapters(folder)
        classifier = load_classifier(stored, load_config(stored), 3, LoadOptions(lora=settings), first_token=True)
        assert has_adapters(classifier)
        states.append(classifier.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"peft_type": "IA3"}, "is of adapters of the kind IA3: name a folder of LoRA adapters"),
        ({"peft_type": "PREFIX_TUNING"}, "is of adapters of the kind PREFIX_TUNING"),
        ({"peft_type": "ADALORA"}, "is of adapters of the kind ADALORA"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set, so these adapters are switched on"),
        ({"arrow_config": {"top_k": 2}}, "are chosen among by a router (Arrow)"),
        ({"velora_config": {"num_groups": 4}}, "have approximate gradients (VeLoRA)"),
        ({"monteclora_config": {"num_samples": 4}}, "are drawn at random at every call (MonteCLoRA)"),
        ({"target_parameters": ["dense.weight"]}, "stand on single parameters"),
        ({"trainable_token_indices": [5]}, "change the embeddings of single tokens"),
        ({"ensure_weight_tying": True}, "are tied between word embeddings and decoder"),
        ({"r": 0}, "the rank r is 0, and a whole number of 1 or more is needed"),
        ({"r": 4.5}, "the rank r is 4.5"),
        ({"r": 10**12}, "says rank 1000000000000, and no matrix in adapter_model.safetensors beside it has that rank"),
        ({"base_model_name_or_path": "a/b", "revision": "v2"}, "asks for revision v2 of 'a/b'"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', and a finite number is needed"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path names no model"),
        ({"init_lora_weights": "corda"}, "initialised by corda belong to changed weights: write them with peft's"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "initialised by loftq belong to changed"),
        ({"init_lora_weights": "pissa_niter_x"}, "peft cannot put the adapters in"),
        ({"init_lora_weights": "tomorrow"}, "peft cannot put the adapters in"),
        ({"setting_of_tomorrow": 1}, "does not know the setting setting_of_tomorrow of these adapters"),
        ({"target_modules": ["nothing"]}, "peft cannot put the adapters in"),
        ({"target_modules": ["query", "decoder"]}, "the layer that gives the logits"),
        ({"target_modules": ["query"]}, "does not hold LoRA adapters for this model (bert.encoder.layer.0"),
        ({"bias": "some"}, "peft cannot put the adapters in"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_called_by_its_name_in_one_sentence(changed, part, bases, tmp_path):
    rewrite(write(bases["bert"], tmp_path, "bert"), **changed)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert part in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_quantised_adapters_are_refused(bases, tmp_path):
    path = write(bases["bert"], tmp_path, "bert") / WEIGHTS_FILE
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({**weights, name: (20 * weights[name]).to(torch.int8)}, path)
    with pytest.raises(ModelError, match="as int8: ") as caught:
        load(tmp_path)
    assert caught.value.data == {"path": path, "parameter": name}


def test_the_folder_above_adapters_says_where_they_are(bases, tmp_path):
    write(bases["bert"], tmp_path / "second", "bert")
    write(bases["bert"], tmp_path / "first", "bert")
    with pytest.raises(ModelError, match="name one of first, second"):
        load_config(str(tmp_path))


def test_a_configuration_nested_too_deeply_is_told_in_one_sentence(bases, tmp_path):
    path = write(bases["bert"], tmp_path, "bert") / CONFIG_FILE
    path.write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read as the configuration of LoRA adapters"):
        load(tmp_path)


def test_adapters_of_half_precision_are_those_that_peft_makes_of_them(bases, tmp_path):
    path = write(bases["bert"], tmp_path, "bert") / WEIGHTS_FILE
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert_close(load(tmp_path)(**tokens()), logits_of(by_peft(bases["bert"], tmp_path), tokens()))


def test_a_setting_that_no_one_has_set_is_no_hindrance(bases, tmp_path):
    rewrite(write(bases["bert"], tmp_path, "bert"), setting_of_tomorrow=None)
    load(tmp_path)


def test_an_initialisation_that_peft_does_not_repeat_on_transposed_layers_is_refused(bases, tmp_path):
    rewrite(write(bases["gpt2"], tmp_path, "gpt2"), init_lora_weights="olora")
    with pytest.raises(ModelError, match="on transformer.h.0.attn.c_attn, whose weight is stored transposed"):
        load(tmp_path)


def test_layers_that_a_configuration_tells_one_by_one_cannot_be_repeated(tmp_path):
    """The forward pass of peft's own model fails there."""
    base = save_tiny_checkpoint("qwen2", tmp_path / "base")
    with pytest.raises(ModelError, match="repeat layers .layer_replication., which qwen2 cannot do"):
        load(write(base, tmp_path / "adapters", "llama", **FORMS["repeated layers"]))


@pytest.mark.parametrize(
    ("initialised", "said"), [("lora_ga", "those that peft gives, not those of the model that was trained"),
                              ("pissa_niter_2", "another seed gives slightly different logits")],
)  # fmt: skip
def test_an_initialisation_whose_logits_peft_itself_does_not_repeat_is_warned_of(
    initialised, said, bases, tmp_path, caplog
):
    rewrite(write(bases["bert"], tmp_path, "bert"), init_lora_weights=initialised)
    assert_close(load(tmp_path)(**tokens()), logits_of(by_peft(bases["bert"], tmp_path), tokens()))
    assert said in caplog.text


def test_what_a_kernel_file_says_of_them_tells_forms_apart_and_not_places(bases, tmp_path):
    described = {}
    for form in (
        "init True",
        "rslora",
        "dora",
        "biases of adapted layers",
        "init mica",
        "other projections",
        "dropout",
    ):
        settings, _ = stored_adapters(write(bases["bert"], tmp_path / form, "bert", **FORMS[form]))
        described[form] = settings.description
    alike = [described.pop(form) for form in ("init True", "other projections", "dropout")]
    assert alike == [{"rank": 4, "alpha": 16}] * 3
    assert described == {
        "rslora": {"rank": 4, "alpha": 16, "use_rslora": True},
        "dora": {"rank": 4, "alpha": 16, "use_dora": True},
        "biases of adapted layers": {"rank": 4, "alpha": 16, "bias": "lora_only"},
        "init mica": {"rank": 4, "alpha": 16, "init_lora_weights": "mica"},
    }


def test_adapters_beside_the_weights_that_they_stand_on_are_put_on_once(tmp_path):
    base = save_tiny_checkpoint("bert", tmp_path / "base")
    separate = write(base, tmp_path / "separate", "bert")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (base / name).write_bytes((separate / name).read_bytes())
    model = load(base)
    expected = load(separate)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert_close(model(**tokens()), expected(**tokens()).detach(), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_no_number_is_named(value, bases, tmp_path):
    torch.manual_seed(SEED)
    config = peft.LoraConfig(r=4, target_modules=PROJECTIONS["bert"])
    model = peft.get_peft_model(read(bases["bert"]), config)
    name = "bert.encoder.layer.1.attention.self.value.lora_B"
    model.base_model.model.get_submodule(name).default.weight.data[3, 1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(NotFiniteError, match="NaN|infinity") as caught:
        load(tmp_path)
    assert caught.value.data == {"parameter": f"base_model.model.{name}.weight"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("command line"))


def refused(place, *flags, output):
    """What a command says that ends with status 2."""
    outcome = place.call(place.argv(*flags, output=output))
    assert outcome.status == 2 and "Traceback" not in outcome.err, outcome.err
    return outcome.err


ON_ROBERTA = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "key"]}


def written_beside(place, name, **settings):
    torch.manual_seed(SEED)
    lm = AutoModelForMaskedLM.from_pretrained(place.model, attn_implementation="eager")
    model = peft.get_peft_model(lm, peft.LoraConfig(**ON_ROBERTA, **settings))
    shake(model)
    model.save_pretrained(place.folder / name)
    return ["--model_name_or_path", str(place.folder / name), "--apply_lora"]


def test_run_py_computes_kernels_of_them_and_takes_them_for_no_others(place):
    flags = written_beside(place, "adapters", init_lora_weights="pissa", bias="lora_only")
    folder = place.run(*flags, output="kernels")
    kernel, _ = torch.load(folder / "train_kernels_sst-2.pt", weights_only=True)
    description = json.loads((folder / "train_kernels_sst-2.json").read_text())
    assert description["lora"] == {"rank": 4, "alpha": 16, "bias": "lora_only", "init_lora_weights": "pissa"}
    words = load_config(str(place.model)).vocab_size
    head = (16 + 1) * 16 + 2 * 16 + (16 + 1) * words  # its dense layer, its norm, the decoder
    assert description["grad_dim"] == 2 * 2 * (2 * 4 * 16 + 16) + head
    place.run(*flags, output="kernels")  # they are used again
    assert "--lora_r is 8, but the adapters" in refused(place, *flags, "--lora_r", "8", output="kernels")
    rewrite(place.folder / "adapters", use_rslora=True)  # not a weight differs
    assert "lora" in refused(place, *flags, output="kernels")
    again = place.run(*flags, "--overwrite_kernels", output="kernels")
    other, _ = torch.load(again / "train_kernels_sst-2.pt", weights_only=True)
    assert oracle.relative_error(other, kernel) > 0.01


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "olora", "bias": "lora_only"}, {"init_lora_weights": "mica"}]
)
def test_run_py_trains_what_peft_trains_and_goes_on_from_there(settings, place):
    name = settings["init_lora_weights"]
    flags = written_beside(place, name, **settings)
    tuned = place.run(
        *flags, "--trainer", "standard", "--max_steps", "3", "--learning_rate", "0.1", output=f"tuned {name}"
    )
    before, after = load_file(place.folder / name / WEIGHTS_FILE), load_file(tuned / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    frozen = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    # A key's bias moves all scores of a query alike. With MiCA the matrices B stay.
    assert {part for part in frozen if not part.endswith("key.base_layer.bias")} == {
        part for part in before if name == "mica" and "lora_B" in part
    }
    asked = (
        "--apply_lora",
        "--trainer",
        "standard",
        "--no_train",
        "--num_sample",
        "1",
        "--model_name_or_path",
        str(tuned),
    )
    again = place.run(*asked, output=f"asked {name}")
    for results in ("eval_results_sst-2.txt", "test_results_sst-2.txt"):
        assert (again / results).read_text() == (tuned / results).read_text()


def test_the_linear_head_stands_on_them_too(place):
    flags = written_beside(place, "under a head", use_dora=True)
    place.run(*flags, "--trainer", "linearhead", output="linear head")
    place.run(*flags, "--from_linearhead", "--few_shot_type", "finetune", output="kernel from a linear head")


def test_what_peft_cannot_load_ends_with_status_2(place):
    flags = written_beside(place, "of another kind")
    rewrite(place.folder / "of another kind", init_lora_weights="corda")
    assert "initialised by corda belong to changed weights" in refused(place, *flags, output="of another kind out")
    rewrite(place.folder / "of another kind", peft_type="LOHA")
    assert "adapters of the kind LOHA" in refused(place, *flags, output="of another kind out")
