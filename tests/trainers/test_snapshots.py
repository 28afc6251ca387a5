"""Snapshots of a training: they disturb nothing, and hold the logits, the tangent and the kernel of their step."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from command_line import Workplace, read_kernel, read_results
from lmntk.config.arguments import parse_arguments
from lmntk.config.validation import check_arguments
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import FileError, SettingError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.kernels.linearised import linearised
from lmntk.storage.kernel_metadata import read_description
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import TrainingSnapshot, find_snapshots, read_snapshot
from lmntk.trainers.base import class_loss
from lmntk.trainers.finetune import FineTuneTrainer
from lmntk.trainers.snapshot_steps import sign_shares

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


def test_a_resumed_training_keeps_the_snapshots_that_are_there_and_writes_the_same_others(
    place: Workplace, tmp_path: Path
) -> None:
    """θ₀ is the model that the training started from, not the checkpoint from which it goes on."""
    flags = ("--save_steps", "2", *ALL)
    whole = trainer_of(place, tmp_path / "whole", *flags)
    whole.train()
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "checkpoint-4")
    kept = folder / "step-000001_sst-2.safetensors"
    before = kept.stat().st_mtime_ns
    (folder / "step-000000_sst-2.safetensors").unlink()
    trainer_of(place, folder, *flags, "--resume_from_checkpoint", "true").train()
    assert kept.stat().st_mtime_ns == before
    found, wanted = snapshots(folder), snapshots(tmp_path / "whole")
    assert list(found) == list(wanted) == [0, 1, 2, 3, 4]
    for step in found:
        assert found[step].description == wanted[step].description
        assert np.array_equal(found[step].kernel, wanted[step].kernel)
        for split, numbers in found[step].splits.items():
            assert np.array_equal(numbers.logits, wanted[step].splits[split].logits)
            assert np.array_equal(numbers.linearised, wanted[step].splits[split].linearised)


@pytest.fixture
def stopped(place: Workplace, tmp_path: Path) -> Path:
    """A training with snapshots of all steps, as if it had been stopped after step 2."""
    trainer_of(place, tmp_path, "--save_steps", "2", *ALL).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    return tmp_path


AGAIN = ("--save_steps", "2", "--resume_from_checkpoint", "true")


def test_snapshots_after_the_checkpoint_are_of_a_training_that_is_given_up(place: Workplace, stopped: Path) -> None:
    trainer_of(place, stopped, *AGAIN, "--kernel_steps", "0,9").train()
    assert list(snapshots(stopped)) == [0, 1, 2]


def test_a_training_that_goes_on_without_snapshots_removes_the_earlier_ones(
    place: Workplace, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not read, so that a damaged file is not in the way."""
    (stopped / "step-000001_sst-2.safetensors").write_bytes(b"damaged")
    trainer_of(place, stopped, *AGAIN, "--max_steps", "6").train()
    assert list(snapshots(stopped)) == []
    assert any("`kernel_steps` is not given" in message and "0, 1, 2, 3, 4" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kernel_formula", "signgd"), r"another `kernel_formula` \(sgd, here signgd\)"),
        (("--kernel_dtype", "float64"), r"other weights|another `kernel_dtype` \(float32, here float64\)"),
        (("--fix_layers", "1"), "another `fix_layers`"),
    ],
)
def test_a_training_does_not_go_on_with_kernels_of_another_kind(
    place: Workplace, stopped: Path, flags: tuple[str, ...], words: str
) -> None:
    files = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(SettingError, match=words):
        trainer_of(place, stopped, *AGAIN, *ALL, *flags).train()
    assert sorted(path.name for path in stopped.iterdir()) == files


def test_a_damaged_snapshot_is_named_with_the_way_to_go_on(place: Workplace, stopped: Path) -> None:
    damaged = stopped / "step-000001_sst-2.safetensors"
    damaged.write_bytes(b"damaged")
    with pytest.raises(FileError, match="step-000001_sst-2.safetensors, .* remove that file to go on without it"):
        trainer_of(place, stopped, *AGAIN, *ALL).train()
    damaged.unlink()
    trainer_of(place, stopped, *AGAIN, *ALL).train()
    assert list(snapshots(stopped)) == [0, 2, 3, 4]


def test_a_training_that_goes_on_from_other_weights_than_its_snapshots_is_refused(
    place: Workplace, tmp_path: Path
) -> None:
    trainer_of(place, tmp_path, "--save_steps", "2", *ALL).train()
    other = ("--model_name_or_path", str(tmp_path / "checkpoint-2"), "--resume_from_checkpoint")
    with pytest.raises(SettingError, match="belongs to a training that started from other weights"):
        trainer_of(place, tmp_path, "--save_steps", "2", *ALL, *other, "true").train()
    named = (*other, str(tmp_path / "checkpoint-2"))
    with pytest.raises(SettingError, match="started from other weights than those of `model_name_or_path`"):
        trainer_of(place, tmp_path / "new", "--save_steps", "2", "--kernel_steps", "last", *named).train()


