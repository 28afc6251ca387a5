"""The command line of tools/generate_k_shot_data.py, run as users run it."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate_k_shot_data.py"
DOWNLOAD = (
    "bash data/download_dataset.sh fetches the originals where there is a network; --data_dir says where they are"
)


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture
def project(tmp_path):
    """A working directory with the originals of mr and CoLA below data/original."""
    mr = tmp_path / "data" / "original" / "mr"
    mr.mkdir(parents=True)
    (mr / "train.csv").write_text("".join(f"{number % 2},review {number}\n" for number in range(40)))
    (mr / "test.csv").write_text("".join(f"{number % 2},test {number}\n" for number in range(1002)))
    cola = tmp_path / "data" / "original" / "CoLA"
    cola.mkdir()
    for name, rows in (("train", 40), ("dev", 10)):
        (cola / f"{name}.tsv").write_text("".join(f"x\t{number % 2}\t\tLine {number}.\n" for number in range(rows)))
    return tmp_path


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_writes_three_files_a_seed_and_says_where(project):
    done = run("--mode", "k-shot-1k-test", "--k", "2", "--task", "mr", "--seed", "13", "42", cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "data/k-shot-1k-test/mr/2-13\n"
        "data/k-shot-1k-test/mr/2-42\n"
        "2 splits of 2 training examples a label are in data/k-shot-1k-test\n"
    )
    made = files(project / "data" / "k-shot-1k-test")
    assert sorted(made) == [f"mr/2-{seed}/{name}.csv" for seed in (13, 42) for name in ("dev", "test", "train")]
    assert [len(made[f"mr/2-13/{name}.csv"].splitlines()) for name in ("train", "dev", "test")] == [4, 4, 1000]


def test_without_flags_it_draws_16_shots_of_the_published_seeds_from_what_is_there(project):
    done = run(cwd=project)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == (
        "note: data/original has no folders of SST-2, sst-5, cr, mpqa, subj, trec, MRPC, QQP, STS-B, MNLI, SNLI, QNLI, "
        "RTE: left out"
    )
    folders = [f"{task}/16-{seed}" for task in ("mr", "CoLA") for seed in (100, 13, 21, 42, 87)]
    assert done.stdout.splitlines()[:-1] == [f"data/k-shot/{folder}" for folder in folders]
    assert "warning: mr: label 0 has 20 training rows where 32 are wanted (16 for train, 16 for dev)" in done.stderr


def test_the_same_command_writes_the_same_bytes(project):
    command = ["--k", "3", "--task", "mr", "CoLA"]
    run(*command, cwd=project)
    first = files(project / "data" / "k-shot")
    run(*command, cwd=project)
    assert files(project / "data" / "k-shot") == first
    assert len(first) == 30


def test_originals_and_splits_may_be_anywhere(project, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(
        *("--task", "MR", "--k", "2", "--seed", "7", "--data_dir", project / "data" / "original"),
        *("--output_dir", "demo data", "--mode", "k-shot-10x"),
        cwd=elsewhere,
    )
    assert done.returncode == 0
    assert sorted(files(elsewhere)) == [f"demo data/k-shot-10x/mr/2-7/{name}.csv" for name in ("dev", "test", "train")]


def test_a_task_named_twice_is_drawn_once(project):
    assert run("--task", "mr", "mr", "--seed", "1", "--k", "2", cwd=project).stdout.count("data/k-shot/mr/2-1\n") == 1


@pytest.mark.parametrize(("seeds", "noted"), [(["100", "13"], False), (["42"], True)])
def test_colas_dependence_on_the_list_of_seeds_is_noted(project, seeds, noted):
    done = run("--task", "CoLA", "--k", "2", "--seed", *seeds, cwd=project)
    note = "note: the draws of CoLA build on those of the seeds before; published splits need --seed 100 13 21 42 87\n"
    assert done.stderr == (note if noted else "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst2"], "unknown task 'sst2': did you mean 'SST-2'? Available: SST-2, sst-5, mr, "),
        (["--task", "RTE"], f"data/original/RTE is missing: {DOWNLOAD}\n"),
        (["--data_dir", "none"], f"none holds none of the usual tasks: {DOWNLOAD}\n"),
        (["--modes", "k-shot", "--sed", "3"], "unknown flag '--modes': did you mean '--mode'? Available: --help, "),
        (["--k", "0"], "--k 0: a split needs at least one training example of each label\n"),
        (["--k", "many"], "argument --k: invalid int value: 'many'; see --help\n"),
        (["--seed", "-1"], "--seed -1: seeds run from 0 to 4294967295\n"),
        (["--mode", "k-shto"], "argument --mode: invalid choice: 'k-shto'"),
        (["--task"], "argument --task: expected at least one argument; see --help\n"),
        (["--task", "mr", "--k", "2", "--output_dir", "data/original/mr/test.csv"], "cannot write data/original/mr/te"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(project, arguments, message):
    before = files(project)
    done = run(*arguments, cwd=project)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert files(project) == before


def test_a_folder_that_lacks_a_file_is_an_error_even_for_the_default_tasks(project):
    (project / "data" / "original" / "mr" / "test.csv").unlink()
    done = run(cwd=project)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: data/original/mr/test.csv is missing: {DOWNLOAD}"
    assert not (project / "data" / "k-shot").exists()


def test_a_bad_row_names_file_and_line(project):
    path = project / "data" / "original" / "mr" / "train.csv"
    path.write_text(path.read_text() + "2,neither\n")
    done = run("--task", "mr", cwd=project)
    assert done.returncode == 2
    assert done.stderr == ("error: data/original/mr/train.csv line 41: label '2' is not among the labels of mr, 0, 1\n")


def test_help_lists_modes_tasks_and_defaults(project):
    done = run("--help", cwd=project)
    assert done.returncode == 0
    words = done.stdout.split()
    for word in ("{k-shot,k-shot-10x,k-shot-1k-test}", "mnli-mm,", "(default:", "16)", "data/original)"):
        assert word in words
