"""The zygote of `python_pool`, as a program (`python -m`): forks fresh, confined processes for every case.

It imports what programs commonly need, confines itself to reading the interpreter's files, and never sees code or
tests: these go straight from the pool to its children, in files that it hands on, so that no later child inherits them.
"""

import ctypes
import fcntl
import gc
import json
import math
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from time import monotonic
from typing import Any, Literal

from fastdistill.data.execution.python_child import run_program, run_tester
from fastdistill.data.execution.sandbox import DESCRIPTORS, IsolationLevel, confine_process, confine_zygote

Role = Literal["split", "solo", "stdio"]
READY, KILL = b"ready", b"kill"

_WARM = "bisect cmath copy functools heapq inspect io itertools math operator re statistics string textwrap typing"
_GRACE_S = 0.5
"""For a program to end by itself once its tester has; it may be dying already, and of what is worth knowing."""
_EVER_S = 1e6  # as long as `poll` can wait
_PYTHON = ctypes.PyDLL(None)


def main() -> None:
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool, which then hangs up
    for name in _WARM.split():
        import_module(name)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    confine_zygote(IsolationLevel(settings["level"]), settings["memory_bytes"], [*settings["readable"], "."])
    sys.argv = ["program.py"]
    sys.path.remove(os.environ["PYTHONPATH"])
    os.environ.clear()
    random.seed(0)
    gc.freeze()
    with socket.socket(fileno=0) as control, suppress(BrokenPipeError):  # the pool is gone
        control.send(READY)
        _serve(control, settings["cpu_s"], settings["wall_s"], settings["result_bytes"])


def _serve(control: socket.socket, cpu_s: int, wall_s: float, result_bytes: int) -> None:
    """Runs one case after the other until the pool hangs up.

    In: a role with its files. Out: how the case's processes ended. While a case runs, any message kills it.
    """
    null = 1  # our own standard output leads nowhere
    while True:
        message, files, _, _ = socket.recv_fds(control, 64, 4)
        children: dict[int, str] = {}
        match message, files:
            case b"split", (code, task, output, report):
                ours, theirs = (end.detach() for end in socket.socketpair())
                files += [ours, theirs]
                children[_fork(lambda: run_program(4), cpu_s, null, output, null, code, theirs)] = "program"
                children[_fork(lambda: run_tester(5, result_bytes), cpu_s, *[null] * 3, task, report, ours)] = "tester"
            case b"solo", (task, output, report):
                children[_fork(run_tester, cpu_s, null, output, null, task, report)] = "program"
            case b"stdio", (code, stdin, output):
                children[_fork(run_program, cpu_s, stdin, output, null, code)] = "program"
            case b"", _:
                return
            case _:
                continue  # asks to kill a case that has just ended
        for descriptor in files:
            os.close(descriptor)
        control.send(json.dumps(_watch(control, children, wall_s)).encode())


def _fork(run: Callable[[], int], cpu_s: int, *descriptors: int) -> int:
    """Starts a confined child with these as its descriptors 0, 1, 2 ... and no others; `run` gives its exit status."""
    # Not os.fork, after which the interpreter prepares for threads and draws new seeds: half the cost of a child.
    # There is one thread, and all children are to draw the same numbers.
    if pid := _PYTHON.fork():
        if pid < 0:
            raise OSError("fork")
        return int(pid)
    status = 70
    try:
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 24) for descriptor in descriptors]
        for target, descriptor in enumerate(high):
            os.dup2(descriptor, target)
        os.closerange(len(high), DESCRIPTORS)
        confine_process(cpu_s)
        status = run()
    finally:
        os._exit(status)


def _watch(control: socket.socket, children: dict[int, str], wall_s: float) -> dict[str, Any]:
    """Waits for all children, or kills them. Found are the fields of `python_pool`'s `_Run` that we know."""
    found: dict[str, Any] = {"killed": False}
    deadline = monotonic() + wall_s
    running = {os.pidfd_open(pid): pid for pid in children}
    poll = select.poll()
    for descriptor in (control.fileno(), *running):
        poll.register(descriptor, select.POLLIN)
    while running:
        events = poll.poll(1000 * min(max(0.0, deadline - monotonic()), _EVER_S))
        stop = not events
        if stop:
            found.setdefault("timed_out", "tester_status" not in found)
            deadline = math.inf
        for descriptor, _ in events:
            if pid := running.pop(descriptor, 0):
                _, status, usage = os.wait4(pid, 0)
                poll.unregister(descriptor)
                os.close(descriptor)
                status = os.waitstatus_to_exitcode(status)
                if children[pid] == "tester":
                    found["tester_status"] = status
                    deadline = min(deadline, monotonic() + _GRACE_S)
                else:
                    found |= {"status": status, "cpu_s": usage.ru_utime + usage.ru_stime}
            else:
                stop = True
                if not control.recv(64):
                    poll.unregister(descriptor)
        for pid in running.values() if stop else ():
            found["killed"] = True
            os.kill(pid, signal.SIGKILL)
    return found


if __name__ == "__main__":
    main()
