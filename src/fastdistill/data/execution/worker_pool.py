"""Judges jobs in worker processes from asyncio: one bad job costs no other job anything. Knows nothing of the jobs.

They travel in small batches to persistent workers (`worker_process`), and so do their results. When a worker dies or
goes silent, each job that is left of its batch is judged alone, which shows the one that was running: it runs once
more, unless its own CPU time killed it. Dying twice decides, and what it means is for the subclass to say, by its
cause: CPU time spent is the job's own doing, a wall clock that ran out is not, nor is any other death.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

from fastdistill.core.errors import EnvironmentFault
from fastdistill.data.execution.worker_process import FIRST_PHASE, line

_START_S = 30.0
"""Wall seconds for a worker to start; one that imports little needs about 0.1 on an idle core."""
_READ_BYTES = 1 << 16
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")

Job = TypeVar("Job")
Result = TypeVar("Result")


class PoolClosedError(Exception):
    """The pool was closed before it could answer."""


Cause = Literal["cpu", "wall", "other"]


class Death(NamedTuple):
    """How a worker ended in the middle of a job, and what it was doing."""

    cause: Cause
    phase: str
    status: str


class WorkerPool(ABC, Generic[Job, Result]):
    """An async context manager over `workers` processes, each started when it first gets a job.

    Any number of tasks may ask at a time. They get `EnvironmentFault` where no worker starts, or `PoolClosedError`;
    anything wrong with a job itself is a result.
    """

    module: ClassVar[str]
    """The worker's program: gets `limits` as its one argument, in JSON, and serves a `worker_process.Channel`."""
    what: ClassVar[str]
    """What errors call it."""

    def __init__(self, workers: int | None, limits: dict[str, Any], wall_s: float | None, batch: int) -> None:
        self._workers = workers or min(2, os.cpu_count() or 1)
        self._batch = batch
        self._closed = True
        self.arguments = json.dumps(limits)
        self.wall_s = wall_s

    async def __aenter__(self) -> Self:
        self._queue: asyncio.Queue[_Ticket[Job, Result]] = asyncio.Queue()
        self._lanes = await asyncio.TaskGroup().__aenter__()
        self._tasks = [self._lanes.create_task(self._serve_lane()) for _ in range(self._workers)]
        self._closed = False
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await self._lanes.__aexit__(None, None, None)

    async def evaluate(self, job: Job) -> Result:
        return (await self.judge([job]))[0]

    async def judge(self, jobs: Sequence[Job]) -> list[Result]:
        """The result of each job, in their order."""
        if self._closed:
            raise PoolClosedError(f"{self.what} pool: not open")
        loop = asyncio.get_running_loop()
        tickets: list[_Ticket[Job, Result]] = [_Ticket(job, loop.create_future()) for job in jobs]
        for ticket in tickets:
            self._queue.put_nowait(ticket)
        if len(tickets) == 1:  # as a rule
            return [await tickets[0].future]
        return await asyncio.gather(*(ticket.future for ticket in tickets))

    @abstractmethod
    def from_wire(self, message: Any) -> Result: ...

    @abstractmethod
    async def died(self, job: Job, death: Death, judge: Callable[[Job], Awaitable[Result]], /) -> Result:
        """The verdict on a job that ended its worker twice. `judge` runs a job alone."""

    async def _serve_lane(self) -> None:
        lane, tickets = _Lane(self), deque[_Ticket[Job, Result]]()
        try:
            while True:
                tickets.append(await self._queue.get())
                # A fair share, so that a burst spreads over all workers.
                for _ in range(min(self._batch - 1, self._queue.qsize() // self._workers)):
                    tickets.append(self._queue.get_nowait())
                try:
                    await lane.judge(tickets)
                except EnvironmentFault as error:
                    while tickets:
                        tickets.popleft().fail(error)
        finally:
            while not self._queue.empty():
                tickets.append(self._queue.get_nowait())
            for ticket in tickets:
                ticket.fail(PoolClosedError(f"{self.what} pool: closed before it could answer"))
            await lane.stop()


class _Ticket(NamedTuple, Generic[Job, Result]):
    job: Job
    future: asyncio.Future[Result]

    def answer(self, result: Result) -> None:
        if not self.future.done():  # else its caller was cancelled
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Lane(Generic[Job, Result]):
    """One worker process at a time, replaced when it dies."""

    def __init__(self, pool: WorkerPool[Job, Result]) -> None:
        self._pool = pool
        self._process: subprocess.Popen[bytes] | None = None
        self._phase = FIRST_PHASE
        self._rest = b""  # of a message that has not come whole

    async def judge(self, tickets: deque[_Ticket[Job, Result]]) -> None:
        """Answers all tickets, removing each; raises `EnvironmentFault`, leaving those it did not answer."""
        runs = 2
        if len(tickets) > 1:
            if await self._run(tickets) is None:
                return
            runs = 1 if len(tickets) == 1 else 2  # the only one that is left is the one that was running
        while tickets:
            tickets[0].answer(await self._judge_alone(tickets[0].job, runs))
            tickets.popleft()
            runs = 2

    async def stop(self) -> int:
        """Kills the worker, if there is one, and waits until it is gone; its exit status, negative for a signal.

        One that has closed its end is on its way out with a status of its own, which this does not change.
        """
        process, self._process = self._process, None
        if process is None:
            return 0
        self._socket.close()
        process.kill()
        return await asyncio.to_thread(process.wait)

    async def _run(self, tickets: deque[_Ticket[Job, Result]]) -> Death | None:
        """Answers the tickets in order, removing each; how that ended, if it did not end well."""
        await self._start()
        try:
            async with asyncio.timeout(self._pool.wall_s):
                jobs = line([ticket.job for ticket in tickets])
                await asyncio.get_running_loop().sock_sendall(self._socket, jobs)
            while tickets:
                for message in await self._receive(self._pool.wall_s):
                    if isinstance(message, str):
                        self._phase = message
                    else:
                        tickets.popleft().answer(self._pool.from_wire(message))
            return None
        except (TimeoutError, ConnectionError) as error:
            status = await self.stop()
            late: Cause = "wall" if isinstance(error, TimeoutError) else "other"
            return Death("cpu" if status == -signal.SIGPROF else late, self._phase, _describe(status))

    async def _judge_alone(self, job: Job, runs: int = 1) -> Result:
        """The verdict on a job of which the last of so many runs decides, or one that its own CPU time ends."""
        ticket: _Ticket[Job, Result] = _Ticket(job, asyncio.get_running_loop().create_future())
        while (death := await self._run(deque([ticket]))) is not None:
            runs -= 1
            if not runs or death.cause == "cpu":
                return await self._pool.died(job, death, self._judge_alone)
        return ticket.future.result()

    async def _start(self, killed: bool = False) -> None:
        """Sees to it that there is a worker. One that is killed before it is ready, as for memory, starts once more."""
        if self._process is not None and self._process.poll() is None:
            return
        await self.stop()  # it died while idle
        what = f"{self._pool.what} worker"
        self._phase, self._rest = FIRST_PHASE, b""
        try:
            self._spawn()
            await self._receive(_START_S)  # the message that it is ready
        except TimeoutError as error:
            await self.stop()
            raise EnvironmentFault(f"{what}: not ready within {_START_S} s") from error
        except ConnectionError as error:
            status = await self.stop()
            if status >= 0 or killed:
                raise EnvironmentFault(f"{what}: {_describe(status)} before it was ready; see its stderr") from error
            await self._start(killed=True)
        except OSError as error:
            raise EnvironmentFault(f"{what}: {sys.executable}: {error.strerror}") from error

    def _spawn(self) -> None:
        """A process that gets no secret, and what an interpreter needs to find the same modules."""
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, ExitStack() as failing:
            failing.enter_context(ours)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._pool.module, self._pool.arguments],
                env=inherited | {"TZ": "UTC", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C in the terminal is not for it
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
            )
            failing.pop_all()
        self._socket = ours

    async def _receive(self, timeout: float | None) -> list[Any]:
        """What came whole of the next that came; raises `ConnectionError` when the worker is gone."""
        async with asyncio.timeout(timeout):
            received = await asyncio.get_running_loop().sock_recv(self._socket, _READ_BYTES)
        if not received:
            raise ConnectionResetError
        *whole, self._rest = (self._rest + received).split(b"\n")
        found: list[Any] = json.loads(b"[%b]" % b",".join(whole))
        return found


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
