"""The page on bfloat16: its command runs, on a tiny model, and what it says of the table is so."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

from benchmarks import number_types
from command_line import ROOT, sst2_rows, write_rows
from doc_commands import commands, page_text
from tiny_models import save_tiny_checkpoint

PAGE = page_text("bfloat16")
FEW = ["--train_examples", "6", "--x_examples", "5", "--error_examples", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    save_tiny_checkpoint("bert", folder / "models" / "minilm")
    for split in ("train", "test"):
        rows = [("sentence", "label"), *sst2_rows(6, split)]
        write_rows(folder / "data" / "k-shot-1k-test" / "SST-2" / "16-42" / f"{split}.tsv", rows)
    return folder


def test_the_command_prints_errors_signs_and_predictions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((_, tool, *flags),) = commands(PAGE)
    assert (ROOT / tool).samefile(number_types.__file__)
    threads = torch.get_num_threads()
    try:
        with contextlib.chdir(folder):
            assert number_types.main([*flags, *FEW]) == 0
    finally:
        torch.set_num_threads(threads)
    table = [re.split(r"\s*\|\s*", line[1:-1].strip()) for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert list(rows) == ["float32", "bfloat16"]
    assert float(rows["float32"]["error"]) < 2e-6, "SPEC: float32 against float64"
    assert 1e-4 < float(rows["bfloat16"]["error"]) < 5e-2
    assert float(rows["bfloat16"]["wrong signs"].rstrip("%")) > float(rows["float32"]["wrong signs"].rstrip("%"))
    sizes = [int(row["bytes a token"].replace(",", "")) for row in rows.values()]
    assert 0.5 <= sizes[1] / sizes[0] < 0.65


def test_signs_of_exact_zeros_are_not_counted() -> None:
    wanted = torch.tensor([0, 1, -1, 1, 1], dtype=torch.int8)
    assert number_types.share_of_wrong_signs(torch.tensor([1, 1, 1, 1, 0], dtype=torch.int8), wanted) == 0.5


@pytest.mark.parametrize(
    ("flags", "said"), [(["--task_name", "trec"], "classes"), (["--model", "no/such/folder"], "there is no folder")]
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ((_, _, *usual),) = commands(PAGE)
    with contextlib.chdir(folder):
        assert number_types.main([*usual, *flags]) == 2
    assert said in capsys.readouterr().err
