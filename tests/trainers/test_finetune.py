"""Fine-tuning: it moves the logits as the kernels say; its steps are the optimizer's; the right model is kept."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, set_seed

from command_line import Workplace
from lmntk.config.arguments import ModelArguments, TrainingArguments, parse_arguments
from lmntk.errors import ModelError, SettingError, UsageError
from lmntk.experiment.build import build
from lmntk.experiment.experiment import Experiment
from lmntk.kernels.empirical import empirical_ntk
from lmntk.models.classifier import PromptClassifier
from lmntk.models.parameters import ParameterFilter, select_parameters
from lmntk.trainers.base import class_loss, log_odds, regression_loss
from lmntk.trainers.finetune import FineTuneTrainer
from lmntk.trainers.linear_head import fit_linear_head
from tiny_models import ARCHITECTURES, TYPICAL_CAUSAL, save_tiny_checkpoint, tiny_prompt_model

# With the defaults of a first-order comparison: no clipping, no schedule, no decay, all examples in one batch.
PLAIN = [
    "--lr_scheduler_type",
    "constant",
    "--max_grad_norm",
    "0",
    "--save_strategy",
    "no",
    "--dataloader_drop_last",
    "0",
]


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    """A tiny RoBERTa without dropout, so that training has no luck in it."""
    config = AutoConfig.from_pretrained(place.model)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(place.model)
    return place


@pytest.fixture(scope="module")
def models(place: Workplace) -> dict[str, list[str]]:
    """The flags that choose a model: the RoBERTa of the place, or a causal one, all without dropout."""
    flags = {"roberta": []}
    for architecture in TYPICAL_CAUSAL:
        folder = save_tiny_checkpoint(architecture, place.folder / architecture)
        config = AutoConfig.from_pretrained(folder)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        config.save_pretrained(folder)
        flags[architecture] = ["--model_name_or_path", str(folder)]
    return flags


def parse(place: Workplace, output: Path, *flags: str) -> tuple[Experiment, ModelArguments, TrainingArguments]:
    argv = place.argv("--trainer", "standard", "--output_dir", str(output), *flags)
    model_args, data_args, training_args = parse_arguments(argv)
    run = build(model_args, data_args, training_args)
    if training_args.from_linearhead:
        fit_linear_head(run, training_args.device)
    return run, model_args, training_args


def trainer_of(place: Workplace, output: Path, *flags: str) -> FineTuneTrainer:
    return FineTuneTrainer(*parse(place, output, *flags))


def batch_of(run: Experiment, split: str) -> dict[str, Tensor]:
    batch = run.collator(run.datasets[split].features)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch)


def moved_by_training(place: Workplace, output: Path, *flags: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of test before and after training in float64, and the learning rate's own share of their change."""
    trainer = trainer_of(place, output, "--kernel_dtype", "float64", *PLAIN, *flags)
    model = trainer.model
    assert model is not None
    batch = batch_of(trainer._experiment, "test")
    before = logits_of(model, batch)
    trainer.train()
    return before, logits_of(model, batch), (logits_of(model, batch) - before) / trainer.args.learning_rate


def slopes(run: Experiment) -> Tensor:
    """The derivative of each train example's own loss by its logits, ``[N, C]``."""
    assert run.model is not None
    logits = logits_of(run.model, batch_of(run, "train")).requires_grad_()
    labels = torch.tensor(run.datasets["train"].labels)
    (class_loss(logits, labels) * len(labels)).backward()
    assert logits.grad is not None
    return logits.grad


def kernel_of(run: Experiment, formula: str) -> Tensor:
    """Between train and test, over the parameters that fine-tuning trains."""
    model = run.model
    assert model is not None
    trained = select_parameters(model, ParameterFilter(only_adapters=run.lora is not None))
    train, test = (
        [batch_of_one(run, split, index) for index in range(len(run.datasets[split]))] for split in ("train", "test")
    )
    params = {name: parameter.detach() for name, parameter in trained.items()}
    return empirical_ntk(model, train, test, params=params, formula=formula, engine="factored")


