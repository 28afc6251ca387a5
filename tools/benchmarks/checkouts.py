"""Programs of a checkout as processes, in a copy of it: what they take, and the files that they leave."""

import compileall
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lmntk.errors import FileError, UsageError
from lmntk.runs.grid import DEFAULTS

PROGRAM = ("src", "tools", "examples", "run.py", "run_fewshot.sh")
# Settings of the caller's shell that would change what is measured.
FOREIGN_SETTINGS = {*DEFAULTS, "GRID_TAG", "AS_PUBLISHED", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
BUSY_LOOP = """
import numpy
matrix = numpy.ones((512, 512))
print("ready", flush=True)
while True:
    matrix @ matrix
"""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Usage:
    """What a process took: seconds by the clock, and those of all processors, user and system."""

    wall: float
    cpu: float

    def further(self, first: "Usage", number: int) -> "Usage":
        """Return what each of `number` runs took beyond the first one, if this is what all took together."""
        return Usage((self.wall - first.wall) / number, (self.cpu - first.cpu) / number)


@dataclass(frozen=True)
class Side:
    """A checkout whose programs are measured.

    They run in a copy of it, so that neither their results nor their log get into the checkout itself.

    Attributes:
        name: How the table calls it.
        root: The copy.
        work: An empty folder, the working directory of its programs.
    """

    name: str
    root: Path
    work: Path
    kernels: dict[str, Path] = field(default_factory=dict, compare=False)

    @classmethod
    def copy(cls, name: str, checkout: Path, folder: Path) -> "Side":
        """Copy a checkout's program into `folder` and compile it.

        Raises:
            FileError: The folder is not a checkout of this project.
        """
        if not (checkout / "run.py").is_file() or not (checkout / "src" / "lmntk").is_dir():
            raise FileError(
                f"{checkout} is not a checkout of this project: it has no run.py with src/lmntk", path=checkout
            )
        root, work = folder / name / "checkout", folder / name / "work"
        for part in PROGRAM:
            if (checkout / part).is_dir():
                shutil.copytree(checkout / part, root / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif (checkout / part).is_file():
                root.mkdir(parents=True, exist_ok=True)
                shutil.copy2(checkout / part, root / part)
        compileall.compile_dir(root, quiet=2)
        work.mkdir(parents=True)
        return cls(name, root, work)

    def find(self, *places: str) -> Path | None:
        """Return the first of some files of the checkout that exists."""
        return next((self.root / place for place in places if (self.root / place).is_file()), None)

    def fresh(self, name: str) -> Path:
        """Return a folder that does not exist yet."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def timed(self, command: Sequence[str | Path]) -> Usage:
        """Run a program to its end and measure it with all processes that it starts.

        Raises:
            UsageError: It fails.
        """
        log = self.work / "output.txt"
        environment = {name: text for name, text in os.environ.items() if name not in FOREIGN_SETTINGS}
        environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(self.root / "src"), "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as output:
            start = time.perf_counter()
            process = subprocess.Popen(
                [*map(str, command)],
                **{"cwd": self.work, "env": environment, "stdin": subprocess.DEVNULL},
                **{"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True},
            )
            try:
                _, status, used = os.wait4(process.pid, 0)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            line = " ".join(map(str, command))
            raise UsageError(
                "\n    ".join([f"{self.name}: `{line}` ended with {process.returncode}; its last lines:", *last])
            )
        return Usage(wall, used.ru_utime + used.ru_stime)

    def keep_kernels(self, folder: Path) -> None:
        """Note the kernel files below a folder, to be compared with those of the other side."""
        paths = [path for path in folder.rglob("*_kernels_*.pt") if "_layer_kernels_" not in path.name]
        self.kernels.clear()
        self.kernels.update({str(path.relative_to(folder)): path for path in paths})


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Let so many other processes compute, on one thread each, while the block runs."""
    processes = []
    try:
        for _ in range(number):
            command, environment = [sys.executable, "-c", BUSY_LOOP], os.environ | ONE_THREAD
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        for process in processes:
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def compare_kernels(ours: Side, other: Side) -> str:
    """Say how the kernel files that both sides kept differ; empty if they kept none.

    Returns:
        ``"same bytes"``, or the largest difference relative to the largest entry.
    """
    if not ours.kernels or not other.kernels:
        return ""
    if ours.kernels.keys() != other.kernels.keys():
        return "not the same files"
    if all(path.read_bytes() == other.kernels[name].read_bytes() for name, path in ours.kernels.items()):
        return "same bytes"
    differences = []
    for name, path in ours.kernels.items():
        found, expected = (torch.load(file, weights_only=True)[0].double() for file in (path, other.kernels[name]))
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
    return f"{max(differences):.1e}"
