"""Snapshots of a training: they disturb nothing, and hold the logits, the tangent and the kernel of their step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from command_line import Workplace, read_kernel, read_results
from lmntk.config.arguments import parse_arguments
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.kernels.linearised import linearised
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import TrainingSnapshot, find_snapshots, read_snapshot
from lmntk.trainers.base import class_loss
from lmntk.trainers.finetune import FineTuneTrainer

TRAIN = ("--trainer", "standard", "--max_steps", "4", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2")
ALL = ("--kernel_steps", "0,1,2,3,4,last")


def snapshots(folder: Path, task: str = "sst-2") -> dict[int, TrainingSnapshot]:
    return {found.step: found for found in map(read_snapshot, find_snapshots(RunPaths(folder, task)))}


def experiment_of(place: Workplace, *flags: str) -> Experiment:
    run = build(*parse_arguments(place.argv(*TRAIN, *flags)))
    assert isinstance(run, Experiment)
    return run


def trainer_of(place: Workplace, output: Path, *flags: str) -> FineTuneTrainer:
    model_args, data_args, args = parse_arguments(place.argv(*TRAIN, "--output_dir", str(output), *flags))
    run = build(model_args, data_args, args)
    assert isinstance(run, Experiment)
    return FineTuneTrainer(run, model_args, args)


def parameters_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def prompts_of(run: Experiment, split: str) -> list[dict[str, Tensor]]:
    batches = [run.collator([feature]) for feature in run.datasets[split].features]
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]


WAYS = {
    "prompt": (),
    "one logit": ("--binary_classification",),
    "signgd": ("--kernel_formula", "signgd"),
    "asymmetric": ("--binary_classification", "--kernel_formula", "asymmetric_signgd"),
    "LoRA": ("--apply_lora", "--lora_r", "2"),
    "a new head": ("--few_shot_type", "finetune"),
    "a fitted head": ("--few_shot_type", "finetune", "--from_linearhead"),
    "fixed layers": ("--fix_layers", "1"),
}


@pytest.mark.parametrize("way", WAYS)
def test_snapshots_change_neither_the_training_nor_its_results(place: Workplace, way: str) -> None:
    """Dropout is on: the random numbers go on as if nothing had happened, and the weights are the same to the bit."""
    without = place.run(*TRAIN, *WAYS[way], output=f"{way} without")
    with_them = place.run(*TRAIN, *WAYS[way], *ALL, output=f"{way} with")
    written = {path.name for path in with_them.iterdir()} - {path.name for path in without.iterdir()}
    assert written == {f"step-00000{step}_sst-2.safetensors" for step in range(5)}
    for path in without.glob("*.safetensors"):
        assert path.read_bytes() == (with_them / path.name).read_bytes(), path.name
    for name in ("eval_results_sst-2.txt", "test_results_sst-2.txt", "test_predictions_sst-2.csv"):
        assert (without / name).read_bytes() == (with_them / name).read_bytes(), name


@pytest.mark.parametrize("way", WAYS)
def test_the_last_snapshot_holds_logits_tangent_and_kernel_of_the_trained_model(
    place: Workplace, tmp_path: Path, way: str
) -> None:
    """In float64, against the model called one prompt at a time, and a kernel run of the model that was saved."""
    flags = ("--kernel_dtype", "float64", *WAYS[way])
    run = experiment_of(place, *flags)
    trainer = trainer_of(place, tmp_path, *flags, "--kernel_steps", "last")
    start = parameters_of(run.model)
    trainer.train()
    (snapshot,) = snapshots(tmp_path).values()
    assert trainer.model is not None
    end = parameters_of(trainer.model)
    changed = {name: value for name, value in end.items() if not torch.equal(value, start[name])}
    for split, found in snapshot.splits.items():
        prompts = prompts_of(run, split)
        with torch.no_grad():
            logits = torch.cat([functional_call(run.model, end, kwargs=prompt) for prompt in prompts])
        tangent = linearised(run.model, prompts, changed)
        np.testing.assert_allclose(found.logits, logits, rtol=0, atol=1e-11)
        np.testing.assert_allclose(found.linearised, tangent, rtol=0, atol=1e-11)
        assert found.labels.tolist() == run.datasets[split].labels
    assert snapshot.description["grad_dim"] == trainer._num_trained
    assert snapshot.description["train_loss"] == pytest.approx(
        class_loss(torch.from_numpy(snapshot.splits["train"].logits), torch.tensor(run.datasets["train"].labels)).item()
    )
    assert set(snapshot.splits) == {"train", "dev", "test"}
    assert snapshot.step == snapshot.description["last_step"] == 4


@pytest.mark.parametrize("formula", ["sgd", "signgd"])
def test_the_kernel_of_a_step_is_that_of_a_kernel_run_of_the_model_then(place: Workplace, formula: str) -> None:
    """K₀ is the kernel of the checkpoint, K_T that of the folder in which the trained model was saved: bit for bit."""
    flags = ("--kernel_formula", formula)
    trained = place.run(*TRAIN, *flags, "--kernel_steps", "0,last", output=f"kernel {formula}")
    found = snapshots(trained)
    for step, model in ((0, place.model), (4, trained)):
        folder = place.run(*flags, "--model_name_or_path", str(model), output=f"kernel {formula} {step}")
        assert np.array_equal(found[step].kernel, read_kernel(folder, "train").numpy())
    assert not np.array_equal(found[0].kernel, found[4].kernel)


def test_the_last_snapshot_has_the_metrics_that_the_run_writes(place: Workplace) -> None:
    folder = place.run(*TRAIN, *ALL, output="metrics")
    last = snapshots(folder)[4]
    for split, name in (("dev", "eval"), ("test", "test")):
        found, written = last.splits[split], read_results(folder / f"{name}_results_sst-2.txt")
        assert np.mean(found.logits.argmax(1) == found.labels) == pytest.approx(written["eval_acc"])
        loss = class_loss(torch.from_numpy(found.logits), torch.from_numpy(found.labels)).item()
        assert loss == pytest.approx(written["eval_loss"], abs=1e-6)
