"""The help of run.py from a file beside this one: to ask transformers for its flags takes seconds.

`python -m lmntk.config.run_help` writes the file again after a flag has changed; a test compares the two.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("run_help.jsonl")

_SETTINGS = ("prog", "usage", "description")
_OF_ACTION = ("dest", "nargs", "choices", "default", "help", "metavar")


def stored_help() -> str | None:
    """Return the text of ``run.py --help``, for the width of the terminal; None if another transformers is installed.

    Other versions of transformers have other flags.
    """
    try:
        settings, *rows = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
        if settings.pop("transformers") != version("transformers"):
            return None
        return _parser_of(settings, rows).format_help()
    except (OSError, ValueError, PackageNotFoundError):
        return None


def content_of(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Return what a parser's help shows, an object for each line of the file: the program, then every flag."""
    settings = {name: getattr(parser, name) for name in _SETTINGS}
    rows = [
        {"group": group.title, **_row_of(action)}
        for group in parser._action_groups
        for action in group._group_actions
        if action.dest != "help"
    ]
    return [{"transformers": version("transformers"), **settings}, *rows]


def _row_of(action: argparse.Action) -> dict[str, Any]:
    row = {name: getattr(action, name) for name in _OF_ACTION}
    choices = None if action.choices is None else [str(choice) for choice in action.choices]
    return {"names": action.option_strings, **row, "choices": choices, "default": str(action.default)}


def _parser_of(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> argparse.ArgumentParser:
    """Return a parser that is good for its help alone."""
    parser = argparse.ArgumentParser(**settings, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(row["group"] for row in rows)}
    for row in rows:
        kept = ("dest", "default", "help") if row["nargs"] == 0 else _OF_ACTION
        shown = {name: row[name] for name in kept} | ({"action": "store_true"} if row["nargs"] == 0 else {})
        groups[row["group"]].add_argument(*row["names"], **shown)
    return parser


def write() -> None:
    """Write the file of the flags that run.py has now."""
    from lmntk.config.arguments import make_parser
    from lmntk.storage.atomic import write_text

    lines = [json.dumps(row, ensure_ascii=False) for row in content_of(make_parser())]
    write_text(FILE, "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    write()
