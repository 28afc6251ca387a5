"""tools/benchmarks/large_kernels.py: a kernel that is larger than what a process may take, at a small size."""

import re
import resource
from pathlib import Path

import pytest
import torch

from benchmarks import large_kernels
from lmntk.kernels import assembly
from lmntk.storage import tensor_files
from lmntk.storage.kernel_files import load_kernel
from lmntk.storage.paths import RunPaths

SMALL = ("--examples", "150", "--x_examples", "40", "--tile", "32", "--dimension", "16", "--threads", "1")


def test_every_method_predicts_alike_from_kernels_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", 1)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    flags = (*SMALL, "--folder", str(tmp_path), "--memory_gb", "64", "--cg_tolerance", "1e-12")
    assert large_kernels.main([*flags, "--methods", "direct", "cholesky", "cg"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("150 × 150 in one logit, 0.00 GB, limit 64 GB, 1 threads, λ = 0.001\n")
    steps = re.findall(r"^\| (.*?) +\|", said, flags=re.MULTILINE)
    assert steps[1:5] == [f"train × {split}: {step}" for split in ("train", "test") for step in ("tiles", "assembly")]
    differences = [float(number) for number in re.findall(r"from direct's: (\S+)", said)]
    assert len(differences) == 3 and max(differences) <= 1e-9
    assert all(float(number) <= 1e-12 for number in re.findall(r"lstsq_residual = ([^,;]+)", said))
    assert not list(tmp_path.iterdir()) and resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_kernel_is_assembled_in_less_memory_than_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB more than the process has, of which a thread's stack may take 8, and 72 MB of kernel."""
    monkeypatch.setattr(assembly, "BAND_BYTES", 2**20)
    examples = large_kernels.RandomExamples(3000, 8, seed=0)
    job, paths = large_kernels.make_job(examples, None, 500, tmp_path / "tiles"), RunPaths(tmp_path, "random")
    job.store.create()
    job.compute(progress=False)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (held,) = re.findall(r"VmData:\s+(\d+) kB", status)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held) * 1024 + 20 * 2**20, before[1]))
    try:
        large_kernels.write_kernel(job, paths, "train", torch.ones(3000), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    kernel, _ = load_kernel(paths.kernel("train"))
    features = examples.features.double()
    torch.testing.assert_close(kernel[::400, 0, :, 0], features[::400] @ features.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(kernel[:, 0, :, 0], kernel[:, 0, :, 0].T)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(("--folder", "nowhere"), "--folder: there is no folder nowhere"), (("--tile", "0"), "--tile is 0")],
)
def test_mistakes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    assert large_kernels.main(["--folder", str(tmp_path), *flags]) == 2
    assert sentence in capsys.readouterr().err
