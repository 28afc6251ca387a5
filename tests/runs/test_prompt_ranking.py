"""Prompts ranked by their kernels: which prompts and runs there are, and the numbers of each, from kernels on disk."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from kernel_folders import Folder
from lmntk import solvers
from lmntk.analysis.prompt_ranking import PromptNumbers, agreement_with_test, prompt_numbers, ranked
from lmntk.analysis.saved_run import read_runs
from lmntk.commands import prompts as command
from lmntk.data.tasks import TASKS
from lmntk.errors import FileError, SettingError, TemplateError, UsageError
from lmntk.report import prompts as picture
from lmntk.runs import processes
from lmntk.runs.processes import Outcome
from lmntk.runs.prompt_plan import Prompt, PromptRun, PromptSources
from lmntk.storage.atomic import write_text
from lmntk.storage.paths import RunPaths

OWN = TASKS["SST-2"]
SIMPLY = "*cls**sent_0*_Simply*mask*.*sep+*"


def words_of(mapping: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(mapping.items())


def test_every_template_goes_with_every_mapping_and_pairs_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"0.9\t{SIMPLY}\t{{'1': 'good', '0': 'bad'}}\n0.8\t*sent_0**mask*\t{{'0': 'a', '1': 'b'}}\n")
    sources = PromptSources([SIMPLY, OWN.template], ["{0: 'bad', 1: 'good'}"], prompt_path=str(file), top=1)
    bad, own = words_of({"0": "bad", "1": "good"}), words_of(dict(OWN.mapping))
    assert sources.prompts("sst-2") == [
        *(Prompt(OWN.template, own), Prompt(OWN.template, bad), Prompt(SIMPLY, own), Prompt(SIMPLY, bad))
    ], "the pair of the file is there already, with its labels in the order of the logits"
    alone = PromptSources(prompt_path=str(file), own=False).prompts("SST-2")
    assert [prompt.short_words for prompt in alone] == ["bad / good", "a / b"]
    assert len({prompt.name for prompt in alone}) == 2


@pytest.mark.parametrize(
    ("sources", "error", "words"),
    [
        (PromptSources(own=False), SettingError, "there is no prompt"),
        (PromptSources(["*sent_0*"], own=True), TemplateError, "no \\*mask\\*"),
        (PromptSources(mappings=["{0: 'bad'}"]), SettingError, "no word for"),
        (PromptSources(template_path="nowhere.txt"), FileError, "nowhere.txt"),
    ],
)
def test_a_prompt_that_no_run_could_take_is_refused_before_any_run(
    sources: PromptSources, error: type[UsageError], words: str
) -> None:
    with pytest.raises(error, match=words):
        sources.prompts("SST-2")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line of two prompts; its runs are written, not run: the word *good* is worth more than *great*."""
    for seed in (13, 42):
        for split in ("train", "dev", "test"):
            path = tmp_path / "SST-2" / f"16-{seed}" / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("sentence\tlabel\nfine\t1\n", encoding="utf-8")

    def run_all(runs: Sequence[PromptRun], jobs: int, progress: object) -> Outcome[PromptRun]:
        (tmp_path / "done").write_text("\n".join(str(run) for run in runs))
        for run in runs:
            good = "good" in run.cell.prompt.mapping
            folder = Folder(run.folder.parent, run.folder.name, noise=0.5 if good else 3.0, seed=run.cell.seed)
            folder.write_untrained_logits()
            folder.record(kernel_regularization=0.01)
            write_text(RunPaths(run.folder, "sst-2").metrics("dev"), "eval_acc = 0.5\n")
            write_text(run.folder / processes.STAMP, run.stamp)
        return Outcome(len(runs), [], [])

    monkeypatch.setattr(command, "run_all", run_all)
    (tmp_path / "model").mkdir()
    return [
        f"films={tmp_path / 'SST-2'}", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"),
        "--seeds", "13", "42", "--mappings", "{0: 'bad', 1: 'good'}",
    ]  # fmt: skip


