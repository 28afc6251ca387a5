from pathlib import Path

import pytest

from lmntk.config import validation
from lmntk.config.arguments import parse_arguments
from lmntk.config.validation import BOUNDS, check_arguments, unused_flags
from lmntk.errors import UsageError

KERNEL = ["--trainer", "kernel", "--few_shot_type", "prompt", "--do_train", "--do_eval"]
ZERO_SHOT = ["--no_train", "--few_shot_type", "prompt", "--do_eval"]


def check(*flags: str, task: str = "sst-2", output_dir: str = "nowhere/yet") -> None:
    needed = ["--model_name_or_path", "m", "--task_name", task, "--data_dir", "d", "--output_dir", output_dir]
    check_arguments(*parse_arguments([*needed, *flags]))


def refusal(*flags: str, task: str = "sst-2", output_dir: str = "nowhere/yet") -> str:
    with pytest.raises(UsageError) as error:
        check(*flags, task=task, output_dir=output_dir)
    return str(error.value)


@pytest.mark.parametrize("trainer", ["standard", "kernel", "linearhead"])
def test_zero_shot_evaluation_passes_with_any_trainer(trainer: str) -> None:
    check(*ZERO_SHOT, "--trainer", trainer, "--num_sample", "1")


@pytest.mark.parametrize("solver", ["lstsq", "logistic", "svr", "svc"])
@pytest.mark.parametrize("task", ["SST-2", "trec", "MNLI"])
@pytest.mark.parametrize("formula", ["sgd", "signgd"])
def test_kernels_of_any_number_of_classes_pass_with_all_solvers_but_asym(solver: str, task: str, formula: str) -> None:
    check(*KERNEL, "--kernel_solver", solver, "--kernel_formula", formula, task=task)


@pytest.mark.parametrize("solver", ["lstsq", "logistic", "svr", "svc", "asym"])
def test_the_asymmetric_kernel_of_one_logit_passes_with_every_solver(solver: str) -> None:
    check(*KERNEL, "--kernel_formula", "asymmetric_signgd", "--binary_classification", "--kernel_solver", solver)


def test_all_flags_of_the_kernel_pass_together(tmp_path: Path) -> None:
    check(
        *KERNEL, "--dry_run", "--exclude_embeddings", "--exclude_head", "--only_biases", "--exclude_first_layers", "2",
        "--random_model_init", "--random_segment", "--use_task_word", "--adjust_for_init", "--f0_scaling", "0",
        "--kernel_lambda", "0", "--kernel_gamma", "0.1", "--kernel_regularization", "0", "--kernel_engine", "jvp",
        "--kernel_dtype", "float64", "--kernel_memory_gb", "0.5", "--overwrite_kernels", "--debug_mode",
        "--load_kernels", str(tmp_path), "--overwrite_output_dir", "--truncate_head", "--model_family", "masked",
        "--overwrite_cache", "--gguf_file", "model.gguf",
    )  # fmt: skip


def test_an_unknown_task_is_answered_with_the_likely_one_and_the_list() -> None:
    sentence = refusal(*KERNEL, task="sst2")
    assert sentence.startswith("unknown task 'sst2': did you mean 'SST-2'? Available: SST-2, sst-5, mr, ")


