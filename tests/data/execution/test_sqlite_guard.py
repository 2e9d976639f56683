"""One guarded connection, in this process: what it refuses, what it bounds, and what a database must be."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastdistill.data.execution.sqlite_guard import (
    DatabaseUnreadableError,
    GuardedConnection,
    QueryError,
    SqlLimits,
    SqlReason,
)
from fastdistill.data.execution.sqlite_worker import Evaluation, Evaluator, SqlJob


def build(path: Path, script: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return build(
        tmp_path / "odd name?#%.db",
        """
        CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, made TEXT);
        INSERT INTO t VALUES (1, 'ann', '2020-01-01'), (2, 'bob', 'now');
        CREATE TABLE "Mixed Case"(x);
        CREATE VIEW names AS SELECT name FROM t;
        """,
    )


@pytest.fixture
def guarded(database: Path) -> Iterator[GuardedConnection]:
    with closing(GuardedConnection(database, SqlLimits())) as connection:
        yield connection


def evaluating() -> Evaluator:
    return Evaluator(SqlLimits(), lambda phase: None)


def ask(evaluator: Evaluator, *job: Any, **options: Any) -> Evaluation:
    return evaluator.evaluate(SqlJob(*job, **options))


def refusal(connection: GuardedConnection, sql: str) -> QueryError:
    with pytest.raises(QueryError) as caught:
        connection.query(sql)
    return caught.value


def test_a_query_returns_rows_width_and_tables(guarded: GuardedConnection) -> None:
    result = guarded.query("SELECT name, id FROM t ORDER BY id;")
    assert (result.width, result.rows) == (2, (("ann", 1), ("bob", 2)))
    assert result.tables == ("t",)
    assert guarded.query("SELECT name FROM t WHERE 0").width == 1


@pytest.mark.parametrize(
    ("sql", "tables"),
    [
        ("SELECT count(*) FROM T", ("t",)),
        ("SELECT 1 FROM t", ("t",)),
        ("SELECT x FROM 'mixed case'", ("Mixed Case",)),
        ("SELECT name FROM names", ("names", "t")),
        ("WITH c AS (SELECT 1) SELECT 5 FROM c", ()),
        ("SELECT value FROM json_each('[1]')", ()),
        ("VALUES (1)", ()),
    ],
)
def test_only_tables_of_the_database_count_as_read(
    guarded: GuardedConnection, sql: str, tables: tuple[str, ...]
) -> None:
    assert guarded.query(sql).tables == tables


def test_double_quotes_may_hold_a_string(guarded: GuardedConnection) -> None:
    assert guarded.query('SELECT id FROM t WHERE name = "ann"').rows == ((1,),)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT date('now')",
        "SELECT datetime( 'NOW', '-7 days') FROM t",
        'SELECT date("now")',
        "SELECT unixepoch('subsec')",
        "SELECT datetime('Subsecond', '-7 days') FROM t",
        "SELECT strftime('%s', 'subsec')",
        "SELECT date('2020-01-01'), strftime(replace('%s', 'a', 'b'), 'subsec', '-1 day')",
        "SELECT date()",
        "SELECT time ( )",
        "SELECT julianday(/* x */)",
        "SELECT strftime('%s')",
        "SELECT strftime(replace('%s', 'a', 'b'))",
        "SELECT CURRENT_DATE",
        "SELECT current_timestamp FROM t",
        "SELECT random()",
        "SELECT abs(RANDOM()) % 1",
        "SELECT name FROM t ORDER BY random()",
        "SELECT changes()",
        "SELECT last_insert_rowid()",
        "SELECT sqlite_version()",
    ],
)
def test_what_differs_between_runs_is_nondeterministic(guarded: GuardedConnection, sql: str) -> None:
    assert refusal(guarded, sql).reason is SqlReason.NONDETERMINISTIC


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM t WHERE made = 'now'",
        "SELECT date(made) FROM t WHERE id = 1",
        "SELECT strftime('%Y', made) FROM t WHERE id = 1",
        "SELECT 'date()', date('2020-01-01')",
        "SELECT datetime(made, 'subsec'), strftime('%s', made, '+1 day', 'subsecond') FROM t WHERE id = 1",
    ],
)
def test_dates_that_are_given_are_deterministic(guarded: GuardedConnection, sql: str) -> None:
    assert guarded.query(sql).rows


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT lower(name), rank() OVER (ORDER BY id), sum(id) OVER () FROM t",
        "SELECT name FROM t WHERE name LIKE 'a%' OR name GLOB 'b*'",
        "SELECT group_concat(name), max(id), round(avg(id), 1) FROM t",
        "SELECT json_extract('{\"a\": 1}', '$.a')",
        "SELECT coalesce(NULL, iif(1, 2, 3)), printf('%d', 1), CAST('1' AS INT)",
        "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 5) SELECT sum(i) FROM c",
    ],
)
def test_ordinary_sql_is_allowed(guarded: GuardedConnection, sql: str) -> None:
    assert guarded.query(sql).rows


def test_the_operation_count_is_the_same_on_every_run(guarded: GuardedConnection) -> None:
    sql = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 2000) SELECT sum(i) FROM c"
    counts = {guarded.query(sql).ops for _ in range(3)}
    assert len(counts) == 1
    assert counts.pop() > 10_000


def test_each_cap_has_its_reason(database: Path) -> None:
    numbers = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT {}) SELECT {} FROM c"
    with closing(GuardedConnection(database, SqlLimits(ops=50_000, rows=10, result_bytes=2000))) as connection:
        assert len(connection.query(numbers.format(10, "i")).rows) == 10
        assert refusal(connection, numbers.format(11, "i")).reason is SqlReason.LIMIT_ROWS
        assert refusal(connection, numbers.format(9, "i, printf('%300d', i)")).reason is SqlReason.LIMIT_BYTES
        assert refusal(connection, numbers.format(9, "i, zeroblob(300)")).reason is SqlReason.LIMIT_BYTES
        stopped = refusal(connection, numbers.format(10**9, "max(i)"))
        assert (stopped.reason, stopped.ops) == (SqlReason.LIMIT_OPS, 50_000)
        assert connection.query("SELECT 1").rows == ((1,),)


def test_a_database_may_hold_longer_values_than_a_query_may_build(tmp_path: Path) -> None:
    path = build(tmp_path / "long.db", "CREATE TABLE t(x, y); INSERT INTO t VALUES (hex(zeroblob(100000)), 7), (1, 2)")
    with closing(GuardedConnection(path, SqlLimits())) as connection:
        assert refusal(connection, "SELECT x FROM t").reason is SqlReason.LIMIT_BYTES
        assert connection.allow_stored_values()
        assert connection.query("SELECT length(x) FROM t").rows == ((200_000,), (1,))
        assert refusal(connection, "SELECT x || x FROM t").reason is SqlReason.LIMIT_BYTES
        assert not connection.allow_stored_values()
    with closing(evaluating()) as evaluator:
        assert ask(evaluator, str(path), "SELECT x FROM t", "SELECT x FROM t").reason is SqlReason.MATCH


def test_text_that_is_not_utf8_can_be_read(tmp_path: Path) -> None:
    path = build(tmp_path / "latin.db", "CREATE TABLE t(x TEXT); INSERT INTO t VALUES (CAST(x'e9' AS TEXT))")
    with closing(evaluating()) as evaluator:
        verdict = ask(evaluator, str(path), "SELECT x FROM t", "SELECT x FROM t")
    assert verdict.reason is SqlReason.MATCH
    assert verdict.result_signature


def test_a_message_is_short_and_stable(guarded: GuardedConnection) -> None:
    error = refusal(guarded, "SELECT nope FROM t")
    assert (error.reason, str(error)) == (SqlReason.SQL_ERROR, "no such column: nope")
    assert len(str(refusal(guarded, f"SELECT 1 '{'x' * 9000}' '{'y' * 9000}'"))) <= 500


def test_a_missing_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnreadableError, match=r"missing\.db: No such file or directory"):
        GuardedConnection(tmp_path / "missing.db", SqlLimits())
    with pytest.raises(DatabaseUnreadableError, match="Is a directory"):
        GuardedConnection(tmp_path, SqlLimits())
    with pytest.raises(DatabaseUnreadableError, match="null"):
        GuardedConnection("nul\0.db", SqlLimits())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"name,age\nann,30\n", b"SQLite format 3", b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_file_that_is_not_sqlite_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.db"
    path.write_bytes(content)
    with pytest.raises(DatabaseUnreadableError, match=r"data\.db: .*(not a (SQLite )?database|malformed)"):
        GuardedConnection(path, SqlLimits())


def test_a_damaged_page_is_the_databases_fault(tmp_path: Path) -> None:
    path = build(tmp_path / "damaged.db", "CREATE TABLE t(x); INSERT INTO t VALUES (hex(zeroblob(3000)))")
    content = bytearray(path.read_bytes())
    content[4096:4120] = b"\xff" * 24
    path.write_bytes(content)
    with (
        closing(GuardedConnection(path, SqlLimits())) as connection,
        pytest.raises(DatabaseUnreadableError, match="malformed"),
    ):
        connection.query("SELECT x FROM t")


def test_changes_in_a_write_ahead_log_are_not_overlooked(tmp_path: Path) -> None:
    path = tmp_path / "wal.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.executescript("PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1)")
        with pytest.raises(DatabaseUnreadableError, match="write-ahead log"):
            GuardedConnection(path, SqlLimits())
    with closing(GuardedConnection(path, SqlLimits())) as connection:
        assert connection.query("SELECT x FROM t").rows == ((1,),)
    assert [file.name for file in tmp_path.iterdir()] == ["wal.db"]


def test_a_database_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = build(tmp_path / "a.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1)")
    with closing(evaluating()) as evaluator:
        assert ask(evaluator, str(path), "SELECT x FROM t", "SELECT max(x) FROM t").reason is SqlReason.MATCH
        build(tmp_path / "b.db", "CREATE TABLE t(x); INSERT INTO t VALUES (1), (2)").replace(path)
        verdict = ask(evaluator, str(path), "SELECT x FROM t", "SELECT max(x) FROM t")
    assert (verdict.reason, verdict.row_count) == (SqlReason.MISMATCH, 2)


def test_gold_is_judged_before_the_candidate(database: Path) -> None:
    with closing(evaluating()) as evaluator:
        verdict = ask(evaluator, str(database), "SELECT name FROM t", "SELECT nope FROM t")
        assert (verdict.reason, verdict.reason.outcome) == (SqlReason.GOLD_INVALID, "error")
        assert verdict.detail == "gold: sql_error: no such column: nope"
        assert (verdict.exec_pass, verdict.gold_match, verdict.row_count) == (True, None, 2)
        for gold in ("SELECT random()", "DROP TABLE t", "", "SELECT date('now') FROM t"):
            assert ask(evaluator, str(database), "SELECT 1", gold).reason is SqlReason.GOLD_INVALID


def test_without_gold_the_question_is_whether_it_executes(database: Path) -> None:
    with closing(evaluating()) as evaluator:
        passed = ask(evaluator, str(database), "SELECT 5")
        assert (passed.reason, passed.exec_pass, passed.gold_match) == (SqlReason.EXECUTED, True, None)
        failed = ask(evaluator, str(database), "SELEC 5")
        assert (failed.reason, failed.exec_pass, failed.reason.outcome) == (SqlReason.SQL_ERROR, False, "fail")


def test_a_gold_without_rows_is_weak(database: Path) -> None:
    with closing(evaluating()) as evaluator:
        assert ask(evaluator, str(database), "SELECT x FROM 'Mixed Case'", "SELECT id FROM t WHERE 0").weak_gold
        assert not ask(evaluator, str(database), "SELECT id FROM t", "SELECT id FROM t").weak_gold


def test_a_limit_without_an_order_is_ambiguous_unless_it_cuts_nothing(database: Path) -> None:
    with closing(evaluating()) as evaluator:
        cut = ask(evaluator, str(database), "SELECT name FROM t LIMIT 1", "SELECT name FROM t LIMIT 1")
        whole = ask(evaluator, str(database), "SELECT name FROM t", "SELECT name FROM t LIMIT 9")
    assert (cut.reason, whole.reason) == (SqlReason.GOLD_AMBIGUOUS, SqlReason.MATCH)


def test_ties_are_broken_whatever_the_collation(tmp_path: Path) -> None:
    path = build(
        tmp_path / "case.db",
        "CREATE TABLE t(a TEXT COLLATE NOCASE, b INT); INSERT INTO t VALUES ('x', 1), ('X', 1), ('y', 2)",
    )
    with closing(evaluating()) as evaluator:
        for gold in ("SELECT a FROM t ORDER BY b", "SELECT a FROM t UNION ALL SELECT b FROM t WHERE 0 ORDER BY a"):
            verdict = ask(evaluator, str(path), "SELECT a FROM t ORDER BY b, a COLLATE BINARY", gold)
            assert verdict.reason is SqlReason.MATCH, verdict
        for merge in ("UNION", "INTERSECT", "EXCEPT", "UNION ALL SELECT a FROM t UNION"):
            gold = f"SELECT a FROM t {merge} SELECT a FROM t WHERE b = 2 ORDER BY 1"
            assert ask(evaluator, str(path), gold, gold).reason is SqlReason.MATCH, merge


def test_order_and_columns_can_be_chosen(database: Path) -> None:
    gold, reverse = "SELECT id, name FROM t ORDER BY id", "SELECT name, id FROM t ORDER BY id DESC"
    path = str(database)
    with closing(evaluating()) as evaluator:
        assert ask(evaluator, path, reverse, gold).reason is SqlReason.MISMATCH
        assert ask(evaluator, path, reverse, gold, order="ignore").reason is SqlReason.MATCH
        assert ask(evaluator, path, reverse, gold, "strict", "ignore").reason is SqlReason.MISMATCH
        tied = ("SELECT name FROM t ORDER BY 1 = 1, id DESC", "SELECT name FROM t ORDER BY 1 = 1")
        assert ask(evaluator, path, *tied).reason is SqlReason.MATCH
        assert ask(evaluator, path, *tied, order="strict").reason is SqlReason.MISMATCH


def test_every_reason_has_an_outcome() -> None:
    outcomes = {outcome: {r.value for r in SqlReason if r.outcome == outcome} for outcome in ("pass", "error")}
    assert outcomes == {
        "pass": {"match", "executed"},
        "error": {
            "gold_invalid",
            "gold_ambiguous",
            "compare_budget",
            "infra_timeout",
            "sandbox_died",
            "database_unreadable",
        },
    }
