from pathlib import Path

import pytest

from lmntk.config import validation
from lmntk.config.arguments import parse_arguments
from lmntk.config.validation import BOUNDS, check_arguments, unused_flags
from lmntk.errors import FileError, SettingError, UsageError

KERNEL = ["--trainer", "kernel", "--few_shot_type", "prompt", "--do_train", "--do_eval"]
LINEARISED = ["--trainer", "linearised", "--few_shot_type", "prompt", "--do_train", "--do_eval"]
ZERO_SHOT = ["--no_train", "--few_shot_type", "prompt", "--do_eval"]


def check(*flags: str, task: str = "sst-2", output_dir: str = "nowhere/yet") -> None:
    needed = ["--model_name_or_path", "m", "--task_name", task, "--data_dir", "d", "--output_dir", output_dir]
    check_arguments(*parse_arguments([*needed, *flags]))


def refusal(*flags: str, task: str = "sst-2", output_dir: str = "nowhere/yet") -> UsageError:
    with pytest.raises(UsageError) as error:
        check(*flags, task=task, output_dir=output_dir)
    return error.value


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
    assert "did you mean 'SST-2'? Available: SST-2, sst-5, mr, " in str(refusal(*KERNEL, task="sst2"))


@pytest.mark.parametrize(
    ("flags", "task", "setting", "remedy"),
    [
        (["--kernel_formula", "asymmetric_signgd"], "sst-2", "kernel_formula", "add `binary_classification`"),
        (["--kernel_formula", "asymmetric_signgd"], "trec", "kernel_formula", "another formula (sgd, signgd)"),
        (["--binary_classification"], "trec", "binary_classification", "but trec has 6"),
        (["--binary_classification"], "sts-b", "binary_classification", "STS-B has scores"),
        (["--kernel_solver", "asym"], "trec", "kernel_solver", "take a task of two classes"),
        (["--kernel_solver", "asym"], "mr", "kernel_solver", "another (lstsq, logistic, svr, svc)"),
        (
            ["--kernel_solver", "asym", "--binary_classification", "--kernel_formula", "signgd"],
            "mr",
            "kernel_solver",
            "`kernel_formula=asymmetric_signgd`",
        ),
        ([], "sts-b", "trainer", "take a task with classes"),
        (["--kernel_dtype", "bfloat16", "--kernel_formula", "signgd"], "mr", "kernel_formula", "`kernel_formula=sgd`"),
        (["--kernel_dtype", "bfloat16", "--kernel_engine", "jvp"], "mr", "kernel_engine", "take another engine"),
        (["--kernel_dtype", "bfloat16", "--fine_tuned_model", "."], "mr", "fine_tuned_model", "`kernel_dtype=float32`"),
        (["--load_kernels", "no/such/folder"], "mr", "load_kernels", "an earlier run's output folder"),
        (["--optimizer_variant", "signgd"], "mr", "optimizer_variant", "`optimizer=sgd`"),
        (["--kernel_variance", "--kernel_solver", "svc"], "mr", "kernel_variance", "take lstsq"),
        (
            ["--kernel_variance", "--kernel_formula", "asymmetric_signgd", "--binary_classification"],
            "mr",
            "kernel_variance",
            "take `kernel_formula=sgd or signgd`",
        ),
        (["--kernel_per_layer", "--kernel_engine", "jvp"], "mr", "kernel_per_layer", "take factored or jacobian"),
        (["--adjust_for_init", "--kernel_solver", "logistic"], "mr", "adjust_for_init", "only with lstsq, svr, asym"),
        (["--adjust_for_init", "--kernel_solver", "svc"], "mr", "adjust_for_init", "`kernel_solver=svc`"),
        (["--seed", "-1"], "mr", "seed", "from 0 to 4294967295"),
    ],
)
def test_a_kernel_that_cannot_be_computed_or_solved_is_refused(
    flags: list[str], task: str, setting: str, remedy: str
) -> None:
    error = refusal(*KERNEL, *flags, task=task)
    assert isinstance(error, SettingError) and error.data["setting"] == setting
    assert remedy in str(error)


