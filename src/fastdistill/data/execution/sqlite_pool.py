"""Judges SQL in worker processes (`sqlite_worker`) from asyncio: one bad query costs no other query anything.

A query that ends its worker twice is judged by the cause: CPU time spent is the query's own doing (`limit_cpu`), a wall
clock that ran out is not (`infra_timeout`, an error, never a pass), nor is any other death (`sandbox_died`).
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdistill.data.execution.sqlite_guard import SqlLimits, SqlReason
from fastdistill.data.execution.sqlite_worker import Evaluation, Phase, SqlJob
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
        path = job.db_path if job.db_path.startswith("/") else str(Path(job.db_path).absolute())
        return SqlJob(path, job.sql[:longest], job.gold_sql and job.gold_sql[:longest], job.columns, job.order)

    def from_wire(self, message: list[Any]) -> Evaluation:
        reason, *others = message
        return Evaluation(SqlReason(reason), *others)

    async def died(self, job: SqlJob, death: Death, judge: Callable[[SqlJob], Awaitable[Evaluation]]) -> Evaluation:
        if death.cause is Cause.WALL:
            late = f"{death.phase}: no answer within {self._limits.wall_s} s"
            return Evaluation(SqlReason.INFRA_TIMEOUT, detail=late)
        if death.cause is Cause.OTHER:
            return Evaluation(SqlReason.SANDBOX_DIED, detail=f"{death.phase}: worker {death.status}")
        spent = f"more than {self._limits.cpu_s} s of CPU time"
        if death.phase == Phase.GOLD:
            candidate = await judge(job._replace(gold_sql=None))
            return candidate._replace(reason=SqlReason.GOLD_INVALID, detail=f"gold: {SqlReason.LIMIT_CPU}: {spent}")
        verdict = Evaluation(SqlReason.LIMIT_CPU, exec_pass=False, exec_error=spent)
        if job.gold_sql is None or job.gold_sql == job.sql:
            return verdict
        # What was known of gold died with the worker, and a broken gold comes first.
        gold = await judge(job._replace(sql=job.gold_sql))
        if gold.outcome == "error":
            return verdict._replace(reason=gold.reason, detail=gold.detail)
        return verdict._replace(gold_match=False, weak_gold=gold.weak_gold)
