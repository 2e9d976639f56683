"""A SQLite file with one writer thread. Writes are grouped by themselves: what arrives while one commit is under
way goes into the next, so nothing waits for a timer and the event loop never waits for the disk.
"""

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from types import TracebackType
from typing import Any, TypeAlias

from fastdistill.core.errors import EnvironmentFault

Statement: TypeAlias = tuple[str, Sequence[Sequence[Any]]]
"""An SQL statement and the rows to run it with."""

_Job: TypeAlias = tuple[Sequence[Statement], "asyncio.Future[None] | None"]


class Writer:
    """Owns the writing connection to `path`; use as an async context manager.

    `durable` files survive the process being killed at any moment (WAL: a commit is in the system's hands), and a
    power cut up to the last checkpoint; the others are for what can be computed again.
    """

    def __init__(self, path: Path, schema: str, *, durable: bool) -> None:
        self.path = path
        self._schema = schema
        self._durable = durable
        self._jobs: Queue[_Job | None] = Queue(10_000)
        self._thread: Thread | None = None
        self._unreported: EnvironmentFault | None = None

    async def __aenter__(self) -> "Writer":
        self._loop = asyncio.get_running_loop()
        connection = connect(self.path)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={'NORMAL' if self._durable else 'OFF'}")
            connection.executescript(self._schema)
        except sqlite3.Error as error:
            connection.close()
            raise fault(self.path, error) from error
        self._thread = Thread(target=self._work, args=(connection,), name=f"writer:{self.path.name}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jobs.put(None)
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)
        if self._unreported is not None and error is None:
            raise self._unreported

    async def write(self, statements: Sequence[Statement]) -> None:
        """Returns once the statements are committed, all or none of them.

        Writes that come together are committed together, statement by statement: of two for the same row the later
        one must win whatever stands between them.

        Raises:
            EnvironmentFault: the disk is full, or the file can't be written.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        self._jobs.put((statements, done))
        # The commit goes on even if who asked for it is cancelled: the answer was paid for.
        await asyncio.shield(done)

    def submit(self, statements: Sequence[Statement]) -> None:
        """Hands the statements over without waiting; what goes wrong is raised by the next `write`, or at the end."""
        self._jobs.put((statements, None))

    def _work(self, connection: sqlite3.Connection) -> None:
        while (job := self._jobs.get()) is not None:
            batch = [job]
            while len(batch) < 1000:
                try:
                    more = self._jobs.get_nowait()
                except Empty:
                    break
                if more is None:
                    self._jobs.put(None)  # to be found by the outer loop, after this batch
                    break
                batch.append(more)
            error = self._commit(connection, [statement for statements, _ in batch for statement in statements])
            waiting = [done for _, done in batch if done is not None]
            self._unreported = error or self._unreported
            if waiting:
                self._loop.call_soon_threadsafe(_resolve, waiting, self._unreported)
                self._unreported = None
        if not self._durable:
            with suppress(sqlite3.Error):  # a reader holds it
                connection.execute("PRAGMA journal_mode=DELETE")  # one file, for whoever reads it from now on
        connection.close()

    def _commit(self, connection: sqlite3.Connection, statements: Iterable[Statement]) -> EnvironmentFault | None:
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                # One call for all rows of a statement, whoever wrote them; the statements in their first order.
                merged: dict[str, list[Sequence[Any]]] = {}
                for sql, rows in statements:
                    merged.setdefault(sql, []).extend(rows)
                for sql, all_rows in merged.items():
                    connection.executemany(sql, all_rows)
        except (sqlite3.Error, OverflowError, UnicodeError) as error:  # uncaught, the thread would end and all wait
            return fault(self.path, error)
        return None


def connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    """A connection that waits up to 60 s for another process's write.

    Raises:
        EnvironmentFault: the file can't be opened.
    """
    try:
        if readonly:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            return sqlite3.connect(uri, uri=True, timeout=60, isolation_level=None, check_same_thread=False)
        return sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise fault(path, error) from error


def fault(path: Path, error: Exception) -> EnvironmentFault:
    """What SQLite said, with the remedy where there is one."""
    text = str(error)
    if "full" in text or "I/O" in text:
        remedy = "free some space and run the same command again; what was stored before is kept"
    elif any(sign in text for sign in ("not a database", "malformed", "truncated")):
        remedy = "the file is damaged or is something else: move it away, or choose another --output-dir"
    elif "locked" in text:
        remedy = "another process holds it; wait for it to end"
    else:
        remedy = "check that the folder exists and may be written to"
    return EnvironmentFault(f"{path}: {text}; {remedy}")


def _resolve(waiting: Sequence["asyncio.Future[None]"], error: EnvironmentFault | None) -> None:
    for done in waiting:
        if done.cancelled():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