def test_flags_of_the_kernel_do_not_stop_a_run_that_computes_none() -> None:
    check(*ZERO_SHOT, "--kernel_formula", "asymmetric_signgd", "--kernel_solver", "asym")


def test_loading_kernels_without_the_kernel_trainer_is_refused(tmp_path: Path) -> None:
    error = refusal(*ZERO_SHOT, "--load_kernels", str(tmp_path))
    assert error.data == {"setting": "load_kernels", "value": str(tmp_path)}
    assert "works with `trainer=kernel` only" in str(error)


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
    error = refusal(*KERNEL, f"--{flag}", value)
    assert isinstance(error, SettingError) and error.data["setting"] == flag
    assert str(error).endswith(f"must be {wanted}")


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
    ("flags", "setting", "remedy"),
    [
        ([*TRAIN, "--optimizer_variant", "signgd"], "optimizer_variant", "`optimizer=sgd`"),
        ([*TRAIN, "--adafactor", "--optimizer", "sgd"], "adafactor", "leave one of them out"),
        ([*TRAIN, "--save_logit"], "save_logit", "`save_logit_dir`"),
        ([*TRAIN, "--lora_r", "4"], "lora_r", "add `apply_lora`"),
        (["--do_train", "--evaluate_during_training"], "evaluate_during_training", "add `do_eval`"),
        (["--do_train", "--eval_on_start"], "eval_on_start", "add `do_eval`"),
        ([*TRAIN, "--apply_lora", "--random_model_init"], "random_model_init", "`save_strategy=no`"),
        ([*TRAIN, "--apply_lora", "--random_segment"], "random_segment", "`save_strategy=no`"),
        ([*TRAIN, "--max_steps", "0"], "max_steps", "give 1 or more"),
        ([*TRAIN, "--neftune_noise_alpha", "5"], "neftune_noise_alpha", "leave it out"),
        ([*TRAIN, "--sweep", "--resume_from_checkpoint", "true"], "resume_from_checkpoint", "name the checkpoint"),
        (["--do_train", "--demo_filter"], "demo_filter", "`demo_filter_model`"),
        ([*TRAIN, "--double_demo"], "double_demo", "`few_shot_type=prompt-demo`"),
        (
            [*ZERO_SHOT, "--gpt3_in_context_head", "--gpt3_in_context_tail"],
            "gpt3_in_context_head",
            "leave one of them out",
        ),
        (
            ["--no_train", "--do_eval", "--gpt3_in_context_tail", "--template_path", "t"],
            "gpt3_in_context_tail",
            "`template_id`",
        ),
        (["--no_train", "--few_shot_type", "prompt"], "do_train", "`do_train`, `do_eval` or `do_predict`"),
    ],
)
def test_training_flags_that_do_not_go_together_are_refused(flags: list[str], setting: str, remedy: str) -> None:
    error = refusal(*flags)
    assert isinstance(error, SettingError) and error.data["setting"] == setting
    assert remedy in str(error)


