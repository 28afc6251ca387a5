"""GGUF files through run.py: kernels, fine-tuning, adapters, and what has no need of the file any more."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import ROOT, SIZES, Outcome, Workplace, read_kernel, read_results, read_tensors, snapshot
from lmntk.models.lora_files import WEIGHTS_FILE as ADAPTERS_FILE
from oracle import relative_error
from tiny_gguf import Made, make_gguf_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_gguf_files(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def place(place: Workplace, made: Made) -> Workplace:
    """A workplace with data in a folder of k-shot splits."""
    splits = place.folder / "data" / "k-shot-1k-test" / "SST-2" / "4-13"
    shutil.copytree(place.data, splits)
    place.data = splits
    return place


def flags(made: Made, file: str = "tiny-F32.gguf") -> tuple[str, ...]:
    return ("--model_name_or_path", str(made.folder), "--gguf_file", file)


@pytest.fixture(scope="module")
def kernels(place: Workplace, made: Made) -> Path:
    """The output folder of a kernel run."""
    before = snapshot(made.folder)
    folder = place.run(*flags(made), output="kernels")
    assert snapshot(made.folder) == before
    return folder


def test_a_kernel_of_a_gguf_file_is_that_of_the_model_it_was_made_of(
    place: Workplace, made: Made, kernels: Path
) -> None:
    plain = place.folder / "plain"
    made.lm.save_pretrained(plain)
    made.tokenizer.save_pretrained(plain)
    of_plain = place.run("--model_name_or_path", str(plain), output="plain kernels")
    for split in SIZES:
        # float32 of the same numbers: the rounding of sums whose order may differ
        assert relative_error(read_kernel(kernels, split), read_kernel(of_plain, split)) < 1e-6
    assert place.last_record()["model_name_or_path"] == str(plain)


def test_the_converted_model_lies_beside_the_folder_of_k_shot_splits(place: Workplace, kernels: Path) -> None:
    (folder,) = (place.folder / "data" / "converted-models").iterdir()
    assert folder.name.startswith("tiny-F32-")


def test_the_description_of_a_kernel_names_the_file(place: Workplace, made: Made, kernels: Path) -> None:
    for split in SIZES:
        note = json.loads((kernels / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))
        assert (note["model"], note["gguf_file"]) == (str(made.folder), "tiny-F32.gguf")


def test_the_same_command_again_uses_the_same_kernels_and_the_same_conversion(
    place: Workplace, made: Made, kernels: Path
) -> None:
    (converted_model,) = (place.folder / "data" / "converted-models").iterdir()
    before = {name: file for name, file in snapshot(kernels).items() if "kernels" in name}, snapshot(converted_model)
    results = read_results(kernels / "test_results_sst-2.txt")
    outcome = place.call(place.argv(*flags(made), output="kernels"))
    assert (outcome.status, outcome.err) == (0, "")
    assert "converting" not in outcome.messages
    after = {name: file for name, file in snapshot(kernels).items() if "kernels" in name}, snapshot(converted_model)
    assert after == before
    assert read_results(kernels / "test_results_sst-2.txt") == results


def test_kernels_of_another_file_of_the_folder_are_not_taken_for_this_one_s(
    place: Workplace, made: Made, kernels: Path
) -> None:
    before = snapshot(kernels)
    outcome = place.call(place.argv(*flags(made, "tiny-Q4_1.gguf"), output="kernels"))
    assert outcome.status == 2
    assert "--overwrite_kernels" in outcome.err
    assert snapshot(kernels) == before


def test_the_cache_may_be_elsewhere(place: Workplace, made: Made) -> None:
    elsewhere = place.folder / "elsewhere"
    place.run(*flags(made, "tiny-Q8_0.gguf"), "--cache_dir", str(elsewhere), "--no_train", output="cached")
    assert [path.name.partition("-Q8_0-")[0] for path in elsewhere.iterdir()] == ["tiny"]


STEPS = ("--trainer", "standard", "--max_steps", "2", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2")


def same_results(place: Workplace, folder: Path, *flags: str) -> bool:
    """Whether what a run left, evaluated as it is, has the run's own metrics and loss."""
    again = place.run("--no_train", "--model_name_or_path", str(folder), *flags, output=f"{folder.name} again")
    name = "test_results_sst-2.txt"
    return read_results(again / name) == pytest.approx(read_results(folder / name), rel=1e-6)


def test_what_was_fine_tuned_from_a_gguf_file_is_a_model_without_the_flag(
    place: Workplace, made: Made, kernels: Path
) -> None:
    folder = place.run(*flags(made), *STEPS, output="tuned")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert same_results(place, folder)
    of_tuned = place.run("--model_name_or_path", str(folder), output="kernels of tuned")
    note = json.loads((of_tuned / "test_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert "gguf_file" not in note
    before, after = (read_tensors(run / "test_logits_sst-2.pt")[0] for run in (kernels, of_tuned))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.fixture(scope="module")
def adapters(place: Workplace, made: Made) -> Path:
    """The output folder of a training of LoRA adapters."""
    return place.run(*flags(made), *STEPS, "--apply_lora", output="adapters")


def test_adapters_trained_on_a_gguf_file_are_loaded_again(place: Workplace, adapters: Path) -> None:
    assert any(tensor.any() for name, tensor in load_file(adapters / ADAPTERS_FILE).items() if "lora_B" in name)
    assert same_results(place, adapters, "--apply_lora")
    place.run("--model_name_or_path", str(adapters), "--apply_lora", output="kernels of adapters")


def error_of(outcome: Outcome) -> str:
    """The sentence of a refusal: all there is on stderr."""
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    return line.removeprefix("error: ")


def test_a_file_beside_adapters_is_refused(place: Workplace, made: Made, adapters: Path) -> None:
    (base,) = (path for path in (place.folder / "data" / "converted-models").iterdir() if "F32" in path.name)
    call = ("--model_name_or_path", str(adapters), "--apply_lora", "--gguf_file", "tiny-F32.gguf")
    assert error_of(place.call(place.argv(*call, output="refused"))) == (
        f"--gguf_file: {adapters} holds LoRA adapters, which name their own model ({base}): leave it out"
    )


@pytest.mark.parametrize("call", [("--model_name_or_path", "FOLDER"), ("--model_name_or_path", "FOLDER/tiny-F32.gguf")])
def test_run_says_which_flag_a_gguf_file_wants(place: Workplace, made: Made, call: tuple[str, str]) -> None:
    argv = place.argv(*(word.replace("FOLDER", str(made.folder)) for word in call), output="refused")
    assert "--gguf_file" in error_of(place.call(argv))
    assert not (place.folder / "refused").exists()


@pytest.mark.slow
def test_two_runs_at_once_convert_a_file_and_get_the_same(place: Workplace, made: Made, warm_python: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    call = (*flags(made, "tiny-Q8_0.gguf"), "--no_train", "--no_predict", "--cache_dir", str(place.folder / "shared"))
    outputs = ("one", "other")
    runs = [
        subprocess.Popen(
            [warm_python, str(ROOT / "run.py"), *place.argv(*call, output=output)],
            cwd=place.folder, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for output in outputs
    ]  # fmt: skip
    said = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert len(list((place.folder / "shared").iterdir())) == 1
    found = [read_results(place.folder / output / "eval_results_sst-2.txt") for output in outputs]
    assert found[0] == found[1]
