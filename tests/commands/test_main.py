"""The command `lmntk`: its help, its commands, and what it says of a typo."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmntk import __version__
from lmntk.commands import main as dispatcher
from lmntk.commands.kernel import WHOLE_RUN
from lmntk.commands.main import NAMES, main
from lmntk.data.tasks import TASKS

FOLDER = Path(dispatcher.__file__).parent


def test_the_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = {
        line.split()[0]: line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if line[:3] == "  " + line[2:3]
    }
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "main", "run", "run_worker", "results"}
    assert files <= set(NAMES)
    assert lines.keys() == files
    assert all(lines.values())


def test_a_typo_is_answered_with_the_command_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernle"]) == 2
    assert "did you mean 'kernel'" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lmntk {__version__}\n"


@pytest.mark.parametrize("style", ["text", "csv", "markdown"])
def test_tasks_lists_every_task_with_its_template_and_words(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "--format", style]) == 0
    out = capsys.readouterr().out
    for task in TASKS.values():
        line = next(line for line in out.splitlines() if task.name in line)
        assert task.template in line and all(word in line for word in task.mapping.values())


def test_a_command_without_its_packages_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert main(["tasks"]) == 2
    assert "pip install 'lmntk[all]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "of_run"),
    [
        (["kernel", "--seed", "1"], [*WHOLE_RUN, "--trainer", "kernel", "--seed", "1"]),
        (["kernel", "config.json", "--do_eval"], ["config.json", "--trainer", "kernel", "--do_eval"]),
        (["train", "--seed", "1"], [*WHOLE_RUN, "--seed", "1"]),
        (["train", "config.json"], ["config.json"]),
        (["kernel"], [*WHOLE_RUN, "--trainer", "kernel"]),
    ],
)
def test_kernel_and_train_are_run_py_with_their_trainer(
    monkeypatch: pytest.MonkeyPatch, words: list[str], of_run: list[str]
) -> None:
    from lmntk.commands import run

    calls: list[list[str]] = []
    monkeypatch.setattr(run, "end_process", calls.append)
    main(words)
    assert calls == [of_run]


def test_the_help_loads_in_no_time() -> None:
    code = (
        "import sys; from lmntk.commands.main import main; main(['--help']); "
        "assert not {'torch', 'transformers', 'numpy', 'pandas'} & sys.modules.keys()"
    )
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONPATH": str(FOLDER.parents[1])}
    )
    assert time.perf_counter() - begin < 2
