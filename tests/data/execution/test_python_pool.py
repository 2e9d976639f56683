"""The sandbox as a whole: programs that attack it or fake success, and what must still be judged right after them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Literal

import pytest

from fastdistill.data.execution.python_child import PythonReason as R
from fastdistill.data.execution.python_pool import (
    InputOutput,
    PythonEvaluation,
    PythonJob,
    PythonLimits,
    PythonPool,
)
from fastdistill.data.execution.sandbox import IsolationLevel, available_isolation, interpreter
from fastdistill.data.execution.worker_pool import PoolClosedError

QUICK = PythonLimits(cpu_s=1, wall_s=20.0, memory_bytes=256 << 20)
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
CORRECT = "def f(x):\n    return x * x\n"
Seen = dict[str, dict[str, PythonEvaluation]]
SECRET = "do-not-read-me-17"

AVAILABLE = available_isolation()
LEVELS = [
    pytest.param(
        level,
        marks=pytest.mark.skipif(level not in AVAILABLE.levels, reason=f"{level}: {'; '.join(AVAILABLE.missing)}"),
    )
    for level in IsolationLevel
]
needs_sandbox = pytest.mark.skipif(AVAILABLE.level is None, reason=str(AVAILABLE))


def judge(
    *jobs: PythonJob, level: IsolationLevel | None = None, limits: PythonLimits = QUICK, workers: int = 3
) -> list[PythonEvaluation]:
    async def run() -> list[PythonEvaluation]:
        async with PythonPool(workers, limits, level) as pool:
            return await asyncio.gather(*map(pool.evaluate, jobs))

    return asyncio.run(run())


def job(code: str, mode: Literal["split", "solo"] = "split") -> PythonJob:
    return PythonJob(code, (CHECK,), entry_point="f", mode=mode)


@dataclass(frozen=True)
class Attack:
    code: str
    ends: frozenset[R]
    """How it may end where tests and candidate have a process each."""
    fools_solo: bool = False
    """A known weakness of one process for both: the tests run among what the candidate has arranged."""


def attack(code: str, *ends: R, fools_solo: bool = False) -> Attack:
    return Attack(code, frozenset(ends), fools_solo)


def inside(body: str, *ends: R, before: str = "", fools_solo: bool = False) -> Attack:
    """An attack when the function is called."""
    lines = body.strip("\n").split("\n")
    code = before + "\ndef f(x):\n" + "\n".join("    " + line for line in lines) + "\n"
    return attack(code, *ends, fools_solo=fools_solo)


def denied(body: str, before: str = "import os, ctypes, socket, signal") -> Attack:
    """An attack that must find itself refused: it answers rightly only where it went through."""
    indented = "\n".join("    " + line for line in body.strip("\n").split("\n"))
    return inside(f"try:\n{indented}\nexcept OSError:\n    return 'refused'\nreturn x * x", R.ASSERTION, before=before)


def syscall(number: int, *arguments: str) -> Attack:
    """The same by number, past Python's own functions. x86_64 only."""
    call = ", ".join([str(number), *arguments])
    return denied(
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"if libc.syscall({call}) < 0: raise OSError(ctypes.get_errno(), 'refused')"
    )


FORGED = """
import json, os
def spray(message, whole=True):
    body = json.dumps(message).encode()
    for fd in range(64):
        try:
            os.write(fd, body + b'\\n' * whole)
        except OSError:
            pass
"""

