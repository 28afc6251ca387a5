"""Reports: what is on the page, where its numbers come from, and how damaged folders are named."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from command_line import SIZES, Workplace, read_results
from doc_commands import commands, page_text
from kernel_folders import Folder
from lmntk import solvers
from lmntk.analysis import statistics
from lmntk.analysis.saved_run import TextsUnavailableError, distinguishing_names, read_runs
from lmntk.analysis.solver_choice import Source
from lmntk.analysis.summary import RunSummary, SplitSummary, summarise_run, typical_examples
from lmntk.commands import compare, report
from lmntk.errors import FileError, KernelMismatchError, SettingError, UsageError
from lmntk.report import plots, write_report
from lmntk.report.figures import KINDS
from lmntk.solvers.problem import SolverSettings
from lmntk.storage.paths import RunPaths
from saved_kernels import save_layer_kernels

DOCS = page_text("report")
PICTURES = {"train-map", "other-map", "components", "spectrum", "confusion", "regularisation", "overview"}
"""The pictures of a run's kernel; `influence` lies beside them, in a section of its own."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# As large as a picture is, and drawn once.
STAND_IN = plots.as_png(lambda axes: axes.plot([0, 1]))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second for each page: most tests do not look at them."""
    monkeypatch.setattr(plots, "as_png", lambda *_, **__: STAND_IN)


def summarise(folder: Path, **settings: object) -> RunSummary:
    (run,) = read_runs(folder)
    return summarise_run(run, "run", settings)


def call(*words: object) -> None:
    assert report.main([str(word) for word in words]) == 0


def text_of(page: Path) -> str:
    """What a reader sees, tags left out."""
    body = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A run whose report is written."""
    folder = Folder(tmp_path_factory.mktemp("one"))
    folder.record(kernel_solver="lstsq", kernel_regularization=0.01)
    call(folder.path)
    return folder


def test_the_page_is_self_contained_with_a_title_and_alternative_texts(one: Folder) -> None:
    page = (one.path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<title>lmntk report: sst-2: " in page
    for forbidden in ("<script", "<link", "http:", "https:", "url(", "@import"):
        assert forbidden not in page
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)" width="(\d+)" height="(\d+)">', page)
    assert len(images) == page.count("<img") == len(PICTURES)
    for data, alt, width, height in images:
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert len(alt) > 10 and min(int(width), int(height)) > 200


def test_the_pictures_lie_beside_the_page(one: Folder) -> None:
    left = {path.name for path in (one.path / "report").iterdir()}
    assert left == {"report.html", *(f"sst-2-{name}.png" for name in {*PICTURES, "influence"})}


def test_the_page_says_first_what_it_is_and_the_result(one: Folder) -> None:
    said = text_of(one.path / "report" / "report.html")
    train, test = one.kernel("train"), one.kernel("test")
    fitted = solvers.fit("lstsq", train, one.labels("train"), SolverSettings(regularization=0.01))
    logits = fitted.predict(test, one.labels("test")).logits
    accuracy = 100 * np.mean(logits.argmax(axis=1) == one.classes["test"])
    lead = said.split("Accuracy in percent")[0]
    assert "The sgd kernel of tiny : 8 training examples × 6 dev and 10 test, 2 logits." in lead
    assert "4 examples a class, asked as *cls**sent_0*_It_was*mask*.*sep+* ." in lead
    assert f"With lstsq, λ = 0.01 it has {accuracy:.1f} % of 10 examples right on test" in lead
    assert "Always guessing the largest class is right for 50.0 %." in lead
    assert Source.RUN.value in said


