"""The parameters that training changes, and by how much."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from command_line import Workplace
from training_runs import ONE_STEP, STEPS, changes, hand_logits, results, sst2_prompts, weights


def test_fixed_layers_stay_as_they_were_and_all_others_move(place: Workplace) -> None:
    moved = changes(place.model, place.run(*STEPS, "--fix_layers", "1", output="fixed"))
    for name, change in moved.items():
        fixed = ".embeddings." in name or ".layer.0." in name
        assert bool(change.any()) != fixed, name
    assert sum(".layer.0." in name for name in moved) == sum(".layer.1." in name for name in moved) == 16


@pytest.fixture(scope="module")
def hand_gradients(still: Path) -> dict[str, Tensor]:
    """The gradient of the mean cross entropy of the train prompts, by plain autograd in float64."""
    model = AutoModelForMaskedLM.from_pretrained(still, attn_implementation="eager").double().eval()
    decoder = model.lm_head.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    logits = hand_logits(model, still, sst2_prompts("train"))
    F.cross_entropy(logits, torch.arange(4) % 2).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    found["lm_head.decoder.bias"] = decoder.bias.grad
    return found


def test_sgd_steps_down_the_gradient_of_the_mean_cross_entropy(
    place: Workplace, still: Path, hand_gradients: dict[str, Tensor]
) -> None:
    flags = ("--learning_rate", "1", "--model_name_or_path", str(still))
    moved = changes(still, place.run("--trainer", "standard", "--no_predict", *ONE_STEP, *flags, output="sgd"))
    assert moved.keys() - hand_gradients.keys() == set()
    for name, change in moved.items():
        # One float32 rounding of weights of order 1, and the gradient's own.
        assert torch.allclose(change.double(), -hand_gradients[name], rtol=1e-4, atol=1e-6), name


def test_the_gradient_is_clipped_to_max_grad_norm(
    place: Workplace, still: Path, hand_gradients: dict[str, Tensor]
) -> None:
    flags = ("--learning_rate", "10", "--max_grad_norm", "0.1", "--model_name_or_path", str(still))
    moved = changes(still, place.run("--trainer", "standard", "--no_predict", *ONE_STEP, *flags, output="clipped"))
    moved.pop("lm_head.bias", None)
    length = torch.cat([change.double().flatten() for change in moved.values()]).norm()
    assert float(length) == pytest.approx(10 * 0.1, rel=1e-4)


def test_signgd_moves_every_weight_by_the_learning_rate_or_not_at_all(
    place: Workplace, still: Path, hand_gradients: dict[str, Tensor]
) -> None:
    flags = ("--optimizer_variant", "signgd", "--learning_rate", "0.25", "--model_name_or_path", str(still))
    moved = changes(still, place.run("--trainer", "standard", "--no_predict", *ONE_STEP, *flags, output="signgd"))
    for name, change in moved.items():
        assert torch.isin((change * 4).round(decimals=4), torch.tensor([-1.0, 0.0, 1.0])).all(), name
        clear = hand_gradients[name].abs() > 1e-6
        assert torch.allclose(change.double()[clear], -0.25 * hand_gradients[name].sign()[clear], atol=1e-5), name
        assert not change[hand_gradients[name] == 0].any(), name


def test_no_weight_decay_on_biases_and_layer_norms(place: Workplace, still: Path) -> None:
    flags = ("--learning_rate", "0.5", "--model_name_or_path", str(still))
    plain = weights(place.run("--trainer", "standard", "--no_predict", *ONE_STEP, *flags, output="undecayed"))
    decayed = weights(
        place.run("--trainer", "standard", "--no_predict", *ONE_STEP, *flags, "--weight_decay", "0.2", output="decayed")
    )
    start = weights(still)
    for name in start.keys() & plain.keys():
        exempt = name.endswith("bias") or "LayerNorm" in name or "layer_norm" in name
        wanted = plain[name] if exempt else plain[name] - 0.5 * 0.2 * start[name]
        assert torch.allclose(decayed[name], wanted, atol=1e-6), name


def test_squared_error_takes_the_place_of_cross_entropy(place: Workplace, tuned: Path, lm: nn.Module) -> None:
    untrained = place.run("--no_train", "--l2_loss", output="squared zero")
    with torch.no_grad():
        logits = hand_logits(lm, place.model, sst2_prompts("test"))
    wanted = F.mse_loss(logits, F.one_hot(torch.arange(6) % 2, 2).float())
    assert results(untrained)[1]["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    squared = place.run(*STEPS, "--l2_loss", output="squared")
    assert not torch.equal(weights(squared)["lm_head.dense.weight"], weights(tuned)["lm_head.dense.weight"])
    again = place.run("--no_train", "--l2_loss", "--model_name_or_path", str(squared), output="squared again")
    assert results(again) == results(squared)


def test_batches_of_an_evaluation_change_no_number(place: Workplace) -> None:
    whole = place.run("--no_train", "--per_device_eval_batch_size", "6", output="batch of 6")
    for size in ("1", "4"):
        parts = place.run("--no_train", "--per_device_eval_batch_size", size, output=f"batch of {size}")
        for found, wanted in zip(results(parts), results(whole), strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_dropping_the_last_training_batch_drops_no_example_of_dev_or_test(place: Workplace, tuned: Path) -> None:
    """Batches of two divide four examples, so that nothing is dropped in training."""
    folder = place.run(*STEPS, "--dataloader_drop_last", "--per_device_eval_batch_size", "4", output="dropped")
    for found, expected in zip(results(folder), results(tuned), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_labels_can_be_smoothed(place: Workplace, still: Path) -> None:
    flags = ("--label_smoothing_factor", "0.2", "--learning_rate", "1", "--model_name_or_path", str(still))
    moved = changes(still, place.run("--trainer", "standard", "--no_predict", *ONE_STEP, *flags, output="smoothed"))
    model = AutoModelForMaskedLM.from_pretrained(still, attn_implementation="eager").double().eval()
    logits = hand_logits(model, still, sst2_prompts("train"))
    F.cross_entropy(logits, torch.arange(4) % 2, label_smoothing=0.2).backward()
    assert torch.allclose(moved["lm_head.dense.weight"].double(), -model.lm_head.dense.weight.grad, atol=1e-5)


def test_gradient_checkpointing_changes_no_weight(place: Workplace, still: Path) -> None:
    flags = ("--trainer", "standard", "--no_predict", *ONE_STEP, "--model_name_or_path", str(still))
    plain = weights(place.run(*flags, output="not checkpointed"))
    saving = weights(place.run(*flags, "--gradient_checkpointing", output="checkpointed"))
    assert all(torch.allclose(saving[name], plain[name], atol=1e-6) for name in plain)
