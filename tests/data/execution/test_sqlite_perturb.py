"""Copies that differ in content and keep what the schema promises."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastdistill.data.execution.sqlite import CopyPool
from fastdistill.data.execution.sqlite_perturb import perturb

SCHEMA = """
CREATE TABLE city(city_id INTEGER PRIMARY KEY, name TEXT UNIQUE, size INT CHECK (size > 0));
CREATE TABLE person(
    person_id INTEGER PRIMARY KEY, home INT REFERENCES city, score REAL, member INT, text_number TEXT,
    twice AS (score * 2));
CREATE TABLE visit(person_id INT, city_id INT, year INT, PRIMARY KEY (person_id, city_id, year)) WITHOUT ROWID;
CREATE TABLE bill(visitor INT, place INT, year INT, total REAL, "odd ""name" INT,
    FOREIGN KEY (visitor, place, year) REFERENCES visit(person_id, city_id, year));
CREATE TABLE broken(a INT REFERENCES nowhere(b), id INTEGER PRIMARY KEY);
CREATE TABLE log(n INT);
CREATE TRIGGER t AFTER DELETE ON person BEGIN INSERT INTO log VALUES (old.person_id); END;
CREATE VIEW rich AS SELECT * FROM person WHERE score > 5;
WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 1000)
    INSERT INTO city SELECT i, 'city ' || i, 1 + i % 50 FROM c;
INSERT INTO person SELECT city_id, nullif(1 + city_id * 7 % 1000, 5), (city_id % 100) / 10.0, city_id % 2, city_id
    FROM city;
INSERT INTO visit SELECT person_id, 1 + person_id * 3 % 1000, 2000 + person_id % 20 FROM person;
INSERT INTO bill SELECT *, 1e20 * person_id, person_id FROM visit;
INSERT INTO broken SELECT city_id, city_id FROM city;
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "towns.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
    path.chmod(0o444)
    return path


@pytest.fixture(scope="module")
def copy(database: Path) -> Path:
    out = database.with_name("copy.sqlite")
    perturb(database, 1, out)
    return out


def rows(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


@pytest.mark.parametrize(("table", "low", "high"), [("city", 600, 700), ("broken", 600, 700), ("person", 300, 550)])
def test_a_third_of_the_rows_is_gone(copy: Path, table: str, low: int, high: int) -> None:
    """Of `person`, also those whose city is gone."""
    assert low < rows(copy, f"SELECT count(*) FROM {table}")[0][0] < high


def test_references_hold_declared_or_only_named(copy: Path) -> None:
    assert rows(copy, "PRAGMA integrity_check") == [("ok",)]
    assert rows(copy, "SELECT count(*) FROM bill")[0][0] > 50
    missing = "SELECT count(*) FROM {} c LEFT JOIN {} p ON {} WHERE p.ROWID IS NULL AND {} IS NOT NULL"
    assert rows(copy, missing.format("person", "city", "c.home = p.city_id", "c.home")) == [(0,)]
    assert rows(copy, missing.format("visit", "person", "c.person_id = p.person_id", "1")) == [(0,)]
    assert rows(copy, missing.format("visit", "city", "c.city_id = p.city_id", "1")) == [(0,)]
    on = "c.visitor = p.person_id AND c.place = p.city_id AND c.year = p.year"
    assert rows(copy, f"SELECT count(*) FROM bill c LEFT JOIN visit p ON {on} WHERE p.year IS NULL") == [(0,)]


def test_a_third_of_the_numbers_differ_and_stay_in_their_range(database: Path, copy: Path) -> None:
    joined = "SELECT a.{0}, b.{0} FROM old.{1} a JOIN main.{1} b ON a.{2} = b.{2}"
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("ATTACH ? AS old", (str(database),))
        for column, table, key in (("size", "city", "city_id"), ("score", "person", "person_id")):
            pairs = connection.execute(joined.format(column, table, key)).fetchall()
            assert 0.2 < sum(before != after for before, after in pairs) / len(pairs) < 0.4
            assert {type(after) for _, after in pairs} == {type(pairs[0][0])}
        assert connection.execute("SELECT min(size) > 0, max(size) <= 50 FROM main.city").fetchone() == (1, 1)
        assert connection.execute("SELECT DISTINCT member FROM main.person ORDER BY 1").fetchall() == [(0,), (1,)]
        for column in ("home", "text_number"):
            pairs = connection.execute(joined.format(column, "person", "person_id")).fetchall()
            assert all(before == after for before, after in pairs)
        assert connection.execute("SELECT count(*) FROM main.person WHERE twice <> score * 2").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM main.log").fetchone() == (0,)  # no trigger ran
    assert rows(copy, "SELECT count(*) FROM rich")[0][0] > 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(database: Path, copy: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.sqlite", tmp_path / "other.sqlite"
    perturb(database, 1, again)
    perturb(database, 2, other)
    assert again.read_bytes() == copy.read_bytes() != other.read_bytes()


def test_tables_that_refer_to_each_other_shrink_together(tmp_path: Path) -> None:
    """One place has one address: both tables have the key, and lose the same rows."""
    path, out = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE place(place_id INTEGER PRIMARY KEY, stars INT);
            CREATE TABLE address(place_id INTEGER PRIMARY KEY, house INT);
            WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 500)
                INSERT INTO place SELECT i, i % 5 FROM c;
            INSERT INTO address SELECT place_id, place_id FROM place;
            INSERT INTO address VALUES (1000, 7);
            """
        )
    perturb(path, 0, out)
    places, addresses = (rows(out, f"SELECT place_id FROM {table}") for table in ("place", "address"))
    assert places == addresses
    assert 100 < len(places) < 350


def test_the_worker_writes_all_copies_or_none(database: Path, copy: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{seed}.sqlite" for seed in range(3))
    text = tmp_path / "notes.txt"
    text.write_text("not a database, though long enough to look like one at first sight")

    async def run() -> list[str]:
        async with CopyPool() as pool:
            return await pool.judge(
                [[str(place) for place in job] for job in ((database, first, second), (text, third))]
            )

    assert asyncio.run(run()) == ["", "file is not a database"]
    assert second.read_bytes() == copy.read_bytes() != first.read_bytes()
    assert not third.exists()
