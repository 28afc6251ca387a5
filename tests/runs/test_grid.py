"""Grids of runs against a stand-in for run_fewshot.sh: what they start, skip and refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmntk.commands import grid as command
from lmntk.errors import FileError, SettingError, UnknownNameError, UsageError
from lmntk.runs import grid as library
from lmntk.runs import processes

SCRIPT = Path(__file__).resolve().parents[2] / "run_fewshot.sh"
# Notes its call, leaves results, and fails or waits for a signal where a file beside it names its task and seed.
STAND_IN = """
set -eu
here=$(dirname "$0")
listed() { [ -e "$here/$1" ] && grep -qxF -- "$TASK $SEED" "$here/$1"; }
echo "$TASK $SEED $TRAINER $TAG$GRID_TAG | $*" >> "$here/calls"
echo "$PYTHON ${OMP_NUM_THREADS-unset} $PWD" >> "$here/surroundings"
echo "says $*"
if listed fail; then echo "error: no such luck"; exit 3; fi
if listed idle; then exit 0; fi
output="$here/result/$TASK-$(printf %s "$MODEL" | tr / _)-$TYPE-$TRAINER-$TAG$GRID_TAG/$K-$SEED"
[ -d "$output" ]
if listed wait; then
    trap 'echo "stopped" >> "$here/stopped"; exit 130' INT TERM
    touch "$here/waiting-$SEED"
    while :; do sleep 0.02; done