def test_steps_that_a_resumed_training_missed_are_told(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(place, tmp_path / "first", "--save_steps", "2").train()
    again = ("--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-2"))
    trainer_of(place, tmp_path / "second", "--save_steps", "2", *ALL, *again).train()
    assert list(snapshots(tmp_path / "second")) == [0, 3, 4]
    assert "`kernel_steps`: training goes on after step 2, so there is no snapshot of steps 1, 2" in caplog.messages


def test_a_new_training_removes_the_snapshots_of_the_one_before(place: Workplace, tmp_path: Path) -> None:
    trainer_of(place, tmp_path, *ALL).train()
    assert len(snapshots(tmp_path)) == 5
    trainer_of(place, tmp_path, "--kernel_steps", "2").train()
    assert list(snapshots(tmp_path)) == [2]
    trainer_of(place, tmp_path).train()
    assert list(snapshots(tmp_path)) == []


def test_steps_after_the_last_are_told_before_training(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(place, tmp_path, "--kernel_steps", "0,9,7").train()
    assert "`kernel_steps`: training ends after 4 steps, so there is no snapshot of steps 7, 9" in caplog.messages
    assert list(snapshots(tmp_path)) == [0]


@pytest.fixture(scope="module")
def best(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> FineTuneTrainer:
    """A training that ends, after six steps, with the model of an earlier one, the best on dev."""
    folder = tmp_path_factory.mktemp("best")
    watching = ("--evaluate_during_training", "--eval_steps", "1", "--save_total_limit", "9", "--max_steps", "6")
    trainer = trainer_of(place, folder, *watching, "--kernel_steps", "0,1,2,3,4,5,6,last", "--seed", "1")
    trainer.train()
    return trainer


def test_where_the_best_model_on_dev_is_kept_the_last_snapshot_is_that_model(
    place: Workplace, best: FineTuneTrainer
) -> None:
    """The step is the model's own, and the snapshots of later steps are removed."""
    folder = Path(best.args.output_dir)
    step = int(str(best.state.best_model_checkpoint).rpartition("-")[2])
    assert step < 6, "this tests nothing: choose another seed"
    found = snapshots(folder)
    assert list(found) == list(range(step + 1))
    assert found[step].description["last_step"] == step
    evaluation = best.evaluate_split(best._experiment.datasets["test"])
    np.testing.assert_allclose(found[step].splits["test"].logits, evaluation.logits, rtol=0, atol=1e-5)


def test_a_step_against_the_gradient_is_counted_among_parameters_with_a_gradient() -> None:
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    weight.grad = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0])
    before = {"w": weight.clone()}
    weight += torch.tensor([-0.5, 0.5, 0.5, 0.0, 1.0])
    still = torch.ones(3)
    found = sign_shares(before | {"still": still}, {"w": weight, "still": still})
    assert found == {"sign_share": 2 / 3, "unmoved_share": 1 / 4}
    assert sign_shares({"still": still}, {"still": still}) == {"sign_share": None, "unmoved_share": None}


def test_parameters_that_rounding_keeps_in_place_are_counted_apart() -> None:
    """SignGD in float32 at 1e-9: a weight of 1 stays, one of 1e-3 moves, against its gradient."""
    weight = torch.tensor([1.0, 1e-3])
    weight.grad = torch.ones(2)
    assert sign_shares({"w": weight}, {"w": _stepped(weight, 1e-9)}) == {"sign_share": 1.0, "unmoved_share": 0.5}
    assert sign_shares({"w": weight}, {"w": _stepped(weight, 0.0)}) == {"sign_share": None, "unmoved_share": 1.0}


def _stepped(weight: Tensor, rate: float) -> Tensor:
    moved = weight - rate * weight.grad.sign()  # type: ignore[union-attr]
    moved.grad = weight.grad
    return moved


def test_a_training_that_moves_nothing_has_no_share_of_signs(place: Workplace, tmp_path: Path) -> None:
    trainer_of(place, tmp_path, "--kernel_steps", "1", "--learning_rate", "0").train()
    description = snapshots(tmp_path)[1].description
    assert (description["sign_share"], description["unmoved_share"]) == (None, 1.0)


