import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import ROOT
from lmntk.config import arguments, run_help
from lmntk.config.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from lmntk.config.kernel_steps import KernelSteps
from lmntk.errors import UsageError

# The frozen command line: scripts and papers carry these names. None may vanish, and no default may change.
MODEL_FLAGS = {
    "model_name_or_path": "REQUIRED",
    "config_name": None,
    "tokenizer_name": None,
    "cache_dir": None,
    "few_shot_type": "prompt-demo",
    "segments": True,
    "random_segment": False,
    "l2_loss": False,
    "use_task_word": False,
    "apply_lora": False,
    "lora_r": None,
    "lora_alpha": None,
    "model_family": None,
    "gguf_file": None,
}
DATA_FLAGS = {
    "task_name": "REQUIRED",
    "data_dir": "REQUIRED",
    "custom_columns": None,
    "max_seq_length": None,
    "overwrite_cache": False,
    "num_k": 16,
    "num_sample": None,
    "num_demo": 1,
    "auto_demo": True,
    "template": None,
    "mapping": None,
    "template_path": None,
    "template_id": None,
    "mapping_path": None,
    "mapping_id": None,
    "prompt_path": None,
    "prompt_id": None,
    "top_n_template": None,
    "tag": "",
    "demo_filter": False,
    "demo_filter_rate": 0.5,
    "demo_filter_model": None,
    "debug_mode": False,
    "double_demo": False,
    "first_sent_limit": None,
    "other_sent_limit": None,
    "task_defaults": True,
    "truncate_demonstrations_only": False,
    "use_full_length": False,
    "gpt3_in_context_head": False,
    "gpt3_in_context_tail": False,
    "gpt3_in_context_num": 32,
    "truncate_head": False,
}
TRAINING_FLAGS = {
    "trainer": "standard",
    "evaluate_during_training": False,
    "array_id": -1,
    "model_id": -1,
    "save_logit": False,
    "save_logit_dir": None,
    "save_logit_pairs": False,
    "fix_layers": 0,
    "save_at_last": False,
    "no_train": False,
    "no_predict": False,
    "optimizer": "adam",
    "optimizer_variant": "",
    "from_linearhead": False,
    "as_published": False,
    "linear_head_halved": False,
    "linear_head_order": "file",
    "plain_lbfgs": False,
    "flattened_targets": False,
    "clip_frozen": False,
    "decay_head_norm": False,
    "warmup_ratio": 0.0,
    "logging_dir": None,
    "adafactor": False,
    "group_by_length": False,
    "fp16_opt_level": None,
    "fp16_backend": None,
    "tpu_num_cores": None,
    "tpu_metrics_debug": None,
    "past_index": None,
    "sharded_ddp": None,
    "random_model_init": False,
    "sweep": False,
    "kernel_formula": "sgd",
    "kernel_solver": "lstsq",
    "lstsq_method": "auto",
    "cg_tolerance": 1e-8,
    "load_kernels": None,
    "overwrite_kernels": False,
    "exclude_embeddings": False,
    "exclude_head": False,
    "only_biases": False,
    "kernel_regularization": 0.0,
    "kernel_gamma": 1.0,
    "kernel_lambda": 0.5,
    "select_by": "dev",
    "binary_classification": False,
    "adjust_for_init": False,
    "f0_scaling": 1.0,
    "kernel_engine": "auto",
    "projection_width": None,
    "projection_seed": 0,
    "projection_check": 32,
    "projection_tolerance": None,
    "kernel_dtype": "float32",
    "kernel_memory_gb": None,
    "kernel_per_layer": False,
    "kernel_parts": None,
    "kernel_lora_rank": None,
    "kernel_lora_targets": None,
    "kernel_influence": False,
    "kernel_variance": False,
    "exclude_first_layers": 0,
    "fine_tuned_model": None,
    "kernel_steps": None,
    "dry_run": False,
    "overwrite_output_dir": False,
    "output_dir": "REQUIRED",
    # transformers' own, which run_fewshot.sh and published command lines use
    "do_train": False,
    "do_eval": False,
    "do_predict": False,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5e-5,
    "max_steps": -1,
    "num_train_epochs": 3.0,
    "logging_steps": 500,
    "eval_steps": None,
    "seed": 42,
    "use_cpu": False,
    "local_rank": -1,
    "report_to": "none",
}
CHOICES = {
    "few_shot_type": ("finetune", "prompt", "prompt-demo"),
    "model_family": ("masked", "causal"),
    "trainer": ("standard", "kernel", "linearhead"),
    "optimizer": ("adam", "sgd"),
    "optimizer_variant": ("", "signgd"),
    "kernel_formula": ("sgd", "signgd", "asymmetric_signgd"),
    "kernel_solver": ("lstsq", "logistic", "svr", "svc", "asym"),
    "kernel_engine": ("auto", "factored", "jacobian", "jvp"),
    "kernel_dtype": ("float32", "float64"),
}
NEEDED = ["--model_name_or_path", "m", "--task_name", "sst-2", "--data_dir", "d", "--output_dir", "o"]


