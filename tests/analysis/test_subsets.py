"""lmntk subsets: sums of parts against kernels of the parameters alone, LoRA, and every form of the table."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from threadpoolctl import threadpool_info, threadpool_limits

from lmntk import solvers
from lmntk.analysis.least_squares import read_least_squares
from lmntk.analysis.only_run import only_run
from lmntk.analysis.solver_choice import SolverChoice
from lmntk.analysis.subset_tables import format_subsets
from lmntk.analysis.subsets import measure_subsets, subsets_of
from lmntk.commands import subsets
from lmntk.errors import FileError, KernelMismatchError, SettingError, UnknownNameError
from lmntk.report import subsets as report
from lmntk.solvers.problem import SolverSettings
from lmntk.storage import kernel_metadata
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.kernel_slices import LORA_KEY, PARTS_KEY, KernelSlices

KEYS = ("layer", "kind", "weight-or-bias")
NAMES = (
    *("embeddings/embedding/weight", "embeddings/norm/bias", "layer.0/query/weight", "layer.0/query/bias"),
    *("layer.0/feed-forward/weight", "layer.1/query/weight", "layer.1/query/bias", "head/head/weight"),
)
SIZES = {name: 10 * place + 10 for place, name in enumerate(NAMES)}
MATRICES = {
    **{f"layer.{layer}/query/weight": [[4, 5]] for layer in (0, 1)},
    "layer.0/feed-forward/weight": [[7, 5], [5, 7]],
}
ADAPTED = ("lm.layer.0.query.weight", "lm.layer.1.query.weight", "lm.layer.0.dense.weight")
TRAIN, DEV, C, LAMBDA = 8, 9, 2, 0.01


def write_run(folder: Path, keys=KEYS, names=NAMES, lora: bool = True, asymmetric: bool = False) -> Path:
    """A run whose parts are the kernels of random gradients, of some parameters each."""
    folder.mkdir(exist_ok=True)
    cache = KernelCache(folder, None, "sst-2", overwrite=False)
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(TRAIN + DEV, C, 30, dtype=torch.float64, generator=generator) for name in (*names, *ADAPTED)
    }
    for split, own in (("train", slice(0, TRAIN)), ("dev", slice(TRAIN, None))):
        kernels = {
            name: torch.einsum("iap,jbp->iajb", values[:TRAIN], values[own]) for name, values in gradients.items()
        }
        if asymmetric:
            kernels = {name: torch.stack([kernel, 2 * kernel]) for name, kernel in kernels.items()}
        parts, adapters = {name: kernels[name] for name in names}, {name: kernels[name] for name in ADAPTED}
        said = {"keys": list(keys), "parameters": {name: SIZES.get(name, 1) for name in names}, "matrices": MATRICES}
        of_lora = {"rank": 2, "alpha": 16, "targets": [], "seed": 0, "parameters": dict.fromkeys(ADAPTED, 18)}
        slices = KernelSlices(
            keys, parts, adapters if lora else {}, {PARTS_KEY: said} | ({LORA_KEY: of_lora} if lora else {})
        )
        labels = torch.arange(TRAIN if split == "train" else DEV) % 2
        if not names:
            slices = KernelSlices()
        whole = sum(parts.values()) if parts else kernels[ADAPTED[0]]
        cache.save(split, (whole, labels), slices, {"formula": "asymmetric_signgd" if asymmetric else "sgd"})
    record = {"trainer": "kernel", "kernel_solver": "lstsq", "kernel_regularization": LAMBDA}
    (folder / "run_sst-2.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def measured(folder: Path, own=(), lora=(), rank=None):
    run = only_run(folder)
    return {one.name: one for one in measure_subsets(read_least_squares(run, {}), subsets_of(run, own, lora, rank))}


def test_each_subset_is_the_sum_of_its_parts_and_predicts_as_its_kernel_does(folder: Path) -> None:
    found = measured(folder, own=["layer.*/query/bias", "*/bias,head/*"])
    run = only_run(folder)
    train, dev = run.part_kernels("train"), run.part_kernels("dev")
    labels = {split: np.arange(size) % 2 for split, size in (("train", TRAIN), ("dev", DEV))}
    whole = sum(np.einsum("iaia->", part) for part in train.values())
    expected = {
        "all parameters": NAMES,
        "layer.0": NAMES[2:5],
        "query": (*NAMES[2:4], *NAMES[5:7]),
        "last layer and what follows": NAMES[5:],
        "last 2 layers and what follows": NAMES[2:],
        "what follows the layers": NAMES[7:],
        "biases": [name for name in NAMES if name.endswith("bias")],
        "norm": NAMES[1:2],
        "without embeddings": NAMES[2:],
        "without head": NAMES[:-1],
        "layer.*/query/bias": (NAMES[3], NAMES[6]),
        "*/bias,head/*": (NAMES[1], NAMES[3], NAMES[6], NAMES[7]),
    }
    assert expected.keys() <= found.keys()
    for name, parts in expected.items():
        kernel = sum(train[part] for part in parts)
        numbers = found[name]
        assert numbers.parameters == sum(SIZES[part] for part in parts)
        assert numbers.trace_share == pytest.approx(np.einsum("iaia->", kernel) / whole, rel=1e-12)
        flat = kernel.reshape(TRAIN * C, -1)
        values = np.linalg.eigvalsh(flat)
        ridge = LAMBDA * values[-1]
        assert numbers.condition == pytest.approx((values[-1] + ridge) / (values[0] + ridge), rel=1e-9), "of A, not K"
        shares = values / values.sum()
        assert numbers.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        fitted = solvers.fit("lstsq", kernel, labels["train"], SolverSettings(regularization=LAMBDA))
        logits = fitted.predict(sum(dev[part] for part in parts), labels["dev"], None, "dev").logits
        assert numbers.scores["dev"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels["dev"]))
        # Leave-one-out by really solving without each example, at the norm of the subset's whole kernel.
        left_out = []
        a = flat + LAMBDA * values[-1] * np.eye(len(flat))
        for example in range(TRAIN):
            rest = [row for row in range(TRAIN * C) if row // C != example]
            alpha = np.linalg.solve(a[np.ix_(rest, rest)], np.eye(C)[labels["train"]].reshape(-1)[rest])
            left_out.append(flat[np.ix_(range(example * C, example * C + C), rest)] @ alpha)
        score = np.mean(np.argmax(left_out, axis=1) == labels["train"])
        assert numbers.loo_score == pytest.approx(score)


def test_one_decomposition_serves_a_subset_and_does_not_wait_for_threads(folder: Path, monkeypatch) -> None:
    threads = []

    def counted(kernel: np.ndarray, eigh=np.linalg.eigh):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        sizes.append(kernel.shape)
        return eigh(kernel)

    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(np.linalg, "eigh", counted)
    for other in ("svdvals", "eigvalsh"):
        monkeypatch.setattr(f"lmntk.analysis.statistics.{other}", None)
    with threadpool_limits(limits=2):
        found = measured(folder)
    assert len(found) <= len(sizes) == len(subsets_of(only_run(folder), [], [], None))
    assert {*threads} == {1}


def test_a_run_of_train_alone_is_drawn_by_leave_one_out(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run")
    for path in run.glob("dev_*"):
        path.unlink()
    figure = tmp_path / "subsets.png"
    assert subsets.main([str(run), "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "loo is missing" not in capsys.readouterr().out
    found = measured(run)["head"]
    singular = replace(found, condition=math.inf, loo_score=math.nan, loo_loss=math.nan)
    assert "loo is missing where a kernel is singular" in format_subsets(
        "run", "acc", SolverChoice(), [found, singular], "text"
    )


def test_scores_are_drawn_as_points_with_an_axis_of_their_own(folder: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(report.plots, "as_png", lambda *draws, **_: drawn.extend(draws) or b"")
    found = [*measured(folder).values()]
    report.subsets_figure(found, "acc")
    axes = Figure().subplots()
    drawn[0](axes)
    assert not axes.patches, "a bar says that its length counts"
    (points,) = [part for part in axes.collections if isinstance(part, PathCollection)]
    expected = [[100 * one.scores["dev"], place] for place, one in enumerate(found)]
    np.testing.assert_allclose(points.get_offsets(), expected)


def test_adapters_are_sums_of_what_was_kept_and_multiples_of_the_weights_parts(folder: Path) -> None:
    run = only_run(folder)
    found = {one.name: one for one in subsets_of(run, [], ["query", "dense,query"], 4) if one.group == "LoRA"}
    assert list(found) == [
        "LoRA rank 2, query, drawn",
        "LoRA rank 2, dense, query, drawn",
        "LoRA rank 4, query, expected",
    ], "dense is no kind"
    drawn, expected = found["LoRA rank 2, query, drawn"], found["LoRA rank 4, query, expected"]
    assert (drawn.adapters, drawn.parameters) == (ADAPTED[:2], 36)
    # (α/r)² · r · Var(A) with a variance of 1 / (3 d_in).
    factor = (16 / 4) ** 2 * 4 / (3 * 5)
    assert expected.weights == pytest.approx({f"layer.{layer}/query/weight": factor for layer in (0, 1)})
    assert expected.parameters == 2 * 4 * (4 + 5)
    numbers = measured(folder, lora=["query"])["LoRA rank 2, query, drawn"]
    traces = [np.einsum("iaia->", run.lora_kernels("train")[name]) for name in ADAPTED[:2]]
    whole = sum(np.einsum("iaia->", part) for part in run.part_kernels("train").values())
    assert numbers.trace_share == pytest.approx(sum(traces) / whole)


def test_an_asymmetric_kernel_has_the_numbers_of_its_first_direction(folder: Path, tmp_path: Path) -> None:
    found, expected = (measured(run, lora=["query"]) for run in (write_run(tmp_path, asymmetric=True), folder))
    assert set(expected) - set(found) == {"LoRA rank 2, query, expected"}, "signs have no expectation"
    for name, numbers in found.items():
        for number in ("trace_share", "effective_rank", "loo_loss"):
            assert getattr(numbers, number) == pytest.approx(getattr(expected[name], number)), name


def test_layers_alone_have_fewer_subsets(tmp_path: Path) -> None:
    names = ("embeddings", "layer 0", "layer 1", "head")
    found = measured(write_run(tmp_path, ("layer",), names, lora=False), own=["layer.*"])
    assert {"embeddings", "layer.1", "last layer and what follows", "without head", "layer.*"} <= found.keys()
    assert not {"biases", "query"} & found.keys()


def test_what_a_run_does_not_have_is_said_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    run = only_run(folder)
    with pytest.raises(UnknownNameError) as unknown:
        subsets_of(run, ["layer.7/*"], [], None)
    assert unknown.value.data["options"] == [*NAMES]
    assert "kind: embedding, norm, query, feed-forward, head; weight-or-bias: weight, bias" in str(unknown.value)
    with pytest.raises(SettingError, match="this run allows query, dense") as lora:
        subsets_of(run, [], ["colour"], None)
    assert lora.value.data["setting"] == "lora"
    with pytest.raises(SettingError, match="`lora` names no layer"):
        subsets_of(run, [], [" "], None)
    with pytest.raises(SettingError, match="`subset` has a blank pattern"):
        subsets_of(run, [""], [], None)
    bare = write_run(tmp_path / "bare", (), (), lora=False)
    with pytest.raises(FileError, match="kernel_parts=layer,kind,weight-or-bias"):
        subsets_of(only_run(bare), [], [], None)
    mixed = write_run(tmp_path / "mixed")
    path = mixed / "dev_part_kernels_sst-2.pt"
    torch.save({name: 2 * part for name, part in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(KernelMismatchError, match="does not hold the parts of the kernel beside it"):
        measured(mixed)
    said = kernel_metadata.read_description(mixed / "dev_kernels_sst-2.pt") or {}
    del said["parts_sha256"]  # an earlier version notes none
    kernel_metadata.write_description(mixed / "dev_kernels_sst-2.pt", said)
    with pytest.raises(KernelMismatchError, match="dev kernel do not sum"):
        measured(mixed)
    path = mixed / "train_lora_kernels_sst-2.pt"
    torch.save(torch.load(path, weights_only=True), mixed / "copy.pt")
    path.write_bytes((mixed / "copy.pt").read_bytes() + b" ")
    with pytest.raises(KernelMismatchError, match="lora"):
        only_run(mixed).lora_kernels("train")


def test_the_command_writes_every_form_and_the_figure(folder: Path, tmp_path: Path, capsys) -> None:
    figure = tmp_path / "subsets.png"
    arguments = [str(folder), "--subset", "layer.0/*", "--lora", "query"]
    for form in ("text", "markdown", "latex"):
        assert subsets.main([*arguments, "--format", form]) == 0
        printed = capsys.readouterr().out
        assert "LoRA rank 2, query, expected" in printed
        assert (
            " ".join(printed.replace("%", " ").split()).count(f"of these parameters alone, with λ = {LAMBDA}. loo") == 1
        )
    assert subsets.main([*arguments, "--format", "json", "--figure", str(figure)]) == 0
    as_json = json.loads(capsys.readouterr().out)["subsets"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert subsets.main([*arguments, "--format", "csv", "--output", str(tmp_path / "subsets.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "subsets.csv").read_text(encoding="utf-8"))))
    assert [row["name"] for row in rows] == [one["name"] for one in as_json]
    assert [float(row["dev"]) for row in rows] == [one["scores"]["dev"] for one in as_json]
    assert all(math.isfinite(float(row["loo_score"])) for row in rows)
    assert subsets.main([str(folder), "--figure", "subsets.pdf"]) == 2


def test_a_kernel_that_is_singular_without_an_example_has_scores_but_no_leave_one_out(tmp_path: Path) -> None:
    cache, name = KernelCache(tmp_path, None, "sst-2", overwrite=False), "head/head/weight"
    said = {PARTS_KEY: {"keys": list(KEYS), "parameters": {name: 10}, "matrices": {}}}
    for split, size in (("train", TRAIN), ("dev", DEV)):
        kernel = torch.eye(TRAIN * C, dtype=torch.float64).flip(0).reshape(TRAIN, C, TRAIN, C)
        kernel = kernel[:, :, torch.arange(size) % TRAIN].contiguous()
        slices = KernelSlices(KEYS, {name: kernel}, {}, said)
        cache.save(split, (kernel, torch.arange(size) % 2), slices, {"formula": "sgd"})
    (tmp_path / "run_sst-2.json").write_text(json.dumps({"trainer": "kernel"}), encoding="utf-8")
    for one in measured(tmp_path).values():
        assert math.isnan(one.loo_score) and math.isnan(one.loo_loss) and one.scores["dev"] == 1
