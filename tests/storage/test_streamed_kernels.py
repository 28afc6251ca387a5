"""Kernels that are assembled into their files a few rows at a time: the bytes of torch.save, whatever is in memory."""

import errno
import io
import json
import os
import resource
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_problems import names_of, problem_of, sides
from lmntk.errors import FileError
from lmntk.kernels import TileRequest, assemble, assembly
from lmntk.kernels.assembly import Bands, make_engine, sum_of_parts
from lmntk.models.parameter_parts import parts_of
from lmntk.models.parameters import ParameterFilter
from lmntk.storage import kernel_files, kernel_slices, tensor_files
from lmntk.storage.kernel_metadata import file_hash
from lmntk.storage.kernel_slices import LAYERS_ALONE, KernelSlices, check_sum
from lmntk.storage.kernel_writer import kernel_writer
from lmntk.storage.paths import RunPaths
from lmntk.storage.streamed_tensors import StreamedTensors
from lmntk.storage.tile_store import TileStore
from lmntk.trainers.kernel_job import KernelJob
from saved_kernels import save_kernel
from tiny_models import tiny_prompt_model

LABELS = torch.tensor([1, 0, 1])


def saved(content: Any) -> bytes:
    """What torch.save makes of some tensors."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


ARRANGED: dict[str, Callable[[Sequence[Tensor]], Any]] = {
    "a kernel": lambda tensors: (tensors[0], LABELS),
    "parts": lambda tensors: {f"layer {number}": tensor for number, tensor in enumerate(tensors)},
}


@pytest.mark.parametrize("kind", ARRANGED)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 2, 3, 2), (2, 5, 1, 300, 1)])
def test_the_bytes_are_those_of_torch_save(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(1 if kind == "a kernel" else 3)]
    path = tmp_path / "kernel.pt"
    with path.open("x+b") as file:
        streamed = StreamedTensors(file, [shape] * len(tensors), ARRANGED[kind])
        for number, tensor in enumerate(tensors):
            half = tensor.numel() // 2
            streamed.write(number, half, tensor.flatten()[half:])
            streamed.write(number, 0, tensor.flatten()[:half])
        digest = streamed.finish()
    assert path.read_bytes() == saved(ARRANGED[kind](tensors))
    assert digest == file_hash(path)
    assert zipfile.ZipFile(path).testzip() is None, "the check sums of the archive are right"
    found = torch.load(path, weights_only=True, mmap=True)
    assert all(
        torch.equal(*pair) for pair in zip(found.values() if kind == "parts" else found[:1], tensors, strict=True)
    )


def test_a_torch_that_puts_tensors_elsewhere_is_noticed(tmp_path: Path) -> None:
    with (tmp_path / "kernel.pt").open("x+b") as file:
        streamed = StreamedTensors(file, [(2, 2)], ARRANGED["a kernel"])
        streamed._starts = [start + 64 for start in streamed._starts]
        file.truncate(4096)
        with pytest.raises(RuntimeError) as caught:
            streamed.finish()
    assert "wrote a tensor at" in str(caught.value.__context__), "torch makes an error of its own of it"


def job_of(folder: Path, formula: str, split: str, parts: bool = False) -> KernelJob:
    """A kernel in tiles of two examples, which is computed."""
    model = tiny_prompt_model("roberta")
    train, x = sides("roberta")
    problem = problem_of(model, names_of(model, ParameterFilter()), train, None if split == "train" else x, formula)
    if parts:
        problem = replace(problem, part_of=parts_of(problem.params, model, ("layer",)))
    engine = make_engine(problem)
    plan = engine.plan(TileRequest(2, 2))
    job = KernelJob(split, engine, plan, engine.estimate_cost(plan), TileStore.open(folder, {"formula": formula}))
    job.store.create()
    job.compute(progress=False)
    return job


def written(job: KernelJob, folder: Path) -> RunPaths:
    """The files that a job's kernel is written to."""
    paths = RunPaths(folder, "sst-2")
    kernel, slices = job.outline()
    slices = replace(slices, keys=LAYERS_ALONE if slices.parts else ())
    with kernel_writer(paths, "test", kernel, torch.zeros(kernel.shape[-2]), slices) as writer:
        writer.finish({}, job.assemble(writer))
    return paths


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("formula", ["sgd", "asymmetric_signgd"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("band_bytes", [1, assembly.BAND_BYTES], ids=["a row at a time", "a tile at a time"])
def test_a_kernel_has_the_bytes_of_one_that_is_assembled_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formula: str, split: str, parts: bool, band_bytes: int
) -> None:
    monkeypatch.setattr(assembly, "BAND_BYTES", band_bytes)
    job = job_of(tmp_path / "tiles", formula, split, parts)
    problem, plan = job.engine.problem, job.plan
    assert len({band.examples for band in Bands(plan, problem)}) == (plan.train_size if band_bytes == 1 else 2)
    blocks = job.store.blocks(enumerate(plan), job.engine.num_parameter_groups(plan), job.tile_shape, deadline=0)
    slices = assemble(blocks, plan, problem).unflatten(0, (len(problem.slices), -1))
    slices = slices if problem.formula.is_asymmetric else slices[:, 0]
    paths, labels = written(job, tmp_path), torch.zeros(plan.x_size)
    whole = sum_of_parts(slices.unbind())
    assert paths.kernel("test").read_bytes() == saved((whole, labels))
    if parts:
        assert len(slices) == len(problem.parts) > 2
        named = {name: part.clone() for name, part in zip(problem.parts, slices, strict=True)}
        assert paths.layer_kernels("test").read_bytes() == saved(named)
    described = json.loads(paths.description("test").read_text(encoding="utf-8"))
    assert described["kernel_sha256"] == file_hash(paths.kernel("test"))
    assert not list(tmp_path.glob(".*.tmp"))
    assert paths.diagonal("test").exists() == (split == "test")
    if split == "test":
        diagonal = job.diagonal_alone()
        torch.testing.assert_close(
            torch.load(paths.diagonal("test"), weights_only=True), diagonal, rtol=1e-5, atol=1e-6
        )


def test_a_band_is_small_where_rows_are_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = job_of(tmp_path, "sgd", "test", parts=True)
    problem = job.engine.problem
    row = 8 * problem.num_slices * problem.num_logits**2 * job.plan.x_size
    monkeypatch.setattr(assembly, "BAND_BYTES", row)
    assert Bands(job.plan, problem).num_bytes == 2 * row
    assert job.memory_bytes == max(job.engine.expected_bytes(job.plan), 2 * row), "the kernel itself is on disk"


def test_a_kernel_that_outgrows_the_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    paths, before = RunPaths(tmp_path, "sst-2"), resource.getrlimit(resource.RLIMIT_FSIZE)
    kernel = torch.empty(8, 2, 100, 2, dtype=torch.float64, device="meta")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with (
            pytest.raises(FileError, match=r"cannot write .*test_kernels_sst-2\.pt \(File too large\): make room"),
            kernel_writer(paths, "test", kernel, torch.zeros(100), KernelSlices()),
        ):
            pytest.fail("the file cannot have its size")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kernel = torch.ones(2, 1, 3, 1, dtype=torch.float64)
    with (
        pytest.raises(FileError, match="No space left on device"),
        kernel_writer(RunPaths(tmp_path, "sst-2"), "test", kernel, LABELS, KernelSlices()) as writer,
    ):
        writer.write([0], kernel[:1], KernelSlices())
        monkeypatch.setattr(os, "pwrite", full)
        writer.write([1], kernel[1:], KernelSlices())
    assert not list(tmp_path.iterdir())


def test_a_large_kernel_is_mapped_and_stays_as_it_was_when_its_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", 1)
    path, kernel = tmp_path / "test_kernels_sst-2.pt", torch.randn(4, 1, 3, 1, dtype=torch.float64)
    save_kernel(path, kernel, LABELS, {})
    found, labels = kernel_files.load_kernel(path)
    save_kernel(path, kernel + 1, LABELS, {})
    assert torch.equal(found, kernel) and torch.equal(labels, LABELS)
    assert str(tmp_path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    found += 1  # a copy of the process's own
    assert torch.equal(kernel_files.load_kernel(path)[0], kernel + 1)


def test_a_large_kernel_that_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", 1)
    path, kernel = tmp_path / "test_kernels_sst-2.pt", torch.randn(4, 1, 3, 1, dtype=torch.float64)
    torch.save((kernel, LABELS), path, _use_new_zipfile_serialization=False)
    assert torch.equal(kernel_files.load_kernel(path)[0], kernel)
    path.write_bytes(saved((kernel, LABELS))[:-40])
    with pytest.raises(FileError, match="cannot be read as kernel"):
        kernel_files.load_kernel(path)


@pytest.mark.parametrize("numbers", [1, 40, 10**6], ids=["a row", "some rows", "all rows"])
def test_parts_are_compared_with_the_kernel_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(kernel_slices, "CHECKED_NUMBERS", numbers)
    parts = {name: torch.randn(2, 5, 1, 7, 1, dtype=torch.float64) for name in "abc"}
    kernel = sum_of_parts([*parts.values()])
    names = list(parts)
    assert check_sum(parts, names, kernel, 1e-15) and not check_sum(parts, names[:2], kernel, 1e-9)
    kernel[1, 4, 0, 6, 0] += 1e-6 * kernel.norm()
    assert check_sum(parts, names, kernel, 2e-6) and not check_sum(parts, names, kernel, 0.5e-6)
    assert not check_sum(parts, [], kernel, 1.0) and not check_sum(parts, names, kernel[:1], 1.0)
