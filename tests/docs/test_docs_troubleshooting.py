"""docs/how-to/troubleshooting.md: its sentences are the program's, and a good part of them is provoked here."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from command_line import ROOT, Workplace, sst2_rows, write_rows
from doc_commands import commands, environment_with, make_stand_in, page_text
from lmntk.config.arguments import flag_names
from lmntk.config.flag_names import in_flags
from lmntk.storage.output_folder import locked_output_folder

PAGE = page_text("troubleshooting")
QUOTES = [
    " ".join(line.removeprefix("> ") for line in quote.splitlines())
    for quote in re.findall(r"^(?:> .*\n)+", PAGE, flags=re.MULTILINE)
]
VARIABLE = "…"


def pattern(quote: str) -> re.Pattern[str]:
    """What a quotation matches: anything where it has the sign for a variable part, and spaces of any number."""
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in quote.split(VARIABLE)]
    return re.compile(".*".join(parts), flags=re.DOTALL)


def text_of(node: ast.AST) -> str | None:
    """A string of the source as it would be quoted; None where a node is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", VARIABLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VARIABLE for part in node.values)
    return None


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """All strings of the program, its tools, run_fewshot.sh and the Makefile."""
    return list(_strings())


def _strings() -> Iterator[str]:
    for path in [ROOT / "run.py", *(ROOT / "src").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        found = map(text_of, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        yield from (in_flags(text, flag_names()) for text in found if text)
    for name in ("run_fewshot.sh", "Makefile"):
        for text in re.findall(r'"([^"\n]+)"', (ROOT / name).read_text(encoding="utf-8")):
            yield re.sub(r"\$\(\w+\)|\$\{\w+\}|\$\w+", VARIABLE, text)


Scenario = Callable[[Workplace, Path, pytest.MonkeyPatch], str]


def run_with(*flags: str, data: dict[str, list[tuple[str, str]]] | None = None) -> Scenario:
    """Call run.py, where asked with other data files; what it says, refused or not."""

    def scenario(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        where = []
        for split in ("train", "dev", "test") if data else ():
            rows = (data or {}).get(split, sst2_rows(4, split))
            write_rows(folder / "data" / f"{split}.tsv", [("sentence", "label"), *rows])
            where = ["--data_dir", str(folder / "data")]
        outcome = place.call([*place.argv(output=str(folder / "out")), *where, *flags])
        return outcome.err + outcome.messages

    return scenario


def a_model_that_the_hub_has_not(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no answer. See the log.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    return run_with("--model_name_or_path", "roberta-bse")(place, folder, monkeypatch)


def a_checkpoint_without_a_head(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    model = folder / "encoder"
    model.mkdir()
    for path in place.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("lm_head.dense")}
    assert len(kept) < len(weights)
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    return run_with("--model_name_or_path", str(model))(place, folder, monkeypatch)


def a_folder_without_a_tokenizer(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    model = folder / "bare"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((place.model / name).read_bytes())
    return run_with("--model_name_or_path", str(model))(place, folder, monkeypatch)


def a_model_that_is_a_file(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return run_with("--model_name_or_path", str(place.model / "config.json"))(place, folder, monkeypatch)


def a_kernel_of_another_command(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    assert "error" not in run_with()(place, folder, monkeypatch)
    return run_with("--kernel_formula", "signgd")(place, folder, monkeypatch)


def a_kernel_loaded_for_another_command(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    assert "error" not in run_with()(place, folder, monkeypatch)
    loaded = ["--output_dir", str(folder / "other"), "--load_kernels", str(folder / "out")]
    return run_with("--kernel_formula", "signgd", *loaded)(place, folder, monkeypatch)


def two_runs_in_one_folder(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with locked_output_folder(folder / "out"):
        return run_with()(place, folder, monkeypatch)


def a_folder_that_is_not_empty(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "out" / "checkpoint-3").mkdir(parents=True)
    (folder / "out" / "notes").touch()
    return run_with("--trainer", "standard", "--max_steps", "1")(place, folder, monkeypatch)


def training_that_diverges(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    flags = ["--trainer", "standard", "--optimizer", "sgd", "--learning_rate", "1e38", "--save_strategy", "no"]
    return run_with(*flags, "--max_steps", "4")(place, folder, monkeypatch)


def originals_that_are_not_there(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    tool = [sys.executable, str(ROOT / "tools" / "generate_k_shot_data.py")]
    call = [*tool, "--task", "SST-2", "--data_dir", str(folder)]
    return subprocess.run(call, capture_output=True, text=True, check=False).stderr


def python_without_the_environment(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    call = [sys.executable, "-S", str(ROOT / "run.py"), "--help"]
    return subprocess.run(call, capture_output=True, text=True, check=False).stderr


def run_fewshot(**variables: str) -> Scenario:
    def scenario(place: Workplace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        environment = environment_with(make_stand_in(folder)) | variables
        call = ["bash", str(ROOT / "run_fewshot.sh")]
        return subprocess.run(call, env=environment, capture_output=True, text=True, check=False).stderr

    return scenario


LONG = {"test": [("the film was not bright and not dull " * 4, "1")]}
# By the beginning of the sentence.
PROVOKED: dict[str, Scenario] = {
    "No module named 'torch'": python_without_the_environment,
    "no GPU found": run_fewshot(NUM_GPU="3"),
    "NNODES=": run_fewshot(NNODES="2"),
    "unknown flag": run_with("--kernl_formula", "sgd"),
    "there is no folder": run_with("--data_dir", "data/k-shot-1k-test/SST-2/16-42"),
    "… is missing: bash data/download": originals_that_are_not_there,
    "… line … has": run_with(data={"test": [("no label here",)]}),  # type: ignore[list-item]
    "… line …: label": run_with(data={"dev": [("a story", "2")]}),
    "--model_name_or_path: '…' is no": a_model_that_the_hub_has_not,
    "The checkpoint '…' lacks": a_checkpoint_without_a_head,
    "'…' holds no vocabulary": a_folder_without_a_tokenizer,
    "'…' is a file": a_model_that_is_a_file,
    "--max_seq_length is": run_with("--max_seq_length", "4096"),
    "label word": run_with("--mapping", "{0: 'terrible', 1: 'cat'}"),
    "the mask of": run_with("--max_seq_length", "12", data=LONG),
    "… of … prompts of": run_with(
        "--max_seq_length", "20", "--template", "*cls*_It_was*mask*.*+sent_0**sep+*", data=LONG
    ),
    "--template has": run_with("--template", "*cls**sent_0*_It_was.*sep+*"),
    "… was made by": a_kernel_of_another_command,
    "another run": two_runs_in_one_folder,
    "--load_kernels": a_kernel_loaded_for_another_command,
    "--kernel_memory_gb": run_with("--kernel_memory_gb", "1e-6"),
    "--kernel_formula": run_with("--kernel_formula", "asymmetric_signgd"),
    "class … has … training examples: ": run_with("--kernel_solver", "logistic"),
    "class … has … training example…,": run_with(
        "--kernel_solver", "logistic", data={"train": [("dull", "0"), ("great", "1")]}
    ),
    "--kernel_solver": run_with("--kernel_solver", "asym"),
    "all train examples": run_with(data={"train": [("dull", "0"), ("slow", "0")]}),
    "--output_dir … is not empty": a_folder_that_is_not_empty,
    "… of … examples of": training_that_diverges,
}


def quoted(beginning: str) -> str:
    """The one sentence of the page that begins so."""
    (quote,) = [quote for quote in QUOTES if quote.startswith(beginning)]
    return quote


@pytest.mark.parametrize("beginning", PROVOKED)
def test_the_sentence_appears_where_the_page_says(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beginning: str
) -> None:
    said = PROVOKED[beginning](place, tmp_path, monkeypatch)
    assert pattern(quoted(beginning)).search(said), said


def test_every_other_sentence_is_one_of_the_source(sources: list[str]) -> None:
    provoked = {quoted(beginning) for beginning in PROVOKED}
    gone = [quote for quote in QUOTES if quote not in provoked and not any(map(pattern(quote).search, sources))]
    assert gone == []
    assert len(QUOTES) >= 35


def test_a_quotation_of_no_sentence_is_found_out(sources: list[str]) -> None:
    assert not any(map(pattern("label word … is too long").search, sources))
    assert any(map(pattern("--max_seq_length is …, but this model reads at most … tokens").search, sources))


def test_the_environment_is_made_by_a_target_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert commands(PAGE) == [["make", "venv"], ["source", ".venv/bin/activate"]]
    assert re.search(r"^venv: \$\(VENV\)/requirements.stamp ", makefile, flags=re.MULTILINE)
    assert "VENV := .venv\n" in makefile
