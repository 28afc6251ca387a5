"""The pages on the kernel's behaviour and on the paper's tables: the tools accept their commands as they stand."""

from pathlib import Path

import pytest

from command_line import ROOT
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
    (call,) = [words for words in commands(BEHAVIOUR) if "run_fewshot.sh" in words]
    variables, flags = dict(word.split("=", 1) for word in call[: call.index("bash")]), call[call.index("bash") + 2 :]
    assert "--kernel_steps" in flags
    (words,) = calls_of(BEHAVIOUR, "kernel_drift")
    given = drift.make_parser().read(words)
    folder = f"mr-{variables['MODEL'].replace('/', '_')}-prompt-standard-{variables['TAG']}/16-{variables['SEED']}"
    assert given.folders == [Path("result") / folder]


@pytest.mark.parametrize("words", calls_of(REPRODUCE, "reproduce"), ids=len)
def test_the_tables_of_the_paper_are_asked_for_as_the_tool_takes_it(words: list[str]) -> None:
    given = reproduce.make_parser().read(words)
    assert (ROOT / "examples" / "paper" / f"{given.table}.json").is_file()


def test_the_page_names_each_table_of_the_paper() -> None:
    tables = {path.stem for path in (ROOT / "examples" / "paper").glob("*.json")}
    assert tables == {line.split("`")[1] for line in REPRODUCE.splitlines() if line.startswith("| `")}
