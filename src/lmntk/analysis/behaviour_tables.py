"""Tables of whether the kernel describes fine-tuning: text, Markdown, LaTeX, CSV and JSON."""

from collections.abc import Sequence

from lmntk.analysis.behaviour import BehaviourRow, Thresholds

FORMS = ("text", "markdown", "latex", "csv", "json")


def format_rows(rows: Sequence[BehaviourRow], form: str, thresholds: Thresholds) -> str:
    """Write rows as a table with their thresholds.

    Args:
        rows: From `lmntk.analysis.behaviour.behaviour_row`.
        form: One of `FORMS`.
        thresholds: What decided the verdicts.

    Returns:
        The table, which ends with a line break.
    """
    raise NotImplementedError
