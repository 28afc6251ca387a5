"""tools/check_gpu.sh: the check of a CUDA card, here in tiny shapes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import check_gpu
from benchmarks.gpu_sections import ALLOWED_ERROR, SECTIONS, ModelMeasurements, Recorder, Settings, check_exactness
from lmntk.kernels import ENGINES, FORMULAS

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("tiny-bert", "tiny-roberta", "tiny-gpt2", "tiny-llama")


def run_here(name, settings):
    """`check_gpu.run_section` in this process."""
    rows = []
    SECTIONS[name][0](settings, rows.append)
    return rows


@pytest.mark.slow
def test_the_check_measures_every_section_and_finds_all_engines_exact(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_gpu, "run_section", run_here)
    file = tmp_path / "check.json"
    assert check_gpu.main(["--cpu", "--tiny", "--json", str(file)]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = report["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(SECTIONS)
    assert [row for row in rows if "note" in row] == [], "nothing failed, and there was time"
    exactness = [row for row in rows if "exact" in row]
    expected = {(model, engine, formula) for model in ARCHITECTURES for engine in ENGINES for formula in FORMULAS}
    assert {(row["model"], row["engine"], row["formula"]) for row in exactness} == expected
    for row in exactness:
        assert row["exact"] and row["relative_error"] <= (1e-3 if FORMULAS[row["formula"]].signed else ALLOWED_ERROR)
    for section, sizes in (("RoBERTa-base", {4, 8}), ("Llama 1.2 B", {4})):
        measured = [row for row in rows if row["section"] == section and "seconds_per_pair" in row]
        found = {(row["engine"], row["precision"], row["n_train"]) for row in measured}
        engines = [(engine, 4) for engine in ("published", "jacobian")] + [("factored", size) for size in sizes]
        assert found == {(engine, how, size) for engine, size in engines for how in ("float32", "TF32")}
        published = measured[0]["seconds_per_pair"]
        for row in measured:
            assert row["seconds_per_pair"] == pytest.approx(row["seconds"] / (row["n_train"] * row["n_x"]))
            assert row["speedup_over_published"] == pytest.approx(published / row["seconds_per_pair"])
            assert row.get("fallback_parameters", []) == []
            assert row["roofline_fraction"] > 0 and row["peak_memory_gb"] > 0
            # On the CPU, TF32 is float32.
            assert row["n_train"] == 8 or row["relative_error"] <= ALLOWED_ERROR
        stages = [row["seconds_by_stage"] for row in rows if row["section"] == section and "seconds_by_stage" in row]
        assert len(stages) == len(sizes) and all(found["propagation"] > 0 for found in stages)
    assert torch.get_float32_matmul_precision() == "high", "the last measurements allow TF32"
    table = capsys.readouterr().out
    assert table.count("\n| exactness ") == len(exactness) + 1
    assert table.endswith(f"The same as JSON: {file}\n")


@pytest.fixture(autouse=True)
def _usual_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_a_row_that_fails_names_its_cause_and_the_others_go_on():
    rows = []
    recorder = Recorder(Settings("cpu", True, 60), rows.append, "some")

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    assert not recorder.measure({"engine": "jvp"}, fail)
    assert recorder.measure({"engine": "factored"}, lambda: {"seconds": 1.0})
    assert rows[0] == {"section": "some", "engine": "jvp", "note": "OutOfMemoryError: CUDA out of memory"}
    assert rows[1]["seconds"] == 1.0 and rows[1]["peak_memory_gb"] > 0


def test_a_device_that_is_not_there_fails_row_by_row():
    rows = []
    check_exactness(Settings("cuda:7", True, 60), rows.append)
    assert len(rows) == 1 + len(ARCHITECTURES) * len(FORMULAS)
    assert all(row["note"] for row in rows)


def test_rows_for_which_no_time_is_left_are_not_measured():
    rows = []
    recorder = Recorder(Settings("cpu", True, 0), rows.append, "some")
    assert not recorder.measure({"engine": "jvp"}, lambda: pytest.fail("measured"))
    assert rows == [{"section": "some", "engine": "jvp", "note": "no time was left"}]


@pytest.mark.parametrize(("left", "sampled"), [(1e6, 4), (1e-9, 1)])
def test_as_many_tiles_are_measured_as_the_time_allows(left, sampled, monkeypatch):
    settings = Settings("cpu", True, 60)
    monkeypatch.setattr(Recorder, "left", left)
    measurements = ModelMeasurements(settings, Recorder(settings, print, "some"), "tiny-roberta", False, 2)
    measurements.load()
    monkeypatch.setattr("benchmarks.gpu_sections.make_engine", small_tiles)
    row = measurements.measure("factored", "K = 16")
    assert (row["tiles"], row["sampled_tiles"], row["sampled"]) == (4, sampled, sampled < 4)
    assert row["seconds"] > 0


def small_tiles(job, engine, problem):
    from lmntk.kernels.tiling import TileRequest

    made = ENGINES[engine](problem, job.budget)
    plan = made.planner.plan
    made.planner.plan = lambda tiles, processes: plan(TileRequest(column=3), processes)
    return made


def test_a_section_is_stopped_when_its_time_is_over():
    rows = check_gpu.run_section("exactness", Settings("cpu", True, 1 - check_gpu.GRACE_SECONDS))
    assert rows[-1] == {"section": "exactness", "note": "stopped: its time was over"}


def test_an_engine_that_is_not_exact_fails_the_check(tmp_path, monkeypatch, capsys):
    rows = [{"section": "exactness", "engine": "jvp", "relative_error": 0.1, "exact": False}]
    monkeypatch.setattr(check_gpu, "run_section", lambda name, settings: list(rows))
    assert check_gpu.main(["--cpu", "--tiny", "--json", str(tmp_path / "check.json")]) == 1
    assert "NOT EXACT" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_machine_without_a_card_is_reported_in_a_sentence(capsys):
    assert check_gpu.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: torch ") and "finds no CUDA device" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--minutes", "0"], "--minutes is 0.0, but it must be 0.5 or more"),
        (["--json", "no/such/file.json"], "--json: there is no folder"),
    ],
)
def test_wrong_flags_of_the_check_are_reported_before_anything_runs(flags, sentence, capsys, monkeypatch):
    monkeypatch.setattr(check_gpu, "run_section", lambda *_: pytest.fail("measured"))
    assert check_gpu.main(["--cpu", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_the_script_names_an_interpreter_that_is_missing_or_lacks_packages(tmp_path):
    script = ["bash", str(ROOT / "tools" / "check_gpu.sh"), "--cpu"]
    found = subprocess.run(script, env=os.environ | {"PYTHON": "no-such-python"}, capture_output=True, text=True)
    assert found.returncode == 2 and "there is no no-such-python: set PYTHON" in found.stderr
    bare = tmp_path / "python"
    bare.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    found = subprocess.run(script, env=os.environ | {"PYTHON": str(bare)}, capture_output=True, text=True)
    assert found.returncode != 0 and "lacks numpy, pandas," in found.stderr and "Traceback" not in found.stderr