BOMBS = {
    # CPU time and memory
    "endless_loop": inside("while True: pass", R.LIMIT_CPU),
    "endless_loop_at_import": attack("while True: pass", R.LIMIT_CPU),
    "giant_power": inside("return 9 ** 9 ** 9", R.LIMIT_CPU, R.LIMIT_MEMORY),
    "catastrophic_regex": inside("return re.match('(a+)+$', 'a' * 40 + 'b')", R.LIMIT_CPU, before="import re"),
    "except_all_loop": inside("while True:\n    try:\n        while True: pass\n    except: pass", R.LIMIT_CPU),
    "signals_ignored": inside(
        "for s in (signal.SIGXCPU, signal.SIGALRM, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        R.LIMIT_CPU,
        before="import signal",
    ),
    "huge_int_to_text": inside(
        "sys.set_int_max_str_digits(0)\nreturn str(7 ** 9000000)", R.LIMIT_CPU, before="import sys"
    ),
    "list_bomb": inside("a = [0]\nwhile True: a += a", R.LIMIT_MEMORY),
    "giant_bytes": inside("return bytearray(40 << 30)", R.LIMIT_MEMORY),
    "giant_result": inside("return [0] * 20_000_000", R.LIMIT_MEMORY, R.LIMIT_CPU, R.LIMIT_RESULT),
    "large_result": inside("return 'x' * 10_000_000", R.LIMIT_RESULT),
    "many_parentheses": inside("return eval('(' * 100_000 + ')' * 100_000)", R.EXCEPTION, R.LIMIT_MEMORY, R.CRASHED),
    "many_signs": inside("return eval('-' * 200_000 + '1')", R.EXCEPTION, R.LIMIT_MEMORY, R.CRASHED),
    "deep_recursion": inside("return f(x + 1)", R.EXCEPTION),
    "deepest_recursion": inside(
        "sys.setrecursionlimit(10 ** 9)\nreturn f(x + 1)",
        *(R.CRASHED, R.LIMIT_MEMORY, R.LIMIT_CPU, R.EXITED),
        before="import sys",
    ),
    "null_pointer": inside("ctypes.string_at(0)", R.CRASHED, before="import ctypes"),
    "abort": inside("os.abort()", R.CRASHED, before="import os"),
    # Resources
    "fork_bomb": inside("while True: os.fork()", R.EXCEPTION, before="import os"),
    "daemon": inside(
        "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(1000)\nreturn x * x",
        R.EXCEPTION,
        before="import os, time",
    ),
    "subprocess": inside("subprocess.run(['/bin/true'])\nreturn x * x", R.EXCEPTION, before="import subprocess"),
    "exec": inside("os.execv('/bin/true', ['true'])", R.EXCEPTION, before="import os"),
    "thread_bomb": inside(
        "while True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        *(R.EXCEPTION, R.LIMIT_MEMORY, R.LIMIT_CPU),
        before="import threading, time",
    ),
    "descriptor_bomb": inside("while True: os.pipe()", R.EXCEPTION, before="import os"),
    "disk_fill": inside("open('big', 'wb').write(bytes(1 << 30))\nreturn x * x", R.EXCEPTION, R.LIMIT_MEMORY),
    "many_files": inside("for i in range(10 ** 6): open(f'/tmp/{i}', 'w').write('x')\nreturn x * x", R.EXCEPTION),
    "memfd_fill": inside(
        "fd = os.memfd_create('m')\nos.write(fd, bytes(1 << 20))\nreturn x * x", R.EXCEPTION, before="import os"
    ),
    "shared_memory": inside(
        "shared_memory.SharedMemory(create=True, size=1 << 30)\nreturn x * x",
        R.EXCEPTION,
        before="from multiprocessing import shared_memory",
    ),
    "raised_limits": inside(
        "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))\nreturn x * x", R.EXCEPTION, before="import resource"
    ),
    "output_flood": inside("while True: print('x' * 10_000)", R.LIMIT_OUTPUT),
    "raw_output_flood": inside("while True: os.write(1, b'x' * 10_000)", R.LIMIT_OUTPUT, before="import os"),
    "stderr_flood": inside("while True: sys.stderr.write('x' * 10_000)", R.LIMIT_CPU, before="import sys"),
}
ATTACKS = {
    # Faking success
    "os_exit_at_import": attack("import os\nos._exit(0)", R.EXITED),
    "sys_exit_at_import": attack("import sys\nsys.exit(0)", R.EXITED),
    "os_exit": inside("os._exit(0)", R.EXITED, before="import os"),
    "system_exit": inside("raise SystemExit(0)", R.EXCEPTION),
    "keyboard_interrupt": inside("raise KeyboardInterrupt", R.EXCEPTION),
    "custom_base_exception": inside("raise E", R.EXCEPTION, before="class E(BaseException): pass"),
    "printed_marker": inside("print('passed', 'OK', '[\"x\", \"passed\", \"\"]')", R.ASSERTION),
    "always_equal": inside(
        "return E()", R.OPAQUE, before="class E:\n    def __eq__(self, o): return True", fools_solo=True
    ),
    "equal_int": inside(
        "return E()", R.OPAQUE, before="class E(int):\n    def __eq__(self, o): return True", fools_solo=True
    ),
    "equal_list": inside(
        "return E()", R.OPAQUE, before="class E(list):\n    def __eq__(self, o): return True", fools_solo=True
    ),
    "patched_assertion": attack(
        "import builtins\nclass A(Exception):\n    pass\nbuiltins.AssertionError = A\n"
        "builtins.abs = lambda x: 0\ndef f(x): return 0",
        R.ASSERTION,
    ),
    "patched_check": inside(
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals['check'] = lambda c: None\n"
        "    frame.f_locals['self'] = None\n    frame = frame.f_back\nreturn 0",
        R.ASSERTION,
    ),
    "trace_jump": inside(
        "def tracer(frame, event, arg):\n    return tracer\nsys.settrace(tracer)\n"
        "frame = sys._getframe(1)\nframe.f_trace = tracer\nreturn 0",
        R.ASSERTION,
        before="import sys",
    ),
    "nonce_from_frames": inside(
        "import sys, json, os, struct\nframe = sys._getframe()\nwhile frame:\n"
        "    for value in list(frame.f_locals.values()):\n"
        "        if isinstance(value, dict) and 'token' in value:\n"
        "            body = json.dumps([value['token'], 'passed', '']).encode()\n"
        "            os.write(4, body)\n"
        "            os._exit(0)\n    frame = frame.f_back\n"
        "return 0",
        R.ASSERTION,
        fools_solo=True,
    ),
    "sprayed_result": attack(FORGED + "def f(x):\n    spray(['', 'passed', ''])\n    os._exit(0)", R.OPAQUE, R.EXITED),
    "sprayed_report": attack(
        FORGED + "def f(x):\n    spray(['', 'passed', ''], whole=False)\n    os._exit(0)",
        R.OPAQUE,
        R.EXITED,
        R.LIMIT_RESULT,
    ),
    "forged_load": attack(FORGED + "spray(['failed', 'passed', ''])\nos._exit(0)", R.OPAQUE, R.EXITED),
    "forged_reply": attack(
        FORGED + "spray(['loaded', {'f': ['value', 1]}])\nos._exit(0)", R.EXCEPTION, R.OPAQUE, R.EXITED
    ),
    **{
        f"forged_nesting_{depth}": attack(
            "import os\nfor fd in range(64):\n"
            f"    try: os.write(fd, b'[' * {depth} + b'\\n')\n"
            "    except OSError: pass\nos._exit(0)",
            *(R.OPAQUE, R.EXITED, R.LIMIT_OUTPUT),
        )
        for depth in (50_000, 1_000_000)
    },
    "poisoned_modules": attack(
        "import sys, json\njson.dumps = lambda *a, **k: '[\"value\", 4]'\nsys.modules['ast'] = None\n"
        "sys.modules['json'] = None\ndef f(x): return 0",
        *(R.ASSERTION, R.OPAQUE, R.EXITED),
    ),
    "tests_from_memory": inside(
        "import gc, sys\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o]\n"
        "for module in list(sys.modules.values()):\n"
        "    if callable(getattr(module, 'check', None)): found.append(module)\n"
        "try:\n    found += [1] if b'assert candidate(2)' in open('/proc/self/mem', 'rb').read(1) else []\n"
        "except OSError: pass\n"
        "return x * x if found else 0",
        R.ASSERTION,
        fools_solo=True,
    ),
    # Isolation
    "kill_parent": denied("os.kill(os.getppid(), signal.SIGKILL)"),
    "kill_all": denied("os.kill(-1, signal.SIGKILL)"),
    "kill_group": denied("os.killpg(0, signal.SIGKILL)"),
    "kill_self": denied("os.kill(os.getpid(), signal.SIGKILL)"),
    "stop_self": denied("os.kill(os.getpid(), signal.SIGSTOP)"),
    "owned_signals": denied("import fcntl\na, b = socket.socketpair()\nfcntl.fcntl(a, fcntl.F_SETOWN, os.getppid())"),
    "setuid": denied("os.setuid(12345)"),
    "chroot": denied("os.chroot('/')"),
    "mknod": denied("os.mknod('/tmp/node')"),
    "chmod": denied("os.chmod('/usr', 0o777)"),
    "truncate": denied("os.truncate(os.__file__, 0)"),
    "truncate_by_opening": denied("os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)"),
    "inet_socket": denied("socket.socket()"),
    "udp_socket": denied("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"),
    "unix_socket": denied("socket.socket(socket.AF_UNIX)"),
    "datagram_pair": denied("socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"),
    "passwd": denied("open('/etc/passwd').read()"),
    "own_environ": denied("open('/proc/self/environ').read()"),
    "parents_environ": denied("open(f'/proc/{os.getppid()}/environ').read()"),
    "first_environ": denied("open('/proc/1/environ').read()"),
    "memory_file": denied("open('/proc/self/mem', 'r+b')"),
    **{
        f"write_{folder.strip('/').replace('/', '_')}": denied(f"open('{folder}/fastdistill-attack', 'w')")
        for folder in ("/root", "/etc", "/usr", "/tmp", "/var/tmp", "/dev/shm", ".")
    },
}
if os.uname().machine == "x86_64":
    ATTACKS |= {
        "sysv_shared_memory": syscall(29, "0", "1 << 20", "0o1600"),
        "ptrace": syscall(101, "16", "os.getppid()", "0", "0"),
        "process_vm_writev": syscall(311, "os.getppid()", "0", "0", "0", "0", "0"),
        "io_uring": syscall(425, "8", "ctypes.create_string_buffer(256)"),
        "bpf": syscall(321, "0", "ctypes.create_string_buffer(128)", "128"),
        "keyctl": syscall(250, "0", "-3", "1"),
        "unshare": syscall(272, "0x10000000"),
        "fork": syscall(57),
        "clone_without_thread": syscall(56, "17", "0", "0", "0", "0"),
        "clone3": syscall(435, "ctypes.create_string_buffer(88)", "88"),
        "x32_fork": syscall(0x40000000 + 57),
        "set_limits": syscall(302, "0", "7", "ctypes.create_string_buffer(16)", "0"),
        "mount": syscall(165, "0", "b'/tmp'", "b'tmpfs'", "0", "0"),
        "open_tree": syscall(428, "-100", "b'/'", "1"),
    }

