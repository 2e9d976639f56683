"""The synthetic grammar: deterministic, unambiguous, and split by schema."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from lab.grammar import KINDS, QUESTIONS_PER_DATABASE, Example, examples, write_synthetic
from lab.schemas import Row, Split


def rows_of(example: Example, seed: int = 0) -> list[Row]:
    with closing(sqlite3.connect(":memory:")) as connection:
        example.db.fill(connection, seed)
        return connection.execute(example.gold_sql).fetchall()


def take(count: int, seed: int = 1, split: Split = "heldout") -> list[Example]:
    return list(islice(examples(seed, split), count))


def test_same_seed_gives_same_examples() -> None:
    assert take(100) == take(100)
    assert take(100) != take(100, seed=2)


def test_every_kind_of_question_is_asked() -> None:
    assert {example.kind for example in take(600)} == set(KINDS)


def test_gold_runs_on_any_filling_and_returns_something_on_its_own() -> None:
    for example in take(160):
        assert rows_of(example) not in ([], [(0,)], [(None,)])
        rows_of(example, seed=5)


def test_questions_of_a_database_differ_and_stand_together() -> None:
    found = take(20 * QUESTIONS_PER_DATABASE)
    for start in range(0, len(found), QUESTIONS_PER_DATABASE):
        together = found[start : start + QUESTIONS_PER_DATABASE]
        assert len({example.db_id for example in together}) == 1
        assert len({example.question for example in together}) == QUESTIONS_PER_DATABASE


def test_no_schema_is_both_trained_on_and_held_out() -> None:
    train = {example.db_id for example in take(1600, split="train")}
    heldout = {example.db_id for example in take(800, split="heldout")}
    assert len(train) > 150
    assert len(heldout) > 75
    assert not train & heldout


@pytest.mark.parametrize("seed", [0, 3])
def test_numbers_and_labels_never_tie(seed: int) -> None:
    for example in take(200)[::QUESTIONS_PER_DATABASE]:
        for table in example.db.tables:
            rows = example.db.rows(seed)[table.name]
            for column in table.of_role("number", "label"):
                values = [row[table.columns.index(column)] for row in rows]
                assert len(set(values)) == len(values)


def test_every_parent_has_a_child() -> None:
    with_parent = [example for example in take(200) if len(example.db.tables) == 2]
    assert with_parent
    for example in with_parent:
        parent, child = example.db.tables
        link = child.columns.index(child.of_role("link")[0])
        rows = example.db.rows()
        assert {row[link] for row in rows[child.name]} == {row[0] for row in rows[parent.name]}


def test_equal_questions_about_a_schema_have_equal_answers() -> None:
    answers: dict[tuple[str, str], Counter[Row]] = {}
    for example in take(1000):
        answer = Counter(rows_of(example))
        assert answers.setdefault((example.schema, example.question), answer) == answer


def test_written_files_are_byte_identical(tmp_path: Path) -> None:
    paths = [write_synthetic(tmp_path / name, samples=30, seed=13) for name in ("one", "two")]
    files = [sorted(path.relative_to(root) for path in root.rglob("*.*")) for root in (p.parent for p in paths)]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_written_records_answer_from_their_databases(tmp_path: Path) -> None:
    path = write_synthetic(tmp_path, samples=30, seed=13)
    assert path == tmp_path / "train.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [record["task_id"] for record in records[:2]] == ["synthetic-13-00000", "synthetic-13-00001"]
    for record in records:
        assert set(record) == {"task_id", "schema", "instruction", "gold_sql", "kind", "db_id"}
        with closing(sqlite3.connect(tmp_path / "databases" / f"{record['db_id']}.sqlite")) as connection:
            assert connection.execute(record["gold_sql"]).fetchall()
            tables = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table'").fetchall()
            assert "\n".join(f"{sql};" for (sql,) in tables) == record["schema"]
