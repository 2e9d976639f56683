"""Judges one SQL answer against one gold query; as a program (`python -m`), the worker process of `sqlite.SqlitePool`.

It imports only the standard library, for it must start fast, and again after every kill. What its death means is for
the pool to say. On the wire of `worker_process` a job is the fields of a `SqlJob`, a result those of an `Evaluation`,
and a phase is `"gold"` or `"candidate"`: a query of that kind starts after one of the other.
"""

import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastdistill.data.execution.sql_equality import (
    Columns,
    break_ties,
    clause,
    compare,
    signature,
    tie_cuts,
)
from fastdistill.data.execution.sqlite_guard import (
    DatabaseUnreadableError,
    GuardedConnection,
    QueryError,
    QueryResult,
    SqlLimits,
    SqlReason,
    limit_process_heap,
)
from fastdistill.data.execution.worker_process import Channel, confine_process

Order = Literal["auto", "ignore", "strict"]
"""`auto`: rows count in order, modulo ties, if gold has a top-level ORDER BY. `strict`: in gold's very order."""

Phase = Literal["gold", "candidate"]
"""The untrusted SQL that an evaluator is about to run."""

_MAX_CONNECTIONS = 16
_MAX_GOLD_BYTES = 32_000_000
_GOLD_BYTES = 8_000  # at least, for each
_NEAR_LIMIT = 0.8


class SqlJob(NamedTuple):
    """One candidate to judge. Without `gold_sql` the question is only whether it executes as a query."""

    db_path: str
    sql: str
    gold_sql: str | None = None
    columns: Columns = "any"
    order: Order = "auto"
    spent: Sequence[str] = ()
    """Phases whose query has used up its CPU time before, and is not run again."""


class Evaluation(NamedTuple):
    """The verdict on one candidate, and what was seen of it. `None` stands for unknown."""

    reason: SqlReason
    exec_pass: bool | None = None
    """Whether the candidate executed, within its limits, as one deterministic query."""
    exec_error: str | None = None
    """Why it did not: SQLite's own text where it is SQLite's error."""
    gold_match: bool | None = None
    detail: str | None = None
    """What is wrong, where the outcome is `error`: with gold, the database or the sandbox."""
    result_signature: str | None = None
    """`sql_equality.signature`; the order of rows counts only under `order="strict"`."""
    row_count: int | None = None
    columns: int | None = None
    ops: int | None = None
    tables: Sequence[str] | None = None
    """None where the query refers to none."""
    weak_gold: bool = False
    """Gold returns no rows: many wrong queries match it."""
    near_limit: Literal[True] | None = None
    """It took 80% or more of the budget of operations: another version of SQLite may judge it differently."""


@dataclass(frozen=True, slots=True)
class _Gold:
    """Everything that judging needs to know of a gold query on one database; nothing where there is none."""

    reason: SqlReason | None = None
    """Why it cannot judge anything."""
    detail: str | None = None
    result: QueryResult | None = None
    cuts: Sequence[int] | None = None
    """As `compare` takes them."""


