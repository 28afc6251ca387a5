"""The notebook runs, in a Jupyter kernel of its own, and shows what it says."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from command_line import ROOT

FOLDER = ROOT / "examples"


@pytest.mark.slow
def test_the_notebook_runs_and_its_kernel_predicts_what_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FOLDER / "notebook.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == [], "it is kept without outputs"
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    agreement = re.search(r"agree on ([\d.]+)%", text)
    kernel = re.search(r"kernel ([\d.]+)%, trained ([\d.]+)%", text)
    assert agreement is not None and float(agreement[1]) > 95
    assert kernel is not None and float(kernel[1]) > 93 and float(kernel[2]) > 93
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
