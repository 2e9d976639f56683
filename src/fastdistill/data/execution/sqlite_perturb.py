"""Perturbed copies of a SQLite database: the same schema, fewer rows, other numbers. Judges nothing.

Two queries that agree on one database by luck hardly agree on its copies too. As a program, the worker of
`sqlite.CopyPool`: a job is the path of a database and those of its copies, the n-th with seed n.
"""

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from fastdistill.data.execution.sqlite_guard import quoted
from fastdistill.data.execution.worker_process import Channel

DROPPED = 0.35
"""Share of each table's rows that go; those that refer to them go too."""
CHANGED = 0.3
"""Share of the numbers, other than keys, that become another number."""
_MOST_DANGLING = 0.1  # share of the rows that a reference may miss: real schemas are not clean
_MOST_VALUES = 10_000  # of a column, from which others are drawn

Number = int | float


def perturb(path: Path, seed: int, out: Path) -> None:
    """Writes a copy of the database at `path` to `out`: always the same one for a content and a seed.

    What a schema promises stays true: a row goes with the rows that it refers to, and keys are not changed. Keys are
    primary, unique and foreign ones, and columns that are named like the key of another table and hold its values. A
    changed number stays between the least and the greatest of its column: half take another row's value, half move by
    one unit of their last digit. Text, blobs and NULL stay, and so do virtual tables; triggers go.

    Raises:
        sqlite3.Error: not a database, or one that can't be written without functions or modules of its own.
        OSError: `path` can't be read, or `out` not be written.
    """
    shutil.copyfile(path, out)
    chance = random.Random(seed)
    with closing(sqlite3.connect(out, isolation_level=None)) as database:
        database.executescript("PRAGMA journal_mode=MEMORY; PRAGMA synchronous=OFF; PRAGMA foreign_keys=OFF")
        database.create_function("chance", 0, chance.random)
        database.execute("BEGIN")
        for (trigger,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {quoted(trigger)}")
        tables = _tables(database)
        references = [reference for reference in _references(database, tables) if reference.holds(database)]
        for table in tables:
            database.execute(f"DELETE FROM {quoted(table.name)} WHERE chance() < {DROPPED}")
        while any(reference.drop_dangling(database) for reference in references):
            pass
        for table in tables:
            keys = set(chain(*table.unique, *(r.columns_of(table.name) for r in references)))
            for column in (column for column in table.columns if column not in keys):
                _change_numbers(database, table.name, column, chance)
        database.execute("COMMIT")


class _Table(NamedTuple):
    name: str
    columns: tuple[str, ...]
    unique: tuple[tuple[str, ...], ...]
    """The columns of the primary key, if there is one, and of each unique index."""


class _Reference(NamedTuple):
    """Columns of a table whose values, where none is NULL, stand in columns of another."""

    child: str
    columns: tuple[str, ...]
    parent: str
    keys: tuple[str, ...]

    def columns_of(self, table: str) -> tuple[str, ...]:
        return (self.columns if table == self.child else ()) + (self.keys if table == self.parent else ())

    def holds(self, database: sqlite3.Connection) -> bool:
        """Whether it does, for nearly all rows; it does not where it names what is not there, as schemas do."""
        try:
            count = database.execute(f"SELECT count(*), total({self._nowhere}) FROM {quoted(self.child)}")
        except sqlite3.OperationalError:
            return False
        rows, dangling = count.fetchone()
        return bool(dangling <= _MOST_DANGLING * rows)

    def drop_dangling(self, database: sqlite3.Connection) -> int:
        return database.execute(f"DELETE FROM {quoted(self.child)} WHERE {self._nowhere}").rowcount

    @property
    def _nowhere(self) -> str:
        keys = ", ".join(map(quoted, self.keys))
        known = " AND ".join(f"{quoted(key)} IS NOT NULL" for key in self.keys)
        columns = ", ".join(map(quoted, self.columns))
        return f"({columns}) NOT IN (SELECT {keys} FROM {quoted(self.parent)} WHERE {known})"


def _tables(database: sqlite3.Connection) -> list[_Table]:
    names = database.execute(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND name NOT LIKE 'sqlite\\_%'"
        " ESCAPE '\\' ORDER BY name"
    ).fetchall()
    tables = []
    for (name,) in names:
        # `hidden` is above 0 for generated columns, which can't be written.
        columns = database.execute("SELECT name, pk FROM pragma_table_xinfo(?) WHERE hidden = 0", (name,)).fetchall()
        indexes = database.execute('SELECT name FROM pragma_index_list(?) WHERE "unique"', (name,)).fetchall()
        unique = [tuple(column for column, _ in sorted((c for c in columns if c[1]), key=lambda c: c[1]))]
        for (index,) in indexes:
            found = database.execute("SELECT name FROM pragma_index_info(?) ORDER BY seqno", (index,)).fetchall()
            unique.append(tuple(column for (column,) in found if column is not None))
        tables.append(_Table(name, tuple(column for column, _ in columns), tuple(filter(None, unique))))
    return tables


def _references(database: sqlite3.Connection, tables: list[_Table]) -> Iterator[_Reference]:
    """Those that the schema declares, and those that names suggest: most schemas declare few of theirs."""
    primary = {table.name.lower(): table.unique[0] for table in tables if table.unique}
    named = [(key[0], table) for table in tables for key in dict.fromkeys(table.unique) if len(key) == 1]
    for table in tables:
        declared = database.execute(
            'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list(?) ORDER BY id, seq', (table.name,)
        ).fetchall()
        for (_, parent), entries in groupby(declared, itemgetter(0, 1)):
            columns, named_keys = zip(*(entry[2:] for entry in entries), strict=True)
            keys = tuple(key for key in named_keys if key is not None) or primary.get(parent.lower(), ())
            if len(keys) == len(columns):
                yield _Reference(table.name, columns, parent, keys)
        for column in table.columns:
            for key, other in named:
                # `id` alone numbers the rows of every table and refers to none.
                if other is not table and column.lower() == key.lower() != "id":
                    yield _Reference(table.name, (column,), other.name, (key,))


def _change_numbers(database: sqlite3.Connection, table: str, column: str, chance: random.Random) -> None:
    place, name = quoted(table), quoted(column)
    is_number = f"typeof({name}) IN ('integer', 'real')"
    numbers = f"FROM {place} WHERE {is_number}"
    distinct = database.execute(f"SELECT DISTINCT {name} {numbers} ORDER BY {name} LIMIT {_MOST_VALUES}")
    values = [value for (value,) in distinct]
    if len(values) < 2:
        return
    (greatest,) = database.execute(f"SELECT max({name}) {numbers}").fetchone()
    database.create_function("other", 1, _other(values, values[0], greatest, chance))
    # Where a CHECK or a unique expression forbids the other number, the row stays as it is.
    database.execute(f"UPDATE OR IGNORE {place} SET {name} = other({name}) WHERE {is_number} AND chance() < {CHANGED}")


def _other(values: list[Number], least: Number, greatest: Number, chance: random.Random) -> Callable[[Number], Number]:
    def other(value: Number) -> Number:
        digits = 0 if isinstance(value, int) else len(repr(value).partition(".")[2])
        exact = isinstance(value, int) or "e" not in repr(value)  # 1e+20 has no last digit to speak of
        if exact and chance.random() < 0.5:
            unit: Number = 10**-digits
            moved = [round(value + step, digits) for step in (unit, -unit)]
            if within := [near for near in moved if least <= near <= greatest]:
                return chance.choice(within)
        drawn = chance.choice(values)
        return drawn if drawn != value else values[(values.index(drawn) + 1) % len(values)]

    return other


def main() -> None:
    def make(places: list[str]) -> list[str]:
        source, *copies = map(Path, places)
        try:
            for seed, copy in enumerate(copies):
                perturb(source, seed, copy)
        except (sqlite3.Error, OSError) as error:
            for copy in copies:
                copy.unlink(missing_ok=True)
            return [str(error)]
        return [""]

    Channel().serve(make)


if __name__ == "__main__":
    main()
