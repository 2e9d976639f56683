import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec.structs import replace
from pydantic import ValidationError

from fastdistill.core.step import SampleStep
from fastdistill.core.types import Candidate, Cut, Outcome, Sample, Verdict
from fastdistill.data.select import ScoreFromExecEval, SelectBest
from tests.context import TestContext, candidate


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def run(ctx: TestContext, step: SampleStep, *candidates: Candidate) -> Sample:
    return asyncio.run(step.run(Sample(0, "t.jsonl:1", {}, candidates=candidates), ctx))


def executed(outcome: Outcome = Outcome.PASS, **detail: Any) -> Candidate:
    return candidate().judged(Verdict("SQLiteExecEval", "f", outcome, "r", None, detail))


@pytest.mark.parametrize(
    ("judged", "score"),
    [
        (executed(exec_pass=True, gold_match=True), 1.0),
        (executed(Outcome.FAIL, exec_pass=True, gold_match=False), 0.5),
        (executed(Outcome.FAIL, exec_pass=False, gold_match=False), 0.0),
        (executed(exec_pass=True, gold_match=None), 1.0),
        (executed(exec_pass=True), 1.0),
        (executed(), None),
        (executed(Outcome.ERROR, exec_pass=True), None),
        (candidate(), None),
    ],
)
def test_the_score_is_what_execution_found(ctx: TestContext, judged: Candidate, score: float | None) -> None:
    assert run(ctx, ScoreFromExecEval(), judged).candidates[0].score == score


def test_weights_and_gate_can_be_chosen(ctx: TestContext) -> None:
    judged = executed(exec_pass=True, gold_match=False)
    assert run(ctx, ScoreFromExecEval(exec_pass=1, gold_match=3), judged).candidates[0].score == 0.25
    assert run(ctx, ScoreFromExecEval(gate="other"), judged).candidates[0].score is None


def test_no_weight_at_all_is_an_error() -> None:
    with pytest.raises(ValidationError, match="both 0"):
        ScoreFromExecEval(exec_pass=0, gold_match=0)


def scored(attempt: int, score: float | None, answer: str, outcome: Outcome = Outcome.PASS) -> Candidate:
    judged = candidate(answer, attempt).judged(Verdict("gate", "f", outcome, "r"))
    return replace(judged, score=score)


CANDIDATES = (
    scored(0, None, "a"),
    scored(1, 0.5, "b"),
    scored(2, 1.0, "c", Outcome.FAIL),
    scored(3, 1.0, "d", Outcome.ERROR),
    scored(4, 0.75, "e"),
    scored(5, 0.75, "f"),
    scored(6, 0.6, "e"),
    scored(7, 0.0, "g"),
)


def test_the_best_accepted_come_first(ctx: TestContext) -> None:
    sample = run(ctx, SelectBest(k=10), *CANDIDATES)
    assert [chosen.attempt for chosen in sample.chosen] == [4, 5, 1, 7, 0]
    assert run(ctx, SelectBest(), *CANDIDATES).selection == ("candidate-4",)


def test_equal_answers_count_once_unless_asked_for(ctx: TestContext) -> None:
    sample = run(ctx, SelectBest(k=3, distinct=False), *CANDIDATES)
    assert [chosen.attempt for chosen in sample.chosen] == [4, 5, 6]


def test_selecting_again_with_more_candidates_starts_anew(ctx: TestContext) -> None:
    once = run(ctx, SelectBest(), *CANDIDATES[:2])
    assert once.selection == ("candidate-1",)
    again = asyncio.run(SelectBest().run(replace(once, candidates=CANDIDATES), ctx))
    assert again.selection == ("candidate-4",)


def test_what_a_later_gate_fails_is_selected_no_more(ctx: TestContext) -> None:
    selected = run(ctx, SelectBest(k=2), scored(0, 0.5, "a"), scored(1, 1.0, "b"))
    late = Verdict("late", "f", Outcome.FAIL, "r")
    judged = selected.with_candidates([selected.candidates[0], selected.candidates[1].judged(late)])
    assert [c.answer for c in judged.chosen] == ["a"]
    assert replace(judged, candidates=judged.candidates[1:], selection=judged.selection[:1]).chosen == ()  # type: ignore[index]


def test_nothing_accepted_selects_nothing(ctx: TestContext) -> None:
    sample = run(ctx, SelectBest(), CANDIDATES[2])
    assert sample.selection == ()
    assert sample.chosen == ()


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ("sql", ("SELECT a FROM t", "select A  from t;", "SELECT b FROM t", "no query")),
        ("python", ("x = (1)", "x = 1  # one", "y = 1", "x =")),
    ],
)
def test_answers_may_count_as_equal_but_for_how_they_are_written(
    ctx: TestContext, form: Literal["sql", "python"], answers: tuple[str, ...]
) -> None:
    candidates = [scored(at, 1.0 - 0.1 * at, answer) for at, answer in enumerate(answers)]
    assert [c.attempt for c in run(ctx, SelectBest(k=9, distinct=form), *candidates).chosen] == [0, 2, 3]
    assert [c.attempt for c in run(ctx, SelectBest(k=9), *candidates).chosen] == [0, 1, 2, 3]


def test_of_equal_ways_to_the_answer_only_the_best_counts(ctx: TestContext) -> None:
    def reasoned(attempt: int, text: str) -> Candidate:
        return replace(scored(attempt, 1.0 - attempt / 10, f"answer {attempt}"), cuts=(Cut("rationale", text),))

    sample = run(
        ctx,
        SelectBest(k=9, distinct="path"),
        reasoned(0, "First 3 + 4 = 7, so 7 * 2 = $14."),
        reasoned(1, "We add: 3+4=7. Doubled, that is 7*2 = 14"),
        reasoned(2, "Each is doubled: 3 * 2 = 6 and 4 * 2 = 8, in all 6 + 8 = 14."),
        reasoned(3, "Filter by country,\nthen count."),
        reasoned(4, "filter by  country, then count."),
        scored(5, 0.1, "SELECT a  FROM t"),
        scored(6, 0.0, "select a from t"),
    )
    assert [chosen.attempt for chosen in sample.chosen] == [0, 2, 3, 5]
