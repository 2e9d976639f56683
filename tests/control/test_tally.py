"""Counts and content hashes of a run: the same figures, whatever order samples finish in."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fastdistill.control.tally import ContentHash, Tally, error_group
from fastdistill.core.errors import SampleError
from fastdistill.core.step import Step
from fastdistill.core.types import (
    Candidate,
    Completion,
    Cut,
    Failure,
    FinishReason,
    Outcome,
    Prompt,
    Sample,
    Status,
    Usage,
    Verdict,
)


class TextGeneration(Step):
    """Stands in the list of steps; what the tally reads is its name."""


class RuleFilter(Step):
    pass


class SQLiteExecEval(Step):
    pass


STEPS = [TextGeneration(name="TextGeneration"), RuleFilter(name="RuleFilter"), SQLiteExecEval(name="SQLiteExecEval")]
PROMPT = Prompt("vllm", "m", ({"role": "user", "content": "Q"},), {"temperature": 1.0})


def candidate(attempt: int, *outcomes: Outcome, text: str = "SELECT 1", **detail: Any) -> Candidate:
    """Judged by RuleFilter, then by SQLiteExecEval, whose verdict has the detail."""
    gates = ["RuleFilter", "SQLiteExecEval"][: len(outcomes)]
    details: list[dict[str, Any]] = [{}, detail]
    verdicts = [
        Verdict(gate, "f", outcome, "ok" if outcome is Outcome.PASS else "bad", None, found)
        for gate, outcome, found in zip(gates, outcomes, details, strict=False)
    ]
    done = Completion(text, FinishReason.STOP, Usage(10, 5), model="m-served", build="b1")
    return Candidate(f"c{attempt}", attempt, attempt, "k", PROMPT, done, text, verdicts=tuple(verdicts))


def sample(number: int, *candidates: Candidate, **fields: Any) -> Sample:
    own = tuple(replace(each, candidate_id=f"{number}.{each.attempt}") for each in candidates)
    return Sample(number, f"train.jsonl:{number}", {}, sample_id=f"id{number}", candidates=own, **fields)


PASS, FAIL, ERROR = Outcome.PASS, Outcome.FAIL, Outcome.ERROR
SAMPLES = [
    sample(0, candidate(0, PASS, PASS, exec_pass=True, gold_match=True), candidate(1, FAIL)),
    sample(
        1, candidate(0, PASS, FAIL, exec_pass=False, exec_error="no such column: t.naem"), candidate(1, PASS, ERROR)
    ),
    sample(2, candidate(0, PASS, FAIL, exec_pass=True, gold_match=False)),
    sample(3, candidate(0, PASS, FAIL, exec_pass=False, exec_error="no such column: nme")),
    sample(4, candidate(0, PASS, PASS, exec_pass=True, gold_match=True), candidate(1, PASS, ERROR)),
    sample(5).failed("TextGeneration", SampleError("server_error", "teacher: 500")),
    sample(6).failed("TextGeneration", SampleError("server_error", "teacher: 500 again")),
    sample(7, status=Status.DUPLICATE, failures=(Failure("Deduplicate", "duplicate", "as 3"),)),
]


def tally(samples: Sequence[Sample] = SAMPLES) -> Tally:
    counts = Tally(STEPS)
    for each in samples:
        counts.add(each)
    return counts


def test_every_sample_is_counted_once_by_how_it_ended() -> None:
    counts = tally()
    assert counts.samples == 8
    assert counts.statuses == {Status.OPEN: 5, Status.FAILED: 2, Status.DUPLICATE: 1}
    assert (counts.accepted_samples, counts.undecided_samples, counts.failed) == (2, 1, 2)
    assert (counts.candidates, counts.selected) == (8, 2)
    assert counts.outcomes == {PASS: 2, FAIL: 4, ERROR: 2}
    assert (counts.prompt_tokens, counts.completion_tokens) == (80, 40)
    assert counts.served == {("vllm", "m", "m-served", "b1"): 8}


def test_what_could_not_be_judged_is_in_no_rate() -> None:
    counts = tally()
    assert (counts.gates["SQLiteExecEval"].pass_rate().successes, counts.gates["SQLiteExecEval"].pass_rate().total) == (
        2,
        5,
    )
    assert (counts.accept_rate().successes, counts.accept_rate().total) == (2, 4)
    assert (counts.flag_rate("exec_pass").successes, counts.flag_rate("exec_pass").total) == (3, 5)
    assert (counts.flag_rate("gold_match").successes, counts.flag_rate("gold_match").total) == (2, 3)
    assert counts.flag_rate("never_set").rate is None


def test_an_undecided_sample_that_an_export_can_not_take_leaves_the_rate() -> None:
    counts = tally([SAMPLES[0], SAMPLES[1]])
    counts.leave(SAMPLES[1].failed("RuleFilter", SampleError("missing_field", "no field q")))
    assert (counts.accept_rate().successes, counts.accept_rate().total, counts.undecided_samples) == (1, 1, 0)


def test_stages_add_up() -> None:
    stages = tally(SAMPLES[:7]).stages()
    assert [(stage["samples_in"], stage["samples_kept"]) for stage in stages] == [(7, 5), (5, 5), (5, 5)]
    assert stages[0]["samples_rejected"] == {"failed": 2}
    judged = stages[2]["candidates"]
    assert judged["judged"] == judged["pass"] + judged["fail"] + judged["error"] == 7
    rules = stages[1]["candidates"]
    assert rules["judged"] == 8
    assert sum(rules["reasons"].values()) == rules["fail"] + rules["error"] == 1


def test_equal_mistakes_are_one_group_with_a_few_examples() -> None:
    (group,) = tally().stages()[2]["candidates"]["exec_errors"]
    assert group == {
        "error": "no such column", "count": 2, "examples": ["no such column: nme", "no such column: t.naem"],
    }  # fmt: skip
    failures = tally().failures["TextGeneration", "server_error"]
    assert (failures.count, failures.examples) == (2, ["teacher: 500", "teacher: 500 again"])


@pytest.mark.parametrize(
    ("message", "group"),
    [
        ("no such column: t.naem", "no such column"),
        ("no such table: cities", "no such table"),
        ('near "FORM": syntax error', "syntax error"),
        ('near "(": syntax error', "syntax error"),
        ("incomplete input", "incomplete input"),
        ("no such function: YEAR", "no such function"),
        ("ambiguous column name: id", "ambiguous column name"),
        ('unrecognized token: "#"', "unrecognized token"),
        ("wrong number of arguments to function COUNT()", "wrong number of arguments to function COUNT"),
        ("", ""),
    ],
)
def test_an_error_is_grouped_without_its_particulars(message: str, group: str) -> None:
    assert error_group(message) == group


@given(st.permutations(SAMPLES))
def test_figures_and_hashes_do_not_depend_on_the_order(samples: list[Sample]) -> None:
    one, other = tally(), tally(samples)
    assert {name: str(content) for name, content in one.hashes.items()} == {
        name: str(content) for name, content in other.hashes.items()
    }
    assert one.stages() == other.stages()
    assert {key: (f.count, f.examples) for key, f in one.failures.items()} == {
        key: (f.count, f.examples) for key, f in other.failures.items()
    }


@pytest.mark.parametrize(
    ("stage", "changed"),
    [
        ("candidates", sample(0, candidate(0, PASS, PASS, text="SELECT 2"))),
        ("SQLiteExecEval", sample(0, candidate(0, PASS, FAIL))),
        ("selected", sample(0, candidate(0, PASS, FAIL))),
        ("samples", sample(2, candidate(0, PASS, PASS))),
    ],
)
def test_a_content_hash_changes_with_the_content(stage: str, changed: Sample) -> None:
    before = tally([sample(0, candidate(0, PASS, PASS)), SAMPLES[1]]).hashes
    after = tally([changed, SAMPLES[1]]).hashes
    assert str(before[stage]) != str(after.get(stage))


@given(st.lists(st.lists(st.text(), min_size=1, max_size=2), max_size=6))
def test_a_content_hash_counts_how_often_an_item_comes(items: list[list[str]]) -> None:
    once, twice = ContentHash(), ContentHash()
    for item in items:
        once.add(tuple(item))
        twice.add(tuple(item))
        twice.add(tuple(item))
    assert (str(once) == str(twice)) is (not items)
    assert len(str(once)) == 64


def test_cuts_and_scores_are_counted() -> None:
    scored = replace(candidate(0, PASS, PASS), score=0.123456, cuts=(Cut("fence", "```"), Cut("fence", "```")))
    counts = tally([sample(0, scored)])
    assert counts.cuts == {"fence": 2}
    assert counts.scores == {0.12: 1}