def batch_of_one(run: Experiment, split: str, index: int) -> dict[str, Tensor]:
    batch = run.collator([run.datasets[split].features[index]])
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def relative_errors(found: Sequence[Tensor], expected: Tensor) -> list[float]:
    return [float((one - expected).norm() / expected.norm()) for one in found]


RATES = [1e-3, 1e-4, 1e-5, 1e-6]


def falls_linearly(errors: list[float]) -> bool:
    """Each tenth of the learning rate makes the error a tenth: between an eighth and a twelfth."""
    return all(8 < larger / smaller < 12 for larger, smaller in zip(errors[:-1], errors[1:], strict=True))


WAYS = {
    "two logits": [],
    "one logit": ["--binary_classification"],
    "a classification head": ["--few_shot_type", "finetune"],
    "one token, fitted": ["--few_shot_type", "finetune", "--from_linearhead"],
    "LoRA": ["--apply_lora", "--lora_r", "2"],
}
MODELS_AND_WAYS = [*(("roberta", way) for way in WAYS), ("gpt2", "two logits"), ("gpt2", "LoRA")]
MODELS_AND_WAYS += [("llama", "two logits"), ("llama", "a classification head"), ("opt", "one token, fitted")]


@pytest.mark.parametrize(("architecture", "way"), MODELS_AND_WAYS)
def test_a_step_of_sgd_moves_the_logits_as_the_sgd_kernel_says(
    place: Workplace, models: dict[str, list[str]], tmp_path: Path, architecture: str, way: str
) -> None:
    """Δf(x) = −η Σ_i K(x, i) ∂ℓ/∂f(i) / N to first order, so that the relative error is proportional to η."""
    way = [*WAYS[way], *models[architecture]]
    run = parse(place, tmp_path, "--kernel_dtype", "float64", *way)[0]
    steps = ["--optimizer", "sgd", "--max_steps", "1", "--per_device_train_batch_size", "4", *way]
    assert len(run.datasets["train"]) == 4
    expected = -torch.einsum("iaxb,ia->xb", kernel_of(run, "sgd"), slopes(run)) / 4
    found = [moved_by_training(place, tmp_path, *steps, "--learning_rate", str(rate))[2] for rate in RATES]
    errors = relative_errors(found, expected)
    assert falls_linearly(errors), errors
    assert errors[-1] < 1e-3
    assert expected.norm() > 0.1


def test_many_steps_of_sgd_over_single_examples_move_the_logits_by_the_sum_of_their_kernels(
    place: Workplace, tmp_path: Path
) -> None:
    """An epoch with batches of one: to first order each example adds its own term, in whatever order."""
    run = parse(place, tmp_path, "--kernel_dtype", "float64")[0]
    steps = ["--optimizer", "sgd", "--num_train_epochs", "1", "--per_device_train_batch_size", "1"]
    expected = -torch.einsum("iaxb,ia->xb", kernel_of(run, "sgd"), slopes(run))
    found = [moved_by_training(place, tmp_path, *steps, "--learning_rate", str(rate))[2] for rate in RATES]
    errors = relative_errors(found, expected)
    assert falls_linearly(errors), errors


def test_steps_of_signgd_move_the_logits_as_the_asymmetric_kernel_says(place: Workplace, tmp_path: Path) -> None:
    """Δf(x) = −η Σ_i sign(∂ℓ/∂f(i)) ⟨sign ∇f(i), ∇f(x)⟩: of one logit the sign factors (Malladi et al. 2023, 3.2)."""
    flags = ["--binary_classification"]
    run = parse(place, tmp_path, "--kernel_dtype", "float64", *flags)[0]
    kernel = kernel_of(run, "asymmetric_signgd")[0]
    expected = -torch.einsum("iaxb,ia->xb", kernel, slopes(run).sign())
    flags += ["--optimizer", "sgd", "--optimizer_variant", "signgd", "--per_device_train_batch_size", "1"]
    # Key biases have gradients that are zero but for rounding: their signs, and with them the step, mean nothing; but
    # nothing feels them either. A sign step is large, 1 in every parameter: it takes smaller rates.
    rates = [rate / 1000 for rate in RATES]
    found = [
        moved_by_training(place, tmp_path, *flags, "--num_train_epochs", "1", "--learning_rate", str(rate))[2]
        for rate in rates
    ]
    errors = relative_errors(found, expected)
    assert falls_linearly(errors), errors
    assert errors[-1] < 1e-6