def parse(*extra: str) -> Any:
    """The three dataclasses' values as attributes of one object."""
    groups = parse_arguments([*NEEDED, *extra])
    return SimpleNamespace(**{f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)})


@pytest.mark.parametrize(
    ("group", "frozen"),
    [(ModelArguments, MODEL_FLAGS), (DataArguments, DATA_FLAGS), (TrainingArguments, TRAINING_FLAGS)],
)
def test_the_command_line_is_frozen(group: type, frozen: dict[str, Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(group)}
    defaults = {
        name: "REQUIRED" if fields[name].default is dataclasses.MISSING else fields[name].default
        for name in frozen
        if name in fields
    }
    assert defaults == frozen


def test_every_flag_of_ours_has_a_help_text_and_none_is_missing_from_the_frozen_list() -> None:
    ours = [
        *dataclasses.fields(ModelArguments),
        *dataclasses.fields(DataArguments),
        *dataclasses.fields(arguments.KernelArguments),
        *dataclasses.fields(arguments.RunArguments),
    ]
    assert [field.name for field in ours if len(field.metadata.get("help", "")) < 8] == []
    assert {field.name for field in ours} <= MODEL_FLAGS.keys() | DATA_FLAGS.keys() | TRAINING_FLAGS.keys()


@pytest.mark.parametrize(("flag", "choices"), CHOICES.items())
def test_every_frozen_choice_is_accepted_and_no_other(flag: str, choices: tuple[str, ...]) -> None:
    for choice in choices:
        assert getattr(parse(f"--{flag}", choice), flag) == choice
    with pytest.raises(UsageError, match=f"^--{flag}: invalid choice: 'other'"):
        parse(f"--{flag}", "other")


def test_general_defaults_are_those_of_lm_bff() -> None:
    assert (arguments.GENERAL_MAX_SEQ_LENGTH, arguments.GENERAL_NUM_SAMPLE) == (128, 16)


def test_nothing_is_reported_to_a_service_unless_asked() -> None:
    assert parse().report_to == []


def test_a_beginning_of_a_flag_is_enough() -> None:
    assert parse("--max_seq_len", "256").max_seq_length == 256
    assert parse("--max_seq_len=256").max_seq_length == 256
    assert parse("--learn", "0.1").learning_rate == 0.1


def test_of_a_flag_given_twice_the_last_counts_under_any_spelling() -> None:
    flags = parse(
        "--data_dir", "x", "--data_d=y", "--per_gpu_train_batch_size", "2", "--per_device_train_batch_size", "4"
    )
    assert (flags.data_dir, flags.per_device_train_batch_size, flags.train_tile) == ("y", 4, 4)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (["--do_train"], True),
        (["--do_train", "True"], True),
        (["--do_train=true"], True),
        (["--do_train", "False"], False),
    ],
)
def test_a_switch_is_given_alone_or_with_true_or_false(written: list[str], value: bool) -> None:
    assert parse(*written).do_train is value


def test_a_switch_that_is_on_by_default_has_a_no_form() -> None:
    assert parse("--no_auto_demo").auto_demo is False


def test_old_spellings_set_todays_flags() -> None:
    flags = parse(
        "--no_cuda", "--overwrite_output_dir", "--evaluation_strategy", "epoch", "--per_gpu_eval_batch_size=3"
    )
    assert flags.use_cpu is True
    assert flags.overwrite_output_dir is True
    assert flags.eval_strategy == "epoch"
    assert flags.x_tile == 3


def test_tile_sizes_are_those_the_user_gave_and_none_else() -> None:
    assert (parse().train_tile, parse().x_tile) == (None, None)
    flags = parse("--per_device_train_batch_size", "8", "--per_device_eval", "4")
    assert (flags.train_tile, flags.x_tile) == (8, 4)


def test_no_train_and_no_predict_win_over_the_do_flags() -> None:
    flags = parse("--do_train", "--do_eval", "--do_predict", "--no_train", "--no_predict")
    assert (flags.do_train, flags.do_eval, flags.do_predict) == (False, True, False)


def test_values_with_spaces_stars_and_braces_arrive_as_they_are() -> None:
    flags = parse("--template", "*cls* a *mask*", "--mapping", "{'0': 'no', '1': 'yes'}", "--tag", "")
    assert (flags.template, flags.mapping, flags.tag) == ("*cls* a *mask*", "{'0': 'no', '1': 'yes'}", "")


