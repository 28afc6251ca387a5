"""Several tables below each other, with notes, for results whose columns do not fit into one table."""

import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmntk.storage.tables import format_table

Cells = Mapping[str, str]
FORMS = ("text", "markdown", "latex", "csv", "json")
"""How results can be written: `format_blocks` for readers, `as_csv` and `as_json` with all digits for programs."""
WIDTH = 160
"""The columns of a text."""
UNKNOWN = "–"
_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "≥": r"$\geq$", "–": "--", "∞": r"$\infty$", "θ": r"$\theta$", "χ": r"$\chi$"},
    **{digit: f"$_{place}$" for place, digit in enumerate("₀₁₂")},
}


@dataclass(frozen=True)
class Block:
    """A table.

    Attributes:
        rows: Cells by column, a mapping for each row.
        words: The columns that hold words; the others hold numbers.
    """

    rows: Sequence[Cells]
    words: Collection[str]


def format_blocks(blocks: Sequence[Block], notes: Sequence[str], form: str) -> str:
    """Write tables, one below the other, and notes below them.

    Args:
        blocks: The tables; those without rows are left out.
        notes: A sentence each.
        form: ``"text"``, ``"markdown"`` or ``"latex"``: for LaTeX plain tabulars that need no package, and comments.

    Returns:
        The text, which ends with a line break.
    """
    if form == "latex":
        tables = [_tabular(block) for block in blocks if block.rows]
        lines = [f"% {note}\n" for note in notes]
    else:
        tables = [format_table(block.rows, form, block.words) for block in blocks if block.rows]
        lines = [f"* {note}\n" if form == "markdown" else f"{textwrap.fill(note, WIDTH)}\n" for note in notes]
    return "\n".join([*tables, *(["".join(lines)] if lines else [])])


def _tabular(block: Block) -> str:
    names = list(dict.fromkeys(name for row in block.rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in block.rows)]
    header, *body = [f"{' & '.join(map(latex_escaped, line))} \\\\\n" for line in lines]
    alignment = "".join("l" if name in block.words else "r" for name in names)
    return f"\\begin{{tabular}}{{{alignment}}}\n{header}\\hline\n{''.join(body)}\\end{{tabular}}\n"


def latex_escaped(text: str) -> str:
    r"""Return a text as LaTeX shows it.

    Examples:
        >>> print(latex_escaped("70 % of K₀"))
        70 \% of K$_0$
    """
    return "".join(_LATEX.get(letter, letter) for letter in text)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV, numbers with all digits; None and NaN are left blank."""
    return format_table([{name: _blank(value) for name, value in row.items()} for row in rows], "csv")


def as_json(content: Any) -> str:
    """Write a JSON object, numbers with all digits; NaN and infinity become null."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def number(value: float | None, form: str = ".3f") -> str:
    """Write a number for readers; a dash for None and NaN.

    Examples:
        >>> number(1 / 3), number(None), number(float("inf"))
        ('0.333', '–', '∞')
    """
    if value is None or math.isnan(value):
        return UNKNOWN
    return format(value, form) if math.isfinite(value) else "∞"


def percent(value: float | None) -> str:
    """Write a fraction in percent with one decimal; a dash for None and NaN.

    Examples:
        >>> percent(0.5)
        '50.0'
    """
    return number(None if value is None else 100 * value, ".1f")


def with_deviation(mean: str, deviation: str) -> str:
    """Write a mean with its standard deviation.

    Examples:
        >>> with_deviation("70.0", "1.5")
        '70.0 (1.5)'
    """
    return f"{mean} ({deviation})"


def _blank(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
