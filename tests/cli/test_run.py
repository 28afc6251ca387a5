"""The command line as a black box: what runs leave behind, against an oracle of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

import lmntk
import oracle
from command_line import (
    FORMULAS,
    ROOT,
    SIZES,
    Workplace,
    flags_of,
    read_kernel,
    read_results,
    read_tensors,
    sst2_rows,
    write_rows,
)
from lmntk.kernels import MemoryBudget

# SPEC: float32 against float64 gradients taken one at a time, relative Frobenius error.
FLOAT32, FLOAT64 = 2e-6, 1e-12
FILES = {
    *(f"{split}_{what}" for split in SIZES for what in ("kernels_sst-2.pt", "kernels_sst-2.json", "logits_sst-2.pt")),
    *("dev_diagonal_sst-2.pt", "test_diagonal_sst-2.pt"),
    "eval_results_sst-2.txt",
    "test_results_sst-2.txt",
    "dev_predictions_sst-2.csv",
    "test_predictions_sst-2.csv",
    "run_sst-2.json",
}
RESULTS = {name for name in FILES if not any(what in name for what in ("kernels", "logits", "diagonal"))}


@pytest.fixture(scope="module")
def made(place: Workplace) -> dict[str, Path]:
    """The output folder of a run of each formula."""
    return {formula: place.run(*flags_of(formula), output=formula) for formula in FORMULAS}


@pytest.fixture(scope="module")
def lm(place: Workplace) -> nn.Module:
    """The checkpoint as transformers loads it, in float64, its decoder untied."""
    model = AutoModelForMaskedLM.from_pretrained(place.model, attn_implementation="eager").double().eval()
    model.lm_head.decoder.weight = nn.Parameter(model.lm_head.decoder.weight.detach().clone())
    return model


@pytest.fixture(scope="module")
def gradients(place: Workplace, lm: nn.Module) -> dict[str, Tensor]:
    """The gradients of each split's logits, [N, C, P]; prompts and label words are written out here by hand."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    words = tokenizer.convert_tokens_to_ids(["Ġterrible", "Ġgreat"])

    def logits_of(sentence: object) -> Tensor:
        ids = tokenizer(f"<s>{sentence} It was<mask>.</s>", add_special_tokens=False, return_tensors="pt").input_ids
        return lm(input_ids=ids).logits[:, ids[0].tolist().index(tokenizer.mask_token_id), words]

    return {
        split: oracle.gradients(logits_of, list(lm.parameters()), [text for text, _ in sst2_rows(size, split)])
        for split, size in SIZES.items()
    }


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_run_leaves_kernels_logits_and_results_and_nothing_else(made: dict[str, Path], formula: str) -> None:
    folder, one_logit = made[formula], formula == "asymmetric_signgd"
    assert {path.name for path in folder.iterdir()} == FILES
    for split, size in SIZES.items():
        kernel, labels = read_tensors(folder / f"{split}_kernels_sst-2.pt")
        logits, targets = read_tensors(folder / f"{split}_logits_sst-2.pt")
        assert kernel.dtype == torch.float64
        assert kernel.shape == ((2, 4, 1, size, 1) if one_logit else (4, 2, size, 2))
        wanted = torch.arange(size) % 2
        wanted = (2.0 * wanted - 1) if one_logit else wanted
        assert labels.dtype == targets.dtype == wanted.dtype
        assert torch.equal(labels, wanted) and torch.equal(targets, wanted)
        assert (logits.dtype, logits.shape) == (torch.float32, (size, 1 if one_logit else 2))


@pytest.mark.parametrize("formula", FORMULAS)
def test_beside_each_kernel_stands_what_it_is(made: dict[str, Path], place: Workplace, formula: str) -> None:
    for split in SIZES:
        note = json.loads((made[formula] / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))
        assert {name: note[name] for name in ("formula", "parameters", "task", "template", "mapping", "dtype")} == {
            "formula": formula,
            "parameters": "all",
            "task": "SST-2",
            "template": ["*cls**sent_0*_It_was*mask*.*sep+*"],
            "mapping": {"0": "terrible", "1": "great"},
            "dtype": "float32",
        }
        assert note["model"] == str(place.model)
        assert set(note["data_files"]) == set(note["data_sha256"]) == {"train", split}
        assert {"engine", "train_tile", "x_tile", "seconds", "peak_memory_gb", "weights_sha256"} <= note.keys()
        assert note["versions"].keys() == {"lmntk", "python", "torch", "transformers", "numpy"}


