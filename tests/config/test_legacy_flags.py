import pytest

from lmntk.config.arguments import flag_names
from lmntk.config.legacy_flags import OLD_SPELLINGS, YOUNGER, full_name, translate
from lmntk.errors import UsageError

FLAGS = {
    "do_train", "eval_strategy", "evaluate_during_training", "help", "max_seq_length", "max_steps", "no_train", "num_k",
    "overwrite_cache", "overwrite_output_dir", "per_device_eval_batch_size", "per_device_train_batch_size", "template",
    "use_cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "today"),
    [
        (["--no_cuda"], ["--use_cpu"]),
        (["--no_cuda", "False"], ["--use_cpu", "False"]),
        (["--no_cuda=True"], ["--use_cpu=True"]),
        (["--evaluation_strategy", "steps"], ["--eval_strategy", "steps"]),
        (["--evaluation_strategy=steps"], ["--eval_strategy=steps"]),
        (["--per_gpu_train_batch_size", "2"], ["--per_device_train_batch_size", "2"]),
        (["--per_gpu_eval_batch_size=4"], ["--per_device_eval_batch_size=4"]),
    ],
)
def test_an_old_spelling_becomes_todays_name_with_its_value(old: list[str], today: list[str]) -> None:
    assert translate(old, FLAGS) == today


@pytest.mark.parametrize(
    ("short", "today"),
    [
        (["--no_c"], ["--use_cpu"]),
        (["--evaluation", "no"], ["--eval_strategy", "no"]),
        (["--per_gpu_t=2"], ["--per_device_train_batch_size=2"]),
        (["--max_seq_len", "256"], ["--max_seq_length", "256"]),
        (["--max_seq_len=256"], ["--max_seq_length=256"]),
        (["--max-seq-len", "256"], ["--max_seq_length", "256"]),
        (["--overwrite_out"], ["--overwrite_output_dir"]),
    ],
)
def test_an_unambiguous_beginning_is_written_out(short: list[str], today: list[str]) -> None:
    assert translate(short, FLAGS) == today


@pytest.mark.parametrize(
    ("beginning", "flag"),
    [
        ("task", "task_name"),
        ("trunc", "truncate_head"),
        ("se", "seed"),
        ("warmup", "warmup_steps"),
        ("fp16_", "fp16_full_eval"),
        ("save_logit_", "save_logit_dir"),
        ("no_t", "no_train"),
        ("group", "group_by_length"),
        ("kernel_s", "kernel_solver"),
    ],
)
def test_flags_that_were_added_later_take_no_beginning_from_another(beginning: str, flag: str) -> None:
    assert full_name(beginning, flag_names()) == flag


def test_every_beginning_that_was_unique_before_these_flags_means_the_same_flag() -> None:
    flags = set(flag_names())
    before = flags - YOUNGER
    assert before < flags
    changed = {}
    for flag in before:
        for length in range(1, len(flag)):
            beginning = flag[:length]
            try:
                meant = full_name(beginning, before)
            except UsageError:
                continue
            if (now := full_name(beginning, flags)) != meant:
                changed[beginning] = now
    assert not {beginning for beginning, now in changed.items() if beginning != now}


def test_old_and_todays_spelling_of_one_flag_do_not_make_a_beginning_ambiguous() -> None:
    # "eval" begins both eval_strategy and evaluation_strategy
    assert full_name("eval", {"eval_strategy", "num_k"}) == "eval_strategy"


def test_an_ambiguous_beginning_names_the_flags_it_could_be() -> None:
    with pytest.raises(UsageError) as error:
        translate(["--max_s", "256"], FLAGS)
    assert str(error.value) == "--max_s could be --max_seq_length or --max_steps: write the flag out"


def test_an_old_spelling_counts_when_a_beginning_is_ambiguous() -> None:
    with pytest.raises(UsageError, match="--no_ could be --no_train or --use_cpu"):
        translate(["--no_"], FLAGS)


def test_a_very_short_beginning_does_not_list_everything() -> None:
    with pytest.raises(UsageError) as error:
        full_name("f", {f"f{letter}" for letter in "abcdefgh"})
    assert str(error.value) == "--f could be --fa, --fb, --fc, --fd, --fe, --ff or 2 others: write the flag out"


def test_an_unknown_flag_says_what_was_probably_meant() -> None:
    with pytest.raises(UsageError) as error:
        translate(["--num_kk", "16"], FLAGS)
    assert str(error.value) == "unknown flag --num_kk: did you mean --num_k? run.py --help lists all flags"


def test_an_unknown_flag_like_no_other_points_to_the_help() -> None:
    with pytest.raises(UsageError) as error:
        translate(["--xyzzy=1"], FLAGS)
    assert str(error.value) == "unknown flag --xyzzy: run.py --help lists all flags"


def test_values_pass_untouched_even_when_they_look_like_old_spellings() -> None:
    argv = ["--template", "no_cuda", "-1", "--template=--no_cuda", "--", "-h", "--no cuda"]
    assert translate(argv, FLAGS) == argv


def test_a_full_name_that_begins_another_flags_name_stands_for_itself() -> None:
    assert full_name("template", {"template", "template_path"}) == "template"


def test_every_old_spelling_leads_to_a_flag_that_exists() -> None:
    assert set(OLD_SPELLINGS.values()) <= FLAGS
