"""How well each layer's part of the kernel predicts by itself."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from lmntk.solvers import FittedSolver
from lmntk.storage.atomic import write_atomically
from lmntk.storage.kernel_files import LayerKernels, trace_shares
from lmntk.storage.tables import format_table

logger = logging.getLogger(__name__)


class LayerSolver(NamedTuple):
    """A layer's share of the train kernel's trace, and the solver fitted to its part of that kernel."""

    share: float
    solver: FittedSolver


def fit_layers(
    layers: LayerKernels, fit: Callable[[np.ndarray], FittedSolver], progress: bool = False
) -> dict[str, LayerSolver]:
    """Fit a solver to each layer's part of the train kernel.

    Args:
        layers: The parts, ``[N, C, N, C]`` or ``[2, N, C, N, C]``.
        fit: Fits the solver of the run to one of them.
        progress: Whether to show a progress bar.
    """
    shares = trace_shares(layers)
    bar = tqdm(layers.items(), desc="one layer at a time", unit="layer", disable=not (layers and progress))
    return {layer: LayerSolver(shares[layer], fit(part.numpy())) for layer, part in bar}


def score_layers(
    solvers: Mapping[str, LayerSolver], layers: LayerKernels, score: Callable[[FittedSolver, Tensor], float]
) -> dict[str, float]:
    """Return the score of each layer's solver on a split.

    Args:
        solvers: Those that `fit_layers` returned.
        layers: The parts of the kernel of train and this split, ``[N, C, X, C]`` or ``[2, N, C, X, C]``.
        score: Predicts with a solver and one part, and scores the predictions.
    """
    return {layer: score(solvers[layer].solver, part) for layer, part in layers.items()}


def write_layer_scores(
    path: Path, solvers: Mapping[str, LayerSolver], scores: Mapping[str, Mapping[str, float]], metric: str
) -> None:
    """Write a table as CSV, a row for each layer with its share and its scores, and log it.

    Args:
        path: The file.
        solvers: Those that `fit_layers` returned.
        scores: Split → layer → score.
        metric: The name of the score; columns are called ``<split>_<metric>``.
    """
    rows = [
        {
            "layer": layer,
            "share": f"{solver.share:.4f}",
            **{f"{split.rpartition(':')[2]}_{metric}": f"{found[layer]:.4f}" for split, found in scores.items()},
        }
        for layer, solver in solvers.items()
    ]
    write_atomically(path, lambda file: file.write(format_table(rows, "csv").encode()))
    table = format_table(rows, words=["layer"]).rstrip("\n")
    logger.info("each layer's share of the kernel's trace, and the scores of its part alone (%s):\n%s", path, table)
