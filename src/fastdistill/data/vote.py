"""Votes where there is no gold: the result that most of a sample's answers give. Runs nothing itself."""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from itertools import takewhile
from typing import ClassVar

from msgspec.structs import replace
from pydantic import Field

from fastdistill.core.step import Context, Gate
from fastdistill.core.types import Candidate, Outcome, Sample, Verdict


class VoteReason(StrEnum):
    PSEUDO_GOLD = "pseudo_gold"
    MINORITY = "minority"
    TOO_FEW_VOTES = "too_few_votes"
    NO_MAJORITY = "no_majority"
    NOTHING_FOUND = "nothing_found"  # the majority's result has no rows: many wrong queries give it
    NO_RESULT = "no_result"  # the execution gate left no result to compare


class MajorityVote(Gate):
    """Passes the answers whose result has at least `min_share` of a sample's votes, and fails the others.

    What votes is the *result* of executing an answer, as the gate before it left it in its verdict's detail; answers
    that this gate did not pass have no vote. With fewer than `min_votes` votes, or without such a majority, all are
    `error`: nobody knows. The share is the verdict's score. Where the gate knows about gold all the same
    (a gold field with `require: exec_pass`, for mathematics `extracted`), `pseudo_gold_right` in the detail of the
    first of them says whether the vote was right.

    Defaults follow OpenMathInstruct-2 (arXiv:2410.01560), which votes over up to 32 answers.
    """

    version: ClassVar[int] = 4

    gate: str = Field("SQLiteExecEval", description="the execution gate whose results are counted")
    result: str = Field("result_signature", description="the entry of its verdict's detail that is the result")
    min_share: float = Field(0.6, gt=0.5, le=1)
    min_votes: int = Field(8, ge=2)

    def gates(self) -> Sequence[str]:
        return (self.gate,)

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        """Votes anew with all candidates there are, since each wave brings more; the gates behind it judge anew too."""
        before = [tuple(takewhile(lambda verdict: verdict.gate != self.name, c.verdicts)) for c in sample.candidates]
        bare = [replace(c, verdicts=given) for c, given in zip(sample.candidates, before, strict=True)]
        voted = await super().run(sample.with_candidates(bare), ctx)
        return voted.with_candidates(map(self._without_stale_score, sample.candidates, voted.candidates))

    def _without_stale_score(self, before: Candidate, now: Candidate) -> Candidate:
        """Who has lost since the last wave is not judged again behind the vote, and keeps no score from there."""
        verdict = before.verdict(self.name)
        passed = verdict is not None and verdict.outcome is Outcome.PASS
        return replace(now, score=None) if passed and now.outcome is Outcome.FAIL else now

    async def judge_all(self, candidates: Sequence[Candidate], sample: Sample, ctx: Context) -> list[Verdict]:
        executed = [candidate.verdict(self.gate) for candidate in candidates]
        results = [v.detail.get(self.result) if v and v.outcome is Outcome.PASS else None for v in executed]
        votes = Counter(result for result in results if result is not None)
        winner, count = max(votes.items(), key=lambda vote: (vote[1], str(vote[0])), default=(None, 0))
        total = votes.total()
        share = count / total if total else 0.0
        undecided: VoteReason | None = None
        if total < self.min_votes:
            undecided = VoteReason.TOO_FEW_VOTES
        elif share < self.min_share:
            undecided = VoteReason.NO_MAJORITY
        elif any(v and v.detail.get("row_count") == 0 for v, r in zip(executed, results, strict=True) if r == winner):
            undecided = VoteReason.NOTHING_FOUND
        verdicts = []
        measured = False  # once a sample: its candidates are right or wrong together
        for verdict, result in zip(executed, results, strict=True):
            detail = {"votes": total}
            if result is None or undecided:
                reason = VoteReason.NO_RESULT if result is None else undecided
                verdicts.append(self.verdict(Outcome.ERROR, str(reason), None, **detail))
            elif result != winner:
                verdicts.append(self.verdict(Outcome.FAIL, VoteReason.MINORITY, votes[result] / total, **detail))
            else:
                right = verdict.detail.get("gold_match") if verdict else None
                if isinstance(right, bool) and not measured:
                    detail["pseudo_gold_right"] = right
                    measured = True
                verdicts.append(self.verdict(Outcome.PASS, VoteReason.PSEUDO_GOLD, share, **detail))
        return verdicts
