"""Confines a process that runs code nobody has read, and says what this machine has to do it with. Linux only.

Two levels, of which the stronger is taken. At either, the code sees no environment, no network and no file but the
interpreter's own, writes nothing, starts no process, signals no process but itself, and has a budget of CPU time,
memory and descriptors. Needs no package but, for the stronger level, an installed bubblewrap.

What `landlock` alone can't hide: the names, sizes and times of files (`os.stat`), never their contents.
"""

import ctypes
import os
import platform
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)
if sys.platform == "linux":
    _LIBC.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
_INSIDE = "/empty"
"""The working folder under bubblewrap."""
DESCRIPTORS = 64
_STACK_BYTES = 16 << 20
_THREADS = 128
"""In all that share a lane's user namespace: binds under bubblewrap, unless root started it."""


class IsolationLevel(StrEnum):
    """How far the code is kept away, weaker first."""

    LANDLOCK = "landlock"
    """Landlock and seccomp: the code shares the machine's namespaces, and can use nothing in them."""
    BUBBLEWRAP = "bubblewrap"
    """Namespaces of its own for files, processes, network and users, and seccomp; Landlock too where there is one."""

    def reaches(self, wanted: "IsolationLevel") -> bool:
        order = list(IsolationLevel)
        return order.index(self) >= order.index(wanted)


class Isolation(NamedTuple):
    """What this machine offers."""

    levels: tuple[IsolationLevel, ...]
    """The levels that work here, weaker first."""
    landlock: int
    """Version of Landlock's interface; 0: none."""
    missing: tuple[str, ...]
    """What would have to change for a level that does not work."""

    @property
    def level(self) -> IsolationLevel | None:
        """The strongest level; None: no code can be run."""
        return self.levels[-1] if self.levels else None

    def __str__(self) -> str:
        landlock = f", Landlock {self.landlock}" if self.landlock else ""
        found = f"{self.level}{landlock}, seccomp" if self.level else "none"
        return "; ".join((found, *self.missing))


@cache
def available_isolation() -> Isolation:
    """What works here, found out by trying it once (some 50 ms)."""
    machine = platform.machine()
    if sys.platform != "linux":
        return Isolation((), 0, (f"{sys.platform} has no sandbox for model code: run it on Linux, or in a container",))
    if machine not in _ARCHITECTURES:
        return Isolation((), 0, (f"no system call table for {machine}: run it on x86_64 or aarch64",))
    # A filter at address 0: the kernel says EFAULT if it would have read one, EINVAL if it has no seccomp.
    if _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0) != -1 or ctypes.get_errno() != 14:
        return Isolation((), 0, ("this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)",))
    landlock = max(0, _landlock_version())
    none = "no Landlock: needs Linux 5.13 or later with `landlock` among its security modules"
    missing = {IsolationLevel.LANDLOCK: "" if landlock else none, IsolationLevel.BUBBLEWRAP: _bubblewrap_problem()}
    levels = tuple(level for level, problem in missing.items() if not problem)
    return Isolation(levels, landlock, tuple(filter(None, missing.values())))


def readable_paths() -> list[str]:
    """All that the interpreter needs to read in order to run with its standard library."""
    prefixes = sys.base_prefix, sys.base_exec_prefix
    resolved = (str(Path(prefix).resolve()) for prefix in prefixes)  # where `interpreter` is, if they are links
    paths = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", *prefixes, *resolved)
    return [path for path in dict.fromkeys(paths) if Path(path).exists()]


def interpreter() -> str:
    """This interpreter outside of any virtual environment."""
    return str(Path(sys.executable).resolve())


