"""Training in two processes."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import ROOT, Workplace
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import find_snapshots, read_snapshot
from training_runs import MODEL, RESULTS, STEPS, files, results, weights


@pytest.fixture(scope="module")
def processes(place: Workplace, still: Path, warm_python: str) -> dict[str, tuple[Path, Path]]:
    """Output folders of one process, and of two with batches half as large, of each kind of run."""
    trained = (*STEPS, "--optimizer", "sgd", "--learning_rate", "0.1", "--model_name_or_path", str(still))
    kinds = {"trained": trained, "zero": ("--no_train",), "snapshots": (*trained, "--kernel_steps", "0,1,last")}
    kinds["linearised"] = (*trained, "--trainer", "linearised")
    runs = [{"argv": place.argv(*flags, output=f"two {kind}")} for kind, flags in kinds.items()]
    path = place.folder / "runs.json"
    path.write_text(json.dumps(runs), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests' / 'helpers'}"}
    environment["PYTHON_EXEC"] = warm_python  # what torchrun starts
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [warm_python, *launcher, str(ROOT / "tests" / "helpers" / "process_runs.py"), str(path)],
        cwd=place.folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("results are in ") == 4
    doubled = ("--per_device_train_batch_size", "4")
    return {
        kind: (place.run(*flags, *doubled, output=f"one {kind}"), place.folder / f"two {kind}")
        for kind, flags in kinds.items()
    }


@pytest.mark.slow
def test_two_processes_train_as_one_with_batches_twice_as_large(
    still: Path, processes: dict[str, tuple[Path, Path]]
) -> None:
    alone, together = processes["trained"]
    assert files(together) == files(alone) == RESULTS | MODEL
    for found, wanted in zip(results(together), results(alone), strict=True):
        assert found["eval_acc"] == wanted["eval_acc"]
    found, wanted, start = weights(together), weights(alone), weights(still)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    assert not torch.allclose(found["lm_head.dense.weight"], start["lm_head.dense.weight"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "linearised", "zero"])
def test_two_processes_find_the_loss_that_one_finds(processes: dict[str, tuple[Path, Path]], kind: str) -> None:
    alone, together = processes[kind]
    for found, wanted in zip(results(together), results(alone), strict=True):
        assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_write_the_snapshots_of_one(processes: dict[str, tuple[Path, Path]]) -> None:
    alone, together = (
        [read_snapshot(path) for path in find_snapshots(RunPaths(folder, "sst-2"))] for folder in processes["snapshots"]
    )
    assert [found.step for found in together] == [wanted.step for wanted in alone] == [0, 1, 4]
    for found, wanted in zip(together, alone, strict=True):
        assert found.splits.keys() == wanted.splits.keys() == {"train", "dev", "test"}
        for split, numbers in wanted.splits.items():
            assert np.allclose(found.splits[split].logits, numbers.logits, atol=1e-4)
            assert np.allclose(found.splits[split].linearised, numbers.linearised, atol=1e-4)
        assert found.kernel is not None and wanted.kernel is not None
        assert np.linalg.norm(found.kernel - wanted.kernel) < 1e-4 * np.linalg.norm(wanted.kernel)
    trained = processes["trained"][1]
    assert (trained / "model.safetensors").read_bytes() == (
        processes["snapshots"][1] / "model.safetensors"
    ).read_bytes(), "snapshots change nothing"
