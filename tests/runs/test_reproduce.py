"""The paper's protocol against a stand-in for run_fewshot.sh: its grids, its runs, what is chosen, and the tables."""

import csv
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmntk.commands import reproduce as command
from lmntk.data.tasks import TASKS
from lmntk.errors import FileError, UnknownNameError
from lmntk.published.catalogue import PUBLISHED_TASKS
from lmntk.runs import processes
from lmntk.runs.grid import expand, read_grids
from lmntk.runs.paper_plan import GRIDS, TABLES, TITLES, case_of, read_methods
from lmntk.runs.paper_table import Score, read_published
from lmntk.solvers.candidates import AUTO
from random_kernels import Case as Kernel

# Notes its call and leaves results. On test a run has the score that a line of `scores` gives for a word of its call,
# as on dev; else 0.5. A call with a word of `fail` fails.
STAND_IN = """
set -eu
here=$(dirname "$0")
echo "$TASK $K $SEED $TRAINER $TYPE $MODEL | $*" >> "$here/calls"
if [ -e "$here/fail" ]; then
    while read -r word; do case "$*" in *"$word"*) echo "error: no such luck"; exit 3 ;; esac; done < "$here/fail"
fi
score=0.5
if [ -e "$here/scores" ]; then
    while read -r word value; do case "$*" in *"$word"*) score=$value ;; esac; done < "$here/scores"
fi
while [ $# -gt 0 ]; do
    case $1 in --output_dir) output=$2 ;; --data_dir) data=$2 ;; esac
    shift
done
key=$(printf %s "$TASK" | tr '[:upper:]' '[:lower:]')
echo "eval_acc = $score" > "$output/eval_results_$key.txt"
echo "eval_acc = $score" > "$output/test_results_$key.txt"
scores="\\"${key}_dev_eval_acc\\": $score, \\"${key}_test_eval_acc\\": $score, \\"seconds\\": 3600"
solver='"kernel_regularization": 0.1, "f0_scaling": 10.0, "kernel_gamma": 1.0, "kernel_lambda": 0.5'
echo "{\\"task_name\\": \\"$key\\", \\"data_dir\\": \\"$data\\", $solver, $scores}" > "$output/run_$key.json"
"""


