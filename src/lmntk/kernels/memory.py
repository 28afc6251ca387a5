"""What the machine gives: memory that is free, memory that was taken, the rate of its matrix products."""

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Of what is free, so much goes to a kernel unless the user says otherwise.
DEFAULT_FRACTION = 0.6


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be had on `device` now: of the machine, its control group, or the GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    candidates = [
        _meminfo_available(),
        _cgroup_left("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        _cgroup_left("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ]
    known = [value for value in candidates if value is not None]
    # Where nothing tells, assume a laptop that is half full.
    return min(known) if known else 4 * 2**30


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held so far: resident, or on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return the memory that this process holds now; its peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes(torch.device("cpu"))


# mallopt's names for what is done with memory that is freed, as <malloc.h> numbers them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST, _USUAL = 2**30, 2**25


@contextlib.contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Let the C library keep what is freed while the block runs, and give it back to the system at the end.

    Activations and factors come and go by the gigabyte, and memory that the system gives anew costs its first touch:
    up to a third of the propagation's time was seen to go there. Of effect with glibc only.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_TRIM_THRESHOLD, _MOST)
    library.mallopt(_MMAP_THRESHOLD, _MOST)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, _USUAL)
        library.mallopt(_MMAP_THRESHOLD, _USUAL)
        library.malloc_trim(0)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_left(limit_file: str, usage_file: str) -> int | None:
    try:
        limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
    except OSError:
        return None
    return int(limit) - int(usage) if limit.isdigit() else None
