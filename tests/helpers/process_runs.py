"""Several command lines in the processes that torchrun starts: `process_runs.py runs.json`, for test_processes.

The file is a list of ``{"argv": …, "dies": …}``; with `dies` the second process fails at its second tile: ``"error"``
raises an exception, ``"killed"`` is a SIGKILL, once.
"""

import json
import os
import signal
import sys
from pathlib import Path

from command_line import load_run_module
from lmntk import distributed
from lmntk.storage.tile_store import TileStore


def let_the_second_process_die(how: str, once: Path) -> None:
    """Make the second tile of the kernel of test that process 1 writes its last."""
    real, written = TileStore.write, []

    def write(self: TileStore, *args: object) -> None:
        written.extend([1] if self.folder.name.startswith("test") else [])
        if len(written) == 2 and not once.exists():
            once.touch()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a cosmic ray")
        real(self, *args)  # type: ignore[arg-type]

    TileStore.write = write  # type: ignore[method-assign]


def main() -> int:
    """Run them all; return the first status that is not 0."""
    run = load_run_module()
    for entry in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if entry.get("dies") and os.environ["RANK"] == "1":
            let_the_second_process_die(entry["dies"], Path(sys.argv[1]).with_suffix(".died"))
        status = run.main(entry["argv"])
        if status:
            return status
    distributed.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