def wrapped(command: Sequence[str], level: IsolationLevel, readable: Iterable[str]) -> list[str]:
    """The command line that starts `command` with the namespaces of `level`; it still has to confine itself."""
    if level is IsolationLevel.LANDLOCK:
        return list(command)
    binds = [part for path in readable for part in ("--ro-bind", path, path)]
    return [
        *(shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--uid", "1000", "--gid", "1000", *binds, "--dev-bind", "/dev/null", "/dev/null"),
        *("--dir", _INSIDE, "--chdir", _INSIDE, "--remount-ro", "/", "--", *command),
    ]


def confine_zygote(level: IsolationLevel, memory_bytes: int, readable: Iterable[str]) -> None:
    """Takes from this process and its children all files but those under `readable`, and bounds what they may use.

    The address space, that is; it bounds threads as well, each of which needs a stack.

    Raises:
        OSError: the kernel refuses.
    """
    bounds = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: DESCRIPTORS,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    if level is IsolationLevel.BUBBLEWRAP:  # elsewhere it would count all that the user runs
        bounds[resource.RLIMIT_NPROC] = _THREADS
    for limit, value in bounds.items():
        with suppress(ValueError):  # a lower one is in force (`ulimit`)
            resource.setrlimit(limit, (value, value))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _filter()
    version = _landlock_version()
    if version < 1:
        return
    # Access to files, to TCP ports, and to abstract sockets and processes outside; later versions know more of them.
    file_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = struct.pack("QQQ", (1 << file_rights) - 1, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(_LIBC.syscall(_LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0))
    for path, rights in [*((path, _READ) for path in readable), ("/dev/null", _READ_FILE | _WRITE_FILE)]:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights if Path(path).is_dir() else rights & ~_READ_DIR, folder)
        _checked(_LIBC.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0))
        os.close(folder)
    _checked(_LIBC.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def confine_process(cpu_s: int) -> None:
    """Takes from a child of the zygote, for good, all but computing: CPU time, and an allow-list of system calls.

    It is killed when its parent ends.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # SIGXCPU, which says what happened, and SIGKILL a second later if it is ignored.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    program = _filter().replace(struct.pack("=I", _ANYBODY), struct.pack("=I", os.getpid()))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(program) // _INSTRUCTION.size, program)))


def _bubblewrap_problem() -> str | None:
    if shutil.which("bwrap") is None:
        return "no bubblewrap: install the package `bubblewrap` for namespaces"
    command = wrapped([interpreter(), "-I", "-S", "-c", ""], IsolationLevel.BUBBLEWRAP, readable_paths())
    with suppress(OSError, subprocess.TimeoutExpired):
        trial = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
        if trial.returncode == 0:
            return None
        words = trial.stderr.decode(errors="replace").strip().splitlines()
        return f"bubblewrap does not work here (a container, or user namespaces are off): {' '.join(words[-1:])}"
    return "bubblewrap does not start"


def _landlock_version() -> int:
    """0 or less: none."""
    return int(_LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _prctl(option: int, value: int, pointer: Any = None) -> None:
    _checked(_LIBC.prctl(option, value, pointer, 0, 0))


def _checked(result: int) -> int:
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_READ = _READ_FILE | _READ_DIR

# System calls by number, on x86_64 and (-: not there) on aarch64; those in `_RULES` under conditions. What is not
# named is refused: processes, sockets to the outside, tracing, shared memory, mounts, users, and all that changes a
# file, its folder or its attributes.
_CALLS = """
read 0 63  write 1 64  readv 19 65  writev 20 66  pread64 17 67  pwrite64 18 68  lseek 8 62  close 3 57
close_range 436 436  fstat 5 80  newfstatat 262 79  statx 332 291  faccessat 269 48  faccessat2 439 439
readlinkat 267 78  getdents64 217 61  getcwd 79 17  chdir 80 49  fchdir 81 50  mmap 9 222  munmap 11 215
mprotect 10 226  mremap 25 216  madvise 28 233  brk 12 214  futex 202 98  set_robust_list 273 99
get_robust_list 274 100  rseq 334 293  membarrier 324 283  exit 60 93  exit_group 231 94  restart_syscall 219 128
sched_yield 24 124
sched_getaffinity 204 123  getpid 39 172  gettid 186 178  getppid 110 173  getuid 102 174  geteuid 107 175
getgid 104 176  getegid 108 177  getgroups 115 158  getpgid 121 155  getsid 124 156  getpriority 140 141  uname 63 160
sysinfo 99 179  getrusage 98 165  times 100 153  getcpu 309 168  getrlimit 97 163  clock_gettime 228 113
clock_getres 229 114  clock_nanosleep 230 115  nanosleep 35 101  gettimeofday 96 169  setitimer 38 103
getitimer 36 102  getrandom 318 278  rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139
rt_sigpending 127 136  rt_sigtimedwait 128 137  rt_sigsuspend 130 133  sigaltstack 131 132  pipe2 293 59  dup 32 23
dup3 292 24  ppoll 271 73  pselect6 270 72  epoll_create1 291 20  epoll_ctl 233 21  epoll_pwait 281 22  eventfd2 290 19
sendto 44 206  recvfrom 45 207  shutdown 48 210  getsockname 51 204  getsockopt 55 209  stat 4 -  lstat 6 -  access 21 -
readlink 89 -  pipe 22 -  dup2 33 -  poll 7 -  select 23 -  time 201 -  getpgrp 111 -  epoll_create 213 -
epoll_wait 232 -  pause 34 -  alarm 37 -  getdents 78 -  arch_prctl 158 -
openat 257 56  clone 56 220  fcntl 72 25  ioctl 16 29  socketpair 53 199  prlimit64 302 261  kill 62 129
tgkill 234 131  clone3 435 435
"""
_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
"""The kernel's name for each, and the column of its numbers."""

_ALL = 0xFFFFFFFF
_HIGH = 0.5  # added to an argument's index: its upper half
_SIGNALS = tuple(s for s in range(32) if s not in (signal.SIGKILL, signal.SIGSTOP))
"""Signals to oneself. The two that no handler sees would read like a death or a stall that the machine caused."""
_ANYBODY = 0x5AFEC0DE
"""Stands for the process itself, whose number is not known before it runs."""
_Condition = tuple[float, int, Sequence[int]]
"""Argument, mask, and the values that are allowed under the mask."""

_RULES: Mapping[str, Sequence[_Condition]] = {
    # Truncating a file that is opened for reading: Landlock knows it from version 3 only.
    "openat": ((2, os.O_ACCMODE | os.O_TRUNC, [a | t for a in (0, 1, 2) for t in (0, os.O_TRUNC) if a or not t]),),
    "clone": ((0, _ALL, (0x3D0F00, 0x7D0F00)),),  # a thread, as glibc and musl ask for it
    "fcntl": ((1, _ALL, (*range(8), 1030)),),  # not F_SETOWN and F_SETSIG, which send signals to others
    "ioctl": ((1, _ALL, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),  # terminal? FION*, FIO*CLEX
    "socketpair": ((1, 0xF, (1,)),),  # streams: a datagram socket could be sent anywhere
    "prlimit64": ((2, _ALL, (0,)), (2 + _HIGH, _ALL, (0,))),  # reading limits
    "kill": ((0, _ALL, (_ANYBODY,)), (1, _ALL, _SIGNALS)),
    "tgkill": ((0, _ALL, (_ANYBODY,)), (2, _ALL, _SIGNALS)),
}


class _Program(ctypes.Structure):
    _fields_ = (("instructions", ctypes.c_ushort), ("code", ctypes.c_char_p))


_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _ENOSYS = 1, 38


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, value)


_DENY = _instruction(_RETURN, _ERRNO | _EPERM)


@cache
def _filter() -> bytes:
    """The filter, in which `_ANYBODY` is still to be replaced."""
    architecture, column = _ARCHITECTURES[platform.machine()]
    words = _CALLS.split()
    numbers = {words[i]: int(words[i + column]) for i in range(0, len(words), 3) if words[i + column] != "-"}
    program = _instruction(_LOAD, 4) + _instruction(_EQUAL, architecture, 1) + _instruction(_RETURN, _KILL_PROCESS)
    program += _instruction(_LOAD, 0)
    for name, number in numbers.items():
        # Told that there is no clone3, glibc falls back on clone, whose flags a filter can see.
        answer = _instruction(_RETURN, _ERRNO | _ENOSYS if name == "clone3" else _ALLOW)
        rule = b"".join(map(_condition, _RULES.get(name, ()))) + answer
        program += _instruction(_EQUAL, number, 0, len(rule) // _INSTRUCTION.size) + rule
    return program + _DENY


def _condition(condition: _Condition) -> bytes:
    argument, mask, values = condition
    tests = b"".join(_instruction(_EQUAL, value, len(values) - i) for i, value in enumerate(values))
    return _instruction(_LOAD, int(16 + 8 * argument)) + _instruction(_AND, mask) + tests + _DENY
