"""What the main path needs of a run."""

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from fastdistill.core.errors import FatalError
from fastdistill.core.step import Context, Step
from fastdistill.core.timing import StepTime
from fastdistill.core.types import Sample

AT_WORK: ContextVar[int] = ContextVar("at_work", default=-1)
"""The index of the sample that is worked on; -1: of none."""


class Run(Context, Protocol):
    """A run at work: more than the `Context` that its steps see."""

    @property
    def open_samples(self) -> int:
        """How many samples are worked on at a time; not how many requests are in flight."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether the run is winding down: open samples come home, no new one is begun."""
        ...

    @property
    def stopped_for(self) -> FatalError | None:
        """What `stop` was called for first."""
        ...

    def stop(self, reason: FatalError) -> None: ...

    def time_of(self, step: Step) -> StepTime: ...

    def begins(self, sample: Sample) -> None:
        """A sample is worked on from here on, in the running task."""
        ...

    async def keep_up(self) -> None:
        """Waits while more is discarded than can be written."""
        ...

    async def finished(self, sample: Sample, *, last: bool) -> None:
        """Writes a sample to the ledger, to be read back; `last`: it has gone through the last sample step."""
        ...

    async def read_back(self, *, last: bool) -> Iterator[Sample]:
        """The finished samples that are still in the stream, in input order."""
        ...