MUST_PASS = {
    "non_daemon_thread": "import threading, time\nthreading.Thread(target=lambda: time.sleep(1000)).start()\n"
    + CORRECT,
    "atexit_sleep": "import atexit, time\natexit.register(time.sleep, 1000)\n" + CORRECT,
    "del_loop": "class D:\n    def __del__(self):\n        while True: pass\nd = D()\n" + CORRECT,
    "daemon_inside_try": "import os\ntry:\n    os.fork()\nexcept OSError:\n    pass\n" + CORRECT,
    "lone_surrogate_printed": "print('\\ud800')\n" + CORRECT,
    "some_output": "print('x' * 30_000)\n" + CORRECT,
    "threads_in_use": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def f(x):\n    with ThreadPoolExecutor(4) as pool:\n        return sum(pool.map(lambda i: x, range(x)))\n"
    ),
    "asyncio_in_use": (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0.01)\n    return x * x\n"
        "def f(x): return asyncio.run(g(x))\n"
    ),
    "devnull_in_use": "import os, contextlib\n"
    + CORRECT.replace("    ", "    with open(os.devnull, 'w') as out, contextlib.redirect_stdout(out): print(x)\n    "),
    "standard_library": (
        "import sqlite3, hashlib, zlib, decimal, datetime, random, tempfile, urllib.parse, csv, uuid, logging\n"
        + CORRECT
    ),
    "main_guard": CORRECT + "if __name__ == '__main__':\n    raise SystemExit('not when imported')\n",
}
MUST_FAIL = {
    "input_without_any": inside("input()\nreturn x * x", R.EXCEPTION),
    "lone_surrogate_returned": inside("return '\\ud800'", R.ASSERTION),
    "nested_list": inside("a = []\nfor _ in range(100_000): a = [a]\nreturn a", R.OPAQUE),
    "cyclic_list": inside("a = []\na.append(a)\nreturn a", R.OPAQUE),
    "empty": attack("  \n", R.EMPTY),
    "binary_noise": attack("\x00\xff\ud800" * 99, R.SYNTAX_ERROR),
    "another_language": attack("fn f(x: i64) -> i64 { x * x }", R.SYNTAX_ERROR),
    "prose": attack("I can't help with that.", R.SYNTAX_ERROR),
    "fifty_megabytes": attack("x = 1\n" * 8_500_000, R.LIMIT_CODE),
    "wrong_name": attack("def g(x): return x * x", R.MISSING_NAME),
    "raises": inside("raise ValueError('no')", R.EXCEPTION),
    "raises_assertion": inside("assert False", R.EXCEPTION),
    "evil_exception": inside(
        "raise E", R.EXCEPTION, R.EXITED, before="class E(Exception):\n    def __str__(self): raise SystemExit"
    ),
}
HEALTHY = job(CORRECT)
WRONG = job("def f(x): return x + x")


