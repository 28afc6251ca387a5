"""Models that see their padding are asked about equal lengths only; a check of transformers is kept silent."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

import oracle
from architectures.tiny import tiny_config
from lmntk.errors import ModelError
from lmntk.kernels import ENGINES, FORMULAS, KernelProblem, ModuleModel
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.batching import length_buckets
from lmntk.models.loading import LoadOptions, load_prompt_model
from lmntk.models.padding import without_padding_warnings
from lmntk.models.pretrained import load_config
from lmntk.models.prompt_model import PromptModel
from lmntk.models.self_check import probes
from tiny_models import LABEL_WORDS, PaddedPrompts, add_noise, save_tiny_checkpoint, tiny_prompts

# FNet mixes all positions by Fourier transforms, the others have convolutions over them.
SEE_THEIR_PADDING = ("fnet", "convbert", "nystromformer")
# Transformers' check for padding depends on the data, and broke differentiation by vmap.
CHECKED_FOR_PADDING = ("deberta", "deberta-v2", "squeezebert", "roformer", "layoutlm", "rembert", "megatron-bert")
LENGTHS = [6, 9, 5, 6]


def save(architecture: str, folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    lm = AutoModelForMaskedLM.from_config(tiny_config(architecture, "masked", **settings))
    add_noise(lm)
    lm.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float64, **options: object) -> PromptModel:
    return load_prompt_model(str(folder), load_config(str(folder)), LABEL_WORDS, LoadOptions(dtype=dtype, **options))


def padded(lengths: list[int], side: str = "right") -> tuple[list[dict], dict]:
    prompts = tiny_prompts(lengths, seed=3)
    return prompts, PaddedPrompts(prompts, side).batch(range(len(prompts)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", SEE_THEIR_PADDING)
def test_a_model_that_sees_its_padding_answers_as_if_asked_one_by_one(architecture, side, tmp_path, caplog):
    model = loaded(save(architecture, tmp_path))
    assert model.equal_lengths
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        f"'{tmp_path}' is of type {architecture}, whose logits change with padding: prompts share a batch only where "
        "they are equally long, which takes more time"
    )
    prompts, batch = padded(LENGTHS, side)
    alone = torch.cat([model(**prompt) for prompt in prompts])
    torch.testing.assert_close(model(**batch), alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model.all_logits(**batch), alone, rtol=1e-3), "padding makes no difference"
    features = torch.cat([model.last_layer_inputs(prompt) for prompt in prompts])
    torch.testing.assert_close(model.last_layer_inputs(batch), features, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", SEE_THEIR_PADDING)
def test_training_on_a_padded_batch_takes_the_gradient_of_its_prompts_one_by_one(architecture, tmp_path):
    model = loaded(save(architecture, tmp_path))
    prompts, batch = padded(LENGTHS)
    parameters = [parameter for name, parameter in model.named_parameters() if "pooler" not in name]
    together = torch.autograd.grad(model(**batch)[:, 0].sum(), parameters, materialize_grads=True, allow_unused=True)
    alone = torch.zeros(())
    for prompt in prompts:
        alone = alone + model(**prompt)[:, 0].sum()
    expected = torch.autograd.grad(alone, parameters, materialize_grads=True, allow_unused=True)
    for found, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def kernel_of(model: PromptModel, engine: str, train: list[dict], x: list[dict], formula: str, names: list[str]):
    model.requires_grad_(False)
    tokens = {int(token) for prompt in train for token in prompt["input_ids"][0]}
    logits_fn, params = model.as_function(names, tokens)
    sides = [PaddedPrompts(prompts) for prompts in (train, x)]
    for side in sides:
        side.equal_lengths = model.equal_lengths
    problem = KernelProblem(
        train=sides[0],
        x=sides[1],
        formula=FORMULAS[formula],
        num_logits=model.num_logits,
        model=ModuleModel(logits_fn, model),
        params=params,
    )
    chosen = make_engine(problem, engine)
    plan = chosen.plan()
    return assemble(chosen.blocks(plan), plan, problem)[0]


def names_and_gradients(model: PromptModel, *sides: list[dict]) -> tuple[list[str], list[torch.Tensor]]:
    """The oracle's gradients, of the parameters of which none is zero but for rounding."""
    own = dict(model.named_parameters())
    found = [oracle.gradients(lambda prompt: model(**prompt), list(own.values()), side) for side in sides]
    sizes = [parameter.numel() for parameter in own.values()]
    parts = torch.cat([side.flatten(0, 1) for side in found]).split(sizes, dim=1)
    smallest = 1e-11 * max(float(part.abs().max()) for part in parts)
    kept = [not bool(((part != 0) & (part.abs() < smallest)).any()) for part in parts]
    counted = torch.cat([torch.full((size,), keep) for size, keep in zip(sizes, kept, strict=True)])
    return [name for name, keep in zip(own, kept, strict=True) if keep], [side[..., counted] for side in found]


@pytest.mark.parametrize("formula", ["sgd", "signgd"])
@pytest.mark.parametrize("architecture", SEE_THEIR_PADDING)
def test_kernels_of_models_that_see_their_padding_are_those_of_the_prompts_alone(architecture, formula, tmp_path):
    model = loaded(save(architecture, tmp_path))
    train, x = tiny_prompts([6, 9, 7], seed=1), tiny_prompts([8, 6], seed=2)
    names, (of_train, of_x) = names_and_gradients(model, train, x)
    truth = oracle.kernel(of_train, of_x, formula)
    for engine in ("factored", "jacobian"):
        assert oracle.relative_error(kernel_of(model, engine, train, x, formula, names), truth) <= 1e-12


