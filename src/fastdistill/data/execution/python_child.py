"""What runs in the processes of one case: the *program*, with the candidate, and the *tester*, with the tests.

They exchange calls and plain values (`python_values`): no object, no code and no class of the candidate's ever reaches
the tests. What it could forge is a return value, which is its own. Where one process does both (`solo`, as most
evaluators do it, for values that can't cross), the candidate may forge a verdict. Each process gets what to run in a
file, descriptor 3. Imports only the standard library, and must stay quick to start.
"""

import ast
import atexit
import builtins
import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any

from fastdistill.data.execution.python_values import Channel, NotPlainError, decode, encode
from fastdistill.data.execution.reason import Reason


class PythonReason(Reason):
    """Why a program was judged as it was; docs/sections/fastdistill/gates.md says of each when."""

    PASSED = "passed", "pass"

    EMPTY = "empty"
    SYNTAX_ERROR = "syntax_error"
    ASSERTION = "assertion"
    MISMATCH = "mismatch"
    EXCEPTION = "exception"
    MISSING_NAME = "missing_name"
    OPAQUE = "opaque"
    EXITED = "exited"
    CRASHED = "crashed"
    LIMIT_CODE = "limit_code"
    LIMIT_CPU = "limit_cpu"
    LIMIT_MEMORY = "limit_memory"
    LIMIT_OUTPUT = "limit_output"
    LIMIT_RESULT = "limit_result"

    GOLD_INVALID = "gold_invalid", "error"
    TESTS_INVALID = "tests_invalid", "error"
    TESTS_LIMIT = "tests_limit", "error"
    WALL_TIMEOUT = "wall_timeout", "error"
    SANDBOX_DIED = "sandbox_died", "error"


_FAILURES = frozenset(reason for reason in PythonReason if reason.outcome == "fail")
"""All that a program's own word can bring about."""

Finding = tuple[PythonReason, str]
EXIT_STATUS = {1: PythonReason.EXCEPTION, 121: PythonReason.SYNTAX_ERROR, 122: PythonReason.LIMIT_MEMORY}
"""How a program that reads and prints ends where it does not end well."""
_TASK, _REPORT = 3, 4
_LONGEST_TEXT = 300


# The program: a process with nothing in it but the candidate.


def run_program(socket: int | None = None) -> int:
    """Runs the candidate; then answers calls, if there is a socket, or else ends as the interpreter would."""
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as `site` has them
    module = _fresh_module("__main__" if socket is None else "candidate")
    finding = _load(_task(), module)
    if socket is None:
        return _finish(finding)
    channel = Channel(socket)
    channel.receive()
    channel.send(["failed", *finding] if finding else ["loaded"])
    while True:
        name, *call = channel.receive()
        channel.send(_answer(getattr(module, name), *map(decode, call)) if call else _kind(module, name))


