"""Busy time kept apart from queueing, wherever work waits for something it shares with others.

A step is timed as a whole; code below it that knows better (a model client, a worker pool) reports its own units
with `observe`, and then those are what counts.
"""

from contextvars import ContextVar
from time import perf_counter
from types import TracebackType

from fastdistill.core.stats import Histogram


class StepTime:
    """Busy and queueing time of one step over all samples, in seconds."""

    def __init__(self) -> None:
        self.busy = Histogram()
        self.queued = Histogram()


class Timer:
    """Times a block for its step: the units observed within it, or the whole block as one busy unit."""

    __slots__ = ("_begun", "_step")

    def __init__(self, step: StepTime) -> None:
        self._step = step

    def __enter__(self) -> None:
        _timer.set(self)  # until the next step begins: nothing observes between two
        self._begun: float | None = perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun is not None:
            self._step.busy.add(perf_counter() - self._begun)

    def observe(self, queued: float, busy: float) -> None:
        self._begun = None  # the units are what counts
        self._step.busy.add(busy)
        self._step.queued.add(queued)


_timer: ContextVar[Timer | None] = ContextVar("timer", default=None)


def observe(*, queued: float, busy: float) -> None:
    """Reports one unit of work to the step that is being timed, if any: seconds waited for, and worked on."""
    if timer := _timer.get():
        timer.observe(queued, busy)
