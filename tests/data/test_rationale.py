import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fastdistill.core.types import Candidate, Outcome, Sample, Verdict
from fastdistill.data.rationale import SplitRationale, rationale_of, split_rationale
from tests.context import TestContext, candidate


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def split(ctx: TestContext, step: SplitRationale, *candidates: Candidate, gold: str = "SELECT  7") -> list[Candidate]:
    sample = Sample(0, "t.jsonl:1", {"gold_sql": gold}, candidates=candidates)
    return list(asyncio.run(step.run(sample, ctx)).candidates)


@pytest.mark.parametrize(
    ("text", "status", "rationale", "answer"),
    [
        ("### RATIONALE\nfilter\n### ANSWER\nSELECT 1", "ok", "filter", "SELECT 1"),
        ("Sure!\n**### Rationale:**\na\nb\n\n###answer: SELECT 1\n", "ok", "a\nb", "SELECT 1"),
        ("### **RATIONALE**\nfilter\n### **Answer:**\nSELECT 1", "ok", "filter", "SELECT 1"),
        ("## RATIONALE\nfilter\n\n#### ANSWER ####\nSELECT 1", "ok", "filter", "SELECT 1"),
        ("***### RATIONALE***\nfilter\n__### ANSWER__: SELECT 1", "ok", "filter", "SELECT 1"),
        ("### RATIONALE\nadd\n### ANSWER\n# Answer: a sum\na + b", "ok", "add", "# Answer: a sum\na + b"),
        ("SELECT 1", "missing", "", "SELECT 1"),
        ("### RATIONALE\nonly this", "missing", "", "### RATIONALE\nonly this"),
        ("because\n### ANSWER\nSELECT 1", "missing", "because", "SELECT 1"),
        ("### ANSWER\nSELECT 1\n### RATIONALE\nafterwards", "missing", "", "SELECT 1"),
        ("### RATIONALE\na\n### ANSWER\nX\n### ANSWER\nY", "doubled", "a", "X"),
        ("### RATIONALE\na\n### ANSWER\nX\n### RATIONALE\nb\n### ANSWER\nY", "doubled", "a", "X"),
        ("### RATIONALE\na\n### RATIONALE\nb\n### ANSWER\nX", "doubled", "a\n### RATIONALE\nb", "X"),
        ("### RATIONALE\n\n### ANSWER\nX", "empty", "", "X"),
        ("### RATIONALE\na\n### ANSWER\n ", "empty", "a", ""),
        ("I say ### RATIONALE in a line\n### ANSWERS\nSELECT 1", "missing", "", None),
    ],
)
def test_the_first_of_each_part_counts_and_the_status_tells(
    text: str, status: str, rationale: str, answer: str | None
) -> None:
    found = split_rationale(text, "### RATIONALE", "### ANSWER")
    assert (found.status, found.rationale, found.answer) == (status, rationale, text if answer is None else answer)


def test_separators_can_be_others_and_the_first_can_be_in_the_prompt() -> None:
    assert split_rationale("6 * 7 = 42\n#### 42", "", "####")[:3] == ("ok", "6 * 7 = 42", "42")
    assert split_rationale("### 思考：甲\n**### 答案：**乙", "### 思考", "### 答案")[:3] == ("ok", "甲", "乙")
    assert split_rationale("思考：甲\n答案：乙", "思考：", "答案：")[:3] == ("ok", "甲", "乙")


@given(st.text(), st.text())
def test_what_was_put_together_comes_apart(rationale: str, answer: str) -> None:
    found = split_rationale(f"### RATIONALE\n{rationale}\n### ANSWER\n{answer}", "### RATIONALE", "### ANSWER")
    if "###" not in rationale + answer and rationale.strip() and answer.strip():
        assert found[:3] == ("ok", rationale.strip(), answer.strip())


def test_the_next_gates_see_the_answer_alone_and_the_raw_text_stays(ctx: TestContext) -> None:
    text = "Hi\n### RATIONALE\nfilter\n### ANSWER\nSELECT 1"
    (found,) = split(ctx, SplitRationale(), candidate(text))
    assert found.answer == "SELECT 1"
    assert found.completion.text == text
    assert [(cut.kind, cut.text) for cut in found.cuts] == [("rationale", "filter"), ("prose", "Hi")]
    (verdict,) = found.verdicts
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "ok")
    assert verdict.detail["rationale_ok"] is True
    assert verdict.detail["rationale_missing"] is False


def test_a_wave_later_nothing_is_split_again(ctx: TestContext) -> None:
    once = split(ctx, SplitRationale(), candidate("### RATIONALE\na\n### ANSWER\nX\n### ANSWER\nY"))
    assert split(ctx, SplitRationale(), *once) == once


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("### RATIONALE\n12345678901\n### ANSWER\nX", "too_long"),
        ("### RATIONALE\nselect\n7\n### ANSWER\nX", "leaks_gold"),
        ("### RATIONALE\n1234567890\n### ANSWER\nX\n### ANSWER\nX", "doubled"),
    ],
)
def test_a_rationale_that_is_not_fit_is_kept_but_never_exported(ctx: TestContext, text: str, status: str) -> None:
    step = SplitRationale(max_rationale_chars=10, gold_field="gold_sql")
    (found,) = split(ctx, step, candidate(text))
    assert found.verdicts[0].reason == status
    assert found.outcome is Outcome.PASS
    assert found.answer == "X"
    assert rationale_of(found) is None
    assert found.cuts[0].kind == "unusable_rationale"
    (strict,) = split(ctx, step.model_copy(update={"require": "ok"}), candidate(text))
    assert strict.outcome is Outcome.FAIL


def test_no_gold_leaks_nothing_and_the_rejected_are_left_alone(ctx: TestContext) -> None:
    text = "### RATIONALE\nany\n### ANSWER\nX"
    step = SplitRationale(gold_field="gold_sql")
    assert rationale_of(split(ctx, step, candidate(text), gold="  ")[0]) == "any"
    rejected = replace(candidate(text).judged(Verdict("rules", "f", Outcome.FAIL, "too_long")))
    assert split(ctx, step, rejected) == [rejected]
