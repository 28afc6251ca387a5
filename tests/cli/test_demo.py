"""The demo against a stand-in for run_fewshot.sh: what it starts, reads and prints."""

import csv
import itertools
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import demo
from lmntk.analysis.behaviour import Thresholds
from lmntk.commands import gather
from lmntk.report import behaviour_files
from lmntk.report.behaviour_files import SeedRuns
from lmntk.runs import processes

# Notes its settings, leaves results that depend on seed and method, and fails for the folder that `fail` names.
STAND_IN = """
set -eu
here=$(dirname "$0")
output= data=
arguments=$*
while [ $# -gt 0 ]; do
    case $1 in
        --output_dir) output=$2 ;;
        --data_dir) data=$2 ;;
    esac
    shift
done
if [ -e "$here/fail" ] && [ "$(cat "$here/fail")" = "$output" ]; then echo "error: no such luck"; exit 3; fi
echo "what $TAG says of $SEED" >&2
foreign="${LOAD_KERNELS_TAG-unset} ${OMP_NUM_THREADS-unset}"
echo "$TAG $TASK $SEED $K $TYPE $TRAINER $NUM_GPU $foreign $PYTHON | $MODEL | $arguments" \\
    >> "$here/calls"
echo "eval_acc = 0.$SEED" | tee "$output/eval_results_mr.txt" > "$output/test_results_mr.txt"
case $TAG in *-kernel-sgd) test=0.75 ;; *) test=0.$SEED ;; esac
metrics="\\"mr_dev_eval_acc\\": 0.$SEED, \\"mr_test_eval_acc\\": $test, \\"seconds\\": $SEED"
folders="\\"data_dir\\": \\"$data\\", \\"output_dir\\": \\"$output\\""
echo "{\\"tag\\": \\"$TAG\\", \\"task_name\\": \\"$TASK\\", $folders, $metrics}" | tee "$output/run_mr.json" >> log
"""
NAMES = ("zero-shot", "kernel-sgd", "tuning-adam")  # a few of the methods: a run more is a process more
METHODS = tuple(method for method in demo.DEMO.methods if method.name in NAMES)
DEMO = replace(demo.DEMO, methods=METHODS)
RUNS = 2 * len(METHODS) * 2


