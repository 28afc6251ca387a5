"""Weights that nothing can be predicted with, and finite weights whose logits are no numbers: one sentence each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from command_line import Outcome, Workplace
from lmntk.errors import NotFiniteError
from lmntk.models.loading import load_prompt_model
from lmntk.models.pretrained import load_config
from lmntk.models.sound_weights import check_finite
from tiny_models import save_tiny_checkpoint

Change = Callable[[dict[str, Tensor]], None]
ZERO_SHOT = ("--trainer", "standard", "--no_train", "--num_sample", "1")
TRAINERS = {
    "zero-shot": ZERO_SHOT,
    "fine-tuning": ("--trainer", "standard", "--max_steps", "2"),
    "linear head": ("--trainer", "linearhead"),
    "kernel": ("--kernel_formula", "signgd"),
}
WEIGHT = "roberta.encoder.layer.1.output.dense.weight"
NAN, INFINITY = float("nan"), float("inf")


def changed(model: Path, folder: Path, change: Change) -> str:
    """A copy of a checkpoint with other weights."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def put(value: float, name: str = WEIGHT) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    return change


def enlarge(weights: dict[str, Tensor]) -> None:
    """Make finite weights whose products are no float32 numbers any more."""
    weights["roberta.encoder.layer.1.output.LayerNorm.weight"] *= 1e30
    weights["lm_head.dense.weight"] *= 1e15


def cast(dtype: torch.dtype) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        weights[WEIGHT] = (weights[WEIGHT] * 20).to(dtype)

    return change


def ask(place: Workplace, model: str, *flags: str, output: str) -> Outcome:
    return place.call(place.argv("--model_name_or_path", model, *flags, output=output))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(("value", "said"), [(NAN, "NaN"), (INFINITY, "infinity")])
def test_a_weight_that_is_no_number_is_named_whatever_the_trainer(
    trainer: str, value: float, said: str, place: Workplace, tmp_path: Path
) -> None:
    model = changed(place.model, tmp_path / "model", put(value))
    outcome = ask(place, model, *TRAINERS[trainer], output=f"{said} {trainer}")
    assert outcome.status == 2
    assert f"the checkpoint '{model}' holds {said} in the weight {WEIGHT} (1 of its 384 numbers" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_weights_of_every_family_are_looked_at(architecture: str, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(architecture, tmp_path / "whole")
    name = sorted(load_file(model / "model.safetensors"))[-1]
    broken = changed(model, tmp_path / "broken", put(NAN, name))
    with pytest.raises(NotFiniteError) as caught:
        load_prompt_model(broken, load_config(broken), (7, 8))
    assert caught.value.data == {"parameter": name}


def test_a_number_that_float32_cannot_hold_is_infinity(place: Workplace, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights[WEIGHT] = weights[WEIGHT].double()
        weights[WEIGHT][0, 0] = 1e300

    outcome = ask(place, changed(place.model, tmp_path / "model", change), *ZERO_SHOT, output="double")
    assert (outcome.status, "holds infinity in the weight " + WEIGHT in outcome.err) == (2, True)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")],
)
def test_quantised_weights_are_refused(dtype: torch.dtype, said: str, place: Workplace, tmp_path: Path) -> None:
    model = changed(place.model, tmp_path / "model", cast(dtype))
    outcome = ask(place, model, *ZERO_SHOT, output=said)
    assert outcome.status == 2
    assert f"holds the weight {WEIGHT} as {said}, which is not a float of 16 bits or more" in outcome.err


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_every_other_size_are_read(dtype: torch.dtype, place: Workplace, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights.update({name: weight.to(dtype) for name, weight in weights.items()})

    model = changed(place.model, tmp_path / "model", change)
    expected = load_prompt_model(str(place.model), load_config(str(place.model)), (7, 8)).lm.get_parameter(WEIGHT)
    found = load_prompt_model(model, load_config(model), (7, 8)).lm.get_parameter(WEIGHT)
    assert torch.equal(found, expected.to(dtype).float())


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("zero-shot", "4 of 4 examples of dev have logits that are NaN or infinite, first example 0 (counted from 0)"),
        ("fine-tuning", "logits of train are NaN or infinite before the first step"),
        ("linear head", "train example 0 (counted from 0) gives the last layer inputs that are NaN or infinite"),
    ],
)
def test_finite_weights_whose_logits_are_no_numbers_are_told_by_what_happened(
    trainer: str, said: str, place: Workplace, tmp_path: Path
) -> None:
    model = changed(place.model, tmp_path / "model", enlarge)
    outcome = ask(place, model, *TRAINERS[trainer], output=f"large {trainer}")
    assert outcome.status == 2
    assert said in outcome.err
    assert "take --kernel_dtype float64" in outcome.err
    assert "learning_rate" not in outcome.err + outcome.messages


def test_the_way_out_is_one(place: Workplace, tmp_path: Path) -> None:
    model = changed(place.model, tmp_path / "model", enlarge)
    outcome = ask(place, model, *ZERO_SHOT, "--kernel_dtype", "float64", output="large in float64")
    assert (outcome.status, outcome.err) == (0, "")


@pytest.mark.parametrize("kind", ["head", "checkpoint"])
def test_what_lies_beside_a_checkpoint_and_what_training_goes_on_from_are_looked_at(
    kind: str, place: Workplace, tmp_path: Path
) -> None:
    flags = ("--trainer", "standard", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    finetune = ("--few_shot_type", "finetune", "--from_linearhead")
    folder = place.run(*flags, *finetune, output=f"before {kind}")
    path = folder / ("head.safetensors" if kind == "head" else "checkpoint-1/model.safetensors")
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = NAN
    save_file(weights, path, metadata={"format": "pt"})
    if kind == "head":
        outcome = ask(place, str(folder), *ZERO_SHOT, *finetune, output="after head")
    else:
        again = (*flags, *finetune, "--resume_from_checkpoint", str(path.parent))
        outcome = ask(place, str(place.model), *again, output=f"before {kind}")
    assert outcome.status == 2
    assert f"{path} holds NaN in the weight {name} " in outcome.err


def test_whole_numbers_empty_weights_and_large_ones_are_finite() -> None:
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    whole = {"whole": torch.tensor([1]), "empty": torch.zeros(0), "masks": torch.zeros(2, dtype=torch.bool)}
    check_finite({**whole, "large": largest, "half": torch.full((70,), 1000.0).half()}, "the test")
    with pytest.raises(NotFiniteError, match=r"holds infinity in the weight both \(2 of its 2 numbers"):
        check_finite({"both": torch.tensor([INFINITY, -INFINITY])}, "the test")
