"""lmntk validate with real trainings of a tiny model: on halves of the train examples, with a warm worker."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from command_line import Workplace
from lmntk.commands import validate

pytestmark = pytest.mark.slow


def test_two_halves_are_trained_and_compared_with_the_kernel_of_the_run(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("NUM_GPU", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = place.run("--kernel_regularization", "0.1", "--seed", "13")
    settings = ["--learning_rates", "0.5", "--max_steps", "3", "--batch_size", "2", "--format", "json"]
    picture = place.folder / "validation.png"
    capsys.readouterr()
    assert validate.main([str(run), "--subsets", "2", "--seed", "1", *settings, "--figure", str(picture)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert content["outputs"]["trained"][0] != content["outputs"]["trained"][1]
    rows = (place.data / "train.tsv").read_text(encoding="utf-8").splitlines()
    half = place.folder / "half"
    half.mkdir()
    kept = [0, *(1 + index for index in content["subsets"][1])]
    (half / "train.tsv").write_text("".join(f"{rows[index]}\n" for index in kept), encoding="utf-8")
    for split in ("dev", "test"):
        (half / f"{split}.tsv").write_bytes((place.data / f"{split}.tsv").read_bytes())
    words = ("--data_dir", str(half), "--per_device_train_batch_size", "2", "--save_strategy", "no", "--seed", "13")
    length = ("--optimizer", "sgd", "--learning_rate", "0.5", "--max_steps", "3")
    trained = place.run("--trainer", "standard", *length, *words, output="trained")
    np.testing.assert_allclose(content["outputs"]["trained"][1], margins(trained), rtol=1e-5, atol=1e-6)
    solved = place.run("--kernel_regularization", "0.1", *words[:2], output="solved")
    np.testing.assert_allclose(content["outputs"]["re-solving"][1], margins(solved), rtol=1e-4, atol=1e-5)


def margins(run: Path) -> list[float]:
    with (run / "test_predictions_sst-2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(float(row["logit_1"]) - float(row["logit_0"])) * (2 * int(row["label"]) - 1) for row in rows]
