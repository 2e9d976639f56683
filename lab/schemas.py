"""Schemas for synthetic text-to-SQL, and SQLite databases to fill them with; the questions are in `grammar`.

Tables are built from a small vocabulary of things that a school, a company or a hotel would keep about its like.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]
Value = str | int | float | None
Row = tuple[Value, ...]
Role = Literal["key", "link", "label", "category", "number", "optional"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: how SQL names it, how questions name it, and which values it may hold.

    A `label` names its row and a `number` measures it: both are unique within a table, so that no ORDER BY .. LIMIT
    has ties. A `category` repeats; an `optional` is NULL in about a third of the rows.
    """

    name: str
    role: Role
    type: Literal["TEXT", "INTEGER", "REAL"]
    phrases: tuple[str, ...]
    pool: Sequence[Value] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the schema. `parent` is the name of the table that its `link` column points to, if it has one."""

    name: str
    noun: str
    columns: tuple[Column, ...]
    parent: str | None = None

    def of_role(self, *roles: Role) -> list[Column]:
        """The columns that play one of the roles, in the order of the table."""
        return [column for column in self.columns if column.role in roles]

    def create_statement(self) -> str:
        """The CREATE TABLE statement, on one line."""
        parts = []
        for column in self.columns:
            suffix = {"key": " PRIMARY KEY", "link": f" REFERENCES {self.parent}(id)"}.get(column.role, "")
            parts.append(f"{column.name} {column.type}{suffix}")
        return f"CREATE TABLE {self.name} ({', '.join(parts)});"


@dataclass(frozen=True, slots=True)
class Database:
    """A schema of one table, or of a parent and a child, from which any number of databases can be filled."""

    tables: tuple[Table, ...]

    @property
    def schema(self) -> str:
        """The CREATE TABLE statements, one a line: the schema's identity."""
        return "\n".join(table.create_statement() for table in self.tables)

    @property
    def db_id(self) -> str:
        """A readable name, unique to the schema: the tables and eight hex digits."""
        return "_".join([*(table.name for table in self.tables), self._digest()[:8]])

    @property
    def split(self) -> Split:
        """Where the schema belongs; a fifth of all schemas are held out."""
        return "heldout" if int(self._digest()[8:16], 16) % 5 == 0 else "train"

    def rows(self, seed: int = 0) -> dict[str, list[Row]]:
        """The rows of each table; every parent has at least one child. The same seed gives the same rows."""
        rng = random.Random(f"{self._digest()}:{seed}")
        rows: dict[str, list[Row]] = {}
        for table in self.tables:
            is_parent = len(self.tables) == 2 and table.parent is None
            count = rng.randint(6, 9) if is_parent else rng.randint(14, 24)
            parents = len(rows[table.parent]) if table.parent else 0
            values = [_fill(column, count, parents, rng) for column in table.columns]
            rows[table.name] = list(zip(*values, strict=True))
        return rows

    def fill(self, connection: sqlite3.Connection, seed: int = 0) -> None:
        """Create the tables and insert `rows(seed)`."""
        connection.executescript(self.schema)
        for name, rows in self.rows(seed).items():
            marks = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)
        connection.commit()

    def _digest(self) -> str:
        return hashlib.sha256(self.schema.encode()).hexdigest()


def random_database(rng: random.Random) -> Database:
    """A schema of one table, or in three cases of five of a parent and a child."""
    family = rng.choice(_FAMILIES)
    nouns = family if rng.random() < 0.6 else (rng.choice(family),)
    plural_names = rng.random() < 0.5
    tables: list[Table] = []
    for noun in nouns:
        name = plural(noun) if plural_names else noun
        parent = tables[0] if tables else None
        tables.append(Table(name, noun, _random_columns(noun, parent, rng), parent.name if parent else None))
    return Database(tuple(tables))


def plural(noun: str) -> str:
    """The plural of a noun of the vocabulary."""
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def _random_columns(noun: str, parent: Table | None, rng: random.Random) -> tuple[Column, ...]:
    """A key, a label and three or four more: at least one category and one number."""
    label = Column("title" if noun in _WORKS else "name", "label", "TEXT", ("title" if noun in _WORKS else "name",),
                   _PEOPLE if noun in _PERSONS else _THINGS)  # fmt: skip
    choices = [_COLUMNS[name] for name in _NOUNS[noun].split()]
    chosen: list[Column] = []
    while not {"category", "number"} <= {column.role for column in chosen}:
        chosen = rng.sample(choices, rng.randint(3, 4))
    chosen.insert(rng.randint(0, 1), label)
    if parent is not None:
        link = Column(f"{parent.noun}_id", "link", "INTEGER", (f"{parent.noun} id",))
        chosen.insert(rng.choice((0, len(chosen))), link)
    return (Column("id", "key", "INTEGER", ("id",)), *chosen)


