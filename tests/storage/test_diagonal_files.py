"""K(x, x) beside a kernel: it survives a stopped run, belongs to one kernel, and is refused beside any other."""

from pathlib import Path

import pytest
import torch

from engine_problems import names_of, problem_of, sides
from lmntk.analysis.saved_run import SavedRun
from lmntk.errors import FileError, KernelMismatchError
from lmntk.kernels import FORMULAS, TileRequest
from lmntk.kernels.assembly import make_engine
from lmntk.models.parameters import ParameterFilter
from lmntk.storage import kernel_metadata
from lmntk.storage.kernel_cache import KernelCache
from lmntk.storage.kernel_files import load_kernel
from lmntk.storage.kernel_slices import KernelSlices
from lmntk.storage.kernel_writer import kernel_writer
from lmntk.storage.paths import RunPaths
from lmntk.storage.tile_store import TileStore
from lmntk.trainers.kernel_job import KernelJob
from tiny_models import tiny_prompt_model


def job_of(folder: Path, formula: str = "sgd", split: str = "test") -> KernelJob:
    model = tiny_prompt_model("roberta")
    train, x = sides("roberta")
    problem = problem_of(model, names_of(model, ParameterFilter()), train, None if split == "train" else x, formula)
    engine = make_engine(problem)
    plan = engine.plan(TileRequest(2, 2))
    job = KernelJob(
        f"train × {split}", engine, plan, engine.estimate_cost(plan), TileStore.open(folder, {"f": formula})
    )
    job.store.create()
    return job


def assembled(job: KernelJob, folder: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The kernel that a job writes, and its diagonal."""
    kernel, slices = job.outline()
    paths = RunPaths(folder, "sst-2")
    with kernel_writer(paths, "test", kernel, torch.arange(3), slices) as writer:
        diagonal = job.assemble(writer)
        writer.finish({}, diagonal)
    return load_kernel(paths.kernel("test"))[0], diagonal


@pytest.mark.parametrize("formula", ["sgd", "asymmetric_signgd"])
def test_a_stopped_run_goes_on_to_the_same_kernel_and_diagonal(tmp_path: Path, formula: str) -> None:
    whole = job_of(tmp_path / "whole", formula)
    assert whole.compute(progress=False) == 0
    kernel, diagonal = assembled(whole, tmp_path)
    assert diagonal is not None
    assert list(diagonal.shape) == [*kernel.shape[:-4], 3, 2, 2]
    torch.testing.assert_close(whole.diagonal_alone(), diagonal, rtol=1e-12, atol=1e-12)

    stopped = job_of(tmp_path / "stopped", formula)
    wanted = stopped.tile_shape.with_diagonal
    assert [tile in wanted for tile in stopped.plan] == [True, True, False, False]
    for number, (tile, block, own) in enumerate(stopped.engine.tiles_of_group(stopped.plan, 0, wanted)):
        if number == 0:
            stopped.store.write(number, 0, tile, block)  # as a version without diagonals wrote it
        elif number < 3:
            stopped.store.write(number, 0, tile, block, own)
    again = job_of(tmp_path / "stopped", formula)
    assert again.store.finished_tiles() and sorted(again.store.complete_tiles(again.plan, again.tile_shape)) == [1, 2]
    assert again.compute(progress=False) == 2
    found = assembled(again, tmp_path)
    assert torch.equal(found[0], kernel)
    assert torch.equal(found[1], diagonal)


def test_the_train_kernel_has_no_file_of_its_diagonal(tmp_path: Path) -> None:
    job = job_of(tmp_path, split="train")
    job.compute(progress=False)
    assert assembled(job, tmp_path)[1] is None
    assert job.diagonal_bytes == 0


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    cache = KernelCache(tmp_path, None, "sst-2", overwrite=False)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(7, 2, 30, generator=generator, dtype=torch.float64)
    train, x = gradients[:4], gradients[4:]
    cache.save("train", (torch.einsum("iap,jbp->iajb", train, train), torch.tensor([0, 1, 0, 1])), KernelSlices(), {})
    diagonal = torch.einsum("iap,ibp->iab", x, x)
    cache.save("test", (torch.einsum("iap,jbp->iajb", train, x), torch.tensor([0, 1, 0])), KernelSlices(), {}, diagonal)
    return SavedRun(tmp_path, "sst-2", {}, {})


def test_a_saved_run_reads_the_diagonal_of_train_from_its_kernel(run: SavedRun) -> None:
    train = run.kernel("train").values
    diagonal, of_test = run.diagonal("train"), run.diagonal("test")
    assert diagonal is not None and of_test is not None
    assert [diagonal[i].tolist() for i in range(4)] == [train[i, :, i].tolist() for i in range(4)]
    assert of_test.shape == (3, 2, 2)
    RunPaths(run.folder, "sst-2").diagonal("test").unlink()
    assert run.diagonal("test") is None


def test_a_diagonal_of_another_kernel_is_refused(run: SavedRun) -> None:
    path, kernel = run.paths.diagonal("test"), run.paths.kernel("test")
    torch.save(torch.zeros(3, 2, 2), path)
    with pytest.raises(KernelMismatchError, match="names another one") as caught:
        run.diagonal("test")
    assert caught.value.data["differences"] == [kernel_metadata.DIAGONAL_HASH_KEY]
    said = kernel_metadata.read_description(kernel) or {}
    said.pop(kernel_metadata.DIAGONAL_HASH_KEY)
    kernel_metadata.write_description(kernel, said)
    with pytest.raises(KernelMismatchError, match="does not name it"):
        run.diagonal("test")


def test_a_file_that_holds_no_diagonal_of_the_kernel_is_refused(run: SavedRun) -> None:
    path = run.paths.diagonal("test")
    for content in (torch.zeros(2, 2, 2), {"a": torch.zeros(3, 2, 2)}):
        torch.save(content, path)
        said = kernel_metadata.read_description(run.paths.kernel("test")) or {}
        said[kernel_metadata.DIAGONAL_HASH_KEY] = kernel_metadata.file_hash(path)
        kernel_metadata.write_description(run.paths.kernel("test"), said)
        with pytest.raises(FileError):
            run.diagonal("test")


def test_a_kernel_that_is_computed_anew_takes_its_old_diagonal_away(run: SavedRun) -> None:
    cache = KernelCache(run.folder, None, "sst-2", overwrite=True)
    kernel = torch.as_tensor(run.kernel("test").values)
    cache.save("test", (kernel, torch.tensor([0, 1, 0])), KernelSlices(), {})
    assert run.diagonal("test") is None
    cache.save_diagonal("test", torch.ones(3, 2, 2))
    assert run.diagonal("test") is not None


def test_every_formula_has_its_diagonal_in_the_size_on_disk(tmp_path: Path) -> None:
    sizes = {name: job_of(tmp_path / name, name).diagonal_bytes for name in FORMULAS}
    assert sizes == {"sgd": 96, "signgd": 96, "asymmetric_signgd": 192}
