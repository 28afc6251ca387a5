"""Causal language models through the command line, as a black box: every trainer, type and LoRA, against transformers.

Prompts are written out here by hand: the beginning, the text, the template up to the mask.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import oracle
from command_line import SIZES, Workplace, read_kernel, read_results, read_tensors, sst2_rows, write_rows
from engine_problems import longer_sides, names_of, problem_of
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.models.parameters import ParameterFilter
from tiny_models import CAUSAL, PaddedPrompts, prompts_for, save_tiny_checkpoint, tiny_prompt_model

MODELS = ("gpt2", "opt", "llama", "qwen2")
EXACT = 1e-10
"""Relative Frobenius error in float64, where the oracle's operations come in another order."""
BEGIN, ASKED, WORDS = "<|endoftext|>", " It was", ("Ġterrible", "Ġgreat")
STEPS = ("--trainer", "standard", "--max_steps", "3", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2")
ONE_TOKEN = ("--few_shot_type", "finetune", "--from_linearhead")
RESULTS = {
    "run_sst-2.json",
    *(f"{split}_results_sst-2.txt" for split in ("eval", "test")),
    *(f"{split}_predictions_sst-2.csv" for split in ("dev", "test")),
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
MODEL = {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER}
ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", *TOKENIZER}


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    for architecture in MODELS:
        save_tiny_checkpoint(architecture, place.folder / architecture)
    return place


def of(place: Workplace, architecture: str) -> tuple[str, str]:
    return "--model_name_or_path", str(place.folder / architecture)


@pytest.fixture(scope="module")
def made(place: Workplace) -> dict[str, Path]:
    """The output folder of a float64 kernel run of each model."""
    return {name: place.run(*of(place, name), "--kernel_dtype", "float64", output=f"{name} kernels") for name in MODELS}


def loaded(folder: Path, own_norms: bool = False) -> nn.Module:
    """A checkpoint as transformers loads it, in float64, its decoder untied.

    With ``own_norms`` RMSNorms are transformers', which compute in float32 whatever the model's dtype, as its eager
    attention does; otherwise they are torch's, so that float64 is float64.
    """
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double().eval()
    lm.lm_head.weight = nn.Parameter(lm.lm_head.weight.detach().clone())
    for name, module in list(lm.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and not own_norms:
            plain = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            plain.weight = module.weight
            lm.set_submodule(name, plain)
    return lm


def texts_of(split: str, size: int | None = None) -> list[str]:
    return [text for text, _ in sst2_rows(size or SIZES[split], split)]


def hand_logits(lm: nn.Module, folder: Path, text: object) -> Tensor:
    """The label words' logits, [1, 2], behind a text that is written out as far as it is read."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(str(text), add_special_tokens=False, return_tensors="pt").input_ids
    return lm(input_ids=ids).logits[:, -1, tokenizer.convert_tokens_to_ids(WORDS)]


def asked(lm: nn.Module, folder: Path, texts: Iterable[str]) -> Tensor:
    with torch.no_grad():
        return torch.cat([hand_logits(lm, folder, f"{BEGIN}{text}{ASKED}") for text in texts])


def gradients_of(lm: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The gradients of each split's logits, [N, C, P]."""
    own = list(lm.parameters())
    prompts = {split: [f"{BEGIN}{text}{ASKED}" for text in texts_of(split)] for split in SIZES}
    return {split: oracle.gradients(lambda text: hand_logits(lm, folder, text), own, prompts[split]) for split in SIZES}


@pytest.fixture(scope="module")
def gradients(place: Workplace) -> dict[str, dict[str, Tensor]]:
    return {name: gradients_of(loaded(place.folder / name), place.folder / name) for name in MODELS}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def results(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers for dev and for test."""
    return read_results(folder / "eval_results_sst-2.txt"), read_results(folder / "test_results_sst-2.txt")


def used_again(place: Workplace, folder: Path, *flags: str) -> None:
    """See that what a run left, evaluated as it is, has the run's own metrics and loss."""
    again = place.run("--no_train", "--model_name_or_path", str(folder), *flags, output=f"{folder.name} again")
    for found, wanted in zip(results(again), results(folder), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


def logits_of(place: Workplace, *flags: str, name: str) -> np.ndarray:
    """The test logits that a run saves."""
    there = place.folder / f"{name} logits"
    place.run(*flags, "--save_logit", "--save_logit_dir", str(there), output=name)
    (path,) = there.iterdir()
    return np.load(path)


# Kernels against gradients taken one at a time.


@pytest.mark.parametrize("architecture", MODELS)
def test_the_kernel_is_that_of_transformers_own_model_and_autograd(
    made: dict[str, Path], gradients: dict[str, dict[str, Tensor]], architecture: str
) -> None:
    own = gradients[architecture]
    for split in SIZES:
        truth = oracle.kernel(own["train"], own[split], "sgd")
        assert oracle.relative_error(read_kernel(made[architecture], split), truth) <= EXACT
    # The decoder, which the checkpoint ties, counts apart from the word embeddings.
    assert results(made[architecture])[1]["grad_dim"] == own["train"].shape[-1]


def test_a_llamas_kernel_is_that_of_transformers_own_norms_but_for_their_float32(
    place: Workplace, made: dict[str, Path]
) -> None:
    own = gradients_of(loaded(place.folder / "llama", own_norms=True), place.folder / "llama")
    truth = oracle.kernel(own["train"], own["test"], "sgd")
    assert EXACT < oracle.relative_error(read_kernel(made["llama"], "test"), truth) <= 1e-6


@pytest.mark.parametrize("architecture", MODELS)
def test_the_logits_beside_a_kernel_are_those_behind_the_last_token_before_the_mask(
    place: Workplace, made: dict[str, Path], architecture: str
) -> None:
    folder = place.folder / architecture
    for split in SIZES:
        logits, labels = read_tensors(made[architecture] / f"{split}_logits_sst-2.pt")
        assert labels.tolist() == [int(label) for _, label in sst2_rows(SIZES[split], split)]
        torch.testing.assert_close(logits, asked(loaded(folder), folder, texts_of(split)), rtol=EXACT, atol=EXACT)


def test_the_sign_kernel_of_gpt2_counts_signs(place: Workplace, gradients: dict[str, dict[str, Tensor]]) -> None:
    """A key's bias moves all scores of a query alike: the sign of its gradient, zero but for rounding, is anyone's."""
    flags = ("--kernel_formula", "signgd", "--kernel_dtype", "float64")
    folder, own = place.run(*of(place, "gpt2"), *flags, output="signs"), gradients["gpt2"]
    noise = {split: ((values.abs() < 1e-12) & (values != 0)).sum(-1) for split, values in own.items()}
    for split in SIZES:
        found, truth = read_kernel(folder, split), oracle.kernel(own["train"], own[split], "signgd")
        assert torch.equal(found, found.round())
        allowed = 2 * (noise["train"][:, :, None, None] + noise[split][None, None])
        assert bool(((found - truth).abs() <= allowed).all())
        assert int(allowed.max()) < 200


def test_the_asymmetric_kernel_of_a_llama_is_that_of_the_difference_of_logits(
    place: Workplace, gradients: dict[str, dict[str, Tensor]]
) -> None:
    flags = ("--kernel_formula", "asymmetric_signgd", "--binary_classification", "--kernel_solver", "asym")
    folder = place.run(*of(place, "llama"), *flags, "--kernel_dtype", "float64", output="asymmetric")
    own = {split: values[:, 1:] - values[:, :1] for split, values in gradients["llama"].items()}
    truth = oracle.kernel(own["train"], own["test"], "asymmetric_signgd")
    assert oracle.relative_error(read_kernel(folder, "test"), truth) <= EXACT


@pytest.mark.parametrize(
    ("architecture", "flags", "kept"),
    [
        ("gpt2", ["--exclude_embeddings", "--exclude_head"], lambda name: ".h." in name or "ln_f" in name),
        ("opt", ["--only_biases", "--exclude_first_layers", "1"], lambda name: "bias" in name and ".0." not in name),
        ("llama", ["--exclude_first_layers", "2", "--exclude_head"], lambda name: "embed" in name or ".norm." in name),
    ],
    ids=MODELS[:3],
)
def test_filters_leave_out_what_they_name(
    place: Workplace, architecture: str, flags: list[str], kept: Callable[[str], bool]
) -> None:
    folder = place.run(*of(place, architecture), *flags, "--no_predict", output=f"{architecture} filtered")
    named = dict(loaded(place.folder / architecture).named_parameters())
    wanted = sum(parameter.numel() for name, parameter in named.items() if kept(name))
    assert read_results(folder / "eval_results_sst-2.txt")["grad_dim"] == wanted


def test_the_description_holds_the_template_as_it_was_given(place: Workplace, made: dict[str, Path]) -> None:
    note = json.loads((made["gpt2"] / "test_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert note["template"] == ["*cls**sent_0*_It_was*mask*.*sep+*"]
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "gpt2")
    assert note["label_word_ids"] == tokenizer.convert_tokens_to_ids(WORDS)


# Other types and trainers.


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [
        ("gpt2", ["--trainer", "kernel", "--apply_lora"]),
        ("opt", ["--trainer", "kernel", "--few_shot_type", "prompt-demo", "--apply_lora"]),
        ("llama", ["--trainer", "kernel", "--few_shot_type", "finetune"]),
        ("qwen2", ["--trainer", "kernel", *ONE_TOKEN, "--apply_lora"]),
        ("gpt2", ["--trainer", "kernel", *ONE_TOKEN]),
        ("llama", ["--trainer", "linearhead", "--few_shot_type", "finetune"]),
        ("qwen2", ["--trainer", "linearhead", "--few_shot_type", "prompt-demo"]),
        ("opt", ["--no_train", "--few_shot_type", "finetune"]),
        ("gpt2", ["--no_train", "--few_shot_type", "prompt-demo", "--gpt3_in_context_head"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_every_trainer_takes_every_type(place: Workplace, architecture: str, flags: list[str]) -> None:
    folder = place.run(*of(place, architecture), "--num_sample", "1", *flags, output=f"{architecture} {len(flags)}")
    for found in results(folder):
        assert found["eval_acc"] * 12 == pytest.approx(round(found["eval_acc"] * 12))
        assert np.isfinite(found["eval_loss"])
    if "kernel" in flags:
        assert read_kernel(folder, "test").shape == (4, 2, 6, 2)
        named = dict(loaded(place.folder / architecture).named_parameters())
        encoder = sum(parameter.numel() for name, parameter in named.items() if not name.startswith("lm_head"))
        head = 2 * 16 if "finetune" in flags else named["lm_head.weight"].numel()
        head += 2 * ("--from_linearhead" in flags)
        # Two layers with adapters of rank 8: GPT-2's queries, keys and values have one, the others' queries and values
        # one each, a grouped value's half as wide.
        adapters = 2 * 8 * {"gpt2": 16 + 48, "opt": 2 * (16 + 16), "qwen2": (16 + 16) + (16 + 8)}.get(architecture, 0)
        assert results(folder)[1]["grad_dim"] == head + (adapters if "--apply_lora" in flags else encoder)


@pytest.mark.parametrize(
    ("architecture", "flags", "left"),
    [
        ("opt", ["--few_shot_type", "prompt-demo"], MODEL),
        ("llama", ["--few_shot_type", "finetune"], MODEL - {"generation_config.json"}),
        ("qwen2", [*ONE_TOKEN], (MODEL - {"generation_config.json"}) | {"head.safetensors"}),
        ("llama", ["--few_shot_type", "prompt", "--apply_lora"], ADAPTERS),
        ("gpt2", ["--few_shot_type", "finetune", "--apply_lora"], ADAPTERS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value if isinstance(value, str) else "",
)
def test_what_was_fine_tuned_is_used_again(
    place: Workplace, architecture: str, flags: list[str], left: set[str]
) -> None:
    folder = place.run(
        *of(place, architecture), "--num_sample", "1", *STEPS, *flags, output=f"tuned {architecture} {flags[-1]}"
    )
    assert files(folder) == RESULTS | left
    used_again(place, folder, "--num_sample", "1", *flags)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_transformers_itself_reads_a_fine_tuned_model_and_gives_the_same_logits(
    place: Workplace, architecture: str
) -> None:
    folder = place.run(*of(place, architecture), *STEPS, output=f"tuned {architecture} by prompts")
    assert files(folder) == RESULTS | MODEL
    found = logits_of(place, "--no_train", "--model_name_or_path", str(folder), name=f"{architecture} by run")
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert found == pytest.approx(asked(lm, folder, texts_of("test")).numpy(), abs=1e-5)  # float32
    before = asked(loaded(place.folder / architecture), folder, texts_of("test")).numpy()
    assert np.abs(found - before).max() > 0.01
    # The decoder was trained apart from the word embeddings.
    assert not torch.equal(lm.get_output_embeddings().weight, lm.get_input_embeddings().weight)


def test_transformers_itself_reads_a_fine_tuned_classifier_and_gives_the_same_logits(place: Workplace) -> None:
    plain_text = ("--few_shot_type", "finetune")
    folder = place.run(*of(place, "gpt2"), *STEPS, *plain_text, output="classifier")
    found = logits_of(place, "--no_train", "--model_name_or_path", str(folder), *plain_text, name="by classifier")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = [tokenizer(BEGIN + text, return_tensors="pt").input_ids for text in texts_of("test")]
        wanted = torch.cat([model(input_ids=row).logits for row in ids])
    assert found == pytest.approx(wanted.numpy(), abs=1e-5)  # float32


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_peft_itself_reads_adapters_of_gpt2_and_with_the_head_gives_the_same_logits(place: Workplace) -> None:
    folder = place.run(*of(place, "gpt2"), *STEPS, "--apply_lora", output="lora")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["target_modules"], config["fan_in_fan_out"]) == (["c_attn"], True)
    found = logits_of(place, "--no_train", "--apply_lora", "--model_name_or_path", str(folder), name="by adapters")
    base = AutoModelForCausalLM.from_pretrained(place.folder / "gpt2").eval()
    head = load_file(folder / "head.safetensors")
    assert head.keys() == {"lm.lm_head.weight"}
    base.lm_head.weight = nn.Parameter(head["lm.lm_head.weight"])
    before = asked(base, place.folder / "gpt2", texts_of("test"))
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    wanted = asked(model, place.folder / "gpt2", texts_of("test"))
    assert found == pytest.approx(wanted.numpy(), abs=1e-5)  # float32
    assert (wanted - before).abs().max() > 1e-3


# The linear head.


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_linear_head_of_a_prompt_is_scikit_learns_without_an_intercept(place: Workplace) -> None:
    """A causal model's decoder has no bias to take one."""
    write_rows(place.folder / "more" / "train.tsv", [("sentence", "label"), *sst2_rows(12, "train")])
    for split in ("dev", "test"):
        write_rows(place.folder / "more" / f"{split}.tsv", [("sentence", "label"), *sst2_rows(SIZES[split], split)])
    folder, seen = place.folder / "gpt2", []
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    lm.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1]))

    def features(split: str, size: int) -> np.ndarray:
        seen.clear()
        asked(lm, folder, texts_of(split, size))
        return torch.stack(seen).double().numpy()

    regression = LogisticRegressionCV(max_iter=5000, random_state=0, cv=5, fit_intercept=False)
    scores = features("test", 6) @ regression.fit(features("train", 12), np.arange(12) % 2).coef_[0]
    more = (*of(place, "gpt2"), "--data_dir", str(place.folder / "more"))
    found = logits_of(place, *more, "--trainer", "linearhead", name="linear")
    # The optimum is found to scikit-learn's tolerance of 1e-4 from float32 features.
    assert found == pytest.approx(np.stack([-scores, scores], axis=1) / 2, rel=1e-3, abs=1e-4)
    fitted = place.run(*more, "--from_linearhead", output="from linear")
    assert read_tensors(fitted / "test_logits_sst-2.pt")[0].numpy() == pytest.approx(found, abs=1e-6)
    started = place.run(*more, *STEPS, "--learning_rate", "0", "--from_linearhead", output="started")
    assert results(started) == results(place.folder / "linear")


# Demonstrations.


def test_demonstrations_stand_before_the_query(place: Workplace) -> None:
    """The same draws as a masked model's; the published sampler is written out here: dev's come before test's."""
    generator, train = np.random.RandomState(42), sst2_rows(4, "train")
    prompts = []
    for text in [*texts_of("dev"), *texts_of("test")]:
        order = generator.permutation(4)
        shown = [train[next(index for index in order if train[index][1] == label)][0] for label in "01"]
        prompts.append(f"{BEGIN}{shown[0]} It was terrible.{shown[1]} It was great.{text}{ASKED}")
    flags = ("--few_shot_type", "prompt-demo", "--num_sample", "1", "--no_train")
    found = logits_of(place, *of(place, "llama"), *flags, name="shown")
    folder = place.folder / "llama"
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = torch.cat([hand_logits(lm, folder, prompt) for prompt in prompts[4:]])
    assert found == pytest.approx(wanted.numpy(), abs=1e-5)  # float32
    loss = F.cross_entropy(wanted, torch.arange(6) % 2).item()
    assert results(place.folder / "shown")[1]["eval_loss"] == pytest.approx(loss, rel=1e-4)


# What is refused.


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model_family", "masked"], "is of type gpt2, of which transformers has no masked language model; "),
        (
            ["--few_shot_type", "prompt-demo", "--gpt3_in_context_tail"],
            "--gpt3_in_context_tail puts examples after the query, where a causal language model reads nothing: take "
            "--gpt3_in_context_head",
        ),
        (["--template", "*cls**mask*:*+sent_0*"], "a causal language model reads what precedes *mask*"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_a_causal_model_cannot_do_is_told_in_one_sentence(
    place: Workplace, flags: list[str], sentence: str
) -> None:
    outcome = place.call(place.argv(*of(place, "gpt2"), *flags, output="refused"))
    assert (outcome.status, outcome.out, len(outcome.err.splitlines())) == (2, "", 1)
    assert sentence in outcome.err
    assert not (place.folder / "refused").exists()


# Padding.


@pytest.mark.parametrize("architecture", CAUSAL)
def test_padding_on_the_left_gives_the_logits_of_padding_on_the_right_to_1e_12(architecture: str) -> None:
    model, prompts = tiny_prompt_model(architecture), prompts_for(architecture, [9, 4, 12, 7])
    on_left, on_right = (PaddedPrompts(prompts, side).batch(range(4)) for side in ("left", "right"))
    assert on_left["mask_pos"].tolist() == [11] * 4 and on_right["mask_pos"].tolist() == [8, 3, 11, 6]
    torch.testing.assert_close(model(**on_left), model(**on_right), rtol=1e-12, atol=1e-12)
    alone = torch.cat([model(**prompt) for prompt in prompts])
    torch.testing.assert_close(model(**on_left), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_padding_on_the_left_gives_the_kernel_of_padding_on_the_right_to_1e_12(architecture: str) -> None:
    model = tiny_prompt_model(architecture)
    train, x = longer_sides(architecture)
    problem = problem_of(model, names_of(model, ParameterFilter()), train, x)
    found, batches = [], []

    class Watched(PaddedPrompts):
        def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
            batches.append(super().batch(indices))
            return batches[-1]

    for side in ("left", "right"):
        padded = replace(problem, train=Watched(train, side), x=Watched(x, side))
        engine = make_engine(padded, "factored")
        plan = engine.plan()
        found.append(assemble(engine.blocks(plan), plan, padded))
    assert sum("attention_mask" in batch for batch in batches) >= 4, "each side of both kernels has padding"
    assert oracle.relative_error(*found) <= 1e-12
