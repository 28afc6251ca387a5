"""How long work takes, and the rate of the machine's matrix products."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch


class StageTimer:
    """Adds up the seconds of an engine's stages, for benchmarks.

    A GPU returns before it has worked, so that the seconds mean little there unless the timer waits for it.

    Args:
        device: Wait for the work of this device at either end of each stage, which takes time; None never waits.

    Attributes:
        seconds: The seconds spent in each stage so far, by its name.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to the stage `name`."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - start

    def _now(self) -> float:
        return time.perf_counter() if self._device is None else clock(self._device)


def clock(device: torch.device) -> float:
    """Return the time in seconds at which `device` has done all work so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds of a second call of `work`, after a first one has warmed everything up."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():  # it returns before it has worked
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1]


@functools.cache
def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure, once, the best rate of square matrix products in floating-point operations a second."""
    # Large enough for the best rate, small enough for a tenth of a second.
    size = 1536 if device.type == "cpu" else 2048 if dtype == torch.float64 else 8192
    factor = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(factor)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(factor, factor, out=out)[0, 0].item()  # it waits for a GPU, which returns before it has worked
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
