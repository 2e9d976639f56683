"""Execution gate for Python: runs each candidate with the record's tests, in a sandbox.

What is safe, and what each reason means, is defined in `sandbox` and `python_worker`.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal

from msgspec.structs import replace
from pydantic import Field, PrivateAttr

from fastdistill.core.errors import EnvironmentFault, together
from fastdistill.core.step import Context, Gate, Mutation
from fastdistill.core.types import Candidate, Outcome, Sample, Verdict
from fastdistill.data.execution.python_child import PythonReason
from fastdistill.data.execution.python_pool import InputOutput, PythonEvaluation, PythonJob, PythonLimits, PythonPool
from fastdistill.data.execution.sandbox import IsolationLevel, available_isolation


class PythonExecEval(Gate):
    """Passes candidates that pass all tests of their record.

    Tests are a list of assert statements (as in MBPP), a text that defines `check(candidate)` (as in HumanEval), or a
    list of `{"input": ..., "output": ...}` for programs that read and print. Only the standard library can be
    imported, and no file can be written. A verdict's detail names the isolation that was in force.
    """

    version: ClassVar[int] = 4
    machine_only: ClassVar[frozenset[str]] = frozenset({"name", "workers"})
    alone: ClassVar[bool] = True

    tests_field: str = Field("tests", description="the record's field with the tests, in one of the three forms")
    entry_point_field: str | None = Field(None, description="the field with the name of the function to write")
    setup_field: str | None = Field(
        None, description="the field with code before the candidate: imports, helpers, or a prompt that it continues"
    )
    gold_field: str | None = Field(None, description="the field with a right answer, which must pass first")
    mode: Literal["split", "solo"] = Field(
        "split", description="solo: tests in the candidate's process, for objects that can't cross; can be forged"
    )
    min_isolation: IsolationLevel = Field(IsolationLevel.LANDLOCK, description="refuse to run at less than this")
    limits: PythonLimits = PythonLimits()
    workers: int | None = Field(None, gt=0, le=256, description="cases at a time; by default one a core and one more")

    _pool: PythonPool | None = PrivateAttr(None)
    _golds: dict[PythonJob, PythonEvaluation] = PrivateAttr(default_factory=dict)

    def environment(self) -> Mapping[str, Any]:
        available = available_isolation()
        return {"isolation": available.level, "mechanism": str(available)}

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        """Raises EnvironmentFault if this machine can't isolate as much as `min_isolation` asks for."""
        available = await asyncio.to_thread(available_isolation)
        if available.level is None or not available.level.reaches(self.min_isolation):
            raise EnvironmentFault(
                f"{self.name}: needs isolation {self.min_isolation}, which this machine does not offer: {available}"
            )
        self._golds.clear()
        async with PythonPool(self.workers, self.limits) as self._pool:
            yield

    async def judge_all(self, candidates: Sequence[Candidate], sample: Sample, ctx: Context) -> list[Verdict]:
        pool = self._pool
        assert pool is not None, "the gate is used inside `opened`"
        job = self._job(sample)
        if isinstance(job, PythonEvaluation):
            return [self._verdict(job, pool.level)] * len(candidates)
        if self.gold_field is not None:
            # A sample comes again with every wave of its answers.
            gold = self._golds[job] = self._golds.get(job) or await pool.evaluate(job)
            if len(self._golds) > _REMEMBERED:
                del self._golds[next(iter(self._golds))]
            if gold.reason is not PythonReason.PASSED:
                detail = f"gold: {gold.reason}: {gold.detail}"
                reason = gold.reason if gold.reason.outcome == "error" else PythonReason.GOLD_INVALID
                return [self._verdict(PythonEvaluation(reason, detail), pool.level)] * len(candidates)
        found = await together(*(pool.evaluate(replace(job, code=c.answer)) for c in candidates))
        return [self._verdict(each, pool.level) for each in found]

    def gold(self, sample: Sample) -> str | None:
        gold = None if self.gold_field is None else sample.record.get(self.gold_field)
        return gold if isinstance(gold, str) and gold.strip() else None

    def mutations(self, gold: str, sample: Sample) -> Sequence[Mutation]:
        from fastdistill.data.mutate_python import mutate_python

        setup = sample.record.get(self.setup_field or "")
        return mutate_python(gold, setup if isinstance(setup, str) else "")

    def _job(self, sample: Sample) -> PythonJob | PythonEvaluation:
        """The job that judges the record's gold (without gold: nothing), or what is wrong with the record."""
        record = sample.record
        texts: dict[str | None, str] = {None: ""}
        for field in filter(None, (self.setup_field, self.entry_point_field, self.gold_field)):
            text = record.get(field)
            if not isinstance(text, str):
                reason = PythonReason.GOLD_INVALID if field == self.gold_field else PythonReason.TESTS_INVALID
                return PythonEvaluation(reason, f"{sample.source}: no text in field {field!r}")
            texts[field] = text
        tests = _tests(record.get(self.tests_field))
        if not tests:
            text = f"{sample.source}: no tests of a known form in field {self.tests_field!r}"
            return PythonEvaluation(PythonReason.TESTS_INVALID, text)
        entry_point = texts[self.entry_point_field].strip() or None
        return PythonJob(texts[self.gold_field], tests, texts[self.setup_field], entry_point, self.mode)

    def _verdict(self, seen: PythonEvaluation, level: IsolationLevel) -> Verdict:
        detail = {"isolation": str(level), "detail": seen.detail, "near_limit": seen.near_limit}
        detail["forgeable"] = self.mode == "solo"
        known: dict[str, Any] = {name: value for name, value in detail.items() if value}
        return self.verdict(Outcome(seen.reason.outcome), seen.reason, **known)


_REMEMBERED = 1000
"""Golds whose evaluation is kept, the latest; more than samples are usually open."""


def _tests(value: object) -> tuple[str, ...] | tuple[InputOutput, ...]:
    """The tests of a record; none if they have none of the three forms."""
    tests = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else []
    if all(isinstance(test, str) and test.strip() for test in tests):
        return tuple(tests)
    pairs = [(test.get("input"), test.get("output")) for test in tests if isinstance(test, Mapping)]
    whole = [InputOutput(i, o) for i, o in pairs if isinstance(i, str) and isinstance(o, str)]
    return tuple(whole) if len(whole) == len(tests) else ()
