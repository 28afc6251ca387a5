#!/usr/bin/env python3
"""Write a page to look at: what the kernels and results in some folders show, side by side.

It reads the folders that run.py left (--output_dir), or any with kernels of that layout, and computes no kernel: what
it predicts, it predicts from the stored ones. The page is one HTML file that needs no network; its pictures lie beside
it as PNG files too. docs/how-to/report.md says what each picture means.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import numpy as np

from lmntk.analysis import statistics
from lmntk.analysis.saved_run import label_names, names_of, read_runs
from lmntk.analysis.summary import Study, study, typical_examples
from lmntk.config import tool_parser
from lmntk.config.tool_parser import exit_status
from lmntk.errors import UsageError
from lmntk.report.page import Group, Sentence, page
from lmntk.solvers import SOLVERS
from lmntk.storage.atomic import prepare_output_dir, write_atomically

SOLVER_FLAGS = ("kernel_solver", "kernel_regularization", "kernel_gamma", "kernel_lambda")
NEIGHBOURS = 3


class Parser(tool_parser.Parser):
    """A parser that leaves the telling of errors to `main`, and knows the solver flags."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument(
            "--kernel_solver", choices=tuple(SOLVERS), help="predict with this solver, not the run's (lstsq if unknown)"
        )
        self.add_argument("--kernel_regularization", type=float, help="and with this regularisation (0 if unknown)")
        self.add_argument("--kernel_gamma", type=float, help="gamma of the asym solver (1 if unknown)")
        self.add_argument("--kernel_lambda", type=float, help="lambda of the asym solver (0.5 if unknown)")


def solver_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pick the solver flags, None where not given."""
    return {name: getattr(arguments, name) for name in SOLVER_FLAGS}


def study_folders(folders: Sequence[Path], flags: Mapping[str, Any], show: bool) -> dict[str, list[Study]]:
    """Study all runs in some folders, by task.

    Raises:
        UsageError: A folder that is no run's, or damaged; names it.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    by_task: dict[str, list[Study]] = {}
    for folder, name in zip(folders, names_of(folders), strict=True):
        for run in read_runs(folder):
            by_task.setdefault(run.key, []).append(study(run, name, flags, show))
    return by_task


def group(key: str, studies: Sequence[Study], wanted: Sequence[int] | None, data_dir: Path | None) -> Group:
    """Choose sentences to look at and find what kernels think is like them; runs on other data have others."""
    by_data: dict[str, list[Study]] = {}
    for found in studies:
        if found.kernel is not None and "test" in found.kernel.others:
            data = found.run.kernel("test").description.get("data_sha256") or found.name
            by_data.setdefault(str(data), []).append(found)
    sentences, remarks = [], []
    for together in by_data.values():
        chosen = typical_examples(together[0].splits["test"]) if wanted is None else wanted
        texts = {split: together[0].run.texts(split, data_dir) for split in ("train", "test")}
        remarks += dict.fromkeys(why for why in texts.values() if isinstance(why, str))
        shown = {split: () if isinstance(found, str) else found for split, found in texts.items()}
        sentences += [look_at(index, together, shown) for index in chosen]
    return Group(key, studies, sentences, list(dict.fromkeys(remarks)))


def look_at(index: int, studies: Sequence[Study], texts: Mapping[str, Sequence[Sequence[str]]]) -> Sentence:
    """Find the training examples most like a test example, by the kernel of each run.

    Raises:
        UsageError: There is no such example.
    """
    neighbours, label = {}, ""
    for found in studies:
        kernel, test = found.kernel, found.splits["test"]
        if not 0 <= index < len(test.labels):
            raise UsageError(f"--sentences {index}: {found.name} has test sentences 0 to {len(test.labels) - 1}")
        names = label_names(found.run, kernel.num_classes)
        alike = statistics.similarities(np.diag(kernel.train), kernel.others["test"][:, [index]])[:, 0]
        nearest = np.argsort(-alike, kind="stable")[:NEIGHBOURS]
        rows = [(alike[i], names[kernel.classes["train"][i]], int(i), at(texts["train"], i)) for i in nearest]
        label = names[int(test.labels[index])]
        neighbours[found.name] = names[int(test.predicted[index])], rows
    return Sentence(index, at(texts["test"], index), label, neighbours)


def at(texts: Sequence[Sequence[str]], index: int) -> Sequence[str]:
    """Return the sentences of an example; none where there are none to show."""
    return texts[index] if index < len(texts) else ()


def write_report(
    folders: Sequence[Path],
    output: Path,
    flags: Mapping[str, Any] | None = None,
    sentences: Sequence[int] | None = None,
    data_dir: Path | None = None,
) -> Path:
    """Write a page and its pictures.

    Args:
        folders: Of the runs.
        output: Where to write.
        flags: Solver flags that count for more than the runs' own.
        sentences: Test sentences to look at; None for a choice.
        data_dir: Where the data files are now.

    Returns:
        The page.

    Raises:
        UsageError: A folder is no run's, or damaged.
    """
    by_task = study_folders(folders, flags or {}, show=sys.stderr.isatty())
    text, files = page([group(key, found, sentences, data_dir) for key, found in by_task.items()])
    output = prepare_output_dir(output)
    path = output / "report.html"
    for name, content in (files | {path.name: text.encode()}).items():
        write_atomically(output / name, lambda file, content=content: file.write(content), lasting=False)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report that a command line asks for, and say where it is."""
    parser = Parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder of a run, or with kernels")
    parser.add_argument("--output_dir", type=Path, help="the report goes here (DIR/report; of several DIRs: report)")
    parser.add_argument("--sentences", type=int, nargs="+", metavar="I", help="test sentences to look at, from 0 in "
                        "the file's order (two surely right, two surely wrong, two undecided)")  # fmt: skip
    parser.add_argument("--data_dir", type=Path, help="where the data files are now (where the kernels say)")
    given = parser.read(argv)
    output = given.output_dir or (given.folders[0] / "report" if len(given.folders) == 1 else Path("report"))
    print(f"The report: {write_report(given.folders, output, solver_flags(given), given.sentences, given.data_dir)}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
