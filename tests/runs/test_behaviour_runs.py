"""The runs behind a table of behaviour, against a stand-in for run_fewshot.sh: which start, in what order, and why."""

import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lmntk.commands import behaviour as command
from lmntk.errors import FileError, SettingError, UnknownNameError, UsageError
from lmntk.kernels.formulas import FORMULAS
from lmntk.report import behaviour_files
from lmntk.report.behaviour_files import SeedRuns
from lmntk.runs import processes
from lmntk.runs.behaviour_plan import KERNELS, OPTIMIZERS, Pair

# Notes its call and leaves results; the score on dev is that of the learning rate in the file `dev`, else 0.5. A line
# of `fail` or `wait` that is part of its flags makes it fail, or wait for a signal.
STAND_IN = """
set -eu
here=$(dirname "$0")
listed() {
    [ -e "$here/$1" ] || return 1
    while read -r word; do case "$2" in *"$word"*) return 0 ;; esac; done < "$here/$1"
    return 1
}
echo "$TASK $K $SEED $TRAINER $TYPE $MODEL | $*" >> "$here/calls"
output= data= rate= dev=0.5 eval=True flags=$*
while [ $# -gt 0 ]; do
    case $1 in
        --output_dir) output=$2 ;;
        --data_dir) data=$2 ;;
        --learning_rate=*) rate=${1#*=} ;;
        --do_eval=False) eval=False ;;
    esac
    shift
done
if listed fail "$flags"; then echo "error: no such luck"; exit 3; fi
if listed wait "$flags"; then
    trap 'exit 130' INT TERM
    touch "$here/waiting"
    while :; do sleep 0.02; done
fi
if [ -e "$here/dev" ]; then dev=$(sed -n "s/^$rate //p" "$here/dev"); fi
key=$(printf %s "$TASK" | tr '[:upper:]' '[:lower:]')
if [ $eval = True ]; then echo "eval_acc = 0.5" > "$output/eval_results_$key.txt"; fi
echo "eval_acc = 0.5" > "$output/test_results_$key.txt"
seconds=7; case $flags in *kernel_steps*) seconds=20 ;; *--learning_rate*) seconds=10 ;; esac
scores="\\"seconds\\": $seconds, \\"${key}_dev_eval_acc\\": ${dev:-0.5}"
echo "{\\"task_name\\": \\"$TASK\\", \\"data_dir\\": \\"$data\\", $scores}" > "$output/run_$key.json"
"""


