"""Snapshots of a folder that fine-tuning saved, beside the kernel of the model that it started from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from command_line import Workplace, read_kernel
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import TrainingSnapshot, find_snapshots, read_snapshot
from tiny_models import save_tiny_checkpoint

TRAIN = ("--trainer", "standard", "--max_steps", "4", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2")
WAYS = {
    "prompt": (),
    "asymmetric": ("--binary_classification", "--kernel_formula", "asymmetric_signgd"),
    "LoRA": ("--apply_lora", "--lora_r", "2"),
    "a new head": ("--few_shot_type", "finetune"),
    "a fitted head": ("--few_shot_type", "finetune", "--from_linearhead"),
}


def snapshots(folder: Path) -> dict[int, TrainingSnapshot]:
    return {found.step: found for found in map(read_snapshot, find_snapshots(RunPaths(folder, "sst-2")))}


@pytest.fixture(scope="module")
def trained(place: Workplace) -> dict[str, Path]:
    """The folders of trainings that wrote snapshots of their own."""
    steps = ("--kernel_steps", "0,last", "--save_steps", "2")
    return {way: place.run(*TRAIN, *flags, *steps, output=f"trained {way}") for way, flags in WAYS.items()}


@pytest.mark.parametrize("way", WAYS)
def test_they_are_the_snapshots_that_the_training_itself_writes(
    place: Workplace, trained: dict[str, Path], way: str
) -> None:
    folder = place.run(*WAYS[way], "--fine_tuned_model", str(trained[way]), output=f"kernel {way}")
    found, wanted = snapshots(folder), snapshots(trained[way])
    assert list(found) == list(wanted) == [0, 4]
    for step in wanted:
        for split, numbers in wanted[step].splits.items():
            assert found[step].splits[split].labels.tolist() == numbers.labels.tolist()
            np.testing.assert_allclose(found[step].splits[split].logits, numbers.logits, rtol=0, atol=1e-6)
            np.testing.assert_allclose(found[step].splits[split].linearised, numbers.linearised, rtol=0, atol=1e-5)
        difference = np.linalg.norm(found[step].kernel - wanted[step].kernel)
        assert difference < 1e-6 * np.linalg.norm(wanted[step].kernel)
        for name in ("grad_dim", "weights_sha256", "learning_rate", "optimizer", "last_step"):
            assert found[step].description[name] == wanted[step].description[name]
    assert np.array_equal(found[0].kernel, read_kernel(folder, "train").numpy())


def test_the_kernel_and_its_predictions_are_those_of_a_run_without_it(
    place: Workplace, trained: dict[str, Path]
) -> None:
    without = place.run(output="without")
    folder = place.run(*WAYS["prompt"], "--fine_tuned_model", str(trained["prompt"]), output="with")
    for path in without.glob("*"):
        if path.suffix in (".pt", ".csv", ".txt"):
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_estimates_are_refused_beside_a_training(place: Workplace, trained: dict[str, Path]) -> None:
    flags = ("--kernel_engine", "projected", "--fine_tuned_model", str(trained["prompt"]))
    outcome = place.call(place.argv(*flags, output="estimated"))
    assert outcome.status == 2
    assert "asks how far training moves the kernel, which an estimate's error would hide" in outcome.err


def test_a_checkpoint_of_a_training_is_of_its_own_step(place: Workplace, trained: dict[str, Path]) -> None:
    folder = place.run("--fine_tuned_model", str(trained["prompt"] / "checkpoint-2"), output="of a checkpoint")
    assert list(snapshots(folder)) == [0, 2]


def test_the_filter_of_the_kernel_counts_for_the_kernel_but_not_for_the_tangent(
    place: Workplace, trained: dict[str, Path]
) -> None:
    flags = ("--exclude_embeddings", "--fine_tuned_model", str(trained["prompt"]))
    found, wanted = snapshots(place.run(*flags, output="filtered")), snapshots(trained["prompt"])
    assert found[4].description["parameters"] == {"exclude_embeddings": True}
    assert found[4].description["grad_dim"] < wanted[4].description["grad_dim"]
    assert np.linalg.norm(found[4].kernel - wanted[4].kernel) > 0.01 * np.linalg.norm(wanted[4].kernel)
    ours, theirs = found[4].splits["test"], wanted[4].splits["test"]
    np.testing.assert_allclose(ours.linearised, theirs.linearised, rtol=0, atol=1e-5)


OTHERS = {
    "other texts": lambda text: text.replace("film", "book").replace("a ", "one "),
    "other labels": lambda text: text.translate({ord("0"): "1", ord("1"): "0"}),
}
"""How train files become those of another training."""


def refusal(place: Workplace, *flags: str) -> str:
    outcome = place.call(place.argv(*flags, output="refused"))
    shutil.rmtree(place.folder / "refused", ignore_errors=True)
    assert outcome.status == 2
    (sentence,) = outcome.err.splitlines()
    return sentence.removeprefix("error: ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--few_shot_type", "prompt-demo"], "made with --few_shot_type prompt, but this run has"),
        (
            ["--few_shot_type", "finetune"],
            "prompt, but this run has --few_shot_type finetune",
        ),
        (["--binary_classification"], "made with --binary_classification False, but"),
        (["--apply_lora"], "made with --apply_lora False, but"),
        (["--template", "*cls**sent_0*_All_in_all_it_was*mask*.*sep+*"], "made with --template"),
        (["--mapping", "{'0':'great','1':'terrible'}"], "made with --mapping"),
        (["--seed", "7"], "made with --seed 42, but this run has --seed 7"),
        (["--model_name_or_path", "other"], "made with --model_name_or_path"),
        (["--first_sent_limit", "2"], "trained with other texts or prompts than those of this run (of train,"),
        (["--data_dir", "other texts"], "trained with other texts or prompts"),
        (["--data_dir", "other labels"], "trained with other texts or prompts than those of this run (of train):"),
        (["--load_kernels", "."], "--fine_tuned_model"),
    ],
)
def test_a_folder_of_another_training_is_refused_before_any_kernel(
    place: Workplace, trained: dict[str, Path], flags: list[str], words: str
) -> None:
    for name, source in (("other", place.model), ("other texts", place.data), ("other labels", place.data)):
        if not (place.folder / name).exists():
            shutil.copytree(source, place.folder / name)
            change = OTHERS.get(name)
            for path in [] if change is None else (place.folder / name).glob("train*"):
                path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert words in refusal(place, "--fine_tuned_model", str(trained["prompt"]), *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--first_sent_limit", "2"],
            "made with --first_sent_limit None, but this run has --first_sent_limit 2: leave",
        ),
        (["--max_seq_length", "40"], "made with --max_seq_length"),
        (["--data_dir", "16-13"], "made with --data_dir"),
    ],
)
def test_settings_are_compared_where_a_record_does_not_identify_the_prompts(
    place: Workplace, trained: dict[str, Path], flags: list[str], words: str
) -> None:
    old = place.folder / "an old record"
    shutil.copytree(trained["prompt"], old, dirs_exist_ok=True)
    shutil.copytree(place.data, place.folder / "16-13", dirs_exist_ok=True)
    record = json.loads((old / "run_sst-2.json").read_text(encoding="utf-8"))
    del record["tokens_sha256"], record["data_sha256"]
    (old / "run_sst-2.json").write_text(json.dumps(record), encoding="utf-8")
    assert words in refusal(place, "--fine_tuned_model", str(old), *flags)


def test_the_same_texts_in_another_folder_are_the_same_training_data(
    place: Workplace, trained: dict[str, Path]
) -> None:
    shutil.copytree(place.data, place.folder / "moved", dirs_exist_ok=True)
    flags = ("--data_dir", str(place.folder / "moved"), "--fine_tuned_model", str(trained["prompt"]))
    assert list(snapshots(place.run(*flags, output="of moved data"))) == [0, 4]


def test_a_training_with_demonstrations_does_not_fit_a_kernel_without(place: Workplace) -> None:
    flags = ("--few_shot_type", "prompt-demo", "--num_sample", "1", "--max_steps", "1")
    folder = place.run(*TRAIN, *flags, output="trained with demonstrations")
    sentence = refusal(place, "--fine_tuned_model", str(folder))
    assert "was made with --few_shot_type prompt-demo, but this run has --few_shot_type prompt" in sentence


def test_weights_of_another_architecture_or_no_weights_are_refused(
    place: Workplace, trained: dict[str, Path], tmp_path: Path
) -> None:
    save_tiny_checkpoint("bert", tmp_path / "bert")
    assert "is a checkpoint of another model or architecture" in refusal(
        place, "--fine_tuned_model", str(tmp_path / "bert")
    )
    (tmp_path / "empty").mkdir()
    assert "cannot be read as weights" in refusal(place, "--fine_tuned_model", str(tmp_path / "empty"))
    assert "is not a folder" in refusal(place, "--fine_tuned_model", str(tmp_path / "missing"))
    only = tmp_path / "weights of adapters"
    shutil.copytree(trained["LoRA"], only)
    (only / "run_sst-2.json").unlink()
    assert "holds LoRA adapters: add --apply_lora" in refusal(place, "--fine_tuned_model", str(only))


def test_a_folder_that_was_not_trained_is_refused(place: Workplace) -> None:
    kernel = place.run(output="a kernel run")
    assert "is not of a fine-tuning" in refusal(place, "--fine_tuned_model", str(kernel))
    still = place.run(*TRAIN, "--max_steps", "1", "--learning_rate", "0", output="not moved")
    assert "holds the weights of --model_name_or_path itself" in refusal(place, "--fine_tuned_model", str(still))


def test_a_folder_without_a_record_is_taken_with_a_word(place: Workplace, trained: dict[str, Path]) -> None:
    bare = place.folder / "bare"
    shutil.copytree(trained["prompt"], bare, ignore=shutil.ignore_patterns("*.json", "step-*", "checkpoint-*"))
    outcome = place.call(place.argv("--fine_tuned_model", str(bare), output="from bare"))
    assert outcome.status == 0
    assert "there is no run_sst-2.json in or above" in outcome.messages
    assert "step 1 stands for them" in outcome.messages
    assert list(snapshots(place.folder / "from bare")) == [0, 1]


def test_the_folder_of_the_training_and_its_snapshots_are_never_replaced(
    place: Workplace, trained: dict[str, Path]
) -> None:
    """Nor those of any other training."""
    source, copy = trained["prompt"], place.folder / "guarded"
    shutil.copytree(source, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    for folder in (copy, copy / "checkpoint-2", source):
        outcome = place.call(place.argv("--fine_tuned_model", str(folder), output="guarded"))
        assert outcome.status == 2
        assert "which this run would replace: choose another folder" in outcome.err
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_snapshots_beside_a_kernel_go_with_it_but_never_those_of_a_training(
    place: Workplace, trained: dict[str, Path]
) -> None:
    folder = place.run("--fine_tuned_model", str(trained["prompt"]), output="stale")
    place.run("--kernel_solver", "svr", output="stale")
    assert list(snapshots(folder)) == [0, 4], "the kernel is the same"
    place.run("--kernel_formula", "signgd", "--overwrite_kernels", output="stale")
    assert list(snapshots(folder)) == []
    shutil.copy(trained["prompt"] / "step-000004_sst-2.safetensors", folder)
    place.run("--overwrite_kernels", output="stale")
    assert list(snapshots(folder)) == [4]


def test_the_last_step_is_the_one_that_the_training_recorded(place: Workplace) -> None:
    """Four prompts in batches of three that drop the rest: one step an epoch."""
    flags = ("--max_steps", "-1", "--num_train_epochs", "3", "--per_device_train_batch_size", "3")
    folder = place.run(*TRAIN, *flags, "--dataloader_drop_last", "True", output="dropped")
    assert json.loads((folder / "run_sst-2.json").read_text(encoding="utf-8"))["last_step"] == 3
    assert list(snapshots(place.run("--fine_tuned_model", str(folder), output="of dropped"))) == [0, 3]


def test_a_kernel_over_other_parameters_than_the_trained_ones_is_told_with_the_flags(place: Workplace) -> None:
    folder = place.run(*TRAIN, "--fix_layers", "1", output="fixed layers")
    own = ("--exclude_embeddings", "--exclude_first_layers", "1")
    messages = {}
    for name, flags in (("other", ()), ("own", own)):
        outcome = place.call(place.argv("--fine_tuned_model", str(folder), *flags, output=f"fixed {name}"))
        assert outcome.status == 0
        messages[name] = [line for line in outcome.messages.splitlines() if "counts other parameters" in line]
    assert messages["own"] == []
    (sentence,) = messages["other"]
    assert "give --exclude_embeddings, --exclude_first_layers 1 for that one" in sentence


def test_a_dry_run_checks_the_folder_and_says_what_its_snapshots_add(
    place: Workplace, trained: dict[str, Path]
) -> None:
    flags = ("--dry_run", "--fine_tuned_model", str(trained["prompt"]))
    outcome = place.call(place.argv(*flags, output="dry"))
    assert outcome.status == 0
    assert "would write snapshots of the steps 0 and 4: the train × train kernel at step 4" in outcome.messages
    assert "the logits and tangents of 14 prompts" in outcome.messages
    assert not (place.folder / "dry").exists()
    assert "made with --seed 42" in refusal(place, *flags, "--seed", "7")


def test_the_kernel_after_the_training_is_announced(place: Workplace, trained: dict[str, Path]) -> None:
    outcome = place.call(place.argv("--fine_tuned_model", str(trained["prompt"]), output="announced"))
    line, written = "computing the kernel of train × train at step 4: 4 × 4 prompts", "snapshot of step 4, loss"
    assert outcome.messages.index(line) < outcome.messages.index(written)
