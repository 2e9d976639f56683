"""Judges SQL in worker processes (`sqlite_worker`) from asyncio: one bad query costs no other query anything.

A query that ends its worker twice is judged by the cause: CPU time spent is the query's own doing (`limit_cpu`), a wall
clock that ran out is not (`infra_timeout`, an error, never a pass), nor is any other death (`sandbox_died`).
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.execution.sqlite_worker import Evaluation, Phase, SqlJob, evaluation_from_wire, to_wire
from fastdistill.data.execution.worker_pool import Cause, Death, WorkerPool


class SqlitePool(WorkerPool[SqlJob, Evaluation]):
    module = "fastdistill.data.execution.sqlite_worker"
    what = "sqlite"

    def __init__(self, workers: int | None = None, limits: SqlLimits | None = None, batch: int = 16) -> None:
        self._limits = limits or SqlLimits()
        super().__init__(workers, asdict(self._limits), self._limits.wall_s, batch)

    def fitted(self, job: SqlJob) -> SqlJob:
        """The job with a full path, and with a text beyond the limit cut one character past it: the verdict stays."""
        longest = self._limits.sql_bytes + 1
        gold = None if job.gold_sql is None else job.gold_sql[:longest]
        return replace(job, db_path=str(Path(job.db_path).absolute()), sql=job.sql[:longest], gold_sql=gold)

    def to_wire(self, job: SqlJob) -> list[Any]:
        return to_wire(job)

    def from_wire(self, message: list[Any]) -> Evaluation:
        return evaluation_from_wire(message)

    async def died(self, job: SqlJob, death: Death, judge: Callable[[SqlJob], Awaitable[Evaluation]]) -> Evaluation:
        if death.cause is Cause.WALL:
            late = f"{death.phase}: no answer within {self._limits.wall_s} s"
            return Evaluation(SqlReason.INFRA_TIMEOUT, detail=late)
        if death.cause is Cause.OTHER:
            return Evaluation(SqlReason.SANDBOX_DIED, detail=f"{death.phase}: worker {death.status}")
        spent = f"more than {self._limits.cpu_s} s of CPU time"
        if death.phase == Phase.GOLD:
            candidate = await judge(replace(job, gold_sql=None))
            return replace(candidate, reason=SqlReason.GOLD_INVALID, detail=f"gold: {SqlReason.LIMIT_CPU}: {spent}")
        verdict = Evaluation(SqlReason.LIMIT_CPU, exec_pass=False, exec_error=spent)
        if job.gold_sql is None or job.gold_sql == job.sql:
            return verdict
        # What was known of gold died with the worker, and a broken gold comes first.
        gold = await judge(replace(job, sql=job.gold_sql))
        if gold.outcome == "error":
            return replace(verdict, reason=gold.reason, detail=gold.detail)
        return replace(verdict, gold_match=False, weak_gold=gold.weak_gold)
