"""How a command line starts: few imports, threads that sleep, and nothing of that in a program that imports lmntk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import ROOT
from lmntk import startup

REPORT = """
import gc, json, os, sys
from transformers.utils import import_utils
print(json.dumps({
    "answers": {name: getattr(import_utils, f"is_{name}_available")() for name in ("peft", "scipy", "sklearn")},
    "imported": sorted({"peft", "scipy", "sklearn"} & sys.modules.keys()),
    "collects": gc.isenabled(),
    "frozen": gc.get_freeze_count() > 0,
    "waiting": os.environ.get("OMP_WAIT_POLICY"),
}))
"""
PROGRAM = "from lmntk import startup\nstartup.begin()\nstartup.import_transformers()\nimport transformers.trainer\n"


def report_of(program: str, **environment: str) -> dict[str, object]:
    """What a process finds after a program."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program + REPORT],
        env=variables | {"PYTHONPATH": str(ROOT / "src")} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_command_line_keeps_transformers_from_importing_what_it_does_not_need() -> None:
    found = report_of(PROGRAM + "startup.end()\n")
    assert found["answers"] == {"peft": False, "scipy": False, "sklearn": False}
    assert found["imported"] == []
    assert (found["collects"], found["frozen"]) == (True, True)


LAZY = """
import json
import transformers
found = {name: sorted(values) for name, values in transformers.models._import_structure.items()}
print(json.dumps([found, transformers.BertModel.__module__, len(dir(transformers.models))]))
"""


def test_transformers_models_is_the_same_without_reading_its_files_again() -> None:
    own, usual = (
        subprocess.run(
            [sys.executable, "-c", start + LAZY], env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True, text=True, check=True,
        ).stdout
        for start in (PROGRAM, "")
    )  # fmt: skip
    assert json.loads(own) == json.loads(usual)


def test_packages_that_were_hidden_can_be_imported_afterwards() -> None:
    found = report_of(PROGRAM + "import peft, scipy.linalg, sklearn.svm\n")
    assert found["imported"] == ["peft", "scipy", "sklearn"]
    assert found["collects"] is False


def test_a_program_that_imports_lmntk_sees_everything_as_before() -> None:
    found = report_of("import lmntk.commands.run\nfrom lmntk import startup\nstartup.import_transformers()\n")
    assert found["answers"] == {"peft": True, "scipy": True, "sklearn": True}
    assert (found["collects"], found["frozen"], found["waiting"]) == (True, False, None)


@pytest.mark.parametrize(
    ("running", "cores", "given", "waiting"),
    [
        ("1", 2, {}, None),
        ("2", 2, {}, "PASSIVE"),
        ("3", 16, {}, "PASSIVE"),
        ("2", 2, {"LOCAL_WORLD_SIZE": "2"}, None),
        ("3", 2, {"LOCAL_WORLD_SIZE": "2"}, "PASSIVE"),
        ("2", 16, {}, None),
        ("9", 2, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ("9", 2, {"GOMP_SPINCOUNT": "7"}, None),
        ("many", 2, {}, None),
    ],
)
def test_threads_sleep_while_they_wait_if_others_compute_unless_the_user_decides(
    running: str,
    cores: int,
    given: dict[str, str],
    waiting: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = tmp_path / "stat"
    state.write_text(f"cpu  1 2 3\nprocesses 5\nprocs_running {running}\nprocs_blocked 0\n")
    monkeypatch.setattr(startup, "_STATE_OF_SYSTEM", state)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    startup.choose_waiting()
    assert os.environ.get("OMP_WAIT_POLICY") == waiting
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_a_system_without_its_state_in_a_file_keeps_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "_STATE_OF_SYSTEM", tmp_path / "missing")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    startup.choose_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ
