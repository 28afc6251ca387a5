"""The demo's script against a stand-in for run_fewshot.sh: what it starts, what it reads, what it prints."""

import csv
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import demo
from lmntk.errors import UsageError

# Notes its settings, leaves results that depend on seed and formula, and fails for the folder that `fail` names.
STAND_IN = """
set -eu
here=$(dirname "$0")
formula= output=
arguments=$*
while [ $# -gt 0 ]; do
    case $1 in
        --output_dir) output=$2 ;;
        --kernel_formula) formula=$2 ;;
    esac
    shift
done
if [ -e "$here/fail" ] && [ "$(cat "$here/fail")" = "$output" ]; then echo "error: no such luck"; exit 3; fi
echo "$TASK $SEED $K $TYPE $TRAINER $NUM_GPU ${LOAD_KERNELS_TAG-unset} $PYTHON | $MODEL | $arguments" >> "$here/calls"
mkdir -p "$output"
echo "eval_loss = 1.0" > "$output/eval_results_mr.txt"
echo "eval_acc = 0.$SEED" >> "$output/eval_results_mr.txt"
case $formula in sgd) acc=0.75 ;; *) acc=0.5 ;; esac
echo "eval_acc = $acc" > "$output/test_results_mr.txt"
cp "$here/logits.pt" "$output/test_logits_mr.pt"
for split in train dev test; do echo '{"seconds": 1.25}' > "$output/${split}_kernels_mr.json"; done
"""


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

    def run_demo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        flags = ["--model", str(self.stand_in), "--data_dir", str(self.data), "--output_dir", str(self.output)]
        monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
        demo.main()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A stand-in in place of run_fewshot.sh, and forty sentences a label for each task."""
    place = Workplace(tmp_path / "stand-in", tmp_path / "program", tmp_path / "data of the demo", tmp_path / "results")
    for path in (place.stand_in / "model.safetensors", place.program / "run.py", place.program / "src/lmntk/a/b.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as it was\n", encoding="utf-8")
    (place.stand_in / "run.sh").write_text(STAND_IN, encoding="utf-8")
    logits = torch.tensor([[0.5], [-0.5], [2.0], [-1.0], [0.25]])
    torch.save((logits, torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])), place.stand_in / "logits.pt")
    for task in demo.TASKS:
        for split in ("train", "test"):
            place.original(task, split).parent.mkdir(parents=True, exist_ok=True)
            with place.original(task, split).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows((i % 2, f"{split} sentence {i}") for i in range(80))
    monkeypatch.setattr(demo, "RUN_SCRIPT", place.stand_in / "run.sh")
    monkeypatch.setattr(demo, "ROOT", place.program)
    return place


def test_the_table_holds_means_over_the_seeds_for_every_task_and_formula(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.run_demo(monkeypatch)
    table = (
        "| task         | formula           | dev accuracy | test accuracy | zero-shot accuracy | seconds |\n"
        "|--------------|-------------------|-------------:|--------------:|-------------------:|--------:|\n"
        "| tweets       | sgd               |        27.5% |         75.0% |              60.0% |     3.8 |\n"
        "| tweets       | signgd            |        27.5% |         50.0% |              60.0% |     3.8 |\n"
        "| tweets       | asymmetric_signgd |        27.5% |         50.0% |              60.0% |     3.8 |\n"
        "| film-reviews | sgd               |        27.5% |         75.0% |              60.0% |     3.8 |\n"
        "| film-reviews | signgd            |        27.5% |         50.0% |              60.0% |     3.8 |\n"
        "| film-reviews | asymmetric_signgd |        27.5% |         50.0% |              60.0% |     3.8 |\n"
    )
    assert table in capsys.readouterr().out
    assert (workplace.output / "table.md").read_text(encoding="utf-8") == table


def test_every_run_gets_its_own_split_and_folder_and_all_take_the_classes_as_one_logit(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOAD_KERNELS_TAG", "of-another-experiment")
    workplace.run_demo(monkeypatch)
    expected = [
        f"mr {seed} 16 prompt kernel 0 unset {sys.executable} | {workplace.stand_in} | "
        f"--data_dir {workplace.data}/{task}/k-shot-1k-test/mr/16-{seed} "
        f"--output_dir {workplace.output}/{task}/{formula}/16-{seed} --binary_classification "
        f"--kernel_formula {formula} --kernel_solver {solver}"
        for task in ("tweets", "film-reviews")
        for formula, solver in (("sgd", "lstsq"), ("signgd", "lstsq"), ("asymmetric_signgd", "asym"))
        for seed in (13, 42)
    ]
    assert sorted(workplace.calls) == sorted(expected)
    for task in ("tweets", "film-reviews"):
        for seed in (13, 42):
            split = workplace.data / task / "k-shot-1k-test" / "mr" / f"16-{seed}"
            assert len((split / "train.csv").read_text(encoding="utf-8").splitlines()) == 32


def test_a_run_whose_results_are_there_is_not_started_again(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace.run_demo(monkeypatch)
    first = capsys.readouterr().out
    (workplace.output / "tweets" / "signgd" / "16-42" / "test_results_mr.txt").unlink()
    workplace.run_demo(monkeypatch)
    second = capsys.readouterr().out
    assert len(workplace.calls) == 12 + 1
    assert second.count("(there already)") == 11
    assert "] tweets, signgd, seed 42: test accuracy 50.0% (0 s)\n" in second
    assert [line.split("]")[0] for line in second.splitlines()[1:13]] == [f"[{n:2}/12" for n in range(1, 13)]
    assert first[first.index("Means over") :] == second[second.index("Means over") :]


def append(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "# and more\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "again"),
    [
        pytest.param(lambda place: append(place.stand_in / "model.safetensors"), 12, id="the weights"),
        pytest.param(lambda place: append(place.program / "src/lmntk/a/b.py"), 12, id="a module of the program"),
        pytest.param(lambda place: append(place.program / "run.py"), 12, id="run.py"),
        pytest.param(lambda place: append(place.stand_in / "run.sh"), 12, id="run_fewshot.sh"),
        pytest.param(lambda place: (place.program / "src/lmntk/new.py").touch(), 12, id="a new module"),
        pytest.param(
            lambda place: shutil.copy(place.original("tweets", "train"), place.original("tweets", "test")),
            6,
            id="the sentences of one task",
        ),
        pytest.param(
            lambda place: (place.output / "tweets" / "sgd" / "16-13" / demo.STAMP).write_text(""), 1, id="one stamp"
        ),
        pytest.param(lambda place: append(place.stand_in / "calls"), 0, id="nothing that matters"),
    ],
)
def test_results_count_only_for_the_command_split_model_and_program_that_gave_them(
    change: Callable[[Workplace], None], again: int, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.run_demo(monkeypatch)
    stale = workplace.output / "tweets" / "sgd" / "16-13" / "stale"
    stale.touch()
    change(workplace)
    before = len(workplace.calls)
    workplace.run_demo(monkeypatch)
    assert len(workplace.calls) == before + again
    assert stale.exists() == (again == 0), "what a stale run left is deleted before it is started again"
    workplace.run_demo(monkeypatch)
    assert len(workplace.calls) == before + again


def test_another_command_is_another_run(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.run_demo(monkeypatch)
    monkeypatch.setitem(demo.SOLVERS, "sgd", "svr")
    workplace.run_demo(monkeypatch)
    assert [call.split()[-1] for call in workplace.calls[12:]] == ["svr"] * 4


def test_a_missing_folder_is_named_with_the_script_that_fetches_it(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(workplace.data / "film-reviews")
    with pytest.raises(UsageError) as caught:
        workplace.run_demo(monkeypatch)
    assert str(caught.value) == (
        f"{workplace.data / 'film-reviews'} is missing: tools/fetch_demo_assets.py fetches it, and make demo does both"
    )


def test_a_run_that_fails_is_named_with_its_last_lines_and_started_again_the_next_time(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workplace.output / "tweets" / "signgd" / "16-42"
    (workplace.stand_in / "fail").write_text(str(folder), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        workplace.run_demo(monkeypatch)
    assert str(caught.value) == (
        f"run.sh ended with status 3; all it said is in {folder / 'run.log'}, which ends so:\n    error: no such luck"
    )
    (workplace.stand_in / "fail").unlink()
    workplace.run_demo(monkeypatch)
    assert (folder / demo.STAMP).exists()
