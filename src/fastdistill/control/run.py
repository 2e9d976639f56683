"""One run at work: what the main path and the steps are given (`pipeline.Run`), made of the real parts."""

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from time import perf_counter

from fastdistill.control.budget import Budget, Enough, Progress, Target
from fastdistill.control.ledger import Ledger
from fastdistill.control.seen import Seen
from fastdistill.control.tally import Tally
from fastdistill.control.writer import fault
from fastdistill.core.errors import BudgetSpent, ConfigError, ExitCode, FatalError, NotAsked, TimeUp, TooManyErrors
from fastdistill.core.run import AT_WORK
from fastdistill.core.stats import Histogram
from fastdistill.core.step import KeyIndex, Step
from fastdistill.core.timing import StepTime
from fastdistill.core.types import Sample, Status
from fastdistill.model.client import ModelClient

_KEYS_IN_MEMORY = 2_000  # of each index: to write more at once would hold the loop
_SUMMED_UP_AT_ONCE = 200  # samples
_NOT_ASKED = {"not_asked", BudgetSpent.code}
_ENOUGH_TO_JUDGE = 50  # samples before `max_error_rate` can stop a run midway


def open_at(slots: int) -> int:
    """How many samples are open at a time, with so many slots of all models together."""
    return max(64, 2 * slots)