fi
echo "eval_acc = 0.5" > "$output/eval_results_x.txt"
"""


@dataclass
class Workplace:
    """The stand-in's folder, which is the repository and where the caller stands."""

    root: Path
    capture: pytest.CaptureFixture[str]

    def run(self, *argv: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a call."""
        self.capture.readouterr()
        status = command.main(argv)
        return status, *self.capture.readouterr()

    def refusal(self, *argv: str) -> UsageError:
        """The error that a command line ends with."""
        with pytest.raises(UsageError) as caught:
            command.GridParser().read(argv)
        assert command.main(argv) == 2
        assert not (self.root / "calls").exists()
        return caught.value

    def note(self, name: str, *points: str) -> None:
        """Say for which task and seed a run fails, waits or is idle."""
        (self.root / name).write_text("".join(f"{point}\n" for point in points), encoding="utf-8")

    def grid(self, content: object) -> str:
        path = self.root / "grid.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    @property
    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    @property
    def waiting(self) -> list[Path]:
        return list(self.root.glob("waiting-*"))

    @property
    def folders(self) -> list[str]:
        return sorted(str(path.parent.relative_to(self.root)) for path in self.root.rglob("eval_results_x.txt"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Workplace:
    for name in (*library.DEFAULTS, "GRID_TAG", "PYTHON", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    root = (tmp_path / "my repository").resolve()
    root.mkdir()
    (root / "run_fewshot.sh").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(processes, "RUN_SCRIPT", root / "run_fewshot.sh")
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(root)
    return Workplace(root, capsys)


LEARNING_RATES = ("TAG=lr", "TASK=SST-2,mr", "SEED=13,42", "--learning_rate", "1e-5", "2e-5", "--max_steps", "9")


def test_every_point_is_a_run_with_a_folder_named_by_the_flags_that_vary(place: Workplace) -> None:
    status, out, err = place.run(*LEARNING_RATES)
    assert place.calls == [
        f"{task} {seed} standard lr-learning_rate={rate} | --learning_rate={rate} --max_steps=9"
        for task in ("SST-2", "mr") for seed in (13, 42) for rate in ("1e-5", "2e-5")
    ]  # fmt: skip
    assert place.folders == sorted(
        f"result/{task}-roberta-base-prompt-standard-lr-learning_rate={rate}/16-{seed}"
        for task in ("SST-2", "mr") for seed in (13, 42) for rate in ("1e-5", "2e-5")
    )  # fmt: skip
    log = place.root / "result/mr-roberta-base-prompt-standard-lr-learning_rate=2e-5/16-42/grid-run.log"
    assert log.read_text(encoding="utf-8") == "says --learning_rate=2e-5 --max_steps=9\n"
    assert status == 0
    folder = "result/SST-2-roberta-base-prompt-standard-lr-learning_rate=1e-5/16-13"
    assert out.splitlines() == [
        "8 runs: 0 done already, 8 to do",
        "8 done, 0 skipped, 0 failed",
        f"results: in folders like {folder}, and a line for each run in {place.root}/log",
        "a table: python tools/gather_result.py --condition \"{'tag': 'lr'}\"",
    ]
    assert "8/8" in err and "run/s" in err


def test_runs_that_are_done_are_skipped_and_a_changed_flag_runs_again(place: Workplace) -> None:
    place.run(*LEARNING_RATES)
    status, out, _ = place.run(*LEARNING_RATES)
    assert (status, len(place.calls)) == (0, 8)
    assert out.startswith("8 runs: 8 done already, 0 to do\n0 done, 8 skipped, 0 failed\n")
    place.run(*LEARNING_RATES[:-1], "10")
    assert len(place.calls) == 16
    place.run(*LEARNING_RATES)
    assert len(place.calls) == 24, "the folders' stamps are those of the flags in between"
    place.run("--max_steps=9", "--learning_rate", "2e-5", "1e-5", *LEARNING_RATES[:3])
    assert len(place.calls) == 24, "the order of flags and values does not matter"


def test_a_stamp_without_results_or_results_without_a_stamp_run_again(place: Workplace) -> None:
    place.run("SEED=1,2,3")
    result = place.root / "result" / "SST-2-roberta-base-prompt-standard-"
    (result / "16-1" / "eval_results_x.txt").rename(result / "16-1" / "test_results_x.txt")
    (result / "16-2" / "eval_results_x.txt").unlink()
    (result / "16-3" / "grid-stamp").unlink()
    place.run("SEED=1,2,3")
    assert [call.split()[1] for call in place.calls[3:]] == ["2", "3"]


def test_what_failed_is_listed_with_command_and_log_and_alone_runs_again(place: Workplace) -> None:
    place.note("fail", "mr 42")
    place.note("idle", "SST-2 13")
    grid = ("TASK=SST-2,mr", "SEED=13,42", "MODEL=some/model", "TAG=a b", "--kernel_gamma", "1")
    status, out, err = place.run(*grid)
    assert (status, "2 failed" in err) == (1, True)
    assert out.splitlines()[1:10] == [
        "",
        "failed:",
        "  TASK=SST-2 SEED=13 MODEL=some/model TAG='a b' bash run_fewshot.sh --kernel_gamma=1",
        "    ended well, but left no results; log: result/SST-2-some_model-prompt-standard-a b/16-13/grid-run.log",
        "    says --kernel_gamma=1",
        "  TASK=mr SEED=42 MODEL=some/model TAG='a b' bash run_fewshot.sh --kernel_gamma=1",
        "    status 3; log: result/mr-some_model-prompt-standard-a b/16-42/grid-run.log",
        "    error: no such luck",
        "2 done, 0 skipped, 2 failed",
    ]
    place.note("fail")
    place.note("idle")
    status, out, _ = place.run(*grid)
    assert (status, out.splitlines()[1]) == (0, "2 done, 2 skipped, 0 failed")
    assert [call.split()[:2] for call in place.calls[4:]] == [["SST-2", "13"], ["mr", "42"]]


def test_a_run_that_fails_after_a_change_does_not_keep_the_old_stamp(place: Workplace) -> None:
    place.run("SEED=1", "--x", "1")
    place.note("fail", "SST-2 1")
    place.run("SEED=1", "--x", "2")
    place.note("fail")
    place.run("SEED=1", "--x", "1")
    assert len(place.calls) == 3


def test_a_folder_that_cannot_be_made_fails_its_run_alone(place: Workplace) -> None:
    (place.root / "result").mkdir()
    (place.root / "result" / "mr-roberta-base-prompt-standard-").touch()
    status, out, _ = place.run("TASK=mr,cr")
    assert (status, [call.split()[0] for call in place.calls]) == (1, ["cr"])
    assert "    cannot start it: " in out
    assert "Not a directory" in out or "File exists" in out


def test_a_switch_that_is_off_is_said_and_is_another_run_than_one_left_out(place: Workplace) -> None:
    place.run("--grid", place.grid({"auto_demo": [True, False, None], "fp16": False}))
    assert place.calls == [
        "SST-2 13 standard -auto_demo | --auto_demo --fp16=False",
        "SST-2 13 standard -auto_demo=False | --auto_demo=False --fp16=False",
        "SST-2 13 standard  | --fp16=False",
    ]


def test_a_grid_in_a_file_takes_numbers_as_written_switches_and_nulls(place: Workplace) -> None:
    text = '{"TASK": ["mr"], "SEED": [13, 42], "TAG": null, "learning_rate": [1e-5, 0.10], "only-biases": [true, null]'
    place.run("--grid", place.grid(text + ', "binary_classification": true, "adjust_for_init": null}'))
    assert place.calls == [
        f"mr {seed} standard -learning_rate={rate}{tag} | --learning_rate={rate}{flag} --binary_classification"
        for seed in (13, 42) for rate in ("1e-5", "0.10")
        for tag, flag in (("-only_biases", " --only_biases"), ("", ""))
    ]  # fmt: skip


def test_a_list_of_grids_is_their_union_and_the_command_line_adds_and_overrides(place: Workplace) -> None:
    file = place.grid([
        {"SEED": [1, 2], "kernel_formula": ["sgd", "signgd"], "kernel_gamma": 5},
        {"SEED": 1, "kernel_formula": ["asymmetric_signgd", "sgd"], "kernel_solver": "asym"},
        {"SEED": [1], "kernel_formula": "sgd"},
    ])  # fmt: skip
    place.run("--grid", file, "TRAINER=kernel", "--kernel_gamma=0.5", "SEED=7")
    assert place.calls == [
        "SST-2 7 kernel -kernel_formula=sgd | --kernel_formula=sgd --kernel_gamma=0.5",
        "SST-2 7 kernel -kernel_formula=signgd | --kernel_formula=signgd --kernel_gamma=0.5",
        "SST-2 7 kernel -kernel_formula=asymmetric_signgd-kernel_solver=asym | "
        "--kernel_formula=asymmetric_signgd --kernel_solver=asym --kernel_gamma=0.5",
        "SST-2 7 kernel -kernel_formula=sgd-kernel_solver=asym | "
        "--kernel_formula=sgd --kernel_solver=asym --kernel_gamma=0.5",
    ]  # fmt: skip


def test_list_prints_commands_for_a_shell_and_runs_nothing(place: Workplace) -> None:
    place.run("SEED=1")
    status, out, err = place.run("--list", "SEED=1,2", "TAG=", "--template", "*cls* it's*mask*", "--fp16")
    template = "'--template=*cls* it'\"'\"'s*mask*'"
    assert (status, err, len(place.calls)) == (0, "", 1)
    assert out == "".join(f"SEED={seed} TAG='' bash run_fewshot.sh {template} --fp16\n" for seed in (1, 2))
    assert place.run("--list", "SEED=1,2")[1] == "SEED=1 bash run_fewshot.sh  # done\nSEED=2 bash run_fewshot.sh\n"


def test_values_may_be_negative_hold_equals_signs_or_stand_before_variables(place: Workplace) -> None:
    place.run("--a", "-1", "--b=x=y,z", "--c", "lr=3", "TAG=t", "--d", "--jobs", "2")
    assert place.calls == ["SST-2 13 standard t | --a=-1 --b=x=y,z --c=lr=3 --d"]


def test_characters_that_do_not_belong_in_a_folder_name_are_replaced(place: Workplace) -> None:
    place.run("NUM_GPU=0,1", "LOAD_KERNELS_TAG=a/b", "--template", "*cls* é*mask*", "a/b")
    assert place.folders == [
        f"result/SST-2-roberta-base-prompt-standard--NUM_GPU={gpus}-template={template}/16-13"
        for gpus in (0, 1) for template in ("_cls____mask_", "a_b")
    ]  # fmt: skip


def test_the_shells_variables_count_as_they_do_for_the_script_but_for_its_grid_tag(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TAG": "shell", "TRAINER": "kernel", "GRID_TAG": "-old", "TASK": "cr"}.items():
        monkeypatch.setenv(name, value)
    place.run("TASK=mr")
    assert place.calls == ["mr 13 kernel shell | "]
    assert place.run("--list", "TASK=mr")[1] == (
        "TASK=mr TRAINER=kernel TAG=shell GRID_TAG='' bash run_fewshot.sh  # done\n"
    )


def test_runs_stand_where_the_caller_stands_and_share_the_cores(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    _, out, _ = place.run("SEED=1,2", "--jobs", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("PYTHON", "mine")
    place.run("SEED=3", "--jobs", "3")
    monkeypatch.delenv("OMP_NUM_THREADS")
    place.run("SEED=4")
    lines = (place.root / "surroundings").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{sys.executable} 2 {tmp_path}"] * 2 + [f"mine 5 {tmp_path}", f"mine unset {tmp_path}"]
    assert f" in folders like {place.root}/result/SST-2-roberta-base-prompt-standard-/16-1, " in out
    assert f"python '{place.root}/tools/gather_result.py'" in out


def interrupted(place: Workplace, calls: int, *argv: str, number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Send this process a signal once the last of so many calls waits for one."""

    def send() -> None:
        deadline = time.monotonic() + 20
        while len(place.waiting) + len(place.folders) < calls and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    # A shell may have started us in the background, deaf to Ctrl-C.
    before = signal.signal(number, signal.default_int_handler)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        return place.run(*argv)
    finally:
        thread.join()
        assert signal.signal(number, before) is signal.default_int_handler, "the handler is put back"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_passed_on_and_the_same_command_goes_on(place: Workplace, number: int, status: int) -> None:
    place.note("wait", "SST-2 2")
    ended, out, err = interrupted(place, 2, "SEED=1,2,3", number=number)
    assert ended == status
    name = signal.Signals(number).name
    assert err.endswith(f"stopped by {name}: 1 of 3 runs are done; the same command goes on from there\n")
    assert out == "3 runs: 0 done already, 3 to do\n", "a run that was stopped has not failed"
    assert (place.root / "stopped").read_text() == "stopped\n", "once, and waited for"
    place.note("wait")
    again = place.run("SEED=1,2,3")[1].splitlines()
    assert again[:2] == ["3 runs: 1 done already, 2 to do", "2 done, 1 skipped, 0 failed"]


def test_so_many_jobs_run_at_the_same_time_and_all_are_stopped(place: Workplace) -> None:
    place.note("wait", "SST-2 1", "SST-2 2", "SST-2 3")
    assert interrupted(place, 2, "SEED=1,2,3", "--jobs", "2")[0] == 130
    assert len(place.calls) == 2
    assert (place.root / "stopped").read_text() == "stopped\n" * 2


@pytest.mark.parametrize(
    ("argv", "kind", "data", "fact"),
    [
        ([], SettingError, {"setting": "grid"}, "SEED=13,42"),
        (["--jobs", "2"], SettingError, {"setting": "grid"}, "the grid is empty"),
        (["--grid", "{}"], SettingError, {"setting": "grid"}, "the grid is empty"),
        (["SEEDS=13"], UnknownNameError, {"name": "SEEDS", "options": [*library.DEFAULTS]}, "did you mean 'SEED'?"),
        (["--x", "1", "seed=13"], UnknownNameError, {"name": "seed", "options": [*library.DEFAULTS]}, "'SEED'?"),
        (["GRID_TAG=x"], SettingError, {"setting": "GRID_TAG"}, "TAG"),
        (["SEED=13,,42"], UsageError, {"word": "SEED=13,,42"}, "comma"),
        (["SST-2"], UsageError, {"word": "SST-2"}, "NAME=value"),
        (["--output_dir", "here"], SettingError, {"setting": "output_dir"}, "TAG"),
        (["--output-d=here"], SettingError, {"setting": "output_d"}, "TAG"),
        (["SEED=1", "--dry_run"], SettingError, {"setting": "dry_run"}, "`list`"),
        (["--dry-r"], SettingError, {"setting": "dry_r"}, "`list`"),
        (["--jobs", "0", "SEED=1"], SettingError, {"setting": "jobs", "value": 0}, "at least one"),
        (["--jobs", "many"], UsageError, {}, "--jobs"),
        (["--grid", "none.json"], FileError, {"path": Path("none.json")}, "No such file or directory"),
        (
            ["MODEL=a/b,a_b"],
            SettingError,
            {"setting": "TAG", "folder": Path("result/SST-2-a_b-prompt-standard-/16-13")},
            "MODEL=a/b",
        ),
        (
            ["--template", "a*b", "a/b"],
            SettingError,
            {"setting": "TAG", "folder": Path("result/SST-2-roberta-base-prompt-standard--template=a_b/16-13")},
            "--template=a/b",
        ),
    ],
)
def test_a_mistake_is_refused_and_starts_nothing(
    place: Workplace, argv: list[str], kind: type[UsageError], data: dict[str, object], fact: str
) -> None:
    error = place.refusal(*(place.grid(word) if word == "{}" else word for word in argv))
    assert (type(error), error.data) == (kind, data)
    assert fact in str(error)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("{", "line 1 column 2 (char 1)"),
        ("[]", "a list of objects"),
        ([["TASK"]], "a list of objects"),
        ({"SEEED": 1}, "did you mean 'SEED'?"),
        ({"SEED": []}, '"SEED" takes text, a number or null'),
        ({"TAG": False}, '"TAG" takes text, a number or null'),
        ({"TAG": True}, '"TAG" takes text, a number or null'),
        ({"mapping": {"0": "bad"}}, '"mapping" takes text, a number, true, false or null'),
        ({"a": [[1]]}, '"a" takes text, a number, true, false or null'),
        ({"output_dir": "x"}, "`output_dir`"),
        ({"GRID_TAG": "x"}, "GRID_TAG"),
    ],
)
def test_a_mistake_in_the_file_names_the_file(place: Workplace, content: object, fact: str) -> None:
    file = place.grid(content)
    error = place.refusal("--grid", file, "K=16")
    assert (type(error), error.data) == (FileError, {"path": Path(file)})
    assert fact in str(error)