def _fill(column: Column, count: int, parents: int, rng: random.Random) -> list[Value]:
    match column.role:
        case "key":
            return list(range(1, count + 1))
        case "link":
            links: list[Value] = [*range(1, parents + 1), *(rng.randint(1, parents) for _ in range(count - parents))]
            rng.shuffle(links)
            return links
        case "category":
            present = rng.sample(column.pool, rng.randint(3, 5))
            return [rng.choice(present) for _ in range(count)]
        case "optional":
            return [None if rng.random() < 1 / 3 else value for value in rng.sample(column.pool, count)]
        case "label" | "number":
            return rng.sample(column.pool, count)


# --- The vocabulary -------------------------------------------------------------------------------------------------

_PEOPLE = """
    Adam Alice Amir Anna Bella Boris Carla Chen Clara Daniel Diego Elena Emma Felix Fiona George Hana Hugo Irene
    Ivan James Julia Karim Laura Leo Lucas Maria Marta Mia Nadia Nina Oliver Omar Paula Peter Rosa Ruth Victor
""".split()  # noqa: SIM905
_THINGS = """
    Amber Apex Arrow Atlas Aurora Beacon Bridge Canyon Cedar Comet Crown Delta Eagle Echo Falcon Forest Garden Golden
    Harbor Horizon Indigo Jade Lagoon Legend Lotus Maple Meadow Nova Ocean Orchid Phoenix Pioneer Prairie River Vista
""".split()  # noqa: SIM905


def _text(name: str, pool: str, *phrases: str) -> Column:
    return Column(name, "category", "TEXT", (name, *phrases), pool.split())


def _number(name: str, pool: range, *phrases: str) -> Column:
    return Column(name, "number", "INTEGER", (name, *phrases), pool)


def _real(name: str, tenths: range, *phrases: str) -> Column:
    return Column(name, "number", "REAL", (name, *phrases), [tenth / 10 for tenth in tenths])


def _optional(name: str, domain: str, *phrases: str) -> Column:
    return Column(name, "optional", "TEXT", (name, *phrases), [f"{word.lower()}{domain}" for word in _THINGS])


_COLUMNS = {
    column.name: column
    for column in (
        _text("city", "Berlin Boston Cairo Dublin Lima London Madrid Oslo Paris Rome Tokyo Vienna", "town"),
        _text("country", "Brazil Canada Egypt France Germany India Italy Japan Kenya Mexico Norway Spain"),
        _text("status", "active closed open paused planned retired"),
        _text("color", "black blue brown green orange red white yellow"),
        _text("genre", "comedy crime drama fantasy history jazz poetry rock", "style"),
        _text("category", "basic budget classic modern premium standard", "type"),
        _text("level", "beginner expert junior middle senior", "rank"),
        _text("language", "Arabic Chinese English French German Hindi Spanish", "main language"),
        _text("department", "design finance legal research sales support", "division"),
        _number("age", range(18, 70)),
        _number("salary", range(2000, 9000, 50), "pay"),
        _number("score", range(20, 100), "number of points"),
        _number("year", range(1950, 2024)),
        _number("population", range(2000, 90000, 100), "number of people"),
        _number("height", range(100, 220)),
        _number("weight", range(40, 160)),
        _number("budget", range(10000, 99000, 500), "available money"),
        _number("capacity", range(20, 400, 5), "number of places"),
        _number("pages", range(80, 900), "number of pages"),
        _number("duration", range(30, 240), "length"),
        _number("distance", range(100, 9000, 10)),
        _number("stock", range(1, 300), "amount in stock"),
        _real("price", range(50, 5000, 5), "cost"),
        _real("rating", range(10, 51), "review score"),
        _optional("email", "@mail.com", "email address"),
        _optional("website", ".com", "web page"),
        _optional("nickname", "y", "short name"),
    )
}


_PERSONS = {"student", "employee", "player", "author", "artist", "driver"}
_WORKS = {"book", "album", "movie"}
_NOUNS = {
    "school": "city country status capacity budget year website",
    "student": "city language level age score height email",
    "company": "city country category budget year rating website",
    "employee": "city department level age salary score email",
    "team": "city color country budget score year nickname",
    "player": "country status level age height weight nickname",
    "author": "country language city age rating email website",
    "book": "genre language category pages price year rating",
    "artist": "country genre status age rating nickname website",
    "album": "genre language color duration price year rating",
    "shop": "city category status capacity budget rating website",
    "product": "category color status price stock weight nickname",
    "airline": "country status color budget year rating website",
    "flight": "city status category duration distance price capacity",
    "region": "country language status population budget nickname",
    "museum": "city category status capacity price rating website",
    "studio": "city country status budget year email website",
    "movie": "genre language country duration budget year rating",
    "hotel": "city category color capacity price rating email",
    "driver": "city status level age salary distance email",
}
_FAMILIES = (
    ("school", "student"), ("company", "employee"), ("team", "player"), ("author", "book"), ("artist", "album"),
    ("shop", "product"), ("airline", "flight"), ("region", "museum"), ("studio", "movie"), ("region", "hotel"),
    ("company", "driver"), ("region", "school"), ("company", "product"), ("museum", "artist"),
)  # fmt: skip
