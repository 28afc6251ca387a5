"""run_fewshot.sh with a stand-in for python that prints the command line it was given."""

import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmntk.config.arguments import parse_arguments

SCRIPT = Path(__file__).resolve().parents[2] / "run_fewshot.sh"
PYTHON = """#!/bin/sh
printf '%s\\0' "$0" "$PWD" "${OMP_NUM_THREADS-}" "$@" > "$CALL"
exit "${STATUS:-0}"
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Checkout:
    """A copy of the script alone in a repository whose path has a space, and a caller's directory elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.root = (folder / "my repository").resolve()
        self.elsewhere = (folder / "some where").resolve()
        self.bin = folder / "bin"
        self.call = folder / "call"
        self.elsewhere.mkdir()
        self.root.mkdir()
        shutil.copy(SCRIPT, self.root)
        for name in ("python", "python3"):
            executable(self.bin / name, PYTHON)
        self.set_gpus(1)
        self.set_cores(8)

    def set_gpus(self, count: int) -> None:
        lines = "".join(f"echo 'GPU {n}: some card'\n" for n in range(count)) or "echo 'no driver' >&2\nexit 9\n"
        executable(self.bin / "nvidia-smi", f"#!/bin/sh\n{lines}")

    def set_cores(self, count: int) -> None:
        executable(self.bin / "nproc", f"#!/bin/sh\necho {count}\n")

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> SimpleNamespace:
        """Call the script; the answer has what python was called with, status and stderr."""
        self.call.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(self.root / "run_fewshot.sh"), *arguments],
            cwd=cwd or self.root,
            env={"PATH": f"{self.bin}:{os.defpath}:/usr/bin:/bin", "CALL": str(self.call), **variables},
            capture_output=True,
            text=True,
            errors="backslashreplace",
            check=False,
        )
        call = self.call.read_text().split("\0")[:-1] if self.call.exists() else ["", "", ""]
        python, directory, threads, *argv = call
        return SimpleNamespace(
            python=python, cwd=directory, threads=threads, argv=argv, status=done.returncode, stderr=done.stderr
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def flags(
    checkout: Checkout, base: str = "", name: str = "SST-2-roberta-base-prompt-standard-", model: str = "roberta-base",
    task: str = "sst-2", folder: str = "SST-2", split: str = "16-13", type: str = "prompt", trainer: str = "standard",
    tag: str = "",
) -> list[str]:  # fmt: skip
    """The command line from run.py on, as the defaults give it."""
    k, seed = split.split("-")
    return [
        f"{checkout.root}/run.py", "--model_name_or_path", model, "--few_shot_type", type, "--task_name", task,
        "--data_dir", f"{base}data/k-shot-1k-test/{folder}/{split}", "--output_dir", f"{base}result/{name}/{split}",
        "--overwrite_output_dir", "--do_train", "--do_eval", "--do_predict", "--num_k", k, "--tag", tag, "--seed", seed,
        "--trainer", trainer,
    ]  # fmt: skip


def test_the_defaults_make_the_published_command_line(checkout: Checkout) -> None:
    call = checkout.run()
    assert call.status == 0
    assert call.argv == flags(checkout)


def test_every_variable_has_its_place_and_further_arguments_come_last(checkout: Checkout) -> None:
    call = checkout.run(
        "--kernel_formula", "signgd", "--template", "*cls* a *mask*",
        TASK="trec", SEED="42", K="64", MODEL="org/some model", TYPE="finetune", TRAINER="kernel", TAG="a b",
        GRID_TAG="-lr1", LOAD_KERNELS_TAG="old tag",
    )  # fmt: skip
    name = "trec-org_some model-finetune-kernel-a b-lr1"
    expected = flags(checkout, "", name, "org/some model", "trec", "trec", "64-42", "finetune", "kernel", "a b")
    assert call.argv == [
        *expected, "--load_kernels", "result/trec-org_some model-finetune-kernel-old tag/64-42",
        "--kernel_formula", "signgd", "--template", "*cls* a *mask*",
    ]  # fmt: skip


def test_from_another_directory_data_and_results_are_the_repositorys(checkout: Checkout) -> None:
    call = checkout.run("--template_path", "mine.txt", cwd=checkout.elsewhere, LOAD_KERNELS_TAG="x")
    base = f"{checkout.root}/"
    loaded = f"{base}result/SST-2-roberta-base-prompt-standard-x/16-13"
    assert call.argv == [*flags(checkout, base), "--load_kernels", loaded, "--template_path", "mine.txt"]


def test_paths_of_the_caller_stay_the_callers_because_the_directory_is_not_changed(checkout: Checkout) -> None:
    (checkout.elsewhere / "models" / "tiny").mkdir(parents=True)
    (checkout.root / "models" / "tiny").mkdir(parents=True)
    call = checkout.run(cwd=checkout.elsewhere, MODEL="models/tiny")
    assert call.cwd == str(checkout.elsewhere)
    assert call.argv[2] == "models/tiny"


def test_a_model_folder_that_only_the_repository_has_is_found_there(checkout: Checkout) -> None:
    (checkout.root / "models" / "tiny").mkdir(parents=True)
    call = checkout.run(cwd=checkout.elsewhere, MODEL="models/tiny")
    assert call.argv[2] == f"{checkout.root}/models/tiny"
    assert f"{checkout.root}/result/SST-2-models_tiny-prompt-standard-/16-13" in call.argv


def test_an_absolute_model_folder_passes_and_becomes_one_folder_name(checkout: Checkout) -> None:
    model = checkout.elsewhere / "model"
    model.mkdir()
    call = checkout.run(MODEL=str(model))
    assert call.argv[2] == str(model)
    assert f"result/SST-2-{str(model).replace('/', '_')}-prompt-standard-/16-13" in call.argv


def test_a_slash_behind_a_model_folder_makes_no_other_result_folder(checkout: Checkout) -> None:
    assert checkout.run(MODEL="models/tiny//").argv == checkout.run(MODEL="models/tiny").argv


def test_mnli_mm_reads_the_folder_of_mnli(checkout: Checkout) -> None:
    call = checkout.run(TASK="mnli-mm")
    assert call.argv == flags(checkout, name="mnli-mm-roberta-base-prompt-standard-", task="mnli-mm", folder="MNLI")


def test_further_arguments_override_the_scripts_own(checkout: Checkout) -> None:
    call = checkout.run(
        "--data_dir", "my data", "--few_shot_type=finetune", "--seed", "7", "--max_seq_len", "64", TAG="t"
    )
    model, data, training = parse_arguments(call.argv[1:])
    assert (data.data_dir, model.few_shot_type, training.seed, data.max_seq_length) == ("my data", "finetune", 7, 64)
    assert (data.tag, data.task_name, training.overwrite_output_dir) == ("t", "sst-2", True)


def test_no_gpu_wanted_means_the_cpu(checkout: Checkout) -> None:
    checkout.set_gpus(2)
    call = checkout.run("--dry_run", NUM_GPU="0")
    assert call.argv == [*flags(checkout), "--use_cpu", "--dry_run"]
    assert (call.stderr, call.threads) == ("", "")


def test_one_gpu_is_plain_python(checkout: Checkout) -> None:
    checkout.set_gpus(1)
    call = checkout.run(NUM_GPU="1")
    assert call.argv == flags(checkout)
    assert (call.stderr, call.threads) == ("", "")


def test_one_gpu_where_there_is_none_means_the_cpu_and_says_so(checkout: Checkout) -> None:
    checkout.set_gpus(0)
    call = checkout.run(NUM_GPU="1")
    assert call.argv == [*flags(checkout), "--use_cpu"]
    assert (call.stderr, call.threads) == ("run_fewshot.sh: no GPU found: running on the CPU\n", "")


def test_gpus_hidden_from_the_process_do_not_count(checkout: Checkout) -> None:
    checkout.set_gpus(2)
    assert "no GPU found" in checkout.run(CUDA_VISIBLE_DEVICES="").stderr
    assert "no GPU found" in checkout.run(CUDA_VISIBLE_DEVICES="-1").stderr
    assert "no GPU found" not in checkout.run(CUDA_VISIBLE_DEVICES="0").stderr


LAUNCHER = ["-m", "torch.distributed.run", "--nproc_per_node"]


def test_several_gpus_go_through_torchrun(checkout: Checkout) -> None:
    checkout.set_gpus(4)
    call = checkout.run("--dry_run", NUM_GPU="4")
    assert call.argv == [*LAUNCHER, "4", "--standalone", *flags(checkout), "--dry_run"]
    assert (call.stderr, call.threads) == ("", "2")


def test_several_gpus_where_there_is_none_are_processes_that_share_the_cores(checkout: Checkout) -> None:
    checkout.set_gpus(0)
    call = checkout.run("--dry_run", NUM_GPU="03")
    assert call.argv == [*LAUNCHER, "3", "--standalone", *flags(checkout), "--use_cpu", "--dry_run"]
    assert (call.stderr, call.threads) == ("run_fewshot.sh: no GPU found: running 3 processes on the CPU\n", "2")


def test_more_processes_than_cores_get_a_thread_each_and_a_given_number_stays(checkout: Checkout) -> None:
    checkout.set_cores(2)
    assert checkout.run(NUM_GPU="3").threads == "1"
    assert checkout.run(NUM_GPU="3", OMP_NUM_THREADS="5").threads == "5"


def test_several_machines_share_a_run_whatever_each_one_has(checkout: Checkout) -> None:
    among = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "first", "--master_port", "1234"]

    def argv(number: str) -> list[str]:
        call = checkout.run(NUM_GPU=number, NNODES="2", NODE_RANK="1", MASTER_ADDR="first", MASTER_PORT="1234")
        return list(call.argv)

    checkout.set_gpus(0)
    assert argv("1") == [*LAUNCHER, "1", *among, *flags(checkout), "--use_cpu"]
    checkout.set_gpus(2)
    assert argv("2") == [*LAUNCHER, "2", *among, *flags(checkout)]
    assert argv("1") == [*LAUNCHER, "1", *among, *flags(checkout)]
    assert argv("0") == [*LAUNCHER, "1", *among, *flags(checkout), "--use_cpu"]


