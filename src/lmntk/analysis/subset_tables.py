"""Tables of subsets of the parameters: text, Markdown, LaTeX, CSV and JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.solver_choice import SolverChoice
from lmntk.analysis.subsets import SubsetNumbers, is_singular
from lmntk.analysis.table_blocks import Block, Cells, as_csv, as_json, format_blocks, number, percent


def format_subsets(name: str, metric: str, choice: SolverChoice, found: Sequence[SubsetNumbers], form: str) -> str:
    """Write the numbers of subsets as tables, one for each group.

    Args:
        name: The name of the run.
        metric: The main metric of its task.
        choice: How the kernels predict.
        found: From `lmntk.analysis.subsets.measure_subsets`.
        form: One of ``text``, ``markdown``, ``latex``, ``csv``, ``json``. CSV and JSON hold all digits, and fractions
            instead of percent.

    Returns:
        The tables, which end with a line break.
    """
    if form == "csv":
        return as_csv([_line(subset) for subset in found])
    if form == "json":
        return as_json({"run": name, "metric": metric, "subsets": [dataclasses.asdict(subset) for subset in found]})
    groups = dict.fromkeys(subset.group for subset in found)
    blocks = [Block([_cells(one) for one in found if one.group == group], {"subset"}) for group in groups]
    return format_blocks(blocks, _notes(name, metric, choice, found), form)


def _cells(subset: SubsetNumbers) -> Cells:
    return {
        "subset": subset.name,
        "parameters": "–" if subset.parameters is None else f"{subset.parameters:,}",
        "trace": number(100 * subset.trace_share, ".3g"),
        "alignment": number(subset.alignment),
        "effective rank": number(subset.effective_rank, ".1f"),
        "condition": number(subset.condition, ".1e"),
        "loo": percent(subset.loo_score),
        "loo loss": number(subset.loo_loss),
        **{split: percent(score) for split, score in subset.scores.items()},
    }


def _notes(name: str, metric: str, choice: SolverChoice, found: Sequence[SubsetNumbers]) -> list[str]:
    measured = METRIC_NAMES.get(metric, metric)
    solved = f"λ = {choice.settings.regularization:g}{' and f₀' if choice.adjust_for_init else ''}"
    notes = [
        f"{name}: each row is lstsq with the kernel of these parameters alone, with {solved}. loo, dev, "
        f"test: {measured} in percent, of train examples left out one by one, and of the splits.",
        "trace: the trace of the train kernel over that of all parameters, in percent; alignment: with the labels; "
        "effective rank: of the kernel K; condition: the condition number of what is solved, K + λ‖K‖₂ I.",
    ]
    if any(map(is_singular, found)):
        notes.append("loo is missing where a kernel is singular: a larger `kernel_regularization` makes it regular.")
    if any("drawn" in one.name or "expected" in one.name for one in found):
        notes.append(
            "LoRA: adapters at their start, where the gradient of A is 0. drawn: with the A of the run's seed; "
            "expected: the mean over A."
        )
    return notes


def _line(subset: SubsetNumbers) -> dict[str, Any]:
    numbers = {key: value for key, value in dataclasses.asdict(subset).items() if key != "scores"}
    return numbers | dict(subset.scores)
