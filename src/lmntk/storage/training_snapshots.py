"""Snapshots of a training: what a model and its linearisation say at a step, and the kernel there.

A snapshot of step t is a safetensors file. Its tensors are ``{split}.logits``, f(x; θ_t), and ``{split}.linearised``,
f(x; θ₀) + ⟨∂f(x; θ₀)/∂θ, θ_t − θ₀⟩, both float64 [X, C]; ``{split}.labels``, class ids, int64 [X]; and ``kernel``, the
kernel of the train examples at θ_t, float64 [N, C, N, C] or [2, N, C, N, C]. Tensors that are not wanted are missing.
Its metadata have one key, ``snapshot``: JSON with the step and a description. With two keys safetensors 0.8 would write
them in an order that changes from call to call, and equal snapshots would differ in their bytes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lmntk.errors import FileError
from lmntk.storage.atomic import write_atomically
from lmntk.storage.paths import RunPaths

Array = NDArray[np.float64]
_NAME = re.compile(r"step-(\d+)_(.+)\.safetensors")
_REMEDY = "repeat the training with `kernel_steps`"


@dataclass(frozen=True)
class SplitSnapshot:
    """The logits of a split at one step; several prompts of an example are averaged.

    Attributes:
        labels: Class ids, [X].
        logits: f(x; θ_t), float64 [X, C]; with C = 1 the difference f₁ − f₀.
        linearised: The same of the model linearised at θ₀, float64 [X, C].
    """

    labels: NDArray[np.int64]
    logits: Array
    linearised: Array


@dataclass(frozen=True)
class TrainingSnapshot:
    """A training at one step.

    Attributes:
        step: The number of optimizer steps taken, t; 0 before the first.
        splits: The logits of each split: ``"train"``, ``"dev"``, ``"test"``.
        kernel: The kernel of train × train at θ_t; None if it was not wanted.
        description: What defines the numbers (settings, parameters, prompt), and further numbers of the step.
    """

    step: int
    splits: Mapping[str, SplitSnapshot]
    kernel: Array | None = None
    description: Mapping[str, Any] = field(default_factory=dict)


def write_snapshot(paths: RunPaths, snapshot: TrainingSnapshot) -> Path:
    """Write a snapshot into the folder of its run, and return its path.

    Raises:
        FileError: The file cannot be written.
    """
    tensors: dict[str, Any] = {} if snapshot.kernel is None else {"kernel": np.asarray(snapshot.kernel, np.float64)}
    for split, found in snapshot.splits.items():
        tensors[f"{split}.labels"] = np.asarray(found.labels, np.int64)
        tensors[f"{split}.logits"] = np.asarray(found.logits, np.float64)
        tensors[f"{split}.linearised"] = np.asarray(found.linearised, np.float64)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = {"snapshot": json.dumps({"step": snapshot.step, "description": dict(snapshot.description)})}
    content = safetensors.numpy.save(tensors, metadata)
    path = paths.snapshot(snapshot.step)
    write_atomically(path, lambda file: file.write(content))
    return path


def read_snapshot(path: Path) -> TrainingSnapshot:
    """Read a snapshot.

    Raises:
        FileError: The file is missing or damaged, or holds something else.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = json.loads((file.metadata() or {})["snapshot"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dictionary)
        splits = {
            name.removesuffix(".labels"): SplitSnapshot(
                labels, *(tensors[name.replace(".labels", f".{kind}")] for kind in ("logits", "linearised"))
            )
            for name, labels in tensors.items()
            if name.endswith(".labels")
        }
        return TrainingSnapshot(int(metadata["step"]), splits, tensors.get("kernel"), dict(metadata["description"]))
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist: {_REMEDY}", path=path) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FileError(f"{path} is not a snapshot of a training, or is damaged: {_REMEDY}", path=path) from error


def step_of_file(path: Path) -> int:
    """Return the step in the name of a snapshot's file."""
    return int(path.name.removeprefix("step-").partition("_")[0])


def find_snapshots(paths: RunPaths) -> list[Path]:
    """Return the snapshots in the folder of a run, in the order of their steps."""
    found = {}
    for path in Path(paths.folder).glob(f"step-*_{paths.task_key}.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match is not None and match[2] == paths.task_key:
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]