class ActiveRun:
    """Implements `pipeline.Run`. Lives in one event loop; everything but the ledger's writer is in its thread."""

    def __init__(
        self,
        *,
        dist: Path,
        ledger: Ledger,
        models: Mapping[str, ModelClient],
        tally: Tally,
        max_error_rate: float,
        target: Target | None,
        budget: Budget,
    ) -> None:
        self.dist = dist
        self.tally = tally
        self.models = models
        self.step_times: defaultdict[str, StepTime] = defaultdict(StepTime)
        self.begun = perf_counter()
        self.total: int | None = None  # records to come in all, once somebody has counted them
        self._ledger = ledger
        self._max_error_rate = max_error_rate
        self._target = target
        self._budget = budget
        self._progress = Progress(target.accepted if target else None)
        self._cutoff: int | None = None  # index of the sample that made the target full
        self.furthest = -1  # highest index that went through the last sample step
        self._counted = False  # every sample that is still in the stream is in the tally
        self._stopped = asyncio.Event()
        self.enough: Enough | None = None
        self._indexes = Indexes()
        self._numbers = count()
        self._turns: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap, of those that wait, by their index
        self._places = count()
        self.stopped_for: FatalError | None = None

    def model(self, name: str) -> ModelClient:
        return self.models[name]

    def next_index(self) -> int:
        return next(self._numbers)

    def index(self, name: str) -> KeyIndex:
        return self._indexes.open(name)

    @property
    def open_samples(self) -> int:
        return open_at(sum(model.router.capacity for model in self.models.values()))

    def discard(self, sample: Sample) -> None:
        self._ledger.submit(sample)
        if self._counted:
            self.tally.leave(sample)
        else:
            self._count(sample)

    def report(self, step: str, found: Mapping[str, object]) -> None:
        self.tally.reports[step] = dict(found)

    def begins(self, sample: Sample) -> None:
        AT_WORK.set(sample.index)
        if self._target is not None and not self._progress.begins(sample.index):
            raise ConfigError(
                "target: counts samples in input order, and the steps before the first that works on single ones do not"
                f" bring all of them so: {sample.source} came before another; what a step leaves out it must discard"
            )

    async def keep_up(self) -> None:
        await self._ledger.keep_up()

    async def finished(self, sample: Sample, *, last: bool) -> None:
        await self._ledger.save(sample)
        if last:
            self.furthest = max(self.furthest, sample.index)
        # What fails early does not come again; all else counts once, when no more can happen to it.
        if last or sample.status is not Status.OPEN:
            self._count(sample)

    async def read_back(self, *, last: bool) -> Iterator[Sample]:
        self._counted = last
        if self._progress.reached and self._cutoff is not None:
            await self._ledger.leave_out_after(self._cutoff)
        return await self._ledger.samples()

    @property
    def target(self) -> int | None:
        """Samples that are to be accepted."""
        return self._target.accepted if self._target else None

    @property
    def stopping(self) -> bool:
        return self._ended or self._progress.assured

    @property
    def _ended(self) -> bool:
        """Whether nothing more is asked for any sample."""
        return self.stopped_for is not None or self.enough is not None

    def stop(self, reason: FatalError) -> None:
        """Winds the run down: nothing new is begun, what is in flight comes home.

        The first reason stays, or what is raised from it and says more.
        """
        if self.stopped_for is None or reason.__cause__ is self.stopped_for:
            self.stopped_for = reason
        self._stopped.set()
        self._give_turns()

    async def pause(self, seconds: float) -> None:
        """Sleeps, but not on when the run begins to wind down (`model.client.Brake`)."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def check(self, tokens: int, dollars: float) -> bool:
        """Whether a request of up to so many tokens and dollars must wait (`model.client.Brake`)."""
        if self.stopped_for is not None:
            raise self.stopped_for
        if self._progress.beyond(AT_WORK.get()):
            raise NotAsked("not_asked", "the target is met before this sample, whatever others bring")
        if self._budget.unlimited and self.enough is None:
            return False
        meters = [model.meter for model in self.models.values()]
        if self.enough is None and (reason := self._budget.exceeded(meters, tokens, dollars, self.begun)):
            self._end(Enough(reason, ExitCode.BUDGET))
        if self.enough is not None:
            raise (TimeUp if self._budget.late(self.begun) else NotAsked)("not_asked", self.enough.message)
        return self._budget.taken(meters, tokens, dollars)

    def turn(self) -> asyncio.Future[None] | None:
        """What a sample waits for before anything is asked for it (`model.client.Brake`)."""
        if self._target is None or self._ended:
            return None
        index = AT_WORK.get()
        if self._progress.asks(index):
            self._give_turns()
            return None
        turn = asyncio.get_running_loop().create_future()
        heappush(self._turns, (index, next(self._places), turn))
        return turn

    def _give_turns(self) -> None:
        while self._turns and (self._ended or self._turns[0][0] <= self._progress.free):
            _, _, turn = heappop(self._turns)
            if not turn.done():
                turn.set_result(None)

    def exhausted(self) -> Enough | None:
        """Why the records did not suffice, if there was a target that says so."""
        if self._target is None or self.enough is not None or self._target.on_exhausted == "keep":
            return None
        if self._progress.reached:
            return None
        reached = f"{self._progress.accepted} of {self._target.accepted}"
        return Enough(f"target.accepted: the records are used up at {reached} accepted samples", ExitCode.PARTIAL)

    def time_of(self, step: Step) -> StepTime:
        return self.step_times[step.name]

    def close(self) -> None:
        self._indexes.close()

    def check_error_rate_at_end(self) -> None:
        """Raises TooManyErrors if more samples failed than the run allows."""
        self._check_error_rate(enough=1)

    def _end(self, enough: Enough) -> None:
        self.enough = self.enough or enough
        self._stopped.set()
        self._give_turns()

    def _count(self, sample: Sample) -> None:
        if self._target is None:
            self.tally.add(sample)
        else:
            for counted in self._progress.finished(sample):
                self.tally.add(counted)
                self._cutoff = counted.index
            if self._progress.reached:
                self._end(Enough(f"target: {self._target.accepted} samples are accepted", ExitCode.OK))
            self._give_turns()
        self._check_error_rate()
        if self.tally.samples % _SUMMED_UP_AT_ONCE == 0:
            for each in self._histograms():
                each.sum_up()

    def _histograms(self) -> Iterator[Histogram]:
        for time in self.step_times.values():
            yield from (time.busy, time.queued)
        for model in self.models.values():
            yield from (model.meter.busy, model.meter.queued, *model.meter.failed.values())

    def _check_error_rate(self, enough: int = _ENOUGH_TO_JUDGE) -> None:
        if not self.tally.failed:
            return
        failed, total = self.tally.error_rate()
        if total < enough or failed <= self._max_error_rate * total:
            return
        # A draw that was not asked for is nothing that a sample fails for.
        reasons = sorted(self.tally.failures.items(), key=lambda item: (item[0][1] in _NOT_ASKED, -item[1].count))
        (step, reason), most = reasons[0]
        raise TooManyErrors(
            f"{failed} of {total} samples failed, more than max_error_rate {self._max_error_rate:g} allows;"
            f" most often {reason} at {step} ({most.count}), like: {most.examples[0]}"
        )


class Indexes:
    """Keys seen so far, in bounded memory: the latest in dicts, the others in one temporary SQLite file."""

    def __init__(self) -> None:
        # An empty name is SQLite's own temporary file: it spills to disk and is never seen by anybody else.
        self._connection = sqlite3.connect("", isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=OFF")
        self._connection.execute("PRAGMA cache_size=-1000")
        self._opened = 0

    def open(self, name: str) -> KeyIndex:
        """A new, empty index; `name` is for people."""
        self._opened += 1
        return _Index(self._connection, f"{name}:{self._opened}")

    def close(self) -> None:
        self._connection.close()


class _Index:
    def __init__(self, connection: sqlite3.Connection, table: str) -> None:
        quoted = '"' + table.replace('"', '""') + '"'
        connection.execute(f"CREATE TABLE {quoted} (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._insert = f"INSERT INTO {quoted} VALUES (?, ?)"
        self._select = f"SELECT value FROM {quoted} WHERE key = ?"
        self._connection = connection
        self._latest: dict[str, str] = {}
        self._seen = Seen()

    def first(self, key: str, value: str) -> str | None:
        try:
            if self._seen.add(key):
                if (first := self._latest.get(key)) is not None:
                    return first
                if row := self._connection.execute(self._select, (key,)).fetchone():
                    return str(row[0])
            self._latest[key] = value
            if len(self._latest) >= _KEYS_IN_MEMORY:
                self._connection.execute("BEGIN")
                self._connection.executemany(self._insert, sorted(self._latest.items()))
                self._connection.execute("COMMIT")
                self._latest.clear()
        except sqlite3.Error as error:
            raise fault(Path("TMPDIR (by default /var/tmp)"), error) from error
        return None