@pytest.fixture(scope="module", params=LEVELS)
def seen(request: pytest.FixtureRequest) -> Seen:
    """Every program of this file, judged at one level by the same few lanes, a healthy or a wrong one after each."""
    groups = {
        "split": {name: job(a.code) for name, a in {**BOMBS, **ATTACKS}.items()},
        "solo": {name: job(a.code, "solo") for name, a in ATTACKS.items()},
        "must_pass": {name: job(code) for name, code in MUST_PASS.items()},
        "must_pass_solo": {name: job(code, "solo") for name, code in MUST_PASS.items()},
        "must_fail": {name: job(a.code) for name, a in MUST_FAIL.items()},
    }
    attackers = [one for group in groups.values() for one in group.values()]
    jobs = [
        one
        for attacker, neighbour in zip(attackers, cycle((HEALTHY, WRONG)), strict=False)
        for one in (attacker, neighbour)
    ]
    found = judge(*jobs, level=request.param)
    ends = iter(found[::2])
    verdicts = {group: {name: next(ends) for name in programs} for group, programs in groups.items()}
    neighbours = {"healthy": found[1::4], "wrong": found[3::4]}
    return verdicts | {group: {str(n): one for n, one in enumerate(some)} for group, some in neighbours.items()}


@pytest.mark.parametrize("name", [*BOMBS, *ATTACKS])
def test_an_attack_ends_as_it_should(seen: Seen, name: str) -> None:
    found = seen["split"][name]
    assert found.reason in {**BOMBS, **ATTACKS}[name].ends, found


