"""What a user can get wrong about training and demonstrations: one sentence, exit status 2, nothing half written."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from command_line import ROOT, Outcome, Workplace, sst2_rows, write_rows
from tiny_models import save_tiny_checkpoint

STEPS = ("--trainer", "standard", "--max_steps", "2", "--per_device_train_batch_size", "2")
DEMO = ("--few_shot_type", "prompt-demo", "--num_sample", "2")


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    (place.folder / "log").touch()
    return place


@pytest.fixture(scope="module")
def trained(place: Workplace) -> Path:
    """A run that was trained, with a checkpoint after its first step."""
    return place.run(*STEPS, "--save_steps", "1", output="trained")


@pytest.fixture(scope="module")
def adapters(place: Workplace) -> Path:
    """A run that trained adapters, with a checkpoint after its first step."""
    return place.run(*STEPS, "--apply_lora", "--save_steps", "1", output="adapters")


@pytest.fixture
def refuse(place: Workplace) -> Callable[..., str]:
    """Call a command that must be refused with nothing left behind; return the sentence."""

    def call(*flags: str, output: str = "refused") -> str:
        before = contents(place.folder)
        try:
            sentence = refusal_of(place.call(place.argv(*flags, output=output)))
            assert contents(place.folder) == before
        finally:
            shutil.rmtree(place.folder / "refused", ignore_errors=True)
        return sentence

    return call


def refusal_of(outcome: Outcome) -> str:
    """The sentence of a refusal: all there is on stderr."""
    assert (outcome.status, outcome.out) == (2, "")
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files below a folder, and the folders."""
    found = {}
    for path in folder.rglob("*"):
        status = path.stat()
        found[str(path)] = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
    return found


# Flags.


