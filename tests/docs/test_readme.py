"""What the README says: its commands run, on a tiny model and tiny data, and its names exist."""

import contextlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import demo
import demo_causal
from command_line import ROOT, Workplace, read_kernel, read_results, sst2_rows, write_rows
from doc_commands import argv_of, blocks, calls, commands, make_stand_in
from lmntk.commands import behaviour, compare, features, forecast, gather, influence, report, splits, subsets
from lmntk.commands.main import NAMES
from lmntk.config.arguments import flag_names
from lmntk.data.tasks import find_task
from lmntk.runs.log import Trial

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULT = "result/SST-2-roberta-base-prompt"


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A place where all commands of the README that need no network were run, in their order."""
    place = Workplace(tmp_path_factory.mktemp("readme"))
    stand_in = make_stand_in(place.folder)
    for name, number in (("train", 80), ("dev", 12)):
        path = place.folder / "data" / "original" / "SST-2" / f"{name}.tsv"
        write_rows(path, [("sentence", "label"), *sst2_rows(number)])
    with contextlib.chdir(place.folder):
        for words in commands(README):
            if words[:2] == ["python", "tools/generate_k_shot_data.py"]:
                assert splits.main(words[2:]) == 0
    for path in (place.folder / "data/k-shot-1k-test/SST-2/16-42").iterdir():
        header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A quarter of the examples, the calls take less time so.
        path.write_text(header + "".join(rows[::4]), encoding="utf-8")
    for call in calls(README):
        argv = argv_of(call, stand_in)
        few_steps = ["--max_steps", "2"] if "--max_steps" in argv else []
        outcome = place.call([*argv, "--model_name_or_path", str(place.model), "--disable_tqdm", "True", *few_steps])
        assert (outcome.status, outcome.err) == (0, ""), f"{shlex.join(call)}\n{outcome.err}"
    return place


@pytest.mark.parametrize("shown", [demo.DEMO, demo_causal.DEMO], ids=lambda shown: shown.name)
def test_its_tables_have_the_rows_and_columns_that_the_demos_print(shown: demo.Demo) -> None:
    trial = Trial({}, dev=0.5, test=0.5, second=None)
    runs = demo.DemoRunner(shown, Path(), Path(), Path()).runs
    header, line, *rows = demo.make_table(dict.fromkeys(runs, trial)).splitlines()
    of_first_task = [row.split("|")[1:3] for row in rows if row.startswith(f"| {shown.tasks[0]} ")]
    lines = README.splitlines()
    start = lines.index(header)
    table = lines[start : lines.index("", start)]
    assert table[1] == line
    assert [row.split("|")[1:3] for row in table[2:]] == of_first_task
    assert f"make {shown.name}" in README


def test_every_call_leaves_its_results_where_the_readme_says(walked: Workplace) -> None:
    left = {path.parent.parent.name for path in (walked.folder / "result").glob("*/16-42/test_results_sst-2.txt")}
    tags = [word.removeprefix("TAG=") for call in calls(README) for word in call if word.startswith("TAG=")]
    assert len(tags) == len(calls(README)) >= 4
    of_tag = {"zero-shot": "standard", "adam": "standard", "head": "linearhead"}
    trainers = [of_tag.get(tag, "kernel") for tag in tags]
    assert left == {f"SST-2-roberta-base-prompt-{trainer}-{tag}" for trainer, tag in zip(trainers, tags, strict=True)}
    signs = read_kernel(walked.folder / f"{RESULT}-kernel-kernel-signgd" / "16-42", "train")
    assert torch.equal(signs, signs.round())
    asymmetric = read_kernel(walked.folder / f"{RESULT}-kernel-kernel-asymmetric" / "16-42", "test")
    assert asymmetric.shape == (2, 8, 1, 3, 1)
    zero_shot = read_results(walked.folder / f"{RESULT}-standard-zero-shot" / "16-42" / "test_results_sst-2.txt")
    assert "eval_acc" in zero_shot


def test_the_table_of_all_runs_has_a_row_for_each(walked: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in commands(README) if words[1:2] == ["tools/gather_result.py"]]
    with contextlib.chdir(walked.folder):
        assert gather.main(words[2:]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "| sst-2 " in line]
    assert len(rows) == len(calls(README)) == 10


def test_the_report_and_the_comparison_are_of_runs_that_the_readme_made(
    walked: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tool in (("tools/report.py", report), ("tools/compare_kernels.py", compare)):
        (words,) = [words for words in commands(README) if words[1:2] == [name]]
        with contextlib.chdir(walked.folder):
            assert tool.main(words[2:]) == 0
    page = walked.folder / f"{RESULT}-kernel-kernel-prompting" / "16-42" / "report" / "report.html"
    assert "<h1>" in page.read_text(encoding="utf-8")
    assert "test" in capsys.readouterr().out


def test_one_kernel_tells_what_the_readme_asks_it(walked: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    tools = {"influence": influence, "subsets": subsets, "forecast": forecast}
    said = {}
    for name, tool in tools.items():
        (words,) = [words for words in commands(README) if words[1:2] == [f"tools/kernel_{name}.py"]]
        with contextlib.chdir(walked.folder):
            assert tool.main(words[2:]) == 0
        said[name] = capsys.readouterr().out
    folder = walked.folder / f"{RESULT}-kernel-kernel-parts" / "16-42"
    assert len((folder / "influence_train_sst-2.csv").read_text(encoding="utf-8").splitlines()) == 1 + 8
    assert {"loo_acc", "eval_nll", "eval_ece"} <= read_results(folder / "test_results_sst-2.txt").keys()
    assert "condition" in said["subsets"] and "largest stable learning rate" in said["forecast"]
    assert (walked.folder / "forecast.png").is_file()


def test_thousands_of_texts_are_estimated_as_the_readme_says(
    walked: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, estimate = (
        walked.folder / f"{RESULT}-kernel-{tag}" / "16-42" for tag in ("kernel-prompting", "kernel-estimate")
    )
    # The tiny model's layers are narrower than the width.
    torch.testing.assert_close(read_kernel(estimate, "test"), read_kernel(exact, "test"), rtol=1e-5, atol=1e-5)
    assert read_results(estimate / "test_results_sst-2.txt")["projection_error"] < 1e-5
    (words,) = [words for words in commands(README) if words[1:2] == ["tools/kernel_features.py"]]
    with contextlib.chdir(walked.folder):
        assert features.main(words[2:]) == 0
    assert "kernel_regularization  dev acc" in capsys.readouterr().out
    assert (exact / "features_test_sst-2.safetensors").is_file()


def test_the_question_whether_the_kernel_describes_fine_tuning_is_asked_as_the_tool_takes_it() -> None:
    (words,) = [words for words in commands(README) if words[1:2] == ["tools/kernel_behaviour.py"]]
    given = behaviour.BehaviourParser().read(words[2:])
    assert (given.cases, given.seeds) == (["SST-2"], [13, 42])


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_every_python_block_runs(walked: Workplace, number: int) -> None:
    script = walked.folder / f"block_{number}.py"
    block = blocks(README, "python")[number].replace('roberta-base"', f'{walked.model}"')
    script.write_text(block, encoding="utf-8")
    with contextlib.chdir(walked.folder):
        names = runpy.run_path(str(script))
    kernel = torch.as_tensor(names["kernel"])
    assert kernel.dtype == torch.float64
    assert tuple(kernel.shape) in [(8, 2, 3, 2), (4, 2, 1, 2), (16, 3, 5, 3)]


def test_every_command_is_one_that_the_tests_know() -> None:
    script = (ROOT / "data" / "download_dataset.sh").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(README):
        if words[0] == "make":
            assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in words[1:])
        elif words[0] == "python":
            tools = ("generate_k_shot_data", "kernel_behaviour", "gather_result", "report", "compare_kernels")
            tools += ("kernel_influence", "kernel_subsets", "kernel_forecast", "kernel_features")
            assert words[1] in [f"tools/{tool}.py" for tool in tools]
        elif words[0] == "lmntk":
            assert words[1] in NAMES
        elif words not in calls(README):
            assert words in (
                ["bash", "data/download_dataset.sh"],
                ["source", ".venv/bin/activate"],
                ["pip", "install", "-e", ".[all]"],
            )


def test_every_flag_and_file_and_task_that_it_names_exists() -> None:
    tool_flags = {"mode", "k", "task", "seed", "data_dir", "output_dir", "condition", "format"}
    tool_flags |= {"model", "seeds", "jobs", "figure", "width", "solve"}
    assert {flag for flag in re.findall(r"--(\w+)", README) if flag not in flag_names() | tool_flags} == set()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in [*links, "requirements.txt"] if not (ROOT / link).is_file()] == []
    for name in ("SST-2", "mr", "cr", "mpqa", "subj", "trec", "sst-5", "ag_news"):
        assert name in README
        assert find_task(name).file_format == ("tsv" if name == "SST-2" else "csv")


def test_the_interpreter_is_as_new_as_the_readme_asks() -> None:
    asked = re.search(r"Python (\d+)\.(\d+) or newer", README)
    assert asked is not None
    assert f">={asked[1]}.{asked[2]}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert sys.version_info >= (int(asked[1]), int(asked[2]))
