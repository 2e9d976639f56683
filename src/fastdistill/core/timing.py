"""Busy time kept apart from queueing, wherever work waits for something it shares with others.

A step is timed as a whole; code below it that knows better (a model client, a worker pool) reports its own units
with `observe`, and then those are what counts.
"""

from contextvars import ContextVar
from time import perf_counter
from typing import Self

from fastdistill.core.stats import Histogram


class StepTime:
    """Busy and queueing time of one step over all samples, in seconds."""

    def __init__(self) -> None:
        self.busy = Histogram()
        self.queued = Histogram()


class Timer:
    """Times steps one after the other: of each the units observed within it, or the whole as one busy unit."""

    __slots__ = ("begun", "step")

    def __enter__(self) -> Self:
        _timer.set(self)  # until another is entered: nothing observes between two
        self.step: StepTime | None = None
        self.begun: float | None = None
        return self

    def turn_to(self, step: StepTime | None) -> None:
        """Ends the step before; None where what follows is not timed."""
        now = perf_counter()
        if (before := self.step) is not None and self.begun is not None:
            before.busy.add(now - self.begun)
        self.step, self.begun = step, now

    def __exit__(self, *_: object) -> None:
        self.turn_to(None)


_timer: ContextVar[Timer | None] = ContextVar("timer", default=None)


def observe(*, queued: float, busy: float) -> None:
    """Reports one unit of work to the step that is being timed, if any: seconds waited for, and worked on."""
    if (timer := _timer.get()) and (step := timer.step):
        timer.begun = None  # the units are what counts
        step.busy.add(busy)
        step.queued.add(queued)
