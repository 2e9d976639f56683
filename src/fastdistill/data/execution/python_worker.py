"""Runs one candidate against its tests in fresh processes; as a program (`python -m`), the zygote of `python_pool`.

The zygote imports what programs commonly need, confines itself to reading the interpreter's files, and forks for each
case. It never sees code or tests: these go straight from the pool to the children, over sockets that it hands on, so
that no later child inherits them.

- `split`: the *tester* holds the tests, the *program* only the candidate. They exchange calls and plain values (built
  in types, and the containers and numbers of the standard library), rebuilt on either side from data: no object, no
  code and no class of the candidate's ever reaches the tests. What it could forge is a return value, which is its own.
- `solo`: one process for both, as most evaluators do it; for values that can't cross, and forgeable.
- `stdio`: a program of its own, whose output the pool compares.

Frames are a 4-byte big-endian length and JSON. Imports only the standard library, and must stay quick to start.
"""

import ast
import builtins
import fcntl
import gc
import json
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from fastdistill.data.execution.sandbox import IsolationLevel, ProcessLimits, confine_files, confine_process


class PythonReason(StrEnum):
    """Why a program was judged as it was: a closed set. Each reason has one `outcome`."""

    PASSED = "passed"

    EMPTY = "empty"
    SYNTAX_ERROR = "syntax_error"
    ASSERTION = "assertion"
    """A test found a wrong result."""
    MISMATCH = "mismatch"
    """It printed something else than the expected output."""
    EXCEPTION = "exception"
    MISSING_NAME = "missing_name"
    """It does not define what the tests call."""
    OPAQUE = "opaque"
    """It returned something that is not a plain value (an object, a generator, a subclass): see `mode: solo`."""
    EXITED = "exited"
    """It ended its process instead of answering."""
    CRASHED = "crashed"
    """It brought its process down: a fault in memory, an abort."""
    LIMIT_CODE = "limit_code"
    LIMIT_CPU = "limit_cpu"
    LIMIT_MEMORY = "limit_memory"
    LIMIT_OUTPUT = "limit_output"
    LIMIT_RESULT = "limit_result"
    """One returned value is too large."""

    GOLD_INVALID = "gold_invalid"
    """The gold program does not pass its own tests."""
    TESTS_INVALID = "tests_invalid"
    """No tests, broken ones, or tests that never call the candidate."""
    TESTS_LIMIT = "tests_limit"
    """The tests themselves ran out of CPU time or memory."""
    WALL_TIMEOUT = "wall_timeout"
    """The wall clock ran out before the CPU time did: it sleeps, or the machine is too busy."""
    SANDBOX_DIED = "sandbox_died"

    @property
    def outcome(self) -> Literal["pass", "fail", "error"]:
        """`error` means that the candidate could not be judged: it is never held against it."""
        if self is PythonReason.PASSED:
            return "pass"
        return "error" if self in _ERRORS else "fail"


_ERRORS = frozenset(
    {
        PythonReason.GOLD_INVALID,
        PythonReason.TESTS_INVALID,
        PythonReason.TESTS_LIMIT,
        PythonReason.WALL_TIMEOUT,
        PythonReason.SANDBOX_DIED,
    }
)
_FAILURES = frozenset(PythonReason) - _ERRORS - {PythonReason.PASSED}
"""All that a program's own word can bring about."""

Role = Literal["split", "solo", "stdio"]
Finding = tuple[PythonReason, str]
HEADER = struct.Struct(">I")
READY, KILL = b"ready", b"kill"
EXIT_STATUS = {1: PythonReason.EXCEPTION, 121: PythonReason.SYNTAX_ERROR, 122: PythonReason.LIMIT_MEMORY}
"""How a `stdio` program ends that does not end well."""

_WARM = "bisect cmath copy functools heapq inspect io itertools math operator re statistics string textwrap typing"
_DEEPEST = 60
_LONGEST_TEXT = 300
_GRACE_MS = 500
"""For a program to end by itself once its tester has; it may be dying already, and of what is worth knowing."""


def frame(message: object) -> bytes:
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


class NotPlainError(Exception):
    """A value can't cross between program and tests; the message says what it is."""