def test_a_port_alone_goes_to_torchrun(checkout: Checkout) -> None:
    checkout.set_gpus(2)
    assert checkout.run(NUM_GPU="2", MASTER_PORT="1234").argv[:6] == [*LAUNCHER, "2", "--master_port", "1234"]
    assert checkout.run(NUM_GPU="1", MASTER_PORT="1234").argv == flags(checkout)


def test_several_machines_without_an_address_are_refused(checkout: Checkout) -> None:
    call = checkout.run(NNODES="2", NODE_RANK="0")
    assert (call.status, call.argv) == (2, [])
    assert call.stderr.startswith("error: NNODES=2 needs MASTER_ADDR ")


@pytest.mark.parametrize("number", ["two", "-1", "1.5", "1 2"])
def test_a_number_of_gpus_that_is_none_is_refused(checkout: Checkout, number: str) -> None:
    call = checkout.run(NUM_GPU=number)
    sentence = f"error: NUM_GPU is '{number}', but it must be a number: 0 for the CPU, else how many GPUs\n"
    assert (call.status, call.argv, call.stderr) == (2, [], sentence)


def test_the_status_of_run_py_is_passed_on(checkout: Checkout) -> None:
    assert checkout.run(STATUS="2").status == 2
    assert checkout.run(STATUS="1").status == 1


