"""Workers: their runs are what new processes would be, and nothing is left of either."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command_line import Workplace
from lmntk.commands import grid as command
from lmntk.commands import run_worker
from lmntk.runs import grid as library
from lmntk.runs import processes, worker_client, workers

ROOT = Path(__file__).resolve().parents[2]

# Stands in for run.py: notes what it finds, and ends as `act` says.
STAND_IN = """
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parent
sys.path.insert(0, str((root / "src").resolve()))
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
act = next((word.partition("=")[2] for word in sys.argv if word.startswith("--act=")), "fine")
found = {
    "words": sys.argv,
    "names": [__name__, __file__, sys.modules["__main__"].__file__],
    "directory": os.getcwd(),
    "environment": dict(os.environ),
    "input": sys.stdin.read(),
    "handlers": {n: str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE)},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "ignores SIGINT": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    "files": sorted(path.name for path in Path("/proc/self/fd").iterdir() if int(path.name) < 3),
    "leads its group": os.getpgid(0) == os.getpid(),
    "buffers": [sys.stdout.line_buffering, sys.stderr.line_buffering],
    "processes": [os.getpid(), os.getppid()],
    "streams": [str(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "can seek": [stream.seekable() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "path": sys.path,
    "is warm": "colorsys" in sys.modules,
}
(folder / "found.json").write_text(json.dumps(found))
print("said to nobody")
print(f"says {act}", file=sys.stderr)


def stop(number, frame):
    (folder / "stopped").write_text(str(number))
    sys.exit(128 + number)


if act == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "aborts":
    os.abort()
if act == "leaves":
    os._exit(7)
if act == "raises":
    raise ValueError("no such luck")
if act == "exits":
    sys.exit("a sentence")
if act == "keeps a pool":
    sys.pool = ThreadPoolExecutor(1)  # as a library does
    sys.pool.submit(lambda: (time.sleep(0.1), print("late words", file=sys.stderr)))
if act == "fills its output":
    sys.stdout = open("/dev/full", "w")
    print("too much")
if act == "loses its worker":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
if act.startswith("waits"):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    (folder / "waiting").touch()
    time.sleep(60)
(folder / "eval_results_x.txt").write_text("eval_acc = 0.5")
"""
# A worker that imports next to nothing.
LIGHT_WORKER = """
import sys
sys.path.insert(0, {source!r})
from lmntk.commands import run_worker
run_worker.import_libraries = lambda: __import__("colorsys")
run_worker.main(*sys.argv[1:])
"""


@dataclass
class Checkout:
    """A repository whose run.py is a stand-in, with the real script."""

    root: Path
    capture: pytest.CaptureFixture[str]

    def run(self, *argv: str) -> tuple[int, str, str]:
        """Status, stdout and stderr of a grid."""
        self.capture.readouterr()
        status = command.main(argv)
        return status, *self.capture.readouterr()

    def found(self, act: str | None = None) -> dict[str, Any]:
        """What the run with an act found; None: the only run."""
        (folder,) = self.root.glob("result/*/*" if act is None else f"result/*-act={act.replace(' ', '_')}/*")
        found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        return found

    def log(self, act: str) -> str:
        (path,) = self.root.glob(f"result/*-act={act.replace(' ', '_')}/*/{processes.LOG}")
        return path.read_text(encoding="utf-8")

    @property
    def waiting(self) -> list[Path]:
        return [*self.root.glob("result/*/*/waiting")]

    def set_worker(self, text: str) -> None:
        (self.root / "worker.py").write_text(text, encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Checkout:
    for name in (*library.DEFAULTS, "GRID_TAG", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    root = (tmp_path / "my repository").resolve()
    root.mkdir()
    shutil.copy(ROOT / "run_fewshot.sh", root)
    (root / "src").symlink_to(ROOT / "src")
    (root / "run.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(processes, "RUN_SCRIPT", root / "run_fewshot.sh")
    monkeypatch.setattr(workers, "WORKER", root / "worker.py")
    monkeypatch.setenv("NUM_GPU", "0")
    monkeypatch.chdir(root)
    made = Checkout(root, capsys)
    made.set_worker(LIGHT_WORKER.format(source=str(ROOT / "src")))
    return made


ACTS = ("fine", "killed", "aborts", "leaves", "raises", "exits", "keeps a pool", "fills its output", "still fine")


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """What does not differ from process to process."""
    return {name: value for name, value in found.items() if name not in ("processes", "is warm")}


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_run_in_a_worker_finds_and_leaves_what_a_new_process_does(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, safe_path: str
) -> None:
    monkeypatch.setenv("UMLAUT", "é\udcff")
    monkeypatch.setenv("PYTHONPATH", str(checkout.root))
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    warm = checkout.run("--act", *ACTS)
    warm_found = {act: checkout.found(act) for act in ACTS}
    warm_logs = {act: checkout.log(act) for act in ACTS}
    assert [found["is warm"] for found in warm_found.values()] == [True] * len(ACTS)
    assert len({found["processes"][1] for found in warm_found.values()}) == 1, "one worker for all"
    shutil.rmtree(checkout.root / "result")
    monkeypatch.setattr(processes, "worker_for", lambda num_runs: contextlib.nullcontext())
    cold = checkout.run("--act", *ACTS)
    assert not any(checkout.found(act)["is warm"] for act in ACTS)
    assert {act: lasting(checkout.found(act)) for act in ACTS} == {act: lasting(warm_found[act]) for act in ACTS}
    assert {act: checkout.log(act) for act in ACTS} == warm_logs
    assert cold[:2] == warm[:2]
    statuses = re.findall(r"status (-?\d+)", warm[1])
    assert (warm[0], statuses) == (1, ["-9", "-6", "7", "1", "1", "120"])
    assert "3 done, 0 skipped, 6 failed" in warm[1]


def test_runs_at_a_time_share_a_worker_and_nothing_is_left_of_it(checkout: Checkout) -> None:
    assert checkout.run("--jobs", "3", "--act", "a", "b", "c", "d", "e")[0] == 0
    found = [checkout.found(act) for act in "abcde"]
    assert [run["is warm"] for run in found] == [True] * 5
    assert len({run["processes"][1] for run in found}) == 1
    assert_are_gone(number for run in found for number in run["processes"])
    assert not [*(checkout.root.parent / "temporary").iterdir()]


def assert_are_gone(processes: Iterable[int]) -> None:
    """Nothing runs any more under these numbers; one that lost its parent may wait for the system to note that."""
    for number in processes:
        stat = Path(f"/proc/{number}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_is_ignored_stays_ignored(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert checkout.run("--act", "a", "b")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkout.found("a")["handlers"][str(int(signal.SIGHUP))] == str(signal.SIG_IGN)
    assert checkout.found("a")["is warm"]


def interrupted(checkout: Checkout, number: int, ready: Callable[[], bool], *argv: str) -> tuple[int, str, str]:
    """Send this process a signal once it is time."""

    def send() -> None:
        deadline = time.monotonic() + 30
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.default_int_handler)  # a shell may have started us deaf to Ctrl-C
    thread = threading.Thread(target=send)
    thread.start()
    try:
        return checkout.run(*argv)
    finally:
        thread.join()
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_run_once_and_all_are_waited_for(checkout: Checkout, number: signal.Signals) -> None:
    acts = ("waits first", "waits second", "never started")
    words = ("--jobs", "2", "--act", *acts)
    status, out, err = interrupted(checkout, number, lambda: len(checkout.waiting) == 2, *words)
    assert status == 128 + number
    assert err.endswith(f"stopped by {number.name}: 0 of 3 runs are done; the same command goes on from there\n")
    assert "failed" not in out
    stopped = sorted(checkout.root.glob("result/*/*/stopped"))
    assert [path.read_text() for path in stopped] == [str(int(number))] * 2
    assert_are_gone(number for act in acts[:2] for number in checkout.found(act)["processes"])


def test_a_signal_ends_a_run_that_still_waits_for_its_worker(checkout: Checkout) -> None:
    checkout.set_worker("import pathlib, time\npathlib.Path('starts').touch()\ntime.sleep(60)\n")
    status, _, err = interrupted(checkout, signal.SIGINT, (checkout.root / "starts").exists, "--act", "a", "b")
    assert (status, "0 of 2 runs are done" in err) == (130, True)
    assert not [*checkout.root.glob("result/*/*/found.json")]
    (log,) = checkout.root.glob(f"result/*/*/{processes.LOG}")
    assert log.read_text(encoding="utf-8").endswith("stopped by SIGINT: nothing was begun yet\n")


def test_a_run_whose_client_is_killed_is_killed(checkout: Checkout) -> None:
    class Killer(processes.Progress[library.GridRun]):
        def started(self, run: library.GridRun) -> None:
            self.folder = run.folder

        def waiting(self) -> None:
            if checkout.waiting:
                for process in children_of(os.getpid()):
                    if "worker_client" in command_of(process):
                        os.kill(process, signal.SIGKILL)

        def ended(self, run: library.GridRun, problem: str | None) -> None:
            checkout.waiting[0].unlink() if checkout.waiting else None

    outcome = processes.run_all(library.expand([{"act": ["waits", "fine"]}]), 1, Killer())
    assert (outcome.num_finished, [problem[:9] for _, problem in outcome.failures]) == (1, ["status -9"])
    assert_are_gone(checkout.found("waits")["processes"])


def children_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def test_if_the_worker_is_killed_its_run_fails_and_the_others_do_without(checkout: Checkout) -> None:
    status, out, _ = checkout.run("--act", "fine", "loses its worker", "alone", "alone too")
    assert (status, "3 done, 0 skipped, 1 failed" in out) == (1, True)
    assert "error: the worker of this run was killed" in out
    warm = [checkout.found(act)["is warm"] for act in ("fine", "loses its worker", "alone", "alone_too")]
    assert warm == [True, True, False, False]
    assert_are_gone(checkout.found("loses its worker")["processes"])


@pytest.mark.parametrize("text", ["import sys\nsys.exit(1)\n", "import os\nos.kill(os.getpid(), 9)\n"])
def test_without_a_worker_that_starts_runs_are_new_processes(checkout: Checkout, text: str) -> None:
    checkout.set_worker(text)
    assert checkout.run("--act", "a", "b")[0] == 0
    assert [checkout.found(act)["is warm"] for act in "ab"] == [False, False]


def test_if_the_worker_cannot_be_started_runs_are_new_processes(checkout: Checkout) -> None:
    class Hindering(processes.Progress[library.GridRun]):
        def started(self, run: library.GridRun) -> None:
            for folder in (checkout.root.parent / "temporary").glob("lmntk-*"):
                (folder / "messages").mkdir(exist_ok=True)  # where the worker wants a file

    outcome = processes.run_all(library.expand([{"act": ["a", "b"]}]), 1, Hindering())
    assert (outcome.num_finished, outcome.failures) == (2, [])
    assert [checkout.found(act)["is warm"] for act in "ab"] == [False, False]


def test_a_client_that_asks_for_nothing_holds_up_no_other(checkout: Checkout) -> None:
    patient = "run_worker.main(*"
    text = LIGHT_WORKER.format(source=str(ROOT / "src"))
    checkout.set_worker(text.replace(patient, f"run_worker.REQUEST_SECONDS = 0.1\n{patient}"))
    silent = socket.socket(socket.AF_UNIX)

    class Silent(processes.Progress[library.GridRun]):
        def started(self, run: library.GridRun) -> None:
            if run.settings["act"] == "a":
                (address,) = (checkout.root.parent / "temporary").glob("lmntk-*/socket")
                silent.connect(str(address))

    with silent:
        outcome = processes.run_all(library.expand([{"act": ["a", "b"]}]), 1, Silent())
    assert outcome.num_finished == 2
    assert [checkout.found(act)["is warm"] for act in "ab"] == [True, True]


TOKENIZER_IN_FORK_ONLY = """
import os, types
worker = os.getpid()
def keep_tokenizer(folder):
    if os.getpid() == worker:
        raise ValueError("its files have just changed")
sys.modules["lmntk.models.pretrained"] = types.SimpleNamespace(keep_tokenizer=keep_tokenizer)
"""


def test_a_worker_outlives_a_tokenizer_that_it_cannot_load(checkout: Checkout) -> None:
    text = LIGHT_WORKER.format(source=str(ROOT / "src"))
    checkout.set_worker(text.replace("run_worker.main", f"{TOKENIZER_IN_FORK_ONLY}run_worker.main"))
    assert checkout.run("MODEL=src", "--act", "a", "b")[0] == 0
    assert [checkout.found(act)["is warm"] for act in "ab"] == [True, True]


def client_of(checkout: Checkout, name: str) -> list[str]:
    """The command of a client that asks for a run with an output folder."""
    (checkout.root / "result" / "x" / name).mkdir(parents=True)
    words = ["--use_cpu", "--output_dir", f"result/x/{name}"]
    return [sys.executable, "-IS", worker_client.__file__, str(checkout.root / "run.py"), *words]


def test_a_run_in_a_worker_reads_and_writes_pipes(checkout: Checkout) -> None:
    worker = workers.Worker(checkout.root.parent / "temporary")
    environment = worker.environment({**os.environ, "PYTHON": sys.executable})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        with subprocess.Popen(client_of(checkout, "y"), env=environment, text=True, **pipes) as client:
            assert client.stdin is not None
            client.stdin.write("typed")
            client.stdin.close()
            client.stdin = None
            while client.poll() is None:
                worker.start_if_needed()
                time.sleep(0.01)
            out, err = client.communicate()
    finally:
        worker.close()
    assert (client.returncode, out, err) == (0, "said to nobody\n", "says fine\n")
    assert (checkout.found()["input"], checkout.found()["is warm"]) == ("typed", True)
    assert checkout.found()["can seek"] == [False] * 3


def test_a_run_whose_grid_is_killed_before_it_begins_ends(checkout: Checkout) -> None:
    address = checkout.root.parent / "temporary" / "socket"
    starter = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    words = [sys.executable, "-c", starter, *client_of(checkout, "y")]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        environment = {**os.environ, worker_client.VARIABLE: str(address)}
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as grid:
            assert grid.stderr is not None
            connection, _ = listener.accept()
            grid.kill()
            grid.wait()
            connection.close()
            assert grid.stderr.read() == "error: the grid of this run was killed\n"
    assert not [*checkout.root.glob("result/*/*/found.json")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--seed 1", False),
        ("--use_cpu --seed 1", True),
        ("--use_cpu --seed 1 --use_cpu", True),
        ("--use_cpu --use-cpu=True --use_cpu yes", True),
        ("--use_cpu --seed 1 --use_cpu False", False),
        ("--use_cpu --use-cpu=0", False),
    ],
)
def test_a_run_has_a_worker_if_all_its_words_ask_for_the_cpu(words: str, expected: bool) -> None:
    assert run_worker.asks_for_cpu(words.split()) == expected


@pytest.mark.parametrize(("safe_path", "own"), [("", [str(ROOT)]), ("1", [])])
def test_a_worker_looks_for_modules_where_a_run_does(tmp_path: Path, safe_path: str, own: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": safe_path}
    words = [sys.executable, "-i", run_worker.__file__]  # it fails for want of arguments; Python then reads commands
    ended = subprocess.run(
        words, env=environment, input="import json; print(json.dumps(sys.path))", stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip
    expected = [str(ROOT / "src"), *own, str(tmp_path)]
    assert json.loads(ended.stdout)[: len(expected)] == expected


def test_a_single_run_has_no_worker(checkout: Checkout) -> None:
    assert checkout.run("SEED=1")[0] == 0
    assert not checkout.found()["is warm"]


def test_a_run_that_may_use_a_gpu_is_a_new_process(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkout.root / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: some card'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert checkout.run("NUM_GPU=1", "--act", "a", "b")[0] == 0
    assert [checkout.found(act)["is warm"] for act in "ab"] == [False, False]


def test_a_run_with_other_variables_than_its_worker_is_a_new_process(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "here")

    class Changing(processes.Progress[library.GridRun]):
        def ended(self, run: library.GridRun, problem: str | None) -> None:
            monkeypatch.setenv("HF_HOME", "there" if run.settings["act"] == "a" else "here")

    outcome = processes.run_all(library.expand([{"act": ["a", "b", "c"]}]), 1, Changing())
    assert outcome.num_finished == 3
    assert [checkout.found(act)["is warm"] for act in "abc"] == [True, False, True]
    assert [checkout.found(act)["environment"]["HF_HOME"] for act in "abc"] == ["here", "there", "here"]


GRIDS = [
    {"TRAINER": "kernel"},
    {"TRAINER": "standard", "max_steps": 2, "learning_rate": "1e-3"},
    {"TRAINER": "kernel", "apply_lora": True},
]


def test_runs_of_a_worker_leave_the_files_of_new_processes(
    checkout: Checkout, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing differs but times and memory; the second run of a kind is another fork of the worker."""
    (checkout.root / "run.py").unlink()
    (checkout.root / "run.py").symlink_to(ROOT / "run.py")
    monkeypatch.setattr(workers, "WORKER", ROOT / "src/lmntk/commands/run_worker.py")
    (checkout.root / "grid.json").write_text(json.dumps(GRIDS), encoding="utf-8")
    words = ("--grid", "grid.json", f"MODEL={place.model}", "TASK=SST-2", "TAG=x", "--data_dir", str(place.data))
    words = (*words, "--disable_tqdm", "True", "--jobs", "2")
    assert checkout.run(*words)[0] == 0
    warm = contents(checkout.root / "result")
    shutil.rmtree(checkout.root / "result")
    monkeypatch.setattr(processes, "worker_for", lambda num_runs: contextlib.nullcontext())
    assert checkout.run(*words)[0] == 0
    cold = contents(checkout.root / "result")
    assert sorted(warm) == sorted(cold)
    assert [name for name in warm if warm[name] != cold[name]] == []


def contents(folder: Path) -> dict[str, object]:
    """The content of every file, without what no two runs have in common."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            found[str(path)] = without_times(json.loads(path.read_text(encoding="utf-8")))
        elif path.name == processes.LOG:
            found[str(path)] = re.sub(r"\d[\d.:]*", "#", path.read_text(encoding="utf-8"))
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


def without_times(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    passing = ("time", "seconds", "memory_gb", "peak_memory_gb")
    return {name: without_times(item) for name, item in value.items() if name not in passing}