@dataclass
class Workplace:
    """The folder of the stand-in, of a model, and of splits of SST-2, trec and of tweets with the labels of mr."""

    root: Path
    capture: pytest.CaptureFixture[str]

    @property
    def output(self) -> Path:
        return self.root / "out"

    def run(self, table: str, *words: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a call; of flags given twice the last counts."""
        self.capture.readouterr()
        usual = ["--model", str(self.root / "model"), "--tasks", "SST-2", "--seeds", "13", "--output", str(self.output)]
        status = command.main([table, *usual, *words])
        return status, *self.capture.readouterr()

    def note(self, name: str, *lines: str) -> None:
        (self.root / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    @property
    def calls(self) -> dict[str, str]:
        """Every call by its output folder below that of all, in their order."""
        path = self.root / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {re.findall(r"--output_dir (\S+)", line)[0].removeprefix(f"{self.output}/"): line for line in lines}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Workplace:
    root = tmp_path.resolve()
    (root / "run.sh").write_text(STAND_IN, encoding="utf-8")
    (root / "model").mkdir()
    (root / "model" / "model.safetensors").write_text("weights", encoding="utf-8")
    for name, folder in (("SST-2", "SST-2"), ("trec", "trec"), ("mr", "tweets/mr")):
        task = TASKS[name]
        for numbers in ("16-13", "16-42"):
            split = root / "data" / "k-shot-1k-test" / folder / numbers
            split.mkdir(parents=True)
            for mode in ("train", "dev", "test"):
                (split / task.file_name(mode)).write_text(f"{name} {mode}\n", encoding="utf-8")
    monkeypatch.setattr(processes, "RUN_SCRIPT", root / "run.sh")
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(root)
    return Workplace(root, capsys)


@pytest.mark.parametrize("table", TABLES)
def test_every_grid_is_one_of_run_grid_and_its_methods_have_titles(table: str) -> None:
    grids = read_grids(GRIDS / f"{table}.json")
    assert expand(grids)
    methods = read_methods(table)
    assert len({method.name for method in methods}) == len(methods) == len(grids)
    for method in methods:
        assert method.name in TITLES and set(method.tasks) <= set(PUBLISHED_TASKS)
        if method.trainer == "kernel":
            assert method.settings["kernel_regularization"] == "auto"
            chosen = {name for name, value in method.settings.items() if value == "auto"}
            assert chosen <= AUTO.keys()
        if method.needs_two_classes:
            assert all(len(TASKS[task].labels) == 2 for task in method.tasks)


@pytest.mark.parametrize("table", TABLES)
def test_a_quick_grid_has_the_same_methods(table: str) -> None:
    names = [method.name for method in read_methods(table)]
    assert [method.name for method in read_methods(table, quick=True)] == names


def test_titles_belong_to_methods_of_some_table() -> None:
    assert {method.name for table in TABLES for method in read_methods(table)} == TITLES.keys()


def test_methods_that_share_kernels_run_after_them_and_load_them(place: Workplace) -> None:
    status, _, _ = place.run("solvers")
    names = [f"SST-2/prompt-{name}/16-13" for name in ("kernel-sgd", "kernel-a-signgd")]
    shared = [f"SST-2/prompt-kernel-sgd-{solver}/16-13" for solver in ("logistic", "svr", "svc")]
    assert (status, list(place.calls)) == (0, [*names, *shared])
    assert "--load_kernels" not in place.calls[names[0]]
    for call in shared:
        assert f"--load_kernels={place.output / names[0]}" in place.calls[call]
    asym = "--kernel_formula=asymmetric_signgd --binary_classification --kernel_solver=asym"
    choices = "--kernel_regularization=auto --kernel_gamma=auto --kernel_lambda=auto"
    assert f"{asym} {choices}" in place.calls[names[1]]


def test_the_best_learning_rate_on_dev_counts_and_seeds_are_averaged(place: Workplace) -> None:
    lines = ("learning_rate=1e-3 0.75", "SST-2/prompt-kernel-sgd/16-13 0.9", "SST-2/prompt-kernel-sgd/16-42 0.8")
    place.note("scores", *lines)
    status, out, _ = place.run("main-table", "--seeds", "13", "42", "--jobs", "2")
    assert status == 0
    assert re.search(r"^SGD fine-tuning +75\.0 \(0\.0\)$", out, re.MULTILINE)
    assert re.search(r"^K\(SGD\) +85\.0 \(7\.1\)$", out, re.MULTILINE)
    with (place.output / "main-table-seeds.csv").open(encoding="utf-8", newline="") as file:
        seeds = list(csv.DictReader(file))
    assert {row["learning_rate"] for row in seeds if row["method"] == "sgd"} == {"1e-3"}
    assert [float(row["test"]) for row in seeds if row["method"] == "kernel-sgd"] == [90, 80]
    assert {row["kernel_regularization"] for row in seeds if row["method"] == "kernel-sgd"} == {"0.1"}
    assert f"the table: {place.output}/main-table.txt" in out


def test_a_method_for_two_classes_leaves_other_tasks_blank(place: Workplace) -> None:
    status, out, _ = place.run("solvers", "--tasks", "SST-2", "trec", "--format", "csv")
    assert status == 0 and not any("trec/prompt-kernel-a-signgd" in call for call in place.calls)
    rows = list(csv.DictReader((place.output / "solvers.csv").open(encoding="utf-8", newline="")))
    assert [(row["task"], row["method"]) for row in rows if row["method"] == "kernel-a-signgd"] == [
        ("SST-2", "kernel-a-signgd")
    ]


def test_what_is_done_is_not_done_again_and_new_data_is(place: Workplace) -> None:
    place.run("solvers")
    before = len((place.root / "calls").read_text(encoding="utf-8").splitlines())
    status, out, _ = place.run("solvers")
    assert status == 0 and "5 done already, 0 to do" in out
    assert len((place.root / "calls").read_text(encoding="utf-8").splitlines()) == before
    (place.root / "data/k-shot-1k-test/SST-2/16-13/train.tsv").write_text("other\n", encoding="utf-8")
    status, _, err = place.run("solvers")
    assert status == 2 and "--output" in err


def test_a_failed_kernel_stops_the_runs_that_share_it_and_is_named(place: Workplace) -> None:
    place.note("fail", "prompt-kernel-sgd/16-13")
    status, out, _ = place.run("solvers")
    assert status == 1 and len(place.calls) == 2
    assert "the run that computes its kernel has failed" in out and "no such luck" in out
    assert "K(A-SignGD), asym" in out  # the rest of the table is there


def test_a_list_and_a_dry_run_say_what_there_is_to_do(place: Workplace) -> None:
    status, out, _ = place.run("solvers", "--list")
    assert status == 0 and not place.calls
    assert "SST-2 K=16, seed 13: K(SGD), logistic\n" in out and "5 to do" in out
    status, out, _ = place.run("solvers", "--dry_run", "--seeds", "13", "42")
    assert status == 0 and len(place.calls) == 5  # one of each kind
    assert "about 5.0 h in all" in out
    assert not (place.output / "solvers.txt").exists()


def test_downloaded_kernels_are_taken_with_the_settings_that_they_need(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    folder = place.root / "result/SST-2-roberta-base-prompt-kernel-published-sgd/16-13"
    folder.mkdir(parents=True)
    kernel = Kernel(1)
    for split in ("train", "dev", "test"):
        torch.save(
            (torch.tensor(kernel.train), torch.tensor(kernel.train_labels)), folder / f"{split}_kernels_sst-2.pt"
        )
    status, out, _ = place.run("main-table", "--model", "roberta-base")
    assert status == 0 and "downloaded kernels were used in 1 folder" in out
    for name in ("kernel-sgd", "kernel-sgd-f0"):
        call = place.calls[f"SST-2/prompt-{name}/16-13"]
        assert f"--load_kernels={folder}" in call and "--binary_classification" in call
    assert "--load_kernels" not in place.calls["SST-2/prompt-kernel-signgd/16-13"]
    status, _, _ = place.run("subsets", "--model", "roberta-base", "--output", "subsets")
    alone = [call for name, call in place.calls.items() if "published" in call and "exclude" in call]
    assert status == 0 and alone == []


def test_downloaded_kernels_are_not_those_of_ones_own_data_and_do_not_replace_finished_runs(place: Workplace) -> None:
    own = place.root / "mine" / "SST-2"
    shutil.copytree(place.root / "data/k-shot-1k-test/SST-2", own)
    words = ("--model", "roberta-base", "--tasks", f"own={own}")
    place.run("main-table", "--model", "roberta-base")
    folder = place.root / "result/SST-2-roberta-base-prompt-kernel-published-sgd/16-13"
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (folder / f"{split}_kernels_sst-2.pt").write_bytes(b"cut")
    status, out, err = place.run("main-table", "--model", "roberta-base", "--list")
    assert status == 0 and " 0 to do" in out
    assert "left out" in err
    status, _, err = place.run("main-table", *words)
    assert status == 0 and "left out" not in err
    assert not any(
        "--load_kernels" in call for name, call in place.calls.items() if name == "own/prompt-kernel-sgd/16-13"
    )


def test_a_mean_over_some_of_the_seeds_is_marked_and_json_is_valid(place: Workplace) -> None:
    place.note("fail", "prompt-kernel-sgd/16-42")
    place.note("scores", "SST-2/prompt-kernel-a-signgd NaN")
    status, out, _ = place.run("solvers", "--seeds", "13", "42")
    assert status == 1 and "[1 of 2]" in out

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (place.output / "solvers.json").read_text(encoding="utf-8")
    rows = json.loads(text, parse_constant=refuse)
    assert {row["seeds"] for row in rows if row["method"] == "kernel-sgd"} == {1}
    assert not [row for row in rows if row["method"] == "kernel-a-signgd"], "a score that is not a number has no row"


def test_a_damaged_or_misdescribed_download_is_left_out_in_one_sentence(place: Workplace) -> None:
    import torch

    from lmntk.storage.paths import RunPaths
    from saved_kernels import save_kernel

    paths = RunPaths(place.root / "result/SST-2-roberta-base-prompt-kernel-published-sgd/16-13", "sst-2")
    files = [paths.kernel(split) for split in ("train", "dev", "test")]
    files[0].parent.mkdir(parents=True)
    kernel = Kernel(1)
    for file in files:
        save_kernel(file, torch.tensor(kernel.train), torch.tensor(kernel.train_labels), {"formula": "sgd"})
    whole = [file.read_bytes() for file in files]
    words = ("main-table", "--model", "roberta-base")
    for damaged, content in ((files[2], b"cut"), (files[0], whole[0] + b"more")):
        damaged.write_bytes(content)
        status, out, err = place.run(*words, "--list")
        assert status == 0 and "K(SGD)" in out
        assert err.count("left out") == 1 and str(damaged) in err
        damaged.write_bytes(whole[files.index(damaged)])
    files[2].write_bytes(b"cut")
    place.run(*words)
    assert not [call for call in place.calls.values() if "kernel-published" in call]


def test_ones_own_folder_beside_the_published_splits_has_no_downloaded_kernels(place: Workplace) -> None:
    splits = place.root / "data/k-shot-1k-test"
    shutil.copytree(splits / "SST-2", splits / "sst-2")
    folder = place.root / "result/sst-2-roberta-base-prompt-kernel-published-sgd/16-13"
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (folder / f"{split}_kernels_sst-2.pt").write_bytes(b"cut")
    words = ("--model", "roberta-base", "--tasks", f"own={splits / 'sst-2'}", "--list")
    status, _, err = place.run("main-table", *words)
    assert status == 0 and "left out" not in err


def test_a_run_without_a_score_is_named_and_every_form_says_how_many_were_asked(place: Workplace) -> None:
    place.note("scores", "SST-2/prompt-kernel-a-signgd/16-42 NaN", "SST-2/prompt-kernel-sgd-svc NaN")
    status, out, _ = place.run("solvers", "--seeds", "13", "42")
    assert status == 0
    named = re.findall(r"^  (SST-2 .*)\n    no score on test that is a number$", out, re.MULTILINE)
    cells = ["13: K(SGD), svc", "42: K(SGD), svc", "42: K(A-SignGD), asym"]
    assert sorted(named) == sorted(f"SST-2 K=16, seed {cell}" for cell in cells)
    rows = json.loads((place.output / "solvers.json").read_text(encoding="utf-8"))
    found = {row["method"]: (row["seeds"], row["seeds_asked"]) for row in rows}
    assert (found["kernel-a-signgd"], found["kernel-sgd"]) == ((1, 2), (2, 2))
    for ending in ("txt", "md", "tex"):
        assert "[1 of 2]" in (place.output / f"solvers.{ending}").read_text(encoding="utf-8")
    with (place.output / "solvers.csv").open(encoding="utf-8", newline="") as file:
        assert {row["seeds_asked"] for row in csv.DictReader(file)} == {"2"}


def test_a_cell_whose_trainings_have_all_diverged_is_named_once(place: Workplace) -> None:
    place.note("scores", "SST-2/prompt-sgd-lr= NaN")
    status, out, _ = place.run("main-table")
    named = re.findall(r"^  (.*)\n    no score on test that is a number$", out, re.MULTILINE)
    assert (status, named) == (0, ["SST-2 K=16, seed 13: SGD fine-tuning"])


HEADER = "table,task,k,method,mean,sd,seeds"


def published(place: Workplace, *lines: str) -> Path:
    place.note("numbers.csv", *lines)
    return place.root / "numbers.csv"


def test_published_numbers_stand_beside_ours_with_the_distance(place: Workplace) -> None:
    place.note("scores", "prompt-kernel-sgd/16-13 0.9", "prompt-kernel-sgd/16-42 0.8")
    rows = ("solvers,sst-2,16,kernel-sgd,80,10,4", "main-table,SST-2,16,kernel-sgd,1,1,1")
    path = published(place, HEADER, *rows)
    status, out, _ = place.run("solvers", "--seeds", "13", "42", "--published", str(path))
    distance = 5 / math.sqrt((100 * math.sqrt(0.005)) ** 2 / 2 + 10**2 / 4)
    assert status == 0
    assert re.search(r"- published +80\.0 \(10\.0\)\n- difference in standard errors +\+0\.7\n", out)
    (row,) = (
        row
        for row in json.loads((place.output / "solvers.json").read_text(encoding="utf-8"))
        if row["method"] == "kernel-sgd"
    )
    assert row["standard_errors"] == pytest.approx(distance) and row["difference"] == pytest.approx(5)
    again = read_published(place.output / "solvers.csv", "solvers", [case_of("SST-2")])
    assert again["SST-2", 16, "kernel-sgd"].mean == pytest.approx(85)


@pytest.mark.parametrize(
    ("lines", "kind", "fact"),
    [
        (("table,task,k,method,sd", "a,b,1,c,1"), FileError, "column mean"),
        ((HEADER, "solvers,sst2,16,kernel-sgd,80,1,5"), UnknownNameError, "line 2: unknown task 'sst2'"),
        ((HEADER, "solvers,SST-2,16,kernel-sdg,80,1,5"), UnknownNameError, "did you mean 'kernel-sgd'"),
        ((HEADER, "solver,SST-2,16,kernel-sgd,80,1,5"), UnknownNameError, "unknown table 'solver'"),
        ((HEADER, "solvers,SST-2,16,kernel-sgd,much,1,5"), FileError, "line 2"),
        ((HEADER, "solvers,SST-2,16,kernel-sgd,nan,1,5"), FileError, "line 2"),
        ((HEADER, "solvers,SST-2,16,kernel-sgd,80,inf,5"), FileError, "line 2"),
        ((HEADER, "solvers,SST-2,16,kernel-sgd,80,nan,5"), FileError, "line 2"),
        ((HEADER, "solvers,SST-2"), UnknownNameError, "line 2: unknown method"),
        ((HEADER, *2 * ["solvers,SST-2,16,kernel-sgd,80,1,5"]), FileError, "line 3.*twice"),
    ],
)
def test_bad_published_numbers_are_refused(place: Workplace, lines: tuple[str, ...], kind: type, fact: str) -> None:
    with pytest.raises(kind, match=fact):
        read_published(published(place, *lines), "solvers", [case_of("SST-2")])


def test_published_numbers_that_are_not_there_are_refused_before_any_run(place: Workplace) -> None:
    status, _, err = place.run("solvers", "--published", "nowhere.csv")
    assert status == 2 and "--published nowhere.csv" in err and not place.calls


def test_a_score_without_a_deviation_has_no_distance() -> None:
    assert math.isnan(Score.of([80.0]).distance(Score(70.0, 1.0, 5)))
    assert str(Score.of([80.0])) == "80.0" and str(Score.of([80.0, 82.0])) == "81.0 (1.4)"


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("--seeds", "7"), ("generate_k_shot_data.py --mode k-shot-1k-test --k 16 --seed 7 --task SST-2",)),
        (("--tasks", "QNLI"), ("generate_k_shot_data.py", "--task QNLI")),
        (("--seeds", "13", "13"), ("--seeds has 13 twice",)),
        (("--jobs", "0"), ("--jobs",)),
        (("--tasks", "sst2"), ("there is no folder",)),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_in_a_sentence(place: Workplace, words: tuple[str, ...], facts: tuple[str, ...]) -> None:
    status, _, err = place.run("solvers", *words)
    assert status == 2 and all(fact in err for fact in facts), err
    assert not place.calls


def test_a_quick_run_takes_the_demos_model_and_data(place: Workplace) -> None:
    def call(*words: str) -> int:
        return command.main(["solvers", "--quick", "--output", str(place.output), *words])

    assert call() == 2
    assert "make demo" in place.capture.readouterr().err
    for task in ("tweets", "film-reviews"):
        for numbers in ("16-13", "16-42"):
            folder = place.root / "data/demo" / task / "k-shot-1k-test/mr" / numbers
            folder.mkdir(parents=True)
            for mode in ("train", "dev", "test"):
                (folder / TASKS["mr"].file_name(mode)).write_text("0,text\n", encoding="utf-8")
    (place.root / ".cache/demo/bert-tiny").mkdir(parents=True)
    assert call() == 0
    assert len(place.calls) == 2 * 2 * 5
    assert {line.split()[5] for line in place.calls.values()} == {str(place.root / ".cache/demo/bert-tiny")}