def test_each_chosen_sentence_has_its_most_similar_training_sentences(one: Folder, tmp_path: Path) -> None:
    call(one.path, "--output_dir", tmp_path, "--sentences", 3, 7)
    said = text_of(tmp_path / "report.html")
    assert said.count("Test sentence") == 2
    kernel = summarise(one.path).kernel
    assert kernel is not None
    for index in (3, 7):
        alike = kernel.others["test"][:, index] / np.sqrt(np.diag(kernel.train))
        nearest = np.argsort(-alike)[:3]
        names = [("0\u00a0(terrible)", "1\u00a0(great)")[label] for label in one.classes["train"]]
        values = alike / np.abs(alike).max()
        rows = " ".join(f"{values[i]:.2f} {names[i]} train sentence {i}" for i in nearest)
        assert f"test sentence {index} predicted" in said
        assert rows.replace("\u00a0", " ") in said


def test_by_default_sentences_are_surely_right_surely_wrong_and_undecided() -> None:
    logits = np.array([[0.0, 9.0], [0.0, 5.0], [0.0, 8.0], [0.0, 7.0], [0.1, 0.0], [0.2, 0.0], [3.0, 0.0], [0.0, 1.0]])
    labels = np.array([1, 1, 0, 0, 0, 1, 0, 1])
    predicted = logits.argmax(axis=1)
    assert typical_examples(SplitSummary(labels, predicted, 0.0, logits)) == [0, 1, 2, 3, 4, 5]


