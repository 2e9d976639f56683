"""Busy time kept apart from queueing, wherever work waits for something it shares with others.

A step is timed as a whole; code below it that knows better (a model client, a worker pool) reports its own units
with `observe`, and then those are what counts.
"""

from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import Self

from fastdistill.core.stats import Histogram


class StepTime:
    """Busy and queueing time of one step over all samples, in seconds."""

    def __init__(self) -> None:
        self.busy = Histogram()
        self.queued = Histogram()


class Timer:
    """Times steps one after the other: of each the units observed within it, or the whole as one busy unit."""

    __slots__ = ("_begun", "_step")

    def __enter__(self) -> Self:
        _timer.set(self)  # until another is entered: nothing observes between two
        self._step: StepTime | None = None
        self._begun: float | None = None
        return self

    def turn_to(self, step: StepTime | None) -> None:
        """Ends the step before; None where what follows is not timed."""
        now = perf_counter()
        if (before := self._step) is not None and self._begun is not None:
            before.busy.add(now - self._begun)
        self._step, self._begun = step, now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.turn_to(None)

    def observe(self, queued: float, busy: float) -> None:
        if self._step is not None:
            self._begun = None  # the units are what counts
            self._step.busy.add(busy)
            self._step.queued.add(queued)


_timer: ContextVar[Timer | None] = ContextVar("timer", default=None)


def observe(*, queued: float, busy: float) -> None:
    """Reports one unit of work to the step that is being timed, if any: seconds waited for, and worked on."""
    if timer := _timer.get():
        timer.observe(queued, busy)
