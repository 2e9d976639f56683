import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fastdistill.core.types import Candidate, Outcome, Sample, Status, Verdict
from fastdistill.data.export.hard import ExportHardCases
from tests.context import TestContext, candidate


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def judged(attempt: int, *outcomes: Outcome, score: float | None = None, answer: str = "SELECT 1") -> Candidate:
    """A candidate with the verdicts of as many gates as there are outcomes."""
    made = replace(candidate(answer, attempt), score=score)
    for at, outcome in enumerate(outcomes):
        made = made.judged(Verdict(f"gate-{at}", "f", outcome, {"pass": "ok"}.get(outcome, f"bad-{attempt % 2}")))
    return made


PASS, FAIL, ERROR = Outcome.PASS, Outcome.FAIL, Outcome.ERROR


def export(ctx: TestContext, *samples: Sample, **options: Any) -> list[dict[str, Any]]:
    assert list(ExportHardCases(**options).run(iter(samples), ctx)) == list(samples)
    lines = (ctx.dist / "hard" / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def sample(index: int, *candidates: Candidate, status: Status = Status.OPEN) -> Sample:
    return Sample(index, f"t:{index}", {"q": index}, "task", f"id-{index}", candidates=candidates, status=status)


def test_a_hard_case_has_all_that_was_tried(ctx: TestContext) -> None:
    never = sample(
        0,
        judged(0, FAIL),
        judged(1, PASS, FAIL, score=0.5, answer="é"),
        judged(2, PASS, FAIL, score=0.5),
        judged(3, FAIL),
    )
    (row,) = export(ctx, never)
    assert row == {
        "id": "id-0",
        "record": {"q": 0},
        "attempts": 4,
        "pass_rate": 0.0,
        "reasons": {"gate-0": {"bad-0": 1, "bad-1": 1}, "gate-1": {"bad-0": 1, "bad-1": 1}},
        "best": "é",
        "fd_id": "id-0#1",
        "fd_sample_id": "id-0",
        "fd_task_id": "task",
        "fd_source": "t:0",
        "fd_candidate_id": "candidate-1",
        "fd_model": "teacher-1",
        "fd_seed": 1,
        "fd_attempt": 1,
        "fd_score": 0.5,
        "fd_gates": [
            {"gate": "gate-0", "outcome": "pass", "reason": "ok", "score": None},
            {"gate": "gate-1", "outcome": "fail", "reason": "bad-1", "score": None},
        ],
    }


def test_what_passed_or_could_not_be_judged_is_no_hard_case(ctx: TestContext) -> None:
    assert export(
        ctx,
        sample(0, judged(0, PASS), judged(1, FAIL)),
        sample(1, judged(0, ERROR), judged(1, ERROR)),
        sample(2),
        sample(3, judged(0, FAIL), status=Status.SKIPPED),
    ) == []  # fmt: skip


def test_the_highest_score_and_then_the_earliest_attempt_is_best(ctx: TestContext) -> None:
    (row,) = export(ctx, sample(0, judged(0, FAIL), judged(1, FAIL, score=0.2), judged(2, FAIL, score=0.2)))
    assert row["fd_attempt"] == 1


def test_what_seldom_passes_may_count_too(ctx: TestContext) -> None:
    seldom = sample(0, judged(0, FAIL), judged(1, PASS), judged(2, FAIL), judged(3, ERROR))
    (row,) = export(ctx, seldom, sample(1, judged(0, PASS), judged(1, FAIL)), max_pass_rate=0.4)
    assert (row["id"], row["attempts"], row["pass_rate"], row["fd_attempt"]) == ("id-0", 4, 1 / 3, 1)


def test_a_lone_surrogate_costs_its_sample_alone(ctx: TestContext) -> None:
    bad, good = sample(0, judged(0, FAIL, answer="\ud800")), sample(1, judged(0, FAIL))
    assert list(ExportHardCases().run(iter([bad, good]), ctx)) == [good]
    assert ctx.reasons == ["not_unicode"]
