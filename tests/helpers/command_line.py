"""A place to call run.py in: a tiny checkpoint, tiny data, and the command line run in this process."""

import contextlib
import importlib.util
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from lmntk.config.arguments import flag_names
from lmntk.config.flag_names import FlagFormatter
from tiny_models import save_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FORMULAS = ("sgd", "signgd", "asymmetric_signgd")
SIZES = {"train": 4, "dev": 4, "test": 6}
"""The splits of the tiny data and their numbers of examples."""
# Of different lengths, so that tiles and batches have something to pad and to sort.
SENTENCES = (
    "the film was great",
    "a boring story and a dull plot",
    "funny",
    "an actor and a city with nothing much to say",
    "moving and never slow",
    "they said it was not for people",
)


def flags_of(formula: str) -> list[str]:
    """The formula, and what it cannot do without."""
    more = ["--binary_classification", "--kernel_solver", "asym"] if formula == "asymmetric_signgd" else []
    return ["--kernel_formula", formula, *more]


def load_run_module() -> ModuleType:
    """run.py, which is no part of a package, as a module."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Outcome:
    """What a call left: its exit status, what it printed, and the messages that it logged, with flags."""

    status: int
    out: str
    err: str
    messages: str


class Workplace:
    """A folder to work in, with a tiny RoBERTa in `model` and four, four and six SST-2 examples in `data`."""

    def __init__(self, folder: Path, checkpoint: Path | None = None) -> None:
        self.folder = folder
        self.model = folder / "model"
        if checkpoint is None:
            save_tiny_checkpoint("roberta", self.model)
        else:
            shutil.copytree(checkpoint, self.model)
        self.data = folder / "data"
        for split, number in SIZES.items():
            write_rows(self.data / f"{split}.tsv", [("sentence", "label"), *sst2_rows(number, split)])
        self._run = load_run_module()

    def argv(self, *flags: str, output: str = "out") -> list[str]:
        """The command line of a kernel run; of flags given twice the last counts."""
        return [
            "--model_name_or_path", str(self.model), "--task_name", "sst-2", "--data_dir", str(self.data),
            "--output_dir", str(self.folder / output), "--few_shot_type", "prompt", "--trainer", "kernel",
            "--do_train", "--do_eval", "--do_predict", "--use_cpu", "--disable_tqdm", "True", *flags,
        ]  # fmt: skip

    def call(self, argv: Sequence[str]) -> Outcome:
        """Run a command line here."""
        out, err, messages = io.StringIO(), io.StringIO(), io.StringIO()
        logger, handler = logging.getLogger("lmntk"), logging.StreamHandler(messages)
        level, verbosity = logger.level, transformers.utils.logging.get_verbosity()
        handler.setFormatter(FlagFormatter("%(message)s", None, flag_names()))
        logger.addHandler(handler)
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = self._run.main(list(argv))
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            transformers.utils.logging.set_verbosity(verbosity)
        return Outcome(status, out.getvalue(), err.getvalue(), messages.getvalue())

    def run(self, *flags: str, output: str = "out") -> Path:
        """Do a kernel run that must succeed; return its output folder."""
        outcome = self.call(self.argv(*flags, output=output))
        assert (outcome.status, outcome.err) == (0, ""), outcome.err
        return self.folder / output

    def last_record(self) -> dict[str, Any]:
        """The last line of the log."""
        return json.loads((self.folder / "log").read_text(encoding="utf-8").splitlines()[-1])


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], argv: list[str]) -> str:
    """Call a command that must fail; return its one sentence."""
    capsys.readouterr()
    assert main(argv) == 2
    _, error, sentence = capsys.readouterr().err.rpartition("error: ")
    assert error and sentence.count("\n") == 1, sentence
    return sentence.removesuffix("\n")


def sst2_rows(number: int, split: str = "") -> list[tuple[str, str]]:
    """Sentences and labels, the labels in turn; each split begins with another sentence."""
    start = len(split)
    return [(SENTENCES[(start + i) % len(SENTENCES)] + " more" * (i // 3), str(i % 2)) for i in range(number)]


def write_rows(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write a data file: tabs between the fields of a .tsv, commas between those of a .csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    separator = "\t" if path.suffix == ".tsv" else ","
    path.write_text("".join(separator.join(row) + "\n" for row in rows), encoding="utf-8")


def read_tensors(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel or logits with its labels, as users read them."""
    first, second = torch.load(path, weights_only=True)
    return first, second


def read_kernel(folder: Path, split: str, task: str = "sst-2") -> torch.Tensor:
    """The kernel of a split in an output folder."""
    return read_tensors(folder / f"{split}_kernels_{task}.pt")[0]


def read_results(path: Path) -> dict[str, float]:
    """The numbers of a result file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: float(value) for name, value in (line.split(" = ") for line in lines)}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a folder: its bytes and when it was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}
