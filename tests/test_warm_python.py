"""The warm Python of tests: what its processes are given and how they end is as with Python itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import json, os, signal, sys, time
print(json.dumps([sys.argv, os.getcwd(), sys.path[:2], os.environ.get("FOR_TEST"), sys.stdin.read(), __name__]))
print("said", file=sys.stderr)
sys.stdout.flush()
ENDS = {
    "exits": lambda: sys.exit(3),
    "exits with a word": lambda: sys.exit("why"),
    "runs to its end": lambda: None,
    "fails": lambda: 1 / 0,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "aborts": os.abort,
    "sleeps": lambda: time.sleep(60),
}
ENDS[sys.argv[1]]()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "how",
    ["exits", "exits with a word", "runs to its end", "fails", "is killed", "aborts"],
)
def test_a_process_gets_and_leaves_what_one_of_python_does(
    program: Path, tmp_path: Path, warm_python: str, how: str
) -> None:
    environment = os.environ | {"FOR_TEST": "é", "PYTHONPATH": str(tmp_path / "more")}
    warm, cold = (
        subprocess.run(
            [python, str(program), how], cwd="/", env=environment, input="in", capture_output=True, text=True
        )
        for python in (warm_python, sys.executable)
    )
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr == cold.stderr
    assert json.loads(warm.stdout)[0] == [str(program), how]


def test_signals_of_its_client_reach_a_process_and_it_is_killed_with_it(program: Path, warm_python: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([warm_python, str(program), "sleeps"], **pipes) as process:
            assert process.stdout is not None and process.stdout.readline()
            process.send_signal(number)
            started = time.monotonic()
            assert process.stdout.read() == b"", "it holds the pipe until it has ended"
            assert process.wait() == -number
            assert time.monotonic() - started < 30, "it does not sleep to its end"
