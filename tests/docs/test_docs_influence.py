"""docs/explanation/influence.md: its commands on the folder of a tiny run, and its Python."""

import contextlib
import runpy
from pathlib import Path
from typing import Any

import pytest

from command_line import Workplace
from doc_commands import blocks, commands, page_text
from lmntk.commands import influence as kernel_influence

PAGE = page_text("influence")


def test_the_commands_show_a_runs_examples_and_a_texts(place: Workplace, capsys: Any) -> None:
    first, second = commands(PAGE)
    assert first[:2] == second[:2] == ["python", "tools/kernel_influence.py"] and first[2] == second[2]
    place.run("--data_dir", "data", "--model_name_or_path", "model", output=first[2])
    with contextlib.chdir(place.folder):
        assert kernel_influence.main(first[2:]) == 0
        assert "looks mislabelled" in capsys.readouterr().out
        assert Path(first[-1]).read_bytes().startswith(b"\x89PNG")
        assert kernel_influence.main(second[2:]) == 0
        assert "prediction" in capsys.readouterr().out


def test_the_python_prints_what_its_comment_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(PAGE, "python")
    (tmp_path / "block.py").write_text(block, encoding="utf-8")
    runpy.run_path(str(tmp_path / "block.py"))
    assert capsys.readouterr().out.strip() == block.rstrip().rpartition("# ")[2]
