"""The gate as a step: several databases, perturbed copies, and what is told of both."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from pydantic import ValidationError

from fastdistill.core.types import Outcome, Sample, Verdict
from fastdistill.data.execution.sqlite import SQLiteExecEval
from tests.context import TestContext, candidate

GOLD = "SELECT name FROM t WHERE age > 30"


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two databases of 200 people; in `b` one more."""
    for name, people in (("a", 200), ("b", 201)):
        with closing(sqlite3.connect(tmp_path / f"{name}.sqlite")) as connection:
            connection.executescript(
                f"""
                CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, age INT);
                WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT {people})
                    INSERT INTO t SELECT i, 'name ' || i, 20 + i % 50 FROM c;
                """
            )
    return tmp_path


def judged(
    ctx: TestContext, gate: SQLiteExecEval, *answers: tuple[str, str], gold: str = GOLD
) -> tuple[list[Verdict], dict[Path, str]]:
    """A verdict for each pair of a database's id and an answer, and the databases that were read."""

    async def run() -> list[Verdict]:
        async with gate.opened(ctx):
            samples = [
                Sample(at, f"t:{at}", {"db_id": db, "gold_sql": gold}, candidates=(candidate(answer),))
                for at, (db, answer) in enumerate(answers)
            ]
            seen = await asyncio.gather(*(gate.run(sample, ctx) for sample in samples))
            return [sample.candidates[0].verdicts[0] for sample in seen]

    return asyncio.run(run()), dict(gate.used())


def test_a_database_that_cannot_be_read_is_an_error_of_its_record_alone(ctx: TestContext, folder: Path) -> None:
    (folder / "text.sqlite").write_text("not a database, though long enough to look like one")
    gate = SQLiteExecEval(db_path=f"{folder}/{{{{ db_id }}}}.sqlite")
    ids = ("a", "missing", "b", "text", "nul\0", "../" + folder.name + "/a")
    verdicts, used = judged(ctx, gate, *((db, GOLD) for db in ids))
    assert [str(verdict.outcome) for verdict in verdicts] == ["pass", "error", "pass", "error", "error", "pass"]
    assert {v.reason for v in verdicts if v.outcome is Outcome.ERROR} == {"database_unreadable"}
    read = {folder / "a.sqlite", folder / "b.sqlite", folder / "text.sqlite", folder / ".." / folder.name / "a.sqlite"}
    assert used == {path: sha256(path.read_bytes()).hexdigest() for path in read}


def test_what_is_right_by_luck_fails_on_a_perturbed_copy(ctx: TestContext, folder: Path) -> None:
    answers = (GOLD, "SELECT name FROM t WHERE NOT age <= 30", "SELECT name FROM t WHERE id % 50 NOT BETWEEN 0 AND 10")
    pairs = [("a", answer) for answer in answers]
    plain, _ = judged(ctx, SQLiteExecEval(db_path=str(folder / "a.sqlite")), *pairs)
    assert [verdict.reason for verdict in plain] == ["match", "match", "match"]
    strict, _ = judged(ctx, SQLiteExecEval(db_path=str(folder / "a.sqlite"), perturbations=2), *pairs)
    assert [verdict.reason for verdict in strict] == ["match", "match", "mismatch_perturbed"]
    assert [verdict.detail["perturbed_match"] for verdict in strict] == [True, True, False]
    lucky = strict[2]
    assert (lucky.outcome, lucky.detail["gold_match"], lucky.detail["exec_pass"]) == (Outcome.FAIL, False, True)
    assert lucky.detail["detail"] == "another result than gold on the perturbed copy of seed 0"
    assert lucky.detail["row_count"] == plain[2].detail["row_count"]
    assert {path.name for path in folder.glob("*.sqlite")} == {"a.sqlite", "b.sqlite", "index.sqlite"}


def test_a_copy_on_which_gold_cannot_judge_is_left_out(ctx: TestContext, tmp_path: Path) -> None:
    """The second oldest comes just behind the oldest: on a copy they may be of one age, or gone."""
    path = tmp_path / "few.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t(name TEXT, age INT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(f"n{i}", 40 + i // 8 + (i == 31)) for i in range(32)])
        connection.commit()
    gold = "SELECT name FROM t ORDER BY age DESC LIMIT 1"
    gate = SQLiteExecEval(db_path=str(path), perturbations=4)
    (verdict,), _ = judged(ctx, gate, ("", "SELECT name FROM t ORDER BY age DESC, name LIMIT 1"), gold=gold)
    skipped: dict[str, Any] = verdict.detail["perturbed_skipped"]
    assert verdict.reason == "match"
    assert skipped and set(skipped.values()) == {"gold_ambiguous"}


def test_a_database_that_cannot_be_copied_is_an_error(ctx: TestContext, folder: Path) -> None:
    with closing(sqlite3.connect(folder / "a.sqlite")) as connection:
        connection.create_function("ours", 1, lambda value: value, deterministic=True)
        connection.execute("CREATE INDEX i ON t(ours(name))")
    gate = SQLiteExecEval(db_path=str(folder / "a.sqlite"), perturbations=1)
    verdicts, _ = judged(ctx, gate, ("a", GOLD), ("a", "SELECT 1"))
    assert (verdicts[0].outcome, verdicts[0].reason) == (Outcome.ERROR, "database_unreadable")
    assert "no perturbed copy" in verdicts[0].detail["detail"]
    assert "gold_match" not in verdicts[0].detail
    assert verdicts[1].reason == "constant"


def test_a_limit_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="cpu_s: must be more than 0"):
        SQLiteExecEval.model_validate({"db_path": "a.sqlite", "limits": {"cpu_s": 0}})


def test_perturbations_need_a_gold_to_compare_with() -> None:
    with pytest.raises(ValidationError, match="perturbations: only with require: gold_match"):
        SQLiteExecEval(db_path="a.db", require="exec_pass", perturbations=1)


def test_candidates_of_one_sample_keep_their_order(ctx: TestContext, folder: Path) -> None:
    gate = SQLiteExecEval(db_path=str(folder / "a.sqlite"), perturbations=1)
    answers = ("SELECT 1", GOLD, "SELEC", "SELECT name FROM t WHERE id % 50 NOT BETWEEN 0 AND 10", GOLD)

    async def run() -> Sample:
        several = tuple(replace(candidate(answer), candidate_id=str(at)) for at, answer in enumerate(answers))
        async with gate.opened(ctx):
            return await gate.run(Sample(0, "t:0", {"gold_sql": GOLD}, candidates=several), ctx)

    reasons = [c.verdicts[0].reason for c in asyncio.run(run()).candidates]
    assert reasons == ["constant", "match", "sql_error", "mismatch_perturbed", "match"]
