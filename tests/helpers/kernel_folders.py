"""Folders such as runs leave them, written without a run: kernels of random features, texts, what a run records."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmntk.storage.diagonal_files import note_diagonal, save_diagonal
from lmntk.storage.logits_files import save_logits
from lmntk.storage.paths import RunPaths
from saved_kernels import save_kernel

SIZES = {"train": 8, "dev": 6, "test": 10}


class Folder:
    """A run's folder of SST-2 in `path`, and the data in `data`.

    Args:
        root: Where to make both.
        name: Of the folder.
        logits: C.
        noise: How much of the kernels is random; the rest tells the classes apart.
        samples: How often each example is there.
        task: The task.
        asymmetric: Whether there are two directions.
    """

    def __init__(
        self,
        root: Path,
        name: str = "run",
        *,
        logits: int = 2,
        noise: float = 1.0,
        samples: int = 1,
        task: str = "sst-2",
        asymmetric: bool = False,
        seed: int = 0,
    ) -> None:
        self.path, self.data, self.task, self.logits = root / name, root / "data", task, logits
        self.samples, self.asymmetric = samples, asymmetric
        self.path.mkdir(parents=True)
        self.data.mkdir(exist_ok=True)
        self.classes = {split: np.arange(size) % max(2, logits) for split, size in SIZES.items()}
        rng = np.random.default_rng(seed)
        means = rng.normal(size=(max(2, logits), 40))
        self.features = {}
        for split, ids in self.classes.items():
            rows = np.tile(ids, samples)
            # A logit answers to its own class; a single one tells one class from the other.
            own = np.ones((len(rows), 1)) if logits == 1 else rows[:, None] == np.arange(logits)
            phi = own[:, :, None] * means[rows][:, None]
            self.features[split] = phi + noise * rng.normal(size=(len(rows), logits, 40))
        for split in SIZES:
            self.write(split)

    def labels(self, split: str) -> np.ndarray:
        """The labels as a kernel file has them."""
        ids = np.tile(self.classes[split], self.samples)
        return 2.0 * ids - 1 if self.logits == 1 else ids

    def kernel(self, split: str) -> np.ndarray:
        """[N, C, X, C], or with a leading 2."""
        train, other = self.features["train"], self.features[split]
        if not self.asymmetric:
            return np.einsum("iaf,jbf->iajb", train, other)
        both = [np.einsum("iaf,jbf->iajb", np.sign(train), other), np.einsum("iaf,jbf->iajb", train, np.sign(other))]
        return np.stack(both)

    def write(self, split: str, kernel: np.ndarray | None = None) -> Path:
        """Write the kernel of a split, its description and its texts."""
        self._write_texts(split)
        files = {name: self.texts(name) for name in ("train", split) if self.texts(name).exists()}
        description = {
            "formula": "sgd",
            "template": ["*cls**sent_0*_It_was*mask*.*sep+*"] * self.samples,
            "mapping": {"0": "terrible", "1": "great"},
            "grad_dim": 1234,
            "model": "tiny",
            "data_files": {name: str(file) for name, file in files.items()},
            "data_sha256": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()},
        }
        path = RunPaths(self.path, self.task).kernel(split)
        values = torch.from_numpy(self.kernel(split) if kernel is None else kernel)
        save_kernel(path, values, torch.from_numpy(self.labels(split)), description)
        return path

    def diagonal(self, split: str) -> np.ndarray:
        """K(x, x), [X, C, C], or with a leading 2."""
        other = self.features[split]
        if not self.asymmetric:
            return np.einsum("jaf,jbf->jab", other, other)
        one = np.einsum("jaf,jbf->jab", np.sign(other), other)
        return np.stack([one, one.transpose(0, 2, 1)])

    def write_diagonals(self) -> None:
        """Write K(x, x) beside the kernels of dev and test."""
        paths = RunPaths(self.path, self.task)
        for split in ("dev", "test"):
            save_diagonal(paths.diagonal(split), torch.from_numpy(self.diagonal(split)))
            note_diagonal(paths.kernel(split), paths.diagonal(split))

    def texts(self, split: str) -> Path:
        """The file of a split's texts."""
        return self.data / f"{split}.{'csv' if self.task == 'mr' else 'tsv'}"

    def _write_texts(self, split: str) -> None:
        pairs = [(f"{split} sentence {i}", label) for i, label in enumerate(self.classes[split])]
        if self.task == "mr":
            lines = [f"{label},{text}" for text, label in pairs]
        else:
            lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in pairs)]
        if not self.texts(split).exists():
            self.texts(split).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write_untrained_logits(self) -> dict[str, np.ndarray]:
        """Write f₀ of all splits."""
        rng = np.random.default_rng(1)
        found = {split: rng.normal(size=(len(self.labels(split)), self.logits)) for split in SIZES}
        for split, logits in found.items():
            path = self.path / f"{split}_logits_{self.task}.pt"
            save_logits(path, torch.from_numpy(logits), torch.from_numpy(self.labels(split)))
        return found

    def record(self, **flags: Any) -> Mapping[str, Any]:
        """Write what a run of the kernel trainer records."""
        record = {"trainer": "kernel", "model_name_or_path": "tiny", "do_train": True, "seconds": 2.5, **flags}
        RunPaths(self.path, self.task).record().write_text(json.dumps(record), encoding="utf-8")
        return record
