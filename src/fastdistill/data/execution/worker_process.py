"""The worker's side of `worker_pool`: frames in, frames out, and a timer of CPU time. Knows nothing of what is judged.

Frames in both directions are a 4-byte big-endian length and JSON. In: a list of jobs. Out: `"ready"` once; the name of
a phase when it begins after another one; and for each job, in order, its result. It imports only the standard library,
for a worker must start fast, and again after every kill.
"""

import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

HEADER = struct.Struct(">I")
READY = "ready"


def frame(message: object) -> bytes:
    """ASCII JSON, so that lone surrogates survive the way."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    return HEADER.pack(len(payload)) + payload


class Channel:
    """Answers on standard output what comes in on standard input, until that ends or whoever reads is gone."""

    def __init__(self, cpu_s: float, phase: str) -> None:
        self._requests: BinaryIO = sys.stdin.buffer
        self._answers: BinaryIO = sys.stdout.buffer
        self._cpu_s = cpu_s
        self._phase = phase

    def begin(self, phase: str) -> None:
        """Says what is run from now on, under a timer of CPU time that kills this process with SIGPROF."""
        signal.setitimer(signal.ITIMER_PROF, self._cpu_s)
        if phase != self._phase:
            self._send(phase)
            self._phase = phase

    def rest(self) -> None:
        """Ends the timer."""
        signal.setitimer(signal.ITIMER_PROF, 0)

    def serve(self, judge: Callable[[Any], object]) -> None:
        try:
            self._send(READY)
            while header := self._requests.read(HEADER.size):
                for job in json.loads(self._requests.read(*HEADER.unpack(header))):
                    self._send(judge(job))
        except BrokenPipeError:  # the parent is gone
            os._exit(1)

    def _send(self, message: object) -> None:
        self._answers.write(frame(message))
        self._answers.flush()


def confine_process(memory_bytes: int) -> None:
    """Takes from this process, for good, what judging does not need. A system that lacks a limit goes without."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(limit, (value, value))