@pytest.mark.parametrize("architecture", CHECKED_FOR_PADDING)
def test_architectures_that_look_for_padding_are_right_by_every_engine(architecture, tmp_path):
    # float32 within attention and norms: forward mode rounds there, the others do as the oracle does.
    tolerance = {"jvp": 1e-6}
    model = loaded(save(architecture, tmp_path))
    train, x = tiny_prompts([6, 7], seed=1), tiny_prompts([8], seed=2)
    names, (of_train, of_x) = names_and_gradients(model, train, x)
    for engine in ENGINES:
        for formula in ("sgd", "signgd"):
            found = kernel_of(model, engine, train, x, formula, names)
            error = oracle.relative_error(found, oracle.kernel(of_train, of_x, formula))
            assert error <= tolerance.get(engine, 1e-12), (engine, formula)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_models_that_do_not_see_their_padding_share_batches(architecture, dtype, tmp_path, caplog):
    save_tiny_checkpoint(architecture, tmp_path)
    assert not loaded(tmp_path, dtype).equal_lengths
    assert caplog.records == []


def test_padding_up_to_the_longest_prompt_is_tried(tmp_path, monkeypatch):
    """An encoder that goes another way from 40 tokens on sees the padding of long batches only."""
    save_tiny_checkpoint("bert", tmp_path)
    plain = PromptModel.all_logits

    def otherwise(self, input_ids, mask_pos, attention_mask=None, token_type_ids=None):
        if input_ids.shape[1] > 40:
            attention_mask = None
        return plain(self, input_ids, mask_pos, attention_mask, token_type_ids)

    monkeypatch.setattr(PromptModel, "all_logits", otherwise)
    assert loaded(tmp_path, longest=50).equal_lengths
    assert not loaded(tmp_path, longest=30).equal_lengths


def test_batches_of_equal_length_hold_no_other() -> None:
    examples = PaddedPrompts(tiny_prompts([9, 9, 8, 8, 8, 5]))
    assert length_buckets(examples, range(6), 1024) == [[0, 1, 2, 3, 4, 5]]
    examples.equal_lengths = True
    assert length_buckets(examples, range(6), 1024) == [[0, 1], [2, 3, 4], [5]]
    assert length_buckets(examples, range(6), 16) == [[0], [1], [2, 3], [4], [5]]


def test_the_check_of_transformers_is_silent_within_a_call_and_back_behind_it(tmp_path, monkeypatch):
    own = PreTrainedModel.warn_if_padding_and_no_attention_mask
    model = loaded(save("squeezebert", tmp_path))
    assert PreTrainedModel.warn_if_padding_and_no_attention_mask is own
    seen = []
    hook = model.lm.register_forward_pre_hook(
        lambda module, args: seen.append(PreTrainedModel.warn_if_padding_and_no_attention_mask is own)
    )
    model(**tiny_prompts([5])[0])
    hook.remove()
    assert seen == [False]
    assert PreTrainedModel.warn_if_padding_and_no_attention_mask is own
    with pytest.raises(RuntimeError), without_padding_warnings():
        raise RuntimeError
    assert PreTrainedModel.warn_if_padding_and_no_attention_mask is own


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("mobilebert", {}, "RuntimeError: The size of tensor"),
        ("bart", {}, "asked at one position it raises RuntimeError"),
        ("deberta", {"legacy": False}, "asked at one position it raises RuntimeError"),
        ("deberta-v2", {"legacy": False}, "asked at one position it raises RuntimeError"),
        ("esm", {"mask_token_id": 4}, ""),
        ("reformer", {}, ""),
        ("longformer", {}, "its gradients are not finite"),
    ],
)
def test_architectures_that_cannot_be_asked_are_refused_by_name(architecture, settings, reason, tmp_path):
    save(architecture, tmp_path, **settings)
    with pytest.raises(ModelError, match="`model_name_or_path`: ") as error:
        loaded(tmp_path)
    assert error.value.data["model"] == architecture
    assert error.value.data["reason"].startswith(reason)
    assert "\n" not in str(error.value)


def test_a_head_that_does_more_than_its_decoder_is_refused(tmp_path, monkeypatch):
    save_tiny_checkpoint("bert", tmp_path)
    plain = PromptModel.head_logits
    monkeypatch.setattr(PromptModel, "head_logits", lambda self, **inputs: 1.5 * plain(self, **inputs))
    with pytest.raises(ModelError) as error:
        loaded(tmp_path)
    assert error.value.data == {
        "model": "bert",
        "reason": "asked at one position it gives other logits than as a whole",
    }


def test_prompts_for_trying_hold_no_special_token() -> None:
    config = tiny_config("bert", "masked")
    prompts = probes(config, [50, 7], causal=False)
    assert [prompt["input_ids"].shape for prompt in prompts] == [(1, 50), (1, 7)]
    assert not {config.pad_token_id, config.bos_token_id, config.eos_token_id} & set(
        prompts[0]["input_ids"][0].tolist()
    )
    assert torch.equal(prompts[0]["input_ids"], probes(config, [50], causal=False)[0]["input_ids"])


def test_users_of_the_silence_may_end_in_any_order() -> None:
    name = "warn_if_padding_and_no_attention_mask"
    kept = getattr(PreTrainedModel, name)
    first, second = without_padding_warnings(), without_padding_warnings()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert getattr(PreTrainedModel, name) is not kept
    second.__exit__(None, None, None)
    assert getattr(PreTrainedModel, name) is kept