@pytest.mark.parametrize(
    ("flags", "named", "way_out"),
    [
        (
            [*STEPS, "--evaluate_during_training", "--do_eval", "False"],
            "--evaluate_during_training",
            "add --do_eval, or leave it out",
        ),
        ([*STEPS, "--apply_lora", "--lora_r", "0"], "--lora_r is 0", "must be 1 or more"),
        ([*STEPS, "--apply_lora", "--lora_alpha", "0"], "--lora_alpha is 0", "must be 1 or more"),
        ([*STEPS, "--lora_r", "4"], "--lora_r", "add --apply_lora, or leave it out"),
        (["--save_logit", "--no_train"], "--save_logit", "--save_logit_dir"),
        ([*STEPS, "--optimizer_variant", "signgd"], "--optimizer_variant signgd", "add --optimizer sgd"),
        ([*STEPS, "--optimizer", "lion"], "--optimizer", "'adam', 'sgd'"),
        ([*STEPS, "--optim", "nonsense"], "--optim", "'adamw_torch'"),
        ([*STEPS, "--fix_layers", "-1"], "--fix_layers is -1", "must be 0 or more"),
        ([*STEPS, "--fix_layers", "3"], "--fix_layers", "the model has 2 layers"),
        (
            ["--few_shot_type", "finetune", "--kernel_formula", "asymmetric_signgd"],
            "--kernel_formula asymmetric_signgd",
            "add --binary_classification",
        ),
        (
            [*DEMO, "--gpt3_in_context_head", "--gpt3_in_context_tail"],
            "--gpt3_in_context_head and",
            "exclude each other",
        ),
        ([*DEMO, "--demo_filter"], "--demo_filter needs --demo_filter_model", "tools/get_sbert_embedding.py"),
        (["--gpt3_in_context_head"], "--gpt3_in_context_head", "pass --few_shot_type prompt-demo"),
        ([*DEMO, "--demo_filter", "--demo_filter_model", "m"], "train_m.npy", "tools/get_sbert_embedding.py"),
        ([*DEMO, "--demo_filter_rate", "0"], "--demo_filter_rate is 0", "above 0, up to 1"),
        ([*DEMO, "--num_demo", "0"], "--num_demo is 0", "must be 1 or more"),
        ([*DEMO, "--num_demo", "2"], "prompt-demo needs 3 of each class", "lower --num_demo (now 2)"),
        ([*DEMO, "--num_sample", "0"], "--num_sample is 0", "must be 1 or more"),
        (["--task_name", "sts-b"], "--trainer kernel", "take a task with classes"),
        (
            ["--task_name", "sts-b", "--trainer", "linearhead", "--binary_classification"],
            "--binary_cl",
            "leave it out",
        ),
        ([*STEPS, "--learning_rate", "nan"], "--learning_rate is nan", "must be"),
        ([*STEPS, "--learning_rate", "-1"], "--learning_rate is -1", "must be"),
        ([*STEPS, "--learning_rate", "inf"], "--learning_rate is inf", "must be"),
        ([*STEPS, "--weight_decay", "nan"], "--weight_decay is nan", "must be"),
        ([*STEPS, "--max_grad_norm", "nan"], "--max_grad_norm is nan", "must be"),
        (
            [*STEPS, "--max_steps", "-1", "--num_train_epochs", "nan"],
            "--num_train_epochs is nan",
            "must be",
        ),
        (
            [*STEPS, "--max_steps", "-1", "--num_train_epochs", "-3"],
            "--num_train_epochs is -3",
            "must be",
        ),
        (
            [*STEPS, "--gradient_accumulation_steps", "0"],
            "--gradient_accumulation_steps is 0",
            "must be",
        ),
        (
            [*STEPS, "--evaluate_during_training", "--eval_steps", "0"],
            "--eval_steps is 0",
            "must be",
        ),
        (
            [*STEPS, "--dataloader_drop_last", "--per_device_train_batch_size", "8"],
            "--dataloader_drop_last",
            "batch",
        ),
        ([*STEPS, "--dry_run"], "--dry_run", "--trainer kernel"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_flags_that_cannot_work_are_refused(
    refuse: Callable[..., str], flags: list[str], named: str, way_out: str
) -> None:
    sentence = refuse(*flags)
    assert named in sentence
    assert way_out in sentence


def test_training_into_a_folder_that_is_not_empty_is_refused(refuse: Callable[..., str], trained: Path) -> None:
    assert refuse(*STEPS, output="trained") == (
        f"--output_dir {trained} is not empty: choose another folder or TAG, pass --overwrite_output_dir to train "
        "anew there, or --resume_from_checkpoint true to continue from its last checkpoint"
    )


def test_a_folder_in_the_logs_place_is_told_before_training(place: Workplace, refuse: Callable[..., str]) -> None:
    log = place.folder / "log"
    aside = log.rename(place.folder / "aside")
    log.mkdir()
    try:
        assert refuse(*STEPS).startswith("./log is a folder, but runs append a line to a file of that name")
    finally:
        log.rmdir()
        aside.rename(log)


@pytest.mark.parametrize("how", [STEPS, ("--trainer", "linearhead"), ("--no_train",)], ids=["train", "linear", "zero"])
def test_a_file_in_the_place_of_the_folder_for_logits_is_told_before_the_work(
    place: Workplace, refuse: Callable[..., str], how: tuple[str, ...]
) -> None:
    (place.folder / "a file").touch()
    sentence = refuse(*how, "--save_logit", "--save_logit_dir", str(place.folder / "a file"))
    assert f"--save_logit_dir {place.folder / 'a file'}" in sentence


# Too few examples.


def data_of(place: Workplace, counts: tuple[int, int]) -> list[str]:
    """The flag for data with so many train examples of each class."""
    folder = place.folder / "data of {}-{}".format(*counts)
    shutil.copytree(place.data, folder, dirs_exist_ok=True)
    rows = [(text, str(label)) for label, count in enumerate(counts) for text, _ in sst2_rows(count)]
    write_rows(folder / "train.tsv", [("sentence", "label"), *rows])
    return ["--data_dir", str(folder)]


@pytest.mark.parametrize(
    "flags",
    [["--trainer", "linearhead"], [*STEPS, "--from_linearhead"], ["--from_linearhead"]],
    ids=["linear head", "fine-tuning", "kernel"],
)
def test_a_class_with_one_example_is_too_few_for_a_linear_head(
    place: Workplace, refuse: Callable[..., str], flags: list[str]
) -> None:
    data = data_of(place, (3, 1))
    sentence = refuse(*flags, *data)
    assert (
        "class 1 has 1 training example, but logistic regression is cross-validated and needs two of each" in sentence
    )
    assert "raise K" in sentence


@pytest.mark.parametrize(
    "flags", [[], STEPS, ["--trainer", "linearhead"]], ids=["kernel", "fine-tuning", "linear head"]
)
def test_a_class_with_one_example_is_too_few_for_demonstrations(
    place: Workplace, refuse: Callable[..., str], flags: list[str]
) -> None:
    data = data_of(place, (3, 1))
    sentence = refuse(*flags, *DEMO, *data)
    assert "train has 1 of class '1' of SST-2, but prompt-demo needs 2 of each class" in sentence
    assert "--few_shot_type prompt" in sentence


def test_one_example_of_each_class_is_enough_for_demonstrations_of_dev_and_test(place: Workplace) -> None:
    outcome = place.call(place.argv("--no_train", *DEMO, *data_of(place, (1, 1)), output="one of each"))
    assert (outcome.status, outcome.err) == (0, "")


def test_fewer_examples_than_folds_are_a_warning_that_says_how_many_folds(place: Workplace) -> None:
    argv = place.argv("--trainer", "linearhead", *data_of(place, (5, 3)), output="folds")
    outcome = place.call(argv)
    assert (outcome.status, outcome.err) == (0, "")
    assert "class 1 has 3 training examples: 3 folds instead of 5" in outcome.messages


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 8), np.float32), "holds 3 embeddings, but train has 4 examples"),
        (np.full((4, 8), np.nan, np.float32), "is not an array of finite floats"),
        (np.zeros(4, np.float32), "is not an array of finite floats"),
        (np.zeros((4, 7), np.float32), "embeddings of 7 dimensions"),
        (None, "is damaged"),
    ],
    ids=["rows", "nan", "shape", "dimensions", "damaged"],
)
def test_embeddings_that_do_not_fit_the_data_are_told(
    place: Workplace, refuse: Callable[..., str], array: np.ndarray | None, said: str
) -> None:
    data = place.folder / "embedded"
    shutil.copytree(place.data, data, dirs_exist_ok=True)
    for split, size in (("dev", 4), ("test", 6)):
        np.save(data / f"{split}_m.npy", np.ones((size, 8), np.float32))
    if array is None:
        (data / "train_m.npy").write_bytes(b"\x93NUMPY")
    else:
        np.save(data / "train_m.npy", array)
    sentence = refuse(
        *DEMO, "--demo_filter", "--demo_filter_model", "m", "--demo_filter_rate", "1", "--data_dir", str(data)
    )
    assert said in sentence
    assert "tools/get_sbert_embedding.py" in sentence


