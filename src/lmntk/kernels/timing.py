"""How long work takes, and the rate of the machine's matrix products."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

# Seconds of this process by stage of the work, for benchmarks: on a GPU, which answers before it has worked, they mean
# little.
seconds_by_stage: defaultdict[str, float] = defaultdict(float)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Add what the block takes to `seconds_by_stage`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds_by_stage[name] += time.perf_counter() - start


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long `work` takes when it is done a second time, everything warm."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():  # it answers before it has worked
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1]


@functools.cache
def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure, once, how many floating-point operations matrix products make in a second, at best."""
    size = 1536
    factor = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(factor)
    # .item() waits for a GPU, which otherwise answers before it has worked.
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(factor, factor, out=out)[0, 0].item()) for _ in range(3))
