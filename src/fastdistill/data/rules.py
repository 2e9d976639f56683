"""Rule gate: pure checks of an answer's text. Never calls a model, never runs anything."""

import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fastdistill.core.step import Context, Gate
from fastdistill.core.types import Candidate, Completion, FinishReason, Outcome, Sample, Verdict
from fastdistill.data.execution.patterns import CPU_S, PatternPool, Rule
from fastdistill.data.execution.reason import Reason
from fastdistill.data.execution.worker_pool import Death
from fastdistill.data.sql_parser import parsed, parser

# It warns of every text that it takes for a command; the verdict says that.
logging.getLogger("sqlglot").setLevel(logging.ERROR)

LONGEST_SQL = 10_000
"""Characters. A longer answer does not parse: the parser would hold up every other sample for a second and more."""


class RuleReason(Reason):
    OK = "ok", "pass"
    CONTENT_FILTERED = "content_filtered"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    REQUIRED_MISSING = "required_missing"
    FORBIDDEN_FOUND = "forbidden_found"
    UNPARSABLE_SQL = "unparsable_sql"
    PATTERN_TOO_SLOW = "pattern_too_slow", "error"
    INFRA_TIMEOUT = "infra_timeout", "error"
    SANDBOX_DIED = "sandbox_died", "error"


class RuleFilter(Gate):
    """Fails a candidate at the first rule that it breaks, cheapest first. Lengths are in characters.

    Regular expressions are Python's, searched anywhere in the answer (`(?i)` ignores case, `^` and `$` are the ends).
    One that takes more than a second of CPU time is an `error`, and costs no other answer anything.
    """

    min_chars: int = Field(1, ge=0)
    max_chars: int | None = Field(None, gt=0)
    allow_truncated: bool = Field(False, description="accept answers that max_tokens cut short")
    required: tuple[re.Pattern[str], ...] = Field((), description="regular expressions that must all be found")
    forbidden: tuple[re.Pattern[str], ...] = Field((), description="regular expressions of which none may be found")
    sql: bool | Literal["sqlite"] = Field(False, description="the answer must parse as one SQLite query")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")
        return self

    _pool: ClassVar[PatternPool | None] = None
    """Of a step that is open, in its own `__dict__`: pydantic's private ones are slow."""

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if self.sql:
                await stack.enter_async_context(parser())
            if self._rules:
                self.__dict__["_pool"] = await stack.enter_async_context(PatternPool(self._rules))
            yield

    async def judge(self, candidate: Candidate, sample: Sample, ctx: Context) -> Verdict:
        return self._end_and_length(candidate.completion, candidate.answer) or await self._text(candidate.answer)

    def _end_and_length(self, completion: Completion, answer: str) -> Verdict | None:
        reason = completion.finish_reason
        if reason is FinishReason.CONTENT_FILTER:
            return self._fail(RuleReason.CONTENT_FILTERED)
        if reason is FinishReason.LENGTH and not self.allow_truncated:
            return self._fail(RuleReason.TRUNCATED, tokens=completion.usage.completion_tokens)
        chars = len(answer)
        if self.min_chars and not answer.strip():
            return self._fail(RuleReason.EMPTY, chars=chars)
        if chars < self.min_chars:
            return self._fail(RuleReason.TOO_SHORT, chars=chars, min_chars=self.min_chars)
        if self.max_chars is not None and chars > self.max_chars:
            return self._fail(RuleReason.TOO_LONG, chars=chars, max_chars=self.max_chars)
        return None

    async def _text(self, answer: str) -> Verdict:
        if self._rules:
            assert self._pool is not None, "the gate is used inside `opened`"
            broken = await self._pool.first_broken(answer)
            if isinstance(broken, Death):
                return self._not_searched(broken)
            if broken is not None:
                rule, found, at = broken
                pattern = self._rules[rule][0].pattern
                if found is None:
                    return self._fail(RuleReason.REQUIRED_MISSING, pattern=pattern)
                return self._fail(RuleReason.FORBIDDEN_FOUND, pattern=pattern, found=found, at=at)
        if self.sql and (problem := await parsed(sql_problem, answer)):
            return self._fail(RuleReason.UNPARSABLE_SQL, problem=problem)
        return self._passed

    @cached_property
    def _passed(self) -> Verdict:
        return self.verdict(Outcome.PASS, RuleReason.OK)

    @cached_property
    def _rules(self) -> list[Rule]:
        return [*((pattern, True) for pattern in self.required), *((pattern, False) for pattern in self.forbidden)]

    def _not_searched(self, death: Death) -> Verdict:
        pattern = self._rules[int(death.phase)][0].pattern if death.phase.isdigit() else None
        reason, why = {
            "cpu": (RuleReason.PATTERN_TOO_SLOW, f"more than {CPU_S:g} s of CPU time"),
            "wall": (RuleReason.INFRA_TIMEOUT, "no answer in time"),
            "other": (RuleReason.SANDBOX_DIED, f"worker {death.status}"),
        }[death.cause]
        return self.verdict(Outcome.ERROR, reason, pattern=pattern, detail=why)

    def _fail(self, reason: RuleReason, **detail: Any) -> Verdict:
        return self.verdict(Outcome.FAIL, reason, **detail)


@lru_cache(maxsize=512)  # the candidates of a sample are often the same
def sql_problem(text: str) -> str | None:
    """Why `text` is not one SQLite query, or None if it is one. Its tables and columns are not looked at."""
    if len(text) > LONGEST_SQL:
        return f"{len(text)} characters; a query has at most {LONGEST_SQL}"

    import sqlglot
    from sqlglot.errors import SqlglotError
    from sqlglot.expressions import Query, Select, Values

    try:
        statements = [statement for statement in sqlglot.parse(text, dialect="sqlite") if statement is not None]
    except SqlglotError as error:
        return str(error).splitlines()[0][:200]
    except RecursionError:
        return "nested too deeply"
    if len(statements) != 1:
        return f"{len(statements)} statements"
    if not isinstance(statements[0], Query | Values):
        return f"{statements[0].key}, not a query"
    if any(not select.expressions for select in statements[0].find_all(Select)):
        return "a SELECT of nothing"
    return None
