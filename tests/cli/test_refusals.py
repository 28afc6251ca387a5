"""What a user can get wrong on the command line: one sentence, exit status 2, and nothing lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import ROOT, Outcome, Workplace, snapshot, write_rows

NO_DICTIONARY = """--mapping is not a Python dictionary: terrible; write for example "{'0': 'word0', '1': 'word1'}\""""


@pytest.fixture(scope="module")
def refuse(place: Workplace) -> Callable[..., str]:
    """Call a command that must be refused in an output folder that holds results already; return the sentence."""
    folder = place.run()
    log = place.folder / "log"

    def call(*flags: str) -> str:
        before = snapshot(folder), log.read_bytes()
        sentence = refusal_of(place.call(place.argv(*flags)))
        assert (snapshot(folder), log.read_bytes()) == before
        return sentence

    return call


def refusal_of(outcome: Outcome) -> str:
    """The sentence of a refusal: all there is on stderr."""
    assert (outcome.status, outcome.out) == (2, "")
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def data_with(place: Workplace, folder: Path, name: str, *rows: tuple[str, ...]) -> list[str]:
    """The flag for a copy of the data in which one file holds other rows below its header."""
    shutil.copytree(place.data, folder, dirs_exist_ok=True)
    write_rows(folder / name, [("sentence", "label"), *rows])
    return ["--data_dir", str(folder)]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--task_name", "sst2"],
            "unknown task 'sst2': did you mean 'SST-2'? Available: SST-2, sst-5, mr, cr, mpqa, subj, trec, CoLA, MRPC, "
            "QQP, QNLI, RTE, MNLI, mnli-mm, SNLI, ag_news, STS-B, WNLI, custom",
        ),
        (
            ["--kernl_formula", "sgd"],
            "unknown flag --kernl_formula: did you mean --kernel_formula? run.py --help lists all flags",
        ),
        (
            ["--kernel_formula", "asymmetric_signgd"],
            "--kernel_formula asymmetric_signgd needs --binary_classification: add --binary_classification, or take "
            "another formula (sgd, signgd)",
        ),
        (
            ["--task_name", "trec", "--binary_classification"],
            "--binary_classification needs two classes, but trec has 6; leave it out",
        ),
        (
            ["--dry_run", "--no_train"],
            "--dry_run works with --trainer kernel only: add that, or leave out --no_train",
        ),
        (["--mapping", "terrible"], NO_DICTIONARY),
        (["--mapping", "__import__('os').abort()"], NO_DICTIONARY.replace("terrible", "__import__('os').abort()", 1)),
        (
            ["--mapping", "{0: 'terrible'}"],
            "--mapping has no word for label '1': {0: 'terrible'}; the labels are 0, 1",
        ),
        (
            ["--mapping", "{0: 'terrible', 1: 'cat'}"],
            "label word 'cat' (label 1) is 3 pieces for this model (Ġc a t): choose a word of one piece with --mapping",
        ),
        (
            ["--template", "*cls**sent_0*_It_was.*sep+*"],
            "--template has no *mask*, but the label word needs exactly one place, as in "
            "*cls**sent_0*_It_was*mask*.*sep+*; the template is '*cls**sent_0*_It_was.*sep+*'",
        ),
        (
            ["--template", "*cls**sent_0**mask**+sent_1**sep+*"],
            "--template uses +sent_1, but SST-2 has one sentence (sent_0); the template is "
            "'*cls**sent_0**mask**+sent_1**sep+*'",
        ),
        (
            ["--only_biases", "--exclude_head", "--exclude_embeddings", "--exclude_first_layers", "2"],
            "--exclude_embeddings --exclude_head --only_biases --exclude_first_layers together leave no parameter of "
            "this model; drop one of them",
        ),
        (["--exclude_first_layers", "3"], "--exclude_first_layers 3: the model has 2 layers"),
        (["--seed", "-1"], "--seed is -1, but it must be from 0 to 4294967295"),
        (
            ["--max_seq_length", "4096"],
            "--max_seq_length is 4096, but this model reads at most 298 tokens",
        ),
        (
            ["--template", "*cls*A*mask*.*sep+*"],
            "--template has no sentence, such as *sent_0*: all prompts would be the same; it is '*cls*A*mask*.*sep+*'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_work_are_refused(refuse: Callable[..., str], flags: list[str], sentence: str) -> None:
    assert refuse(*flags) == sentence


def test_a_missing_data_folder_is_answered_with_the_command_that_makes_it(
    refuse: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "k-shot-1k-test" / "SST-2" / "16-42"
    assert refuse("--data_dir", str(folder)) == (
        f"there is no folder {folder}: make it with `python tools/generate_k_shot_data.py --mode k-shot-1k-test "
        f"--k 16 --seed 42 --task SST-2 --data_dir {tmp_path}/original --output_dir {tmp_path}`"
    )


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_missing_split_file_is_answered_with_the_command_that_makes_it(
    place: Workplace, refuse: Callable[..., str], tmp_path: Path, split: str
) -> None:
    folder = tmp_path / "k-shot" / "SST-2" / "16-13"
    shutil.copytree(place.data, folder)
    (folder / f"{split}.tsv").unlink()
    sentence = refuse("--data_dir", str(folder))
    assert sentence.startswith(
        f"{folder / split}.tsv is missing: make it with `python tools/generate_k_shot_data.py --mode k-shot --k 16 "
        "--seed 13 --task SST-2 "
    )


def test_a_row_with_too_few_columns_is_named_by_file_and_line(
    place: Workplace, refuse: Callable[..., str], tmp_path: Path
) -> None:
    flags = data_with(place, tmp_path, "test.tsv", ("a film", "0"), ("no label here",))
    assert refuse(*flags) == (
        f"{tmp_path}/test.tsv line 3 has 1 column, but a row of SST-2 has at least 2: correct or remove the line"
    )


def test_a_label_outside_the_mapping_is_named_by_file_and_line(
    place: Workplace, refuse: Callable[..., str], tmp_path: Path
) -> None:
    flags = data_with(place, tmp_path, "dev.tsv", ("a film", "0"), ("a story", "2"))
    assert refuse(*flags) == f"{tmp_path}/dev.tsv line 3: label '2' is not among the labels of SST-2, 0, 1"


def test_a_mask_that_is_cut_away_shows_the_example_and_names_the_limit(
    place: Workplace, refuse: Callable[..., str], tmp_path: Path
) -> None:
    flags = data_with(place, tmp_path, "train.tsv", ("funny", "0"), ("the film was not bright and not dull", "1"))
    # <s>, eight tokens of the sentence, It, was, <mask>, ., </s>: position 11 is the twelfth
    assert refuse(*flags, "--max_seq_length", "11", "--first_sent_limit", "8") == (
        "the mask of example 2 of train was cut away, its prompt has 14 tokens: raise --max_seq_length (now 11), or "
        "lower --first_sent_limit (now 8); its text is 'the film was not bright and not dull'"
    )


def test_a_model_folder_without_weights_is_named(place: Workplace, refuse: Callable[..., str], tmp_path: Path) -> None:
    folder = shutil.copytree(place.model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    sentence = refuse("--model_name_or_path", str(folder))
    assert sentence.startswith(
        f"--model_name_or_path: the folder '{folder}' holds no weights that can be loaded (Error no file named "
    )


def test_a_folder_that_is_no_model_is_named(place: Workplace, refuse: Callable[..., str]) -> None:
    sentence = refuse("--model_name_or_path", str(place.data))
    assert sentence.startswith(f"--model_name_or_path: the folder '{place.data}' holds no model that can be loaded (")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_model_file_is_one_sentence(
    place: Workplace, refuse: Callable[..., str], tmp_path: Path, name: str
) -> None:
    shutil.copytree(place.model, tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_bytes(b"not what it was")
    sentence = refuse("--model_name_or_path", str(tmp_path / "damaged"))
    assert sentence.startswith(f"--model_name_or_path: the folder '{tmp_path}/damaged' holds no ")


def test_a_model_without_tokenizer_files_is_named(place: Workplace, refuse: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place.model / name, folder)
    assert "tokenizer" in refuse("--model_name_or_path", str(folder))


def test_an_output_folder_in_the_way_of_a_file_is_refused(place: Workplace, refuse: Callable[..., str]) -> None:
    folder = place.data / "train.tsv" / "16-42"
    assert refuse("--output_dir", str(folder)) == (
        f"--output_dir {folder}: {place.data}/train.tsv is a file, not a folder; choose another place"
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root can write")
def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    refuse: Callable[..., str],
) -> None:
    sentence = refuse("--output_dir", "/proc/lmntk")
    assert sentence.startswith("--output_dir /proc/lmntk cannot be written (")
    assert sentence.endswith("): choose another folder, or free the path")


def test_loading_from_a_folder_without_kernels_is_refused(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert refuse("--load_kernels", str(tmp_path)) == (
        f"{tmp_path}/train_kernels_sst-2.pt does not exist: compute the kernel first, or give the folder that holds "
        "it (--load_kernels)"
    )


@pytest.mark.slow
def test_the_program_itself_prints_one_sentence_and_ends_with_status_2(place: Workplace) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    flags = place.argv("--exclude_first_layers", "9", output="refused")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *flags],
        cwd=place.folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wanted = "error: --exclude_first_layers 9: the model has 2 layers\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)