def _task() -> Any:
    with open(_TASK, encoding="utf-8") as file:
        return json.load(file)


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
    """Waits for the program's threads, does what it left for its end, and flushes what it printed."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if finding is None:
        return 0
    reason, text = finding
    if reason is PythonReason.EXITED:
        return int(text) & 0xFF if text.removeprefix("-").isdecimal() else 1
    return next(status for status, meaning in EXIT_STATUS.items() if meaning is reason)


def _kind(module: ModuleType, name: str) -> list[Any]:
    if not hasattr(module, name):
        return ["missing"]
    value = getattr(module, name)
    return ["callable"] if callable(value) else _answer(lambda: value, [], {})


def _answer(function: Callable[..., object], arguments: list[Any], keywords: dict[str, Any]) -> list[Any]:
    try:
        return ["value", encode(function(*arguments, **keywords))]
    except NotPlainError as error:
        return ["opaque", str(error)]
    except BaseException as error:
        return ["raised", type(error).__name__, _message(error)]


# The tester: a process with the tests, and in `solo` with the candidate as well.


def run_tester(socket: int | None = None, result_bytes: int = 0) -> int:
    """Runs the tests against the candidate at the other end of the socket, or in its own namespace; reports."""
    task = _task()
    remote = None if socket is None else _Remote(Channel(socket), result_bytes, task["entry_point"])
    finding = None
    with suppress(_JudgedError):
        finding = _judge(task, remote)
    if remote is not None and remote.finding:  # also where the tests swallowed it
        finding = remote.finding
    os.write(_REPORT, json.dumps([task["token"], *(finding or ())]).encode())
    return 0


class _JudgedError(BaseException):
    """Ends the tests with a finding, past any `except Exception` of theirs."""


class _CandidateError(Exception):
    """An exception of a class that the candidate defines."""


class _Remote(dict[str, Any]):
    """The namespace of the tests, where names that nothing defines are the candidate's.

    All that comes from there may be forged, and is only ever taken as data.
    """

    def __init__(self, channel: Channel, result_bytes: int, entry_point: str | None) -> None:
        super().__init__(__name__="tests")
        self._channel = channel
        self._result_bytes = result_bytes
        self._entry_point = entry_point  # the only one of a built-in's name that is the candidate's
        self.missing: set[str] = set()
        self.heard = False
        """Whether a call came to an end, or a value has crossed."""
        self.finding: Finding | None = None
        self.raised: BaseException | None = None
        self.words = ""

    def load(self) -> None:
        match self._ask(None):
            case ["loaded"]:
                pass
            case ["failed", str(reason), str(text)] if reason in _FAILURES:
                raise self._end(PythonReason(reason), text)
            case _:
                raise self._end(PythonReason.OPAQUE, "not an answer")

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name != self._entry_point):
            raise KeyError(name)
        match self._ask([name]):
            case ["missing"]:
                self.missing.add(name)
                raise KeyError(name)
            case ["callable"]:
                self[name] = self._function(name)
            case ["opaque", "module"] if name in sys.stdlib_module_names:
                self[name] = import_module(name)  # the tests rely on an import of the candidate's
            case answer:
                self[name] = self._value(name, answer)
        return self[name]

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                request = [name, encode([*arguments]), encode(keywords)]
            except NotPlainError as error:
                text = f"{name}: an argument is a {error}; use mode: solo"
                raise self._end(PythonReason.TESTS_INVALID, text) from error
            return self._value(name, self._ask(request))

        return call

    def _ask(self, request: object) -> object:
        try:
            self._channel.send(request)
            return self._channel.receive(self._result_bytes)
        except (EOFError, OSError) as error:
            raise self._end(PythonReason.EXITED, "its process ended") from error
        except OverflowError as error:
            raise self._end(PythonReason.LIMIT_RESULT, str(error)) from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise self._end(PythonReason.OPAQUE, "not an answer") from error

    def _value(self, name: str, answer: object) -> Any:
        """What the candidate defined or returned; what it raised is raised."""
        match answer:
            case ["value", wire]:
                self.heard = True
                try:
                    return decode(wire)
                except NotPlainError as error:
                    raise self._end(PythonReason.OPAQUE, str(error)) from error
                except MemoryError as error:
                    raise self._end(PythonReason.LIMIT_RESULT, "too large to rebuild") from error
            case ["raised", str(kind), str(text)]:
                self.heard = True
                self.raised, self.words = _exception(kind, text), f"{kind}: {text}"
                raise self.raised
            case ["opaque", str(kind)]:
                raise self._end(PythonReason.OPAQUE, f"{name} is or returns a {kind}")
            case _:
                raise self._end(PythonReason.OPAQUE, f"{name}: not an answer")

    def _end(self, reason: PythonReason, detail: str) -> _JudgedError:
        self.finding = self.finding or (reason, detail)
        return _JudgedError()


def _judge(task: dict[str, Any], remote: _Remote | None) -> Finding:
    entry_point: str | None = task["entry_point"]
    try:
        programs = [compile(test, f"<test {place}>", "exec") for place, test in enumerate(task["tests"], 1)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return PythonReason.TESTS_INVALID, _text(error)
    if remote is None:
        module = _fresh_module("candidate")
        namespace = module.__dict__
        if finding := _load(task["code"], module):
            return finding
    else:
        namespace = remote
        remote.load()
        _run_setup(task["setup"], namespace, entry_point)
    try:
        candidate = entry_point and namespace[entry_point]
    except KeyError:
        return PythonReason.MISSING_NAME, str(entry_point)
    place = 1
    try:
        for program in programs:
            exec(program, namespace)
            place += 1
        defined = {part.co_name for program in programs for part in program.co_consts if isinstance(part, CodeType)}
        if entry_point and "check" in defined:
            namespace["check"](candidate)
    except _JudgedError:
        raise
    except BaseException as error:
        reason, text = _blame(error, remote)
        return reason, f"test {place}: {text}"
    if remote is not None and not remote.heard:
        return PythonReason.TESTS_INVALID, "the tests never call the candidate"
    return PythonReason.PASSED, ""


def _blame(error: BaseException, remote: _Remote | None) -> Finding:
    """What an exception that ended the tests says."""
    if remote is not None and isinstance(error, NameError) and error.name in remote.missing:
        return PythonReason.MISSING_NAME, _text(error)
    if remote is not None and not remote.heard:
        return PythonReason.TESTS_INVALID, _text(error)
    if isinstance(error, MemoryError):
        return PythonReason.LIMIT_MEMORY, _text(error)
    if remote is not None and error is remote.raised:
        return PythonReason.EXCEPTION, remote.words
    return PythonReason.ASSERTION if isinstance(error, AssertionError) else PythonReason.EXCEPTION, _text(error)


def _run_setup(setup: str, namespace: dict[str, Any], entry_point: str | None) -> None:
    """Gives the tests what the record puts before the candidate: imports, helpers.

    A prompt that ends in an open function is closed first. Without an entry point any of its functions may be the
    one to write, so that only its imports are settled.
    """
    for closing in ("", "\n    pass") if setup else ():
        with suppress(SyntaxError, ValueError):
            tree = ast.parse(setup + closing)
            if entry_point is None:
                tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            with suppress(Exception):
                exec(compile(tree, "<setup>", "exec"), namespace)
            namespace.pop(entry_point or "", None)
            return


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