def test_result_files_and_the_log_hold_the_same_numbers(place: Workplace) -> None:
    folder = place.run("--tag", "a tag", "--kernel_regularization", "0.5", output="logged")
    record = place.last_record()
    for split, name in (("dev", "eval"), ("test", "test")):
        found = read_results(folder / f"{name}_results_sst-2.txt")
        assert [*found] == ["eval_acc", "eval_loss", "rank0", "grad_dim", "loo_acc", "loo_loss", "gcv"]
        assert found == {key.removeprefix(f"sst-2_{split}_"): record[key] for key in record if f"_{split}_" in key}
    assert (record["tag"], record["kernel_regularization"], record["task_name"]) == ("a tag", 0.5, "sst-2")
    assert (record["output_dir"], record["versions"]["lmntk"]) == (str(folder), lmntk.__version__)
    assert {"time", "seconds", "kernel_formula", "seed", "num_k", "few_shot_type"} <= record.keys()


def test_the_trainer_reports_the_number_of_parameters_of_a_model(place: Workplace) -> None:
    outcome = place.call(place.argv(output="reported"))
    lines = [line for line in outcome.out.splitlines() if "eval_acc" in line]
    assert len(lines) == 2 and all("grad_dim" in line for line in lines)
    outcome = place.call(place.argv("--load_kernels", str(place.folder / "reported"), output="taken"))
    assert "eval_acc" in outcome.out and "grad_dim" not in outcome.out


