"""Leave-one-out metrics and influence of whole runs: files of a run, and questions to its model."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import Workplace, read_results, refusal, sst2_rows
from lmntk.commands import influence as command

LAMBDA = ("--kernel_regularization", "0.1")


@pytest.fixture(scope="module")
def run(place: Workplace) -> Path:
    return place.run(*LAMBDA, "--adjust_for_init", "--kernel_influence", "True", output="influence")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_leave_one_out_are_those_of_the_influence_table(run: Path) -> None:
    table = rows_of(run / "influence_train_sst-2.csv")
    results = read_results(run / "test_results_sst-2.txt")
    assert results["loo_acc"] == np.mean([row["label"] == row["loo_prediction"] for row in table])
    logits = np.array([[float(row["loo_logit_0"]), float(row["loo_logit_1"])] for row in table])
    wanted = np.eye(2)[[int(row["label"]) for row in table]]
    assert results["loo_loss"] == pytest.approx(np.mean((logits - wanted) ** 2), rel=1e-9)
    assert results["gcv"] > 0
    predictions = rows_of(run / "test_predictions_sst-2.csv")
    assert [row["prediction"] for row in rows_of(run / "influence_test_sst-2.csv")] == [
        row["prediction"] for row in predictions
    ]


@pytest.fixture(scope="module")
def with_templates(place: Workplace) -> Path:
    templates = place.folder / "templates.txt"
    templates.write_text("*cls**sent_0*_It_was*mask*.*sep+*\n*cls**sent_0*_So*mask*.*sep+*\n", encoding="utf-8")
    words = ("--mapping", "{'0':'terrible','1':'great'}", "--template_path", str(templates))
    return place.run(*LAMBDA, *words, "--kernel_influence", "True", output="templates")


@pytest.mark.parametrize("name", ["run", "with_templates"])
def test_a_query_is_predicted_as_the_same_text_of_the_test_set(
    name: str, capsys: Any, request: pytest.FixtureRequest
) -> None:
    run, text = request.getfixturevalue(name), sst2_rows(6, "test")[4][0]
    assert command.main([str(run), "--query", text, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = rows_of(run / "test_predictions_sst-2.csv")[4]
    # Tiles of another size sum in another order.
    np.testing.assert_allclose(found["logits"], [float(row["logit_0"]), float(row["logit_1"])], rtol=1e-4)
    added = rows_of(run / "influence_test_sst-2.csv")[4]
    sign = 1 if found["prediction"].startswith(added["label"]) else -1
    for one in found["influence"]:
        assert one["influence"] == pytest.approx(sign * float(added[f"train_{one['index']}"]), rel=1e-3, abs=1e-5)
    assert "--query has 2 sentences" in refusal(capsys, command.main, [str(run), "--query", "two", "texts"])


def test_a_query_to_another_model_than_the_kernels_is_refused(
    place: Workplace, run: Path, capsys: Any, tmp_path: Path
) -> None:
    for file in run.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    record = json.loads((tmp_path / "run_sst-2.json").read_text(encoding="utf-8"))
    changed = record | {"only_biases": True}
    (tmp_path / "run_sst-2.json").write_text(json.dumps(changed), encoding="utf-8")
    assert "grad_dim" in refusal(capsys, command.main, [str(tmp_path), "--query", "a text"])


def test_a_singular_kernel_has_no_metrics_and_the_log_says_what_would_do(place: Workplace, run: Path) -> None:
    lines = (place.data / "train.tsv").read_text(encoding="utf-8").splitlines()
    twice = place.folder / "twice"
    twice.mkdir()
    for split in ("dev", "test"):
        (twice / f"{split}.tsv").write_bytes((place.data / f"{split}.tsv").read_bytes())
    (twice / "train.tsv").write_text("\n".join([*lines, *lines[1:]]) + "\n", encoding="utf-8")
    outcome = place.call(place.argv("--data_dir", str(twice), "--kernel_influence", "True", output="doubled"))
    assert outcome.status == 0, outcome.err
    assert not {"loo_acc", "loo_loss", "gcv"} & read_results(place.folder / "doubled" / "test_results_sst-2.txt").keys()
    told = [line for line in outcome.messages.splitlines() if "is singular" in line]
    assert len(told) == 2 and all("--kernel_regularization 0.001" in line for line in told)
    assert not list((place.folder / "doubled").glob("influence_*"))


def test_other_solvers_have_neither_the_metrics_nor_the_tables(place: Workplace, run: Path) -> None:
    loaded = ("--load_kernels", str(run), "--kernel_solver", "svr")
    outcome = place.call(place.argv(*loaded, "--kernel_influence", "True", output="refused"))
    assert outcome.status == 2 and "--kernel_influence is for --kernel_solver lstsq" in outcome.err
    folder = place.run(*loaded, output="svr")
    assert read_results(folder / "test_results_sst-2.txt").keys() == {"eval_acc", "eval_loss"}


def test_tables_of_an_earlier_run_do_not_stay(place: Workplace, run: Path) -> None:
    loaded = (*LAMBDA, "--load_kernels", str(run), "--adjust_for_init")
    folder = place.run(*loaded, "--kernel_influence", "True", output="again")
    assert rows_of(folder / "influence_train_sst-2.csv") == rows_of(run / "influence_train_sst-2.csv")
    place.run(*loaded, output="again")
    assert not list(folder.glob("influence_*"))


def test_a_query_to_a_run_whose_data_moved_names_the_flag(
    place: Workplace, run: Path, capsys: Any, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run_sst-2.json").read_text(encoding="utf-8")) | {"data_dir": str(tmp_path / "gone")}
    (tmp_path / "run" / "run_sst-2.json").write_text(json.dumps(record), encoding="utf-8")
    argv = [str(tmp_path / "run"), "--query", "a text"]
    told = refusal(capsys, command.main, argv)
    assert "give --data_dir, the folder" in told and "generate_k_shot" not in told
    shutil.copytree(place.data, moved)
    assert command.main([*argv, "--data_dir", str(moved)]) == 0
