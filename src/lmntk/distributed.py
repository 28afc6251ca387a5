"""Work that several processes share: which one writes, how answers and errors reach all of them."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from lmntk.errors import PeerExitedError, ReportedElsewhereError, UsageError, refused

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

STATUS_FILE = "LMNTK_STATUS_FILE"
"""The environment variable in which run_fewshot.sh names the file that it reads the exit status from."""


def rejoin_after_restart(backend: str, timeout: timedelta) -> None:
    """Form the process group where torchrun has restarted the processes (``--max-restarts``); else do nothing.

    Args:
        backend: ``"gloo"`` or ``"nccl"``.
        timeout: How long the processes wait for each other.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or dist.is_initialized():
        return
    # torchrun keeps one store for all starts, and torch would find the addresses of dead processes in it.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        backend,
        timeout=timeout,
        world_size=int(os.environ["WORLD_SIZE"]),
        rank=int(os.environ["RANK"]),
        store=dist.PrefixStore(f"restart {restarts}", store),
    )


def world_size() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; process 0 writes files and shows progress."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Return whether this process writes files and shows progress."""
    return rank() == 0


def should_report(error: UsageError) -> bool:
    """Return whether this process prints an error: one that all processes met is printed by the first alone."""
    if isinstance(error, ReportedElsewhereError):
        return False
    # Before the processes form a group, all have read the same flags; and all of them notice that a peer has exited.
    met_by_all = world_size() == 1 or isinstance(error, PeerExitedError)
    return os.environ.get("RANK", "0") == "0" if met_by_all else True


def end_with(error: UsageError) -> int:
    """Print an error on the process that reports it; return the exit status.

    torchrun prints a long report for every status but 0. Under run_fewshot.sh, processes that all end with one error
    therefore write the status to a file and exit with 0. Elsewhere the sentence goes into torchrun's report.
    """
    path, status = os.environ.get(STATUS_FILE), 2
    if should_report(error):
        print(f"error: {error}", file=sys.stderr)
        _pass_to_torchrun(f"error: {error}")
    with contextlib.suppress(OSError):
        if path is not None and not isinstance(error, PeerExitedError):
            Path(path).write_text(f"{status}\n", encoding="utf-8")
            return 0 if error.met_by_all else status
    return status


def _pass_to_torchrun(sentence: str) -> None:
    """Write a sentence to the file in which torchrun looks for the traceback of a process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    message = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
    if path is not None:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def shut_down() -> None:
    """Destroy the process group: torch's threads may abort a process that exits without this."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(work: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
    """Call a function on process 0 alone; all processes get its answer, or fail with its error.

    Args:
        work: Called on process 0; its answer must be picklable.
        *args: Arguments of `work`.
        **kwargs: Keyword arguments of `work`.

    Raises:
        UsageError: `work` raised it, or an `OSError`, on process 0.

    Examples:
        >>> on_rank_zero(max, 2, 3)
        3
    """
    if world_size() == 1:
        return work(*args, **kwargs)
    message: list[Any] = [None, None]
    if is_first():
        try:
            message[0] = work(*args, **kwargs)
        except (UsageError, OSError) as error:
            message[1] = _shared(error)
    _run_collective(dist.broadcast_object_list, message)
    answer, failure = message
    if failure is not None:
        raise failure if is_first() else ReportedElsewhereError(str(failure))
    return answer


def keep_on_rank_zero(
    work: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Answer | None:
    """Call a function on process 0 alone, as `on_rank_zero` does, but keep its answer there: the others get None.

    Args:
        work: Called on process 0.
        *args: Arguments of `work`.
        **kwargs: Keyword arguments of `work`.

    Raises:
        UsageError: `work` raised it, or an `OSError`, on process 0.
    """
    kept: list[Answer] = []
    on_rank_zero(lambda: kept.append(work(*args, **kwargs)))
    return kept[0] if kept else None


def on_all_ranks(work: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
    """Call a function on every process; if it fails on one, all fail, and the first of those that failed reports.

    Args:
        work: Called on every process.
        *args: Arguments of `work`.
        **kwargs: Keyword arguments of `work`.

    Returns:
        The answer of this process.

    Raises:
        UsageError: `work` raised it, or an `OSError`, on any process.
    """
    if world_size() == 1:
        return work(*args, **kwargs)
    answer, failure = None, None
    try:
        answer = work(*args, **kwargs)
    except (UsageError, OSError) as error:
        failure = _shared(error)
    errors = gather(None if failure is None else str(failure))
    failed = [number for number, error in enumerate(errors) if error is not None]
    if failed:
        is_mine = failure is not None and rank() == failed[0]
        raise failure if is_mine else ReportedElsewhereError(str(errors[failed[0]]))  # type: ignore[misc]
    return answer  # type: ignore[return-value]  # nothing failed, so there is one


def _shared(error: UsageError | OSError) -> UsageError:
    """Return the error that all processes end with."""
    if isinstance(error, OSError):
        if error.errno is None:
            raise error
        error = refused(error)
    error.met_by_all = True
    return error


def gather(value: Answer) -> list[Answer]:
    """Return the values of all processes, in the order of their ranks, to all of them."""
    found = [value] * world_size()
    if world_size() > 1:
        _run_collective(dist.all_gather_object, found, value)
    return found


def barrier() -> None:
    """Wait until every process has come here."""
    gather(None)


def _run_collective(exchange: Callable[..., object], *args: Any) -> None:
    """Run a collective operation of torch; raise a sentence where another process has exited."""
    try:
        exchange(*args)
    except RuntimeError as error:
        raise PeerExitedError(
            "another process of this run has ended: it prints the reason itself, or was killed, perhaps for lack of "
            f"memory; the same command continues from what was finished ({str(error).partition(chr(10))[0]})"
        ) from error
