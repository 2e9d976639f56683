"""Brings the answers of several machines together: where all answers are stored, a run asks nothing."""

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fastdistill.control.folder import RunFolder, artifacts_root
from fastdistill.control.store import ResponseStore
from fastdistill.control.writer import connect, fault
from fastdistill.core.errors import InputError

_PROMPTS = """
INSERT INTO main.prompts SELECT id + ?, provider, model, messages, parameters FROM other.prompts WHERE id IN (
    SELECT prompt FROM other.responses its
    WHERE NOT EXISTS (SELECT 1 FROM main.responses own WHERE own.key = its.key))
"""
# The first answer under a key stays, as in any run.
_ANSWERS = """
INSERT OR IGNORE INTO main.responses SELECT key, prompt + ?, seed, attempt, completion FROM other.responses
"""


def merge(roots: Sequence[Path], output_dir: Path | None) -> None:
    """Copies the answers in the stores of some artifacts roots into the store of another, and says how many.

    Raises:
        InputError: a root has no store, or is the one to be written.
        EnvironmentFault: a store can't be read or written. Those before it are merged.
    """
    stores = [RunFolder(root.expanduser(), "").responses for root in roots]
    into = RunFolder(artifacts_root(output_dir), "").responses
    for store in stores:
        if not store.exists():
            raise InputError(f"{store}: there is no such store; give the --output-dir of a run on another machine")
        if into.exists() and store.samefile(into):
            raise InputError(f"{store}: this is the store to be written; choose another --output-dir")
    into.parent.mkdir(parents=True, exist_ok=True)
    for store in (into, *stores):
        asyncio.run(_take_in_journals(store))
    with closing(connect(into)) as connection:
        for store in stores:
            try:
                new, known = _copy(connection, store)
            except sqlite3.Error as error:
                raise fault(store, error) from error
            print(f"{store}: {new:,} new answers, {known:,} known ones")
    print(f"merged into {into}")


async def _take_in_journals(store: Path) -> None:
    """What a killed run has left behind goes into its store when that is opened."""
    async with ResponseStore(store):
        pass


def _copy(connection: sqlite3.Connection, store: Path) -> tuple[int, int]:
    connection.execute("ATTACH ? AS other", (str(store),))
    try:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            last = connection.execute("SELECT coalesce(max(id), 0) FROM main.prompts").fetchone()[0]
            (total,) = connection.execute("SELECT count(*) FROM other.responses").fetchone()
            connection.execute(_PROMPTS, (last,))
            new = connection.execute(_ANSWERS, (last,)).rowcount
    finally:
        connection.execute("DETACH other")
    return new, total - new
