"""How sure the kernel's predictions are: metrics and a table of a split, from the Gaussian process of `lstsq`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from lmntk.errors import SettingError, SolverError
from lmntk.prompts.features import FeatureDataset
from lmntk.solvers.gaussian_process import GaussianProcess
from lmntk.solvers.problem import Array, ClassIds
from lmntk.solvers.ridge_problem import RidgeProblem
from lmntk.solvers.uncertainty import split_uncertainty
from lmntk.storage.atomic import write_text
from lmntk.storage.tables import format_table

logger = logging.getLogger(__name__)


def check_one_prompt_each(data: FeatureDataset) -> None:
    """Refuse several prompts of an example.

    The logits of such an example are a mean, whose variance needs K between its prompts too; only K(x, x) of each
    prompt is stored.
    """
    if data.num_sample > 1:
        raise SettingError(
            f"`kernel_variance` needs one prompt for each example, and each of {data.mode} has {data.num_sample}: give "
            "one template and `num_sample=1`, or leave `kernel_variance` out",
            setting="kernel_variance",
            value=True,
        )


def gaussian_process(problem: RidgeProblem) -> GaussianProcess | None:
    """Return the Gaussian process of a least-squares problem; None where it has none, with a line in the log."""
    with threadpool_limits(limits=1):
        try:
            process = GaussianProcess(problem)
        except SolverError as error:
            logger.warning("the metrics nll and ece are left out: %s", error)
            return None
        logger.info("Gaussian process: σ² = %.6g, noise %.6g", process.scale, process.noise)
        return process


def score_variance(
    process: GaussianProcess,
    kernel: Array,
    diagonal: Array,
    logits: Array,
    classes: ClassIds,
    labels: Sequence[str],
    table: Path,
) -> dict[str, float]:
    """Write the standard deviations and class probabilities of a split, and score the probabilities.

    Args:
        process: The Gaussian process of the train examples.
        kernel: The kernel of train and X, ``[N, C, X, C]``.
        diagonal: K(x, x), ``[X, C, C]``.
        logits: The predictions, ``[X, C]``.
        classes: The right classes, ``[X]``.
        labels: The names of the classes.
        table: The file to write, from `RunPaths.variance`.

    Returns:
        ``nll`` and ``ece``; nothing, and no table, where rounding hides the variance.
    """
    try:
        found = split_uncertainty(process, kernel, diagonal, logits, classes)
    except SolverError as error:
        logger.warning("the metrics nll and ece are left out: %s", error)
        table.unlink(missing_ok=True)  # of an earlier run
        return {}
    columns = {
        "index": range(len(classes)),
        "label": [labels[number] for number in classes],
        "prediction": [labels[number] for number in found.predicted],
        "margin": [f"{value:.6g}" for value in found.margins],
        "margin_std": [f"{value:.6g}" for value in found.margin_std],
        **{
            f"probability_{label}": [f"{value:.6g}" for value in values]
            for label, values in zip(labels, found.probabilities.T, strict=True)
        },
    }
    cells = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_text(table, format_table(cells, "csv"))
    logger.info("standard deviations and probabilities → %s", table)
    return {"nll": found.nll, "ece": found.ece}
