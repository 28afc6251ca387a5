"""Training of LoRA adapters through the command line."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM

from command_line import Workplace, read_tensors
from training_runs import (
    ADAPTERS,
    RESULTS,
    STEPS,
    files,
    hand_logits,
    logits_of,
    results,
    sst2_prompts,
    used_again,
    weights,
)


def test_lora_leaves_adapters_and_a_head_that_are_used_again(place: Workplace) -> None:
    folder = place.run(*STEPS, "--apply_lora", "--lora_r", "4", "--lora_alpha", "12", output="lora")
    assert files(folder) == RESULTS | ADAPTERS
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12, str(place.model))
    assert set(config["target_modules"]) == {"query", "value"}
    assert any(
        tensor.any() for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in name
    )
    used_again(place, folder, "--apply_lora")
    kernel = place.run("--trainer", "kernel", "--apply_lora", "--model_name_or_path", str(folder), output="lora kernel")
    head = 16 * 16 + 16 + 2 * 16 + sum(load_file(folder / "head.safetensors")[n].numel() for n in HEAD_DECODER)
    assert results(kernel)[1]["grad_dim"] == 2 * 2 * 2 * 4 * 16 + head  # layers, projections, A and B, rank, width
    loss = F.cross_entropy(*read_tensors(kernel / "test_logits_sst-2.pt")).item()
    assert results(folder)[1]["eval_loss"] == pytest.approx(loss, rel=1e-5)


HEAD_DECODER = ("lm.lm_head.decoder.weight", "lm.lm_head.decoder.bias")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_peft_itself_reads_the_adapters_and_with_the_head_gives_the_same_logits(place: Workplace) -> None:
    folder = place.run(*STEPS, "--apply_lora", output="lora for peft")
    base = AutoModelForMaskedLM.from_pretrained(place.model).eval()
    decoder = base.lm_head.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    head = load_file(folder / "head.safetensors")
    base.load_state_dict({name.removeprefix("lm."): tensor for name, tensor in head.items()}, strict=False)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    saved = logits_of(place, "--no_train", "--apply_lora", "--model_name_or_path", str(folder), name="lora by run")
    with torch.no_grad():
        found = hand_logits(model, place.model, sst2_prompts("test"))
    assert saved == pytest.approx(found.numpy(), abs=1e-5)


def test_lora_trains_the_adapters_and_the_head_alone(place: Workplace) -> None:
    folder = place.run(*STEPS, "--apply_lora", "--learning_rate", "0", output="lora unmoved")
    moved = load_file(place.run(*STEPS, "--apply_lora", output="lora moved") / "head.safetensors")
    unmoved, start = load_file(folder / "head.safetensors"), weights(place.model)
    for name, tensor in unmoved.items():
        if name.removeprefix("lm.") in start:
            assert torch.equal(tensor, start[name.removeprefix("lm.")])
    assert not any(torch.equal(tensor, moved[name]) for name, tensor in unmoved.items())


def test_new_adapters_change_no_logit(place: Workplace, lm: nn.Module) -> None:
    found = logits_of(place, "--no_train", "--apply_lora", name="new adapters")
    with torch.no_grad():
        assert found == pytest.approx(hand_logits(lm, place.model, sst2_prompts("test")).numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", [("finetune",), ("finetune", "--from_linearhead")], ids=["own head", "first token"])
def test_lora_on_plain_text_is_used_again(place: Workplace, kind: tuple[str, ...]) -> None:
    flags = ("--apply_lora", "--few_shot_type", *kind)
    folder = place.run(*STEPS, *flags, output=f"lora {len(kind)}")
    assert files(folder) == RESULTS | ADAPTERS
    used_again(place, folder, *flags)
