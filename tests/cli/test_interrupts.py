"""How programs end before their end: in one sentence on a line of its own, with no traceback, whoever listens."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from lmntk import interrupts
from lmntk.errors import UsageError

SRC = Path(__file__).resolve().parents[2] / "src"
PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(SRC)!r})
from lmntk import interrupts
interrupts.begin()

def work():
    {{}}

sys.exit(interrupts.exit_status(work, prints_results={{}}))
"""
PRINTS = "print('result ' * 20000)"
TALKS = "print('message ' * 20000); print('more', file=sys.stderr); open('done', 'w').close()"


def shell(folder: Path, line: str, work: str, prints_results: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `$PROGRAM` does the work."""
    (folder / "program.py").write_text(PROGRAM.format(work, prints_results), encoding="utf-8")
    command = line.replace("$PROGRAM", f"{sys.executable} program.py")
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("$PROGRAM | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("$PROGRAM >&-", 0, ""),
        (
            "$PROGRAM >/dev/full",
            2,
            "error: No space left on device: make room, or free the path, and give the same command again; what was "
            "finished is kept\n",
        ),
    ],
    ids=["a reader that has gone", "closed", "a full disk"],
)
def test_results_that_nobody_can_read_end_a_tool_without_a_traceback(
    tmp_path: Path, line: str, status: int, said: str
) -> None:
    done = shell(tmp_path, line, PRINTS)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize(
    "line",
    [
        "$PROGRAM 2>&1 | true; exit ${PIPESTATUS[0]}",
        "$PROGRAM >/dev/full 2>/dev/full",
        "$PROGRAM >&- 2>&- <&-",
    ],
    ids=["a reader that has gone", "a full disk", "closed"],
)
def test_messages_that_nobody_can_read_do_not_end_a_run(tmp_path: Path, line: str) -> None:
    done = shell(tmp_path, line, TALKS, prints_results=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").read_bytes() == b"", "a file must not get the number of a closed stream"


def test_ctrl_c_while_a_program_loads_is_one_sentence() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SRC)!r}); from lmntk import interrupts; interrupts.begin(); import time"
    )
    program = [sys.executable, "-c", f"{code}; print('loading', flush=True); time.sleep(60)"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "stopped by SIGINT: nothing was begun yet\n")
    assert process.returncode == 130


def test_ctrl_c_while_torch_loads_does_not_load_it_again(tmp_path: Path) -> None:
    body = "import os, signal\nprint('loading', flush=True)\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "torch.py").write_text(body, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{SRC}"}
    code = "import sys; from lmntk.commands.run import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (130, "loading\n")
    assert done.stderr == (
        "stopped by SIGINT: kernels that were finished are kept; the same command goes on from there\n"
    )


def test_ctrl_c_behind_the_work_does_not_say_that_nothing_was_begun() -> None:
    code = (
        f"import os, signal, sys; sys.path.insert(0, {str(SRC)!r}); from lmntk import interrupts; "
        "interrupts.begin(); interrupts.exit_status(lambda: None); os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def with_bars(end: BaseException | signal.Signals) -> None:
    """Leave two bars behind, one below the other, and end."""
    outer = tqdm(total=3, desc="outer")
    inner = tqdm(total=3, desc="inner", leave=False)
    outer.update()
    inner.update()
    if isinstance(end, signal.Signals):
        os.kill(os.getpid(), end)
        time.sleep(10)
    else:
        raise end


@pytest.mark.parametrize(
    ("end", "status", "sentence"),
    [
        (UsageError("no such luck"), 2, "error: no such luck"),
        (signal.SIGTERM, 143, "stopped by SIGTERM: the same command starts anew"),
        (signal.SIGHUP, 129, "stopped by SIGHUP: the same command starts anew"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT: the same command starts anew"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "a/file"),
            2,
            "error: a/file: Disk quota exceeded: make room, or free the path, and give the same command again; what "
            "was finished is kept",
        ),
    ],
)
def test_a_sentence_stands_alone_on_the_last_line_below_progress_bars(
    end: BaseException | signal.Signals, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert interrupts.exit_status(lambda: with_bars(end)) == status
    said = capsys.readouterr().err
    assert "outer:  33%" in said
    assert said.split("\n")[-2:] == [sentence, ""]
    assert not tqdm._instances


def test_an_error_of_no_file_keeps_its_traceback() -> None:
    with pytest.raises(OSError, match="the hub says no"):
        interrupts.exit_status(lambda: (_ for _ in ()).throw(OSError("the hub says no")))  # type: ignore[arg-type]


def test_the_status_of_work_that_ends_well_is_its_own() -> None:
    assert interrupts.exit_status(lambda: 1) == 1
    assert interrupts.exit_status(lambda: None) == 0
