"""The floor: a rate is enough when the lower bound of its interval is."""

from typing import Any

import pytest
from pydantic import ValidationError

from fastdistill.control.floor import Floor
from fastdistill.control.tally import Tally
from fastdistill.core.types import Candidate, Completion, FinishReason, Outcome, Prompt, Sample, Verdict

PROMPT = Prompt("vllm", "m", (), {})


def run(passed: int, failed: int, errors: int = 0) -> Tally:
    """Samples with one candidate each, judged by SQLiteExecEval."""
    tally = Tally([])
    outcomes = [Outcome.PASS] * passed + [Outcome.FAIL] * failed + [Outcome.ERROR] * errors
    for number, outcome in enumerate(outcomes):
        detail = {} if outcome is Outcome.ERROR else {"exec_pass": outcome is Outcome.PASS}
        verdict = Verdict("SQLiteExecEval", "f", outcome, "ok", None, detail)
        done = Completion("SELECT 1", FinishReason.STOP)
        candidate = Candidate(str(number), 0, 0, "k", PROMPT, done, "SELECT 1", verdicts=(verdict,))
        tally.add(Sample(number, f"t:{number}", {}, sample_id=str(number), candidates=(candidate,)))
    return tally


def met(tally: Tally, **require: Any) -> list[bool]:
    return [check["met"] for check in Floor(**require).check(tally)]


@pytest.mark.parametrize("name", ["exec_pass_rate", "accept_rate"])
def test_the_lower_bound_decides_not_the_rate(name: str) -> None:
    # 45 of 50 is 90%, and by Wilson 78.6% to 95.7%.
    assert met(run(45, 5), **{name: 0.78}) == [True]
    assert met(run(45, 5), **{name: 0.79}) == [False]
    assert met(run(450, 50), **{name: 0.87}) == [True], "more samples, narrower interval"


def test_a_perfect_small_run_is_no_proof() -> None:
    assert met(run(50, 0), exec_pass_rate=0.92) == [True]
    assert met(run(50, 0), exec_pass_rate=0.93) == [False]


def test_a_rate_that_nothing_was_measured_for_is_not_met() -> None:
    checks = Floor(gold_match_rate=0.0, pass_rate={"RuleFilter": 0.0}).check(run(3, 0))
    assert [check["met"] for check in checks] == [False, False]
    assert checks[0]["reached"] == {"successes": 0, "total": 0, "rate": None, "low": None, "high": None}


def test_what_could_not_be_judged_counts_for_no_side() -> None:
    assert Floor(exec_pass_rate=0.5).check(run(45, 5, 100)) == Floor(exec_pass_rate=0.5).check(run(45, 5))


def test_counts_are_taken_as_they_are() -> None:
    assert met(run(7, 3), min_total=10, min_accepted=7) == [True, True]
    assert met(run(7, 3), min_total=11, min_accepted=8) == [False, False]


def test_a_gate_is_named() -> None:
    (check,) = Floor(pass_rate={"SQLiteExecEval": 0.5}).check(run(45, 5))
    assert (check["requirement"], check["required"], check["met"]) == ("pass_rate.SQLiteExecEval", 0.5, True)


def test_no_requirement_is_no_check() -> None:
    assert Floor().check(run(0, 5)) == []


@pytest.mark.parametrize(
    "wrong", [{"min_total": 0}, {"accept_rate": 1.1}, {"exec_pas_rate": 0.5}, {"pass_rate": {"RuleFilter": 65}}]
)
def test_a_floor_that_can_not_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Floor.model_validate(wrong)
