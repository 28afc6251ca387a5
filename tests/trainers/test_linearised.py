"""Training of the linearised model: fine-tuning's first step, the kernel's solution in the limit, the limit of small
learning rates."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from command_line import SENTENCES, Workplace, read_kernel, write_rows
from lmntk.analysis.saved_run import read_runs
from lmntk.analysis.training_forecast import KernelTraining
from lmntk.config.arguments import parse_arguments
from lmntk.config.validation import check_arguments
from lmntk.errors import SettingError, UsageError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.solvers.gradient_flow import Loss, logits_of, mean_loss
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import TrainingSnapshot, find_snapshots, read_snapshot
from lmntk.trainers.finetune import FineTuneTrainer
from lmntk.trainers.linearised import LinearisedModel, LinearisedTrainer
from tiny_models import tiny_prompt_model

PLAIN = ("--lr_scheduler_type", "constant", "--max_grad_norm", "0", "--weight_decay", "0", "--kernel_dtype", "float64")
STEPS = (*PLAIN, "--per_device_train_batch_size", "4")


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    """A tiny RoBERTa without dropout, and two train examples, whose kernel is well conditioned."""
    config = AutoConfig.from_pretrained(place.model)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(place.model)
    rows = [(SENTENCES[index], label) for index, label in ((0, "1"), (1, "0"))]
    write_rows(place.data / "train.tsv", [("sentence", "label"), *rows])
    return place


def trainer_of(place: Workplace, trainer: str, output: Path, *flags: str) -> FineTuneTrainer:
    argv = place.argv("--trainer", trainer, "--output_dir", str(output), "--save_strategy", "no", *flags)
    model_args, data_args, args = parse_arguments(argv)
    check_arguments(model_args, data_args, args)
    run = build(model_args, data_args, args)
    assert isinstance(run, Experiment)
    kind = LinearisedTrainer if trainer == "linearised" else FineTuneTrainer
    return kind(run, model_args, args)


def snapshots(folder: Path) -> dict[int, TrainingSnapshot]:
    return {found.step: found for found in map(read_snapshot, find_snapshots(RunPaths(folder, "sst-2")))}


def logits_written(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8", newline="") as file:
        return np.array([[float(row[name]) for name in row if "logit" in name] for row in csv.DictReader(file)])


@pytest.mark.parametrize(
    ("flags", "logits"),
    [((), 2), (("--binary_classification",), 1)],
    ids=["two logits", "one logit"],
)
def test_with_the_squared_error_it_ends_at_the_solution_of_the_kernel_with_f0(
    place: Workplace, tmp_path: Path, flags: tuple[str, ...], logits: int
) -> None:
    """Gradient descent in function space: f ← f − (2 η / N C) K (f − y); its limit is f₀ + K(x, X) K⁻¹ (y − f₀).

    Malladi et al. 2023, section 3, with the solver lstsq, f₀ whole and λ = 0. At the best constant learning rate the
    error falls by (κ − 1) / (κ + 1) a step: to 1e-7 of its start in the 8 κ steps that are taken.
    """
    name = f"kernel {'-'.join(flags) or 'plain'}"
    kernel = place.run("--kernel_dtype", "float64", "--adjust_for_init", *flags, output=name)
    values = np.linalg.eigvalsh(read_kernel(kernel, "train").flatten(0, 1).flatten(1).numpy())
    rate = 2 * logits / (values[0] + values[-1])
    steps = int(8 * values[-1] / values[0]) + 10
    train = ("--optimizer", "sgd", "--l2_loss", "--learning_rate", repr(float(rate)), "--max_steps", str(steps))
    trainer = trainer_of(place, "linearised", tmp_path, *STEPS, *train, *flags)
    trainer.train()
    for split in ("dev", "test"):
        found = trainer.evaluate_split(trainer._experiment.datasets[split]).logits
        wanted = logits_written(RunPaths(kernel, "sst-2").predictions(split))
        assert wanted.shape[1] == logits
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("loss", "factor"), [("squared_error", 0.9), ("squared_error", 1.1), ("cross_entropy", 0.9)])
def test_its_steps_are_those_forecast_from_the_kernel_below_and_above_the_stable_step(
    place: Workplace, tmp_path: Path, loss: Loss, factor: float
) -> None:
    """That is the closed form for the squared error; a tenth above the stable step, each adds a fifth to f − y."""
    folder = place.folder / "kernel of a forecast"
    if not folder.exists():
        place.run("--kernel_dtype", "float64", output=folder.name)
    kernel = KernelTraining.of_run(read_runs(folder)[0])
    limits = kernel.stable_steps
    rate = float(factor * (limits.squared_error if loss == "squared_error" else limits.cross_entropy_anywhere))
    train = ("--optimizer", "sgd", *(("--l2_loss",) if loss == "squared_error" else ()))
    own = ("--learning_rate", repr(rate), "--max_steps", "24", "--kernel_steps", "0,12,last")
    trainer_of(place, "linearised", tmp_path, *STEPS, *train, *own).train()
    alpha = kernel.training.descent(loss, [rate] * 24)
    found = snapshots(tmp_path)
    for step, snapshot in found.items():
        for split in ("train", "dev", "test"):
            values, untrained = kernel.run.kernel(split).values, kernel.run.untrained_logits(split)
            (wanted,) = logits_of(alpha[[step]], values, untrained)
            np.testing.assert_allclose(snapshot.splits[split].logits, wanted, rtol=1e-8, atol=1e-9)
    of_train = [found[step].splits["train"] for step in (0, 12, 24)]
    start, middle, end = (float(mean_loss(loss, split.logits, split.labels)) for split in of_train)
    assert (end < middle < start) if factor < 1 else (end > 50 * middle > 50 * start)


@pytest.mark.parametrize(
    "flags",
    [(), ("--optimizer", "sgd"), ("--apply_lora",), ("--fix_layers", "1"), ("--weight_decay", "0.1")],
    ids=["adam", "sgd", "LoRA", "fixed layers", "weight decay"],
)
def test_its_first_step_is_that_of_fine_tuning_and_its_logits_are_the_tangent_there(
    place: Workplace, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    first = ("--max_steps", "1", "--learning_rate", "0.01", "--kernel_steps", "0,1", *flags)
    folders = {trainer: tmp_path / trainer for trainer in ("standard", "linearised")}
    for trainer, folder in folders.items():
        trainer_of(place, trainer, folder, *STEPS, *first).train()
    tuned, linear = (snapshots(folder) for folder in folders.values())
    for split, wanted in tuned[1].splits.items():
        found = linear[1].splits[split]
        np.testing.assert_allclose(found.logits, wanted.linearised, rtol=0, atol=1e-10)
        assert np.array_equal(found.logits, found.linearised)
        assert np.abs(found.logits - linear[0].splits[split].logits).max() > 1e-4
    assert np.array_equal(linear[0].kernel, tuned[0].kernel)
    assert np.array_equal(linear[1].kernel, tuned[0].kernel), "its kernel is always that of the start"
    assert tuned[1].description["grad_dim"] == linear[1].description["grad_dim"]


OPTIMIZERS = {
    "sgd": (0.004, ("--optimizer", "sgd")),
    "adam": (2e-5, ()),
    "signgd": (2e-5, ("--optimizer", "sgd", "--optimizer_variant", "signgd")),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_half_the_learning_rate_halves_the_distance_from_the_tangent_and_of_the_kernel(
    place: Workplace, tmp_path: Path, optimizer: str
) -> None:
    """In float64 over a fixed number of steps, ‖f_T − f_lin‖ / ‖f_T − f₀‖ and ‖K_T − K₀‖ / ‖K₀‖ go to zero with η."""
    rate, flags = OPTIMIZERS[optimizer]
    tangents, kernels = [], []
    for halvings in range(3):
        own = ("--max_steps", "3", "--kernel_steps", "0,last", "--learning_rate", str(rate / 2**halvings))
        folder = tmp_path / str(halvings)
        trainer_of(place, "standard", folder, *STEPS, *own, *flags).train()
        found = snapshots(folder)
        start, end = found[0].splits["test"].logits, found[3].splits["test"]
        tangents.append(np.linalg.norm(end.logits - end.linearised) / np.linalg.norm(end.logits - start))
        assert found[0].kernel is not None and found[3].kernel is not None
        kernels.append(np.linalg.norm(found[3].kernel - found[0].kernel) / np.linalg.norm(found[0].kernel))
    for distances in (tangents, kernels):
        assert distances[0] > 1e-4
        ratios = [large / small for large, small in zip(distances[:-1], distances[1:], strict=True)]
        assert ratios == pytest.approx([2, 2], rel=0.06), distances
        assert abs(ratios[1] - 2) < abs(ratios[0] - 2) + 0.01, "closer to 2 the smaller the rate"


def test_results_are_written_as_by_fine_tuning_but_no_model_is(place: Workplace) -> None:
    flags = ("--max_steps", "2", "--save_steps", "1")
    outcome = place.call(place.argv("--trainer", "linearised", *flags, output="results"))
    assert (outcome.status, outcome.err) == (0, "")
    assert {path.name for path in (place.folder / "results").iterdir()} == {
        *("eval_results_sst-2.txt", "test_results_sst-2.txt", "run_sst-2.json"),
        *("dev_predictions_sst-2.csv", "test_predictions_sst-2.csv"),
    }
    assert place.last_record()["trainer"] == "linearised"
    assert "training the linearised model, without dropout, on 2 prompts" in outcome.messages
    assert "the linearised model is not saved" in outcome.messages


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--evaluate_during_training"], "`evaluate_during_training=True` needs saved models"),
        (["--resume_from_checkpoint", "true"], "`resume_from_checkpoint=true` needs saved models"),
        (["--load_best_model_at_end"], "`load_best_model_at_end=True` needs saved models"),
        (["--gradient_checkpointing"], "`gradient_checkpointing=True` does not work with `trainer=linearised`"),
        (["--fix_layers", "1", "--clip_frozen"], "`clip_frozen=True` does not work with `trainer=linearised`"),
        (["--optimizer_variant", "signgd"], "needs plain SGD"),
        (["--max_steps", "0"], "is too small"),
    ],
)
def test_settings_that_need_a_model_on_disk_are_refused(
    place: Workplace, tmp_path: Path, flags: list[str], words: str
) -> None:
    with pytest.raises((SettingError, UsageError)) as error:
        trainer_of(place, "linearised", tmp_path, *flags)
    assert words in str(error.value)


def test_the_model_stays_in_evaluation_mode_while_its_tangent_is_trained() -> None:
    model = tiny_prompt_model("bert")
    wrapper = LinearisedModel(model, [name for name, _ in model.named_parameters()])
    wrapper.train()
    assert wrapper.training and not any(module.training for module in model.modules())
    wrapper.to(torch.float32)
    assert {tensor.dtype for tensor in wrapper.start.values()} == {torch.float32}
