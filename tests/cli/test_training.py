"""Fine-tuning through the command line, as a black box: its files, its log line, saved logits, sweeps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from command_line import Workplace
from tiny_models import CAUSAL, TYPICAL, save_tiny_checkpoint
from training_runs import (
    MODEL,
    OF_DEV,
    RESULTS,
    STEPS,
    files,
    hand_logits,
    logits_of,
    prompt_ids,
    results,
    sst2_prompts,
    used_again,
    weights,
)


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
    assert (record["processes"], record["dropout"]) == (1, {"dropout": 0.1})
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