def test_a_run_of_one_process_goes_to_the_worker_of_a_grid_if_there_is_one(checkout: Checkout) -> None:
    client = ["-IS", f"{checkout.root}/src/lmntk/runs/worker_client.py", f"{checkout.root}/run.py"]
    checkout.set_gpus(2)
    call = checkout.run("a b", LMNTK_WORKER="/a socket")
    assert [*call.argv[:3], call.argv[-1]] == [*client, "a b"]
    assert checkout.run(LMNTK_WORKER="/a socket", NUM_GPU="2").argv[:4] == [*LAUNCHER, "2"]


def test_the_repositorys_own_environment_is_used_unless_another_is_active(checkout: Checkout) -> None:
    own = executable(checkout.root / ".venv" / "bin" / "python", PYTHON)
    assert checkout.run(cwd=checkout.elsewhere).python == str(own)
    assert checkout.run(CONDA_DEFAULT_ENV="base").python == str(own)
    active = str(checkout.bin / "python")
    assert checkout.run(VIRTUAL_ENV="/some/environment").python == active
    assert checkout.run(CONDA_DEFAULT_ENV="mine").python == active


def test_python_can_be_named(checkout: Checkout) -> None:
    executable(checkout.root / ".venv" / "bin" / "python", PYTHON)
    mine = executable(checkout.elsewhere / "my python", PYTHON)
    assert checkout.run(PYTHON=str(mine), VIRTUAL_ENV="x").python == str(mine)


def test_without_python_it_takes_python3_and_without_both_it_says_so(checkout: Checkout) -> None:
    (checkout.bin / "python").unlink()
    tools = checkout.elsewhere / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "tr"):
        (tools / name).symlink_to(shutil.which(name) or name)
    path = f"{checkout.bin}:{tools}"
    assert checkout.run(PATH=path).python == str(checkout.bin / "python3")
    (checkout.bin / "python3").unlink()
    call = checkout.run(PATH=path)
    assert (call.status, call.argv) == (2, [])
    assert call.stderr.endswith("error: no python found: activate an environment, or set PYTHON\n")


