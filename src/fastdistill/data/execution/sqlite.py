"""Execution gate for SQL: runs each candidate on a SQLite database, in a sandbox, and compares it with the gold query.

What is equal, what is safe and what each reason means is defined in `sql_equality` and `sqlite_guard`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from fastdistill.core.errors import InputError
from fastdistill.core.step import Context, Gate
from fastdistill.core.types import Candidate, Outcome, Sample, Verdict
from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.execution.sqlite_pool import SqlitePool
from fastdistill.data.execution.sqlite_worker import Evaluation, SqlJob
from fastdistill.data.template import compile_template, render

if TYPE_CHECKING:
    from jinja2 import Template


class SQLiteExecEval(Gate):
    """Passes candidates that execute (`require: exec_pass`) or that give the gold query's result (`gold_match`).

    A verdict's detail has `exec_pass`, `exec_error`, `gold_match`, `result_signature`, `row_count` and `weak_gold`.
    A gold query that can't judge is an `error`, never held against the candidate.
    """

    machine_only: ClassVar[frozenset[str]] = frozenset({"name", "workers"})
    alone: ClassVar[bool] = True

    db_path: str = Field(description='a SQLite file; may be a template over the record: "dbs/{{ db_id }}.sqlite"')
    gold_field: str | None = Field("gold_sql", description="the record's field with the gold query; null: none")
    require: Literal["gold_match", "exec_pass"] = "gold_match"
    columns: Literal["any", "strict"] = Field("any", description="any: columns may stand in another order")
    order: Literal["auto", "ignore", "strict"] = Field("auto", description="auto: rows in order where gold orders them")
    limits: SqlLimits = SqlLimits()
    workers: int | None = Field(None, gt=0, le=64, description="worker processes; by default one a core, two at most")

    _pool: SqlitePool | None = PrivateAttr(None)
    _used: set[Path] = PrivateAttr(default_factory=set)

    @field_validator("db_path")
    @classmethod
    def _compiles(cls, text: str) -> str:
        if "{{" in text:
            compile_template(text)
        return text

    @model_validator(mode="after")
    def _gold_to_match(self) -> Self:
        if self.require == "gold_match" and self.gold_field is None:
            raise ValueError("require: gold_match needs gold_field; without gold use require: exec_pass")
        return self

    def inputs(self) -> Sequence[Path]:
        """The database, or all that the records seen so far have named."""
        return sorted(self._used) if self._template else (Path(self.db_path).expanduser(),)

    def inputs_for(self, sample: Sample) -> Sequence[Path]:
        return (Path(self._path(sample)),)

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        """Raises InputError if `db_path` names one database and that can't be read."""
        async with SqlitePool(self.workers, self.limits) as pool:
            for path in () if self._template else self.inputs():
                trial = await pool.evaluate(SqlJob(str(path), "SELECT 1"))
                if trial.reason is SqlReason.DATABASE_UNREADABLE:
                    raise InputError(f"{self.name}.db_path: {trial.detail}")
            self._pool = pool
            try:
                yield
            finally:
                self._pool = None

    async def judge_all(self, candidates: Sequence[Candidate], sample: Sample, ctx: Context) -> list[Verdict]:
        path = self._path(sample)
        gold = self._gold(sample)
        if isinstance(gold, Verdict):
            return [gold] * len(candidates)
        pool = self._pool
        assert pool is not None, "the gate is used inside `opened`"
        jobs = [SqlJob(path, c.answer, gold, self.columns, self.order) for c in candidates]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(pool.evaluate(job)) for job in jobs]
        return [self._verdict(task.result()) for task in tasks]

    def _path(self, sample: Sample) -> str:
        path = Path(render(self._template, sample) if self._template else self.db_path).expanduser()
        self._used.add(path)
        return str(path)

    def _gold(self, sample: Sample) -> str | Verdict | None:
        """The gold query, None where none is wanted, or the verdict on a record that should have one."""
        if self.gold_field is None:
            return None
        gold = sample.record.get(self.gold_field)
        if isinstance(gold, str) and gold.strip():
            return gold
        if self.require == "exec_pass":
            return None
        detail = f"{sample.source}: no query in field {self.gold_field!r}"
        return self.verdict(Outcome.ERROR, SqlReason.GOLD_INVALID, detail=detail)

    def _verdict(self, seen: Evaluation) -> Verdict:
        reason = seen.reason
        if self.require == "exec_pass" and seen.exec_pass:
            reason = SqlReason.EXECUTED  # whatever gold says
        elif self.require == "exec_pass" and seen.exec_pass is False and reason.outcome == "error":
            reason = SqlReason.SQL_ERROR
        hidden = {"reason", "sqlite_version"} | (set() if seen.near_limit else {"near_limit"})
        shown = {name: value for name, value in asdict(seen).items() if value not in (None, ()) and name not in hidden}
        return self.verdict(Outcome(reason.outcome), reason, **shown)

    @cached_property
    def _template(self) -> "Template | None":
        return compile_template(self.db_path) if "{{" in self.db_path else None