@pytest.mark.parametrize(
    ("flags", "task", "sentence"),
    [
        (
            ["--kernel_formula", "asymmetric_signgd"],
            "sst-2",
            "--kernel_formula asymmetric_signgd needs --binary_classification: add --binary_classification, or take "
            "another formula (sgd, signgd)",
        ),
        (
            ["--kernel_formula", "asymmetric_signgd"],
            "trec",
            "--kernel_formula asymmetric_signgd needs --binary_classification: take a task of two classes, or take "
            "another formula (sgd, signgd)",
        ),
        (
            ["--binary_classification"],
            "trec",
            "--binary_classification needs two classes, but trec has 6; leave the flag out",
        ),
        (
            ["--binary_classification"],
            "sts-b",
            "--binary_classification: STS-B has scores, not classes; leave the flag out",
        ),
        (
            ["--kernel_solver", "asym"],
            "trec",
            "--kernel_solver asym needs two classes: take a task of two classes, or take another "
            "(lstsq, logistic, svr, svc)",
        ),
        (
            ["--kernel_solver", "asym"],
            "mr",
            "--kernel_solver asym needs two classes: add --binary_classification, or take another "
            "(lstsq, logistic, svr, svc)",
        ),
        (
            ["--kernel_solver", "asym", "--binary_classification", "--kernel_formula", "signgd"],
            "mr",
            "--kernel_solver asym needs an asymmetric kernel: add --kernel_formula asymmetric_signgd, or take another",
        ),
        (
            [],
            "sts-b",
            "--trainer kernel predicts classes, but STS-B is a regression task; take a task with classes",
        ),
        (
            ["--load_kernels", "no/such/folder"],
            "mr",
            "--load_kernels no/such/folder: there is no such folder; name an earlier run's output folder, or leave "
            "the flag out to compute the kernels",
        ),
        (
            ["--optimizer_variant", "signgd"],
            "mr",
            "--optimizer_variant signgd needs plain SGD: add --optimizer sgd",
        ),
    ],
)
def test_a_kernel_that_cannot_be_computed_or_solved_is_refused(flags: list[str], task: str, sentence: str) -> None:
    assert refusal(*KERNEL, *flags, task=task) == sentence


@pytest.mark.parametrize("solver", ["logistic", "svc"])
def test_adjusting_for_init_is_refused_for_solvers_without_targets_to_adjust(solver: str) -> None:
    sentence = refusal(*KERNEL, "--adjust_for_init", "--kernel_solver", solver)
    assert sentence.startswith(f"--adjust_for_init does not go with --kernel_solver {solver}, only with lstsq, svr")


def test_flags_of_the_kernel_do_not_stop_a_run_that_computes_none() -> None:
    check(*ZERO_SHOT, "--kernel_formula", "asymmetric_signgd", "--kernel_solver", "asym")


def test_loading_kernels_without_the_kernel_trainer_is_refused(tmp_path: Path) -> None:
    sentence = "--load_kernels works with --trainer kernel only: add that, or leave out --no_train"
    assert refusal(*ZERO_SHOT, "--load_kernels", str(tmp_path)) == sentence


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("num_k", "0", "1 or more"),
        ("num_sample", "0", "1 or more"),
        ("top_n_template", "0", "1 or more"),
        ("max_seq_length", "0", "1 or more"),
        ("first_sent_limit", "-1", "1 or more"),
        ("other_sent_limit", "0", "1 or more"),
        ("per_device_train_batch_size", "0", "from 1 to 1000000000"),
        ("per_device_eval_batch_size", "-4", "from 1 to 1000000000"),
        ("per_device_eval_batch_size", str(10**21), "from 1 to 1000000000"),
        ("logging_steps", "nan", "above 0"),
        ("logging_steps", "-0.5", "above 0"),
        ("save_steps", "nan", "above 0"),
        ("eval_steps", "nan", "above 0"),
        ("eval_delay", "nan", "0 or more"),
        ("eval_accumulation_steps", "0", "1 or more"),
        ("dataloader_num_workers", "-1", "from 0 to 1000"),
        ("data_seed", str(10**21), "from 0 to 4294967295"),
        ("num_train_epochs", "nan", "above 0"),
        ("weight_decay", "nan", "0 or more"),
        ("label_smoothing_factor", "2.0", "from 0 to 1"),
        ("exclude_first_layers", "-1", "0 or more"),
        ("kernel_memory_gb", "0.0", "above 0"),
        ("kernel_regularization", "-0.1", "from 0 to 1000000000000.0"),
        ("kernel_regularization", "inf", "from 0 to 1000000000000.0"),
        ("kernel_regularization", "1e+308", "from 0 to 1000000000000.0"),
        ("kernel_gamma", "0.0", "from 1e-100 to 1e+100"),
        ("kernel_gamma", "1e-320", "from 1e-100 to 1e+100"),
        ("f0_scaling", "1e-320", "0, or from 1e-100 to 1e+100"),
        ("adam_epsilon", "nan", "0 or more"),
        ("adam_beta1", "1.5", "from 0 to 1"),
        ("learning_rate", "nan", "0 or more"),
        ("max_grad_norm", "nan", "0 or more"),
        ("kernel_lambda", "1.5", "from 0 to 1"),
        ("kernel_lambda", "nan", "from 0 to 1"),
        ("f0_scaling", "-1.0", "0, or from 1e-100 to 1e+100"),
        ("num_demo", "0", "1 or more"),
        ("gpt3_in_context_num", "0", "1 or more"),
        ("demo_filter_rate", "0.0", "above 0, up to 1"),
        ("demo_filter_rate", "1.5", "above 0, up to 1"),
        ("lora_r", "0", "1 or more"),
        ("lora_alpha", "0", "1 or more"),
        ("fix_layers", "-1", "0 or more"),
    ],
)
def test_a_number_out_of_bounds_is_refused(flag: str, value: str, wanted: str) -> None:
    assert refusal(*KERNEL, f"--{flag}", value) == f"`{flag}` is {value}, but it must be {wanted}"


