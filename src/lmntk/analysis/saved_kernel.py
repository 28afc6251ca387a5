"""A kernel file of a finished run, with its description: its logits, samples and classes."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmntk.errors import KernelMismatchError
from lmntk.solvers import problem
from lmntk.solvers.problem import Array, ClassIds
from lmntk.storage import kernel_files, kernel_metadata

logger = logging.getLogger(__name__)

RECOMPUTE = "repeat the command that made it, with `overwrite_kernels=True`"


@dataclass(frozen=True)
class SavedKernel:
    """A kernel file and its description.

    Attributes:
        path: The file.
        values: The kernel, float64 [N, C, X, C] or [2, N, C, X, C].
        labels: The labels as the file has them, [X].
        description: The contents of the description beside the file; empty if there is none.
    """

    path: Path
    values: Array
    labels: Array
    description: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "SavedKernel":
        """Read a kernel file and its description."""
        values, labels = kernel_files.load_kernel(path)
        description = kernel_metadata.read_description(path) or {}
        if description.get("projection") and path.name.startswith("train_"):
            error = (description.get("projection_error") or {}).get("own")
            known = "" if error is None else f", whose entries are {error:.1%} off"
            logger.warning("%s is an estimate by random projections%s: so is all that follows from it", path, known)
        return cls(path, values.numpy(), labels.numpy(), description)

    @property
    def num_logits(self) -> int:
        """Logits per example, C."""
        return self.values.shape[-1]

    @property
    def samples_per_example(self) -> tuple[int, int]:
        """How many rows stand for each train example, and columns for each other one: one for each template and draw.

        Raises:
            KernelMismatchError: The kernel's size is not a multiple of the number that its description implies.
        """
        templates = self.description.get("template")
        of_train = len(templates) if isinstance(templates, list) else 1
        draws = (self.description.get("demonstrations") or {}).get("draws", 1)
        of_x = of_train if self.path.name.startswith("train_") else of_train * draws
        rows, columns = self.values.shape[-4], self.values.shape[-2]
        if rows % of_train or columns % of_x:
            raise KernelMismatchError(
                f"{self.path} has {rows} × {columns} examples, but its description implies {of_train} and {of_x} "
                f"samples of each: {RECOMPUTE}",
                path=self.path,
                differences=["samples"],
            )
        return of_train, of_x

    @property
    def class_ids(self) -> ClassIds:
        """The class ids of the examples, one for each example whatever the number of samples."""
        return problem.class_ids(self.labels, self.num_logits)[: len(self.labels) // self.samples_per_example[1]]

    def average_over_samples(self, matrix: Array) -> Array:
        """Average a matrix [N, X] of all pairs over the samples of each example: the kernel of their mean logits."""
        of_train, of_x = self.samples_per_example
        rows, columns = matrix.shape
        parts = matrix.reshape(of_train, rows // of_train, of_x, columns // of_x)
        return parts.mean(axis=(0, 2))
