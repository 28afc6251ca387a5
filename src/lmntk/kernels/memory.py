"""The memory budget of a kernel, and the memory of the machine: free, resident, at its peak."""

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch


@dataclass(frozen=True)
class MemoryBudget:
    """Memory that an engine may take beside the model itself.

    Attributes:
        bytes: The budget in bytes.
        DEFAULT_FRACTION: The part of free memory that a kernel gets unless the user says otherwise.

    Example:
        >>> MemoryBudget.from_gb(1.5).share(0.25)
        MemoryBudget(bytes=402653184)
        >>> MemoryBudget.of_free(10 * 2**30, neighbours=2).gb
        3.0
    """

    bytes: int

    DEFAULT_FRACTION: ClassVar[float] = 0.6

    @classmethod
    def from_gb(cls, gb: float) -> "MemoryBudget":
        """Return a budget of so many units of 2**30 bytes."""
        return cls(int(gb * 2**30))

    @classmethod
    def of_free(cls, free: float, neighbours: int = 1) -> "MemoryBudget":
        """Return the default budget where `free` bytes are shared by so many processes."""
        return cls(int(cls.DEFAULT_FRACTION * free / neighbours))

    @classmethod
    def default(cls, device: torch.device, neighbours: int = 1) -> "MemoryBudget":
        """Return the default budget on a device now.

        Args:
            device: The device of the parameters.
            neighbours: Processes that share the device's memory, this one included.
        """
        return cls.of_free(free_bytes(device), neighbours)

    @property
    def gb(self) -> float:
        """The budget in units of 2**30 bytes."""
        return self.bytes / 2**30

    def share(self, fraction: float) -> "MemoryBudget":
        """Return a budget of this fraction."""
        return MemoryBudget(int(self.bytes * fraction))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on `device` now: of the machine, within its control group, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    candidates = [
        _meminfo_available(),
        _cgroup_left("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        _cgroup_left("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ]
    known = [value for value in candidates if value is not None]
    # Where no file reports it, assume a laptop that is half full.
    return min(known) if known else 4 * 2**30


def peak_bytes(device: torch.device) -> int:
    """Return the peak of this process so far in bytes: resident memory, or memory on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; its peak where the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes(torch.device("cpu"))


# mallopt's names for what happens to freed memory, as <malloc.h> numbers them, and the thresholds in bytes: all memory
# is kept, or glibc's largest dynamic threshold.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEP_ALL, _USUAL = 2**30, 2**25


@contextlib.contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Let the C library keep freed memory while the block runs, and return it to the system at the end.

    The factored engine allocates and frees activations and factors by the gigabyte, and the first touch of memory that
    is fresh from the system took up to a third of the propagation's time. The setting holds for the whole process and
    glibc cannot undo it: afterwards its thresholds are 32 MiB and no longer adapt. So only a program that owns its
    process should use this; `empirical_ntk` and the engines do not. It has no effect with other C libraries.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_TRIM_THRESHOLD, _KEEP_ALL)
    library.mallopt(_MMAP_THRESHOLD, _KEEP_ALL)
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
    return (
        int(limit) - int(usage) + _reclaimable(Path(usage_file).with_name("memory.stat")) if limit.isdigit() else None
    )


def _reclaimable(stat_file: Path) -> int:
    """Return the bytes of files that a control group's usage counts, and that the system takes back first."""
    try:
        counts = dict(line.split() for line in stat_file.read_text().splitlines())
        return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0
