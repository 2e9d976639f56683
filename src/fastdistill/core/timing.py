"""Busy time kept apart from queueing, wherever work waits for something it shares with others.

A step is timed as a whole; code below it that knows better (a model client, a worker pool) reports its own units
with `observe`, and then those are what counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work, in seconds: time spent waiting for a slot, and time spent being worked on."""

    queued: float
    busy: float


@dataclass(slots=True)
class Timer:
    units: list[Unit] = field(default_factory=list)


_timer: ContextVar[Timer | None] = ContextVar("timer", default=None)


@contextmanager
def timed() -> Iterator[Timer]:
    """Times a block; holds the units observed within it, or the whole block as one busy unit."""
    timer = Timer()
    token = _timer.set(timer)
    begun = perf_counter()
    try:
        yield timer
    finally:
        _timer.reset(token)
        if not timer.units:
            timer.units.append(Unit(0.0, perf_counter() - begun))


def observe(*, queued: float, busy: float) -> None:
    """Reports one unit of work to the step that is being timed, if any."""
    if timer := _timer.get():
        timer.units.append(Unit(queued, busy))
