"""Training through the command line, as a black box: fine-tuning, linear heads, LoRA, scores, second test sets."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from command_line import (
    ROOT,
    SENTENCES,
    SIZES,
    Workplace,
    read_kernel,
    read_results,
    read_tensors,
    sst2_rows,
    write_rows,
)
from tiny_models import CAUSAL, TYPICAL, save_tiny_checkpoint

STEPS = ("--trainer", "standard", "--max_steps", "4", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2")
ONE_STEP = ("--max_steps", "1", "--per_device_train_batch_size", "4", "--max_grad_norm", "0", "--optimizer", "sgd")
OF_DEV = {"eval_results_sst-2.txt", "dev_predictions_sst-2.csv", "run_sst-2.json"}
RESULTS = OF_DEV | {"test_results_sst-2.txt", "test_predictions_sst-2.csv"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
MODEL = {"config.json", "model.safetensors", *TOKENIZER}
ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", *TOKENIZER}
SCORES = {"train": (0.5, 4.2, 1.0, 3.8), "dev": (4.0, 0.0, 2.5, 5.0), "test": (1.2, 3.0, 4.8, 0.2, 2.0, 3.6)}
PAIRS = [(SENTENCES[i].capitalize(), SENTENCES[(i * 2 + 1) % 6].capitalize()) for i in range(6)]
INFERENCE = ("contradiction", "entailment", "neutral")


@pytest.fixture(scope="module")
def tuned(place: Workplace) -> Path:
    """The output folder of a plain fine-tuning run."""
    return place.run(*STEPS, "--tag", "a tag", output="tuned")


@pytest.fixture(scope="module")
def still(place: Workplace) -> Path:
    """The checkpoint with a configuration without dropout."""
    folder = place.folder / "still"
    shutil.copytree(place.model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lm(place: Workplace) -> nn.Module:
    """The checkpoint as transformers loads it."""
    return AutoModelForMaskedLM.from_pretrained(place.model, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def scores_data(place: Workplace) -> list[str]:
    """The flags for tiny STS-B data."""
    for split, scores in SCORES.items():
        rows = [["x"] * 7 + [*PAIRS[i], str(score)] for i, score in enumerate(scores)]
        write_rows(place.folder / "STS-B" / f"{split}.tsv", [["h"] * 10, *rows])
    return ["--task_name", "sts-b", "--data_dir", str(place.folder / "STS-B")]


def files(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def results(folder: Path, task: str = "sst-2") -> tuple[dict[str, float], dict[str, float]]:
    """The numbers for dev and for test."""
    return read_results(folder / f"eval_results_{task}.txt"), read_results(folder / f"test_results_{task}.txt")


def used_again(place: Workplace, folder: Path, *flags: str, task: str = "sst-2") -> None:
    """See that what a run left, evaluated as it is, has the run's own metrics and loss."""
    output = place.run("--no_train", "--model_name_or_path", str(folder), *flags, output=f"{folder.name} again")
    for found, wanted in zip(results(output, task), results(folder, task), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


def logits_of(place: Workplace, *flags: str, name: str) -> np.ndarray:
    """The test logits that a run saves."""
    saving = (
        "--save_logit",
        "--save_logit_dir",
        str(place.folder / f"{name} logits"),
        "--model_id",
        "0",
        "--array_id",
        "3",
    )
    place.run(*flags, *saving, output=name)
    (path,) = (place.folder / f"{name} logits").iterdir()
    return np.load(path)


def prompt_ids(folder: Path, texts: Iterable[str]) -> tuple[list[Tensor], list[int], list[int]]:
    """Tokens of prompts written out by hand, each one's place of the mask, and the label words."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    places = [row[0].tolist().index(tokenizer.mask_token_id) for row in ids]
    return ids, places, tokenizer.convert_tokens_to_ids(["Ġterrible", "Ġgreat"])


def sst2_prompts(split: str, size: int | None = None) -> list[str]:
    return [f"<s>{text} It was<mask>.</s>" for text, _ in sst2_rows(size or SIZES[split], split)]


def hand_logits(model: nn.Module, folder: Path, texts: Iterable[str]) -> Tensor:
    """The label words' logits of prompts, asked one at a time."""
    ids, places, words = prompt_ids(folder, texts)
    return torch.stack([model(input_ids=row).logits[0, at, words] for row, at in zip(ids, places, strict=True)])


# Fine-tuning: what it leaves.


def test_fine_tuning_leaves_results_and_a_model_and_nothing_else(tuned: Path) -> None:
    assert files(tuned) == RESULTS | MODEL
    for found in results(tuned):
        assert found.keys() == {"eval_acc", "eval_loss"}


def test_the_log_line_of_a_fine_tuning_run_has_its_flags_and_its_numbers(place: Workplace, tuned: Path) -> None:
    lines = [json.loads(line) for line in (place.folder / "log").read_text(encoding="utf-8").splitlines()]
    (record,) = (line for line in lines if line["output_dir"] == str(tuned))
    for split, found in zip(("dev", "test"), results(tuned), strict=True):
        assert found == {key.removeprefix(f"sst-2_{split}_"): record[key] for key in record if f"_{split}_" in key}
    assert (record["tag"], record["trainer"], record["max_steps"], record["learning_rate"]) == (
        "a tag",
        "standard",
        4,
        1e-2,
    )
    assert {"time", "seconds", "versions", "seed", "num_k", "optimizer", "few_shot_type", "template"} <= record.keys()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *((name, "prompt") for name in TYPICAL),
        *((n, k) for n in ("bert", "roberta", "gpt2") for k in ("finetune", "one token")),
    ],
)
def test_a_model_that_was_fine_tuned_is_read_again(place: Workplace, architecture: str, kind: str) -> None:
    model = place.folder / f"tiny {architecture}"
    if not model.exists():
        save_tiny_checkpoint(architecture, model, seed=1)
    head = ("--few_shot_type", kind) if kind != "one token" else ("--few_shot_type", "finetune", "--from_linearhead")
    folder = place.run(*STEPS, *head, "--model_name_or_path", str(model), output=f"{architecture} {kind}")
    more = {"head.safetensors"} if kind == "one token" else set()
    more |= {"generation_config.json"} if architecture in CAUSAL and kind == "prompt" else set()
    assert files(folder) == RESULTS | MODEL | more
    used_again(place, folder, *head)


