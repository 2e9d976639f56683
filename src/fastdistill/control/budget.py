"""When a run has enough: a target of accepted samples, and a budget that it may not exceed. Both end it cleanly."""

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Literal

from pydantic import BaseModel, Field

from fastdistill.core.errors import ExitCode
from fastdistill.core.types import Sample, Status
from fastdistill.model.budget import ModelBudget
from fastdistill.model.meter import Meter


class Target(BaseModel, frozen=True, extra="forbid"):
    """Stop at exactly `accepted` accepted samples: the first ones in input order, whichever were finished first."""

    accepted: int = Field(ge=1)
    on_exhausted: Literal["keep", "fail"] = Field(
        "keep", description="fail: a run that uses up its records before the target ends with exit code 5"
    )


class Budget(ModelBudget):
    """What the whole run may spend, over all models, and how long it may take."""

    max_wall_s: float | None = Field(None, gt=0)

    @cached_property
    def unlimited(self) -> bool:
        return self == Budget()

    def exceeded(self, meters: Sequence[Meter], tokens: int, dollars: float, begun: float) -> str | None:
        """As `spent`, or that the time is up. `begun` is when the run began, by `perf_counter`."""
        if self.late(begun):
            return f"budget.max_wall_s: {self.max_wall_s:g} s have passed"
        return self.spent(meters, tokens, dollars)

    def late(self, begun: float) -> bool:
        return self.max_wall_s is not None and perf_counter() - begun >= self.max_wall_s


class Progress:
    """Knows, while samples finish in any order, how many are accepted among those before the first unfinished one.

    Only these count towards a target: counting whatever finished first would favour samples with fast answers.
    Memory is bounded by the samples that are open at a time.
    """

    def __init__(self, target: int | None = None) -> None:
        self.accepted = 0
        self._found: list[int] = []  # indexes of those accepted ahead, in order
        self._target = target
        self._next = 0  # the first index that has not finished
        self._ahead: dict[int, Sample] = {}
        self._free = 0  # all samples below it have finished, or something was asked for them
        self._begun = 0  # all samples below it have begun, or were left out

    def begins(self, index: int) -> bool:
        """Whether a sample is next in input order: for one that never comes, those behind it would wait for ever."""
        while self._begun < self._next or self._begun in self._ahead:
            self._begun += 1
        self._begun += index == self._begun
        return index < self._begun

    def finished(self, sample: Sample) -> list[Sample]:
        """The samples that count now, in input order: none that is ahead of an unfinished one or beyond the target."""
        counted = []
        if sample.status is Status.OPEN and sample.accepted:
            insort(self._found, sample.index)
        self._ahead[sample.index] = sample
        while done := self._ahead.pop(self._next, None):
            if not self.reached:
                counted.append(done)
                if self._found and self._found[0] == done.index:
                    del self._found[0]
                    self.accepted += 1
            self._next += 1
        return counted

    @property
    def free(self) -> int:
        """The first sample that lives off stored answers alone, as far as is known: it goes on, or is not begun."""
        while self._free < self._next or self._free in self._ahead:
            self._free += 1
        return self._free

    def asks(self, index: int) -> bool:
        """Whether something may be asked for a sample now: not while an earlier one lives off stored answers alone.
        That one may be what the target lacks, and a run that needs no teacher must not ask it.
        """
        if index == self.free:
            self._free += 1
        return index < self._free

    @property
    def reached(self) -> bool:
        """Whether there is a target, and it is met."""
        return self._target is not None and self.accepted >= self._target

    @property
    def assured(self) -> bool:
        """Whether no further record can count: as many as the target are accepted, whatever the open ones bring."""
        return self._target is not None and self.accepted + len(self._found) >= self._target

    def beyond(self, index: int) -> bool:
        """Whether a sample can't count though the target is not met yet: all that is missing is accepted before it."""
        if self._target is None:
            return False
        missing = self._target - self.accepted
        return 0 < missing <= len(self._found) and index > self._found[missing - 1]


def first_accepted(samples: Iterable[Sample], target: Target | None) -> Iterator[Sample]:
    """The samples up to the one that makes the target full; all of them without a target."""
    accepted = 0
    for sample in samples:
        if sample.status is Status.SKIPPED and not sample.failures:
            return  # the ledger has left it out, for it is beyond that one
        yield sample
        accepted += sample.status is Status.OPEN and bool(sample.accepted)
        if target and accepted == target.accepted:
            return


@dataclass(frozen=True, slots=True)
class Enough:
    """Why a run ends before its records do, and the exit code of that."""

    message: str
    exit_code: ExitCode