def main() -> None:
    settings = json.loads(sys.argv[1])
    level, limits = IsolationLevel(settings["level"]), ProcessLimits(**settings["limits"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool, which then hangs up
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.descriptors, limits.descriptors))
    for name in _WARM.split():
        import_module(name)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    confine_files([*settings["readable"], "."])
    sys.argv, sys.path = ["program.py"], [path for path in sys.path if path not in settings["hidden"]]
    os.environ.clear()
    gc.freeze()
    with socket.socket(fileno=0) as control, suppress(BrokenPipeError):  # the pool is gone
        control.send(READY)
        serve(control, level, limits, settings["result_bytes"])


def serve(control: socket.socket, level: IsolationLevel, limits: ProcessLimits, result_bytes: int) -> None:
    """Runs one case after the other until the pool hangs up.

    In: a role, with the sockets of program and tester. Out: how each of the case's processes ended. While a case runs,
    any message kills it.
    """
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 64, 2)
        if not message:
            return
        if not sockets:
            continue  # asks to kill a case that has just ended
        program, null = sockets[0], 1  # our own standard output leads nowhere
        processes: dict[str, tuple[Callable[[], int], Sequence[int]]] = {}
        if message == b"split":
            ours, theirs = (end.detach() for end in socket.socketpair())
            processes["program"] = lambda: run_program(3), (program, program, null, theirs)
            processes["tester"] = lambda: run_tester(3, _Remote(4, result_bytes)), (null, null, null, sockets[1], ours)
            sockets += [ours, theirs]
        elif message == b"solo":
            processes["program"] = lambda: run_tester(3, None), (program, program, null, sockets[1])
        else:
            processes["program"] = lambda: run_program(None), (program, program, null)
        children = {_fork(run, descriptors, level, limits): name for name, (run, descriptors) in processes.items()}
        for descriptor in sockets:
            os.close(descriptor)
        control.send(json.dumps(_watch(control, children)).encode())


def _fork(run: Callable[[], int], descriptors: Sequence[int], level: IsolationLevel, limits: ProcessLimits) -> int:
    """Starts a confined child with these as its descriptors 0, 1, 2 ... and no others; `run` gives its exit status."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 24) for descriptor in descriptors]
        for target, descriptor in enumerate(high):
            os.dup2(descriptor, target)
        os.closerange(len(high), limits.descriptors)
        confine_process(limits, level)
        random.seed(0)
        status = run()
    finally:
        os._exit(status)


def _watch(control: socket.socket, children: dict[int, str]) -> dict[str, tuple[int, float, bool]]:
    """Waits for all children: each one's exit status (negative: a signal), CPU seconds, and whether we killed it."""
    ended = {}
    killed: set[int] = set()
    patience = None
    running = {os.pidfd_open(pid): pid for pid in children}
    poll = select.poll()
    for descriptor in (control.fileno(), *running):
        poll.register(descriptor, select.POLLIN)
    while running:
        events = poll.poll(patience)
        stop = not events
        for descriptor, _ in events:
            if pid := running.pop(descriptor, 0):
                _, status, usage = os.wait4(pid, 0)
                poll.unregister(descriptor)
                os.close(descriptor)
                ended[children[pid]] = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, pid in killed
                if children[pid] == "tester":
                    patience = _GRACE_MS
            else:
                stop = True
                if not control.recv(64):
                    poll.unregister(descriptor)
        for pid in running.values() if stop else ():
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
    return ended


# The program: a process with nothing in it but the candidate.


def run_program(calls: int | None) -> int:
    """Runs the candidate, whose code comes first on standard input; then answers calls, if there is a channel."""
    code = _receive(0)
    module = _fresh_module("__main__" if calls is None else "candidate")
    finding = _load(code, module)
    if calls is None:
        return _finish(finding)
    names = _receive(calls)
    _send(calls, ["failed", *finding] if finding else ["loaded", {name: _kind(module, name) for name in names}])
    while True:
        name, arguments, keywords = _receive(calls)
        _send(calls, _answer(getattr(module, name), decode(arguments), decode(keywords)))