def by_hand(place: Workplace, output: Path, step: str, rate: float, *flags: str) -> dict[str, Tensor]:
    """Parameters after two full-batch steps of an optimizer written out here, clipped to norm 1."""
    run = parse(place, output, "--kernel_dtype", "float64", *flags)[0]
    model = run.model
    assert model is not None
    labels = torch.tensor(run.datasets["train"].labels)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for time in (1, 2):
        model.zero_grad()
        class_loss(model.eval()(**batch_of(run, "train")), labels).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = min(1.0, 1.0 / (float(norm) + 1e-6))
        for name, parameter in model.named_parameters():
            gradient = gradients[name] * scale
            decays = parameter.dim() > 1
            with torch.no_grad():
                if step == "signgd":
                    gradient = gradient.sign()
                if decays and step != "adam":
                    gradient = gradient + 0.1 * parameter
                if step != "adam":
                    parameter -= rate * gradient
                    continue
                if decays:
                    parameter *= 1 - rate * 0.1
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                parameter -= rate * (first / (1 - 0.9**time)) / ((second / (1 - 0.999**time)).sqrt() + 1e-8)
    return {name: p.detach() for name, p in model.named_parameters()}


STEPS = {
    "adam": [],
    "sgd": ["--optimizer", "sgd"],
    "signgd": ["--optimizer", "sgd", "--optimizer_variant", "signgd"],
}


@pytest.mark.parametrize(("architecture", "step"), [*(("roberta", step) for step in STEPS), ("llama", "adam")])
def test_two_steps_are_those_of_the_optimizer_written_out_by_hand(
    place: Workplace, models: dict[str, list[str]], tmp_path: Path, architecture: str, step: str
) -> None:
    """Clipping first, then the sign, then the step; weights decay, biases and norms do not. To 1e-9 in float64."""
    flags = [*STEPS[step], *models[architecture]]
    given = ["--lr_scheduler_type", "constant", "--weight_decay", "0.1", "--save_strategy", "no", "--max_steps", "2"]
    given += ["--learning_rate", "0.01", "--per_device_train_batch_size", "4", "--kernel_dtype", "float64", *flags]
    trainer = trainer_of(place, tmp_path, *given)
    trainer.train()
    expected = by_hand(place, tmp_path, step, 0.01, *models[architecture])
    assert trainer.model is not None
    for name, parameter in trainer.model.named_parameters():
        if "key.bias" in name:
            continue  # zero but for rounding, of which the optimizers make steps
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-9, msg=name)


def test_weights_decay_but_biases_and_norms_of_every_architecture_do_not(place: Workplace, tmp_path: Path) -> None:
    trainer = trainer_of(place, tmp_path, *PLAIN, "--max_steps", "1")
    for architecture in ARCHITECTURES:
        model = tiny_prompt_model(architecture)
        decaying = trainer.get_decay_parameter_names(model)
        assert set(decaying) == {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        norms = [name for name, _ in model.named_parameters() if "norm" in name.lower() or ".ln_" in name]
        assert len(norms) >= 5 and not set(norms) & set(decaying)


@pytest.mark.parametrize(
    ("architecture", "beginnings", "least"),
    [
        ("roberta", (".embeddings.", ".layer.0."), 16),
        ("gpt2", (".wte.", ".wpe.", ".h.0."), 14),
        ("llama", (".embed_tokens.", ".layers.0."), 10),
    ],
)
def test_fixed_layers_and_embeddings_stay_as_they_were_and_the_rest_is_trained(
    place: Workplace,
    models: dict[str, list[str]],
    tmp_path: Path,
    architecture: str,
    beginnings: tuple[str, ...],
    least: int,
) -> None:
    flags = [*PLAIN, "--fix_layers", "1", "--max_steps", "1", "--learning_rate", "0.1", *models[architecture]]
    trainer = trainer_of(place, tmp_path, *flags)
    assert trainer.model is not None
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    stayed = {name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])}
    fixed = {name for name in before if any(part in name for part in beginnings)}
    assert stayed == fixed
    assert len(fixed) >= least