@pytest.mark.parametrize(
    ("optimizer", "lowest", "highest"),
    [(["--optimizer", "sgd", "--optimizer_variant", "signgd"], 1.0, 1.0), ([], 1.0, 0.95)],
    ids=["signgd", "adam"],
)
def test_the_first_step_of_adam_is_that_of_signgd_and_later_ones_less_and_less(
    place: Workplace, tmp_path: Path, optimizer: list[str], lowest: float, highest: float
) -> None:
    flags = ("--kernel_dtype", "float64", "--kernel_steps", "1,4", "--learning_rate", "1e-3", *optimizer)
    trainer_of(place, tmp_path, *flags).train()
    found = snapshots(tmp_path)
    assert found[1].description["sign_share"] == pytest.approx(lowest, abs=1e-4)
    assert 0.5 < found[4].description["sign_share"] <= highest


def test_gradient_accumulation_counts_optimizer_steps(place: Workplace, tmp_path: Path) -> None:
    flags = ("--gradient_accumulation_steps", "2", "--max_steps", "2", "--per_device_train_batch_size", "1")
    trainer_of(place, tmp_path, *flags, *ALL).train()
    found = snapshots(tmp_path)
    assert list(found) == [0, 1, 2]
    assert all("sign_share" in found[step].description for step in (1, 2))


def test_the_fixed_prompts_of_train_count_where_training_draws_demonstrations_anew(
    place: Workplace, tmp_path: Path
) -> None:
    """Of dev and test, an example's logits are means over its draws, as where the run evaluates."""
    flags = ("--few_shot_type", "prompt-demo", "--num_sample", "2", "--kernel_dtype", "float64")
    run = experiment_of(place, *flags)
    trainer = trainer_of(place, tmp_path, *flags, "--kernel_steps", "0")
    trainer.train()
    (snapshot,) = snapshots(tmp_path).values()
    for split, size in (("train", 4), ("dev", 4), ("test", 6)):
        with torch.no_grad():
            every = torch.cat([run.model(**prompt) for prompt in prompts_of(run, split)])
        assert len(every) == size * (1 if split == "train" else 2)
        averaged = mean_over_samples(every.numpy(), size)
        np.testing.assert_allclose(snapshot.splits[split].logits, averaged, rtol=0, atol=1e-12)
    assert snapshot.kernel is not None and snapshot.kernel.shape == (4, 2, 4, 2)


def test_a_snapshot_says_what_it_is_of(place: Workplace, tmp_path: Path) -> None:
    flags = ("--apply_lora", "--lora_r", "2", "--kernel_formula", "signgd", "--seed", "5", "--fix_layers", "1")
    trainer_of(place, tmp_path, *flags, "--kernel_steps", "1").train()
    description = snapshots(tmp_path)[1].description
    expected = {
        "step": 1,
        "last_step": 4,
        "trainer": "standard",
        "task_name": "sst-2",
        "few_shot_type": "prompt",
        "seed": 5,
        "model_name_or_path": str(place.model),
        "template": "*cls**sent_0*_It_was*mask*.*sep+*",
        "mapping": {"0": "terrible", "1": "great"},
        "binary_classification": False,
        "apply_lora": True,
        "lora_r": 2,
        "optimizer": "adam",
        "optimizer_variant": "",
        "learning_rate": 1e-2,
        "kernel_formula": "signgd",
        "kernel_dtype": "float32",
        "parameters": {"only_adapters": True, "exclude_embeddings": True, "exclude_first_layers": 1},
    }
    assert {name: description[name] for name in expected} == expected
    numbers = {"grad_dim", "train_loss", "sign_share", "unmoved_share"}
    assert description.keys() - expected.keys() == numbers | {"weights_sha256", "tokens_sha256", "data_sha256"}
    kernel = read_description(RunPaths(place.run(output="kernel with hashes"), "sst-2").kernel("train"))
    assert kernel is not None
    for name in ("tokens_sha256", "data_sha256"):
        assert description[name]["train"] == kernel[name]["train"]
        assert description[name].keys() == {"train", "dev", "test"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kernel_steps", "0,x"], "is not a list of steps ('x')"),
        (["--kernel_steps", "-1"], "is not a list of steps ('-1')"),
        (["--kernel_steps", "0,,2"], "is not a list of steps ('')"),
        (["--kernel_steps", "0", "--task_name", "sts-b"], "is for classes, but STS-B is a regression task"),
        (["--kernel_steps", "0", "--kernel_formula", "asymmetric_signgd"], "needs `binary_classification`"),
    ],
)
def test_steps_and_tasks_that_have_no_snapshots_are_refused(place: Workplace, flags: list[str], words: str) -> None:
    with pytest.raises(SettingError) as error:
        check_arguments(*parse_arguments(place.argv(*TRAIN, *flags)))
    assert words in str(error.value)


def test_too_little_memory_for_the_kernel_of_a_snapshot_is_refused(place: Workplace, tmp_path: Path) -> None:
    trainer = trainer_of(place, tmp_path, "--kernel_steps", "0", "--kernel_memory_gb", "1e-6")
    with pytest.raises(SettingError, match="the tiles of a snapshot's kernel take"):
        trainer.train()
