"""docs/explanation/features.md: its commands on tiny data, and its Python on their files."""

import contextlib
import runpy
from typing import Any

import numpy as np

from command_line import Workplace
from doc_commands import blocks, commands, page_text
from lmntk.commands import features as kernel_features

PAGE = page_text("features")


def test_the_commands_write_the_features_in_which_the_python_finds_neighbours(place: Workplace, capsys: Any) -> None:
    first, second = commands(PAGE)
    assert first[:2] == second[:2] == ["python", "tools/kernel_features.py"]
    place.run("--data_dir", "data", "--model_name_or_path", "model", output=first[2])
    with contextlib.chdir(place.folder):
        assert kernel_features.main([*first[2:], "--check", "2"]) == 0
        tiny = ("--task_name", "sst-2", "--data_dir", "data", "--model_name_or_path", "model", "--use_cpu")
        assert kernel_features.main([*second[2:], *tiny]) == 0
        said = capsys.readouterr()
        assert "relative error" in said.out
        (block,) = blocks(PAGE, "python")
        assert f'"{first[2]}"), "mr"' in block
        (place.folder / "block.py").write_text(block.replace('"mr"', '"sst-2"'), encoding="utf-8")
        names = runpy.run_path("block.py")
    assert names["nearest"].shape == names["of_layer"].shape == (6, 3)
    assert 0 < len(names["columns"]) < names["train"].shape[1]
    train, test = (np.asarray(names[split], float) for split in ("train", "test"))
    train, test = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, test))
    expected = np.sort(test @ train.T, axis=1)[:, :-4:-1]
    np.testing.assert_allclose(names["cosines"], expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(test @ train.T, names["nearest"], axis=1), expected, atol=1e-5)
