"""The report's table of the errors of projected kernels."""

import re
from pathlib import Path

from kernel_folders import Folder
from lmntk.analysis.saved_run import read_runs
from lmntk.analysis.summary import summarise_run
from lmntk.report.projections import projections_table
from lmntk.storage.kernel_metadata import read_description, write_description
from lmntk.storage.paths import RunPaths


def test_the_table_has_the_errors_of_each_kernel_as_its_description_says(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.record()
    (summary,) = (summarise_run(run, "run", {}, curve=False) for run in read_runs(folder.path))
    assert projections_table([summary]) == ""
    entries = {"own": 0.0312, "sampling": 0.002, "mean": 0.04, "std": 0.01, "median": 0.02}
    logits = {"own": 0.05, "mean": 0.0625, "std": 0.01, "equal_classes": 0.996, "regularization": 0.001}
    for split in ("train", "test"):
        path = RunPaths(folder.path, "sst-2").kernel(split)
        error = {"examples": [8, 8], "draws": 8, **entries, "logits": logits if split == "test" else None}
        described = {"projection": {"width": 48, "seed": 1}, "projection_error": error}
        write_description(path, {**(read_description(path) or {}), **described})
    (summary,) = (summarise_run(run, "run", {}, curve=False) for run in read_runs(folder.path))
    rows = re.findall(r"<tr>(.*?)</tr>", projections_table([summary]), re.DOTALL)[1:]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells[0] == ["run", "train × train", "48", "3.1% ± 0.2%", "4.0% ± 1.0%", "", "", ""]
    assert cells[1][2:] == ["48", "3.1% ± 0.2%", "4.0% ± 1.0%", "5.0%", "6.2% ± 1.0%", "99.6%"]
