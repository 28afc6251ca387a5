"""The help of run.py from a file beside this one: to ask transformers for its flags takes seconds.

`python -m lmntk.config.run_help` writes the file again after a flag has changed; a test compares the two.
"""

import argparse
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("run_help.json")

_SETTINGS = ("prog", "usage", "description")
_OF_ACTION = ("dest", "nargs", "choices", "default", "help", "metavar")


def stored_help() -> str | None:
    """Return the text of ``run.py --help``, for the width of the terminal; None if another transformers is installed.

    Other versions of transformers have other flags.
    """
    try:
        stored: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
        return _parser_of(stored).format_help() if stored["transformers"] == version("transformers") else None
    except (OSError, ValueError, PackageNotFoundError):
        return None


def content_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return what a parser's help shows, as the file holds it: the groups, and their flags."""
    groups = [
        {
            "title": group.title,
            "description": group.description,
            "flags": [_row_of(action) for action in group._group_actions if action.dest != "help"],
        }
        for group in parser._action_groups
    ]
    settings = {name: getattr(parser, name) for name in _SETTINGS}
    return {"transformers": version("transformers"), **settings, "groups": groups}


def _row_of(action: argparse.Action) -> dict[str, Any]:
    row = {name: getattr(action, name) for name in _OF_ACTION}
    choices = None if action.choices is None else [str(choice) for choice in action.choices]
    return {"names": action.option_strings, **row, "choices": choices, "default": str(action.default)}


def _parser_of(stored: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Return a parser that is good for its help alone."""
    parser = argparse.ArgumentParser(
        **{name: stored[name] for name in _SETTINGS}, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    own = {group.title: group for group in parser._action_groups}
    for group in stored["groups"]:
        place = own.get(group["title"]) or parser.add_argument_group(group["title"], group["description"])
        for row in group["flags"]:
            settings = {name: value for name, value in row.items() if name != "names"}
            if row["nargs"] == 0:  # a switch
                settings = {name: settings[name] for name in ("dest", "default", "help")} | {"action": "store_true"}
            place.add_argument(*row["names"], **settings)
    return parser


def write() -> None:
    """Write the file of the flags that run.py has now."""
    from lmntk.config.arguments import make_parser
    from lmntk.storage.atomic import write_text

    write_text(FILE, json.dumps(content_of(make_parser()), indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
