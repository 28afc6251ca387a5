"""The demo on a causal language model, its runs and all: a tiny one in a GGUF file, in place of SmolLM2."""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

import demo
import demo_causal
import fetch_demo_assets
from command_line import ROOT, read_kernel, read_results, sst2_rows
from lmntk.runs.log import read_log
from lmntk.runs.processes import LOG
from tiny_gguf import random_lm, write_gguf
from tiny_tokenizers import make_gpt2_tokenizer

pytestmark = pytest.mark.slow
_, KERNEL = demo_causal.DEMO.methods


@dataclass(frozen=True)
class Workplace:
    """The folders of the model, of the film reviews, and of the results of a first call, which printed `out`."""

    model: Path
    data: Path
    output: Path
    out: str

    def result(self, method: demo.Method) -> Path:
        return self.output / "film-reviews" / method.name / "16-42"


def call(model: Path, data: Path, output: Path) -> str:
    """Start the script as `make demo-causal` does; return what it prints."""
    folders = ["--model", str(model), "--data_dir", str(data), "--output_dir", str(output)]
    command = [sys.executable, str(ROOT / "examples" / "demo" / "demo_causal.py"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A tiny Llama of four-bit weights, and forty sentences of each label to draw from."""
    folder = tmp_path_factory.mktemp("demo")
    model, data, output = folder / "model", folder / "data", folder / "results"
    tokenizer = make_gpt2_tokenizer(folder / "tokenizer")
    write_gguf(model / demo_causal.GGUF_FILE, random_lm(), tokenizer, Kind.Q4_1)
    for split, number in (("train", 80), ("test", 10)):
        path = data / "film-reviews" / "original" / "mr" / f"{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows((label, text) for text, label in sst2_rows(number, split))
    return Workplace(model, data, output, call(model, data, output))


def test_the_table_has_the_numbers_of_the_result_files(workplace: Workplace) -> None:
    table = (workplace.output / "table.md").read_text(encoding="utf-8")
    assert f"\n\n{table}\n" in workplace.out
    for row, method in zip(table.splitlines()[2:], demo_causal.DEMO.methods, strict=True):
        files = [workplace.result(method) / f"{split}_results_mr.txt" for split in ("eval", "test")]
        numbers = [f"{100 * read_results(file)['eval_acc']:.1f}" for file in files]
        assert [cell.strip() for cell in row.split("|")[1:-1]] == ["film-reviews", method.name, *numbers]


def test_the_kernel_is_that_of_the_gguf_file_on_all_of_the_data(workplace: Workplace) -> None:
    assert read_kernel(workplace.result(KERNEL), "train", "mr").shape == (32, 1, 32, 1)
    assert read_kernel(workplace.result(KERNEL), "test", "mr").shape == (32, 1, 10, 1)
    (run,) = read_log(workplace.result(KERNEL) / "log")
    assert (run["gguf_file"], run["template"]) == (demo_causal.GGUF_FILE, demo_causal.TEMPLATE)
    converted = workplace.data / "film-reviews" / "converted-models"
    assert [folder.name.startswith("SmolLM2-135M-Instruct.Q4_1-") for folder in converted.iterdir()] == [True]


def test_what_the_runs_say_is_shown(workplace: Workplace) -> None:
    for method in demo_causal.DEMO.methods:
        said = (workplace.result(method) / LOG).read_text(encoding="utf-8")
        assert f"keeps too:\n{said}[" in workplace.out
        assert "results are in" in said


def test_a_second_call_starts_nothing_and_prints_the_same_table(workplace: Workplace) -> None:
    before = {path: path.stat().st_mtime_ns for path in workplace.output.rglob("16-42/*")}
    out = call(workplace.model, workplace.data, workplace.output)
    assert out.count("(there already)") == 2
    assert {path: path.stat().st_mtime_ns for path in workplace.output.rglob("16-42/*")} == before
    assert out[out.index("Accuracies") :] == workplace.out[workplace.out.index("Accuracies") :]


def test_the_file_is_the_one_that_is_fetched() -> None:
    assert (demo_causal.DEMO.model, (demo_causal.GGUF_FILE,)) == (
        fetch_demo_assets.CAUSAL_MODEL.name,
        fetch_demo_assets.CAUSAL_MODEL.files,
    )
