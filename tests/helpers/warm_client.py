# What `WarmPython.path` executes, after a line that assigns ADDRESS. It imports no site packages, to start at once.
import json
import os
import resource
import signal
import socket
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(words: list[str]) -> None:
    """Let the server start a process for these words; end as it ends."""
    request = {"words": words, "directory": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
    request["ignored"] = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    # Until the process is there, signals wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with socket.socket(socket.AF_UNIX) as keeper, keeper.makefile(encoding="utf-8") as answers:
        keeper.connect(ADDRESS)  # noqa: F821 (assigned above this text)
        socket.send_fds(keeper, [b"\n"], [0, 1, 2])
        keeper.sendall(json.dumps(request).encode() + b"\n")
        pid = int(answers.readline())
        for number in set(SIGNALS) - set(request["ignored"]):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = int(answers.readline())
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main(sys.argv[1:])