def test_training_that_was_interrupted_ends_where_undisturbed_training_ends(place: Workplace, tmp_path: Path) -> None:
    flags = ["--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3"]
    trainer_of(place, tmp_path / "whole", *flags).train()
    resumed = trainer_of(
        place, tmp_path / "resumed", *flags, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3")
    )
    resumed.train()
    assert resumed.state.global_step == 6
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, msg=name)


def test_true_resumes_from_the_last_whole_checkpoint_or_starts_at_the_beginning(
    place: Workplace, tmp_path: Path
) -> None:
    flags = ["--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2"]
    trainer_of(place, tmp_path, *flags, "--resume_from_checkpoint", "true").train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    again = trainer_of(place, tmp_path, *flags, "--resume_from_checkpoint", "true")
    assert again._find_checkpoint() == tmp_path / "checkpoint-2"


def test_a_training_that_is_stopped_says_what_is_kept_and_goes_on_from_there(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = place.argv("--trainer", "standard", "--max_steps", "6", "--save_steps", "2", output="stopped")
    real = FineTuneTrainer.training_step

    def step(self: FineTuneTrainer, *args: Any) -> Tensor:
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FineTuneTrainer, "training_step", step)
        outcome = place.call(argv)
    folder = place.folder / "stopped"
    assert (outcome.status, outcome.err) == (
        143,
        f"stopped by SIGTERM: 2 checkpoints are kept in {folder}; the same command with --resume_from_checkpoint true "
        "goes on from the last\n",
    )
    assert place.call(argv).status == 2, "the folder is in use"
    again = place.call([*argv, "--resume_from_checkpoint", "true"])
    assert again.status == 0
    assert f"continuing from {folder / 'checkpoint-4'}" in again.messages
    whole = place.call(place.argv("--trainer", "standard", "--max_steps", "6", "--save_steps", "2", output="whole"))
    assert whole.status == 0
    results = [(place.folder / name / "test_results_sst-2.txt").read_bytes() for name in ("stopped", "whole")]
    assert results[0] == results[1]


