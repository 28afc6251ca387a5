"""How a command line starts: few imports, threads that sleep, and nothing of that in a program that imports lmntk."""

import json
import os
import subprocess
import sys

import pytest

from command_line import ROOT

REPORT = """
import gc, json, os, sys
from transformers.utils import import_utils
print(json.dumps({
    "answers": {name: getattr(import_utils, f"is_{name}_available")() for name in ("peft", "scipy", "sklearn")},
    "imported": sorted({"peft", "scipy", "sklearn"} & sys.modules.keys()),
    "collects": gc.isenabled(),
    "frozen": gc.get_freeze_count() > 0,
    "spin": os.environ.get("GOMP_SPINCOUNT"),
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


def test_packages_that_were_hidden_can_be_imported_afterwards() -> None:
    found = report_of(PROGRAM + "import peft, scipy.linalg, sklearn.svm\n")
    assert found["imported"] == ["peft", "scipy", "sklearn"]
    assert found["collects"] is False


def test_a_program_that_imports_lmntk_sees_everything_as_before() -> None:
    found = report_of("import lmntk.commands.run\nfrom lmntk import startup\nstartup.import_transformers()\n")
    assert found["answers"] == {"peft": True, "scipy": True, "sklearn": True}
    assert (found["collects"], found["frozen"], found["spin"]) == (True, False, None)


@pytest.mark.parametrize(
    ("given", "spin"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_waiting_threads_sleep_soon_unless_the_user_decides(given: dict[str, str], spin: str | None) -> None:
    assert report_of("from lmntk import startup\nstartup.wait_briefly()\n", **given)["spin"] == spin