def test_the_password_of_the_hub_stays_out_of_the_log(place: Workplace) -> None:
    place.run("--hub_token", "hf_secret", "--no_train", output="token")
    assert "hf_secret" not in (place.folder / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("split", SIZES)
def test_the_kernel_is_that_of_gradients_taken_one_at_a_time(
    made: dict[str, Path], gradients: dict[str, Tensor], split: str
) -> None:
    truth = oracle.kernel(gradients["train"], gradients[split], "sgd")
    assert oracle.relative_error(read_kernel(made["sgd"], split), truth) <= FLOAT32


def test_sign_kernels_count_the_signs_of_gradients_taken_one_at_a_time(
    place: Workplace, gradients: dict[str, Tensor]
) -> None:
    """A key's bias moves all scores of a query alike: the sign of its gradient, zero but for rounding, is anyone's."""
    folder = place.run("--kernel_formula", "signgd", "--kernel_dtype", "float64", output="signs")
    noise = {split: ((values.abs() < 1e-12) & (values != 0)).sum(-1) for split, values in gradients.items()}
    for split in SIZES:
        found = read_kernel(folder, split)
        truth = oracle.kernel(gradients["train"], gradients[split], "signgd")
        assert torch.equal(found, found.round())
        allowed = 2 * (noise["train"][:, :, None, None] + noise[split][None, None])
        assert bool(((found - truth).abs() <= allowed).all())
        assert int(allowed.max()) < 200


def test_the_asymmetric_kernel_is_that_of_the_difference_of_logits(
    place: Workplace, gradients: dict[str, Tensor]
) -> None:
    folder = place.run(*flags_of("asymmetric_signgd"), "--kernel_dtype", "float64", output="differences")
    difference = {split: values[:, 1:] - values[:, :1] for split, values in gradients.items()}
    for split in SIZES:
        truth = oracle.kernel(difference["train"], difference[split], "asymmetric_signgd")
        assert oracle.relative_error(read_kernel(folder, split), truth) <= FLOAT64


def test_float64_is_exact_to_twelve_digits(place: Workplace, gradients: dict[str, Tensor]) -> None:
    folder = place.run("--kernel_dtype", "float64", output="float64")
    truth = oracle.kernel(gradients["train"], gradients["test"], "sgd")
    assert oracle.relative_error(read_kernel(folder, "test"), truth) <= FLOAT64
    assert read_tensors(folder / "test_logits_sst-2.pt")[0].dtype == torch.float64


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_train_batch_size", "3", "--per_device_eval_batch_size", "2"],
        ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "4", "--kernel_engine", "jacobian"],
        ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "5", "--kernel_engine", "jvp"],
    ],
    ids=["auto", "jacobian", "jvp"],
)
def test_tiles_and_engines_change_a_kernel_by_rounding_only(
    place: Workplace, made: dict[str, Path], flags: list[str]
) -> None:
    folder = place.run(*flags, output=f"tiles-{flags[1]}")
    note = json.loads((folder / "test_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert (note["train_tile"], note["x_tile"]) == (int(flags[1]), int(flags[3]))
    for split in SIZES:
        assert oracle.relative_error(read_kernel(folder, split), read_kernel(made["sgd"], split)) <= FLOAT32


def test_filters_leave_the_parameters_they_name_out_of_grad_dim(place: Workplace, lm: nn.Module) -> None:
    size = {name: parameter.numel() for name, parameter in lm.named_parameters()}
    in_head = {name for name in size if name.startswith("lm_head.")}
    in_embeddings = {name for name in size if ".embeddings." in name}
    in_first_layer = {name for name in size if ".layer.0." in name}
    biases = {name for name in size if "bias" in name}
    for number, (flags, kept) in enumerate(
        [
            ("", size.keys()),
            ("--only_biases", biases),
            ("--exclude_head", size.keys() - in_head),
            ("--exclude_embeddings", size.keys() - in_embeddings),
            ("--exclude_first_layers 1", size.keys() - in_first_layer),
            ("--exclude_head --exclude_embeddings --only_biases", biases - in_head - in_embeddings),
        ]
    ):
        folder = place.run(*flags.split(), "--no_predict", output=f"filter-{number}")
        assert read_results(folder / "eval_results_sst-2.txt")["grad_dim"] == sum(size[name] for name in kept), flags


@pytest.mark.parametrize("trainer", ["standard", "kernel"])
def test_zero_shot_writes_the_results_of_the_untrained_model(
    place: Workplace, made: dict[str, Path], trainer: str
) -> None:
    folder = place.run("--no_train", "--num_sample", "1", "--trainer", trainer, output=f"zero-{trainer}")
    assert {path.name for path in folder.iterdir()} == RESULTS
    for split, name in (("dev", "eval"), ("test", "test")):
        logits, labels = read_tensors(made["sgd"] / f"{split}_logits_sst-2.pt")
        found = read_results(folder / f"{name}_results_sst-2.txt")
        assert found["eval_acc"] == (logits.argmax(1) == labels).double().mean().item()
        assert found["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_task_of_three_classes_and_two_sentences_runs(place: Workplace) -> None:
    labels = ("contradiction", "entailment", "neutral")
    texts = [text for text, _ in sst2_rows(6)]
    rows = [["x"] * 8 + [texts[i].capitalize() + ".", texts[-i], labels[i % 3]] for i in range(6)]
    for stem in ("train", "dev_matched", "test_matched", "test_mismatched"):
        write_rows(place.folder / "MNLI" / f"{stem}.tsv", [["h"] * 11, *rows])
    for task in ("mnli", "mnli-mm"):
        folder = place.run("--task_name", task, "--data_dir", str(place.folder / "MNLI"), output="three")
        kernel, kernel_labels = read_tensors(folder / f"test_kernels_{task}.pt")
        assert (kernel.shape, kernel_labels.tolist()) == ((6, 3, 6, 3), [0, 1, 2, 0, 1, 2])
        # The three files are the same, and least squares fits what it has seen.
        found = read_results(folder / f"test_results_{task}.txt")
        assert found[f"eval_{task}/acc"] == 1.0
        assert place.last_record()[f"{task}_test_eval_{task}/acc"] == 1.0


@pytest.mark.parametrize("solver", ["lstsq", "svr", "svc"])
def test_a_task_of_six_classes_runs(place: Workplace, solver: str) -> None:
    texts = [text for text, _ in sst2_rows(12)]
    for split in SIZES:
        write_rows(place.folder / "trec" / f"{split}.csv", [(str(i % 6), text) for i, text in enumerate(texts)])
    flags = ["--task_name", "trec", "--data_dir", str(place.folder / "trec"), "--kernel_solver", solver]
    folder = place.run(*flags, output="six")
    kernel, labels = read_tensors(folder / "dev_kernels_trec.pt")
    assert (kernel.shape, labels.tolist()) == ((12, 6, 12, 6), [0, 1, 2, 3, 4, 5] * 2)
    assert read_results(folder / "eval_results_trec.txt")["eval_acc"] > 1 / 6


@pytest.mark.parametrize(
    "flags",
    [["--bf16_full_eval"], ["--dataloader_drop_last"], ["--evaluation_strategy", "steps"], ["--eval_steps", "1"]],
    ids=lambda flags: flags[0],
)
def test_flags_of_the_stock_trainer_change_no_kernel(place: Workplace, flags: list[str]) -> None:
    plain, flagged = place.run(output="plain"), place.run(*flags, output=f"with{flags[0]}")
    for split in SIZES:
        name = f"{split}_kernels_sst-2.pt"
        assert torch.equal(read_tensors(plain / name)[0], read_tensors(flagged / name)[0])


def test_a_padding_token_in_a_text_is_the_same_to_every_engine(place: Workplace, tmp_path: Path) -> None:
    shutil.copytree(place.data, tmp_path / "data")
    rows = [("a film <pad> was great <pad> more", "0"), ("an actor <pad>", "1")] * 2
    for split in SIZES:
        write_rows(tmp_path / "data" / f"{split}.tsv", [("sentence", "label"), *rows])
    folders = {
        engine: place.run(
            "--data_dir", str(tmp_path / "data"), "--kernel_engine", engine, "--kernel_dtype", "float64",
            output=f"padding-{engine}",
        )
        for engine in ("factored", "jacobian", "jvp")
    }  # fmt: skip
    kernels = {engine: read_tensors(folder / "test_kernels_sst-2.pt")[0] for engine, folder in folders.items()}
    assert oracle.relative_error(kernels["jacobian"], kernels["factored"]) < 1e-12
    assert oracle.relative_error(kernels["jvp"], kernels["factored"]) < 1e-12


def test_the_kernels_of_a_run_have_one_budget_although_the_first_leaves_less_memory(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter((2.0, 1.0, 0.5))
    monkeypatch.setattr(MemoryBudget, "default", lambda *_: MemoryBudget.from_gb(next(free)))
    folder = place.run(output="budget")
    stored = [json.loads((folder / f"{split}_kernels_sst-2.json").read_text()) for split in SIZES]
    assert [description["memory_gb"] for description in stored] == [2.0, 2.0, 2.0]


def test_logits_of_several_templates_are_averaged(place: Workplace) -> None:
    templates = place.folder / "templates.txt"
    templates.write_text("*cls**sent_0*_It_was*mask*.*sep+*\n*cls*A*mask*_film:*+sent_0**sep+*\n", encoding="utf-8")
    folder = place.run("--template_path", str(templates), output="several")
    train, train_labels = read_tensors(folder / "train_kernels_sst-2.pt")
    test, labels = read_tensors(folder / "test_kernels_sst-2.pt")
    assert (train.shape, test.shape) == ((8, 2, 8, 2), (8, 2, 12, 2))
    assert labels.tolist() == [0, 1] * 6
    alpha = np.linalg.lstsq(train.reshape(16, 16).numpy(), np.eye(2)[train_labels].reshape(-1), rcond=None)[0]
    logits = (test.reshape(16, 24).numpy().T @ alpha).reshape(2, 6, 2).mean(axis=0)
    wanted = np.mean(logits.argmax(axis=1) == labels[:6].numpy())
    assert read_results(folder / "test_results_sst-2.txt")["eval_acc"] == pytest.approx(wanted)
    from_there = ["--load_kernels", str(folder), "--data_dir", "no/data"]
    loaded = place.run(*from_there, "--template_path", str(templates), output="several-loaded")
    assert read_results(loaded / "test_results_sst-2.txt")["eval_acc"] == pytest.approx(wanted)


@pytest.mark.slow
def test_the_program_runs_from_another_directory_with_paths_of_that_directory(place: Workplace) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    flags = ["--model_name_or_path", "model", "--data_dir", "data", "--output_dir", "elsewhere"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *place.argv(*flags)],
        cwd=place.folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (place.folder / "elsewhere").iterdir()} == FILES
    assert place.last_record()["output_dir"] == "elsewhere"
    assert "computing the train × test kernel (sgd): 4 × 6 examples" in done.stderr
    assert f"results are in elsewhere, and a line in {place.folder / 'log'};" in done.stderr


@pytest.mark.slow
def test_two_processes_share_a_kernel(place: Workplace, made: dict[str, Path]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHON": sys.executable, "MODEL": "model", "TASK": "SST-2", "TRAINER": "kernel", "NUM_GPU": "2"}
    folder = place.folder / "two processes"
    done = subprocess.run(
        [
            "bash", str(ROOT / "run_fewshot.sh"), "--data_dir", "data", "--output_dir", str(folder),
            "--per_device_train_batch_size", "3", "--per_device_eval_batch_size", "2",
        ],
        cwd=place.folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == FILES
    records = (place.folder / "log").read_text(encoding="utf-8").count('"output_dir": "' + str(folder))
    assert records == 1
    for split in SIZES:
        assert oracle.relative_error(read_kernel(folder, split), read_kernel(made["sgd"], split)) <= 1e-6
        found, alone = (read_tensors(where / f"{split}_logits_sst-2.pt")[0] for where in (folder, made["sgd"]))
        assert torch.allclose(found, alone, atol=1e-6)
        note = json.loads((folder / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))
        assert note["processes"] == 2


def test_a_flag_that_nothing_reads_is_named(place: Workplace) -> None:
    flags = ("--f0_scaling", "2", "--kernel_gamma", "3")
    outcome = place.call(place.argv(*flags, output="idle"))
    assert outcome.status == 0
    assert "--f0_scaling has no effect without --adjust_for_init" in outcome.messages
    assert "--kernel_gamma has no effect without --kernel_solver asym" in outcome.messages
    outcome = place.call(place.argv("--f0_scaling", "2", "--adjust_for_init", output="idle"))
    assert "no effect" not in outcome.messages
