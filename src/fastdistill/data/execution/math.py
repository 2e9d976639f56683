"""Execution gate for mathematics: compares the final answer of each candidate with gold's.

What is the final answer and what is plainly equal is defined in `answer_math`, all other equality in `math_worker`.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, PrivateAttr

from fastdistill.core.step import Context, Gate, Mutation
from fastdistill.core.types import Candidate, Outcome, Sample, Verdict
from fastdistill.data import answer_math
from fastdistill.data.answer_math import LONGEST, Equality, Extracted
from fastdistill.data.execution.reason import Reason
from fastdistill.data.execution.worker_pool import Death, WorkerPool


class MathReason(Reason):
    MATCH = "match", "pass"
    EXTRACTED = "extracted", "pass"  # without gold

    MISMATCH = "mismatch"
    NO_ANSWER = "no_answer"

    AMBIGUOUS = "ambiguous", "error"
    UNIT_UNCLEAR = "unit_unclear", "error"
    UNREADABLE = "unreadable", "error"
    COMPARE_BUDGET = "compare_budget", "error"
    GOLD_INVALID = "gold_invalid", "error"
    INFRA_TIMEOUT = "infra_timeout", "error"
    SANDBOX_DIED = "sandbox_died", "error"


@dataclass(frozen=True, slots=True)
class MathLimits:
    """What the comparison of one pair of expressions may cost."""

    cpu_s: PositiveFloat = 2.0
    wall_s: PositiveFloat = 30.0
    """A backstop that never blames the answer."""
    memory_bytes: PositiveInt = 1 << 30
    """Address space of a worker; with sympy it takes about 200 MB of it."""


class MathPool(WorkerPool[tuple[str, str], MathReason]):
    """Compares pairs of gold and answer, both cleaned."""

    module = "fastdistill.data.execution.math_worker"
    what = "math"

    def __init__(self, workers: int | None, limits: MathLimits) -> None:
        super().__init__(workers, asdict(limits), limits.wall_s, batch=4)

    def from_wire(self, message: list[str]) -> MathReason:
        return MathReason(message[0])

    async def died(self, job: tuple[str, str], death: Death, *_: object) -> MathReason:
        return MathReason.INFRA_TIMEOUT if death.cause == "wall" else MathReason.SANDBOX_DIED


class MathExecEval(Gate):
    """Passes candidates whose final answer equals gold's, exactly, unless a tolerance is given.

    A verdict's detail has the extracted `answer`, `extracted` (how it was found) and `compared` (`exact`, `symbolic`).
    What can't be decided is an `error`, never held against the candidate. Without gold, or with `require: extracted`,
    all that have a final answer pass, and `answer` is in one spelling, for `MajorityVote` to count; what gold says all
    the same is `gold_match` in the detail.
    """

    version: ClassVar[int] = 2
    machine_only: ClassVar[frozenset[str]] = frozenset({"name", "workers"})

    gold_field: str | None = Field(
        "answer", description="the record's field with the gold answer, alone or ending a solution; null: none"
    )
    require: Literal["gold_match", "extracted"] = Field(
        "gold_match", description="extracted: a final answer is enough, and gold only measures"
    )
    extract: Literal["marked", "last_number"] = Field(
        "marked", description="last_number: where no final answer is marked, the last number of the text counts"
    )
    tolerance: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="numbers are equal within this share of gold"
    )
    absolute_tolerance: float = Field(0.0, ge=0, allow_inf_nan=False, description="or within this distance of gold")
    limits: MathLimits = MathLimits()
    workers: int | None = Field(None, gt=0, le=64, description="worker processes; by default one a core, two at most")

    _pool: MathPool | None = PrivateAttr(None)

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        async with MathPool(self.workers, self.limits) as self._pool:
            yield

    async def judge(self, candidate: Candidate, sample: Sample, ctx: Context) -> Verdict:
        gold = _final(self.gold(sample))
        must_match = self.gold_field is not None and self.require == "gold_match"
        if gold is None and must_match:
            detail = f"{sample.source}: no final answer in field {self.gold_field!r}"
            return self._verdict(MathReason.GOLD_INVALID, detail=detail)
        found = answer_math.extract(candidate.answer, last_number=self.extract == "last_number")
        if found is None:
            return self._verdict(MathReason.NO_ANSWER)
        told = None if gold is None else await self._compared(gold, found)
        if told is not None and must_match:
            return told
        spellings = list(dict.fromkeys(map(answer_math.canonical, found.answers)))
        whole = MathReason.EXTRACTED if len(found.answers[0]) <= LONGEST else MathReason.UNREADABLE
        reason = whole if len(spellings) == 1 else MathReason.AMBIGUOUS
        measured = {"gold_match": told.outcome is Outcome.PASS} if told and told.outcome is not Outcome.ERROR else {}
        return self._verdict(reason, answer=" | ".join(spellings[:4]), extracted=found.method, **measured)

    async def _compared(self, gold: str, found: Extracted) -> Verdict:
        seen = {"answer": found.answers[0], "extracted": found.method}
        equalities = {answer_math.compare(gold, answer, self._close) for answer in found.answers}
        if equalities == {Equality.NOT_PLAIN} and len(found.answers) == 1:
            return self._verdict(await self._symbolic(gold, found.answers[0]), **seen, compared="symbolic")
        if len(found.answers) > 1 and equalities != {Equality.EQUAL}:
            return self._verdict(MathReason.AMBIGUOUS, **seen | {"answer": " | ".join(found.answers[:4])})
        return self._verdict(MathReason(equalities.pop()), **seen, compared="exact")

    def gold(self, sample: Sample) -> str | None:
        """A number, or a text that is the answer or ends in it; marked as final in any case."""
        value = None if self.gold_field is None else sample.record.get(self.gold_field)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            return None
        text = str(value)
        return text if "####" in text or "\\boxed" in text else f"\\boxed{{{text}}}"

    def mutations(self, gold: str, sample: Sample) -> Sequence[Mutation]:
        from fastdistill.data.mutate_math import mutate_math

        return mutate_math(_final(gold) or "")

    async def _symbolic(self, gold: str, answer: str) -> MathReason:
        assert self._pool is not None, "the gate is used inside `opened`"
        if answer_math.is_costly(gold) or answer_math.is_costly(answer):
            return MathReason.COMPARE_BUDGET
        (gold, unit), (answer, other) = answer_math.without_unit(gold), answer_math.without_unit(answer)
        if unit and other and unit != other:
            return MathReason.UNIT_UNCLEAR
        times = all(map(answer_math.CLOCK.search, (gold, answer)))  # 2:40 and 1:20 are one ratio, and two times
        if times or answer_math.is_prose(gold) or answer_math.is_prose(answer):
            return MathReason.UNREADABLE
        return await self._pool.evaluate((gold, answer))

    def _close(self, gold: Fraction, number: Fraction) -> bool:
        return abs(gold - number) <= max(abs(gold) * Fraction(self.tolerance), Fraction(self.absolute_tolerance))

    def _verdict(self, reason: MathReason, **detail: str | bool) -> Verdict:
        return self.verdict(Outcome(reason.outcome), reason, None, **detail)


def _final(gold: str | None) -> str | None:
    found = answer_math.extract(gold) if gold is not None else None
    return found.answers[0] if found and len(found.answers) == 1 and len(found.answers[0]) <= LONGEST else None
