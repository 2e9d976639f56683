"""Searches texts for regular expressions, of which one may take for ever: here for some milliseconds, then in a worker.

Python keeps its lock for as long as a search takes, so that nothing else goes on; but in the main thread it looks for
signals meanwhile. Elsewhere (a notebook's run has a thread of its own) all is searched in workers. As a program, this
is such a worker, which may be killed.
"""

import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from time import thread_time
from typing import Any, Self, TypeAlias

from fastdistill.data.execution.worker_pool import Death, WorkerPool
from fastdistill.data.execution.worker_process import Channel, confine_process

Rule = tuple[re.Pattern[str], bool]
"""A pattern, and whether it must be found; otherwise it must not."""
Broken = tuple[int, str | None, int | None]
"""The place of a rule, and what was found, with where it begins, if that is what breaks it."""
CPU_S = 1.0
"""For one pattern in one text. A pattern that takes so long takes exponentially long, or the text is enormous."""
_LIMITS = {"cpu_s": CPU_S, "memory_bytes": 1 << 30}
_WALL_S = 30.0
_TURN_S = 0.001  # of the CPU, and the kernel adds one or two of its ticks of some milliseconds

_Job: TypeAlias = tuple[list[tuple[str, int, bool]], str]


class PatternPool(WorkerPool[_Job, Broken | Death | None]):
    module = "fastdistill.data.execution.patterns"
    what = "pattern"

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__(None, _LIMITS, _WALL_S, batch=1)  # alone, a job says which pattern it is at
        self._rules = rules
        self._sent = [(pattern.pattern, pattern.flags, wanted) for pattern, wanted in rules]
        self._here = threading.current_thread() is threading.main_thread()
        self._slow = 0  # searches that were cut and go on in workers: their load would have the timer come late

    async def __aenter__(self) -> Self:
        if self._here:
            self._before = signal.signal(signal.SIGVTALRM, _ring)
        return await super().__aenter__()

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        if self._here:
            signal.signal(signal.SIGVTALRM, self._before)

    async def first_broken(self, text: str) -> Broken | Death | None:
        """The first rule that a text breaks, or how a worker died of it: the place of the pattern is its phase."""
        global _armed
        if not self._here or self._slow:
            return await self.evaluate((self._sent, text))
        try:
            _armed = thread_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, _TURN_S)
            try:
                return _first_broken(self._rules, text)
            finally:
                _armed = None  # the signal may have come, and not have been looked at
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _Interrupted:
            self._slow += 1
        try:
            return await self.evaluate((self._sent, text))
        finally:
            self._slow -= 1

    def from_wire(self, message: Any) -> Broken | None:
        return message and tuple(message)

    async def died(self, job: _Job, death: Death, *_: object) -> Death:
        return death


class _Interrupted(Exception):
    pass


_armed: float | None = None  # since when, by its `thread_time`, the main thread searches


def _ring(*_: object) -> None:
    """The timer counts what all threads take, such as one that writes to a disk: a search is cut for its own time."""
    global _armed
    if _armed is None:
        return
    if thread_time() - _armed < _TURN_S:
        signal.setitimer(signal.ITIMER_VIRTUAL, _TURN_S)
    else:
        _armed = None
        raise _Interrupted


def _first_broken(rules: Sequence[Rule], text: str, enter: Callable[[int], object] = int) -> Broken | None:
    """The first rule that a text breaks. Calls `enter` before each is looked at, with its place."""
    for at, (pattern, wanted) in enumerate(rules):
        enter(at)
        found = pattern.search(text)
        if (found is not None) is not wanted:
            return (at, found[0][:200], found.start()) if found else (at, None, None)
    return None


def _serve() -> None:
    limits = json.loads(sys.argv[1])
    confine_process(limits["memory_bytes"])
    channel = Channel(limits["cpu_s"])

    def judge(job: _Job) -> Broken | None:
        rules = [(re.compile(pattern, flags), wanted) for pattern, flags, wanted in job[0]]
        broken = _first_broken(rules, job[1], lambda at: channel.enter(str(at)))
        channel.enter(None)
        return broken

    channel.serve(judge)


if __name__ == "__main__":
    _serve()
