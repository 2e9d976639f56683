"""Judges SQL in worker processes from asyncio: one bad query costs no other query anything.

Jobs travel in small batches to persistent workers, which answer them one by one. When a worker dies or goes silent,
the job that it was running is known: the rest of the batch goes on in a new worker, and that job runs once more, alone.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any, Self, TypeVar

from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.execution.sqlite_worker import (
    HEADER,
    READY,
    Evaluation,
    Phase,
    SqlJob,
    evaluation_from_wire,
    frame,
    to_wire,
)

_START_S = 30.0
"""Wall seconds for a worker to start; it needs about 0.1 on an idle core."""
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
"""All that a worker inherits, where it is set: what an interpreter may need in order to start."""


class PoolClosedError(Exception):
    """The pool was closed before it could answer."""


class WorkerStartError(Exception):
    """A worker process could not be started: no query can be judged."""


class SqlitePool:
    """An async context manager over `workers` processes, each started when it first gets a job.

    Any number of tasks may call `evaluate`; beyond four batches a worker, they wait for their turn.
    """

    def __init__(self, workers: int | None = None, limits: SqlLimits | None = None, batch: int = 16) -> None:
        self._workers = workers or min(2, os.cpu_count() or 1)
        self._limits = limits or SqlLimits()
        self._batch = batch
        self._closed = True

    async def __aenter__(self) -> Self:
        self._slots = asyncio.Semaphore(4 * self._workers * self._batch)
        self._queue: asyncio.Queue[_Ticket] = asyncio.Queue()  # the slots bound it
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

    async def evaluate(self, job: SqlJob) -> Evaluation:
        """Raises `WorkerStartError` or `PoolClosedError`; anything wrong with the job itself is a reason."""
        if self._closed:
            raise PoolClosedError("sqlite pool: not open")
        async with self._slots:
            if self._closed:
                raise PoolClosedError("sqlite pool: closed before it could answer")
            ticket = _Ticket(self._fitted(job), asyncio.get_running_loop().create_future())
            self._unanswered.add(ticket)
            try:
                self._queue.put_nowait(ticket)
                return await ticket.future
            finally:
                self._unanswered.remove(ticket)

    def _fitted(self, job: SqlJob) -> SqlJob:
        """The job with a full path, and with a text beyond the limit cut one character past it: the verdict stays."""
        longest = self._limits.sql_bytes + 1
        gold = None if job.gold_sql is None else job.gold_sql[:longest]
        return replace(job, db_path=str(Path(job.db_path).absolute()), sql=job.sql[:longest], gold_sql=gold)

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


class _Cause(Enum):
    CPU = auto()
    WALL = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class _Death:
    """How a worker ended in the middle of a job, and what it was doing."""

    cause: _Cause
    phase: Phase
    status: str


class _Lane:
    """One worker process at a time, replaced when it dies."""

    def __init__(self, limits: SqlLimits) -> None:
        self._limits = limits
        self._process: Process | None = None
        self._phase = Phase.CANDIDATE

    async def judge(self, tickets: deque[_Ticket]) -> None:
        """Answers all tickets, removing each; raises `WorkerStartError`, leaving those it did not answer."""
        while tickets:
            if await self._run(tickets) is not None:
                suspect = tickets[0]
                suspect.answer(await self._judge_alone(suspect.job))
                tickets.popleft()

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

    async def _run(self, tickets: deque[_Ticket]) -> _Death | None:
        """Answers the tickets in order, removing each; on a death, the first one left is the job that was running."""
        process = await self._start()
        stdin = _pipe(process.stdin)
        cause = _Cause.OTHER
        try:
            stdin.write(frame([to_wire(ticket.job) for ticket in tickets]))
            async with asyncio.timeout(self._limits.wall_s):
                await stdin.drain()
            while tickets:
                message = await self._receive(process, self._limits.wall_s)
                if isinstance(message, str):
                    self._phase = Phase(message)
                else:
                    tickets.popleft().answer(evaluation_from_wire(message))
        except TimeoutError:
            cause = _Cause.WALL
        except (EOFError, ConnectionError):
            await process.wait()
        else:
            return None
        phase, status = self._phase, await self.stop()
        if status == -signal.SIGPROF:
            cause = _Cause.CPU
        return _Death(cause, phase, _describe(status))

    async def _judge_alone(self, job: SqlJob) -> Evaluation:
        """The second and last run of a job that killed a worker, or seemed to."""
        ticket = _Ticket(job, asyncio.get_running_loop().create_future())
        death = await self._run(deque([ticket]))
        if death is None:
            return ticket.future.result()
        if death.cause is _Cause.WALL:
            late = f"{death.phase}: no answer within {self._limits.wall_s} s"
            return Evaluation(SqlReason.INFRA_TIMEOUT, detail=late)
        if death.cause is _Cause.OTHER:
            return Evaluation(SqlReason.SANDBOX_DIED, detail=f"{death.phase}: worker {death.status}")
        spent = f"more than {self._limits.cpu_s} s of CPU time"
        if death.phase is Phase.GOLD:
            candidate = await self._judge_alone(replace(job, gold_sql=None))
            return replace(candidate, reason=SqlReason.GOLD_INVALID, detail=f"gold: {SqlReason.LIMIT_CPU}: {spent}")
        verdict = Evaluation(SqlReason.LIMIT_CPU, exec_pass=False, exec_error=spent)
        if job.gold_sql is None or job.gold_sql == job.sql:
            return verdict
        # What was known of gold died with the worker, and a broken gold comes first.
        gold = await self._judge_alone(replace(job, sql=job.gold_sql))
        if gold.outcome == "error":
            return replace(verdict, reason=gold.reason, detail=gold.detail)
        return replace(verdict, gold_match=False, weak_gold=gold.weak_gold)

    async def _start(self) -> Process:
        if self._process is not None:
            if self._process.returncode is None and not _pipe(self._process.stdin).is_closing():
                return self._process
            await self.stop()  # it died while idle
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {"TZ": "UTC", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "fastdistill.data.execution.sqlite_worker"),
                json.dumps(asdict(self._limits)),
                stdin=PIPE,
                stdout=PIPE,
                env=environment,
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
        self._process = process
        self._phase = Phase.CANDIDATE
        try:
            ready = await self._receive(process, _START_S)
        except TimeoutError as error:
            await self.stop()
            raise WorkerStartError(f"sqlite worker: not ready within {_START_S} s") from error
        except EOFError as error:
            await process.wait()
            status = _describe(await self.stop())
            raise WorkerStartError(f"sqlite worker: {status} before it was ready; see its stderr") from error
        assert ready == READY
        return process

    async def _receive(self, process: Process, timeout: float) -> Any:
        stdout = _pipe(process.stdout)
        async with asyncio.timeout(timeout):
            header = await stdout.readexactly(HEADER.size)
            return json.loads(await stdout.readexactly(*HEADER.unpack(header)))


_Pipe = TypeVar("_Pipe", asyncio.StreamReader, asyncio.StreamWriter)


def _pipe(stream: _Pipe | None) -> _Pipe:
    """One of the streams of a process that was started with `PIPE` for it."""
    assert stream is not None
    return stream


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
