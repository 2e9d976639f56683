"""Judges Python programs in sandboxed processes from asyncio: one bad program costs no other anything.

Each lane has a zygote (`python_worker`), which forks fresh processes for every case and outlives them all. Code and
tests travel to these directly; the verdict comes from the tester, from the kernel's account of how each process ended,
or, for programs that read and print, from a comparison made here. CPU time decides. The wall clock is a backstop that
never blames the program: what it stops runs once more, and then is an error.
"""

import asyncio
import fcntl
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, Literal, Self

from msgspec import Struct
from pydantic import PositiveFloat, PositiveInt

import fastdistill
from fastdistill.core.errors import EnvironmentFault, together
from fastdistill.core.timing import observe
from fastdistill.data.execution import sandbox
from fastdistill.data.execution.python_child import EXIT_STATUS, Finding, PythonReason
from fastdistill.data.execution.python_worker import KILL, READY, Role
from fastdistill.data.execution.worker_pool import PoolClosedError

_START_S = 30.0
"""Wall seconds for a zygote to start; it needs about 0.2 on an idle core."""
_REAP_S = 10.0
"""Wall seconds for a killed case to be gone."""
_REPORT_BYTES = 1 << 16
_NEAR_LIMIT = 0.8
_FUTURE = re.compile(r"(?:from __future__ import [^\n]*\n)+")
_PACKAGE = Path(fastdistill.__file__).parent
_INHERITED = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""All that a zygote inherits, where it is set: what an interpreter may need in order to start."""


@dataclass(frozen=True, slots=True)
class PythonLimits:
    """What one case may cost: `cpu_s` and `memory_bytes` hold for each of its processes."""

    cpu_s: PositiveInt = 3
    wall_s: PositiveFloat = 30.0
    """A backstop, ten times the CPU time, so that a busy machine changes no verdict."""
    memory_bytes: PositiveInt = 512 << 20
    """Address space; an interpreter takes about 30 MB of it."""
    code_bytes: PositiveInt = 100_000
    output_bytes: PositiveInt = 64 << 10
    """What a program may print, or twice the expected output if that is more."""
    result_bytes: PositiveInt = 4 << 20
    """One returned value, as JSON."""


class InputOutput(Struct, frozen=True):
    """A test of a program that reads standard input and prints."""

    input: str
    output: str


class PythonJob(Struct, frozen=True):
    """One candidate to judge by its tests: pieces of Python, or pairs of input and output."""

    code: str
    tests: tuple[str, ...] | tuple[InputOutput, ...]
    setup: str = ""
    """Put before the candidate, and given to the tests: imports, helpers, a prompt that the candidate continues."""
    entry_point: str | None = None
    """The function that `check(candidate)` is called with."""
    mode: Literal["split", "solo"] = "split"


class PythonEvaluation(Struct, frozen=True):
    reason: PythonReason
    detail: str | None = None
    near_limit: bool = False
    """It took 80% or more of its CPU time: another machine may judge it differently."""


class PythonPool:
    """An async context manager over `workers` lanes (one a core and one more), each started when it first gets a job.

    Any number of tasks may call `evaluate`; each waits for a free lane.

    Raises:
        EnvironmentFault: this machine does not offer `level`, or no sandbox at all.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: PythonLimits | None = None,
        level: sandbox.IsolationLevel | None = None,
    ) -> None:
        available = sandbox.available_isolation()
        found = level or available.level
        if found is None or found not in available.levels:
            raise EnvironmentFault(f"python sandbox: {level or 'isolation'} is not available here: {available}")
        self.level = found
        self._limits = limits or PythonLimits()
        workers = workers or 1 + (os.cpu_count() or 1)  # one more, for a lane waits at times
        self._lanes = [_Lane(self._limits, found) for _ in range(workers)]
        self._idle: asyncio.LifoQueue[_Lane] = asyncio.LifoQueue()
        for lane in self._lanes:
            self._idle.put_nowait(lane)
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        for lane in self._lanes:
            lane.kill()
        # Each comes back from whoever has it, and those who wait for one give up.
        for lane in [await self._idle.get() for _ in self._lanes]:
            lane.stop()
            self._idle.put_nowait(lane)

    async def evaluate(self, job: PythonJob) -> PythonEvaluation:
        """Raises `PoolClosedError`, or `EnvironmentFault` if no process starts; all else is a reason."""
        if not job.code.strip():
            return PythonEvaluation(PythonReason.EMPTY)
        if len(job.code) > self._limits.code_bytes:
            return PythonEvaluation(PythonReason.LIMIT_CODE, f"{len(job.code)} characters")
        if not job.tests:
            return PythonEvaluation(PythonReason.TESTS_INVALID, "no tests")
        called = perf_counter()
        lane = await self._idle.get()
        begun = perf_counter()
        try:
            for _ in range(2):
                if self._closed:
                    raise PoolClosedError("python pool: closed before it could answer")
                evaluation = await lane.judge(job)
                if evaluation.reason not in (PythonReason.WALL_TIMEOUT, PythonReason.SANDBOX_DIED):
                    break
            return evaluation
        finally:
            self._idle.put_nowait(lane)
            observe(queued=begun - called, busy=perf_counter() - begun)