def test_the_table_has_the_means_over_seeds_of_each_prompts_own_kernels(
    place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*place, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["prompts"]
    assert [prompt["words"] for prompt in found] == ["bad / good", "terrible / great"]
    assert len([*(tmp_path / "out" / "films").glob("prompt-*/16-*/train_kernels_sst-2.pt")]) == 4
    _, runs = plan_of(place).runs.values()
    kernels = [Folder(tmp_path / "again" / str(run.cell.seed), noise=0.5, seed=run.cell.seed) for run in runs]
    loo, dev = [], []
    for kernel in kernels:
        train, labels = kernel.kernel("train"), kernel.labels("train")
        ridge = 0.01 * np.linalg.norm(train.reshape(16, 16), 2) * np.eye(16).reshape(8, 2, 8, 2)
        fitted = solvers.fit("lstsq", train + ridge, labels, solvers.SolverSettings())
        dev.append(np.mean(fitted.predict(kernel.kernel("dev"), kernel.labels("dev")).logits.argmax(axis=1)
                           == kernel.classes["dev"]))  # fmt: skip
        right = []
        for out in range(8):
            rest = np.delete(np.arange(8), out)
            part = solvers.fit("lstsq", (train + ridge)[np.ix_(rest, [0, 1], rest, [0, 1])], labels[rest],
                               solvers.SolverSettings())  # fmt: skip
            logits = part.predict(train[rest][:, :, [out]], labels[[out]]).logits
            right.append(logits.argmax() == labels[out])
        loo.append(np.mean(right))
    assert found[0]["loo"] == pytest.approx(np.mean(loo), rel=1e-12)
    assert found[0]["dev"] == pytest.approx(np.mean(dev), rel=1e-12)


def plan_of(argv: list[str]) -> "command.PromptPlan":
    return command._make_plan(command.PromptsParser().read(argv))


def test_what_is_done_is_not_done_again_and_every_form_is_written(
    place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(place) == 0
    assert len((tmp_path / "done").read_text().splitlines()) == 4
    first = capsys.readouterr().out
    assert "2 prompts, 4 runs below" in first and "0 done already, 4 to do" in first
    assert command.main([*place, "--templates", SIMPLY]) == 0
    assert len((tmp_path / "done").read_text().splitlines()) == 4, "two prompts more, two seeds each"
    out = tmp_path / "out" / "films"
    assert {path.suffix for path in out.glob("prompts.*")} == {".txt", ".md", ".tex", ".csv", ".json"}
    rows = list(csv.DictReader(io.StringIO((out / "prompts.csv").read_text(encoding="utf-8"))))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]


def test_a_run_gets_its_prompt_and_predicts_test_only_if_asked(place: list[str]) -> None:
    runs = plan_of([*place, "--", "--binary_classification"]).runs
    flags = next(iter(runs.values()))[0].flags
    assert flags[-1] == "--binary_classification" and "--do_predict=False" in flags and "--do_eval=True" in flags
    assert f"--template={OWN.template}" in flags and f"--mapping={dict(OWN.mapping)}" in flags
    (run, *_) = next(iter(plan_of([*place, "--with_test"]).runs.values()))
    assert "--do_predict=True" in run.flags and run.evaluated == ("dev", "test")
    assert len({run.stamp for of_prompt in runs.values() for run in of_prompt}) == 4


def numbers(**values: float) -> PromptNumbers:
    return PromptNumbers("t", "w", **{**dict.fromkeys(command.RANKINGS, 0.5), "test": 0.5, **values})


def test_prompts_stand_in_the_order_of_the_number_and_of_the_left_out_loss_where_equal() -> None:
    prompts = [numbers(loo=0.5, loo_loss=0.9), numbers(loo=float("nan")), numbers(loo=0.5, loo_loss=0.8),
               numbers(loo=0.75, loo_loss=1.0)]  # fmt: skip
    assert [prompts.index(prompt) for prompt in ranked(prompts, "loo")] == [3, 2, 0, 1]
    assert ranked(prompts, "loo_loss")[0].loo_loss == 0.5


def test_the_figure_has_a_point_for_each_prompt_against_test_or_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[Any]] = {}
    monkeypatch.setattr(picture.plots, "as_png", lambda *draws, titles, **_: drawn.update(draws=draws, titles=titles))
    found = [numbers(loo_loss=loss, loo=1 - loss, dev=1 - loss**2, test=1 - loss) for loss in (0.1, 0.4, 0.2, 0.9)]
    picture.prompts_figure(found, "acc")
    assert drawn["titles"] == ["Spearman's ρ = 1.00"] * 3
    axes = Figure().subplots()
    drawn["draws"][0](axes)
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points, [(one.loo_loss, 100 * one.test) for one in found])
    picture.prompts_figure([replace(one, test=math.nan) for one in found], "acc")
    assert len(drawn["draws"]) == 2
    drawn["draws"][1](axes := Figure().subplots())
    assert axes.get_ylabel().endswith("on dev, percent")


def test_a_number_that_orders_prompts_as_test_does_correlates_by_one() -> None:
    prompts = [numbers(test=value, loo=value**3, loo_loss=-value, chi=value) for value in (0.1, 0.5, 0.3, 0.9)]
    found = agreement_with_test(prompts)
    assert {name: round(value, 12) for name, value in found.items()} == {"loo": 1.0, "loo_loss": 1.0, "chi": -1.0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--", "--template", "x"], "`template`"),
        (["--", "--kernel_solver", "svr"], "lstsq alone"),
        (["--top", "0"], "`top`"),
        (["--seeds", "42", "42"], "`seeds`"),
        (["--k", "4"], "draw it with `lmntk splits`"),
    ],
)
def test_flags_that_no_ranking_can_have_are_refused(place: list[str], flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_of([*place, *flags]).check()


def test_a_kernel_that_is_singular_without_an_example_is_ranked_without_leave_one_out(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_untrained_logits()
    folder.write("train", np.fliplr(np.eye(16)).copy().reshape(8, 2, 8, 2))
    found = prompt_numbers("template", "words", read_runs(folder.path))
    assert math.isnan(found.loo) and math.isnan(found.loo_loss) and 0 <= found.test <= 1
