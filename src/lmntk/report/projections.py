"""The table of a report on the errors of projected kernels."""

from collections.abc import Mapping, Sequence
from typing import Any

from pandas import DataFrame

from lmntk.analysis.summary import RunSummary
from lmntk.report.elements import html_table
from lmntk.report.formatting import escaped

CAPTION = (
    "Relative errors of kernels from random projections, as a sub-sample of the examples shows them: of the run's own "
    "seed ± the standard deviation over resampled examples, and mean ± standard deviation over seeds. Logits are those "
    "of least squares on the sub-sample, with the λ of the run; with few examples they err less than the run's own "
    "where λ is small."
)


def projections_table(summaries: Sequence[RunSummary]) -> str:
    """Return the table of the runs whose kernels are projected; empty if none are."""
    rows = [
        {"run": escaped(summary.name), "kernel": f"train × {escaped(split)}", **_cells(description)}
        for summary in summaries
        for split in summary.run.kernel_splits
        for description in [summary.run.description_of(split)]
        if isinstance(description.get("projection_error"), dict)
    ]
    if not rows:
        return ""
    table = html_table(DataFrame(rows).fillna(""), words=("run", "kernel"), caption=CAPTION)
    return "<h3>Errors of the projections</h3>" + table


def _cells(description: Mapping[str, Any]) -> dict[str, str]:
    error, logits = description["projection_error"], description["projection_error"].get("logits") or {}
    equal = logits.get("equal_classes")
    return {
        "width": str((description.get("projection") or {}).get("width", "")),
        "entries": _range(error, "own", "sampling"),
        "entries,<br>over seeds": _range(error, "mean", "std"),
        "logits": _range(logits, "own"),
        "logits,<br>over seeds": _range(logits, "mean", "std"),
        "equal<br>classes": f"{equal:.1%}" if isinstance(equal, int | float) else "",
    }


def _range(errors: Mapping[str, Any], *names: str) -> str:
    values = [errors.get(name) for name in names]
    numbers = [value for value in values if isinstance(value, int | float)]
    return " ± ".join(f"{value:.1%}" for value in numbers) if len(numbers) == len(names) else ""
