"""Judges SQL in worker processes from asyncio: one bad query costs no other query anything.

Jobs travel in small batches to persistent workers, and so do their answers. When a worker dies or goes silent, what is
left of its batch is judged again with each answer sent at once, so that a second death shows the job that was running;
the rest goes on in a new worker, and that job runs once more, alone, unless it is its own CPU time that killed it.
Dying twice decides, and by its cause: CPU time spent is the query's own doing (`limit_cpu`), a wall clock that ran out
is not (`infra_timeout`, an error, never a pass), nor is any other death (`sandbox_died`).
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.execution.sqlite_worker import READY, Evaluation, Phase, SqlJob, evaluation_from_wire, line

_START_S = 30.0
"""Wall seconds for a worker to start; it needs about 0.1 on an idle core."""
_READ_BYTES = 1 << 16
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")


class PoolClosedError(Exception):
    """The pool was closed before it could answer."""


class WorkerStartError(Exception):
    """A worker process could not be started: no query can be judged."""


class SqlitePool:
    """An async context manager over `workers` processes, each started when it first gets a job.

    Any number of tasks may call `judge`, which raises `WorkerStartError` or `PoolClosedError`.
    """

    def __init__(self, workers: int | None = None, limits: SqlLimits | None = None, batch: int = 16) -> None:
        self._workers = workers or min(2, os.cpu_count() or 1)
        self._limits = limits or SqlLimits()
        self._batch = batch
        self._closed = True

    async def __aenter__(self) -> Self:
        self._queue: asyncio.Queue[_Ticket] = asyncio.Queue()
        self._unanswered: set[_Ticket] = set()
        self._lanes = asyncio.TaskGroup()
        await self._lanes.__aenter__()
        self._tasks = [self._lanes.create_task(self._serve_lane()) for _ in range(self._workers)]
        self._closed = False
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        for ticket in self._unanswered:
            ticket.fail(PoolClosedError("sqlite pool: closed before it could answer"))
        for task in self._tasks:
            task.cancel()
        await self._lanes.__aexit__(None, None, None)

    async def judge(self, jobs: Sequence[SqlJob]) -> list[Evaluation]:
        """One evaluation for each job, in their order; anything wrong with a job itself is a reason."""
        if self._closed:
            raise PoolClosedError("sqlite pool: not open")
        loop = asyncio.get_running_loop()
        tickets = [_Ticket(self._fitted(job), loop.create_future()) for job in jobs]
        self._unanswered.update(tickets)
        try:
            for ticket in tickets:
                self._queue.put_nowait(ticket)
            return await asyncio.gather(*(ticket.future for ticket in tickets))
        finally:
            self._unanswered.difference_update(tickets)

    def _fitted(self, job: SqlJob) -> SqlJob:
        """The job with a full path, and with a text beyond the limit cut one character past it: the verdict stays."""
        longest = self._limits.sql_bytes + 1
        path = job.db_path if job.db_path.startswith("/") else str(Path(job.db_path).absolute())
        return SqlJob(path, job.sql[:longest], job.gold_sql and job.gold_sql[:longest], job.columns, job.order)

    async def _serve_lane(self) -> None:
        lane = _Lane(self._limits)
        try:
            while True:
                tickets = deque([await self._queue.get()])
                # A fair share, so that a burst spreads over all workers.
                share = min(self._batch, 1 + self._queue.qsize() // self._workers)
                while len(tickets) < share:
                    tickets.append(self._queue.get_nowait())
                tickets = deque(ticket for ticket in tickets if not ticket.future.done())  # its caller was cancelled
                try:
                    await lane.judge(tickets)
                except WorkerStartError as error:
                    for ticket in tickets:
                        ticket.fail(error)
        finally:
            await lane.stop()


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    job: SqlJob
    future: asyncio.Future[Evaluation]

    def answer(self, evaluation: Evaluation) -> None:
        if not self.future.done():
            self.future.set_result(evaluation)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Death:
    """Why a worker ended in the middle of a job, what it was doing, and how that is told."""

    reason: SqlReason
    phase: Phase
    detail: str


class _Lane:
    """One worker process at a time, replaced when it dies."""

    def __init__(self, limits: SqlLimits) -> None:
        self._limits = limits
        self._process: Process | None = None
        self._phase = Phase.CANDIDATE
        self._rest = b""  # of a message that has not come whole

    async def judge(self, tickets: deque[_Ticket]) -> None:
        """Answers all tickets, removing each; raises `WorkerStartError`, leaving those it did not answer."""
        again = False
        while tickets and (death := await self._run(tickets, at_once=again)) is not None:
            if again or len(tickets) == 1:  # then the first one left is the job that was running
                decided = death if again and death.reason is SqlReason.LIMIT_CPU else None
                tickets[0].answer(await self._judge_alone(tickets[0].job, decided))
                tickets.popleft()
            again = not again

    async def stop(self) -> int:
        """Kills the worker, if there is one, and waits until it is gone; its exit status, negative for a signal."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with suppress(ProcessLookupError):
            process.kill()
        _pipe(process.stdin).close()
        await process.communicate()
        return await process.wait()

    async def _run(self, tickets: deque[_Ticket], *, at_once: bool) -> _Death | None:
        """Answers the tickets in order, removing each; how that ended, if it did not end well."""
        process = await self._start()
        stdin = _pipe(process.stdin)
        late = False
        try:
            stdin.write(line([at_once or len(tickets) == 1, [ticket.job for ticket in tickets]]))
            async with asyncio.timeout(self._limits.wall_s):
                await stdin.drain()
            while tickets:
                for message in await self._receive(process, self._limits.wall_s):
                    if isinstance(message, str):
                        self._phase = Phase(message)
                    else:
                        tickets.popleft().answer(evaluation_from_wire(message))
        except TimeoutError:
            late = True
        except (EOFError, ConnectionError):
            await process.wait()
        else:
            return None
        phase, status = self._phase, await self.stop()
        if status == -signal.SIGPROF:
            return _Death(SqlReason.LIMIT_CPU, phase, f"more than {self._limits.cpu_s} s of CPU time")
        if late:
            return _Death(SqlReason.INFRA_TIMEOUT, phase, f"{phase}: no answer within {self._limits.wall_s} s")
        return _Death(SqlReason.SANDBOX_DIED, phase, f"{phase}: worker {_describe(status)}")

    async def _judge_alone(self, job: SqlJob, death: _Death | None = None) -> Evaluation:
        """The last run of a job that killed a worker, or seemed to; none after the `death` that decides."""
        ticket = _Ticket(job, asyncio.get_running_loop().create_future())
        death = death or await self._run(deque([ticket]), at_once=True)
        if death is None:
            return ticket.future.result()
        if death.reason is not SqlReason.LIMIT_CPU:
            return Evaluation(death.reason, detail=death.detail)
        if death.phase is Phase.GOLD:
            candidate = await self._judge_alone(job._replace(gold_sql=None))
            detail = f"gold: {SqlReason.LIMIT_CPU}: {death.detail}"
            return candidate._replace(reason=SqlReason.GOLD_INVALID, detail=detail)
        verdict = Evaluation(SqlReason.LIMIT_CPU, exec_pass=False, exec_error=death.detail)
        if job.gold_sql is None or job.gold_sql == job.sql:
            return verdict
        # What was known of gold died with the worker, and a broken gold comes first.
        gold = await self._judge_alone(job._replace(sql=job.gold_sql))
        if gold.outcome == "error":
            return verdict._replace(reason=gold.reason, detail=gold.detail)
        return verdict._replace(gold_match=False, weak_gold=gold.weak_gold)

    async def _start(self) -> Process:
        if self._process is not None:
            if self._process.returncode is None and not _pipe(self._process.stdin).is_closing():
                return self._process
            await self.stop()  # it died while idle
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "fastdistill.data.execution.sqlite_worker"),
                json.dumps(asdict(self._limits)),
                stdin=PIPE,
                stdout=PIPE,
                env=interpreter_environment(),
                start_new_session=True,  # Ctrl-C in the terminal is not for it
            )
        )
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._process = await starting  # uvloop loses a process whose start is cancelled; now `stop` ends it
            raise
        except OSError as error:
            raise WorkerStartError(f"sqlite worker: {sys.executable}: {error.strerror}") from error
        self._process, self._phase, self._rest = process, Phase.CANDIDATE, b""
        try:
            ready = await self._receive(process, _START_S)
        except TimeoutError as error:
            await self.stop()
            raise WorkerStartError(f"sqlite worker: not ready within {_START_S} s") from error
        except EOFError as error:
            await process.wait()
            status = _describe(await self.stop())
            raise WorkerStartError(f"sqlite worker: {status} before it was ready; see its stderr") from error
        assert ready == [READY]
        return process

    async def _receive(self, process: Process, timeout: float) -> list[Any]:
        """What came whole of the next that came."""
        async with asyncio.timeout(timeout):
            received = await _pipe(process.stdout).read(_READ_BYTES)
        if not received:
            raise EOFError
        *whole, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(message) for message in whole]


def interpreter_environment() -> dict[str, str]:
    """All that a worker gets: no secret of ours, and what an interpreter needs to find the same modules."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | {"TZ": "UTC", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


_Pipe = TypeVar("_Pipe", asyncio.StreamReader, asyncio.StreamWriter)


def _pipe(stream: _Pipe | None) -> _Pipe:
    """One of the streams of a process that was started with `PIPE` for it."""
    assert stream is not None
    return stream


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
