"""--kernel_per_layer: every layer's part against the oracle, its files, and the table of how layers predict alone."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from command_line import Workplace, flags_of, read_kernel, read_results, read_tensors
from engine_problems import TOLERANCE, gradients_by_name, names_of, problem_of, sides
from interrupted_runs import TILED, count_tiles, interrupted
from lmntk import solvers
from lmntk.kernels import FORMULAS, MemoryBudget, TileRequest
from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.layers import LAYERS
from lmntk.models.factored_layers import LabelWordDecoder
from lmntk.models.parameters import ParameterFilter, layer_of, layers_of
from lmntk.solvers.problem import SolverSettings
from lmntk.storage import kernel_metadata
from lmntk.storage.tile_store import TileStore
from lmntk.trainers.kernel_job import KernelJob
from lmntk.trainers.layer_scores import fit_layers
from tiny_models import ARCHITECTURES, tiny_prompt_model

PER_LAYER = "--kernel_per_layer"


def layer_kernels(engine: str, architecture: str, formula: str, names: list[str], budget: MemoryBudget | None = None):
    """The parts of the kernel of a tiny model, by layer, and the kernel of it as it is without them."""
    model = tiny_prompt_model(architecture)
    problem = problem_of(model, names, *sides(architecture), formula)
    apart = replace(problem, part_of=layers_of(problem.params, model.base_prefix))
    chosen = make_engine(apart, engine, budget)
    plan = chosen.plan(TileRequest(2, 2))
    parts = assemble(chosen.blocks(plan), plan, apart).unflatten(0, (len(apart.parts), -1))
    chosen = make_engine(problem, engine, budget)
    return dict(zip(apart.parts, parts, strict=True)), assemble(chosen.blocks(plan), plan, problem)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    ("engine", "architecture"),
    [*(("factored", name) for name in ARCHITECTURES), ("jacobian", "bert"), ("jacobian", "llama")],
)
def test_every_layers_part_is_the_kernel_of_its_own_parameters(engine: str, architecture: str, formula: str) -> None:
    model = tiny_prompt_model(architecture)
    names = names_of(model, ParameterFilter(), noise=formula == "sgd")
    found, whole = layer_kernels(engine, architecture, formula, names)
    assert list(found)[0] == "embeddings"
    inner = [layer for layer in found if layer != "project_in"]
    assert inner[1:3] == ["layer 0", "layer 1"]
    assert inner[-1] == "head"
    for layer, part in found.items():
        own = [name for name in names if layer_of(name, model.base_prefix) == layer]
        of_train, of_x = (torch.cat([side[name] for name in own], -1) for side in gradients_by_name(architecture))
        truth = oracle.kernel(of_train, of_x, formula).reshape(part.shape)
        assert oracle.relative_error(part, truth) <= TOLERANCE[torch.float64], layer
    assert oracle.relative_error(sum(found.values()), whole) <= TOLERANCE[torch.float64]


def test_parameters_of_unknown_layers_go_to_their_own_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of(tiny_prompt_model("bert"), ParameterFilter())
    known, _ = layer_kernels("factored", "bert", "sgd", names)
    for kind in (torch.nn.LayerNorm, LabelWordDecoder):
        monkeypatch.delitem(LAYERS, kind)
    partly_unknown, _ = layer_kernels("factored", "bert", "sgd", names)
    assert known.keys() == partly_unknown.keys()
    for layer, part in known.items():
        assert oracle.relative_error(partly_unknown[layer], part) <= TOLERANCE[torch.float64], layer


def test_a_module_whose_parameters_are_kept_apart_is_not_taken_whole() -> None:
    model = tiny_prompt_model("bert")
    names = names_of(model, ParameterFilter())
    problem = problem_of(model, names, *sides("bert"))
    kinds = {name: "biases" if name.endswith("bias") else "weights" for name in problem.params}
    apart = replace(problem, part_of=dict(sorted(kinds.items(), key=lambda item: item[1])))
    engine = make_engine(apart, "factored")
    plan = engine.plan()
    biases, _ = assemble(engine.blocks(plan), plan, apart)
    alone = problem_of(model, names_of(model, ParameterFilter(only_biases=True)), *sides("bert"))
    engine = make_engine(alone, "factored")
    truth = assemble(engine.blocks(plan), plan, alone)[0]
    assert oracle.relative_error(biases, truth) <= TOLERANCE[torch.float64]


def test_groups_of_parameters_that_memory_forces_make_the_same_parts() -> None:
    names = names_of(tiny_prompt_model("bert"), ParameterFilter())
    freely, _ = layer_kernels("jacobian", "bert", "asymmetric_signgd", names)
    tightly, _ = layer_kernels("jacobian", "bert", "asymmetric_signgd", names, MemoryBudget.from_gb(2e-4))
    for layer, part in freely.items():
        assert oracle.relative_error(tightly[layer], part) <= TOLERANCE[torch.float64], layer


def read_layers(folder: Path, split: str) -> dict[str, torch.Tensor]:
    """The layers' parts as users read them."""
    return torch.load(folder / f"{split}_layer_kernels_sst-2.pt", weights_only=True)


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "layer_results_sst-2.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_run_keeps_the_layers_parts_beside_the_same_kernel(place: Workplace, formula: str) -> None:
    plain = place.run(*flags_of(formula), output=f"plain {formula}")
    kept = place.run(*flags_of(formula), PER_LAYER, output=f"kept {formula}")
    for split in ("train", "dev", "test"):
        kernel, layers = read_kernel(kept, split), read_layers(kept, split)
        assert list(layers) == ["embeddings", "layer 0", "layer 1", "head"]
        assert {part.dtype for part in layers.values()} == {torch.float64}
        assert torch.equal(sum(layers.values()), kernel)
        assert oracle.relative_error(kernel, read_kernel(plain, split)) < 1e-12
    assert not list(plain.glob("*layer*"))
    names = ("eval_acc", "eval_loss")
    found, expected = (read_results(folder / "test_results_sst-2.txt") for folder in (kept, plain))
    assert [found[name] for name in names] == pytest.approx([expected[name] for name in names])
    described = json.loads((kept / "test_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert described["layers"] == ["embeddings", "layer 0", "layer 1", "head"]


def test_the_table_says_what_the_solver_makes_of_one_layers_part(place: Workplace) -> None:
    folder = place.run(PER_LAYER, output="table")
    rows = table_of(folder)
    train, test = read_layers(folder, "train"), read_layers(folder, "test")
    traces = {layer: float(torch.einsum("icic->", part)) for layer, part in train.items()}
    labels, wanted = (read_tensors(folder / f"{split}_kernels_sst-2.pt")[1].numpy() for split in ("train", "test"))
    assert [row["layer"] for row in rows] == list(train)
    for row in rows:
        assert float(row["share"]) == pytest.approx(traces[row["layer"]] / sum(traces.values()), abs=1e-4)
        fitted = solvers.fit("lstsq", train[row["layer"]].numpy(), labels, SolverSettings())
        predicted = fitted.predict(test[row["layer"]].numpy(), wanted, None, "test").logits.argmax(axis=1)
        assert float(row["test_acc"]) == pytest.approx(np.mean(predicted == wanted), abs=1e-4)
    assert set(rows[0]) == {"layer", "share", "dev_acc", "test_acc"}


def test_a_layer_that_adds_nothing_has_no_share_and_predicts_all_the_same() -> None:
    nothing, something = torch.zeros(2, 1, 2, 1), torch.eye(2).reshape(2, 1, 2, 1)
    labels = np.array([-1.0, 1.0])
    fitted = fit_layers(
        {"norm": nothing, "head": something}, lambda kernel: solvers.fit("lstsq", kernel, labels, SolverSettings())
    )
    assert (fitted["norm"].share, fitted["head"].share) == (0.0, 1.0)
    predicted = fitted["norm"].solver.predict(nothing.numpy(), labels, None, "test")
    assert predicted.logits.tolist() == [[0.0], [0.0]]


def test_kernels_with_layers_serve_runs_without_and_the_other_way_they_are_refused(place: Workplace) -> None:
    kept = place.run(PER_LAYER, output="serves")
    before = (kept / "test_kernels_sst-2.pt").read_bytes()
    place.run(output="serves")
    assert (kept / "test_kernels_sst-2.pt").read_bytes() == before
    bare = place.run(output="bare")
    assert not (bare / "layer_results_sst-2.csv").exists()
    outcome = place.call(place.argv(PER_LAYER, output="bare"))
    assert outcome.status == 2
    assert "was made without --kernel_per_layer" in outcome.err
    assert "--overwrite_kernels" in outcome.err
    place.run(PER_LAYER, "--overwrite_kernels", output="bare")
    assert len(table_of(bare)) == 4
    place.run("--overwrite_kernels", output="bare")
    assert not list(bare.glob("*layer*")), "neither parts nor a table of another run"


def test_loaded_kernels_bring_their_layers_where_there_are_any(place: Workplace) -> None:
    kept = place.run(PER_LAYER, output="loaded from")
    folder = place.run(PER_LAYER, "--load_kernels", str(kept), "--kernel_solver", "svr", output="loaded")
    assert [row["layer"] for row in table_of(folder)] == ["embeddings", "layer 0", "layer 1", "head"]
    bare = place.run(output="without layers")
    outcome = place.call(place.argv(PER_LAYER, "--load_kernels", str(bare), output="loaded bare"))
    assert outcome.status == 2
    assert "train_layer_kernels_sst-2.pt does not exist" in outcome.err


def test_parts_that_do_not_sum_to_the_kernel_are_refused(place: Workplace) -> None:
    folder = place.run(PER_LAYER, output="mixed")
    path = folder / "train_layer_kernels_sst-2.pt"
    torch.save({name: 2 * part for name, part in read_layers(folder, "train").items()}, path)
    outcome = place.call(place.argv(PER_LAYER, output="mixed"))
    assert outcome.status == 2
    assert f"{path} does not hold the parts of the kernel beside it" in outcome.err
    kernel = folder / "train_kernels_sst-2.pt"
    said = kernel_metadata.read_description(kernel) or {}
    del said["parts_sha256"]  # an earlier version notes none
    kernel_metadata.write_description(kernel, said)
    outcome = place.call(place.argv(PER_LAYER, output="mixed"))
    assert outcome.status == 2
    assert "do not sum to the kernel in train_kernels_sst-2.pt" in outcome.err
    path.write_bytes(b"no tensors")
    outcome = place.call(place.argv(PER_LAYER, output="mixed"))
    assert outcome.status == 2
    assert "it is cut or damaged" in outcome.err


def test_a_run_that_was_stopped_goes_on_to_the_same_parts(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = place.run(*TILED, PER_LAYER, output="undisturbed")
    interrupted(place, "stopped", PER_LAYER)
    outcome = place.call(place.argv(*TILED, output="stopped"))
    assert outcome.status == 2
    assert "--kernel_per_layer: stored true, now false" in outcome.err
    computed = count_tiles(monkeypatch)
    folder = place.run(*TILED, PER_LAYER, output="stopped")
    assert len(computed) == 3
    for split in ("train", "dev", "test"):
        name = f"{split}_layer_kernels_sst-2.pt"
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_what_is_announced_counts_the_layers_files(tmp_path: Path) -> None:
    model = tiny_prompt_model("bert")
    problem = problem_of(model, names_of(model, ParameterFilter()), *sides("bert"))
    sizes = {}
    for apart in (None, layers_of(problem.params, model.base_prefix)):
        engine = make_engine(replace(problem, part_of=apart))
        plan = engine.plan()
        work = KernelJob("train × test", engine, plan, engine.estimate_cost(plan), TileStore.open(tmp_path, {}))
        sizes[apart is not None] = work.file_bytes, work.tile_bytes
    entry = 8 * problem.num_logits**2
    kernel, diagonal = 3 * 3 * entry, 3 * entry
    assert sizes[False] == (kernel + diagonal, kernel + diagonal)
    assert sizes[True] == (kernel + 4 * kernel + diagonal, 4 * kernel + diagonal)


def test_the_published_method_cannot_keep_layers_apart(place: Workplace) -> None:
    outcome = place.call(place.argv(PER_LAYER, "--kernel_engine", "jvp", output="jvp"))
    assert outcome.status == 2
    assert "--kernel_per_layer does not work with --kernel_engine jvp" in outcome.err
