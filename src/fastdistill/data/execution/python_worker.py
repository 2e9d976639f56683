"""The zygote of `python_pool`, as a program (`python -m`): forks fresh, confined processes for every case.

It imports what programs commonly need, confines itself to reading the interpreter's files, and never sees code or
tests: these go straight from the pool to its children, in files that it hands on, so that no later child inherits them.
"""

import ctypes
import fcntl
import gc
import json
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Literal

from fastdistill.data.execution.python_child import run_program, run_tester
from fastdistill.data.execution.sandbox import DESCRIPTORS, IsolationLevel, confine_process, confine_zygote

Role = Literal["split", "solo", "stdio"]
READY, KILL = b"ready", b"kill"

_WARM = "bisect cmath copy functools heapq inspect io itertools math operator re statistics string textwrap typing"
_GRACE_MS = 500
"""For a program to end by itself once its tester has; it may be dying already, and of what is worth knowing."""
_PYTHON = ctypes.PyDLL(None)


def main() -> None:
    settings = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool, which then hangs up
    for name in _WARM.split():
        import_module(name)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    confine_zygote(IsolationLevel(settings["level"]), settings["memory_bytes"], [*settings["readable"], "."])
    sys.argv, sys.path = ["program.py"], [path for path in sys.path if path not in settings["hidden"]]
    os.environ.clear()
    random.seed(0)
    gc.freeze()
    with socket.socket(fileno=0) as control, suppress(BrokenPipeError):  # the pool is gone
        control.send(READY)
        _serve(control, settings["cpu_s"], settings["result_bytes"])


def _serve(control: socket.socket, cpu_s: int, result_bytes: int) -> None:
    """Runs one case after the other until the pool hangs up.

    In: a role with its files. Out: how each of the case's processes ended. While a case runs, any message kills it.
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
        control.send(json.dumps(_watch(control, children)).encode())


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


def _watch(control: socket.socket, children: dict[int, str]) -> dict[str, tuple[int, float, bool]]:
    """Waits for all children: each one's exit status (negative: a signal), CPU seconds, and whether we killed it."""
    ended = {}
    killed: set[int] = set()
    patience = None
    running = {os.pidfd_open(pid): pid for pid in children}
    poll = select.poll()
    for descriptor in (control.fileno(), *running):
        poll.register(descriptor, select.POLLIN)
    while running:
        events = poll.poll(patience)
        stop = not events
        for descriptor, _ in events:
            if pid := running.pop(descriptor, 0):
                _, status, usage = os.wait4(pid, 0)
                poll.unregister(descriptor)
                os.close(descriptor)
                ended[children[pid]] = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, pid in killed
                if children[pid] == "tester":
                    patience = _GRACE_MS
            else:
                stop = True
                if not control.recv(64):
                    poll.unregister(descriptor)
        for pid in running.values() if stop else ():
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
    return ended


if __name__ == "__main__":
    main()
