import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from pydantic import ValidationError

from fastdistill.core.types import Candidate, Outcome, Sample, Verdict
from fastdistill.data.execution.math import MathExecEval
from fastdistill.data.vote import MajorityVote
from tests.context import TestContext, candidate


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def ran(attempt: int, result: str | None, outcome: Outcome = Outcome.PASS, **detail: Any) -> Candidate:
    found = {} if result is None else {"result_signature": result}
    return candidate(f"SELECT {attempt}", attempt).judged(
        Verdict("SQLiteExecEval", "f", outcome, "executed", None, found | {"row_count": 1} | detail)
    )


def vote(ctx: TestContext, candidates: list[Candidate], **config: Any) -> list[tuple[str, str, float | None]]:
    sample = asyncio.run(
        MajorityVote(name="MajorityVote", **config).run(Sample(0, "t", {}, candidates=tuple(candidates)), ctx)
    )
    verdicts = [c.verdict("MajorityVote") for c in sample.candidates]
    return [(str(v.outcome), v.reason, v.score) for v in verdicts if v is not None]


def results(text: str) -> list[Candidate]:
    return [ran(attempt, letter) for attempt, letter in enumerate(text)]


def test_most_results_are_the_pseudo_gold_and_its_share_is_the_score(ctx: TestContext) -> None:
    found = vote(ctx, results("aaaaabbc"))
    assert found[:5] == [("pass", "pseudo_gold", 5 / 8)] * 5
    assert found[5:] == [("fail", "minority", 2 / 8)] * 2 + [("fail", "minority", 1 / 8)]


@pytest.mark.parametrize(
    ("text", "reason"), [("aaaaaaa", "too_few_votes"), ("aaaabbbb", "no_majority"), ("aaaabbcde", "no_majority")]
)
def test_without_a_majority_nobody_is_blamed(ctx: TestContext, text: str, reason: str) -> None:
    assert set(vote(ctx, results(text))) == {("error", reason, None)}


def test_answers_that_did_not_run_have_no_vote(ctx: TestContext) -> None:
    unknown, failed = ran(8, "b", Outcome.ERROR), ran(9, "b", Outcome.FAIL)
    found = vote(ctx, [*results("aaaaaaaa"), unknown, failed, ran(10, None)])
    assert found[8:] == [("error", "no_result", None)] * 2  # the failed one is not looked at
    assert found[0] == ("pass", "pseudo_gold", 1.0)


def test_nothing_found_is_no_gold(ctx: TestContext) -> None:
    empty = [ran(n, "a", row_count=0) for n in range(8)]
    assert set(vote(ctx, empty)) == {("error", "nothing_found", None)}


def test_each_wave_is_a_new_vote(ctx: TestContext) -> None:
    step = MajorityVote(name="MajorityVote", min_votes=4)
    first = asyncio.run(step.run(Sample(0, "t", {}, candidates=tuple(results("abb"))), ctx))
    assert not first.accepted
    more = Sample(0, "t", {}, candidates=(*first.candidates, *(ran(n, "b") for n in (3, 4))))
    second = asyncio.run(step.run(more, ctx))
    assert [c.attempt for c in second.accepted] == [1, 2, 3, 4]
    assert all(sum(v.gate == "MajorityVote" for v in c.verdicts) == 1 for c in second.candidates)


def test_whom_a_judge_behind_the_vote_failed_has_a_vote_in_the_next_wave_too(ctx: TestContext) -> None:
    step = MajorityVote(name="MajorityVote", min_votes=3)
    first = asyncio.run(step.run(Sample(0, "t", {}, candidates=tuple(results("abb"))), ctx))
    judged = [c.judged(Verdict("LLMJudge", "f", Outcome.FAIL, "low_score")) for c in first.candidates]
    second = asyncio.run(step.run(Sample(0, "t", {}, candidates=(*judged, ran(3, "b"))), ctx))
    votes = [v.detail["votes"] for c in second.candidates if (v := c.verdict("MajorityVote"))]
    assert votes == [4, 4, 4, 4]
    assert [c.attempt for c in second.accepted] == [1, 2, 3], "for the judge to judge again: its words are stored"


