"""The command line when kernels are there already, here or elsewhere, and when they are only talked about."""

import json
import re
from pathlib import Path

import pytest
import torch

from command_line import (
    FORMULAS,
    SIZES,
    Workplace,
    flags_of,
    read_kernel,
    read_results,
    snapshot,
    sst2_rows,
    write_rows,
)


@pytest.fixture(scope="module")
def made(place: Workplace) -> dict[str, Path]:
    """The output folder of a run of each formula."""
    return {formula: place.run(*flags_of(formula), output=formula) for formula in FORMULAS}


def test_the_same_command_again_uses_the_kernels_as_they_are(place: Workplace) -> None:
    folder = place.run(output="again")
    before, results = snapshot(folder), read_results(folder / "test_results_sst-2.txt")
    place.run(output="again")
    after = snapshot(folder)
    assert {name: after[name] for name in after if "kernels" in name} == {
        name: before[name] for name in before if "kernels" in name
    }
    assert after.keys() == before.keys()
    assert read_results(folder / "test_results_sst-2.txt") == pytest.approx(results)


def test_another_solver_uses_the_kernels_that_are_there(place: Workplace) -> None:
    folder = place.run(output="solvers")
    before = snapshot(folder)
    for solver in ("svr", "svc", "logistic"):
        place.run("--kernel_solver", solver, output="solvers")
        assert "rank0" not in read_results(folder / "test_results_sst-2.txt")
    assert [name for name, entry in snapshot(folder).items() if entry != before[name] and "kernels" in name] == []


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--kernel_formula", "signgd"], "formula: stored sgd, now signgd"),
        (["--only_biases"], 'parameters: stored all, now {"only_biases": true}; grad_dim: stored'),
        (["--mapping", "{0: 'bad', 1: 'good'}"], "mapping.0: stored terrible, now bad; mapping.1: stored great"),
    ],
    ids=["formula", "filter", "mapping"],
)
def test_a_kernel_of_another_command_is_not_used_silently(
    place: Workplace, made: dict[str, Path], flags: list[str], difference: str
) -> None:
    before = snapshot(made["sgd"])
    outcome = place.call(place.argv(*flags, output="sgd"))
    path = made["sgd"] / "train_kernels_sst-2.pt"
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {path} was made by another command ({difference}")
    assert outcome.err.endswith(
        "): pass --overwrite_kernels to compute it anew, or another TAG or --output_dir to keep both\n"
    )
    assert snapshot(made["sgd"]) == before


def test_a_kernel_of_other_data_is_not_used_silently(place: Workplace, made: dict[str, Path]) -> None:
    data = place.folder / "other data"
    for split in SIZES:
        write_rows(data / f"{split}.tsv", [("sentence", "label"), *sst2_rows(SIZES[split], "another")])
    outcome = place.call(place.argv("--data_dir", str(data), output="sgd"))
    assert outcome.status == 2
    assert "(data_sha256.train: stored " in outcome.err


def test_overwriting_computes_kernels_anew(place: Workplace) -> None:
    folder = place.run(output="overwritten")
    place.run("--kernel_formula", "signgd", "--overwrite_kernels", output="overwritten")
    for split in SIZES:
        kernel = read_kernel(folder, split)
        assert torch.equal(kernel, kernel.round())
        note = json.loads((folder / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))
        assert note["formula"] == "signgd"
    place.run("--kernel_formula", "signgd", output="overwritten")


def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(place: Workplace, made: dict[str, Path]) -> None:
    log = place.folder / "log"
    before = log.read_bytes() if log.exists() else b""
    outcome = place.call(place.argv("--dry_run", "--per_device_train_batch_size", "3", output="dry"))
    parameters = json.loads((made["sgd"] / "test_kernels_sst-2.json").read_text(encoding="utf-8"))["grad_dim"]
    assert (outcome.status, outcome.err) == (0, "")
    *kernels, total = re.split(r"\n(?=\S)", outcome.messages.strip())
    assert len(kernels) == 3
    assert kernels[2].startswith("would compute the train × test kernel (sgd): 4 × 6 examples of ")
    for words in (" tokens in all", " 2 logits", f" {parameters:,} parameters", " engine", " tiles of 3 × 6"):
        assert words in kernels[2]
    # How long it takes is measured: on a busy machine it is more than the 0.1 s of an idle one.
    assert re.search(r" GB beside the model, about \d+\.\d s, and 0\.0 MB on disk", kernels[2])
    assert re.fullmatch(r"in all about \d+\.\d s before solving, \d\.\d\d GB of memory, and 0\.0 MB in .*", total)
    assert not (place.folder / "dry").exists()
    assert (log.read_bytes() if log.exists() else b"") == before


def test_a_dry_run_names_the_kernels_that_need_no_computing(place: Workplace, made: dict[str, Path]) -> None:
    before = snapshot(made["sgd"])
    in_place = place.call(place.argv("--dry_run", output="sgd"))
    loaded = place.call(place.argv("--dry_run", "--load_kernels", str(made["sgd"]), output="dry"))
    wanted = [
        f"would take the train × {split} kernel (4 × 2 × {size} × 2) from {made['sgd']}/{split}_kernels_sst-2.pt"
        for split, size in SIZES.items()
    ]
    assert in_place.messages.splitlines()[:-1] == loaded.messages.splitlines()[:-1] == wanted
    assert snapshot(made["sgd"]) == before


@pytest.mark.parametrize("described", [True, False], ids=["ours", "published"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_loaded_kernels_need_neither_model_nor_data(
    place: Workplace, made: dict[str, Path], tmp_path: Path, formula: str, described: bool
) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    for path in made[formula].glob("*_kernels_*"):
        if described or path.suffix == ".pt":
            (source / path.name).write_bytes(path.read_bytes())
    source.chmod(0o555)
    before = snapshot(source)
    nowhere = ["--model_name_or_path", "no/model", "--data_dir", "no/data", "--load_kernels", str(source)]
    output = f"loaded-{formula}-{described}"
    folder = place.run(*flags_of(formula), *nowhere, output=output)
    for name in ("eval_results_sst-2.txt", "test_results_sst-2.txt"):
        wanted = read_results(made[formula] / name)
        del wanted["grad_dim"]
        found = read_results(folder / name)
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert not [path for path in folder.iterdir() if "kernels" in path.name or "logits" in path.name]
    assert snapshot(source) == before


def test_a_loaded_kernel_of_another_formula_is_refused(place: Workplace, made: dict[str, Path]) -> None:
    flags = ["--model_name_or_path", "no/model", "--data_dir", "no/data", "--kernel_formula", "signgd"]
    outcome = place.call(place.argv(*flags, "--load_kernels", str(made["sgd"]), output="refused"))
    path = made["sgd"] / "train_kernels_sst-2.pt"
    assert (outcome.status, outcome.err) == (
        2,
        f"error: --load_kernels: {path} is another kernel (formula: stored sgd, now signgd); "
        "give the flags and data that it was made with, or another folder\n",
    )


def test_kernels_that_are_loaded_for_another_model_are_told_apart(place: Workplace, made: dict[str, Path]) -> None:
    flags = ["--load_kernels", str(made["sgd"])]
    other = place.call(place.argv(*flags, "--model_name_or_path", "other/model", output="of another"))
    sentence = f"is a kernel of the model {place.model}, not of --model_name_or_path other/model"
    assert (other.status, other.messages.count(sentence)) == (0, 3)
    assert "though --model_name_or_path" not in place.call(place.argv(*flags, output="of the same")).messages
    drawn = place.call(place.argv(*flags, "--random_model_init", output="of none"))
    assert drawn.status == 2
    assert "random_model_init: stored nothing, now true" in drawn.err


def test_a_kernel_of_another_configuration_of_the_same_weights_is_not_used(
    place: Workplace, made: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((place.model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 1}), encoding="utf-8")
    outcome = place.call(place.argv("--config_name", str(tmp_path), output="sgd"))
    assert outcome.status == 2
    assert "was made by another command (config_sha256: stored" in outcome.err
    assert "weights_sha256" not in outcome.err


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--only_biases"], "parameters: stored all, now"),
        (["--kernel_dtype", "float64"], "dtype: stored float32, now float64"),
        (["--template", "*cls**sent_0*_This_is*mask*.*sep+*"], "template: stored"),
        (["--mapping", "{0: 'bad', 1: 'good'}"], "mapping.0: stored terrible, now bad"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_loaded_kernel_must_fit_the_flags(
    place: Workplace, made: dict[str, Path], flags: list[str], difference: str
) -> None:
    outcome = place.call(place.argv("--load_kernels", str(made["sgd"]), *flags, output="refused"))
    assert outcome.status == 2
    assert difference in outcome.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--binary_classification"], "holds a kernel of 2 logits, but the command asks for 1"),
        (
            ["--binary_classification", "--kernel_formula", "asymmetric_signgd", "--kernel_solver", "asym"],
            "holds a kernel of one direction, which does not match this --kernel_formula",
        ),
    ],
)
def test_a_loaded_kernel_without_description_must_be_of_the_kind_asked_for(
    place: Workplace, made: dict[str, Path], tmp_path: Path, flags: list[str], sentence: str
) -> None:
    for path in made["sgd"].glob("*_kernels_*.pt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    outcome = place.call(place.argv("--load_kernels", str(tmp_path), *flags, output="refused"))
    assert outcome.status == 2
    assert sentence in outcome.err


def test_logits_for_an_adjustment_come_from_beside_loaded_kernels(place: Workplace, made: dict[str, Path]) -> None:
    own = place.run("--adjust_for_init", output="adjusted")
    flags = ["--adjust_for_init", "--load_kernels", str(made["sgd"]), "--model_name_or_path", "no/model"]
    loaded = place.run(*flags, "--data_dir", "no/data", output="adjusted-loaded")
    name = "test_results_sst-2.txt"
    assert read_results(own / name)["eval_loss"] == pytest.approx(read_results(loaded / name)["eval_loss"])
    assert read_results(own / name)["eval_loss"] != pytest.approx(read_results(made["sgd"] / name)["eval_loss"])
