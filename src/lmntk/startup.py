"""The start of a program: the fewest imports, and threads that sleep while they wait on a busy machine.

Only the command lines of this package call `begin`. In a program of a user who imports the package nothing changes.
"""

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNUSED_BY_TRANSFORMERS = ("peft", "scipy", "sklearn")
"""Packages that transformers imports wherever they are installed, for functions that this package does not call.

This package imports them itself where it needs them: peft for LoRA adapters, the others for solvers and metrics.
"""

_OPENMP_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

_STATE_OF_SYSTEM = Path("/proc/stat")
_LOOKS, _SECONDS_BETWEEN_LOOKS = 5, 0.004

_begun = False


def begin() -> None:
    """Prepare this process, which belongs to one command line, for the import of torch and transformers.

    Settings of OpenMP in the environment stay as the user gave them.
    """
    global _begun
    _begun = True
    # Imports create a million objects and hardly any garbage: looking for it takes a tenth of their time.
    gc.disable()
    choose_waiting()


def choose_waiting() -> None:
    """Let OpenMP threads sleep while they wait if other programs compute; it counts if torch is not imported yet.

    By default threads of GNU OpenMP, which torch brings along, look for work for milliseconds. On cores of their own
    that is fastest. Where another program has the core of the thread that they wait for, they waste its time:
    two threads are then several times slower than one.
    """
    if not any(name in os.environ for name in _OPENMP_SETTINGS) and _others_compute():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _others_compute() -> bool:
    """Return whether other programs take an eighth of the cores or more, one at least; False where nobody knows."""
    found = []
    for _ in range(_LOOKS):
        try:
            state = _STATE_OF_SYSTEM.read_text(encoding="ascii")
            found.append(next(int(line.split()[1]) for line in state.splitlines() if line.startswith("procs_running")))
        except (OSError, ValueError, StopIteration):  # not Linux
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    # This process and those that torchrun has started beside it are not others.
    own = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return statistics.median(found) - own >= max(1, (os.cpu_count() or 1) // 8)


def import_transformers() -> None:
    """Import transformers; if `begin` was called, transformers then takes `UNUSED_BY_TRANSFORMERS` for missing.

    It asks once for each, keeps the answer, and imports what is there, for which it takes as long as for itself.
    """
    import torch  # noqa: F401 (what a Python without the environment lacks first is torch)

    with _hidden(UNUSED_BY_TRANSFORMERS) if _begun else contextlib.nullcontext():
        from transformers.utils import import_utils

        for package in UNUSED_BY_TRANSFORMERS if _begun else ():
            getattr(import_utils, f"is_{package}_available")()
    if _begun:
        _import_models(import_utils)


def _import_models(import_utils: Any) -> None:
    """Import transformers.models without reading its 1,700 files once more.

    `import transformers` has just read them. Its cache has kept the answer for all of them together, the last, alone:
    findings/transformers-reads-its-models-twice.sh.
    """
    read = import_utils.create_import_structure_from_path
    folder = Path(import_utils.__file__).parents[1] / "models"
    known = read(folder)
    import_utils.create_import_structure_from_path = lambda path: known if Path(path).parent == folder else read(path)
    try:
        import transformers.models  # noqa: F401
    finally:
        import_utils.create_import_structure_from_path = read


def end() -> None:
    """Collect garbage again, if `begin` has stopped that; what is there by now is there to stay."""
    if _begun:
        # The interpreter looks through all other objects once more when it exits.
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Let packages that are not imported yet seem not to be installed."""
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]