class Evaluator:
    """Judges in this process, keeping connections and gold results.

    `enter` is told of each phase before it begins, and None where only code of our own runs from now on.

    Deterministic budgets bind here as everywhere; for limits on CPU time and memory use `sqlite.SqlitePool`.
    """

    def __init__(self, limits: SqlLimits, enter: Callable[[Phase | None], object]) -> None:
        self._limits = limits
        self._enter = enter
        self._connections: OrderedDict[str, GuardedConnection] = OrderedDict()
        self._golds: dict[tuple[object, ...], _Gold] = {}
        self._gold_bytes = 0

    def close(self) -> None:
        """Closes all connections and forgets all gold results."""
        while self._connections:
            self._connections.popitem()[1].close()
        self._forget_golds()

    def evaluate(self, job: SqlJob) -> Evaluation:
        """Never raises for anything wrong with the database or either query: that is a reason."""
        while True:
            # Memory is shared with what earlier jobs left open: only a fresh start tells whose fault it is.
            self._fresh = not self._connections
            try:
                return self._evaluate(job)
            except MemoryError:
                if self._fresh:
                    raise
                self.close()

    def _evaluate(self, job: SqlJob) -> Evaluation:
        candidate: QueryResult | QueryError
        try:
            connection = self._connect(job.db_path)
            gold = _Gold() if job.gold_sql is None else self._gold(connection, job.gold_sql, job)
            candidate = self._run(connection, job.sql, "candidate", job.spent)
        except QueryError as error:
            candidate = error
        except DatabaseUnreadableError as error:
            return Evaluation(SqlReason.DATABASE_UNREADABLE, detail=str(error))
        reason = _reason(candidate, gold, job.columns)
        judged = gold.result is not None and reason.outcome != "error"
        verdict = Evaluation(
            reason,
            gold_match=reason.outcome == "pass" if judged else None,
            detail=gold.detail,
            ops=candidate.ops,
            weak_gold=gold.result is not None and not gold.result.rows,
        )
        if isinstance(candidate, QueryError):
            return verdict._replace(exec_pass=False, exec_error=str(candidate))
        return verdict._replace(
            exec_pass=True,
            result_signature=signature(candidate, ordered=job.order == "strict"),
            row_count=len(candidate.rows),
            columns=candidate.width,
            tables=candidate.tables or None,
            near_limit=True if candidate.ops >= _NEAR_LIMIT * self._limits.ops else None,
        )

    def _connect(self, db_path: str) -> GuardedConnection:
        connection = self._connections.pop(db_path, None)
        if connection is not None and connection.is_stale():
            connection.close()
            connection = None
        connection = connection or GuardedConnection(db_path, self._limits)
        self._connections[db_path] = connection
        if len(self._connections) > _MAX_CONNECTIONS:
            self._connections.popitem(last=False)[1].close()
        return connection

    def _gold(self, connection: GuardedConnection, sql: str, job: SqlJob) -> _Gold:
        key = (connection.path, connection.identity, sql, job.order)
        gold = self._golds.get(key)
        if gold is None:
            if self._gold_bytes > _MAX_GOLD_BYTES:
                self._forget_golds()  # all at once: a sample's candidates come one after the other
            gold = self._golds[key] = self._settle(connection, sql, job)
            self._gold_bytes += _GOLD_BYTES + (gold.result.size if gold.result else 0)
        return gold

    def _forget_golds(self) -> None:
        self._golds.clear()
        self._gold_bytes = 0

    def _settle(self, connection: GuardedConnection, sql: str, job: SqlJob) -> _Gold:
        """Runs gold, and where rows could come in several orders, twice more to see which of them are tied."""
        said = "gold"
        try:
            result = self._run(connection, sql, "gold", job.spent)
            whole = _Gold(result=result, cuts=range(1, len(result.rows) + 1) if job.order == "strict" else None)
            ordered = clause(sql, "ORDER", "BY") is not None
            if not ordered and clause(sql, "LIMIT") is None:
                return whole
            said = "gold, with its ties broken"
            ascending = self._run(connection, break_ties(sql, result.width, "ASC"), "gold", job.spent)
            descending = self._run(connection, break_ties(sql, result.width, "DESC"), "gold", job.spent)
        except QueryError as error:
            return _Gold(SqlReason.GOLD_INVALID, f"{said}: {error.reason}: {error}")
        cuts = tie_cuts(ascending, descending)
        if cuts is None:
            return _Gold(SqlReason.GOLD_AMBIGUOUS, "gold: its LIMIT cuts through tied rows")
        return _Gold(result=ascending, cuts=cuts) if ordered and job.order == "auto" else whole

    def _run(self, connection: GuardedConnection, sql: str, phase: Phase, spent: Sequence[str]) -> QueryResult:
        if phase in spent:
            raise QueryError(SqlReason.LIMIT_CPU, f"more than {self._limits.cpu_s} s of CPU time", ops=None)
        while True:
            self._enter(phase)
            try:
                return connection.query(sql)
            except QueryError as error:
                self._enter(None)
                if error.reason is SqlReason.LIMIT_MEMORY and not self._fresh:
                    raise MemoryError from error
                if error.reason is not SqlReason.LIMIT_BYTES or not connection.allow_stored_values():
                    raise
            finally:
                self._enter(None)


def _reason(candidate: QueryResult | QueryError, gold: _Gold, columns: Columns) -> SqlReason:
    if gold.reason is not None:
        return gold.reason
    if isinstance(candidate, QueryError):
        return candidate.reason
    if gold.result is None:
        return SqlReason.EXECUTED
    if gold.result.tables and not candidate.tables:
        return SqlReason.CONSTANT
    return SqlReason(compare(gold.result, candidate, cuts=gold.cuts, columns=columns))


def main() -> None:
    limits = SqlLimits(**json.loads(sys.argv[1]))
    confine_process(limits.memory_bytes)
    limit_process_heap(limits)
    channel = Channel(limits.cpu_s)
    with closing(Evaluator(limits, channel.enter)) as evaluator:
        channel.serve(lambda job: evaluator.evaluate(SqlJob(*job)))


if __name__ == "__main__":
    main()
