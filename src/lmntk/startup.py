"""The start of a program: the fewest imports, and threads that give up their core while they wait.

Only the command lines of this package call `begin`. In a program of a user who imports the package nothing changes.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

UNUSED_BY_TRANSFORMERS = ("peft", "scipy", "sklearn")
"""Packages that transformers imports wherever they are installed, for functions that this package does not call.

This package imports them itself where it needs them: peft for LoRA adapters, the others for solvers and metrics.
"""

SPIN_COUNT = "10000"
"""How often a waiting OpenMP thread looks for work before it sleeps, less than a millisecond in all.

By default GNU's OpenMP, which torch brings along, lets threads look 300,000 times. If another program has the core of
the thread that they wait for, they waste most of a time slice.
"""

_OPENMP_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

_begun = False


def begin() -> None:
    """Prepare this process, which belongs to one command line, for the import of torch and transformers.

    Settings of OpenMP in the environment stay as the user gave them.
    """
    global _begun
    _begun = True
    # Imports create a million objects and hardly any garbage: looking for it takes a tenth of their time.
    gc.disable()
    wait_briefly()


def wait_briefly() -> None:
    """Let OpenMP threads sleep soon when they wait; it counts if torch is not imported yet."""
    if not any(name in os.environ for name in _OPENMP_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def import_transformers() -> None:
    """Import transformers; if `begin` was called, transformers then takes `UNUSED_BY_TRANSFORMERS` for missing.

    It asks once for each, keeps the answer, and imports what is there, for which it takes as long as for itself.
    """
    import torch  # noqa: F401 (what a Python without the environment lacks first is torch)

    with _hidden(UNUSED_BY_TRANSFORMERS) if _begun else contextlib.nullcontext():
        from transformers.utils import import_utils

        for package in UNUSED_BY_TRANSFORMERS if _begun else ():
            getattr(import_utils, f"is_{package}_available")()


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
