"""A SQLite file with one writer thread. Writes are grouped by themselves: what arrives while one commit is under
way, or too soon after it, goes into the next. The event loop never waits for the disk.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from time import monotonic
from types import TracebackType
from typing import Any, Generic, TypeVar

from fastdistill.core.errors import EnvironmentFault

_MOST_WAITING = 2_000  # entries, before whoever brings more has to wait: some kilobytes each
_MOST_AT_ONCE = 1_000  # entries of a group
_ROWS_AT_ONCE = 32  # of one statement: one for each number of rows and table is kept, of the 128 that sqlite3 keeps
_PATIENCE = 60.0  # seconds, for another process's write
_CHECKPOINT = 16_000_000  # bytes of WAL: a page that is written again and again goes to the file once

_END: tuple[None, None] = (None, None)  # the last job

Entry = TypeVar("Entry")


class Writer(Generic[Entry]):
    """Owns the writing connection to `path`; use as an async context manager.

    `write_all` writes a group of entries in one transaction, in the writer's thread; a group begins `every` so many
    seconds at most. `durable` files survive the process being killed at any moment (WAL: a commit is in the system's
    hands), and a power cut up to the last checkpoint; the others are for what can be computed again. `page_size` is in
    bytes, and a new file's.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        write_all: Callable[[sqlite3.Connection, Sequence[Entry]], None],
        *,
        durable: bool,
        every: float,
        page_size: int = 4096,
    ) -> None:
        self.path = path
        self._schema = schema
        self._write_all = write_all
        self._durable = durable
        self._every = every
        self._page_size = page_size
        self._jobs: SimpleQueue[tuple[Entry | None, asyncio.Future[None] | None]] = SimpleQueue()
        self._urgent = Event()  # somebody waits
        self._thread: Thread | None = None
        self._unreported: EnvironmentFault | None = None

    async def __aenter__(self) -> "Writer[Entry]":
        self._loop = asyncio.get_running_loop()
        connection = connect(self.path)
        try:
            connection.execute(f"PRAGMA page_size={self._page_size}")
            connection.execute("PRAGMA temp_store=MEMORY")  # what a statement could undo: TMPDIR may be full
            await _to_wal(connection)
            connection.execute(f"PRAGMA synchronous={'NORMAL' if self._durable else 'OFF'}")
            connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT // self._page_size}")
            connection.executescript(f"BEGIN IMMEDIATE; {self._schema} COMMIT")
        except sqlite3.Error as error:
            connection.close()
            raise fault(self.path, error) from error
        self._thread = Thread(target=self._work, args=(connection,), name=f"writer:{self.path.name}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(_END)
        self._urgent.set()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)
        if self._unreported is not None and error is None:
            raise self._unreported

    async def write(self, entry: Entry | None) -> None:
        """Returns once the entry, and all before it, are committed; None stands for nothing but those before.

        Raises:
            EnvironmentFault: the disk is full, or the file can't be written.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        self._jobs.put((entry, done))
        self._urgent.set()
        await done

    def submit(self, entry: Entry) -> None:
        """Hands the entry over without waiting; what goes wrong is raised by the next call, or at the end."""
        if self._unreported is not None:
            raise self._unreported
        self._jobs.put((entry, None))

    @property
    def crowded(self) -> bool:
        return self._jobs.qsize() >= _MOST_WAITING

    def _work(self, connection: sqlite3.Connection) -> None:
        earliest = 0.0
        get = self._jobs.get
        while (job := get()) is not _END:
            if (early := earliest - monotonic()) > 0:
                self._urgent.wait(early)
            self._urgent.clear()
            earliest = monotonic() + self._every
            group = [job, *[get() for _ in range(min(self._jobs.qsize(), _MOST_AT_ONCE - 1))]]
            if group[-1] is _END:
                self._jobs.put(_END)  # to be found by the loop, after this group
            entries, futures = zip(*group, strict=True)
            error = self._commit(connection, [entry for entry in entries if entry is not None])
            waiting = list(filter(None, futures))
            self._unreported = error or self._unreported
            if waiting:
                self._loop.call_soon_threadsafe(_resolve, waiting, self._unreported)
                self._unreported = None
        if not self._durable:
            with suppress(sqlite3.Error):  # a reader holds it
                connection.execute("PRAGMA journal_mode=DELETE")  # one file, for whoever reads it from now on
        connection.close()

    def _commit(self, connection: sqlite3.Connection, entries: Sequence[Entry]) -> EnvironmentFault | None:
        try:
            self._write_all(connection, entries)
        except Exception as error:  # uncaught, the thread would end, and whoever waits would wait for ever
            return fault(self.path, error)
        return None


async def _to_wal(connection: sqlite3.Connection) -> None:
    """SQLite itself does not wait here for another process that makes the same file at this moment."""
    patience = monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or monotonic() > patience:
                raise
        await asyncio.sleep(0.01)


def _resolve(waiting: "Sequence[asyncio.Future[None]]", error: EnvironmentFault | None) -> None:
    for done in waiting:
        if done.cancelled():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


def insert(connection: sqlite3.Connection, into: str, rows: Sequence[Sequence[Any]]) -> None:
    """`into` is like `INSERT INTO t`.

    Many rows are one statement: each run of one gives up the interpreter's lock, and has to wait for it again. A value
    that is not of type `int`, `float`, `str` or `bytearray` itself costs `sqlite3` as much as all else of its row.
    """
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[at : at + _ROWS_AT_ONCE]
        connection.execute(_insert(into, len(some[0]), len(some)), list(chain.from_iterable(some)))


@cache
def _insert(into: str, width: int, size: int) -> str:
    row = f"({', '.join('?' * width)})"
    return f"{into} VALUES {', '.join([row] * size)}"


def connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    """A connection that waits up to 60 s for another process's write.

    Raises:
        EnvironmentFault: the file can't be opened.
    """
    try:
        if readonly:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            return sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        return sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise fault(path, error) from error


def fault(path: Path, error: Exception) -> EnvironmentFault:
    """What SQLite said, with the remedy where there is one."""
    text = str(error)
    if any(sign in text for sign in ("full", "I/O", "No space", "File too large")):
        remedy = "free some space and run the same command again; what was stored before is kept"
    elif any(sign in text for sign in ("not a database", "malformed", "truncated", "decode")):
        remedy = "the file is damaged or is something else: move it away, or choose another --output-dir"
    elif "locked" in text:
        remedy = "another process holds it; wait for it to end"
    else:
        remedy = "check that the folder exists and may be written to"
    return EnvironmentFault(f"{path}: {text}; {remedy}")
