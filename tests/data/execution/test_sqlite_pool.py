"""The whole engine: wanted verdicts, attacks, and worker processes that die, hang, or are killed from outside."""

import asyncio
import gc
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import chdir, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from fastdistill.core.errors import EnvironmentFault
from fastdistill.data.execution.sqlite import SqlitePool
from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.execution.sqlite_worker import Evaluation, SqlJob
from fastdistill.data.execution.worker_pool import PoolClosedError

T = TypeVar("T")
Runner = Callable[[Coroutine[Any, Any, T]], T]

ENDLESS_CALL = "SELECT printf('%.*c', 2147483647, 'x')"
"""One call into SQLite's C code that takes most of a minute and looks at no limit on the way."""

needs_proc = pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "people.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, age INT, score REAL, city TEXT);
            INSERT INTO t VALUES (1, 'ann', 30, 1.5, 'rome'), (2, 'bob', 25, 2.0, 'oslo'), (3, 'cyd', 30, NULL, 'rome'),
                (4, 'Dan', 41, 0.1, NULL), (5, 'eve', 25, 0.2, 'oslo');
            CREATE TABLE u(id INT, tid INT, v TEXT);
            INSERT INTO u VALUES (1, 1, '1'), (2, 1, '2'), (3, 2, '1'), (4, 3, '1.0');
            CREATE TABLE e(x INT);
            CREATE TABLE big(n INT, s TEXT);
            WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c LIMIT 1000)
                INSERT INTO big SELECT i, printf('%.100c', 'a') FROM c;
            """
        )
    return path


def judge(*jobs: SqlJob, workers: int = 2, limits: SqlLimits | None = None, batch: int = 16) -> list[Evaluation]:
    async def run() -> list[Evaluation]:
        async with SqlitePool(workers, limits, batch) as pool:
            return await pool.judge(jobs)

    return asyncio.run(run())


WANTED = {
    "T": {SqlReason.MATCH},
    "F": {SqlReason.MISMATCH, SqlReason.COLUMN_COUNT, SqlReason.SQL_ERROR, SqlReason.CONSTANT},
    "G": {SqlReason.GOLD_INVALID},
    "A": {SqlReason.GOLD_AMBIGUOUS},
    "C": {SqlReason.CONSTANT},
    "N": {SqlReason.NOT_A_QUERY},
    "D": {SqlReason.NONDETERMINISTIC},
}
"""Which reasons each letter of the table stands for."""

EDGE_CASES = [
    ("T", "SELECT name FROM t", "SELECT name FROM t ORDER BY name DESC"),
    ("F", "SELECT name FROM t ORDER BY id", "SELECT name FROM t ORDER BY id DESC"),
    ("F", "SELECT name FROM t ORDER BY age DESC", "SELECT name FROM t ORDER BY age"),
    ("T", "SELECT name FROM t ORDER BY age", "SELECT name FROM t ORDER BY age, id DESC"),
    ("A", "SELECT name FROM t ORDER BY age LIMIT 1", "SELECT name FROM t WHERE age = (SELECT min(age) FROM t)"),
    ("T", "SELECT name FROM t ORDER BY age DESC LIMIT 1", "SELECT name FROM t WHERE age = (SELECT max(age) FROM t)"),
    (
        "T",
        "SELECT name FROM t WHERE id IN (SELECT id FROM t ORDER BY id LIMIT 2)",
        "SELECT name FROM t WHERE id IN (2, 1) ORDER BY id DESC",
    ),
    ("T", "SELECT 'order by', name FROM t", "SELECT 'order by', name FROM t ORDER BY id DESC"),
    ("F", "SELECT name FROM t ORDER\n BY id", "SELECT name FROM t ORDER BY id DESC"),
    ("T", "SELECT name, age FROM t", "SELECT age, name FROM t"),
    ("F", "SELECT id, id FROM t", "SELECT id, 6 - id FROM t"),
    ("F", "SELECT name FROM t", "SELECT name, age FROM t"),
    ("F", "SELECT age FROM t", "SELECT DISTINCT age FROM t"),
    ("F", "SELECT DISTINCT city FROM t", "SELECT city FROM t"),
    ("F", "SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 2", "SELECT 1 UNION ALL SELECT 1 UNION ALL SELECT 2"),
    ("F", "SELECT name FROM t WHERE id IN (SELECT tid FROM u)", "SELECT t.name FROM t JOIN u ON u.tid = t.id"),
    ("T", "SELECT 2.0", "SELECT 2"),
    ("F", "SELECT 1", "SELECT '1'"),
    ("F", "SELECT 1.0", "SELECT '1.0'"),
    ("F", "SELECT 40.0", "SELECT 0.4"),
    ("T", "SELECT 0.3", "SELECT 0.1 + 0.2"),
    ("T", "SELECT (0.3 + 0.2 + 0.1) / 3", "SELECT (0.1 + 0.2 + 0.3) / 3"),
    ("F", "SELECT 2.0 / 3", "SELECT round(2.0 / 3, 2)"),
    ("F", "SELECT 2.0 / 3", "SELECT 2 / 3"),
    ("F", "SELECT 9007199254740992.0", "SELECT 9007199254740993"),
    ("T", "SELECT 0", "SELECT -0.0"),
    ("T", "SELECT 1e999", "SELECT 9e999"),
    ("T", "SELECT 1", "SELECT id = 1 FROM t WHERE id = 1"),
    ("T", "SELECT score FROM t WHERE id = 3", "SELECT NULL FROM t WHERE id = 3"),
    ("C", "SELECT score FROM t WHERE id = 3", "SELECT NULL"),
    ("F", "SELECT score FROM t WHERE id = 3", "SELECT 0 FROM t WHERE id = 3"),
    ("F", "SELECT city FROM t WHERE id = 4", "SELECT '' FROM t WHERE id = 4"),
    ("F", "SELECT city FROM t WHERE id = 4", "SELECT 'None' FROM t WHERE id = 4"),
    ("T", "SELECT name FROM t WHERE id > 99", "SELECT name FROM t WHERE 0"),
    ("F", "SELECT name FROM t WHERE id > 99", "SELECT name, age FROM t WHERE 0"),
    ("F", "SELECT x FROM e", "SELECT max(x) FROM e"),
    ("N", "SELECT x FROM e", ""),
    ("N", "SELECT x FROM e", "-- no query"),
    ("N", "SELECT x FROM e", "CREATE TEMP TABLE zz(a)"),
    ("N", "SELECT x FROM e", "PRAGMA query_only"),
    ("N", "SELECT 1", "SELECT 1; SELECT 2"),
    ("G", "SELECT nope2 FROM t", "SELECT nope FROM t"),
    ("F", "SELECT name FROM t WHERE age >= 30", "SELECT name FROM t WHERE age > = 30"),
    ("F", "SELECT 'dan'", "SELECT 'Dan'"),
    ("F", "SELECT 'ann'", "SELECT 'ann '"),
    ("F", "SELECT 'ann'", "SELECT x'616e6e'"),
    ("C", "SELECT count(*) FROM t", "SELECT 5"),
    ("F", "SELECT count(*) FROM t", "SELECT count(score) FROM t"),
    ("F", "SELECT 1", "SELEC 1"),
    ("F", "SELECT age, id FROM t", "SELECT age, age FROM t"),
    ("T", "SELECT 1", "SELECT 1 ;\n ;"),
    ("T", "SELECT name AS m FROM t", "SELECT name AS n FROM t"),
    ("D", "SELECT 0", "SELECT abs(random()) % 1"),
]


@pytest.fixture(scope="module")
def edge_verdicts(database: Path) -> list[Evaluation]:
    return judge(*(SqlJob(str(database), candidate, gold) for _, gold, candidate in EDGE_CASES))


@pytest.mark.parametrize("index", range(len(EDGE_CASES)), ids=[f"{w}: {g} || {c}" for w, g, c in EDGE_CASES])
def test_edge_case(edge_verdicts: list[Evaluation], index: int) -> None:
    verdict = edge_verdicts[index]
    letter = EDGE_CASES[index][0]
    assert verdict.reason in WANTED[letter]
    assert verdict.reason.outcome == {"T": "pass", "G": "error", "A": "error"}.get(letter, "fail")
    assert verdict.gold_match == {"pass": True, "fail": False, "error": None}[verdict.reason.outcome]


DOUBLING = ", ".join(
    [
        "a0 AS (SELECT 1 AS x)",
        *(f"a{i} AS (SELECT * FROM a{i - 1} UNION ALL SELECT * FROM a{i - 1})" for i in range(1, 29)),
    ]
)
ATTACKS: list[tuple[SqlReason, str]] = [
    # Endless work
    (SqlReason.LIMIT_OPS, "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) SELECT count(*) FROM c"),
    (SqlReason.LIMIT_OPS, "SELECT count(*) FROM big a, big b, big c, big d, big e"),
    (SqlReason.LIMIT_OPS, f"SELECT count(*) FROM {', '.join(f't t{i}' for i in range(64))}"),
    (SqlReason.LIMIT_OPS, "SELECT group_concat(a.s) FROM big a, big b, big c"),
    (SqlReason.LIMIT_CPU, ENDLESS_CALL),
    (SqlReason.CONSTANT, "SELECT instr(zeroblob(90000), zeroblob(45000) || x'01')"),
    (SqlReason.MISMATCH, "SELECT count(*) FROM big WHERE s LIKE '%a%a%a%a%a%a%a%a%a%a%a%ab'"),
    (SqlReason.SQL_ERROR, "SELECT s LIKE '%' || replace(hex(zeroblob(12000)), '0', 'a') FROM big"),
    # Endless memory or output
    (SqlReason.LIMIT_ROWS, "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) SELECT i FROM c"),
    (SqlReason.LIMIT_BYTES, "SELECT hex(zeroblob(400000000))"),
    (SqlReason.LIMIT_BYTES, "SELECT instr(zeroblob(4000000), zeroblob(2000000) || x'01')"),
    (SqlReason.LIMIT_BYTES, f"SELECT {', '.join(['zeroblob(98000)'] * 100)} FROM big"),
    (SqlReason.LIMIT_BYTES, "SELECT group_concat(s || s || s || s || s || s) FROM big"),
    (SqlReason.CONSTANT, "SELECT printf('%900000000d', 1)"),
    (SqlReason.LIMIT_MEMORY, f"WITH {DOUBLING} SELECT count(*) FROM a28"),
    (SqlReason.LIMIT_MEMORY, "SELECT a.s FROM big a, big b, big c ORDER BY b.s, a.s, c.n"),
    (SqlReason.LIMIT_MEMORY, "SELECT sum(a.n) OVER (ORDER BY b.s) FROM big a, big b"),
    # Writing
    *(
        (SqlReason.NOT_A_QUERY, sql)
        for sql in (
            "DROP TABLE t",
            "DELETE FROM t",
            "INSERT INTO t(name) VALUES ('x') RETURNING name",
            "REPLACE INTO t(id) VALUES (1)",
            "WITH x AS (SELECT 1) DELETE FROM t",
            "WITH x AS (SELECT 1) UPDATE t SET age = 1 RETURNING age",
            "WITH x AS (SELECT 1) INSERT INTO t(name) SELECT 'z'",
            "CREATE TEMP TABLE t AS SELECT 'ann' AS name",
            "CREATE TEMP VIEW t AS SELECT 'ann' AS name",
            "ATTACH 'evil.db' AS evil",
            "DETACH main",
            "VACUUM",
            "VACUUM INTO 'evil.db'",
            "BEGIN",
            "SAVEPOINT a",
            "REINDEX",
            "ANALYZE",
            "PRAGMA query_only = 0",
            "PRAGMA writable_schema = 1",
            "PRAGMA hard_heap_limit = 0",
            "/* SELECT */ PRAGMA journal_mode = DELETE",
            "EXPLAIN SELECT name FROM t",
            "EXPLAIN QUERY PLAN SELECT name FROM t",
            "SELECT name FROM t; DROP TABLE t",
            "   ",
            "/* unterminated",
        )
    ),
    # Looking elsewhere
    (SqlReason.FORBIDDEN, "SELECT * FROM sqlite_master"),
    (SqlReason.FORBIDDEN, "SELECT name FROM sqlite_schema"),
    (SqlReason.FORBIDDEN, "SELECT name FROM t WHERE EXISTS (SELECT 1 FROM sqlite_master)"),
    (SqlReason.FORBIDDEN, "SELECT * FROM pragma_table_info('t')"),
    (SqlReason.FORBIDDEN, "SELECT * FROM pragma_database_list"),
    (SqlReason.NONDETERMINISTIC, "SELECT randomblob(900000000)"),
    (SqlReason.SQL_ERROR, "SELECT readfile('/etc/passwd')"),
    (SqlReason.SQL_ERROR, "SELECT writefile('evil', 'x')"),
    # Text made to break a parser
    (SqlReason.SQL_ERROR, f"SELECT {'(' * 3000}1{')' * 3000}"),
    (SqlReason.SQL_ERROR, f"SELECT {'NOT ' * 3000}1"),
    (SqlReason.SQL_ERROR, f"SELECT {'(SELECT ' * 300}1{')' * 300}"),
    (SqlReason.SQL_ERROR, " UNION ALL ".join(["SELECT 1"] * 2000)),
    (SqlReason.SQL_ERROR, f"SELECT {', '.join(['1'] * 16000)}"),
    (SqlReason.SQL_ERROR, f"SELECT '{'x' * 10_000_000}'"),
    (SqlReason.SQL_ERROR, f"SELECT '{'é' * 30_000}'"),
    (SqlReason.SQL_ERROR, "SELECT name FROM t\0; DROP TABLE t"),
    (SqlReason.SQL_ERROR, "SELECT '\ud800'"),
    (SqlReason.SQL_ERROR, "SELECT ?"),
    (SqlReason.SQL_ERROR, "SELECT :name"),
    (SqlReason.SQL_ERROR, "Sure! Here is the query:\n```sql\nSELECT name FROM t\n```"),
]


class Attacked(NamedTuple):
    verdicts: list[Evaluation]
    afterwards: list[Evaluation]
    """The verdict on the harmless query that followed each attack in the same worker."""
    files: list[Path]
    """What lay in the working directory and beside the database when all was over."""
    intact: bool


@pytest.fixture(scope="module")
def attacked(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    content = database.read_bytes()
    attacks = [SqlJob(str(database), sql, "SELECT name FROM t") for _, sql in ATTACKS]
    harmless = SqlJob(str(database), "SELECT t.name FROM t", "SELECT name FROM t")
    here = tmp_path_factory.mktemp("here")
    with chdir(here):
        verdicts = judge(*(job for attack in attacks for job in (attack, harmless)), workers=1)
    files = [*here.iterdir(), *database.parent.iterdir()]
    return Attacked(verdicts[::2], verdicts[1::2], files, database.read_bytes() == content)


@pytest.mark.parametrize("index", range(len(ATTACKS)), ids=[ascii(sql[:60]) for _, sql in ATTACKS])
def test_attack(attacked: Attacked, index: int) -> None:
    verdict = attacked.verdicts[index]
    assert verdict.reason is ATTACKS[index][0]
    assert (verdict.reason.outcome, verdict.gold_match) == ("fail", False)
    assert attacked.afterwards[index].reason is SqlReason.MATCH


def test_attacks_leave_no_trace(attacked: Attacked, database: Path) -> None:
    assert attacked.intact
    assert attacked.files == [database]


@pytest.mark.parametrize("function", ["load_extension('x')", "fts3_tokenizer('simple')"])
def test_functions_outside_the_list_are_refused_or_absent(database: Path, function: str) -> None:
    (verdict,) = judge(SqlJob(str(database), f"SELECT {function}"))
    assert verdict.reason in (SqlReason.FORBIDDEN, SqlReason.SQL_ERROR)


@pytest.mark.parametrize(
    "sql", ["SELECT '\ud800'", "a\0b", "", f"SELECT '{'x' * 10_000_000}'", "SELECT name FROM gone"]
)
def test_gold_of_any_kind_is_survived(database: Path, sql: str) -> None:
    (verdict,) = judge(SqlJob(str(database), "SELECT name FROM t", sql))
    assert (verdict.reason, verdict.exec_pass, verdict.gold_match) == (SqlReason.GOLD_INVALID, True, None)


def test_a_database_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, though long enough to be one")
    jobs = [SqlJob(path, "SELECT 1", "SELECT 1") for path in (str(text), str(tmp_path / "gone.db"), "nul\0.db")]
    verdicts = judge(*jobs)
    assert {verdict.reason for verdict in verdicts} == {SqlReason.DATABASE_UNREADABLE}
    assert {(verdict.reason.outcome, verdict.exec_pass) for verdict in verdicts} == {("error", None)}
    assert "not a SQLite database" in str(verdicts[0].detail)
    assert "No such file" in str(verdicts[1].detail)


def test_a_query_that_kills_its_worker_costs_no_other_query_anything(database: Path) -> None:
    deadly = {5, 11}
    jobs = [
        SqlJob(str(database), ENDLESS_CALL if i in deadly else f"SELECT n FROM big WHERE n < {i}", "SELECT n FROM big")
        for i in range(16)
    ]
    verdicts = judge(*jobs, workers=1, limits=SqlLimits(cpu_s=0.2))
    assert [v.reason is SqlReason.LIMIT_CPU for v in verdicts] == [i in deadly for i in range(16)]
    assert [v.row_count for i, v in enumerate(verdicts) if i not in deadly] == [i for i in range(16) if i not in deadly]
    assert {v.exec_error for i, v in enumerate(verdicts) if i in deadly} == {"more than 0.2 s of CPU time"}


def test_gold_that_kills_its_worker_is_no_fault_of_the_candidate(database: Path) -> None:
    good, bad = judge(
        SqlJob(str(database), "SELECT name FROM t", ENDLESS_CALL),
        SqlJob(str(database), ENDLESS_CALL, "SELECT name FROM u"),
        limits=SqlLimits(cpu_s=0.2),
    )
    assert (good.reason, good.exec_pass, good.gold_match, good.row_count) == (SqlReason.GOLD_INVALID, True, None, 5)
    assert "limit_cpu" in str(good.detail)
    assert bad.reason is SqlReason.GOLD_INVALID


def test_a_wall_clock_that_runs_out_blames_nobody(database: Path) -> None:
    slow, next_one = judge(
        SqlJob(str(database), ENDLESS_CALL, "SELECT name FROM t"),
        SqlJob(str(database), "SELECT name FROM t", "SELECT name FROM t"),
        workers=1,
        limits=SqlLimits(cpu_s=60, wall_s=1),
    )
    assert (slow.reason, slow.reason.outcome, slow.exec_pass, slow.gold_match) == (
        SqlReason.INFRA_TIMEOUT,
        "error",
        None,
        None,
    )
    assert next_one.reason is SqlReason.MATCH


def test_columns_too_alike_to_tell_apart_are_an_error(database: Path) -> None:
    """Two Hadamard matrices of order 32, of different kinds."""
    squares = {x * x % 31 for x in range(1, 31)}
    core = [[1 if (j - i) % 31 in squares else -1 for j in range(31)] for i in range(31)]
    paley = [[1] * 32, *([1, *row] for row in core)]
    sylvester = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    gold, candidate = (
        "VALUES " + ", ".join(f"({', '.join(map(str, row))})" for row in matrix) for matrix in (paley, sylvester)
    )
    (verdict,) = judge(SqlJob(str(database), candidate, gold))
    assert (verdict.reason, verdict.reason.outcome, verdict.gold_match) == (SqlReason.COMPARE_BUDGET, "error", None)


def test_every_caller_gets_its_own_answer(database: Path) -> None:
    jobs = [SqlJob(str(database), f"SELECT n FROM big WHERE n < {i}") for i in range(500)]
    verdicts = judge(*jobs, batch=4)
    assert [verdict.row_count for verdict in verdicts] == list(range(500))


def test_a_relative_path_is_relative_to_the_caller(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(database.parent)
    assert judge(SqlJob(database.name, "SELECT 1"))[0].reason is SqlReason.EXECUTED


def test_what_spends_its_cpu_time_alone_is_not_run_again(
    database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, starts = tmp_path / "python", tmp_path / "starts"
    python.write_text(f'#!/bin/sh\necho >> {starts}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (verdict,) = judge(SqlJob(str(database), ENDLESS_CALL), workers=1, limits=SqlLimits(cpu_s=0.2))
    assert verdict.reason is SqlReason.LIMIT_CPU
    assert len(starts.read_text()) == 2  # the second worker is asked what else there is to say


def test_a_worker_that_is_killed_while_it_starts_ends_no_run(
    database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, been = tmp_path / "python", tmp_path / "been"
    python.write_text(f'#!/bin/sh\nmkdir {been} 2> /dev/null && kill -9 $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert judge(SqlJob(str(database), "SELECT 1"), workers=1)[0].reason is SqlReason.EXECUTED
    assert been.exists()


@pytest.mark.parametrize(
    ("executable", "message"),
    [
        (str(shutil.which("false")), "ended with status 1 before it was ready"),
        ("/no/python", "/no/python: No such file"),
    ],
)
def test_a_worker_that_cannot_start_is_reported(
    database: Path, monkeypatch: pytest.MonkeyPatch, executable: str, message: str
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(EnvironmentFault, match=message):
        judge(SqlJob(str(database), "SELECT 1"), SqlJob(str(database), "SELECT 2"))


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.01)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Coroutine[Any, Any, object]], object]]:
    """Runs a coroutine under either event loop, and then checks that no process and no transport is left."""
    before = children()
    factory = None if request.param == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run
    assert children() == before
    gc.collect()  # an unclosed transport warns here


@needs_proc
@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_worker_killed_while_idle_is_replaced(database: Path, run: Runner[None], pause: float) -> None:
    async def scenario() -> None:
        before = children()
        async with SqlitePool(1) as pool:
            await pool.judge([SqlJob(str(database), "SELECT 1")])
            (worker,) = children() - before
            os.kill(worker, signal.SIGKILL)
            await asyncio.sleep(pause)  # so that the loop knows, or does not
            (verdict,) = await pool.judge([SqlJob(str(database), "SELECT 2")])
            assert verdict.reason is SqlReason.EXECUTED

    run(scenario())


@needs_proc
def test_a_worker_killed_twice_from_outside_is_an_error(database: Path, run: Runner[None]) -> None:
    async def scenario() -> None:
        before = children()
        async with SqlitePool(1, SqlLimits(cpu_s=60, wall_s=60)) as pool:
            pending = asyncio.ensure_future(pool.judge([SqlJob(str(database), ENDLESS_CALL, "SELECT 1")]))
            killed: set[int] = set()
            while len(killed) < 2:
                await until(lambda: bool(children() - before - killed))
                (worker,) = children() - before - killed
                await until(lambda worker=worker: cpu_ticks(worker) > 20)  # type: ignore[misc]
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
            (verdict,) = await pending
        assert (verdict.reason, verdict.reason.outcome, verdict.gold_match) == (SqlReason.SANDBOX_DIED, "error", None)
        assert verdict.detail == "candidate: worker killed by SIGKILL"

    run(scenario())


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


def cpu_ticks(pid: int) -> int:
    with suppress(FileNotFoundError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


@needs_proc
def test_a_cancelled_caller_disturbs_nobody(database: Path, run: Runner[None]) -> None:
    async def scenario() -> None:
        async with SqlitePool(1, SqlLimits(cpu_s=0.3)) as pool:
            slow = asyncio.ensure_future(pool.judge([SqlJob(str(database), ENDLESS_CALL)]))
            others = [asyncio.ensure_future(pool.judge([SqlJob(str(database), f"SELECT {i}")])) for i in range(20)]
            await asyncio.sleep(0.05)
            slow.cancel()
            others[3].cancel()
            answers = await asyncio.gather(*others, return_exceptions=True)
            assert isinstance(answers.pop(3), asyncio.CancelledError)
            assert {a[0].reason for a in answers if isinstance(a, list)} == {SqlReason.EXECUTED}
            assert len(answers) == 19

    run(scenario())


@needs_proc
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.3])
def test_cancelling_the_owner_leaves_no_process(database: Path, run: Runner[None], delay: float) -> None:
    """Whether its workers are not started yet, just starting, or busy."""

    async def owner() -> None:
        async with SqlitePool(2, SqlLimits(cpu_s=900, wall_s=900)) as pool:
            await asyncio.gather(*(pool.judge([SqlJob(str(database), ENDLESS_CALL)]) for _ in range(40)))

    async def scenario() -> None:
        task = asyncio.ensure_future(owner())
        await asyncio.sleep(delay)
        task.cancel()
        async with asyncio.timeout(60):  # by their limits its queries would go on for longer
            with pytest.raises(asyncio.CancelledError):
                await task

    run(scenario())


@needs_proc
def test_closing_answers_those_who_wait(database: Path, run: Runner[None]) -> None:
    async def scenario() -> None:
        async with SqlitePool(1, batch=2) as pool:
            waiting = [asyncio.ensure_future(pool.judge([SqlJob(str(database), ENDLESS_CALL)])) for _ in range(30)]
            await asyncio.sleep(0.05)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(answer) for answer in answers} == {PoolClosedError}
        with pytest.raises(PoolClosedError):
            await pool.judge([SqlJob(str(database), "SELECT 1")])

    run(scenario())


@needs_proc
def test_an_error_of_the_owner_comes_out_as_it_is(run: Runner[None]) -> None:
    async def scenario() -> None:
        async with SqlitePool(1):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(scenario())


@needs_proc
def test_the_event_loop_stays_free(database: Path, run: Runner[None]) -> None:
    async def scenario() -> None:
        async with SqlitePool(1, SqlLimits(cpu_s=0.3)) as pool:
            pending = asyncio.ensure_future(pool.judge([SqlJob(str(database), ENDLESS_CALL)]))
            beats = 0
            while not pending.done():
                await asyncio.sleep(0.01)
                beats += 1
            assert beats >= 10

    run(scenario())


@needs_proc
def test_a_worker_inherits_no_secrets(database: Path, run: Runner[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    async def scenario() -> None:
        before = children()
        async with SqlitePool(1) as pool:
            await pool.judge([SqlJob(str(database), "SELECT 1")])
            (worker,) = children() - before
            environment = environment_of(worker)
            assert "sk-secret" not in environment
            assert {line.partition("=")[0] for line in environment.split("\0") if line} <= {
                "LD_LIBRARY_PATH",
                "PYTHONHOME",
                "PYTHONPATH",
                "TZ",
            }

    run(scenario())