@pytest.mark.parametrize("name", ATTACKS)
def test_solo_is_fooled_only_by_what_one_process_cannot_prevent(seen: Seen, name: str) -> None:
    found = seen["solo"][name]
    assert (found.reason is R.PASSED) == ATTACKS[name].fools_solo, found
    assert found.reason.outcome != "error"


@pytest.mark.parametrize("name", MUST_PASS)
def test_a_right_program_passes_whatever_it_leaves_running(seen: Seen, name: str) -> None:
    assert seen["must_pass"][name] == PythonEvaluation(R.PASSED)
    assert seen["must_pass_solo"][name] == PythonEvaluation(R.PASSED)


@pytest.mark.parametrize("name", MUST_FAIL)
def test_bad_input_ends_as_the_right_failure(seen: Seen, name: str) -> None:
    assert seen["must_fail"][name].reason in MUST_FAIL[name].ends, seen["must_fail"][name]


def test_no_program_changes_the_verdict_on_the_next(seen: Seen) -> None:
    assert {e.reason for e in seen["healthy"].values()} == {R.PASSED}
    assert {e.reason for e in seen["wrong"].values()} == {R.ASSERTION}


@needs_sandbox
def test_a_sleeper_is_an_error_and_never_held_against_the_teacher() -> None:
    (found,) = judge(job("import time\ndef f(x): time.sleep(1000)"), limits=PythonLimits(wall_s=0.7))
    assert found.reason is R.WALL_TIMEOUT
    assert found.reason.outcome == "error"