# Checkpoints and adapters.


def resume(path: object) -> list[str]:
    return ["--resume_from_checkpoint", str(path)]


def test_a_checkpoint_of_another_architecture_is_refused(
    place: Workplace, refuse: Callable[..., str], trained: Path
) -> None:
    bert = save_tiny_checkpoint("bert", place.folder / "bert")
    sentence = refuse(*STEPS, "--model_name_or_path", str(bert), *resume(trained / "checkpoint-1"))
    assert f"--resume_from_checkpoint: {trained}/checkpoint-1/model.safetensors is a checkpoint of another" in sentence
    assert "name a checkpoint of this one, or leave --resume_from_checkpoint out" in sentence


@pytest.mark.parametrize("name", ["an empty folder", "nowhere", "data"])
def test_a_folder_that_is_no_checkpoint_is_refused(place: Workplace, refuse: Callable[..., str], name: str) -> None:
    (place.folder / "an empty folder").mkdir(exist_ok=True)
    sentence = refuse(*STEPS, *resume(place.folder / name))
    assert f"--resume_from_checkpoint {place.folder / name}: there is no trainer_state.json in it" in sentence
    assert "name a checkpoint-N folder of an earlier run" in sentence


def test_checkpoints_with_and_without_adapters_are_told_apart(
    refuse: Callable[..., str], trained: Path, adapters: Path
) -> None:
    sentence = refuse(*STEPS, *resume(adapters / "checkpoint-1"))
    assert f"{adapters}/checkpoint-1 holds LoRA adapters: add --apply_lora" in sentence
    sentence = refuse(*STEPS, "--apply_lora", *resume(trained / "checkpoint-1"))
    assert f"{trained}/checkpoint-1 holds no LoRA adapters: leave --apply_lora out" in sentence


def test_a_checkpoint_with_adapters_of_another_rank_is_refused(refuse: Callable[..., str], adapters: Path) -> None:
    sentence = refuse(*STEPS, "--apply_lora", "--lora_r", "4", *resume(adapters / "checkpoint-1"))
    assert f"{adapters}/checkpoint-1/adapter_model.safetensors does not hold LoRA adapters for this model" in sentence
    assert "name another folder" in sentence


@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--fix_layers", "1"]], ids=lambda flags: flags[0])
def test_a_checkpoint_of_another_optimizer_or_other_trained_layers_is_refused(
    refuse: Callable[..., str], trained: Path, flags: list[str]
) -> None:
    sentence = refuse(*STEPS, *flags, *resume(trained / "checkpoint-1"))
    assert "--resume_from_checkpoint" in sentence
    assert str(trained / "checkpoint-1") in sentence


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "cut"),
        ("model.safetensors", "missing"),
        ("trainer_state.json", "missing"),
        ("trainer_state.json", "cut"),
        ("optimizer.pt", "cut"),
        ("optimizer.pt", "missing"),
        ("scheduler.pt", "cut"),
        ("scheduler.pt", "missing"),
        ("rng_state.pth", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    place: Workplace, refuse: Callable[..., str], trained: Path, name: str, how: str
) -> None:
    folder = place.folder / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained / "checkpoint-1", folder)
    if how == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    else:
        (folder / name).unlink()
    sentence = refuse(*STEPS, *resume(folder))
    assert str(folder) in sentence
    assert name in sentence


