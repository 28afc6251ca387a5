"""What commands do with what they found: tables on stdout or in a file, and figures as PNG files."""

import argparse
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from lmntk.config.flag_names import RUN_SETTINGS, in_flags
from lmntk.config.tool_parser import Parser
from lmntk.errors import SettingError

PICTURE = ".png"


def add_output_flag(parser: Parser) -> None:
    """Add `output`, the file of the tables."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables here instead of printing them")


def add_figure_flag(parser: Parser, what: str) -> None:
    """Add `figure`.

    Args:
        parser: The parser.
        what: What it draws, for the help: ``"draw the forecast"``.
    """
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help=what)


def check_figure(given: argparse.Namespace) -> None:
    """Check the name of the figure before any work.

    Raises:
        SettingError: It is not that of a PNG file.
    """
    figure: Path | None = given.figure
    if figure is not None and figure.suffix.lower() != PICTURE:
        sentence = f"`figure={figure}`: pictures are PNG files, so give a name that ends with {PICTURE}"
        raise SettingError(sentence, setting="figure", value=figure)


def write_figure(figure: Path | None, draw: Callable[[], bytes], stream: TextIO | None = None) -> None:
    """Draw a figure, if one is asked for, and say where it is.

    Args:
        figure: The file.
        draw: Returns the bytes of a PNG.
        stream: Where to say it; stderr by default.
    """
    from lmntk.storage.atomic import prepare_output_dir, write_atomically

    if figure is None:
        return
    prepare_output_dir(figure.parent, "figure")
    write_atomically(figure, operator.methodcaller("write", draw()), durable=False)
    print(f"The figure: {figure}", file=stream or sys.stderr)


def write_results(given: argparse.Namespace, table: str, draw: Callable[[], bytes]) -> None:
    """Print a table, or write it to `output`, with settings as flags; then draw the figure, if one is asked for.

    Args:
        given: The flags, with `output` and `figure`.
        table: The table.
        draw: Returns the bytes of a PNG.
    """
    from lmntk.storage.atomic import prepare_output_dir, write_text

    table = in_flags(table, RUN_SETTINGS)  # notes name settings
    if given.output is None:
        print(table, end="", flush=True)
    else:
        prepare_output_dir(given.output.parent, "output")
        write_text(given.output, table)
        print(f"The tables: {given.output}")
    write_figure(given.figure, draw, sys.stderr if given.output is None else sys.stdout)