def test_a_new_training_removes_the_checkpoints_of_the_one_it_overwrites(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-900").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    trainer_of(place, tmp_path, *PLAIN, "--max_steps", "1").train()
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-of-mine"]


def test_the_model_that_is_best_on_dev_is_kept_the_first_of_equals(place: Workplace, tmp_path: Path) -> None:
    flags = ["--max_steps", "8", "--eval_steps", "2", "--evaluate_during_training", "--save_total_limit", "9"]
    trainer = trainer_of(place, tmp_path, *flags, "--learning_rate", "0.02", "--per_device_train_batch_size", "2")
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_acc" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6, 8]
    accuracies = [entry["eval_acc"] for entry in history]
    assert len(set(accuracies)) > 1, "the test would allow anything"
    best = history[accuracies.index(max(accuracies))]["step"]
    kept = load_file(tmp_path / "model.safetensors")
    expected = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert trainer.evaluate(trainer._experiment.datasets["dev"])["eval_acc"] == max(accuracies)


def test_save_at_last_keeps_the_last_model_though_dev_is_evaluated(place: Workplace, tmp_path: Path) -> None:
    flags = ["--max_steps", "4", "--eval_steps", "2", "--evaluate_during_training", "--save_at_last"]
    trainer = trainer_of(place, tmp_path, *flags, "--learning_rate", "0.02", "--per_device_train_batch_size", "2")
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_acc" in entry] == [2, 4]
    assert trainer.model is not None
    kept = load_file(tmp_path / "model.safetensors")
    assert torch.equal(kept["lm_head.dense.weight"], trainer.model.lm.lm_head.dense.weight)


def test_without_eval_steps_dev_is_evaluated_every_epoch(place: Workplace, tmp_path: Path) -> None:
    flags = ["--num_train_epochs", "3", "--evaluate_during_training", "--per_device_train_batch_size", "2"]
    trainer = trainer_of(place, tmp_path, *flags)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_acc" in entry] == [2, 4, 6]


def test_a_checkpoint_of_another_architecture_is_refused_and_nothing_of_it_is_loaded(
    place: Workplace, tmp_path: Path
) -> None:
    trainer = trainer_of(
        place, tmp_path / "a", *PLAIN, "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"
    )
    trainer.train()
    folder = tmp_path / "a" / "checkpoint-1"
    flags = ["--few_shot_type", "finetune", "--max_steps", "2", "--resume_from_checkpoint", str(folder)]
    other = trainer_of(place, tmp_path / "b", *flags)
    assert other.model is not None
    before = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(ModelError, match="resume_from_checkpoint.* is a checkpoint of another model or architecture"):
        other.train()
    assert all(torch.equal(old, new) for old, new in zip(before, other.model.parameters(), strict=True))


def test_going_on_with_other_prompts_is_refused_and_with_another_rate_is_told(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--max_steps", "2", "--save_steps", "1", "--save_total_limit", "5", "--learning_rate", "1e-3"]
    trainer_of(place, tmp_path / "a", *flags).train()
    resume = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")]
    other = ["--template", "*cls**sent_0*_This_is*mask*.*sep+*"]
    with pytest.raises(UsageError, match="checkpoint-1 was trained on other prompts"):
        trainer_of(place, tmp_path / "b", *flags, *resume, *other).train()
    trainer_of(place, tmp_path / "c", *flags, *resume, "--learning_rate", "1e-5").train()
    assert [message for message in caplog.messages if "`learning_rate` is 1e-05, but was 0.001" in message]
    kept = [load_file(tmp_path / name / "model.safetensors")["lm_head.dense.weight"] for name in "ac"]
    assert torch.equal(*kept)


def test_a_checkpoint_behind_the_last_step_is_refused(place: Workplace, tmp_path: Path) -> None:
    flags = ["--save_steps", "1", "--save_total_limit", "5"]
    trainer_of(place, tmp_path, *flags, "--max_steps", "3").train()
    again = trainer_of(place, tmp_path, *flags, "--max_steps", "2", "--resume_from_checkpoint", "true")
    with pytest.raises(SettingError, match="is of step 3") as error:
        again.train()
    assert error.value.data == {"setting": "max_steps", "value": 2}


def test_checkpoints_of_another_training_do_not_stay_beside_one_that_is_resumed(
    place: Workplace, tmp_path: Path
) -> None:
    flags = ["--save_steps", "1", "--save_total_limit", "5", "--max_steps", "2"]
    trainer_of(place, tmp_path / "a", *flags).train()
    (tmp_path / "b" / "checkpoint-900").mkdir(parents=True)
    resume = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")]
    with pytest.raises(UsageError, match="holds checkpoints of another training"):
        trainer_of(place, tmp_path / "b", *flags, *resume).train()
    trainer_of(place, tmp_path / "b", *flags, *resume, "--overwrite_output_dir").train()
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-2"]


def test_what_a_training_starts_from_is_not_removed_for_its_checkpoints(place: Workplace, tmp_path: Path) -> None:
    trainer_of(place, tmp_path, "--save_steps", "1", "--save_total_limit", "5", "--max_steps", "1").train()
    source = tmp_path / "checkpoint-1"
    trainer = trainer_of(place, tmp_path, "--model_name_or_path", str(source), "--max_steps", "1")
    with pytest.raises(UsageError, match="this training starts from .*checkpoint-1: choose another folder"):
        trainer.train()
    assert (source / "model.safetensors").is_file()


def test_adapters_that_are_trained_further_stand_on_the_model_and_not_on_the_adapters(
    place: Workplace, tmp_path: Path
) -> None:
    flags = ["--apply_lora", "--max_steps", "1"]
    trainer_of(place, tmp_path / "first", *flags).train()
    further = trainer_of(place, tmp_path / "second", *flags, "--model_name_or_path", str(tmp_path / "first"))
    further.train()
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(place.model)
    again = trainer_of(place, tmp_path / "third", *flags, "--model_name_or_path", str(tmp_path / "second"))
    batch = batch_of(again._experiment, "test")
    assert further.model is not None and again.model is not None
    assert torch.equal(logits_of(again.model, batch), logits_of(further.model, batch))


def test_logits_that_are_no_numbers_are_told(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(place, tmp_path, *PLAIN, "--max_steps", "3", "--learning_rate", "1e30", "--optimizer", "sgd")
    trainer.train()
    trainer.evaluate(trainer._experiment.datasets["test"])
    assert [message for message in caplog.messages if "of test have logits that are NaN or infinite" in message]


def test_any_number_beats_one_that_is_none(place: Workplace, tmp_path: Path) -> None:
    trainer = trainer_of(place, tmp_path, "--max_steps", "1", "--evaluate_during_training")
    metric = "eval_acc"
    assert trainer._determine_best_metric({metric: float("nan")}, None) in (True, False)
    assert trainer._determine_best_metric({metric: 0.25}, None)
    assert trainer.state.best_metric == 0.25
    assert not trainer._determine_best_metric({metric: float("nan")}, None)


def test_the_loss_is_cross_entropy_or_squared_error_by_hand() -> None:
    logits, labels = torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    entropy = -np.mean([np.log(float(probabilities[i, label])) for i, label in enumerate(labels.tolist())])
    assert class_loss(logits, labels).item() == pytest.approx(entropy, abs=1e-6)
    squares = [(1 - 1) ** 2, (-1 - 0) ** 2, (0.5 - 1) ** 2, (2 - 0) ** 2, 0, 1]
    assert class_loss(logits, labels, squared=True).item() == pytest.approx(np.mean(squares), abs=1e-6)
    single = logits[:, 1:] - logits[:, :1]
    assert class_loss(single, labels).item() == pytest.approx(entropy, abs=1e-6)
    assert class_loss(single, labels, squared=True).item() == pytest.approx(np.mean([1, 2.5**2, 1]), abs=1e-6)
    spread = -np.mean(
        [np.log(probabilities[i].numpy()) @ (0.9 * np.eye(2)[label] + 0.05) for i, label in enumerate(labels)]
    )
    assert class_loss(logits, labels, smoothing=0.1).item() == pytest.approx(spread, abs=1e-6)


def test_a_score_is_where_the_probability_of_the_upper_label_word_lies_between_the_ends() -> None:
    logits, labels = torch.tensor([[0.0, 0.0], [0.0, np.log(3.0)]]), torch.tensor([5.0, 2.5])
    loss, scores = regression_loss(logits, labels)
    assert scores.flatten().tolist() == pytest.approx([2.5, 3.75], abs=1e-6)
    # KL(p || q) = Σ p log(p / q): of the place 1 against 1/2, and of 1/2 against 3/4.
    expected = (np.log(2) + 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss, scores = regression_loss(torch.tensor([[3.0], [1.0]]), labels)
    assert (loss.item(), scores.flatten().tolist()) == (pytest.approx((4 + 2.25) / 2), [3.0, 1.0])


def test_log_odds_are_the_differences_of_logits_that_predict_the_scores_but_for_the_ends() -> None:
    scores = np.array([0.05, 1.0, 2.5, 4.9])
    difference = torch.from_numpy(log_odds(scores))
    predicted = regression_loss(torch.stack([-difference / 2, difference / 2], dim=1), torch.zeros(4))[1]
    assert predicted.flatten().tolist() == pytest.approx(scores.tolist(), abs=1e-9)
    assert log_odds(np.array([0.0, 5.0])).tolist() == pytest.approx([-np.log(99), np.log(99)])


def test_what_is_going_to_be_trained_is_said_before(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lmntk"):
        trainer_of(place, tmp_path, *PLAIN, "--max_steps", "1", "--optimizer", "sgd", "--fix_layers", "2").train()
    told = next(message for message in caplog.messages if message.startswith("fine-tuning on"))
    assert told.startswith("fine-tuning on 4 prompts: 1 step of batches of 8 with SGD, learning rate 5e-05; ")


def test_a_state_written_beside_a_checkpoint_holds_no_pickle(place: Workplace, tmp_path: Path) -> None:
    trainer_of(place, tmp_path, "--max_steps", "2", "--save_steps", "1").train()
    assert not list(tmp_path.rglob("*.bin"))
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["model_type"] == "roberta"
    assert isinstance(trainer_of(place, tmp_path, "--max_steps", "2").model, PromptClassifier)
    set_seed(0)
