"""A Python that has imported what run.py needs: for tests of processes in which their start is not what is tested.

    test ─── the program `path`, a client ─── a keeper ─── the process itself, a fork of the server
                                    └──── the server, which forks and computes nothing

The client stands for the process: it gives it its environment, directory and streams, passes signals on, and ends as
it ends. A new process takes four to seven seconds of a core to import the same.
"""

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


class WarmPython:
    """A program that takes the words of `python SCRIPT …` and `python -m MODULE …`.

    Args:
        folder: An empty folder, whose path is short enough for a socket.
        environment: The variables that libraries read when they are imported, such as the number of threads.

    Attributes:
        path: The program. Elsewhere than on Linux it is this Python, which starts cold.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.path, self._server = Path(sys.executable), None
        if sys.platform == "linux":
            address, self.path = folder / "socket", folder / "python"
            client = (HERE / "warm_client.py").read_text(encoding="utf-8")
            self.path.write_text(f"#!{sys.executable} -IS\nADDRESS = {str(address)!r}\n{client}", encoding="utf-8")
            self.path.chmod(0o755)
            self._server = subprocess.Popen(
                [sys.executable, str(HERE / "warm_server.py"), str(address)],
                env=environment | {"PYTHONPATH": str(SOURCE)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == b"ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._server is not None:
            with self._server:
                self._server.kill()
