"""The worker's side of `worker_pool`: jobs in, results out, and a timer of CPU time. Knows nothing of what is judged.

Lines of JSON in both directions. In: a batch of jobs. Out: `"ready"` once; for each job, in order, its result; and for
a job that is alone, the name of a phase when it begins after another one. It imports only the standard library, for a
worker must start fast, and again after every kill.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

FIRST_PHASE = "candidate"
"""What a worker is in before it says anything else."""
_HELD_BACK_S = 0.02
"""How long a result may wait for those after it, so that they travel together."""


def line(message: object) -> bytes:
    """ASCII JSON, so that lone surrogates survive the way, and a line break."""
    return _encode(message).encode() + b"\n"


_encode = json.JSONEncoder(separators=(",", ":")).encode


class Channel:
    """Answers on standard output what comes in on standard input, until that ends or whoever reads is gone."""

    def __init__(self, cpu_s: float = 0) -> None:
        self._answers = sys.stdout.buffer
        self._cpu_s = cpu_s
        self._phase = FIRST_PHASE
        self._alone = True

    def enter(self, phase: str | None) -> None:
        """Says what is run from now on, under a timer of CPU time that kills this process with SIGPROF.

        None: code of our own, which has no timer.
        """
        signal.setitimer(signal.ITIMER_PROF, 0 if phase is None else self._cpu_s)
        if phase is not None and self._alone and phase != self._phase:
            self._phase = phase
            self._send(phase)

    def serve(self, judge: Callable[[Any], object]) -> None:
        try:
            self._send("ready")
            for request in sys.stdin.buffer:
                jobs = json.loads(request)
                self._alone = len(jobs) == 1
                flushed = monotonic()
                for job in jobs:
                    self._answers.write(line(judge(job)))
                    if monotonic() > flushed + _HELD_BACK_S:
                        self._answers.flush()
                        flushed = monotonic()
                self._answers.flush()
        except ConnectionError:  # the parent is gone
            os._exit(1)

    def _send(self, message: object) -> None:
        self._answers.write(line(message))
        self._answers.flush()


def confine_process(memory_bytes: int) -> None:
    """Takes from this process, for good, what judging does not need. A system that lacks a limit goes without."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(limit, (value, value))