def test_as_a_program_a_mistake_is_status_2() -> None:
    tool = SCRIPT.parent / "tools" / "run_grid.py"
    done = subprocess.run([sys.executable, str(tool), "--output_dir", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --output_dir would")


def test_without_a_checkout_a_grid_lists_its_runs_but_starts_none(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (place.root / "run_fewshot.sh").unlink()
    monkeypatch.chdir(tmp_path)
    assert place.run("--list", "SEED=1,2")[1] == "SEED=1 bash run_fewshot.sh\nSEED=2 bash run_fewshot.sh\n"
    status, out, err = place.run("SEED=1,2")
    assert (status, "run_fewshot.sh" in err) == (2, True)
    assert not (tmp_path / "result").exists()


def test_processes_are_stopped_if_nobody_can_see_them(place: Workplace) -> None:
    class Broken(processes.Progress[library.GridRun]):
        def waiting(self) -> None:
            if place.waiting:
                raise BrokenPipeError

    place.note("wait", "SST-2 1")
    with pytest.raises(BrokenPipeError):
        processes.run_all(library.expand([{"SEED": ["1", "2"]}]), 1, Broken())
    assert (place.root / "stopped").read_text() == "stopped\n"
    assert len(place.calls) == 1


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_folders_are_those_that_the_real_script_gives_to_run_py(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: bool
) -> None:
    shutil.copy(SCRIPT, place.root)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf \'%s\\0\' "$@" >> "$CALLS"\nprintf \'\\n\' >> "$CALLS"\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("CALLS", str(tmp_path / "python calls"))
    if elsewhere:
        monkeypatch.chdir(tmp_path)
    grids = [
        {"TASK": ["SST-2", "mnli-mm"], "MODEL": ["org/some model", None], "template": ["*cls*{K} a/b*mask*", "x"]},
        {"TYPE": "finetune", "TRAINER": "kernel", "TAG": "{TAG} t", "K": 64, "SEED": [1, 2], "NUM_GPU": 0},
        {"LOAD_KERNELS_TAG": ["old", None], "binary_classification": True, "TAG": "é"},
    ]
    argv = ["--grid", place.grid(grids)]
    runs = command.GridParser().read(argv).runs
    assert len(runs) == 12
    assert place.run(*argv)[0] == 1
    calls = [call.split("\0") for call in (tmp_path / "python calls").read_text().split("\0\n")[:-1]]
    assert [call[call.index("--output_dir") + 1] for call in calls] == [str(run.folder) for run in runs]
    for call, run in zip(calls, runs, strict=True):
        assert call[len(call) - len(run.flags) :] == run.flags
    assert all((run.folder / "grid-run.log").exists() for run in runs)