def test_every_bound_names_a_flag_that_exists() -> None:
    # a row for a flag that does not exist would raise KeyError here
    check(*KERNEL)
    assert len({bounds.setting for bounds in BOUNDS}) == len(BOUNDS)


@pytest.mark.parametrize("kind", ["finetune", "prompt", "prompt-demo"])
@pytest.mark.parametrize("trainer", ["standard", "kernel", "linearhead"])
def test_every_trainer_goes_with_every_type_and_with_lora(trainer: str, kind: str) -> None:
    check("--do_train", "--do_eval", "--trainer", trainer, "--few_shot_type", kind, "--apply_lora", "--lora_r", "4")


TRAIN = ["--few_shot_type", "prompt", "--do_train", "--do_eval"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([*TRAIN, "--optimizer_variant", "signgd"], "--optimizer_variant signgd needs plain SGD: add --optimizer sgd"),
        ([*TRAIN, "--save_logit"], "--save_logit needs --save_logit_dir, the folder to write the logits to"),
        ([*TRAIN, "--lora_r", "4"], "--lora_r says how LoRA is applied: add --apply_lora, or leave the flag out"),
        (
            ["--few_shot_type", "prompt", "--do_train", "--evaluate_during_training"],
            "--evaluate_during_training evaluates on dev: add --do_eval, or leave the flag out",
        ),
        (
            [*TRAIN, "--apply_lora", "--random_model_init"],
            "--random_model_init with --apply_lora: adapters are written without the random weights that they stand "
            "on; leave one of the flags out, or pass --save_strategy no",
        ),
        (
            [*TRAIN, "--max_steps", "0"],
            "--max_steps is 0, but it must be 1 or more; -1 leaves it to the epochs",
        ),
        (
            [*TRAIN, "--neftune_noise_alpha", "5"],
            "--neftune_noise_alpha does not work with the prompts of this program: leave the flag out",
        ),
        (
            [*TRAIN, "--sweep", "--resume_from_checkpoint", "true"],
            "--resume_from_checkpoint true looks into the output folder, which --sweep makes anew: name the checkpoint",
        ),
        (
            ["--do_train", "--demo_filter"],
            "--demo_filter needs --demo_filter_model, the name under which tools/get_sbert_embedding.py wrote sentence "
            "embeddings into --data_dir",
        ),
        (
            [*TRAIN, "--double_demo"],
            "--double_demo is for prompts with demonstrations: pass --few_shot_type prompt-demo, or leave it out",
        ),
        (
            [*ZERO_SHOT, "--gpt3_in_context_head", "--gpt3_in_context_tail"],
            "--gpt3_in_context_head and --gpt3_in_context_tail exclude each other: the examples stand on one side of "
            "the query",
        ),
        (
            ["--no_train", "--do_eval", "--gpt3_in_context_tail", "--template_path", "t"],
            "--gpt3_in_context_tail takes one template: pick a line of --template_path with --template_id",
        ),
    ],
)
def test_training_flags_that_do_not_go_together_are_refused(flags: list[str], sentence: str) -> None:
    assert refusal(*flags) == sentence


