"""One way to print a table: as aligned text, CSV, Markdown or LaTeX."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def format_table(
    rows: "Iterable[Mapping[str, Any]] | DataFrame", style: str = "text", words: Collection[str] = ()
) -> str:
    r"""Write rows as a table with a header.

    Args:
        rows: A mapping from column to cell for each row, or a DataFrame. Cells are written by `str`; a cell that a row
            lacks, None or NaN is left blank. Columns stand in the order in which the rows first name them.
        style: One of `STYLES`: ``"text"``, ``"csv"``, ``"markdown"`` or ``"latex"``.
        words: The columns that are aligned to the left; all others are numbers, aligned to the right.

    Returns:
        The table, which ends with a line break.

    Examples:
        >>> rows = [{"kernel": "sgd", "accuracy": "67.5"}, {"kernel": "signgd"}]
        >>> print(format_table(rows, "markdown", words=["kernel"]), end="")
        | kernel | accuracy |
        |--------|---------:|
        | sgd    |     67.5 |
        | signgd |          |
        >>> format_table(rows, "csv")
        'kernel,accuracy\nsgd,67.5\nsigngd,\n'
    """
    import pandas  # here, since it takes half a second to load

    table = pandas.DataFrame(rows, dtype=object)
    return STYLES[style](table.fillna("").astype(str), words)


def _as_text(table: "DataFrame", words: Collection[str]) -> str:
    return "".join("  ".join(cells).rstrip() + "\n" for cells in _aligned(table, words))


def _as_csv(table: "DataFrame", words: Collection[str]) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def _as_markdown(table: "DataFrame", words: Collection[str]) -> str:
    header, *rows = _aligned(table.replace(r"\|", r"\\|", regex=True), words)
    rule = ["-" * (len(cell) + 1) + ("-" if name in words else ":") for name, cell in zip(table, header, strict=True)]
    lines = [" " + " | ".join(cells) + " " for cells in (header, *rows)]
    return "".join(f"|{line}|\n" for line in (lines[0], "|".join(rule), *lines[1:]))


def _as_latex(table: "DataFrame", words: Collection[str]) -> str:
    alignment = "".join("l" if name in words else "r" for name in table)
    return table.to_latex(index=False, escape=True, column_format=alignment)


def _aligned(table: "DataFrame", words: Collection[str]) -> list[tuple[str, ...]]:
    """Return the header and the rows, the cells of a column padded to one width."""
    columns = []
    for name in table:
        cells = [name, *table[name]]
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if name in words else cell.rjust(width) for cell in cells])
    return list(zip(*columns, strict=True))


STYLES: dict[str, Callable[["DataFrame", Collection[str]], str]] = {
    "text": _as_text,
    "csv": _as_csv,
    "markdown": _as_markdown,
    "latex": _as_latex,
}
"""The writers of `format_table` by the name of their style; LaTeX uses the package booktabs."""