def test_transformers_itself_reads_a_fine_tuned_model_and_gives_the_same_logits(place: Workplace, tuned: Path) -> None:
    saved = logits_of(place, "--no_train", "--model_name_or_path", str(tuned), name="by run")
    with torch.no_grad():
        model = AutoModelForMaskedLM.from_pretrained(tuned).eval()
        wanted = hand_logits(model, tuned, sst2_prompts("test"))
    assert saved == pytest.approx(wanted.numpy(), abs=1e-5)  # float32


def test_the_decoder_is_trained_apart_from_the_word_embeddings(place: Workplace, tuned: Path) -> None:
    stored = weights(tuned)
    embeddings, decoder = stored["roberta.embeddings.word_embeddings.weight"], stored["lm_head.decoder.weight"]
    before = weights(place.model)["roberta.embeddings.word_embeddings.weight"]
    words = prompt_ids(place.model, sst2_prompts("train"))[2]
    others = [row for row in range(len(decoder)) if row not in words]
    assert torch.equal(decoder[others], before[others])
    assert not torch.isclose(decoder[words], before[words]).all()
    assert not torch.equal(embeddings[others], before[others])


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--save_steps", "2"], {"checkpoint-2", "checkpoint-4"}),
        (["--save_steps", "1", "--save_total_limit", "1"], {"checkpoint-4"}),
        (["--save_total_limit", "3"], {"checkpoint-4"}),
        (["--evaluate_during_training"], set()),
        (["--evaluate_during_training", "--eval_steps", "1"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_checkpoints_stay_only_where_saving_was_asked_for(place: Workplace, flags: list[str], kept: set[str]) -> None:
    folder = place.run(*STEPS, *flags, output=f"kept {' '.join(flags)}")
    assert {path.name for path in folder.glob("checkpoint-*")} == kept
    assert not [name for name in files(folder) if name.endswith((".bin", ".pkl"))]


def test_without_saving_only_results_are_left(place: Workplace) -> None:
    assert files(place.run(*STEPS, "--save_strategy", "no", output="unsaved")) == RESULTS


def test_overwriting_trains_anew(place: Workplace, tuned: Path) -> None:
    folder = place.run(*STEPS, "--save_steps", "1", "--seed", "7", output="anew")
    place.run(*STEPS, "--overwrite_output_dir", output="anew")
    assert files(folder) == RESULTS | MODEL
    assert (folder / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()


def test_no_predict_leaves_the_test_set_out(place: Workplace) -> None:
    folder = place.run(*STEPS, "--no_predict", output="unpredicted")
    assert files(folder) == MODEL | OF_DEV
    assert not [key for key in place.last_record() if "_test_" in key]


# Which model is kept.


@dataclass(frozen=True)
class Watched:
    """A run without dropout that looked at dev after each of six steps: its flags, its folder, and each checkpoint's
    numbers on dev, worked out anew."""

    flags: tuple[str, ...]
    folder: Path
    found: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def watched(place: Workplace, still: Path) -> Watched:
    data = place.folder / "more dev"
    shutil.copytree(place.data, data)
    write_rows(data / "dev.tsv", [("sentence", "label"), *sst2_rows(13, "dev")])
    # A seed with which dev is best in the middle.
    own = ("--data_dir", str(data), "--max_steps", "6", "--seed", "3", "--model_name_or_path", str(still))
    watching = ("--evaluate_during_training", "--eval_steps", "1", "--save_total_limit", "9")
    folder = place.run(*STEPS, *own, *watching, output="watched")
    found = {}
    for name in (f"checkpoint-{number}" for number in range(1, 7)):
        flags = ("--no_train", "--no_predict", "--data_dir", str(data), "--model_name_or_path", str(folder / name))
        found[name] = read_results(place.run(*flags, output=f"of {name}") / "eval_results_sst-2.txt")
    return Watched((*STEPS, *own), folder, found)


def test_evaluation_during_training_keeps_the_model_that_is_best_on_dev(place: Workplace, watched: Watched) -> None:
    folder, of_checkpoints = watched.folder, watched.found
    accuracies = {name: found["eval_acc"] for name, found in of_checkpoints.items()}
    best = max(accuracies, key=accuracies.__getitem__)
    others = [accuracy for name, accuracy in accuracies.items() if name != best]
    assert best != "checkpoint-6" and accuracies[best] > max(others), "this tests nothing: choose another seed"
    kept, wanted = weights(folder), weights(folder / best)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert results(folder)[0] == pytest.approx(of_checkpoints[best], rel=1e-6)
    used_again(place, folder, "--data_dir", str(place.folder / "more dev"))


def test_save_at_last_keeps_the_last_model(place: Workplace, watched: Watched) -> None:
    watching = ("--evaluate_during_training", "--eval_steps", "2", "--save_at_last")
    folder = place.run(*watched.flags, *watching, output="last")
    assert files(folder) == RESULTS | MODEL
    kept, last = weights(folder), weights(watched.folder / "checkpoint-6")
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert results(folder)[0] == pytest.approx(watched.found["checkpoint-6"], rel=1e-6)


def test_looking_at_dev_changes_no_training(place: Workplace, watched: Watched) -> None:
    unwatched, last = weights(place.run(*watched.flags, output="unwatched")), weights(watched.folder / "checkpoint-6")
    assert all(torch.equal(unwatched[name], last[name]) for name in last)


def test_eval_steps_say_when_dev_is_looked_at(place: Workplace) -> None:
    flags = ("--evaluate_during_training", "--eval_steps", "2", "--save_total_limit", "9")
    folder = place.run(*STEPS, *flags, output="every second")
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "eval_acc" in entry] == [2, 4]
    without = place.run(*STEPS, "--evaluate_during_training", "--save_total_limit", "9", output="every epoch")
    state = json.loads((without / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["epoch"] for entry in state["log_history"] if "eval_acc" in entry] == [1.0, 2.0]


# Going on.


@pytest.fixture(scope="module")
def at_once(place: Workplace) -> Path:
    """Six steps, with a checkpoint after three."""
    return place.run(*STEPS, "--max_steps", "6", "--save_steps", "3", output="at once")


def test_training_goes_on_from_a_checkpoint_by_its_path_as_if_it_had_not_stopped(
    place: Workplace, at_once: Path
) -> None:
    resumed = ("--max_steps", "6", "--save_steps", "3", "--resume_from_checkpoint", str(at_once / "checkpoint-3"))
    folder = place.run(*STEPS, *resumed, output="by path")
    assert (folder / "model.safetensors").read_bytes() == (at_once / "model.safetensors").read_bytes()
    assert results(folder) == results(at_once)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6"}


def test_training_goes_on_from_the_last_whole_checkpoint_in_its_own_folder(place: Workplace, at_once: Path) -> None:
    folder = place.folder / "by true"
    shutil.copytree(at_once / "checkpoint-3", folder / "checkpoint-3")
    (folder / "checkpoint-6").mkdir()  # a run that was killed while it saved
    resumed = ("--max_steps", "6", "--save_steps", "3", "--resume_from_checkpoint", "true")
    outcome = place.call(place.argv(*STEPS, *resumed, output="by true"))
    assert (outcome.status, outcome.err) == (0, "")
    assert f"continuing from {folder / 'checkpoint-3'}" in outcome.messages
    assert (folder / "model.safetensors").read_bytes() == (at_once / "model.safetensors").read_bytes()


def test_lora_training_goes_on_as_if_it_had_not_stopped(place: Workplace) -> None:
    flags = (*STEPS, "--apply_lora", "--max_steps", "6", "--save_steps", "3")
    whole = place.run(*flags, output="lora at once")
    part = place.run(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-3"), output="lora resumed")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


# What is trained, and how.


def changes(before: Path, after: Path) -> dict[str, Tensor]:
    """What training added to each weight, the decoder starting as the word embeddings."""
    start, end = weights(before), weights(after)
    start.setdefault("lm_head.decoder.weight", start["roberta.embeddings.word_embeddings.weight"])
    start.setdefault("lm_head.decoder.bias", start["lm_head.bias"])
    return {name: end[name] - start[name] for name in end if name in start}


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


# The classification head and the linear head.


@pytest.mark.parametrize("trainer", ["standard", "kernel", "linearhead"])
@pytest.mark.parametrize("first_token", [False, True], ids=["own head", "from linear head"])
def test_every_trainer_takes_the_plain_text(place: Workplace, trainer: str, first_token: bool) -> None:
    flags = [*STEPS, "--trainer", trainer, "--few_shot_type", "finetune", *["--from_linearhead"] * first_token]
    folder = place.run(*flags, output=f"plain {trainer} {first_token}")
    for found in results(folder):
        assert found["eval_acc"] * 12 == pytest.approx(round(found["eval_acc"] * 12))
        assert np.isfinite(found["eval_loss"])
    if trainer == "kernel":
        if first_token:
            model = AutoModel.from_pretrained(place.model, add_pooling_layer=False)
            wanted = sum(p.numel() for p in model.parameters()) + 2 * 16 + 2
        else:
            model = AutoModelForSequenceClassification.from_pretrained(place.model, num_labels=2)
            wanted = sum(p.numel() for p in model.parameters())
        assert results(folder)[1]["grad_dim"] == wanted
        assert read_kernel(folder, "test").shape == (4, 2, 6, 2)
        described = json.loads((folder / "test_kernels_sst-2.json").read_text(encoding="utf-8"))
        assert described["template"] == ["*cls**sent_0**sep+*"]
        assert (described["from_linearhead"] is True) == first_token


def test_two_seeds_draw_two_classification_heads_and_one_seed_one(place: Workplace) -> None:
    flags = ("--no_train", "--few_shot_type", "finetune", "--seed")
    one, same, other = (logits_of(place, *flags, seed, name=f"head {n}") for n, seed in enumerate("112"))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-3)


def fitted_by_hand(features: np.ndarray, classes: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's own regression, one class's score in halves: weights [2, d] and biases [2]."""
    fitted = LogisticRegressionCV(max_iter=5000, random_state=0, cv=folds).fit(features, classes)
    return np.concatenate([-fitted.coef_, fitted.coef_]) / 2, np.concatenate(
        [-fitted.intercept_, fitted.intercept_]
    ) / 2


def with_more_train(place: Workplace, size: int) -> list[str]:
    """The flag for the same data with another number of train examples."""
    folder = place.folder / f"train of {size}"
    shutil.copytree(place.data, folder, dirs_exist_ok=True)
    write_rows(folder / "train.tsv", [("sentence", "label"), *sst2_rows(size, "train")])
    return ["--data_dir", str(folder)]


# scikit-learn 1.8 announces other defaults; what the defaults are is meant here.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("size", "folds"), [(4, 2), (12, 5)])
def test_the_linear_head_of_a_prompt_is_scikit_learns(place: Workplace, lm: nn.Module, size: int, folds: int) -> None:
    seen: list[Tensor] = []
    handle = lm.lm_head.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))

    def features(split: str, size: int) -> np.ndarray:
        ids, places, _ = prompt_ids(place.model, sst2_prompts(split, size))
        with torch.no_grad():
            rows = [(lm(input_ids=row), seen.pop()[at])[1] for row, at in zip(ids, places, strict=True)]
        return torch.stack(rows).double().numpy()

    rows, biases = fitted_by_hand(features("train", size), np.arange(size) % 2, folds)
    wanted = features("test", 6) @ rows.T + biases
    handle.remove()
    found = logits_of(place, "--trainer", "linearhead", *with_more_train(place, size), name=f"linear {size}")
    # The optimum is found to scikit-learn's tolerance of 1e-4 from float32 features.
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    numbers = results(place.folder / f"linear {size}")[1]
    assert numbers["eval_acc"] == np.mean(wanted.argmax(1) == np.arange(6) % 2)
    loss = F.cross_entropy(torch.from_numpy(wanted), torch.arange(6) % 2).item()
    assert numbers["eval_loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_linear_head_on_plain_text_stands_on_the_first_tokens_last_state(place: Workplace) -> None:
    encoder = AutoModel.from_pretrained(place.model, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(place.model)

    def features(split: str, size: int) -> np.ndarray:
        texts = [text for text, _ in sst2_rows(size, split)]
        with torch.no_grad():
            states = [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in texts]
        return torch.stack(states).double().numpy()

    rows, biases = fitted_by_hand(features("train", 12), np.arange(12) % 2, 5)
    flags = ("--trainer", "linearhead", "--few_shot_type", "finetune", "--from_linearhead")
    found = logits_of(place, *flags, *with_more_train(place, 12), name="linear on text")
    # Twelve examples of sixteen features are separable: where the search ends depends on float32 rounding a little.
    assert found == pytest.approx(features("test", 6) @ rows.T + biases, rel=3e-2)


@pytest.mark.parametrize("kind", ["prompt", "finetune"])
def test_the_kernel_from_a_linear_head_is_that_of_the_model_with_the_fitted_head(place: Workplace, kind: str) -> None:
    more = with_more_train(place, 12)
    flags = ("--few_shot_type", kind, "--from_linearhead", *more)
    folder = place.run("--trainer", "kernel", *flags, output=f"from linear {kind}")
    plain = place.run(
        "--trainer", "kernel", "--few_shot_type", kind, *more, "--no_predict", output=f"from nothing {kind}"
    )
    linear = logits_of(place, "--trainer", "linearhead", *flags, name=f"linear {kind}")
    assert read_tensors(folder / "test_logits_sst-2.pt")[0].numpy() == pytest.approx(linear, abs=1e-6)
    assert not torch.allclose(read_kernel(folder, "dev"), read_kernel(plain, "dev"), rtol=1e-2)
    fitted, own = (json.loads((f / "dev_kernels_sst-2.json").read_text(encoding="utf-8")) for f in (folder, plain))
    assert fitted["weights_sha256"] != own["weights_sha256"]
    if kind == "prompt":
        assert fitted["grad_dim"] == own["grad_dim"]


def test_fine_tuning_from_a_linear_head_starts_at_the_fitted_head(place: Workplace) -> None:
    more = with_more_train(place, 12)
    linear = place.run("--trainer", "linearhead", *more, output="linear start")
    flags = (*STEPS, "--max_steps", "1", "--learning_rate", "0", "--from_linearhead", *more)
    assert results(place.run(*flags, output="started")) == results(linear)


# LoRA.


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


# Further flags.


def test_random_weights_come_from_the_seed_alone(place: Workplace, lm: nn.Module) -> None:
    flags = ("--no_train", "--random_model_init", "--seed")
    one, same, other = (logits_of(place, *flags, seed, name=f"random {n}") for n, seed in enumerate("112"))
    assert np.array_equal(one, same)
    with torch.no_grad():
        checkpoints = hand_logits(lm, place.model, sst2_prompts("test")).numpy()
    assert not np.allclose(one, other, atol=1e-3)
    assert not np.allclose(one, checkpoints, atol=1e-3)
    trained = place.run(*STEPS, "--random_model_init", "--fix_layers", "2", output="random trained")
    before = weights(place.model)
    assert not any(torch.equal(weights(trained)[name], before[name]) for name in before if "dense.weight" in name)


@pytest.mark.parametrize(
    ("how", "binary"),
    [
        (["--trainer", "kernel"], False),
        (["--trainer", "kernel"], True),
        (["--trainer", "linearhead"], True),
        (["--trainer", "linearhead"], False),
        (["--no_train"], False),
        (STEPS, False),
        (STEPS, True),
    ],
)
def test_saved_logits_give_the_test_accuracy(place: Workplace, how: list[str], binary: bool) -> None:
    name = f"saved {how[-1]} {binary}"
    logits = logits_of(place, *how, *["--binary_classification"] * binary, name=name)
    assert [path.name for path in (place.folder / f"{name} logits").iterdir()] == ["sst-2-0-3.npy"]
    assert (logits.shape, logits.dtype.kind) == ((6, 1 if binary else 2), "f")
    predicted = logits[:, 0] > 0 if binary else logits.argmax(1)
    assert results(place.folder / name)[1]["eval_acc"] == np.mean(predicted == np.arange(6) % 2)


def test_a_sweep_gives_each_run_a_folder_of_its_own(place: Workplace) -> None:
    for _ in range(2):
        place.run(*STEPS, "--max_steps", "1", "--sweep", output="sweep")
    folders = sorted((place.folder / "sweep").iterdir())
    assert len(folders) == 2
    assert files(folders[0]) == files(folders[1]) == RESULTS | MODEL
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
    assert place.last_record()["output_dir"] in map(str, folders)


# Scores.


def hand_scores(lm: nn.Module, place: Workplace) -> tuple[Tensor, float]:
    """The untrained model's test scores [X] and loss on STS-B, by the definition: KL from the labels' own place."""
    prompts = [f"<s>{a}<mask>, {b[0].lower()}{b[1:]}</s>" for a, b in PAIRS]
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    words = tokenizer.convert_tokens_to_ids(["ĠNo", "ĠYes"])
    ids, places, _ = prompt_ids(place.model, prompts)
    with torch.no_grad():
        logits = torch.stack([lm(input_ids=row).logits[0, at, words] for row, at in zip(ids, places, strict=True)])
    probabilities = logits.double().softmax(1)
    wanted = torch.tensor(SCORES["test"], dtype=torch.float64) / 5
    wanted = torch.stack([1 - wanted, wanted], 1)
    return 5 * probabilities[:, 1], (torch.special.xlogy(wanted, wanted / probabilities)).sum(1).mean().item()


def test_zero_shot_scores_lie_between_the_two_label_words(
    place: Workplace, lm: nn.Module, scores_data: list[str]
) -> None:
    found = logits_of(place, "--no_train", *scores_data, name="zero scores")
    scores, loss = hand_scores(lm, place)
    assert found.shape == (6, 1)
    assert found[:, 0] == pytest.approx(scores.numpy(), abs=1e-4)
    numbers = results(place.folder / "zero scores", "sts-b")[1]
    pearson, spearman = (f(scores.numpy(), SCORES["test"]).statistic for f in (pearsonr, spearmanr))
    assert numbers == {
        "eval_pearson": pytest.approx(pearson, abs=1e-5),
        "eval_spearmanr": pytest.approx(spearman),
        "eval_corr": pytest.approx((pearson + spearman) / 2, abs=1e-5),
        "eval_loss": pytest.approx(loss, rel=1e-4),
    }
    assert place.last_record()["sts-b_test_eval_pearson"] == numbers["eval_pearson"]


@pytest.mark.parametrize("trainer", ["standard", "linearhead"])
@pytest.mark.parametrize("kind", ["prompt", "finetune", "prompt-demo"])
def test_scores_are_learnt(place: Workplace, scores_data: list[str], trainer: str, kind: str) -> None:
    flags = (*STEPS, "--trainer", trainer, "--few_shot_type", kind, "--num_sample", "2")
    found = logits_of(place, *flags, *scores_data, name=f"scores {trainer} {kind}")
    assert found.shape == (6, 1)
    if kind != "finetune":
        assert found.min() >= 0 and found.max() <= 5
    dev, test = results(place.folder / f"scores {trainer} {kind}", "sts-b")
    assert dev.keys() == test.keys() == {"eval_pearson", "eval_spearmanr", "eval_corr", "eval_loss"}
    assert test["eval_pearson"] == pytest.approx(pearsonr(found[:, 0], SCORES["test"]).statistic, abs=1e-5)
    if kind == "finetune":
        assert test["eval_loss"] == pytest.approx(np.mean((found[:, 0] - SCORES["test"]) ** 2), rel=1e-4)


def test_the_best_model_by_scores_is_the_best_by_pearson(place: Workplace, scores_data: list[str]) -> None:
    flags = (*STEPS, "--evaluate_during_training", "--eval_steps", "1", "--save_total_limit", "9")
    folder = place.run(*flags, *scores_data, output="best scores")
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    seen = [entry["eval_pearson"] for entry in state["log_history"] if "eval_pearson" in entry]
    assert len(seen) == 4
    assert results(folder, "sts-b")[0]["eval_pearson"] == pytest.approx(max(seen), rel=1e-6)


# Two test sets.


@pytest.fixture(scope="module")
def inference(place: Workplace) -> list[str]:
    """The flags for tiny MNLI data, its second test set of other size and order."""
    texts = [text for text, _ in sst2_rows(8)]
    for stem, size, start in (
        ("train", 6, 0),
        ("dev_matched", 6, 1),
        ("test_matched", 6, 2),
        ("test_mismatched", 8, 3),
    ):
        rows = [
            ["x"] * 8 + [texts[(i + start) % 8].capitalize() + ".", texts[-i], INFERENCE[(i + start) % 3]]
            for i in range(size)
        ]
        write_rows(place.folder / "MNLI" / f"{stem}.tsv", [["h"] * 11, *rows])
    return ["--task_name", "mnli", "--data_dir", str(place.folder / "MNLI")]


@pytest.mark.parametrize(
    "how", [["--trainer", "kernel"], STEPS, ["--no_train"]], ids=["kernel", "standard", "zero-shot"]
)
def test_mnli_is_tested_on_both_its_test_sets(place: Workplace, inference: list[str], how: list[str]) -> None:
    folder = place.run(*how, *inference, output=f"mnli {len(how)}")
    record = place.last_record()
    for task, own in (("mnli", "mnli"), ("mnli-mm", "mnli-mm")):
        found = read_results(folder / f"test_results_{task}.txt")
        assert {"eval_loss", f"eval_{own}/acc"} <= found.keys()
        assert record[f"{task}_test_eval_{own}/acc"] == found[f"eval_{own}/acc"]
    assert "eval_mnli/acc" in read_results(folder / "eval_results_mnli.txt")
    assert "mnli_dev_eval_mnli/acc" in record
    if how[-1] == "kernel":
        for task, size in (("mnli", 6), ("mnli-mm", 8)):
            kernel, labels = read_tensors(folder / f"test_kernels_{task}.pt")
            assert (kernel.shape, len(labels)) == ((6, 3, size, 3), size)
            described = json.loads((folder / f"test_kernels_{task}.json").read_text(encoding="utf-8"))
            name = "test_matched.tsv" if task == "mnli" else "test_mismatched.tsv"
            assert described["data_files"]["test"] == str(place.folder / "MNLI" / name)


def test_the_second_test_set_has_the_numbers_that_its_own_task_finds(place: Workplace, inference: list[str]) -> None:
    both = place.run("--no_train", *inference, output="mnli both")
    own = place.run("--no_train", *inference, "--task_name", "mnli-mm", output="mnli own")
    name = "test_results_mnli-mm.txt"
    assert read_results(both / name) == read_results(own / name)


def test_a_missing_second_test_set_is_a_warning(place: Workplace, inference: list[str], tmp_path: Path) -> None:
    shutil.copytree(place.folder / "MNLI", tmp_path / "data")
    (tmp_path / "data" / "test_mismatched.tsv").unlink()
    outcome = place.call(place.argv("--no_train", *inference, "--data_dir", str(tmp_path / "data"), output="matched"))
    assert (outcome.status, outcome.err) == (0, "")
    assert (
        f"there is no {tmp_path}/data/test_mismatched.tsv: the second test set, mnli-mm, is left out"
        in outcome.messages
    )
    assert files(place.folder / "matched") == {name.replace("sst-2", "mnli") for name in RESULTS}


def test_the_best_model_of_mnli_is_the_best_on_its_dev_set(place: Workplace, inference: list[str]) -> None:
    flags = (*STEPS, "--evaluate_during_training", "--eval_steps", "1", "--save_total_limit", "9")
    folder = place.run(*flags, *inference, output="best mnli")
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    seen = [entry["eval_mnli/acc"] for entry in state["log_history"] if "eval_mnli/acc" in entry]
    assert len(seen) == 4
    assert results(folder, "mnli")[0]["eval_mnli/acc"] == max(seen)


# Several processes.


@pytest.fixture(scope="module")
def processes(place: Workplace, still: Path) -> dict[str, tuple[Path, Path]]:
    """Output folders of one process, and of two with batches half as large: of fine-tuning and of zero-shot."""
    trained = (*STEPS, "--optimizer", "sgd", "--learning_rate", "0.1", "--model_name_or_path", str(still))
    kinds = {"trained": trained, "zero": ("--no_train",)}
    runs = [{"argv": place.argv(*flags, output=f"two {kind}")} for kind, flags in kinds.items()]
    path = place.folder / "runs.json"
    path.write_text(json.dumps(runs), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests' / 'helpers'}"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "helpers" / "process_runs.py"), str(path)],
        cwd=place.folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("results are in ") == 2
    doubled = ("--per_device_train_batch_size", "4")
    return {
        kind: (place.run(*flags, *doubled, output=f"one {kind}"), place.folder / f"two {kind}")
        for kind, flags in kinds.items()
    }


@pytest.mark.slow
def test_two_processes_train_as_one_with_batches_twice_as_large(
    still: Path, processes: dict[str, tuple[Path, Path]]
) -> None:
    alone, together = processes["trained"]
    assert files(together) == files(alone) == RESULTS | MODEL
    for found, wanted in zip(results(together), results(alone), strict=True):
        assert found["eval_acc"] == wanted["eval_acc"]
    found, wanted, start = weights(together), weights(alone), weights(still)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    assert not torch.allclose(found["lm_head.dense.weight"], start["lm_head.dense.weight"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "zero"])
def test_two_processes_find_the_loss_that_one_finds(processes: dict[str, tuple[Path, Path]], kind: str) -> None:
    alone, together = processes[kind]
    for found, wanted in zip(results(together), results(alone), strict=True):
        assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5)


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