# Notes what it is called for: the check ends with status CHECK, torchrun does what TORCHRUN says.
TOGETHER = """#!/bin/bash
case $* in
    *check_command.py*) echo check >> "$CALL"; printf '%s' "${SAYS-}" >&2; exit "${CHECK:-0}" ;;
    *) echo torchrun >> "$CALL"; eval "$TORCHRUN" ;;
esac
"""
LEAVES_TWO = 'echo 2 > "$LMNTK_STATUS_FILE"; exit'


@pytest.mark.parametrize(
    ("check", "torchrun", "called", "status"),
    [
        ("2", "exit 0", "check", 2),
        ("0", "exit 0", "check torchrun", 0),
        ("0", "exit 1", "check torchrun", 1),
        ("0", f"{LEAVES_TWO} 0", "check torchrun", 2),
        ("0", f"{LEAVES_TWO} 1", "check torchrun", 2),
    ],
    ids=["a wrong flag", "well", "a failure", "a mistake of all", "a mistake of one"],
)
def test_several_processes_start_after_a_check_and_a_mistake_is_status_2(
    checkout: Checkout, check: str, torchrun: str, called: str, status: int
) -> None:
    executable(checkout.bin / "python", TOGETHER)
    done = together(checkout, CHECK=check, SAYS="error: a wrong flag\n" if check == "2" else "", TORCHRUN=torchrun)
    out, err = done.communicate(timeout=30)
    assert checkout.call.read_text().split() == called.split()
    assert (done.returncode, out, err) == (status, "", "error: a wrong flag\n" if check == "2" else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_processes_once_and_the_script_waits_for_their_end(
    checkout: Checkout, number: signal.Signals
) -> None:
    executable(checkout.bin / "python", TOGETHER)
    name = number.name.removeprefix("SIG")
    ends = f'trap \'echo {name} >> "$CALL"; sleep 0.3; echo ended >> "$CALL"; exit 1\' {name}'
    # The script gets its signal as early as can be: from the process that it has just started.
    done = together(checkout, TORCHRUN=f"{ends}; kill -s {name} $PPID; while :; do sleep 0.05; done")
    assert done.wait(30) == 128 + number
    assert checkout.call.read_text().split() == ["check", "torchrun", name, "ended"]


def together(checkout: Checkout, **variables: str) -> subprocess.Popen[str]:
    checkout.set_gpus(2)
    checkout.call.unlink(missing_ok=True)
    path = f"{checkout.bin}:{os.defpath}:/usr/bin:/bin"
    return subprocess.Popen(
        ["bash", str(checkout.root / "run_fewshot.sh")],
        env={"PATH": path, "CALL": str(checkout.call), "NUM_GPU": "2", **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["NNODES", "NODE_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["two", "-1", "1 2", "\udcff"])
def test_numbers_of_machines_that_are_none_are_refused(checkout: Checkout, name: str, value: str) -> None:
    call = checkout.run(NUM_GPU="2", **{name: value})
    assert (call.status, call.argv) == (2, [])
    assert call.stderr.startswith(f"error: {name} is '")


def test_a_machine_behind_the_last_is_refused(checkout: Checkout) -> None:
    call = checkout.run(NNODES="2", NODE_RANK="2", MASTER_ADDR="first")
    assert (call.status, call.argv) == (2, [])
    assert call.stderr.startswith("error: NODE_RANK is 2, but it must be less than NNODES, 2: ")


def test_as_published_takes_the_published_settings_and_batches_of_one(checkout: Checkout) -> None:
    call = checkout.run("--as_published", "False", AS_PUBLISHED="1", TASK="RTE")
    batches = ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1"]
    added = ["--as_published", "--task_defaults", "True", *batches, "--as_published", "False"]
    expected = flags(checkout, name="RTE-roberta-base-prompt-standard-", task="rte", folder="RTE")
    assert call.argv == [*expected, *added]
    assert checkout.run(AS_PUBLISHED="0").argv == flags(checkout)


def test_as_published_leaves_a_kernels_tiles_to_the_engine(checkout: Checkout) -> None:
    call = checkout.run(AS_PUBLISHED="1", TRAINER="kernel")
    assert call.argv[-3:] == ["--as_published", "--task_defaults", "True"]


def test_as_published_is_0_or_1(checkout: Checkout) -> None:
    call = checkout.run(AS_PUBLISHED="yes")
    assert call.status == 2 and call.stderr.startswith("error: AS_PUBLISHED is 'yes', but it must be 1")


def test_as_published_keeps_the_tasks_own_lengths_and_draws(checkout: Checkout) -> None:
    argv = checkout.run(AS_PUBLISHED="1", TASK="SNLI").argv[1:]
    _, data, training = parse_arguments([*argv, "--use_cpu"])
    assert data.task_defaults and training.kernel_solver == "logistic" and training.tiles.row == 1