class _Run(Struct, frozen=True):
    """All that was seen of one case; how its processes ended, by the kernel's account."""

    output: bytes
    report: bytes
    overflowed: bool
    status: int
    """The program's; negative: a signal."""
    cpu_s: float
    killed: bool
    tester_status: int | None = None
    timed_out: bool = False


class _Lane:
    """One zygote at a time, replaced when it dies."""

    def __init__(self, limits: PythonLimits, level: sandbox.IsolationLevel) -> None:
        self._limits = limits
        self._level = level
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = ExitStack()

    async def judge(self, job: PythonJob) -> PythonEvaluation:
        """One attempt. Raises EnvironmentFault if no zygote starts."""
        future = _FUTURE.match(job.code)
        first = future[0] if future else ""  # nothing may stand before it
        code = first + job.setup + ("" if not job.setup or job.setup.endswith("\n") else "\n") + job.code[len(first) :]
        pairs = [test for test in job.tests if isinstance(test, InputOutput)]
        try:
            return await (self._compare_outputs(code, pairs) if pairs else self._run_tests(job, code))
        except OSError as error:
            self.stop()
            return PythonEvaluation(PythonReason.SANDBOX_DIED, str(error) or "its zygote died")
        except BaseException:
            self.stop()  # the case may still be running
            raise

    async def _run_tests(self, job: PythonJob, code: str) -> PythonEvaluation:
        token = secrets.token_hex(16)
        task = {"tests": job.tests, "setup": job.setup, "entry_point": job.entry_point, "token": token}
        inputs: Sequence[object] = [{**task, "code": code}] if job.mode == "solo" else [code, task]
        run = await self._run(job.mode, [_json(each) for each in inputs])
        reason, detail = PythonReason.EXITED, "its process ended"
        # Half a report is none, and so is what a candidate sprayed.
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            signature, word, text = json.loads(run.report)
            if signature == token:
                reason, detail = PythonReason(word), text.encode(errors="backslashreplace").decode()
        if reason is PythonReason.EXITED or run.overflowed:
            reason, detail = self._fault(run) or (reason, detail)
        return PythonEvaluation(reason, detail or None, self._is_near_limit(run, reason))

    async def _compare_outputs(self, code: str, pairs: Sequence[InputOutput]) -> PythonEvaluation:
        near_limit = False
        for place, pair in enumerate(pairs, 1):
            stdin, expected = (text.encode(errors="surrogatepass") for text in (pair.input, pair.output))
            run = await self._run("stdio", [_json(code), stdin], 2 * len(expected))
            reason, detail = self._fault(run) or (PythonReason.PASSED, "")
            if reason is PythonReason.PASSED and run.status:
                reason, detail = EXIT_STATUS.get(run.status, PythonReason.EXITED), f"status {run.status}"
            elif reason is PythonReason.PASSED and _lines(run.output) != _lines(expected):
                reason, detail = PythonReason.MISMATCH, "printed something else"
            near_limit |= self._is_near_limit(run, reason)
            if reason is not PythonReason.PASSED:
                return PythonEvaluation(reason, f"test {place}: {detail}", near_limit)
        return PythonEvaluation(PythonReason.PASSED, near_limit=near_limit)

    def _is_near_limit(self, run: _Run, reason: PythonReason) -> bool:
        # At load the kernel may enforce the limit before its own account of CPU time says so.
        return reason is PythonReason.LIMIT_CPU or run.cpu_s >= _NEAR_LIMIT * self._limits.cpu_s

    def _fault(self, run: _Run) -> Finding | None:
        """What the end of the processes says; None if the program's ended by itself."""
        status = run.status
        if run.overflowed:
            return PythonReason.LIMIT_OUTPUT, "printed too much"
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and run.cpu_s > self._limits.cpu_s):
            return PythonReason.LIMIT_CPU, f"more than {self._limits.cpu_s} s of CPU time"
        if run.timed_out:
            return PythonReason.WALL_TIMEOUT, f"no end within {self._limits.wall_s} s"
        if run.tester_status is not None and not run.report:
            return PythonReason.TESTS_LIMIT, f"the tester {_describe(run.tester_status)}"
        if status == -signal.SIGKILL:
            # Nothing in the sandbox may send this signal: it was us, or the machine (out of memory), or somebody.
            return None if run.killed else (PythonReason.SANDBOX_DIED, _describe(status))
        return (PythonReason.CRASHED, _describe(status)) if status < 0 else None

    async def _run(self, role: Role, inputs: Sequence[bytes], expected_bytes: int = 0) -> _Run:
        """Runs one case to the end of all its processes. Raises OSError if the zygote dies."""
        control = await self._started()
        longest = [max(self._limits.output_bytes, expected_bytes), _REPORT_BYTES][: 1 if role == "stdio" else 2]
        with ExitStack() as stack:
            pairs = [socket.socketpair() for _ in longest]
            outputs = [stack.enter_context(ours) for ours, _ in pairs]
            with ExitStack() as given:
                files = [given.enter_context(_sealed(content)).fileno() for content in inputs]
                files += [given.enter_context(theirs).fileno() for _, theirs in pairs]
                socket.send_fds(control, [role.encode()], files)
            return await self._outcome(control, outputs, longest)

    async def _outcome(self, control: socket.socket, outputs: Sequence[socket.socket], longest: Sequence[int]) -> _Run:
        loop = asyncio.get_running_loop()

        async def end_of_case() -> bytes:
            try:
                async with asyncio.timeout(self._limits.wall_s + _REAP_S):
                    if ends := await loop.sock_recv(control, 4096):
                        return ends
                raise ConnectionResetError
            except OSError:
                self.kill()  # and so closes the outputs
                raise

        async def drain(output: socket.socket, most: int) -> bytes:
            output.setblocking(False)
            seen = bytearray()
            with suppress(OSError):  # there is nobody left to kill it
                while part := await loop.sock_recv(output, 1 << 16):
                    if len(seen) <= most:
                        seen += part[: most + 1 - len(seen)]
                        if len(seen) > most:
                            control.send(KILL)
            return bytes(seen)

        ends, output, *report = await together(end_of_case(), *map(drain, outputs, longest))
        overflowed = any(len(seen) > most for seen, most in zip((output, *report), longest, strict=True))
        return _Run(output, b"".join(report), overflowed, **json.loads(ends))

    def kill(self) -> None:
        """Ends the zygote and all that it runs; whoever listens to it learns that it is gone."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Kills, waits until it is gone, and gives back what it used. Nobody may be listening."""
        self.kill()
        self._process = None
        self._resources.close()

    async def _started(self, again: bool = True) -> socket.socket:
        """The way to a zygote that is ready. One that ends before it is, as when killed for memory, starts `again`."""
        if self._process is None:
            try:
                self._start()
                async with asyncio.timeout(_START_S):
                    ready = await asyncio.get_running_loop().sock_recv(self._control, 64)
            except OSError as error:
                text = f"python sandbox: can't start: {error or type(error).__name__}"
                raise EnvironmentFault(text) from error
            if ready != READY and again:
                self.stop()
                return await self._started(again=False)
            if ready != READY:
                raise EnvironmentFault("python sandbox: its process ended before it was ready; see its stderr")
        return self._control

    def _start(self) -> None:
        readable = [*sandbox.readable_paths(), str(_PACKAGE)]
        settings = {"level": self._level, "readable": readable, **asdict(self._limits)}
        worker = ("-m", "fastdistill.data.execution.python_worker", json.dumps(settings))
        # The interpreter's own isolated mode would ignore PYTHONHASHSEED, on which the order of sets depends.
        command = [sandbox.interpreter(), "-B", "-P", "-S", "-s", "-X", "utf8", *worker]
        environment = {"PYTHONPATH": str(_PACKAGE.parent), "PYTHONHASHSEED": "0", "TZ": "UTC"}
        environment |= {name: os.environ[name] for name in _INHERITED if name in os.environ}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._resources.enter_context(self._control)
        with theirs:
            process = subprocess.Popen(
                sandbox.wrapped(command, self._level, readable),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
                cwd=self._resources.enter_context(tempfile.TemporaryDirectory(prefix="fastdistill-")),
                start_new_session=True,  # Ctrl-C in the terminal is not for it
            )
        self._process = self._resources.enter_context(process)


def _sealed(content: bytes) -> BinaryIO:
    """A file in memory that nobody can change any more, to be read from its beginning."""
    file = os.fdopen(os.memfd_create("input", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC), "w+b", buffering=0)
    file.write(content)
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return file


def _json(message: object) -> bytes:
    return json.dumps(message).encode()


def _lines(output: bytes) -> list[bytes]:
    """What counts of an output: its lines without space at their ends, up to the last that is not blank."""
    return [line.rstrip() for line in output.rstrip().split(b"\n")]


def _describe(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
