"""The pages on the kernel's behaviour and on the paper's tables: the tools accept their commands as they stand."""

import re
import subprocess
from pathlib import Path

import pytest

from command_line import ROOT, Workplace
from doc_commands import commands, page_text
from lmntk.commands import behaviour, drift, reproduce, splits
from lmntk.config.arguments import parse_arguments

BEHAVIOUR, REPRODUCE = page_text("kernel-behaviour"), page_text("reproduce")


def calls_of(page: str, tool: str) -> list[list[str]]:
    """The arguments of every call of a tool."""
    return [words[2:] for words in commands(page) if words[:2] == ["python", f"tools/{tool}.py"]]


def test_the_splits_of_the_demos_tasks_are_drawn_where_the_cases_look() -> None:
    drawn = set()
    for words in calls_of(BEHAVIOUR, "generate_k_shot_data"):
        given = splits.make_parser().parse_args(words)
        drawn |= {(Path(given.output_dir) / given.mode / task, given.k) for task in given.task}
    first, *_ = calls_of(BEHAVIOUR, "kernel_behaviour")
    given = behaviour.BehaviourParser().read(first)
    assert drawn == {(Path(case.partition("=")[2]), k) for case in given.cases for k in given.k}


@pytest.mark.parametrize("words", calls_of(BEHAVIOUR, "kernel_behaviour"), ids=len)
def test_the_tables_flags_are_those_of_the_tool_and_of_the_runs(words: list[str]) -> None:
    given = behaviour.BehaviourParser().read(words)
    assert given.further[0] == "--binary_classification"
    run = ["--model_name_or_path", "m", "--task_name", "mr", "--data_dir", "d", "--output_dir", "o", *given.further]
    _, _, training = parse_arguments(run)
    assert training.binary_classification


def test_the_drift_is_read_where_the_training_leaves_it(tmp_path: Path) -> None:
    (call,) = [words for words in commands(BEHAVIOUR) if "TAG=drift" in words]
    variables, flags = dict(word.split("=", 1) for word in call[: call.index("bash")]), call[call.index("bash") + 2 :]
    assert "--kernel_steps" in flags
    (words,) = calls_of(BEHAVIOUR, "kernel_drift")
    given = drift.make_parser().read(words)
    folder = f"mr-{variables['MODEL'].replace('/', '_')}-prompt-standard-{variables['TAG']}/16-{variables['SEED']}"
    assert given.folders == [Path("result") / folder]


def test_linearised_training_comes_nearer_to_the_kernels_solution(tmp_path: Path, warm_python: str) -> None:
    calls = [words for words in commands(BEHAVIOUR) if {"TAG=linear", "TAG=limit"} & {*words}]
    place = Workplace(tmp_path)
    for call, name in zip(calls, ("linear", "limit"), strict=True):
        flags = call[call.index("run_fewshot.sh") + 1 :]
        trainer = [word.partition("=")[2] for word in call if word.startswith("TRAINER=")]
        given = [*flags, "--trainer", *trainer, "--data_dir", str(place.data), "--disable_tqdm", "True"]
        place.run(
            *given,
            *(("--kernel_steps", "0,1,10,last", "--learning_rate", "1e-2") if name == "linear" else ()),
            output=name,
        )
    (words,) = [words for words in commands(BEHAVIOUR) if words[1:2] == ["examples/linearised_training.py"]]
    assert [Path(word).parent.name.rpartition("-")[2] for word in words[2:4]] == ["linear", "limit"]
    picture = tmp_path / words[-1]
    command = [warm_python, ROOT / words[1], tmp_path / "linear", tmp_path / "limit", "sst-2", picture]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for split in ("train", "test"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{split} 0: ")]
        distances = [float(value) for value in re.findall(r"\d+: (\S+)", line)]
        assert distances[0] == 1 and distances == sorted(distances, reverse=True) and distances[-1] < 0.9


@pytest.mark.parametrize("words", calls_of(REPRODUCE, "reproduce"), ids=len)
def test_the_tables_of_the_paper_are_asked_for_as_the_tool_takes_it(words: list[str]) -> None:
    given = reproduce.make_parser().read(words)
    assert (ROOT / "examples" / "paper" / f"{given.table}.json").is_file()


def test_the_page_names_each_table_of_the_paper() -> None:
    tables = {path.stem for path in (ROOT / "examples" / "paper").glob("*.json")}
    assert tables == {line.split("`")[1] for line in REPRODUCE.splitlines() if line.startswith("| `")}
