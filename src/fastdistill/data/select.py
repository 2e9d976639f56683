"""Scores candidates from what the gates found, and picks the best. Judges nothing itself."""

import re
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import ClassVar, Literal

from msgspec.structs import replace
from pydantic import Field, model_validator

from fastdistill.core.step import Context, SampleStep
from fastdistill.core.turns import give_turn
from fastdistill.core.types import Candidate, Outcome, Sample
from fastdistill.data.near_duplicates import canonical_python, canonical_sql
from fastdistill.data.rationale import rationale_of
from fastdistill.data.sql_parser import parsed, parser


class ScoreFromExecEval(SampleStep):
    """Sets `score`, in 0..1, from the execution gate's verdict: the weighted mean of `exec_pass` and `gold_match`.

    With the default weights an answer that runs has 0.5, one whose result is the gold's has 1. A part that the gate
    does not know (no gold query) is left out of the mean. A candidate without a verdict, or with `error`, has no score.
    """

    rewrites: ClassVar[bool] = False

    gate: str = Field("SQLiteExecEval", description="name of the gate whose verdict counts")
    exec_pass: float = Field(0.5, ge=0, description="weight of: the answer runs")
    gold_match: float = Field(0.5, ge=0, description="weight of: its result is the gold's")

    def gates(self) -> Sequence[str]:
        return (self.gate,)

    @model_validator(mode="after")
    def _weighs(self) -> "ScoreFromExecEval":
        if self.exec_pass + self.gold_match == 0:
            raise ValueError("exec_pass and gold_match are both 0; give one of them a weight")
        return self

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        return sample.with_candidates(map(self._scored, sample.candidates))

    def _scored(self, candidate: Candidate) -> Candidate:
        verdict = candidate.verdict(self.gate)
        if verdict is None:
            return candidate
        reached = total = 0.0
        if verdict.outcome is not Outcome.ERROR:
            find = verdict.detail.get
            for weight, found in ((self.exec_pass, find("exec_pass")), (self.gold_match, find("gold_match"))):
                if isinstance(found, bool):
                    total += weight
                    reached += weight * found
        return replace(candidate, score=reached / total if total else None)


class SelectBest(SampleStep):
    """Selects up to `k` accepted candidates: the highest score first, no score last, the earlier attempt on a tie."""

    rewrites: ClassVar[bool] = False

    k: int = Field(1, gt=0)
    distinct: bool | Literal["sql", "python", "path"] = Field(
        True,
        description="of equal answers only the best counts; sql, python: equal but for how they are written; path: of"
        " equal ways to the answer",
    )

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        async with parser() if self.distinct == "sql" else nullcontext():
            yield

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        ranked = sorted(sample.accepted, key=best_first)
        if self.distinct and len(ranked) > 1:
            first: dict[Hashable, Candidate] = {}
            for candidate in ranked:
                first.setdefault(await self._key(candidate), candidate)
                await give_turn()
            ranked = list(first.values())
        return replace(sample, selection=tuple([candidate.candidate_id for candidate in ranked[: self.k]]))

    async def _key(self, candidate: Candidate) -> Hashable:
        match self.distinct:
            case "path":
                return _path(candidate)
            case "sql":
                return await parsed(canonical_sql, candidate.answer)
            case "python":
                return canonical_python(candidate.answer)
        return candidate.answer


# Digits without an equation go in one piece, for each of them would be read to the last one otherwise.
_EQUATION = re.compile(r"\d[\d.,\s+*/×÷()%$-]*+(?:=\s*\$?\d[\d.,]*)?")


def _path(candidate: Candidate) -> Hashable:
    """How an answer was reached: the equations of its rationale (RFT, arXiv:2308.01825), or else its words.

    Without a rationale the answer itself is looked at.
    """
    text = rationale_of(candidate) or candidate.answer
    equations = tuple(re.sub(r"[\s$]|[.,]$", "", found) for found in _EQUATION.findall(text) if "=" in found)
    return equations or " ".join(text.split()).casefold()


def best_first(candidate: Candidate) -> tuple[bool, float, int, str]:
    # The id settles what is left: two models may have given the same attempt.
    return (candidate.score is None, -(candidate.score or 0.0), candidate.attempt, candidate.candidate_id)
