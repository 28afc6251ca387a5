"""How well each layer's part of the kernel predicts by itself."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from lmntk.solvers import FittedSolver, Prediction
from lmntk.storage.atomic import write_atomically
from lmntk.storage.kernel_files import LayerKernels, trace_shares

logger = logging.getLogger(__name__)


class LayerScores:
    """The layers' shares of the kernel, and the scores of a solver that is given one layer's part and no more.

    Args:
        metric: The name of the score.
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._shares: dict[str, float] = {}
        self._fitted: dict[str, FittedSolver] = {}
        self._scores: dict[str, dict[str, float]] = {}

    def fit(self, layers: LayerKernels, fit: Callable[[np.ndarray], FittedSolver], show: bool) -> None:
        """Fit the solver to each layer's part of the kernel of the train examples with themselves.

        Args:
            layers: The parts, ``[N, C, N, C]`` or ``[2, N, C, N, C]``.
            fit: Fits the solver of the run to one of them.
            show: Whether to show progress.
        """
        self._shares = trace_shares(layers)
        for layer, part in tqdm(layers.items(), desc="layers alone", unit="layer", disable=not (layers and show)):
            self._fitted[layer] = fit(part.numpy())

    def predict(self, layer: str, part: Tensor, labels: Tensor, f0: np.ndarray | None, split: str) -> Prediction:
        """Predict a split by one layer's part of its kernel."""
        return self._fitted[layer].predict(part.numpy(), labels.numpy(), f0, split)

    def add(self, layer: str, split: str, score: float) -> None:
        """Note how well that was."""
        self._scores.setdefault(layer, {})[split] = score

    def write(self, path: Path) -> None:
        """Write the table, a row for each layer, as CSV, and log it."""
        splits = list(dict.fromkeys(split for scores in self._scores.values() for split in scores))
        rows = [["layer", "share", *(f"{split.rpartition(':')[2]}_{self._metric}" for split in splits)]]
        for layer, share in self._shares.items():
            scores = self._scores.get(layer, {})
            rows.append([layer, f"{share:.4f}", *(f"{scores[split]:.4f}" for split in splits)])
        text = "".join(",".join(row) + "\n" for row in rows)
        write_atomically(path, lambda file: file.write(text.encode()))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        logger.info("each layer's share of the kernel's trace, and its part alone (%s):\n%s", path, "\n".join(lines))