def _fresh_module(name: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module
    return module


def _load(code: str, module: ModuleType) -> Finding | None:
    try:
        compiled = compile(code, "<candidate>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return PythonReason.SYNTAX_ERROR, _text(error)
    try:
        exec(compiled, module.__dict__)
    except MemoryError as error:
        return PythonReason.LIMIT_MEMORY, _text(error)
    except SystemExit as error:
        return PythonReason.EXITED, str(0 if error.code is None else error.code)
    except BaseException as error:
        return PythonReason.EXCEPTION, _text(error)
    return None


def _finish(finding: Finding | None) -> int:
    """Ends a program as the interpreter would: waits for its threads, and flushes what it printed."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    if finding is None:
        return 0
    reason, text = finding
    if reason is PythonReason.EXITED:
        return int(text) & 0xFF if text.removeprefix("-").isdecimal() else 1
    return next(status for status, meaning in EXIT_STATUS.items() if meaning is reason)


def _kind(module: ModuleType, name: str) -> list[Any]:
    value = getattr(module, name, None)
    if value is None and not hasattr(module, name):
        return ["missing"]
    if callable(value):
        return ["callable"]
    try:
        return ["value", encode(value)]
    except NotPlainError as error:
        return ["opaque", str(error)]


def _answer(function: Callable[..., object], arguments: list[Any], keywords: dict[str, Any]) -> list[Any]:
    try:
        return ["value", encode(function(*arguments, **keywords))]
    except NotPlainError as error:
        return ["opaque", str(error)]
    except BaseException as error:
        return ["raised", type(error).__name__, _message(error)]


# The tester: a process with the tests, and in `solo` with the candidate as well.


class _JudgedError(BaseException):
    """Ends the tests with a finding, past any `except Exception` of theirs."""


class _CandidateError(Exception):
    """An exception of a class that the candidate defines."""


class _Remote:
    """The candidate as the tests reach it. All that comes from there may be forged, and is only ever taken as data."""

    def __init__(self, channel: int, result_bytes: int) -> None:
        self._channel = channel
        self._result_bytes = result_bytes
        self.missing: set[str] = set()
        self.heard = False
        """Whether a call came to an end, or a value has crossed."""
        self.finding: Finding | None = None
        self.raised: BaseException | None = None
        self.words = ""

    def bind(self, names: Iterable[str], namespace: dict[str, Any]) -> None:
        """Puts what the candidate defines under these names into the namespace of the tests."""
        match self._ask(sorted(names)):
            case ["loaded", dict(kinds)]:
                pass
            case ["failed", str(reason), str(text)] if reason in _FAILURES:
                raise self._end(PythonReason(reason), text)
            case _:
                raise self._end(PythonReason.OPAQUE, "not an answer")
        for name in names:
            match kinds.get(name):
                case ["callable"]:
                    namespace[name] = self._function(name)
                case ["value", wire]:
                    namespace[name] = self._value(wire)
                case ["opaque", "module"] if name in sys.stdlib_module_names:
                    namespace[name] = import_module(name)  # the tests rely on an import of the candidate's
                case ["opaque", str(kind)]:
                    raise self._end(PythonReason.OPAQUE, f"{name} is a {kind}")
                case _:
                    self.missing.add(name)

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                request = [name, encode([*arguments]), encode(keywords)]
            except NotPlainError as error:
                text = f"{name}: an argument is a {error}; use mode: solo"
                raise self._end(PythonReason.TESTS_INVALID, text) from error
            match self._ask(request):
                case ["value", wire]:
                    return self._value(wire)
                case ["raised", str(kind), str(text)]:
                    self.heard = True
                    self.raised, self.words = _exception(kind, text), f"{kind}: {text}"
                    raise self.raised
                case ["opaque", str(kind)]:
                    raise self._end(PythonReason.OPAQUE, f"{name} returned a {kind}")
                case _:
                    raise self._end(PythonReason.OPAQUE, f"{name}: not an answer")

        return call

    def _ask(self, request: object) -> object:
        try:
            _send(self._channel, request)
            return _receive(self._channel, self._result_bytes)
        except (EOFError, OSError) as error:
            raise self._end(PythonReason.EXITED, "its process ended") from error
        except OverflowError as error:
            raise self._end(PythonReason.LIMIT_RESULT, str(error)) from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise self._end(PythonReason.OPAQUE, "not an answer") from error

    def _value(self, wire: object) -> Any:
        self.heard = True
        try:
            return decode(wire)
        except NotPlainError as error:
            raise self._end(PythonReason.OPAQUE, str(error)) from error
        except MemoryError as error:
            raise self._end(PythonReason.LIMIT_RESULT, "too large to rebuild") from error

    def _end(self, reason: PythonReason, detail: str) -> _JudgedError:
        self.finding = self.finding or (reason, detail)
        return _JudgedError()


def run_tester(link: int, remote: _Remote | None) -> int:
    """Runs the tests that come over the link, against `remote` or in the candidate's own namespace; answers there."""
    task = _receive(link)
    try:
        finding = _judge(task, remote)
    except _JudgedError:
        finding = None
    if remote and remote.finding:  # also where the tests swallowed it
        finding = remote.finding
    assert finding is not None
    _send(link, [task["token"], *finding])
    return 0


def _judge(task: dict[str, Any], remote: _Remote | None) -> Finding:
    entry_point: str | None = task["entry_point"]
    try:
        tests = [ast.parse(text) for text in task["tests"]]
        programs = [compile(test, f"<test {place}>", "exec") for place, test in enumerate(tests, 1)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return PythonReason.TESTS_INVALID, _text(error)
    module = _fresh_module("candidate" if remote is None else "tests")
    namespace = module.__dict__
    if remote is None:
        if finding := _load(task["code"], module):
            return finding
    else:
        known = _run_setup(task["setup"], namespace, entry_point)
        remote.bind(_names_of_candidate(tests, entry_point, known), namespace)
    if entry_point and (entry_point not in namespace or (remote and entry_point in remote.missing)):
        return PythonReason.MISSING_NAME, entry_point
    place = 1
    try:
        for program in programs:
            exec(program, namespace)
            place += 1
        if entry_point and any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in _top(tests)):
            namespace["check"](namespace[entry_point])
    except _JudgedError:
        raise
    except BaseException as error:
        reason, text = _blame(error, remote)
        return reason, f"test {place}: {text}"
    if remote and not remote.heard:
        return PythonReason.TESTS_INVALID, "the tests never call the candidate"
    return PythonReason.PASSED, ""


def _blame(error: BaseException, remote: _Remote | None) -> Finding:
    """What an exception that ended the tests says."""
    if remote and isinstance(error, NameError) and error.name in remote.missing:
        return PythonReason.MISSING_NAME, _text(error)
    if remote and not remote.heard:
        return PythonReason.TESTS_INVALID, _text(error)
    if isinstance(error, MemoryError):
        return PythonReason.LIMIT_MEMORY, _text(error)
    if remote and error is remote.raised:
        return PythonReason.EXCEPTION, remote.words
    return PythonReason.ASSERTION if isinstance(error, AssertionError) else PythonReason.EXCEPTION, _text(error)


def _run_setup(setup: str, namespace: dict[str, Any], entry_point: str | None) -> set[str]:
    """Gives the tests what the record puts before the candidate (imports, helpers); the names that it settles.

    A prompt that ends in an open function is closed first. Without an entry point any of its functions may be the
    one to write, so that only its imports are settled.
    """
    for closing in ("", "\n    pass"):
        with suppress(SyntaxError, ValueError):
            tree = ast.parse(setup + closing)
            with suppress(Exception):
                exec(compile(tree, "<setup>", "exec"), namespace)
            return _bound([tree]) if entry_point else _bound([n for n in _top([tree]) if isinstance(n, _IMPORTS)])
    return set()


def _names_of_candidate(tests: Sequence[ast.Module], entry_point: str | None, known: set[str]) -> set[str]:
    """Names that the tests use and that neither they nor `known` nor Python define, and the entry point."""
    used = {node.id for tree in tests for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names = used - _bound(tests) - known - set(dir(builtins))
    return names | {entry_point} if entry_point else names


_IMPORTS = (ast.Import, ast.ImportFrom)


def _bound(trees: Iterable[ast.AST]) -> set[str]:
    """All names that some scope of these trees defines."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.ExceptHandler(name=str(name)):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names.update(alias.asname or alias.name.partition(".")[0] for alias in aliases)
    return names


def _top(trees: Iterable[ast.Module]) -> list[ast.stmt]:
    return [statement for tree in trees for statement in tree.body]


def _exception(kind: str, text: str) -> BaseException:
    """The built-in exception of that name, so that tests can expect it."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, BaseException):
        with suppress(TypeError):
            return found(text)
    return _CandidateError(f"{kind}: {text}")


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_LONGEST_TEXT]
    except Exception:  # of a class that the candidate defines
        return ""


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {_message(error)}"


# The value protocol: exact types only, each rebuilt from data that JSON can hold. What has a type of its own is an
# object with one key, its tag.


def encode(value: object, depth: int = 0) -> Any:
    """The value as JSON can hold it.

    Raises:
        NotPlainError: it is, or contains, something else than a plain value, or is nested too deeply.
    """
    kind = type(value)
    if depth > _DEEPEST:
        raise NotPlainError("value nested too deeply")
    if kind in _AS_THEY_ARE or (kind is int and -_WORD < value < _WORD):  # type: ignore[operator]
        return value
    if kind is list:
        return [encode(item, depth + 1) for item in value]  # type: ignore[attr-defined]
    if kind in _SERIES:
        return {kind.__name__: [encode(item, depth + 1) for item in value]}  # type: ignore[attr-defined]
    if kind in _MAPPINGS:
        pairs = [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]  # type: ignore[attr-defined]
        return {kind.__name__: pairs}
    if kind in _TEXTS:
        return {kind.__name__: _TEXTS[kind][0](value)}
    raise NotPlainError(kind.__name__)


def decode(wire: object, depth: int = 0) -> Any:
    """The value that `encode` was given, or one that an honest `encode` could have been given.

    Raises:
        NotPlainError: no value has this form.
    """
    if depth > _DEEPEST:
        raise NotPlainError("value nested too deeply")
    try:
        match wire:
            case list():
                return [decode(item, depth + 1) for item in wire]
            case dict():
                ((tag, inner),) = wire.items()
                if tag in _TEXT_TAGS:
                    return _TEXT_TAGS[tag](inner)
                if tag in _SERIES_TAGS:
                    return _SERIES_TAGS[tag](decode(item, depth + 1) for item in inner)
                return _MAPPING_TAGS[tag]({decode(key, depth + 1): decode(item, depth + 1) for key, item in inner})
            case _:
                return wire
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise NotPlainError("value in no known form") from error


_WORD = 1 << 63  # longer integers cross as hexadecimal text, which has no limit and costs linear time
_AS_THEY_ARE = {type(None), bool, float, str}
_SERIES: dict[type, Callable[[Iterable[Any]], Any]] = {kind: kind for kind in (tuple, set, frozenset, deque)}
_MAPPINGS: dict[type, Callable[[dict[Any, Any]], Any]] = {dict: dict, OrderedDict: OrderedDict, Counter: Counter}
_MAPPINGS[defaultdict] = dict  # equal to it, and its factory can't cross
_TEXTS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    int: (hex, lambda text: int(text, 16)),
    complex: (repr, complex),
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    range: (lambda r: f"{r.start} {r.stop} {r.step}", lambda text: range(*map(int, text.split()))),
    Decimal: (str, Decimal),
    # Not as decimal text: "1e1000000000" would be a number to compute.
    Fraction: (
        lambda f: f"{f.numerator:x} {f.denominator:x}",
        lambda text: Fraction(*(int(n, 16) for n in text.split())),
    ),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    re.Match: (lambda _: "", lambda _: object()),  # true, and equal to nothing: all that tests of a match ask
}
_SERIES_TAGS = {kind.__name__: build for kind, build in _SERIES.items()}
_MAPPING_TAGS = {kind.__name__: build for kind, build in _MAPPINGS.items()}
_TEXT_TAGS = {kind.__name__: build for kind, (_, build) in _TEXTS.items()}


def _send(descriptor: int, message: object) -> None:
    rest = memoryview(frame(message))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _receive(descriptor: int, longest: int | None = None) -> Any:
    """The next frame. Raises EOFError, and OverflowError for one of more than `longest` bytes."""
    (size,) = HEADER.unpack(_read(descriptor, HEADER.size))
    if longest is not None and size > longest:
        raise OverflowError(f"{size} bytes")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