def test_adapters_without_the_flag_for_them_are_refused(
    place: Workplace, refuse: Callable[..., str], adapters: Path
) -> None:
    assert refuse("--no_train", "--model_name_or_path", str(adapters)) == (
        f"--model_name_or_path {adapters} holds LoRA adapters for '{place.model}': add --apply_lora to use them"
    )


def test_adapters_of_another_rank_or_scale_than_the_flags_are_refused(
    refuse: Callable[..., str], adapters: Path
) -> None:
    use = ("--no_train", "--apply_lora", "--model_name_or_path", str(adapters))
    assert refuse(*use, "--lora_r", "4") == (f"--lora_r is 4, but the adapters in {adapters} have 8: leave it out")
    assert refuse(*use, "--lora_alpha", "4") == (
        f"--lora_alpha is 4, but the adapters in {adapters} have 16: leave it out"
    )


def with_config(place: Workplace, adapters: Path, **values: object) -> list[str]:
    """The flags for a copy of the adapters whose configuration says otherwise."""
    folder = place.folder / "other adapters"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapters, folder, ignore=shutil.ignore_patterns("tokenizer*", "checkpoint-*"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
    return ["--no_train", "--apply_lora", "--model_name_or_path", str(folder)]


def test_adapters_of_another_architecture_are_refused(
    place: Workplace, refuse: Callable[..., str], adapters: Path
) -> None:
    bert = save_tiny_checkpoint("bert", place.folder / "bert")
    sentence = refuse(*with_config(place, adapters, base_model_name_or_path=str(bert)))
    assert (
        f"{place.folder}/other adapters/adapter_model.safetensors does not hold LoRA adapters for this model"
        in sentence
    )


def test_adapters_whose_model_is_gone_are_told_from_a_model_that_is_gone(
    place: Workplace, refuse: Callable[..., str], adapters: Path
) -> None:
    sentence = refuse(*with_config(place, adapters, base_model_name_or_path=str(place.folder / "gone")))
    assert str(place.folder / "gone") in sentence
    assert "other adapters" in sentence


def test_adapters_with_a_broken_configuration_are_refused(
    place: Workplace, refuse: Callable[..., str], adapters: Path
) -> None:
    sentence = refuse(*with_config(place, adapters, r="many"))
    assert "adapter_config.json cannot be read as the configuration of LoRA adapters" in sentence


def test_a_head_of_another_model_is_refused(place: Workplace, refuse: Callable[..., str], trained: Path) -> None:
    flags = ("--few_shot_type", "finetune", "--from_linearhead")
    folder = place.run(*STEPS, *flags, output="first token")
    texts = [text for text, _ in sst2_rows(4)]
    for stem in ("train", "dev_matched", "test_matched"):
        rows = [
            ["x"] * 8 + [text, text, label] for text, label in zip(texts, ("neutral", "entailment") * 2, strict=True)
        ]
        write_rows(place.folder / "MNLI" / f"{stem}.tsv", [["h"] * 11, *rows])
    data = ("--task_name", "mnli", "--data_dir", str(place.folder / "MNLI"))
    sentence = refuse("--no_train", *flags, *data, "--model_name_or_path", str(folder))
    assert f"{folder}/head.safetensors holds the head of another model" in sentence


# Disks.

UNDER_A_LIMIT = """
import json, resource, sys, traceback
from command_line import load_run_module

run = load_run_module()
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for argv in json.loads(sys.argv[1]):
    try:
        status = run.main(argv)
    except BaseException:
        status = traceback.format_exc()
    print("status:", status, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_while_a_model_is_saved_is_told(place: Workplace, warm_python: str) -> None:
    """A limit on the size of files, that results fit below and weights do not, stands for the full disk."""
    kinds = {"full": [], "full of adapters": ["--apply_lora"]}
    argvs = [place.argv(*STEPS, *flags, output=output) for output, flags in kinds.items()]
    program = place.folder / "under_a_limit.py"
    program.write_text(UNDER_A_LIMIT, encoding="utf-8")
    done = subprocess.run(
        [warm_python, str(program), json.dumps(argvs)],
        cwd=place.folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests' / 'helpers'}"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.stderr.count("status: 2") == 2
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for output, sentence in zip(kinds, sentences, strict=True):
        assert str(place.folder / output) in sentence
        assert "make room" in sentence
        assert not list((place.folder / output).rglob("*.safetensors"))
