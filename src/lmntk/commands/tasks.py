"""List the tasks with their classes, templates and label words."""

import argparse
from collections.abc import Sequence

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.tasks import TASKS
from lmntk.storage.tables import STYLES, format_table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of tasks; return the exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("--format", choices=tuple(STYLES), default="text", help="how to print (text)")
    return run_tool(parser, _print_tasks, argv)


def _print_tasks(given: argparse.Namespace) -> None:
    rows = [
        {
            "task": task.name,
            "classes": "a score" if task.regression else str(len(task.labels)),
            "sentences": str(task.num_sentences),
            "template": task.template,
            "label words": ", ".join(f"{label}: {word}" for label, word in task.mapping.items()),
        }
        for task in TASKS.values()
    ]
    print(format_table(rows, given.format, words=["task", "template", "label words"]), end="")
