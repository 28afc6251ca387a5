"""Tables, figures and grids of a report, as HTML."""

import base64
from collections.abc import Collection
from dataclasses import dataclass

from pandas import DataFrame

from lmntk.report.formatting import escaped


@dataclass(frozen=True)
class Picture:
    """A picture of a run.

    Attributes:
        png: The bytes of the file.
        alt: A description for readers who cannot see it.
        caption: Its numbers, as HTML.
    """

    png: bytes
    alt: str
    caption: str


def html_table(table: DataFrame, *, words: Collection[str], name: str = "", caption: str = "") -> str:
    """Write a table; cells are HTML, and those of the first column name their rows.

    Args:
        table: The cells.
        words: The columns that hold words; the others hold numbers.
        name: The class of the table.
        caption: What the table shows.
    """
    styles = ["" if column in words else ' class="number"' for column in table]
    head = "".join(f'<th scope="col"{style}>{cell}</th>' for cell, style in zip(table, styles, strict=True))
    body = ""
    for first, *others in table.itertuples(index=False):
        cells = "".join(f"<td{style}>{cell}</td>" for cell, style in zip(others, styles[1:], strict=True))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    title = f"<caption>{caption}</caption>" if caption else ""
    inside = f"{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{name}">{inside}</table></div>'


def columns_class(count: int) -> str:
    """Return the class of a grid of some pictures."""
    return {1: "", 2: "two", 3: "three"}.get(count, "")


def file_name(*parts: str) -> str:
    """Name a picture's file by its contents, in letters that every file system accepts."""
    words = [
        "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in part) for part in parts if part
    ]
    return "-".join(words) + ".png"


def html_figure(picture: Picture, name: str, wide: bool = False) -> str:
    """Write a picture with its caption.

    Args:
        picture: The picture.
        name: The run that it shows; empty if the page has one run.
        wide: Whether it may take the width of the page.
    """
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    # From the header of the PNG: a browser reserves the space.
    width, height = (int.from_bytes(picture.png[i : i + 4]) for i in (16, 20))
    title = f"<strong>{escaped(name)}</strong>: " if name else ""
    alt = escaped(f"{name}: {picture.alt}" if name else picture.alt)
    image = f'<img src="{source}" alt="{alt}" width="{width}" height="{height}">'
    opening = '<figure class="wide">' if wide else "<figure>"
    return f"{opening}{image}<figcaption>{title}{picture.caption}</figcaption></figure>"