def test_who_has_lost_since_the_last_wave_keeps_no_score(ctx: TestContext) -> None:
    step = MajorityVote(name="MajorityVote", min_votes=3)
    first = asyncio.run(step.run(Sample(0, "t", {}, candidates=tuple(results("aab"))), ctx))
    scored = [replace(c, score=0.9) if c in first.accepted else c for c in first.candidates]
    more = Sample(0, "t", {}, candidates=(*scored, *(ran(n, "b") for n in (3, 4, 5))))
    second = asyncio.run(step.run(more, ctx))
    assert [c.outcome.value for c in second.candidates] == ["fail", "fail", "pass", "pass", "pass", "pass"]
    assert [c.score for c in second.candidates] == [None] * 6


def test_where_gold_is_known_the_vote_is_measured(ctx: TestContext) -> None:
    candidates = [ran(n, "a" if n else "b", gold_match=n > 0) for n in range(8)]
    sample = asyncio.run(MajorityVote(name="MajorityVote").run(Sample(0, "t", {}, candidates=tuple(candidates)), ctx))
    details = [v.detail for c in sample.candidates if (v := c.verdict("MajorityVote"))]
    assert details[0] == {"votes": 8}
    # Once a sample: its answers are right or wrong together, and an interval must not take them for so many cases.
    assert details[1:] == [{"votes": 8, "pseudo_gold_right": True}] + [{"votes": 8}] * 6


def test_final_answers_of_mathematics_vote_however_they_are_written(ctx: TestContext) -> None:
    texts = [r"\boxed{1{,}200}", "#### 1200", "The answer is $1200.", r"\boxed{1200 rolls}", r"\boxed{120}", "1200"]
    candidates = tuple(candidate(text, attempt) for attempt, text in enumerate(texts))

    async def run() -> Sample:
        sample = Sample(0, "t", {}, candidates=candidates)
        gate = MathExecEval(name="MathExecEval", gold_field=None)
        vote = MajorityVote(name="MajorityVote", gate="MathExecEval", result="answer", min_votes=5)
        async with gate.opened(ctx):
            return await vote.run(await gate.run(sample, ctx), ctx)

    found = [(str(c.outcome), c.verdicts[-1].reason, c.verdicts[-1].score) for c in asyncio.run(run()).candidates]
    assert found[:4] == [("pass", "pseudo_gold", 4 / 5)] * 4
    assert found[4:] == [("fail", "minority", 1 / 5), ("fail", "no_answer", None)]


@pytest.mark.parametrize(("gold", "right"), [("#### 1,200", True), ("120", False), ("who knows?", None)])
def test_where_gold_is_known_the_vote_over_final_answers_is_measured(
    ctx: TestContext, gold: str, right: bool | None
) -> None:
    texts = [*[r"\boxed{1{,}200}", "#### 1200", "The answer is $1200."] * 2, r"\boxed{120}", "no answer"]
    candidates = tuple(candidate(text, attempt) for attempt, text in enumerate(texts))

    async def run() -> Sample:
        gate = MathExecEval(name="MathExecEval", require="extracted")
        vote = MajorityVote(name="MajorityVote", gate="MathExecEval", result="answer", min_votes=5)
        async with gate.opened(ctx):
            return await vote.run(await gate.run(Sample(0, "t", {"answer": gold}, candidates=candidates), ctx), ctx)

    voted = asyncio.run(run()).candidates
    known: list[bool | None] = [c.verdicts[0].detail.get("gold_match") for c in voted]
    assert known == ([None] * 8 if right is None else [*[right] * 6, not right, None])
    assert [str(c.outcome) for c in voted] == ["pass"] * 6 + ["fail"] * 2, "gold decides nothing"
    told = [c.verdicts[-1].detail.get("pseudo_gold_right") for c in voted]
    assert told == [right] + [None] * 7


def test_half_is_no_majority() -> None:
    with pytest.raises(ValidationError, match=r"greater than 0\.5"):
        MajorityVote(min_share=0.5)
