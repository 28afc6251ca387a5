"""docs/how-to/own-data.md and the recipe for a task in CONTRIBUTING.md, followed to the letter on a tiny model."""

import contextlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

import generate_k_shot_data
from command_line import ROOT, SENTENCES, Workplace, read_kernel, write_rows
from doc_commands import argv_of, blocks, calls, commands, make_stand_in, page_text
from lmntk.commands import gather
from lmntk.config.arguments import flag_names
from lmntk.data.tasks import TASKS, Task

PAGE = page_text("own-data")
FILES = dict(re.findall(r"^```text (\S+)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPE = re.sub("^   ", "", CONTRIBUTING.split("## How to add a task\n")[1].split("\n## ")[0], flags=re.MULTILINE)


def follow(place: Workplace, text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Give the commands of a page in their order, on a quarter of the examples; what the table of results printed."""
    stand_in, printed = make_stand_in(place.folder), ""
    for words in commands(text):
        if "run_fewshot.sh" in words:
            argv = [*argv_of(words, stand_in), "--model_name_or_path", str(place.model), "--use_cpu"]
            outcome = place.call([*argv, "--disable_tqdm", "True"])
            assert (outcome.status, outcome.err) == (0, ""), f"{shlex.join(words)}\n{outcome.err}"
            continue
        tool = {"tools/generate_k_shot_data.py": generate_k_shot_data, "tools/gather_result.py": gather}[words[1]]
        capsys.readouterr()
        with contextlib.chdir(place.folder):
            assert not tool.main(words[2:])
        if tool is gather:
            printed += capsys.readouterr().out
            continue
        task = words[words.index("--task") + 1] if "--task" in words else "custom"
        for path in (place.folder / "data" / "k-shot-1k-test" / task / "16-42").iterdir():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            head = path.suffix != ".jsonl"
            assert path.stem == "test" or len(lines) == 32 + head
            path.write_text("".join([*lines[:head], *lines[head::4]]), encoding="utf-8")
    return printed.splitlines()


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    """A place with the files that the page shows, their rows as often as draws need them."""
    header, *rows = FILES["reviews.csv"].splitlines(keepends=True)
    texts = {
        "reviews.csv": header + "".join(row.replace(".", f" {n}.") for n in range(35) for row in rows),
        "pairs.jsonl": "".join(FILES["pairs.jsonl"].replace("?", f" {n}?") for n in range(35)),
    }
    for name in ("train", "test"):
        texts[f"data/original/reviews/{name}.csv"] = texts["reviews.csv"]
    for name, text in texts.items():
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return place


def test_every_command_of_the_page_works_on_the_files_that_it_shows(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    table = follow(place, PAGE, capsys)
    assert [line.split("|")[2].strip() for line in table if "| own" in line] == ["custom"]
    for name, task in (("custom-roberta-base-prompt", "custom"), ("custom-roberta-base-finetune", "custom"),
                       ("pairs-roberta-base-prompt", "pairs")):  # fmt: skip
        kernel = read_kernel(place.folder / "result" / f"{name}-kernel-own" / "16-42", "test", task)
        assert kernel.shape[:2] == (8, 2) and kernel.isfinite().all()
    assert len(calls(PAGE)) == 3


def test_what_it_names_exists() -> None:
    of_tools = {"mode", "k", "input", "task", "condition", "format"}
    assert {flag for flag in re.findall(r"--(\w+)", PAGE) if flag not in flag_names() | of_tools} == set()
    assert "## How to add a task\n" in CONTRIBUTING
    assert all(json.loads(line) for line in FILES["pairs.jsonl"].splitlines())


def test_the_recipe_for_a_task_works_as_it_stands(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (row,) = blocks(RECIPE, "python")
    script = tmp_path / "row.py"
    script.write_text(f"from lmntk.data.tasks import Task\nrows = (\n{row})\n", encoding="utf-8")
    (task,) = runpy.run_path(str(script))["rows"]
    assert isinstance(task, Task)
    monkeypatch.setitem(TASKS, task.name, task)
    for name in ("train", "test"):
        assert f"`{name}.{task.file_format}`" in RECIPE
        rows = [("id", "text", "label"), *((str(n), SENTENCES[n % 6], task.labels[n % 2]) for n in range(70))]
        write_rows(place.folder / "data" / "original" / task.name / f"{name}.{task.file_format}", rows)
    follow(place, RECIPE, capsys)
    (folder,) = (place.folder / "result").glob(f"{task.name}-*/16-42")
    assert read_kernel(folder, "test", task.key).shape[:2] == (8, 2)
    description = json.loads((folder / f"test_kernels_{task.key}.json").read_text(encoding="utf-8"))
    assert (description["task"], description["template"]) == (task.name, [task.template])
    assert description["mapping"] == dict(task.mapping)


def test_the_recipe_names_files_and_tables_that_exist() -> None:
    for path in re.findall(r"`((?:src|tests)/[\w/]+\.py)`", RECIPE):
        assert (ROOT / path).is_file()
    assert "METRICS" in (ROOT / "src/lmntk/data/metrics.py").read_text(encoding="utf-8")
