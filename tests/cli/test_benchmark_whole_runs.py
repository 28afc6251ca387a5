"""tools/benchmark_kernels.py --whole_runs: whole programs of two checkouts, in turn."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import benchmark_kernels
from benchmarks import whole_runs
from benchmarks.checkouts import Side, Usage, compare_kernels
from benchmarks.whole_runs import OTHER, OURS, Given, measure_further_runs, summarize, table_row


def given(tmp_path, seeds=("42", "13")):
    for seed in seeds:
        (tmp_path / "SST-2" / f"16-{seed}").mkdir(parents=True, exist_ok=True)
    data = tmp_path / "SST-2" / f"16-{seeds[0]}"
    return Given(tmp_path / "model", "SST-2", data, tmp_path / "demo-model", tmp_path / "demo-data")


def fake_checkout(folder: Path) -> Path:
    """A checkout whose run.py only prints."""
    (folder / "src" / "lmntk").mkdir(parents=True)
    (folder / "run.py").write_text("print('usage: run.py')\n", encoding="utf-8")
    return folder


def make_side(tmp_path, name="ours"):
    (tmp_path / name / "work").mkdir(parents=True)
    return Side(name, tmp_path / name, tmp_path / name / "work")


def test_the_ratio_is_that_of_the_medians_ours_by_the_other():
    usages = {OURS: [Usage(3, 4), Usage(1, 2), Usage(2, 9)], OTHER: [Usage(5, 8), Usage(4, 8), Usage(90, 8)]}
    row = summarize("run", usages, "same bytes")
    assert row["medians"] == {OURS: {"wall": 2, "cpu": 4}, OTHER: {"wall": 5, "cpu": 8}}
    assert row["ratios"] == {"wall": 0.4, "cpu": 0.5}
    cells = table_row(row)
    assert (cells["seconds, ours"], cells["seconds, other"], cells["seconds, ratio"]) == ("2.00", "5.00", "0.40")
    assert (cells["CPU seconds, ratio"], cells["kernels"], cells["target"]) == ("0.50", "same bytes", "≤ 0.5×")


def test_a_program_that_one_side_lacks_has_no_ratio():
    row = summarize("lmntk-help", {OURS: [Usage(1, 1)], OTHER: []}, "")
    assert row["ratios"] == {}
    assert "seconds, other" not in table_row(row)


def test_a_further_run_of_a_grid_takes_what_the_others_take_by_their_number(tmp_path, monkeypatch):
    """Of two seeds, two formulas and another solver, the first run counts alone."""
    side, grids = make_side(tmp_path), []

    def timed(self, command):
        grid = json.loads(Path(command[-1]).read_text(encoding="utf-8"))
        grids.append(grid)
        number = sum(len(one["SEED"]) * 2 if isinstance(one["SEED"], list) else 1 for one in grid)
        for run in range(number):
            folder = self.root / "result" / str(run)
            folder.mkdir(parents=True)
            (folder / "test_results_sst-2.txt").touch()
        return Usage(10 + 2 * number, 20 + 3 * number)

    monkeypatch.setattr(Side, "timed", timed)
    assert measure_further_runs(side, given(tmp_path)) == Usage(2, 3)
    first = {"TAG": "whole-runs", "TASK": "SST-2", "K": "16", "MODEL": str(tmp_path / "model"), "TRAINER": "kernel"}
    first |= {"SEED": "42", "kernel_formula": "sgd", "kernel_solver": "lstsq"}
    assert grids[0] == [first]
    assert grids[1][0] == first | {"SEED": ["42", "13"], "kernel_formula": ["sgd", "signgd"]}
    assert grids[1][1] == first | {"kernel_solver": "svr"}


def test_kernel_files_of_both_sides_are_compared(tmp_path):
    sides = [make_side(tmp_path, name) for name in (OURS, OTHER)]
    kernel = torch.tensor([[-4.0, 2.0]], dtype=torch.float64)
    for side in sides:
        (side.work / "run").mkdir()
        torch.save((kernel, torch.zeros(1)), side.work / "run" / "dev_kernels_sst-2.pt")
        torch.save({}, side.work / "run" / "dev_layer_kernels_sst-2.pt")
        side.keep_kernels(side.work)
    assert compare_kernels(*sides) == "same bytes"
    torch.save((kernel + 1e-3, torch.zeros(1)), sides[0].work / "run" / "dev_kernels_sst-2.pt")
    assert compare_kernels(*sides) == "2.5e-04"
    sides[1].kernels.pop("run/dev_kernels_sst-2.pt")
    assert compare_kernels(*sides) == ""


def test_other_processes_compute_while_a_busy_run_is_measured(tmp_path, monkeypatch):
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(whole_runs, "measure_run", lambda *_: [process.poll() for process in started])
    assert whole_runs.measure_busy_run(make_side(tmp_path), given(tmp_path)) == [None] * whole_runs.NUM_BUSY
    assert [process.poll() for process in started] == [-signal.SIGKILL] * whole_runs.NUM_BUSY


def test_help_texts_of_two_checkouts_are_measured_as_processes(tmp_path, capsys):
    other, file = fake_checkout(tmp_path / "older"), tmp_path / "measurements.json"
    flags = ["--jobs", "help", "lmntk-help", "--repeat", "1", "--against", str(other), "--json", str(file)]
    assert benchmark_kernels.main(["--whole-runs", *flags]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["job"] for row in rows] == ["help", "lmntk-help"]
    assert all(row["medians"][OURS]["wall"] > 0 for row in rows)
    medians = rows[0]["medians"]
    assert rows[0]["ratios"]["wall"] == pytest.approx(medians[OURS]["wall"] / medians[OTHER]["wall"])
    assert rows[1]["runs"][OTHER] == [] and rows[1]["ratios"] == {}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"2 programs (help, lmntk-help), 1 run of each, in turn with those of {other}; about ")
    assert [line.split()[1] for line in printed[3:]] == ["help", "lmntk-help"]
    assert sorted(path.name for path in other.rglob("*")) == ["lmntk", "run.py", "src"], "nothing is written there"


def test_a_program_that_fails_is_named_with_its_last_lines(tmp_path, capsys):
    other = fake_checkout(tmp_path / "older")
    (other / "run.py").write_text("raise SystemExit('no such thing')\n", encoding="utf-8")
    flags = ["--jobs", "help", "--repeat", "1", "--against", str(other)]
    assert benchmark_kernels.main(["--whole_runs", *flags]) == 2
    error = capsys.readouterr().err
    assert "other: `" in error and "run.py --help` ended with 1" in error and "no such thing" in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--jobs", "run"], "--whole_runs needs --model and --data_dir"),
        (["--jobs", "run", "--model", "no/such", "--data_dir", "d"], "--model: there is no folder no/such"),
        (["--jobs", "demo", "--demo_model", "no/such"], "--demo_model: there is no folder no/such"),
        (["--jobs", "help", "--against", "."], "is not a checkout of this project"),
        (["--jobs", "help", "--repeat", "0"], "--repeat is 0, but it must be 1 or more"),
        (["--jobs", "help", "--json", "no/such/file.json"], "--json: there is no folder"),
        (["--jobs", "sleep"], "argument --jobs: invalid choice: 'sleep'"),
    ],
)
def test_wrong_flags_of_whole_runs_are_reported_before_anything_runs(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Side, "timed", lambda *_: pytest.fail("measured"))
    assert benchmark_kernels.main(["--whole_runs", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_every_program_to_measure_has_a_purpose_and_a_time():
    assert set(whole_runs.WHOLE_RUNS) >= {"run", "busy", "grid", "solver", "demo", "help"}
    assert all(job.purpose and job.seconds > 0 for job in whole_runs.WHOLE_RUNS.values())