@dataclass
class Workplace:
    """The folder of the stand-in, of splits of the tasks tweets and films, and of what the table was made of."""

    root: Path
    capture: pytest.CaptureFixture[str]
    runs: list[SeedRuns] = field(default_factory=list)

    def case(self, name: str) -> str:
        return f"{name}={self.root / 'data' / name / 'mr'}"

    @property
    def output(self) -> Path:
        return self.root / "out"

    def argv(self, *words: str) -> list[str]:
        """A call for one task and one pair; further cases stand first, and flags given twice count by the last."""
        number = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        return [
            *(
                self.case("tweets"),
                *words[:number],
                "--model",
                str(self.root / "model"),
                "--seeds",
                "13",
                "--pairs",
                "sgd:sgd",
            ),
            *("--learning_rates", "sgd=0.1,0.01", "--output", str(self.output), *words[number:]),
        ]

    def run(self, *words: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a call."""
        self.capture.readouterr()
        status = command.main(self.argv(*words))
        return status, *self.capture.readouterr()

    def note(self, name: str, *lines: str) -> None:
        (self.root / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    @property
    def calls(self) -> list[str]:
        """The output folder of every call, below that of all."""
        path = self.root / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [re.search(r"--output_dir (\S+)", line)[1].removeprefix(f"{self.output}/") for line in lines]  # type: ignore[index]

    def call(self, folder: str) -> str:
        """The call whose results are in a folder."""
        lines = (self.root / "calls").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if f"--output_dir {self.output / folder} " in line)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Workplace:
    root = tmp_path.resolve()
    (root / "run.sh").write_text(STAND_IN, encoding="utf-8")
    (root / "model").mkdir()
    (root / "model" / "model.safetensors").write_text("weights", encoding="utf-8")
    for name in ("tweets", "films"):
        for k in (16, 64):
            for seed in (13, 42):
                folder = root / "data" / name / "mr" / f"{k}-{seed}"
                folder.mkdir(parents=True)
                for split in ("train", "dev", "test"):
                    (folder / f"{split}.csv").write_text(f"0,{name} {split}\n", encoding="utf-8")
    monkeypatch.setattr(processes, "RUN_SCRIPT", root / "run.sh")
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(root)
    place = Workplace(root, capsys)

    def make_rows(runs: Sequence[SeedRuns], thresholds: object, split: str) -> tuple[list[str], dict[Path, UsageError]]:
        place.runs = [*runs]
        return [*dict.fromkeys(run.row for run in runs)], {}

    def write_table(rows: list[str], thresholds: object, output: Path) -> dict[str, str]:
        return dict.fromkeys(behaviour_files.ENDINGS, "".join(f"row {row}\n" for row in rows))

    monkeypatch.setattr(behaviour_files, "make_rows", make_rows)
    monkeypatch.setattr(behaviour_files, "write_table", write_table)
    return place


KERNEL, WITH_F0 = "tweets/kernel-sgd/16-13", "tweets/kernel-sgd-f0/16-13"
LOW, HIGH = (f"tweets/training-sgd-lr={rate}-steps=100-batch=8/16-13" for rate in ("0.01", "0.1"))
SNAPSHOTS = "tweets/snapshots-sgd-sgd-lr={}-steps=100-batch=8/16-13"


def test_a_cell_has_two_kernels_a_training_for_each_rate_and_one_with_snapshots(place: Workplace) -> None:
    place.note("dev", "0.1 0.75", "0.01 0.5")
    status, out, err = place.run()
    assert (status, place.calls) == (0, [KERNEL, HIGH, LOW, WITH_F0, SNAPSHOTS.format("0.1")])
    folders = [place.output / name for name in (SNAPSHOTS.format("0.1"), KERNEL, WITH_F0)]
    assert place.runs == [SeedRuns("tweets K=16 sgd:sgd", "mr", *folders)]
    assert out.startswith(f"5 runs below {place.output}: 0 done already, 5 to do\n")
    assert "  tweets K=16 sgd: seed 13: 0.1\n" in out
    assert "\nrow tweets K=16 sgd:sgd\n" in out
    assert f"the table: {place.output}/behaviour.txt, .md, .tex, .csv, .json; " in out
    assert "5/5" in err and "run" in err


def test_every_run_gets_its_settings_and_the_flags_after_the_dashes_last(place: Workplace) -> None:
    place.run("--max_steps", "7", "--batch_size", "2", "--", "--apply_lora", "--kernel_regularization", "0.5")
    further = "--apply_lora --kernel_regularization 0.5"
    begin = (
        f"mr 16 13 {{}} prompt {place.root / 'model'} | --data_dir {place.root / 'data/tweets/mr/16-13'} --output_dir"
    )
    kernel = "--kernel_formula=sgd --kernel_solver=lstsq"  # its regularization is given
    assert place.call(KERNEL) == (
        f"{begin.format('kernel')} {place.output / KERNEL} --disable_tqdm=True {kernel} {further}"
    )
    assert place.call(WITH_F0) == (
        f"{begin.format('kernel')} {place.output / WITH_F0} --disable_tqdm=True {kernel} --adjust_for_init "
        f"--f0_scaling=auto --load_kernels={place.output / KERNEL} {further}"
    )
    training = "--max_steps=7 --per_device_train_batch_size=2 --save_strategy=no"
    folder = "tweets/training-sgd-lr=0.1-steps=7-batch=2/16-13"
    assert place.call(folder) == (
        f"{begin.format('standard')} {place.output / folder} --disable_tqdm=True --optimizer=sgd --learning_rate=0.1 "
        f"{training} {further}"
    )
    folder = "tweets/snapshots-sgd-sgd-lr=0.01-steps=7-batch=2/16-13"
    assert place.call(folder) == (
        f"{begin.format('standard')} {place.output / folder} --disable_tqdm=True --optimizer=sgd --learning_rate=0.01 "
        f"{training} --kernel_steps=0,last --kernel_formula=sgd {further}"
    )


def test_pairs_share_the_kernels_of_a_formula_and_the_trainings_of_an_optimizer(place: Workplace) -> None:
    rates = ("--learning_rates", "sgd=0.1,0.01", "signgd=1e-4", "adam=1e-3,1e-4")
    place.run("--pairs", "sgd:sgd", "sgd:adam", "signgd:adam", "signgd:signgd", *rates)
    names = sorted(call.removeprefix("tweets/").removesuffix("/16-13") for call in place.calls)
    assert names == sorted([
        *("kernel-sgd", "kernel-sgd-f0", "kernel-signgd", "kernel-signgd-f0"),
        *(f"training-sgd-lr={rate}-steps=100-batch=8" for rate in ("0.1", "0.01")),
        *(f"training-adam-lr={rate}-steps=100-batch=8" for rate in ("1e-3", "1e-4")),
        "snapshots-sgd-sgd-lr=0.01-steps=100-batch=8",
        *(f"snapshots-{formula}-adam-lr=1e-4-steps=100-batch=8" for formula in ("sgd", "signgd")),
        "snapshots-signgd-signgd-lr=1e-4-steps=100-batch=8",
    ])  # fmt: skip
    assert "--optimizer=sgd --optimizer_variant=signgd --learning_rate=1e-4 " in place.call(
        "tweets/snapshots-signgd-signgd-lr=1e-4-steps=100-batch=8/16-13"
    )


def test_tasks_ks_and_seeds_each_have_their_runs_and_rows(place: Workplace) -> None:
    words = ("--k", "16", "64", "--seeds", "13", "42", "--learning_rates", "sgd=0.1", "--jobs", "2")
    status, out, _ = place.run(place.case("films"), *words)
    assert (status, len(place.calls)) == (0, 2 * 2 * 2 * 3)
    rows = [f"{name} K={k} sgd:sgd" for name in ("tweets", "films") for k in (16, 64)]
    assert [run.row for run in place.runs] == [row for row in rows for _ in (13, 42)]
    assert "row " + "\nrow ".join(rows) in out


def test_an_asymmetric_kernel_has_its_solver_whose_gamma_is_chosen(place: Workplace) -> None:
    pair = ("--pairs", "asymmetric_signgd:adam", "--learning_rates", "adam=1e-3")
    place.run(*pair, "--", "--binary_classification")
    call = place.call("tweets/kernel-asymmetric_signgd/16-13")
    assert "--kernel_formula=asymmetric_signgd --kernel_solver=asym --kernel_gamma=auto " in call
    with pytest.raises(SettingError) as caught:
        command._make_plan(command.BehaviourParser().read(place.argv(*pair))).check()
    assert caught.value.data["setting"] == "binary_classification"


def test_a_solver_that_cannot_start_from_f0_has_no_such_run(place: Workplace) -> None:
    place.run("--", "--kernel_solver", "svc")
    assert WITH_F0 not in place.calls
    assert [run.with_f0 for run in place.runs] == [None]


def test_of_equal_learning_rates_the_smallest_is_taken_and_that_is_said(place: Workplace) -> None:
    status, out, _ = place.run("--learning_rates", "sgd=0.1,0.001,0.01")
    assert place.calls[-1] == SNAPSHOTS.format("0.001")
    assert "  tweets K=16 sgd: seed 13: 0.001 (as good: 0.01, 0.1)\n" in out
    assert (place.output / "learning_rates.csv").read_text(encoding="utf-8").splitlines() == [
        "case,K,seed,optimizer,learning_rate,dev,chosen",
        "tweets,16,13,sgd,0.1,0.5,0",
        "tweets,16,13,sgd,0.001,0.5,1",
        "tweets,16,13,sgd,0.01,0.5,0",
    ]


def test_a_single_learning_rate_is_trained_with_once(place: Workplace) -> None:
    assert place.run("--learning_rates", "sgd=0.1")[0] == 0
    assert place.calls == [KERNEL, WITH_F0, SNAPSHOTS.format("0.1")]


def test_runs_that_are_done_are_not_done_again(place: Workplace) -> None:
    first = place.run()[1]
    status, out, _ = place.run()
    assert (status, len(place.calls)) == (0, 5)
    assert out.startswith(f"5 runs below {place.output}: 5 done already, 0 to do\n")
    assert out[out.index("\nrow ") :] == first[first.index("\nrow ") :]
    place.run("--seeds", "13", "42")
    assert len(place.calls) == 10, "a further seed adds its own runs"
    place.run("--max_steps", "50")
    assert len(place.calls) == 13, "the kernels stay"


def test_a_run_whose_results_are_lost_is_done_again(place: Workplace) -> None:
    place.run()
    (place.output / LOW / "test_results_mr.txt").unlink()
    place.run()
    assert place.calls[5:] == [LOW]


@pytest.mark.parametrize(
    ("path", "words"),
    [("model/model.safetensors", ()), ("data/tweets/mr/16-13/dev.csv", ()), ("", ("--", "--only_biases"))],
    ids=["weights", "data", "flags"],
)
def test_finished_runs_of_other_weights_data_or_flags_are_not_overwritten(
    place: Workplace, path: str, words: tuple[str, ...]
) -> None:
    place.run()
    if path:
        (place.root / path).write_text("0,another\n", encoding="utf-8")
    status, out, err = place.run(*words)
    assert (status, out, len(place.calls)) == (2, "", 5)
    assert str(place.output / KERNEL) in err and "--output" in err


def test_a_finished_run_of_fewer_splits_is_not_overwritten(place: Workplace) -> None:
    place.run()
    (place.output / KERNEL / "eval_results_mr.txt").unlink()
    (place.root / "model/model.safetensors").write_text("other weights\n", encoding="utf-8")
    status, _, err = place.run()
    assert (status, len(place.calls)) == (2, 5)
    assert str(place.output / KERNEL) in err


def test_what_failed_is_listed_and_the_rest_makes_the_table(place: Workplace) -> None:
    place.note("fail", "data/tweets/mr/16-42 --output_dir")
    status, out, err = place.run("--seeds", "13", "42")
    assert (status, [run.row for run in place.runs]) == (1, ["tweets K=16 sgd:sgd"])
    assert "row tweets K=16 sgd:sgd\n" in out and "3 failed" in err
    missing = out[out.index("missing:") :]
    log = place.output / "tweets/kernel-sgd/16-42" / processes.LOG
    assert f"  tweets K=16, seed 42: kernel sgd\n    status 3; log: {log}\n    error: no such luck\n" in missing
    assert "  tweets K=16, seed 42: kernel sgd with f₀\n    the run that computes its kernel has failed\n" in missing
    assert "  tweets K=16 sgd:sgd, seed 42\n    no training has a metric on dev" in missing
    (place.root / "fail").unlink()
    done = len(place.calls)
    status, out, _ = place.run("--seeds", "13", "42")
    assert (status, len(place.calls) - done, len(place.runs)) == (0, 5, 2)


def test_a_training_that_fails_leaves_the_choice_to_the_others(place: Workplace) -> None:
    place.note("fail", "learning_rate=0.1 ")
    place.note("dev", "0.1 0.9", "0.01 0.5")
    status, out, _ = place.run()
    assert (status, place.calls[-1]) == (1, SNAPSHOTS.format("0.01"))
    assert "  tweets K=16, seed 13: training sgd, learning rate 0.1\n    status 3" in out
    assert "row tweets K=16 sgd:sgd\n" in out


def test_without_any_complete_cell_there_is_no_table(place: Workplace) -> None:
    place.note("fail", "kernel_formula")
    status, out, _ = place.run()
    assert (status, place.runs) == (1, [])
    assert "row" not in out and "the table" not in out


def test_a_signal_is_passed_on_and_the_same_command_goes_on(place: Workplace) -> None:
    place.note("wait", "learning_rate=0.01 ")

    def send() -> None:
        deadline = time.monotonic() + 20
        while not (place.root / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    status, out, err = place.run()
    thread.join()
    assert (status, place.calls) == (143, [KERNEL, HIGH, LOW])
    assert err.endswith("stopped by SIGTERM: 2 of 5 runs are done; the same command goes on from there\n")
    (place.root / "wait").unlink()
    assert place.run()[0] == 0
    assert place.calls[3:] == [LOW, WITH_F0, SNAPSHOTS.format("0.01")]


def test_a_dry_run_counts_and_measures_by_one_run_of_each_kind(place: Workplace) -> None:
    words = ("--seeds", "13", "42", "--k", "16", "64")
    status, out, _ = place.run("--dry_run", *words)
    # The trial of the snapshots takes the first learning rate, since none is chosen yet.
    assert (status, place.calls) == (0, [KERNEL, HIGH, SNAPSHOTS.format("0.1"), WITH_F0])
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert "20 runs: 3 done, 17 to do" in out
    assert rows["kernel sgd"][2:] == ["4", "3", "21", "s", "scaled", "with", "K"]  # (7 + 28 + 28) / 3 = 21
    assert "row" not in out
    place.run(*words)
    assert len(place.calls) == 21, "the trial of the snapshots was of another learning rate"


def test_a_dry_run_with_runs_that_are_there_starts_none(place: Workplace) -> None:
    place.run()
    status, out, _ = place.run("--dry_run", "--seeds", "13", "42")
    assert (status, len(place.calls)) == (0, 5)
    assert "10 runs: 5 done, 5 to do" in out
    # Two kernels of 7 s, two trainings of 10 s and one of 20 s.
    assert "about 54 s in all\n" in out


def test_a_trial_that_fails_is_said(place: Workplace) -> None:
    place.note("fail", "kernel_steps")
    status, out, _ = place.run("--dry_run")
    assert status == 1
    assert "failed: tweets K=16, seed 13: training sgd with snapshots of sgd" in out


def test_without_dev_settings_must_be_given_and_nothing_is_chosen(place: Workplace) -> None:
    (place.root / "data/tweets/mr/16-13/dev.csv").unlink()
    status, _, err = place.run()
    assert (status, place.calls) == (2, [])
    for fact in ("16-13", "sgd=", "--kernel_regularization", "--f0_scaling"):
        assert fact in err
    numbers = ("--", "--kernel_regularization", "0.1", "--f0_scaling=10")
    assert place.run(*numbers)[0] == 2
    assert place.run("--learning_rates", "sgd=0.1")[0] == 2
    assert place.run("--learning_rates", "sgd=0.1", *numbers)[0] == 0
    assert all("--do_eval=False" in place.call(name) for name in (KERNEL, WITH_F0, SNAPSHOTS.format("0.1")))
    assert len(place.runs) == 1


def test_without_dev_the_solvers_settings_may_be_chosen_by_leave_one_out(place: Workplace) -> None:
    (place.root / "data/tweets/mr/16-13/dev.csv").unlink()
    assert place.run("--learning_rates", "sgd=0.1", "--", "--select_by", "loo")[0] == 0


@pytest.mark.parametrize(
    ("words", "kind", "data"),
    [
        (["--pairs", "sdg:sgd"], UnknownNameError, {"name": "sdg"}),
        (["--pairs", "sgd:adamw"], UnknownNameError, {"name": "adamw"}),
        (["--pairs", "sgd"], UnknownNameError, {"name": ""}),
        (["--pairs", "sgd:sgd", "sgd:sgd"], SettingError, {"setting": "pairs"}),
        (["--k", "16", "16"], SettingError, {"setting": "k"}),
        (["--learning_rates", "sdg=1"], UnknownNameError, {"name": "sdg"}),
        (["--learning_rates", "sgd="], SettingError, {"setting": "learning_rates"}),
        (["--learning_rates", "sgd=0.1,1e-1"], SettingError, {"setting": "learning_rates"}),
        (["--learning_rates", "sgd=0"], SettingError, {"setting": "learning_rates"}),
        (["--learning_rates", "sgd=-1"], SettingError, {"setting": "learning_rates"}),
        (["--jobs", "0"], SettingError, {"setting": "jobs"}),
        (["--k", "32"], FileError, {}),
        (["--", "--output_dir", "x"], SettingError, {"setting": "output_dir"}),
        (["--", "--learning-rate=1"], SettingError, {"setting": "learning_rate"}),
        (["--", "--max_st", "1"], SettingError, {"setting": "max_steps"}),
        (["--", "x"], UsageError, {"word": "x"}),
    ],
)
def test_what_cannot_be_is_refused_before_any_run(
    place: Workplace, words: list[str], kind: type[UsageError], data: dict[str, object]
) -> None:
    with pytest.raises(kind) as caught:
        command._make_plan(command.BehaviourParser().read(place.argv(*words))).check()
    assert type(caught.value) is kind
    assert data.items() <= caught.value.data.items()
    status, out, err = place.run(*words)
    assert (status, place.calls) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("words", ["--model m", "SST-2", "SST-2 --model m", "a/b=data --model m"])
def test_a_call_without_a_case_a_model_or_splits_is_refused(place: Workplace, words: str) -> None:
    assert command.main(words.split()) == 2
    assert place.capture.readouterr().err.startswith("error: ")


def test_every_formula_and_optimizer_can_be_paired() -> None:
    assert KERNELS.keys() == FORMULAS.keys()
    assert {str(Pair.parse(f"{formula}:{name}")) for formula in FORMULAS for name in OPTIMIZERS} == {
        f"{formula}:{name}" for formula in FORMULAS for name in OPTIMIZERS
    }