@pytest.mark.parametrize("level", LEVELS)
def test_an_attacker_finds_no_secret(level: IsolationLevel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = tmp_path / "secret.txt"
    planted.write_text(SECRET)
    monkeypatch.setenv("FASTDISTILL_TEST_API_KEY", SECRET)
    reads = [
        f"open({str(planted)!r}).read()",
        "str(dict(os.environ))",
        "open('/proc/self/environ').read()",
        "str(sys.argv) + str(sys.orig_argv)",
        "str(os.listdir('.'))",
        "str(getenv(b'FASTDISTILL_TEST_API_KEY'))",
    ]
    code = (
        "import os, sys, ctypes\ngetenv = ctypes.CDLL(None).getenv\ngetenv.restype = ctypes.c_char_p\n"
        "def f(x):\n    try: return {}\n    except OSError: return ''\n"
    )
    test = f"assert {SECRET!r} not in f(1) and 'API_KEY' not in f(1)"
    found = judge(*(PythonJob(code.format(read), (test,)) for read in reads), level=level)
    assert [e.reason for e in found] == [R.PASSED] * len(reads), found


@pytest.mark.parametrize("level", LEVELS)
def test_an_attacker_reaches_no_listening_server(level: IsolationLevel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0fastdistill-test-server")
        abstract.listen()
        code = (
            "import socket\ndef f(x):\n    a = {!r}\n"
            "    socket.socket(socket.AF_UNIX if isinstance(a, str) else socket.AF_INET).connect(a)\n    return x * x\n"
        )
        jobs = [job(code.format(address)) for address in (tcp.getsockname(), abstract.getsockname().decode())]
        assert [e.reason for e in judge(*jobs, level=level)] == [R.EXCEPTION, R.EXCEPTION]


@needs_sandbox
def test_verdicts_are_the_same_in_any_order_and_under_load() -> None:
    programs = [
        CORRECT,
        "def f(x): return x + x",
        "def f(x):\n    while True: pass",
        "def f(x): return x * x if list({'a', 'b', 'c', 'd', 'e'})[0] == 'a' else 0",
        "import random\ndef f(x): return x * x if random.random() > 0.5 else 0",
        "def f(x): return x * x if hash('a') % 3 else 0",
    ]
    jobs = [job(code) for code in programs]
    alone = judge(*jobs, workers=1)
    assert judge(*reversed(jobs), workers=1)[::-1] == alone
    assert judge(*jobs, workers=6) == alone


@needs_sandbox
def test_a_cancelled_evaluation_harms_no_other() -> None:
    async def run() -> PythonEvaluation:
        async with PythonPool(1, PythonLimits(cpu_s=900, wall_s=900)) as pool:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await pool.evaluate(job("def f(x):\n    while True: pass"))
            async with asyncio.timeout(60):  # by its limits the cancelled one would hold the only lane for longer
                return await pool.evaluate(HEALTHY)

    assert asyncio.run(run()).reason is R.PASSED


@needs_sandbox
def test_closing_the_pool_ends_what_is_under_way_and_what_waits() -> None:
    async def run() -> list[BaseException | PythonEvaluation]:
        pool = PythonPool(1, PythonLimits(cpu_s=30, wall_s=60))
        async with asyncio.timeout(20):
            await pool.__aenter__()
            endless = job("def f(x):\n    while True: pass")
            tasks = [asyncio.ensure_future(pool.evaluate(endless)) for _ in range(3)]
            await asyncio.sleep(1)
            await pool.__aexit__(None, None, None)
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(outcome) for outcome in asyncio.run(run())} == {PoolClosedError}


# By its limits, which are in the command line, a process is known from those of another run of the tests.
OURS = replace(QUICK, result_bytes=(4 << 20) + os.getpid())


def workers() -> set[int]:
    """All processes of pools with these limits, children that they forked included."""
    mark, found = f'"result_bytes": {OURS.result_bytes}'.encode(), set()
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and mark in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_left_behind(level: IsolationLevel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    bombs = [job(BOMBS[name].code) for name in ("daemon", "thread_bomb", "abort")]

    async def run() -> set[int]:
        async with PythonPool(3, OURS, level) as pool:
            await asyncio.gather(*map(pool.evaluate, [HEALTHY, *bombs]))
            return workers()

    assert asyncio.run(run()) != set()
    deadline = time.monotonic() + 30
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers() == set()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("level", LEVELS)
def test_a_zygote_killed_from_outside_costs_no_verdict(level: IsolationLevel) -> None:
    async def run() -> list[PythonEvaluation]:
        before = workers()
        async with PythonPool(1, QUICK, level) as pool:
            first = await pool.evaluate(HEALTHY)
            for pid in workers() - before:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return [first, *[await pool.evaluate(HEALTHY) for _ in range(2)]]

    assert [e.reason for e in asyncio.run(run())] == [R.PASSED] * 3


@pytest.mark.skipif(IsolationLevel.LANDLOCK not in AVAILABLE.levels, reason=str(AVAILABLE))
def test_a_zygote_killed_while_it_starts_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python, been = tmp_path / "python", tmp_path / "been"
    python.write_text(f'#!/bin/sh\nmkdir {been} 2> /dev/null && kill -9 $$\nexec {interpreter()} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert judge(HEALTHY, level=IsolationLevel.LANDLOCK, workers=1)[0].reason is R.PASSED
    assert been.exists()


@needs_sandbox
def test_limits_of_the_user_may_be_lower_than_those_of_the_sandbox() -> None:
    script = """
import resource
from tests.data.execution.test_python_pool import HEALTHY, R, judge
for limit, value in ((resource.RLIMIT_STACK, 8 << 20), (resource.RLIMIT_NOFILE, 60)):
    resource.setrlimit(limit, (value, value))
assert judge(HEALTHY, workers=1)[0].reason is R.PASSED
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


Pair = tuple[str, str]


def printed(*cases: tuple[str, Sequence[Pair]]) -> list[R]:
    jobs = [PythonJob(code, tuple(InputOutput(*pair) for pair in pairs)) for code, pairs in cases]
    return [found.reason for found in judge(*jobs)]


@needs_sandbox
def test_a_program_that_reads_and_prints_is_judged_by_its_output() -> None:
    sums = "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))"
    assert printed(
        (sums, [("1 2\n3 4\n", "3\n7\n"), ("", "")]),
        (sums, [("1 2\n", "3\n"), ("5 5", "11")]),
        ("print(sum(map(int, open(0).read().split())))", [("1 2 3", "6  \n\n")]),
        ("print(input()[::-1])", [("añ\n", "ña\n")]),
        ("print('hi')", [("x" * 5_000_000, "hi")]),
        ("print('x' * 1_000_000)", [("", "x" * 1_000_000)]),
    ) == [R.PASSED, R.MISMATCH, R.PASSED, R.PASSED, R.PASSED, R.PASSED]


@needs_sandbox
def test_a_program_has_a_main_and_ends_like_one() -> None:
    wanted = {
        "if __name__ == '__main__': print('hi')": R.PASSED,
        "import sys\nprint('hi')\nsys.exit(0)": R.PASSED,
        "import threading\nthreading.Timer(0.1, print, ['hi']).start()": R.PASSED,
        "import sys\nprint('hi')\nprint('log', file=sys.stderr)": R.PASSED,
        "import sys\nprint('hi')\nsys.exit(3)": R.EXITED,
        "print('hi')\n1 / 0": R.EXCEPTION,
        "print('hi'": R.SYNTAX_ERROR,
        "a = [0]\nwhile True: a += a": R.LIMIT_MEMORY,
        "while True: print('x' * 10_000)": R.LIMIT_OUTPUT,
        "while True: pass": R.LIMIT_CPU,
        "import os\nprint('hi')\nos.abort()": R.CRASHED,
    }
    assert printed(*((code, [("", "hi\n")]) for code in wanted)) == list(wanted.values())


def verdict_on(code: str, *tests: str, setup: str = "", entry_point: str | None = None, solo: bool = False) -> R:
    (found,) = judge(PythonJob(code, tests, setup, entry_point, "solo" if solo else "split"), workers=1)
    return found.reason


@needs_sandbox
def test_a_list_of_asserts_needs_no_entry_point() -> None:
    assert (
        verdict_on("def add(a, b): return a + b", "assert add(1, 2) == 3", "assert {*add([1], [2])} == {1, 2}")
        is R.PASSED
    )
    assert verdict_on("def add(a, b): return a - b", "assert add(1, 0) == 1", "assert add(1, 2) == 3") is R.ASSERTION
    assert verdict_on("def plus(a, b): return a + b", "assert add(1, 2) == 3") is R.MISSING_NAME
    assert verdict_on("LIMIT = 7", "assert LIMIT == 7") is R.PASSED


@needs_sandbox
def test_tests_may_rely_on_an_import_of_the_candidate_but_not_on_an_absent_one() -> None:
    test = "assert math.isclose(half(1), 0.5)"
    assert verdict_on("import math\ndef half(x): return x / 2", test) is R.PASSED
    assert verdict_on("def half(x): return x / 2", test) is R.MISSING_NAME
    assert verdict_on("class math:\n    isclose = print\ndef half(x): return x / 2", test) is not R.PASSED


@needs_sandbox
def test_a_prompt_is_continued_and_its_helpers_are_the_records_own() -> None:
    prompt = "def double(x):\n    return 2 * x\n\ndef solve(x):\n    '''Twice x, plus 1.'''\n"
    check = "def check(candidate):\n    assert candidate(3) == double(3) + 1\n"
    assert verdict_on("    return double(x) + 1", check, setup=prompt, entry_point="solve") is R.PASSED
    assert verdict_on("def solve(x):\n    return x * 2 + 1", check, setup=prompt, entry_point="solve") is R.PASSED
    forged = "    return 1\ndef double(x): return 0\n"
    assert verdict_on(forged, check, setup=prompt, entry_point="solve") is R.ASSERTION
    assert verdict_on("    return x", "assert same(3) == 3", setup="def same(x):") is R.PASSED


@needs_sandbox
def test_imports_from_the_future_stand_before_the_setup() -> None:
    code = f"from __future__ import annotations\n{CORRECT.replace('x)', 'x: Later)', 1)}"
    assert verdict_on(code, CHECK, setup="import math\n", entry_point="f") is R.PASSED


@needs_sandbox
def test_the_entry_point_may_have_the_name_of_a_builtin_and_no_other_name_may() -> None:
    code = "def sum(a, b): return a + b\ndef len(x): return 7\n"
    assert verdict_on(code, "assert sum(1, 2) == 3", entry_point="sum") is R.PASSED
    assert verdict_on(code, "assert sum(1, 2) == len([5])", entry_point="sum") is R.ASSERTION


@needs_sandbox
def test_a_setup_that_is_broken_by_itself_is_no_fault_of_the_tests() -> None:
    setup = "limit = undefined\n"
    assert verdict_on(CORRECT, CHECK, setup=setup, entry_point="f") is R.EXCEPTION
    assert verdict_on(CORRECT, CHECK, setup="undefined = 3\n" + setup, entry_point="f") is R.PASSED


@needs_sandbox
def test_exceptions_that_the_tests_expect_cross() -> None:
    test = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"
    assert verdict_on("def f(x): return 1 / x", test) is R.PASSED
    assert verdict_on("def f(x): return x", test) is R.ASSERTION
    assert verdict_on("import os\ndef f(x): os._exit(0)", "try:\n    f(0)\nexcept:\n    pass") is R.EXITED


@needs_sandbox
def test_objects_need_solo() -> None:
    code = "class P:\n    def __init__(self): self.x = 1\ndef f(): return P()\ndef sort(a): a.sort()\n"
    for test in ("assert f().x == 1", "assert P().x == 1"):
        assert verdict_on(code, test) is R.OPAQUE
        assert verdict_on(code, test, solo=True) is R.PASSED
    assert verdict_on(code, "a = [2, 1]\nsort(a)\nassert a == [1, 2]", solo=True) is R.PASSED
    assert verdict_on(code, "assert sort(lambda v: v)") is R.TESTS_INVALID


@needs_sandbox
def test_broken_tests_are_an_error_and_never_the_candidates_fault() -> None:
    assert verdict_on(CORRECT, "assert f(2) ==") is R.TESTS_INVALID
    assert verdict_on(CORRECT, "assert 1 == 1", "x = 3") is R.TESTS_INVALID
    assert verdict_on(CORRECT, "def check(candidate):\n    assert candidate(2) == 4\n") is R.TESTS_INVALID
    assert verdict_on(CORRECT, "assert [1][5] == f(2)") is R.TESTS_INVALID
    assert verdict_on(CORRECT, "while True: pass") is R.TESTS_LIMIT
    assert verdict_on(CORRECT) is R.TESTS_INVALID