def test_fine_tuning_into_a_used_folder_needs_to_be_told_so(tmp_path: Path) -> None:
    (tmp_path / "eval_results_sst-2.txt").touch()
    sentence = refusal(*TRAIN, output_dir=str(tmp_path))
    assert sentence.startswith(f"--output_dir {tmp_path} is not empty: choose another folder or TAG")
    for flags in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "true"], ["--sweep"], ["--no_train"]):
        check(*TRAIN, *flags, output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([*KERNEL, "--f0_scaling", "2"], "--f0_scaling changes nothing without --adjust_for_init"),
        ([*KERNEL, "--kernel_gamma", "2"], "--kernel_gamma changes nothing without --kernel_solver asym"),
        ([*KERNEL, "--fix_layers", "2"], "--fix_layers changes nothing without --trainer standard --do_train"),
        ([*ZERO_SHOT, "--optimizer", "sgd"], "--optimizer changes nothing without --trainer standard --do_train"),
        ([*KERNEL, "--l2_loss"], "--l2_loss changes nothing without --trainer standard, or --no_train"),
        (
            [*ZERO_SHOT, "--from_linearhead"],
            "--from_linearhead changes nothing without --trainer standard or kernel, or --few_shot_type finetune",
        ),
        ([*TRAIN, "--num_demo", "2"], "--num_demo changes nothing without --few_shot_type prompt-demo"),
        (["--do_train", "--demo_filter_rate", "0.2"], "--demo_filter_rate changes nothing without --demo_filter"),
        (
            ["--do_train", "--gpt3_in_context_num", "2"],
            "--gpt3_in_context_num changes nothing without --gpt3_in_context_head or --gpt3_in_context_tail",
        ),
        (
            [*TRAIN, "--eval_steps", "2"],
            "--eval_steps changes nothing without --evaluate_during_training or --eval_strategy steps",
        ),
        (
            [*TRAIN, "--l2_loss", "--label_smoothing_factor", "0.1"],
            "--label_smoothing_factor changes nothing without cross entropy, in whose place is --l2_loss",
        ),
        ([*TRAIN, "--only_biases"], "--only_biases changes nothing without --trainer kernel"),
        ([*TRAIN, "--fix_layers", "2"], None),
        ([*KERNEL, "--from_linearhead"], None),
        ([*KERNEL, "--num_sample", "4"], None),
    ],
)
def test_a_flag_that_nothing_reads_is_told_apart(flags: list[str], sentence: str | None) -> None:
    needed = ["--model_name_or_path", "m", "--task_name", "sst-2", "--data_dir", "d", "--output_dir", "nowhere/yet"]
    assert unused_flags(*parse_arguments([*needed, *flags])) == ([] if sentence is None else [sentence])


def test_a_run_that_would_do_nothing_is_refused() -> None:
    sentence = refusal("--no_train", "--few_shot_type", "prompt")
    assert sentence == "nothing to do: pass --do_train, --do_eval or --do_predict"


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    blocking = tmp_path / "taken"
    blocking.write_text("")
    folder = blocking / "13"
    sentence = f"--output_dir {folder}: {blocking} is a file, not a folder; choose another place"
    assert refusal(*KERNEL, output_dir=str(folder)) == sentence


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write anywhere, so the answer of the operating system is replaced
    monkeypatch.setattr(validation.os, "access", lambda path, mode: Path(path) != tmp_path)
    folder = tmp_path / "new" / "folder"
    assert refusal(*KERNEL, output_dir=str(folder)) == (
        f"--output_dir {folder}: {tmp_path} cannot be written; choose another place"
    )


def test_checks_write_nothing(tmp_path: Path) -> None:
    check(*KERNEL, output_dir=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_log_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").mkdir()
    assert refusal(*KERNEL).startswith("./log is a folder, but runs append a line to a file of that name")