def test_fine_tuning_into_a_used_folder_needs_to_be_told_so(tmp_path: Path) -> None:
    (tmp_path / "eval_results_sst-2.txt").touch()
    assert refusal(*TRAIN, output_dir=str(tmp_path)).data == {"setting": "output_dir", "value": str(tmp_path)}
    for flags in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "true"], ["--sweep"], ["--no_train"]):
        check(*TRAIN, *flags, output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "setting", "needed"),
    [
        ([*KERNEL, "--f0_scaling", "2"], "f0_scaling", "`adjust_for_init`"),
        ([*KERNEL, "--kernel_gamma", "2"], "kernel_gamma", "`kernel_solver=asym`"),
        ([*KERNEL, "--fix_layers", "2"], "fix_layers", "`trainer=standard` or linearised, and `do_train`"),
        ([*ZERO_SHOT, "--optimizer", "sgd"], "optimizer", "`trainer=standard` or linearised, and `do_train`"),
        ([*KERNEL, "--kernel_steps", "0"], "kernel_steps", "`trainer=standard` or linearised, and `do_train`"),
        ([*KERNEL, "--l2_loss"], "l2_loss", "`trainer=standard` or linearised, or `no_train`"),
        ([*ZERO_SHOT, "--from_linearhead"], "from_linearhead", "`few_shot_type=finetune`"),
        ([*TRAIN, "--num_demo", "2"], "num_demo", "`few_shot_type=prompt-demo`"),
        (["--do_train", "--demo_filter_rate", "0.2"], "demo_filter_rate", "`demo_filter`"),
        (["--do_train", "--gpt3_in_context_num", "2"], "gpt3_in_context_num", "`gpt3_in_context_tail`"),
        ([*TRAIN, "--eval_steps", "2"], "eval_steps", "`eval_strategy=steps`"),
        ([*TRAIN, "--l2_loss", "--label_smoothing_factor", "0.1"], "label_smoothing_factor", "cross entropy"),
        ([*TRAIN, "--only_biases"], "only_biases", "`trainer=kernel`"),
        ([*LINEARISED, "--save_steps", "10"], "save_steps", "`trainer=linearised` does not"),
        ([*LINEARISED, "--save_total_limit", "1"], "save_total_limit", "`trainer=linearised` does not"),
        ([*LINEARISED, "--save_strategy", "epoch"], "save_strategy", "`trainer=linearised` does not"),
        ([*LINEARISED, "--save_strategy", "no"], None, None),
        (LINEARISED, None, None),
        ([*TRAIN, "--save_steps", "10"], None, None),
        ([*TRAIN, "--fix_layers", "2"], None, None),
        ([*KERNEL, "--from_linearhead"], None, None),
        ([*KERNEL, "--num_sample", "4"], None, None),
    ],
)
def test_a_setting_without_effect_is_named_with_what_it_needs(
    flags: list[str], setting: str | None, needed: str | None
) -> None:
    command = ["--model_name_or_path", "m", "--task_name", "sst-2", "--data_dir", "d", "--output_dir", "nowhere/yet"]
    found = unused_flags(*parse_arguments([*command, *flags]))
    assert len(found) == (setting is not None)
    assert not found or (f"`{setting}` has no effect" in found[0] and str(needed) in found[0])


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    blocking = tmp_path / "taken"
    blocking.write_text("")
    folder = blocking / "13"
    error = refusal(*KERNEL, output_dir=str(folder))
    assert isinstance(error, FileError) and error.data == {"path": str(folder), "setting": "output_dir"}
    assert f"{blocking} is a file" in str(error)


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write anywhere, so the answer of the operating system is replaced
    monkeypatch.setattr(validation.os, "access", lambda path, mode: Path(path) != tmp_path)
    folder = tmp_path / "new" / "folder"
    error = refusal(*KERNEL, output_dir=str(folder))
    assert isinstance(error, FileError) and f"{tmp_path} cannot be written" in str(error)


def test_checks_write_nothing(tmp_path: Path) -> None:
    check(*KERNEL, output_dir=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_log_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").mkdir()
    assert refusal(*KERNEL).data == {"path": "log"}


def test_a_word_that_transformers_makes_an_enum_is_shown_as_it_was_given() -> None:
    needed = ["--model_name_or_path", "m", "--task_name", "sst-2", "--data_dir", "d", "--output_dir", "nowhere/yet"]
    model, data, training = parse_arguments([*needed, *TRAIN, "--eval_strategy", "steps"])
    with pytest.raises(SettingError) as error:
        check_arguments(model, data, training.with_changes(do_eval=False))
    assert str(error.value).startswith("`eval_strategy=steps` ")
    assert repr(error.value.data["value"]) == "'steps'"


def test_load_kernels_needs_the_kernel_trainer_even_when_empty() -> None:
    assert refusal(*ZERO_SHOT, "--load_kernels", "").data == {"setting": "load_kernels", "value": ""}