def test_sentences_are_those_of_the_kernel_or_none(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    moved = folder.data.rename(tmp_path / "moved")
    call(folder.path)
    page = folder.path / "report" / "report.html"
    assert f"{folder.data / 'train.tsv'} is missing" in text_of(page) and "data_dir" in text_of(page)
    assert "train sentence" not in text_of(page)
    call(folder.path, "--data_dir", moved)
    assert "train sentence" in text_of(page)
    (moved / "train.tsv").write_text("sentence\tlabel\nanother\t1\n", encoding="utf-8")
    call(folder.path, "--data_dir", moved)
    assert f"{moved / 'train.tsv'} has changed" in text_of(page)
    assert "another" not in text_of(page) and "train sentence" not in text_of(page)


def test_texts_that_cannot_be_shown_are_an_error_of_their_own_kind(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.texts("train").unlink()
    (run,) = read_runs(folder.path)
    with pytest.raises(TextsUnavailableError) as caught:
        run.texts("train")
    assert caught.value.data == {"path": folder.texts("train")}


def test_the_labels_of_a_users_data_are_read_from_the_predictions(tmp_path: Path) -> None:
    record = {"trainer": "standard", "task_name": "reviews", "custom_columns": ["text", "label"]}
    (tmp_path / "run_reviews.json").write_text(json.dumps(record), encoding="utf-8")
    rows = "index,label,prediction,logit_bad,logit_good\n0,bad,good,0.0,1.0\n1,good,good,0.0,1.0\n"
    (tmp_path / "test_predictions_reviews.csv").write_text(rows, encoding="utf-8")
    summary = summarise(tmp_path)
    assert summary.run.task is not None and summary.run.task.labels == ("bad", "good")
    assert summary.scores == {"test": 0.5}


def test_texts_of_users_are_shown_and_never_run(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    hostile = ['<script>alert("x")</script> & more', "نص من اليمين إلى اليسار", "w" * 300]
    rows = [f"{hostile[i % 3]}\t{label}" for i, label in enumerate(folder.classes["test"])]
    folder.texts("test").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    folder.write("test")
    call(folder.path, "--sentences", 0, 1, 2)
    page = (folder.path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert '<bdi dir="auto">&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; more</bdi>' in page
    assert f'<bdi dir="auto">{hostile[1]}</bdi>' in page


def test_given_settings_replace_the_runs_own_and_defaults_fill_the_rest(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    plain = summarise(folder.path).kernel
    folder.record(kernel_solver="svr", kernel_regularization=0.5, kernel_gamma=2.0)
    own, flagged = summarise(folder.path).kernel, summarise(folder.path, kernel_solver="lstsq").kernel
    assert plain is not None and own is not None and flagged is not None
    assert (plain.solver.solver, plain.solver.settings) == ("lstsq", SolverSettings())
    assert (own.solver.solver, own.solver.settings) == ("svr", SolverSettings(0.5, 2.0))
    assert (flagged.solver.solver, flagged.solver.settings) == ("lstsq", SolverSettings(0.5, 2.0))
    assert (plain.solver.source, own.solver.source, flagged.solver.source) == (Source.DEFAULT, Source.RUN, Source.FLAGS)


@pytest.mark.parametrize("solver", ["lstsq", "svr", "svc", "asym"])
def test_every_point_of_the_curve_is_the_score_at_that_regularisation(tmp_path: Path, solver: str) -> None:
    asymmetric = solver == "asym"
    folder = Folder(tmp_path, noise=4.0, logits=1 if asymmetric else 2, asymmetric=asymmetric)
    folder.record(kernel_solver=solver, kernel_regularization=0.003)
    found = summarise(folder.path)
    assert found.kernel is not None and found.kernel.curve is not None
    curve = found.kernel.curve
    assert curve.complete and curve.own == 0.003
    assert curve.values == sorted([0.0, 0.003, *(10.0**power for power in range(-8, 1))])
    for value, *scores in zip(curve.values, curve.scores["dev"], curve.scores["test"], strict=True):
        fitted = solvers.fit(solver, folder.kernel("train"), folder.labels("train"), SolverSettings(value))
        for split, got in zip(("dev", "test"), scores, strict=True):
            logits = fitted.predict(folder.kernel(split), folder.labels(split)).logits
            predicted = logits[:, 0] > 0 if asymmetric else logits.argmax(axis=1)
            assert got == np.mean(predicted == folder.classes[split])
    assert found.scores["test"] == curve.scores["test"][curve.values.index(0.003)]


def test_a_kernel_too_large_for_its_solver_has_fewer_points_and_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    monkeypatch.setattr("lmntk.analysis.summary.DEFAULT_LIMITS", (15, 16))
    assert summarise(folder.path).kernel.curve.values == [0.0, 1e-6, 1e-4, 1e-2, 1.0]
    monkeypatch.setattr("lmntk.analysis.summary.DEFAULT_LIMITS", (14, 15))
    monkeypatch.setattr("lmntk.analysis.summary.SPECTRUM_LIMIT", 15)
    call(folder.path)
    said = text_of(folder.path / "report" / "report.html")
    assert "Scores at other regularisations are left out" in said and "The spectrum is left out" in said


def test_a_run_that_started_from_the_untrained_models_logits_does_so_here(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=3.0)
    f0 = folder.write_untrained_logits()
    folder.record(kernel_solver="lstsq", adjust_for_init=True, f0_scaling=0.5)
    fitted = solvers.fit(
        "lstsq", folder.kernel("train"), folder.labels("train"), SolverSettings(f0_scaling=0.5), f0["train"]
    )
    wanted = fitted.predict(folder.kernel("test"), folder.labels("test"), f0["test"]).logits
    assert summarise(folder.path).splits["test"].logits == pytest.approx(wanted, rel=1e-9)


def test_examples_with_several_templates_count_once(tmp_path: Path) -> None:
    folder = Folder(tmp_path, samples=3, noise=2.0)
    found = summarise(folder.path)
    assert found.kernel is not None
    assert found.kernel.train.shape == (8, 8) and found.kernel.others["test"].shape == (8, 10)
    mean = {split: phi.reshape(3, -1, 2, 40).mean(axis=0) for split, phi in folder.features.items()}
    half = [(phi[:, 1] - phi[:, 0]) / np.sqrt(2) for phi in (mean["train"], mean["test"])]
    assert found.kernel.others["test"] == pytest.approx(half[0] @ half[1].T, rel=1e-9)
    fitted = solvers.fit("lstsq", folder.kernel("train"), folder.labels("train"), SolverSettings())
    logits = fitted.predict(folder.kernel("test"), folder.labels("test")).logits.reshape(3, 10, 2).mean(axis=0)
    assert found.splits["test"].logits == pytest.approx(logits, rel=1e-9)
    call(folder.path)
    assert "sst-2-overview.png" in {path.name for path in (folder.path / "report").iterdir()}


def test_a_run_that_took_another_folders_kernels_is_shown_with_them(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "kernels")
    (tmp_path / "solved").mkdir()
    record = {"trainer": "kernel", "kernel_solver": "svr", "load_kernels": str(folder.path)}
    (tmp_path / "solved" / "run_sst-2.json").write_text(json.dumps(record), encoding="utf-8")
    found = summarise(tmp_path / "solved")
    assert found.kernel is not None and found.kernel.solver.solver == "svr"
    shutil.rmtree(folder.path)
    call(tmp_path / "solved")
    assert f"Its kernels were in {folder.path}" in text_of(tmp_path / "solved/report/report.html")


def test_a_result_file_that_the_kernels_contradict_gets_a_remark(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.record(kernel_solver="lstsq")
    (folder.path / "test_results_sst-2.txt").write_text("eval_acc = 0.125\n", encoding="utf-8")
    (remark,) = summarise(folder.path).remarks
    assert "12.5" in remark


@pytest.mark.parametrize("classes", [2, 6, 40])
def test_labels_on_pictures_do_not_touch_each_other(classes: int) -> None:
    names = [f"{label} ({'$x_1$ and a word' * (label % 3)})" for label in range(classes)]
    ids = np.repeat(np.arange(classes), np.arange(classes) % 4 + 1)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(len(ids), len(ids)))
    counts = statistics.confusion(ids, rng.permutation(ids), classes)
    for draw in (plots.heat_map(kernel, ids, ids, names), plots.confusion_plot(counts, names, "test")):
        figure = draw_on_figure(draw)
        axes = figure.axes[0]
        for labels, end in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
            boxes = [label.get_window_extent() for label in labels]
            # Slanted ones end at their ticks, a line's height apart.
            ends = [
                (box.x1 if labels[0].get_rotation() == 35 else (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
                for box in boxes
            ]
            steps = np.abs(np.diff([place[end] for place in ends]))
            sizes = [(box.width, box.height)[end] for box in boxes]
            least = 0.2 * figure.dpi if labels[0].get_rotation() == 35 else max(sizes)
            assert (steps >= least).all()
        assert figure.bbox.width >= max(label.get_window_extent().x1 for label in axes.get_xticklabels())
        assert min(label.get_window_extent().x0 for label in axes.get_yticklabels()) >= 0
        assert axes.yaxis.label.get_window_extent().x0 >= 0


def draw_on_figure(draw: plots.Draw) -> Figure:
    figure = Figure(figsize=(plots.WIDTH, plots.HEIGHT), dpi=plots.DPI, layout="constrained")
    draw(figure.subplots())
    figure.draw_without_rendering()
    figure.draw_without_rendering()
    return figure


def write_finetuning(folder: Path, predictions: str, **record: object) -> None:
    folder.mkdir()
    record = {"trainer": "standard", "optimizer": "adam", "do_train": True, "model_name_or_path": "tiny", **record}
    (folder / "run_sst-2.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "test_results_sst-2.txt").write_text("eval_acc = 0.75\neval_loss = 1.0\n", encoding="utf-8")
    (folder / "test_predictions_sst-2.csv").write_text(predictions, encoding="utf-8")


PREDICTIONS = "index,label,prediction,logit_0,logit_1\n0,0,0,2.0,1.0\n1,1,1,0.0,1.0\n2,0,1,0.0,1.0\n3,1,1,0.0,3.0\n"


def test_runs_with_and_without_kernels_are_shown_side_by_side(tmp_path: Path) -> None:
    Folder(tmp_path / "x", "kernel-sgd")
    Folder(tmp_path / "x", "kernel-signgd", seed=1).record()
    write_finetuning(tmp_path / "x" / "tuning", PREDICTIONS, mapping="{'0': 'terrible', '1': 'great'}")
    output = tmp_path / "page"
    call(*sorted(path for path in (tmp_path / "x").iterdir() if path.name != "data"), "--output_dir", output)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count('class="grid three"') >= len(PICTURES) - 1
    assert page.count("<strong>tuning</strong>: no kernel") == len(PICTURES) - 2
    rows = re.search(r'<table class="runs">.*?</table>', page, flags=re.DOTALL)
    assert rows is not None
    assert re.findall(r'<th scope="row">(.*?)</th>', rows[0]) == ["kernel-sgd", "kernel-signgd", "tuning"]
    assert "fine-tuning, adam" in rows[0] and "75.0" in rows[0]
    assert "0 (terrible) taken for 1 (great): 1; 1 (great) taken for 0 (terrible): 0" in page
    names = {path.name for path in output.iterdir()}
    assert names >= {"sst-2-kernel-sgd-overview.png", "sst-2-tuning-confusion.png"}
    assert "sst-2-tuning-spectrum.png" not in names


def test_a_tasks_runs_have_a_section_of_their_own(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for path in Folder(tmp_path, "other", task="mr").path.iterdir():
        shutil.copy(path, folder.path)
    call(folder.path, "--sentences", 0)
    page = (folder.path / "report" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(.*?)"><h2>(.*?)</h2>', page) == [("mr", "mr"), ("sst-2", "sst-2")]


def test_the_second_test_set_of_mnli_belongs_to_its_run(tmp_path: Path) -> None:
    folder = Folder(tmp_path, task="mnli", logits=3)
    for ending in ("pt", "json"):
        shutil.copy(folder.path / f"test_kernels_mnli.{ending}", folder.path / f"test_kernels_mnli-mm.{ending}")
    found = summarise(folder.path)
    assert list(found.scores) == ["dev", "test", "test:mnli-mm"]
    assert found.scores["test:mnli-mm"] == found.scores["test"]


def test_the_scores_of_a_regression_task_are_shown_against_the_labels(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = "index,label,prediction\n0,0.0,1.0\n1,2.5,2.0\n2,5.0,4.5\n"
    (tmp_path / "run" / "test_predictions_sts-b.csv").write_text(rows, encoding="utf-8")
    found = summarise(tmp_path / "run")
    assert found.scores["test"] == pytest.approx(np.corrcoef([0, 2.5, 5], [1, 2, 4.5])[0, 1])
    call(tmp_path / "run")
    assert "Predicted scores of test against the labels" in (tmp_path / "run/report/report.html").read_text()


def test_layers_that_were_kept_are_shown_with_their_shares(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    whole = torch.from_numpy(folder.kernel("train"))
    parts = {"embeddings": 0.25 * whole, "layer 0": 0.5 * whole, "head": 0.25 * whole}
    save_layer_kernels(RunPaths(folder.path, "sst-2").layer_kernels("train"), parts)
    (folder.path / "layer_results_sst-2.csv").write_text("layer,share,test_acc\nhead,0.25,0.875\n", encoding="utf-8")
    assert summarise(folder.path).layer_shares == pytest.approx({"embeddings": 0.25, "layer 0": 0.5, "head": 0.25})
    call(folder.path)
    said = text_of(folder.path / "report" / "report.html")
    assert "largest: layer 0" in said and "head 0.25 0.875" in said


def test_a_table_of_layers_with_a_row_longer_than_its_header_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = folder.path / "layer_results_sst-2.csv"
    path.write_text("layer,share\nhead,0.25,0.875\n", encoding="utf-8")
    with pytest.raises(FileError) as caught:
        write_report([folder.path], tmp_path / "report")
    assert caught.value.data["path"] == path


def test_folders_are_named_by_their_differing_parts() -> None:
    assert distinguishing_names([Path("/a/x/16-42"), Path("/a/y/16-42")]) == ["x", "y"]
    assert distinguishing_names([Path("/a/x/16-42"), Path("/a/x/16-13")]) == ["16-42", "16-13"]
    assert distinguishing_names([Path("/a/x/16-42")]) == ["x/16-42"]
    assert distinguishing_names([Path("/a/b"), Path("/a/b/c"), Path("/a/d/c")]) == ["b", "b/c", "d/c"]


def cut(folder: Folder) -> None:
    path = folder.path / "test_kernels_sst-2.pt"
    path.write_bytes(path.read_bytes()[:-100])


def with_nan(folder: Folder) -> None:
    kernel = folder.kernel("dev")
    kernel[2, 0, 4, 1] = np.nan
    folder.write("dev", kernel)


def of_fewer(folder: Folder) -> None:
    folder.write("test", folder.kernel("test")[1:])


def empty(folder: Folder) -> None:
    for path in folder.path.iterdir():
        path.unlink()


def of_many_templates(folder: Folder) -> None:
    for path in folder.path.glob("*.json"):
        description = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(description | {"template": ["*cls*"] * 3}), encoding="utf-8")


BAD = {
    "cut": (cut, UsageError, "test_kernels_sst-2.pt"),
    "NaN": (with_nan, UsageError, "dev example 4 with train example 2"),
    "shapes": (of_fewer, UsageError, "[7, 2, 10, 2]"),
    "no train": (lambda f: (f.path / "train_kernels_sst-2.pt").unlink(), FileError, "train_kernels_sst-2.pt"),
    "empty": (empty, FileError, ""),
    "record": (lambda f: (f.path / "run_sst-2.json").write_text("[1]"), FileError, "run_sst-2.json"),
    "metrics": (lambda f: (f.path / "test_results_sst-2.txt").write_text("x"), FileError, "test_results_sst-2.txt"),
    "solver": (lambda f: f.record(kernel_gamma="x"), FileError, "run_sst-2.json"),
    "logits": (lambda f: f.record(adjust_for_init=True), UsageError, "train_logits_sst-2.pt"),
    "samples": (of_many_templates, KernelMismatchError, "3 and 3 samples"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_damaged_one_of_several_folders_is_named(tmp_path: Path, case: str) -> None:
    damage, kind, fact = BAD[case]
    good, bad = Folder(tmp_path, "good"), Folder(tmp_path, "bad")
    damage(bad)
    with pytest.raises(kind) as caught:
        write_report([good.path, bad.path], tmp_path / "page")
    assert str(bad.path) in str(caught.value) and fact in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "page").exists()


def of_other_labels(folder: Path) -> None:
    write_finetuning(folder, PREDICTIONS.replace("0,0,0", "0,x,0"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "give run"),
        (["run", "--sentences", "10"], "--sentences 10"),
        (["run", "--sentences", "-1"], "--sentences -1"),
        (["run", "--kernel_regularization", "-1"], "--kernel_regularization"),
        (["run", "--kernel_solver", "asym"], "--kernel_solver asym"),
        (["run", "--sentenzes", "1"], "did you mean '--sentences'?"),
        (["run", "--output_dir", "run/run.txt"], "--output_dir run/run.txt"),
        (["tuned"], "test_predictions_sst-2.csv"),
    ],
)
def test_mistakes_on_the_command_line_are_reported_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (Folder(tmp_path).path / "run.txt").touch()
    of_other_labels(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    assert report.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize("index", [10, -1])
def test_a_sentence_that_does_not_exist_is_named(tmp_path: Path, index: int) -> None:
    with pytest.raises(SettingError) as caught:
        write_report([Folder(tmp_path).path], tmp_path / "page", sentences=[index])
    assert caught.value.data == {"setting": "sentences", "value": index}


def test_the_records_and_predictions_of_runs_make_a_report(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    kernel = place.run("--kernel_regularization", "0.1")
    assert json.loads((kernel / "run_sst-2.json").read_text(encoding="utf-8")) == place.last_record()
    loaded = place.run("--load_kernels", str(kernel), "--kernel_regularization", "0.1", output="loaded")
    tuned = place.run("--trainer", "standard", "--max_steps", "1", "--binary_classification", output="tuned")
    for folder, names in ((kernel, ["logit_0", "logit_1"]), (loaded, ["logit_0", "logit_1"]), (tuned, ["logit"])):
        for mode, result in (("dev", "eval"), ("test", "test")):
            with (folder / f"{mode}_predictions_sst-2.csv").open(encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            assert header == ["index", "label", "prediction", *names]
            assert [row[0] for row in rows] == [str(index) for index in range(SIZES[mode])]
            assert [row[1] for row in rows] == [str(index % 2) for index in range(len(rows))]
            accuracy = np.mean([row[1] == row[2] for row in rows])
            assert accuracy == read_results(folder / f"{result}_results_sst-2.txt")["eval_acc"]
            for row in rows:
                values = [float(value) for value in row[3:]]
                assert row[2] == str(int(values[0] > 0) if len(values) == 1 else int(np.argmax(values)))
    assert (loaded / "test_predictions_sst-2.csv").read_text() == (kernel / "test_predictions_sst-2.csv").read_text()
    call(kernel, loaded, tuned, "--output_dir", tmp_path / "page")
    said = text_of(tmp_path / "page" / "report.html")
    assert "the result file says" not in said
    assert "the film was great" in said


def browse(page: Path, folder: Path, width: int, *more: str) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'browser'}",
        "--hide-scrollbars", f"--window-size={width},1200", *more, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")
@pytest.mark.parametrize("width", [800, 1280])
def test_in_a_browser_nothing_is_wider_than_the_window(tmp_path: Path, width: int) -> None:
    Folder(tmp_path / "x", "kernel-sgd")
    folder = Folder(tmp_path / "x", "with-a-long-name-of-a-kernel-that-was-computed-long-ago", seed=1)
    rows = [f"{'long' * 100}\t{label}" for label in folder.classes["test"]]
    folder.texts("test").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    folder.write("test")
    call(tmp_path / "x" / "kernel-sgd", folder.path, "--output_dir", tmp_path / "page")
    # The page itself has no script: one is added that notes what it measures.
    script = (
        "<script>addEventListener('load', () => { const root = document.documentElement;"
        "const seen = [...document.images].every(image => image.complete && image.naturalWidth > 0);"
        "root.dataset.measured = `${root.scrollWidth} ${innerWidth} ${seen}` })</script></body>"
    )
    page = tmp_path / "page" / "report.html"
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    dom = browse(measured, tmp_path, width, "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r'data-measured="(\d+) (\d+) (\w+)"', dom)
    assert found is not None
    assert int(found[1]) <= int(found[2]) == width
    assert found[3] == "true"
    assert dom.count("<h3>") == len(PICTURES) + 2  # each run's examples that hurt


def test_the_commands_of_the_docs_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools: dict[str, Callable[[list[str]], int]] = {"report": report.main, "compare_kernels": compare.main}
    seen = set()
    monkeypatch.chdir(tmp_path)
    for words in commands(DOCS):
        assert words[0] == "python" and words[1].startswith("tools/")
        tool = Path(words[1]).stem
        for place in (Path(word) for word in words[2:] if word.startswith("result/")):
            folder = place if place.suffix != ".pt" else place.parent
            if not folder.exists():
                Folder(folder.parent, folder.name, task="mr", logits=1)
        assert tools[tool](words[2:]) == 0
        seen.add(tool)
    assert seen == set(tools)
    assert "The report: " in capsys.readouterr().out


def test_the_docs_explain_every_kind_of_picture() -> None:
    for kind in KINDS:
        assert f"`{kind.name}`" in DOCS