@dataclass
class Workplace:
    """The folders of the stand-in, which is the model too, of the program, of the two tasks and of the results."""

    stand_in: Path
    program: Path
    data: Path
    output: Path

    def original(self, task: str, split: str) -> Path:
        return self.data / task / "original" / "mr" / f"{split}.csv"

    @property
    def calls(self) -> list[str]:
        return (self.stand_in / "calls").read_text(encoding="utf-8").splitlines()

    def status(self, of: demo.Demo = DEMO) -> int:
        flags = ["--model", str(self.stand_in), "--data_dir", str(self.data), "--output_dir", str(self.output)]
        return demo.main(of, flags)

    def run_demo(self, of: demo.Demo = DEMO) -> None:
        assert self.status(of) == 0


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A stand-in in place of run_fewshot.sh, and forty sentences a label for each task."""
    place = Workplace(tmp_path / "stand-in", tmp_path / "program", tmp_path / "data of the demo", tmp_path / "results")
    model = (place.stand_in / "model.safetensors", place.stand_in / "model.gguf")
    for path in (*model, place.program / "run.py", place.program / "src/lmntk/a/b.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as it was\n", encoding="utf-8")
    (place.stand_in / "run.sh").write_text(STAND_IN, encoding="utf-8")
    for task in DEMO.tasks:
        for split in ("train", "test"):
            place.original(task, split).parent.mkdir(parents=True, exist_ok=True)
            with place.original(task, split).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows((i % 2, f"{split} sentence {i}") for i in range(80))
    monkeypatch.setattr(processes, "RUN_SCRIPT", place.stand_in / "run.sh")
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(demo, "ROOT", place.program)
    return place


def test_the_table_holds_means_over_the_seeds_for_every_task_and_method(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.run_demo()
    table = (workplace.output / "table.md").read_text(encoding="utf-8")
    assert f"\n\n{table}\n" in capsys.readouterr().out
    header, line, *rows = table.splitlines()
    assert header == "| task         | method      |  dev | test | standard deviation |"
    assert line == "|--------------|-------------|-----:|-----:|-------------------:|"
    usual = "| 27.5 | 27.5 |               14.5 |"
    kernel = "| 27.5 | 75.0 |                0.0 |"
    assert rows == [
        f"| {task:12} | {name:11} {kernel if name == 'kernel-sgd' else usual}"
        for task in ("tweets", "film-reviews")
        for name in NAMES
    ]


def test_the_command_that_is_printed_finds_the_same_numbers_in_the_log(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.output.mkdir()
    stale = {"tag": "demo-tweets-zero-shot", "task_name": "mr", "data_dir": "16-13", "output_dir": "an older one"}
    stale_line = json.dumps({**stale, "mr_dev_eval_acc": 0.99, "mr_test_eval_acc": 0.99})
    (workplace.output / "log").write_text(stale_line + "\n", encoding="utf-8")
    workplace.run_demo()
    lines = capsys.readouterr().out.splitlines()
    python, tool, *words = shlex.split(lines[lines.index("The same numbers from the log:") + 1])
    assert (python, tool) == (sys.executable, str(workplace.program / "tools" / "gather_result.py"))
    assert gather.main(words) == 0
    gathered, errors = capsys.readouterr()
    assert errors == ""
    header, _, *rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in gathered.splitlines()]
    found = {row["tag"]: row for row in (dict(zip(header, row, strict=True)) for row in rows)}
    shown = [row.split("|")[1:-1] for row in (workplace.output / "table.md").read_text().splitlines()[2:]]
    numbers = ("dev mean", "test mean", "standard deviation")
    assert {
        f"demo-{task.strip()}-{name.strip()}": [cell.strip() for cell in cells] for task, name, *cells in shown
    } == {tag: [row[name] for name in numbers] for tag, row in found.items()}
    assert {row["runs"] for row in found.values()} == {"2"}


def test_every_run_has_a_split_and_folder_and_takes_the_classes_as_one_logit(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOAD_KERNELS_TAG", "of-another-experiment")
    workplace.run_demo()
    expected = [
        f"demo-{task}-{method.name} mr {seed} 16 prompt {method.trainer} 0 unset 1 {sys.executable} | "
        f"{workplace.stand_in} | --data_dir {workplace.data}/{task}/k-shot-1k-test/mr/16-{seed} "
        f"--output_dir {workplace.output}/{task}/{method.name}/16-{seed} --binary_classification "
        f"--disable_tqdm True {method.flags}".rstrip()
        for task in ("tweets", "film-reviews")
        for method in METHODS
        for seed in (13, 42)
    ]
    assert sorted(workplace.calls) == sorted(expected)
    for task in ("tweets", "film-reviews"):
        for seed in (13, 42):
            split = workplace.data / task / "k-shot-1k-test" / "mr" / f"16-{seed}"
            assert len((split / "train.csv").read_text(encoding="utf-8").splitlines()) == 32


@pytest.mark.parametrize("lost", ["test_results_mr.txt", "run_mr.json"])
def test_a_run_whose_results_are_there_is_not_started_again(
    lost: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.run_demo()
    first = capsys.readouterr().out
    (workplace.output / "tweets" / "tuning-adam" / "16-42" / lost).unlink()
    workplace.run_demo()
    second = capsys.readouterr().out
    assert len(workplace.calls) == RUNS + 1
    assert second.count("(there already)") == RUNS - 1
    assert "] tweets, tuning-adam, seed 42: test accuracy 42.0% (0 s)\n" in second
    lines = second.splitlines()[1 : RUNS + 1]
    assert [line.split("]")[0] for line in lines] == [f"[{n:2}/{RUNS}" for n in range(1, RUNS + 1)]
    assert first[first.index("Accuracies in") :] == second[second.index("Accuracies in") :]


def append(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "# and more\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "again"),
    [
        pytest.param(lambda place: append(place.stand_in / "model.safetensors"), RUNS, id="the weights"),
        pytest.param(lambda place: append(place.stand_in / "model.gguf"), RUNS, id="the weights in a GGUF file"),
        pytest.param(lambda place: append(place.program / "src/lmntk/a/b.py"), RUNS, id="a module of the program"),
        pytest.param(lambda place: append(place.program / "run.py"), RUNS, id="run.py"),
        pytest.param(lambda place: append(place.stand_in / "run.sh"), RUNS, id="run_fewshot.sh"),
        pytest.param(lambda place: (place.program / "src/lmntk/new.py").touch(), RUNS, id="a new module"),
        pytest.param(
            lambda place: shutil.copy(place.original("tweets", "train"), place.original("tweets", "test")),
            RUNS // 2,
            id="the sentences of one task",
        ),
        pytest.param(
            lambda place: (place.output / "tweets" / "kernel-sgd" / "16-13" / processes.STAMP).write_text(""),
            1,
            id="one stamp",
        ),
        pytest.param(lambda place: append(place.stand_in / "calls"), 0, id="nothing that matters"),
    ],
)
def test_results_count_only_for_the_command_split_model_and_program_that_gave_them(
    change: Callable[[Workplace], None], again: int, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.run_demo()
    stale = workplace.output / "tweets" / "kernel-sgd" / "16-13" / "stale"
    stale.touch()
    change(workplace)
    before = len(workplace.calls)
    workplace.run_demo()
    assert len(workplace.calls) == before + again
    assert stale.exists() == (again == 0), "what a stale run left is deleted before it is started again"
    workplace.run_demo()
    assert len(workplace.calls) == before + again


def test_another_command_is_another_run(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.run_demo()
    other = demo.Method("zero-shot", "standard", "--no_train --num_sample 1")
    workplace.run_demo(replace(DEMO, methods=(other, *METHODS[1:])))
    assert [call.split()[-3:] for call in workplace.calls[RUNS:]] == [["--no_train", "--num_sample", "1"]] * 4


ALONE = replace(DEMO, name="demo-alone", tasks=("tweets",), flags="--template *sent_0* --gguf_file a.gguf", alone=True)
ONE = replace(ALONE, methods=METHODS[:1], seeds=(42,))


def test_runs_that_go_one_at_a_time_have_all_cores_and_show_what_they_say(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    workplace.run_demo(ALONE)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "6 runs, one at a time, on all cores; each prints a line when it is done."
    for number, (method, seed) in enumerate(itertools.product(METHODS, (13, 42))):
        name, folder = f"tweets, {method.name}, seed {seed}", workplace.output / "tweets" / method.name / f"16-{seed}"
        accuracy = "75.0" if method.name == "kernel-sgd" else f"{seed}.0"
        said = f"what demo-alone-tweets-{method.name} says of {seed}"
        assert shown[1 + 4 * number : 5 + 4 * number] == [
            "",
            f"{name}: its messages, which {folder / processes.LOG} keeps too:",
            said,
            f"[{number + 1:2}/6] {name}: test accuracy {accuracy}% (0 s)",
        ]
        assert (folder / processes.LOG).read_text(encoding="utf-8") == f"{said}\n"
        assert f" 0 unset unset {sys.executable} | " in workplace.calls[number]
        flags = f"--disable_tqdm False --template *sent_0* --gguf_file a.gguf {method.flags}"
        assert workplace.calls[number].endswith(f"--binary_classification {flags}")


def test_shared_flags_are_part_of_the_command_that_results_count_for(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.run_demo(ONE)
    workplace.run_demo(ONE)
    assert len(workplace.calls) == 1
    workplace.run_demo(replace(ONE, flags="--template *sent_0* --gguf_file b.gguf"))
    assert len(workplace.calls) == 2


def test_of_one_seed_the_table_has_no_deviation(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.run_demo(replace(ALONE, seeds=(42,)))
    table = (workplace.output / "table.md").read_text(encoding="utf-8")
    assert table.splitlines() == [
        "| task   | method      |  dev | test |",
        "|--------|-------------|-----:|-----:|",
        "| tweets | zero-shot   | 42.0 | 42.0 |",
        "| tweets | kernel-sgd  | 42.0 | 75.0 |",
        "| tweets | tuning-adam | 42.0 | 42.0 |",
    ]
    assert f"\n\nAccuracies in percent, seed 42; guessing is right half of the time.\n\n{table}\n" in (
        capsys.readouterr().out
    )


def test_it_ends_by_writing_a_report_of_some_runs_which_is_written_once(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.run_demo()
    page = workplace.output / "report" / "report.html"
    folder = workplace.output / "tweets" / "kernel-sgd" / "16-42"
    tool = f"{sys.executable} {workplace.program / 'tools' / 'kernel_influence.py'}"
    assert capsys.readouterr().out.endswith(
        f"Which train examples look mislabelled, help or hurt, by kernel-sgd, 16-42:\n  {tool} {folder}\n"
        f"Kernels to look at, of tweets and seed 42, in a browser:\n  {page}\n"
    )
    assert re.findall(r'<th scope="row">(.*?)</th>', page.read_text(encoding="utf-8")) == ["kernel-sgd", "tuning-adam"]
    written = page.stat().st_mtime_ns
    workplace.run_demo()
    assert page.stat().st_mtime_ns == written
    append(workplace.program / "run.py")
    workplace.run_demo()
    assert page.stat().st_mtime_ns > written
    page.unlink()
    workplace.run_demo()
    assert page.exists()


def test_it_closes_with_what_the_kernels_describe_of_the_trainings(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[SeedRuns] = []

    def make_rows(runs: list[SeedRuns], thresholds: Thresholds, split: str) -> tuple[list[str], dict[Path, Exception]]:
        made.extend(runs)
        assert (thresholds, split) == (Thresholds(), "test")
        return ["a row"], {}

    monkeypatch.setattr(behaviour_files, "make_rows", make_rows)
    monkeypatch.setattr(behaviour_files, "write_table", lambda rows, _, folder: {"text": f"{rows} in {folder}\n"})
    workplace.run_demo(replace(DEMO, described=(("signgd:adam", "kernel-sgd", "tuning-adam"), ("no", "such", "row"))))
    assert made == [
        SeedRuns(f"{task} signgd:adam", "mr", *(workplace.output / task / name / f"16-{seed}" for name in pair))
        for task in DEMO.tasks
        for seed in (13, 42)
        for pair in [("tuning-adam", "kernel-sgd")]
    ]
    assert f"\n\n{demo.DESCRIBED}\n\n['a row'] in {workplace.output}\n\n" in capsys.readouterr().out


def test_the_trainings_that_a_kernel_describes_have_snapshots_of_its_formula() -> None:
    methods = {method.name: method.flags for method in demo.DEMO.methods}
    assert [name for name, _, _ in demo.DEMO.described] == ["sgd:sgd", "signgd:adam"]
    for name, kernel, training in demo.DEMO.described:
        formula, optimizer = name.split(":")
        assert f"--kernel_formula {formula} " in methods[kernel]
        assert methods[training].endswith(f" --kernel_steps 0,last --kernel_formula {formula}")
        assert f"--optimizer {optimizer} " in methods[training]


def test_a_missing_folder_is_named_with_the_script_that_fetches_it(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(workplace.data / "film-reviews")
    assert workplace.status() == 2
    error = capsys.readouterr().err
    assert f"{workplace.data / 'film-reviews'} is missing" in error
    assert "make demo" in error


def test_a_run_that_fails_is_named_and_goes_on_the_next_time(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workplace.output / "tweets" / "tuning-adam" / "16-42"
    (workplace.stand_in / "fail").write_text(str(folder), encoding="utf-8")
    assert workplace.status() == 2
    error = capsys.readouterr().err
    for fact in ("tweets, tuning-adam, seed 42", "status 3", str(folder / processes.LOG), "error: no such luck"):
        assert fact in error
    (folder / "tile").touch()
    (workplace.stand_in / "fail").unlink()
    workplace.run_demo()
    assert (folder / "tile").exists(), "what a stopped run kept is there for the next one"
    assert (folder / "test_results_mr.txt").exists()


def test_a_stopped_demo_says_so_in_a_sentence(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_all", lambda *_, **__: processes.Outcome(0, [], [signal.SIGINT]))
    assert workplace.status() == 130
    assert capsys.readouterr().err == "stopped by SIGINT: what is done is kept; the same command goes on from there\n"
