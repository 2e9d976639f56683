"""Execution gate for SQL: runs each candidate on a SQLite database, in a sandbox, and compares it with the gold query.

What is equal, what is safe and what each reason means is defined in `sql_equality` and `sqlite_guard`. A path that a
record gives is taken as it is: records are the user's own, and of a database only counts and hashes get out.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from fastdistill.core.errors import InputError
from fastdistill.core.files import sha256_file
from fastdistill.core.step import Context, Gate, Mutation
from fastdistill.core.types import Candidate, Outcome, Sample, Verdict
from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.execution.sqlite_worker import Evaluation, SqlJob
from fastdistill.data.execution.worker_pool import Death, WorkerPool
from fastdistill.data.template import compile_template, render


class SqlitePool(WorkerPool[SqlJob, Evaluation]):
    """A query that ends its worker twice is judged by the cause.

    CPU time spent is its own doing (`limit_cpu`), a wall clock that ran out is not (`infra_timeout`, an error, never a
    pass), nor is any other death (`sandbox_died`).
    """

    module = "fastdistill.data.execution.sqlite_worker"
    what = "sqlite"

    def __init__(self, workers: int | None = None, limits: SqlLimits | None = None, batch: int = 16) -> None:
        self._limits = limits or SqlLimits()
        super().__init__(workers, asdict(self._limits), self._limits.wall_s, batch)

    def from_wire(self, message: list[Any]) -> Evaluation:
        reason, *others = message
        return Evaluation(SqlReason(reason), *others)

    async def died(self, job: SqlJob, death: Death, judge: Callable[[SqlJob], Awaitable[Evaluation]], /) -> Evaluation:
        if death.cause == "cpu":  # the other query may have something to say
            return await judge(job._replace(spent=(*job.spent, death.phase)))
        if death.cause == "wall":
            late = f"{death.phase}: no answer within {self._limits.wall_s} s"
            return Evaluation(SqlReason.INFRA_TIMEOUT, detail=late)
        return Evaluation(SqlReason.SANDBOX_DIED, detail=f"{death.phase}: worker {death.status}")


class CopyPool(WorkerPool[list[str], str]):
    """Writes perturbed copies of a database: a job is its path and theirs, the result why that can't be done.

    Its process runs no query of a model.
    """

    module = "fastdistill.data.execution.sqlite_perturb"
    what = "sqlite copy"

    def __init__(self) -> None:
        super().__init__(1, {}, wall_s=None, batch=1)  # one: the cores are for the queries

    def from_wire(self, message: list[str]) -> str:
        return message[0]

    async def died(self, job: list[str], death: Death, *_: object) -> str:
        return f"worker {death.status}"


class SQLiteExecEval(Gate):
    """Passes candidates that execute (`require: exec_pass`) or that give the gold query's result (`gold_match`).

    A verdict's detail has `exec_pass`, `exec_error`, `gold_match`, `result_signature`, `row_count` and `weak_gold`.
    A gold query that can't judge is an `error`, never held against the candidate; on a perturbed copy it is left out.
    """

    version: ClassVar[int] = 3
    machine_only: ClassVar[frozenset[str]] = frozenset({"name", "workers"})
    alone: ClassVar[bool] = True

    db_path: str = Field(description='a SQLite file; may be a template over the record: "dbs/{{ db_id }}.sqlite"')
    gold_field: str | None = Field("gold_sql", description="the record's field with the gold query; null: none")
    require: Literal["gold_match", "exec_pass"] = "gold_match"
    columns: Literal["any", "strict"] = Field("any", description="any: columns may stand in another order")
    order: Literal["auto", "ignore", "strict"] = Field("auto", description="auto: rows in order where gold orders them")
    perturbations: int = Field(0, ge=0, le=16, description="perturbed copies of the database that must agree too")
    limits: SqlLimits = SqlLimits()
    workers: int | None = Field(None, gt=0, le=64, description="worker processes; by default one a core, two at most")

    # Of a step that is open, in its own `__dict__`: pydantic's private ones are slow.
    _pool: ClassVar[SqlitePool | None] = None
    _copier: ClassVar[CopyPool | None] = None
    _folder: ClassVar[str] = ""
    _copies: ClassVar[dict[str, tuple[list[str], asyncio.Future[str]]]] = {}  # their paths by that of a database
    _databases: ClassVar[dict[str, asyncio.Future[str | None]]] = {}  # sha256 by path, once read

    @field_validator("db_path")
    @classmethod
    def _compiles(cls, text: str) -> str:
        if "{{" in text:
            compile_template(text)
        return text

    @field_validator("limits")
    @classmethod
    def _limits_something(cls, limits: SqlLimits) -> SqlLimits:
        if odd := [name for name, limit in asdict(limits).items() if limit <= 0]:
            raise ValueError(f"{', '.join(odd)}: must be more than 0")
        return limits

    @model_validator(mode="after")
    def _gold_to_match(self) -> Self:
        if self.require == "gold_match" and self.gold_field is None:
            raise ValueError("require: gold_match needs gold_field; without gold use require: exec_pass")
        if self.require == "exec_pass" and self.perturbations:
            raise ValueError("perturbations: only with require: gold_match, for they compare with gold")
        return self

    def inputs(self) -> Sequence[Path]:
        return () if "{{" in self.db_path else (Path(self.db_path).expanduser(),)

    def inputs_for(self, sample: Sample) -> Sequence[Path]:
        return (Path(self._path(sample)),)

    def used(self) -> Mapping[Path, str]:
        whole = {path: read for path, read in self._databases.items() if read.done() and not read.cancelled()}
        return {Path(path): content for path, read in whole.items() if (content := read.result())}

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        """Raises InputError if `db_path` names one database and that can't be read."""
        async with AsyncExitStack() as stack:
            held = self.__dict__
            held["_pool"] = pool = await stack.enter_async_context(SqlitePool(self.workers, self.limits))
            for path in self.inputs():
                (trial,) = await pool.judge([SqlJob(str(path), "SELECT 1")])
                if trial.reason is SqlReason.DATABASE_UNREADABLE:
                    raise InputError(f"{self.name}.db_path: {trial.detail}")
            if self.perturbations:
                held["_folder"] = stack.enter_context(TemporaryDirectory(prefix="fastdistill-"))
                held["_copier"] = await stack.enter_async_context(CopyPool())
            held["_databases"], held["_copies"] = {}, {}
            try:
                yield
            finally:
                copying = [made for _, made in self._copies.values()]
                for made in copying:
                    made.cancel()
                await asyncio.gather(*self._databases.values(), *copying, return_exceptions=True)

    async def judge_all(self, candidates: Sequence[Candidate], sample: Sample, ctx: Context) -> list[Verdict]:
        path = self._path(sample)
        if path not in self._databases:
            self._databases[path] = asyncio.ensure_future(asyncio.to_thread(_sha256, path))
        gold = self.gold(sample)
        if gold is None and self.require == "gold_match":
            missing = f"{sample.source}: no query in field {self.gold_field!r}"
            return [self.verdict(Outcome.ERROR, SqlReason.GOLD_INVALID, detail=missing)] * len(candidates)
        assert self._pool is not None, "the gate is used inside `opened`"
        longest = self.limits.sql_bytes + 1  # one more is too long, and so are a million more: they cost only time
        answers = [c.answer[:longest] for c in candidates]
        jobs = [SqlJob(path, answer, gold and gold[:longest], self.columns, self.order) for answer in answers]
        verdicts = [self._verdict(seen) for seen in await self._pool.judge(jobs)]
        if self._copier is not None:
            matching = [at for at, verdict in enumerate(verdicts) if verdict.reason == SqlReason.MATCH]
            again = await self._on_copies([jobs[at] for at in matching], self._copier, self._pool)
            for at, (reason, found) in zip(matching, again, strict=True):
                detail = {k: value for k, value in {**verdicts[at].detail, **found}.items() if value is not None}
                verdicts[at] = self.verdict(Outcome(reason.outcome), reason, **detail)
        return verdicts

    async def _on_copies(
        self, jobs: Sequence[SqlJob], copier: CopyPool, pool: SqlitePool
    ) -> list[tuple[SqlReason, dict[str, Any]]]:
        """What queries that match gold on their database, the same one, come to on its copies."""
        if not jobs:
            return []
        path = jobs[0].db_path
        if path not in self._copies:
            places = [f"{self._folder}/{len(self._copies)}-{seed}.sqlite" for seed in range(self.perturbations)]
            self._copies[path] = places, asyncio.ensure_future(copier.evaluate([path, *places]))
        places, made = self._copies[path]
        if problem := await asyncio.shield(made):  # others wait for it too
            detail = f"database {path}: no perturbed copy: {problem}"
            return [(SqlReason.DATABASE_UNREADABLE, {"gold_match": None, "detail": detail})] * len(jobs)
        seen = await pool.judge([job._replace(db_path=place) for job in jobs for place in places])
        return [_agreement(seen[at : at + len(places)]) for at in range(0, len(seen), len(places))]

    def gold(self, sample: Sample) -> str | None:
        gold = None if self.gold_field is None else sample.record.get(self.gold_field)
        return gold if isinstance(gold, str) and gold.strip() else None

    def mutations(self, gold: str, sample: Sample) -> Sequence[Mutation]:
        from fastdistill.data.mutate_sql import mutate_sql

        return mutate_sql(gold, _columns(self._path(sample)))

    def stricter(self) -> "SQLiteExecEval":
        """Demands gold's result on more copies of the database than this gate does."""
        copies = max(8, min(16, 2 * self.perturbations))
        return type(self)(**(self.model_dump() | {"require": "gold_match", "perturbations": copies}))

    def _path(self, sample: Sample) -> str:
        path = self.db_path
        return _expanded(render(compile_template(path), sample) if "{{" in path else path)

    def _verdict(self, seen: Evaluation) -> Verdict:
        reason = seen.reason
        if self.require == "exec_pass" and seen.exec_pass:
            reason = SqlReason.EXECUTED  # whatever gold says
        elif self.require == "exec_pass" and seen.exec_pass is False and reason.outcome == "error":
            reason = SqlReason.SQL_ERROR
        shown: dict[str, Any] = {name: value for name, value in zip(_SHOWN, seen[1:], strict=True) if value is not None}
        return self.verdict(_OUTCOMES[reason], reason, **shown)