def test_negative_numbers_are_values() -> None:
    assert parse("--array_id", "-3", "--f0_scaling", "-0.5").array_id == -3


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            [*NEEDED, "--num_kk", "3"],
            "unknown flag --num_kk: did you mean --num_k? run.py --help lists all flags",
        ),
        ([*NEEDED, "--num_k", "many"], "--num_k: invalid int value: 'many'"),
        ([*NEEDED, "--num_k"], "--num_k: expected one argument"),
        (
            [*NEEDED, "--kernel_e", "jvp", "--gpt3_in_context_", "3"],
            "--gpt3_in_context_ could be --gpt3_in_context_head, --gpt3_in_context_num or --gpt3_in_context_tail: "
            "write the flag out",
        ),
        (
            [*NEEDED, "--tag", "two", "words"],
            "'words' belongs to no flag: a value follows its --flag, and one with spaces needs quotes",
        ),
        (NEEDED[:-2], "--output_dir must be given; run.py --help explains every flag"),
        (NEEDED[2:], "--model_name_or_path must be given; run.py --help explains every flag"),
        (
            [],
            "--model_name_or_path, --task_name, --data_dir, --output_dir must be given; run.py --help explains every "
            "flag",
        ),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_flag(argv: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_arguments(argv)
    assert str(error.value) == sentence


def test_an_objection_of_transformers_is_one_line() -> None:
    with pytest.raises(UsageError, match="^--load_best_model_at_end requires .* Evaluation strategy") as error:
        parse("--load_best_model_at_end", "--save_strategy", "epoch")
    assert "\n" not in str(error.value)


def test_a_switch_with_a_value_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(UsageError, match="^--do_train: .*perhaps"):
        parse("--do_train", "perhaps")


def test_help_shows_the_flags_grouped_by_purpose_with_what_the_tables_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    titles = ["\nModel:", "\nData and prompts:", "\nKernels:", "\nTraining and evaluation:", "\nThe flags of transf"]
    assert [shown.count(title) for title in titles] == [1] * 5
    assert sorted(titles, key=shown.index) == titles
    kernels = shown[shown.index("\nKernels:") : shown.index("\nTraining and evaluation:")]
    assert "--kernel_solver {lstsq,logistic,svr,svc,asym}" in kernels
    assert "--learning_rate" not in kernels
    assert "ag_news" in shown


@pytest.mark.parametrize("width", ["80", "132"])
def test_the_stored_help_is_that_of_the_parser(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert run_help.stored_help() == arguments.make_parser().format_help()


def test_another_transformers_has_no_stored_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_help, "version", lambda _: "0.0")
    assert run_help.stored_help() is None


def write_config(folder: Path, config: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


CONFIG = {"model_name_or_path": "m", "task_name": "sst-2", "data_dir": "d", "output_dir": "o"}


def test_a_json_file_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    config = {
        **CONFIG, "num_k": 32, "kernel_lambda": 0.25, "do_train": True, "auto_demo": False, "template": None,
        "mapping": {"0": "schlecht", "1": "schön"}, "label_names": ["a", "b"], "tag": "-x",
        "per_device_eval_batch_size": 4,
    }  # fmt: skip
    _, data, training = parse_arguments([write_config(tmp_path, config)])
    assert (data.num_k, data.auto_demo, data.template, data.tag) == (32, False, None, "-x")
    assert json.loads(data.mapping or "") == config["mapping"]
    assert (training.kernel_lambda, training.do_train, training.label_names) == (0.25, True, ["a", "b"])
    assert (training.train_tile, training.x_tile) == (None, 4)


def test_json_keys_may_be_old_spellings(tmp_path: Path) -> None:
    _, _, training = parse_arguments(
        [write_config(tmp_path, {**CONFIG, "no_cuda": True, "per_gpu_train_batch_size": 2})]
    )
    assert (training.use_cpu, training.train_tile) == (True, 2)


def test_flags_after_the_json_file_override_it(tmp_path: Path) -> None:
    _, data, _ = parse_arguments([write_config(tmp_path, {**CONFIG, "num_k": 32}), "--num_k", "64"])
    assert data.num_k == 64


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {**CONFIG, "kernel_solvr": "svc"},
            "{path}: unknown flag --kernel_solvr: did you mean --kernel_solver? run.py --help lists all flags",
        ),
        ([1], '{path} must hold one JSON object, {{"flag": value, …}}'),
        ({**CONFIG, "num_k": "many"}, "--num_k: invalid int value: 'many'"),
        ({**CONFIG, "kernel_solver": "magic"}, "--kernel_solver: invalid choice: 'magic'"),
    ],
)
def test_a_mistake_in_a_json_file_is_one_sentence(tmp_path: Path, config: Any, sentence: str) -> None:
    path = write_config(tmp_path, config)
    with pytest.raises(UsageError) as error:
        parse_arguments([path])
    assert str(error.value).startswith(sentence.format(path=path))


def test_a_json_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the configuration file nowhere.json: No such file"):
        parse_arguments(["nowhere.json"])
    broken = tmp_path / "broken.json"
    broken.write_text('{"num_k": 16,}')
    with pytest.raises(UsageError, match="broken.json is not valid JSON: .*line 1"):
        parse_arguments([str(broken)])


def test_the_help_waits_for_no_package(tmp_path: Path) -> None:
    for package in ("peft", "torch", "transformers", "numpy"):
        (tmp_path / f"{package}.py").write_text(f"raise SystemExit('{package} was imported')", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "run.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--kernel_formula" in done.stdout


def test_a_configuration_file_may_hold_the_steps_of_snapshots_as_a_list(tmp_path: Path) -> None:
    training = parse_arguments([write_config(tmp_path, CONFIG | {"kernel_steps": [0, 2, "last"]})])[2]
    assert training.kernel_steps == "0,2,last"
    assert training.snapshot_steps == KernelSteps(frozenset({0, 2}), last=True)
