"""The forecast from one kernel: subsets against fitting them anew, steps, a training beside it, refusals, tables."""

import csv
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from kernel_folders import SIZES, Folder
from lmntk import solvers
from lmntk.analysis.learning_curve import draw_balanced, learning_curve, usual_ks
from lmntk.analysis.least_squares import read_least_squares
from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.analysis.table_blocks import FORMS
from lmntk.analysis.training_forecast import KernelTraining, RealTraining, StepNumbers, TrainingForecast, learning_rates
from lmntk.commands import forecast as command
from lmntk.errors import FileError, KernelMismatchError, SettingError, UsageError
from lmntk.report import forecast as picture
from lmntk.solvers.problem import SolverSettings, predicted_classes
from lmntk.trainers.base import class_loss
from training_folders import split_of, write_training


def run_of(folder: Folder) -> SavedRun:
    (run,) = read_runs(folder.path)
    return run


@pytest.fixture
def kernel(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path, "kernel", noise=2.0)
    folder.write_untrained_logits()
    folder.record(kernel_regularization=0.01)
    return folder


@pytest.mark.parametrize(("logits", "samples"), [(1, 1), (2, 2), (3, 1)])
def test_a_point_of_the_curve_is_the_mean_of_fits_to_its_subsets(tmp_path: Path, logits: int, samples: int) -> None:
    folder = Folder(tmp_path, logits=logits, noise=2.0, samples=samples, task="sst-2" if logits < 3 else "mnli")
    untrained = folder.write_untrained_logits()
    folder.record(kernel_regularization=0.01, adjust_for_init=True)
    run = read_least_squares(run_of(folder), {})
    (point,) = learning_curve(run, [2], draws=5, seed=3)
    generator, wanted = np.random.default_rng([3, 2]), []
    for _ in range(5):
        rows = draw_balanced(folder.classes["train"], 2, generator)
        rows = np.concatenate([rows + SIZES["train"] * sample for sample in range(samples)])
        train = folder.kernel("train")[np.ix_(rows, range(logits), rows, range(logits))]
        settings = SolverSettings(regularization=0.01)
        fitted = solvers.fit("lstsq", train, folder.labels("train")[rows], settings, untrained["train"][rows])
        found = fitted.predict(folder.kernel("test")[rows], folder.labels("test"), untrained["test"]).logits
        mean = found.reshape(samples, SIZES["test"], logits).mean(axis=0)
        wanted.append(float(np.mean(predicted_classes(mean) == folder.classes["test"])))
    assert point.draws == 5 and point.scores["test"].mean == pytest.approx(np.mean(wanted), rel=1e-12)
    assert point.scores["test"].deviation == pytest.approx(np.std(wanted, ddof=1), rel=1e-12)
    assert point.scores["test"].high == pytest.approx(np.percentile(wanted, 97.5), rel=1e-12)


def test_all_examples_are_one_draw_with_the_scores_and_left_out_numbers_of_the_run(kernel: Folder) -> None:
    run = read_least_squares(run_of(kernel), {})
    (point,) = learning_curve(run, [4], draws=7, seed=0)
    assert point.draws == 1 and np.isnan(point.scores["dev"].deviation)
    assert point.scores["test"].mean == run.score("test", run.predict("test"))
    assert point.left_out_score.mean == run.score("train", run.problem.leave_one_out())
    assert point.gcv.mean == pytest.approx(run.problem.gcv(), rel=1e-12)
    assert usual_ks(4) == [1, 2, 4]