_SHOWN = Evaluation._fields[1:]  # all but the reason
_OUTCOMES = {reason: Outcome(reason.outcome) for reason in SqlReason}


def _agreement(seen: Sequence[Evaluation]) -> tuple[SqlReason, dict[str, Any]]:
    """The reason, and what a verdict's detail has of it. Only another result counts against a candidate."""
    differs = [seed for seed, each in enumerate(seen) if each.reason is SqlReason.MISMATCH]
    skipped = {str(seed): each.reason for seed, each in enumerate(seen) if each.reason is not SqlReason.MATCH}
    if differs:
        detail = f"another result than gold on the perturbed copy of seed {differs[0]}"
        return SqlReason.MISMATCH_PERTURBED, {"gold_match": False, "perturbed_match": False, "detail": detail}
    found: dict[str, Any] = {} if len(skipped) == len(seen) else {"perturbed_match": True}
    return SqlReason.MATCH, found | ({"perturbed_skipped": skipped} if skipped else {})


@lru_cache(maxsize=1024)
def _expanded(path: str) -> str:
    return str(Path(path).expanduser())


def _sha256(path: str) -> str | None:
    with suppress(OSError, ValueError):  # the worker says what is wrong with it
        return sha256_file(Path(path))
    return None


@lru_cache(maxsize=64)
def _columns(path: str) -> Mapping[str, Sequence[str]]:
    """The columns of each table, named in lower case; none if the database can't be read."""
    query = "SELECT lower(m.name), c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
    columns: dict[str, list[str]] = {}
    try:
        with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as database:
            for table, column in database.execute(query):
                columns.setdefault(table, []).append(column)
    except sqlite3.Error:
        return {}
    return columns
