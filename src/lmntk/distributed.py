"""What several processes share: who is first, whose answer counts, who tells of an error."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from lmntk.errors import PeerExitedError, ReportedElsewhereError, UsageError, refused

Answer = TypeVar("Answer")

STATUS_FILE = "LMNTK_STATUS_FILE"
"""The variable in which run_fewshot.sh names the file that it reads its exit status from."""


def meet_after_restart(backend: str, timeout: timedelta) -> None:
    """Meet the other processes where torchrun has started them again (``--max-restarts``); do nothing on a first start.

    Args:
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: How long they wait for each other.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or dist.is_initialized():
        return
    # torchrun keeps one store for all starts, and torch would find the addresses of processes that are gone in it.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        backend,
        timeout=timeout,
        world_size=int(os.environ["WORLD_SIZE"]),
        rank=int(os.environ["RANK"]),
        store=dist.PrefixStore(f"restart {restarts}", store),
    )


def world_size() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first, 0, writes files and shows progress."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def tells(error: UsageError) -> bool:
    """Whether it is this process that shows an error: what all have met alike is shown by the first."""
    if isinstance(error, ReportedElsewhereError):
        return False
    # Before the processes know each other they have read flags, all of them the same; and all lose the same one.
    alike = world_size() == 1 or isinstance(error, PeerExitedError)
    return os.environ.get("RANK", "0") == "0" if alike else True


def end_with(error: UsageError) -> int:
    """Show an error on the process that is to show it; return the exit status.

    torchrun reports every status but 0 at length. Under run_fewshot.sh, processes that all end with one error leave the
    status in a file and end with 0. Elsewhere torchrun's report gets the sentence to end with.
    """
    path, status = os.environ.get(STATUS_FILE), 2
    if tells(error):
        print(f"error: {error}", file=sys.stderr)
        _leave_for_torchrun(f"error: {error}")
    with contextlib.suppress(OSError):
        if path is not None and not isinstance(error, PeerExitedError):
            Path(path).write_text(f"{status}\n", encoding="utf-8")
            return 0 if error.met_by_all else status
    return status


def _leave_for_torchrun(sentence: str) -> None:
    """Write a sentence where torchrun looks for the traceback of a process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    message = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
    if path is not None:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def leave() -> None:
    """Part from the other processes when all is done: torch's threads may abort a process that just ends."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(work: Callable[[], Answer]) -> Answer:
    """Do something on the first process alone: all of them get its answer, or fail with its error.

    Args:
        work: Returns what can be sent to the others.
    """
    if world_size() == 1:
        return work()
    message: list[Any] = [None, None]
    if is_first():
        try:
            message[0] = work()
        except (UsageError, OSError) as error:
            message[1] = _shared(error)
    _meet(lambda: dist.broadcast_object_list(message))
    answer, failure = message
    if failure is not None:
        raise failure if is_first() else ReportedElsewhereError(str(failure))
    return answer


def on_all_ranks(work: Callable[[], Answer]) -> Answer:
    """Do something on every process; where it fails on one of them all fail, and the first of those tells."""
    if world_size() == 1:
        return work()
    answer, own = None, None
    try:
        answer = work()
    except (UsageError, OSError) as error:
        own = _shared(error)
    errors = gather(None if own is None else str(own))
    failed = [number for number, error in enumerate(errors) if error is not None]
    if failed:
        raise own if own is not None and rank() == failed[0] else ReportedElsewhereError(str(errors[failed[0]]))
    return answer  # type: ignore[return-value]  # nothing failed, so there is one


def _shared(error: UsageError | OSError) -> UsageError:
    """The error that all processes end with."""
    if isinstance(error, OSError):
        if error.errno is None:
            raise error
        error = refused(error)
    error.met_by_all = True
    return error


def gather(own: Answer) -> list[Answer]:
    """Return what every process has, in their order, to all of them."""
    found = [own] * world_size()
    if world_size() > 1:
        _meet(lambda: dist.all_gather_object(found, own))
    return found


def barrier() -> None:
    """Go on when every process has come here."""
    gather(None)


def _meet(exchange: Callable[[], object]) -> None:
    """Exchange something with the other processes, one of which may be gone."""
    try:
        exchange()
    except RuntimeError as error:
        raise PeerExitedError(
            "another process of this run has ended: it says why itself, or was killed, for lack of memory perhaps; the "
            f"same command goes on from what was finished ({str(error).partition(chr(10))[0]})"
        ) from error