def test_the_draws_of_one_k_do_not_depend_on_which_others_are_asked_for(kernel: Folder) -> None:
    run = read_least_squares(run_of(kernel), {})
    assert learning_curve(run, [1, 2], 4, 0)[1] == learning_curve(run, [2], 4, 0)[0]
    assert learning_curve(run, [2], 40, 0) != learning_curve(run, [2], 40, 1)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_rates_of_the_steps_are_those_of_the_trainers_schedule(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    wanted = []
    for _ in range(8):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    record = {"learning_rate": 0.5, "lr_scheduler_type": schedule, "warmup_steps": warmup, "max_steps": 10}
    assert learning_rates(record, 8) == pytest.approx(wanted, rel=1e-12)


def test_the_best_step_is_the_one_with_the_best_dev_score_and_of_these_the_least_loss() -> None:
    dev = [(0.5, 1.0), (0.75, 0.9), (0.75, 0.8), (0.5, 0.7)]
    steps = [StepNumbers(step, {"dev": loss}, {"dev": score}) for step, (score, loss) in enumerate(dev)]
    found = TrainingForecast("squared_error", [0.1] * 3, 1.0, steps)
    assert found.best is not None and found.least_loss is not None
    assert (found.best.step, found.least_loss.step) == (2, 3)


def trained(kernel: Folder, rate: float, **record: Any) -> SavedRun:
    """A training whose every step is that of descent on the kernel."""
    training = KernelTraining.of_run(run_of(kernel))
    alpha = training.training.descent("squared_error", [rate] * 4)
    snapshots = {}
    for step in (0, 1, 4):
        splits = {}
        for split in SIZES:
            flat = kernel.kernel(split).reshape(alpha[0].size, -1)
            logits = (alpha[step].reshape(-1) @ flat).reshape(SIZES[split], -1)
            splits[split] = split_of(kernel.classes[split], logits + training.run.untrained_logits(split))
        snapshots[step] = (splits, None)
    facts = {"l2_loss": True, "learning_rate": rate, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    facts |= {"per_device_train_batch_size": 8, "max_steps": 4, "data_dir": None, "dropout": {}}
    return write_training(kernel.path.parent / "training", snapshots, **{**facts, **record})


def test_a_training_by_the_kernels_steps_lies_on_its_forecast(kernel: Folder, tmp_path: Path) -> None:
    rate = 0.5 * KernelTraining.of_run(run_of(kernel)).stable_steps.squared_error
    real = trained(kernel, rate)
    found = call(kernel.path, "--training", str(real.folder), "--discrete", "--format", "json")
    (forecast,) = found["forecasts"]
    assert forecast["loss"] == "squared_error" and forecast["learning_rates"] == [rate] * 4
    by_step = {step["step"]: step for step in forecast["steps"]}
    assert [step["step"] for step in found["training"]] == [0, 1, 4] and found["remarks"] == []
    for step in found["training"]:
        assert step["losses"] == pytest.approx(by_step[step["step"]]["losses"], rel=1e-9)
        assert step["scores"] == by_step[step["step"]]["scores"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"optimizer": "adam"}, "was trained with adam"),
        ({"optimizer_variant": "signgd"}, "was trained with signgd"),
        ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type=cosine`"),
    ],
)
def test_a_training_whose_steps_the_kernel_does_not_predict_is_refused(
    kernel: Folder, record: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        RealTraining.of_run(trained(kernel, 0.01, **record), run_of(kernel))


def test_what_a_trainings_steps_do_otherwise_is_remarked(kernel: Folder) -> None:
    others = {"processes": 3, "dropout": {"dropout": 0.1, "hidden": 0.25}}
    real = trained(kernel, 0.01, per_device_train_batch_size=2, max_grad_norm=1.0, weight_decay=0.1, **others)
    found = RealTraining.of_run(real, run_of(kernel)).remarks
    assert "6 of 8 examples" in found[0] and "norm 1" in found[1] and "weight decay" in found[2]
    assert "draws dropout (0.1, 0.25)" in found[3] and len(found) == 4


@pytest.mark.parametrize(("trainer", "said"), [("standard", 1), ("linearised", 0)])
def test_dropout_that_is_not_recorded_is_said_to_be_unknown(kernel: Folder, trainer: str, said: int) -> None:
    found = RealTraining.of_run(trained(kernel, 0.01, dropout=None, trainer=trainer), run_of(kernel)).remarks
    assert sum("dropout is not recorded" in remark for remark in found) == said == len(found)


@pytest.mark.parametrize("squared", [False, True])
def test_losses_are_means_over_prompts_and_scores_those_of_mean_logits(tmp_path: Path, squared: bool) -> None:
    folder = Folder(tmp_path, "kernel", noise=2.0, samples=3)
    untrained = folder.write_untrained_logits()
    folder.record(kernel_regularization=0.01)
    loss = "squared_error" if squared else "cross_entropy"
    start = KernelTraining.of_run(run_of(folder)).forecast(loss, [1e-9], discrete=True).steps[0]
    for split, logits in untrained.items():
        labels = torch.from_numpy(folder.labels(split))
        of_trainer = class_loss(torch.from_numpy(logits), labels, squared).item()
        assert start.losses[split] == pytest.approx(of_trainer, rel=1e-12)
        means = logits.reshape(3, SIZES[split], -1).mean(axis=0)
        assert start.scores[split] == np.mean(predicted_classes(means) == folder.classes[split])
    means = {split: split_of(folder.classes[split], logits.reshape(3, SIZES[split], -1).mean(axis=0))
             for split, logits in untrained.items()}  # fmt: skip
    facts = {"learning_rate": 0.1, "l2_loss": squared, "data_dir": None, "dropout": {}}
    facts["template"] = ["*cls**sent_0*_It_was*mask*.*sep+*"] * 3
    real = write_training(tmp_path / "real", {0: (means, None)}, descriptions={0: {"train_loss": 1.5}}, **facts)
    of_run = RealTraining.of_run(real, run_of(folder))
    assert of_run.steps[0].losses == {"train": 1.5} and {*of_run.steps[0].scores} == {*SIZES}
    assert "real losses of dev and test are missing" in of_run.remarks[-1]


def test_a_run_of_train_alone_is_drawn_without_a_warning(kernel: Folder, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        for path in kernel.path.glob(f"{split}_*"):
            path.unlink()
    figure = tmp_path / "f.png"
    with warnings.catch_warnings(action="error"):
        assert command.main([str(kernel.path), "--draws", "2", "--steps", "3", "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_kernel_of_signgd_has_a_curve_and_no_steps(kernel: Folder, tmp_path: Path) -> None:
    for path in kernel.path.glob("*_kernels_*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "formula": "signgd"}))
    found = call(kernel.path, "--format", "json", "--draws", "2")
    assert len(found["curve"]) == 3 and found["forecasts"] == [] and found["stable_steps"] is None
    assert "--kernel_formula signgd" in found["remarks"][0]
    with pytest.raises(KernelMismatchError, match="needs `kernel_formula=sgd`"):
        command._show(command.make_parser().read([str(kernel.path), "--learning_rate", "0.1"]))


def test_without_f0_there_is_a_curve_and_a_remark(kernel: Folder) -> None:
    (kernel.path / "dev_logits_sst-2.pt").unlink()
    found = call(kernel.path, "--format", "json", "--draws", "2")
    assert len(found["curve"]) == 3 and found["forecasts"] == []
    assert "dev_logits_sst-2.pt is missing" in found["remarks"][0]


def test_a_kernel_of_another_prompt_is_not_shown_beside_the_curve(kernel: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path, "other")
    for path in other.path.glob("*_kernels_*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "mapping": {"0": "bad", "1": "good"}}))
    with pytest.raises(KernelMismatchError, match="`mapping`"):
        command._show(command.make_parser().read([str(kernel.path), "--draws", "2", "--kernel_runs", str(other.path)]))


def call(folder: Path, *flags: str) -> Any:
    """What the command writes."""
    output = folder.parent / "forecast"
    assert command.main([str(folder), "--draws", "2", *flags, "--output", str(output)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_command_says_all_forms_and_draws_the_figure(
    kernel: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture.plots, "as_png", lambda *draws, **settings: b"a picture")
    argv = [str(kernel.path), "--draws", "3", "--steps", "12", "--kernel_runs", str(kernel.path)]
    written = {}
    for form in FORMS:
        assert command.main([*argv, "--format", form, "--figure", str(tmp_path / "f.png")]) == 0
        written[form] = capsys.readouterr().out
    assert (tmp_path / "f.png").read_bytes() == b"a picture"
    rows = list(csv.DictReader(io.StringIO(written["csv"])))
    counts = {part: sum(row["part"] == part for row in rows) for part in dict.fromkeys(row["part"] for row in rows)}
    assert counts == {"curve": 3, "kernel": 1, "stable_step": 3, "forecast": 2 * 13}
    assert "exact: above it training diverges" in written["text"] and "step 10" in written["markdown"]


@pytest.mark.parametrize(
    ("change", "flags", "error", "words"),
    [
        (lambda path: (path / "test_logits_sst-2.pt").unlink(), ["--steps", "9"], FileError, "training starts"),
        (lambda path: None, ["--k", "2,5"], SettingError, "`k=5`: the rarest class has 4"),
        (lambda path: None, ["--k", "0"], SettingError, "`k=0`: the rarest class has 4"),
        (lambda path: None, ["--draws", "0"], SettingError, "`draws`"),
        (lambda path: None, ["--learning_rate", "0"], SettingError, "`learning_rate`"),
        (lambda path: None, ["--k", "4,,8"], UsageError, "such as 4,8,16"),
        (lambda path: None, ["--figure", "f.pdf"], SettingError, "PNG"),
        (lambda path: None, ["--kernel_solver", "svr"], UsageError, "lstsq"),
    ],
)
def test_what_cannot_be_forecast_is_refused_in_a_sentence(
    kernel: Folder, change: Callable[[Path], None], flags: list[str], error: type[UsageError], words: str
) -> None:
    change(kernel.path)
    with pytest.raises(error, match=words):
        command._show(command.make_parser().read([str(kernel.path), *flags]))


def test_a_kernel_that_is_singular_without_an_example_has_a_forecast_without_leave_one_out(
    kernel: Folder, capsys: Any
) -> None:
    kernel.write("train", np.fliplr(np.eye(16)).copy().reshape(8, 2, 8, 2))
    kernel.record(kernel_regularization=0.0)
    (point,) = learning_curve(read_least_squares(run_of(kernel), {}), [4], draws=1, seed=0)
    assert np.isnan([point.left_out_score.mean, point.left_out_loss.mean, point.gcv.mean]).all()
    assert 0 <= point.scores["test"].mean <= 1
    assert command.main([str(kernel.path), "--k", "4"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Leave-one-out and GCV are missing" in printed and "a larger --kernel_regularization" in printed


def test_the_table_has_no_gcv_where_an_example_has_several_prompts(tmp_path: Path, capsys: Any) -> None:
    folder = Folder(tmp_path, noise=2.0, samples=2)
    folder.record(kernel_regularization=0.01)
    assert command.main([str(folder.path), "--k", "4"]) == 0
    head, *rest = capsys.readouterr().out.splitlines()
    assert "leave-one-out loss" in head and "GCV" not in head
    assert any("GCV is left out" in line for line in rest)
