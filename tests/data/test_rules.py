import asyncio
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastdistill.core.types import FinishReason, Outcome, Sample, Verdict
from fastdistill.data.rules import LONGEST_SQL, RuleFilter, RuleReason, sql_problem
from tests.context import TestContext, candidate


def judge(tmp_path: Path, answer: str, finish: FinishReason = FinishReason.STOP, **config: Any) -> Verdict:
    gate = RuleFilter(name="rules", **config)
    sample = Sample(0, "t.jsonl:1", {}, candidates=(candidate(answer, finish=finish),))

    async def judged(ctx: TestContext) -> Sample:
        async with gate.opened(ctx):
            return await gate.run(sample, ctx)

    with closing(TestContext(tmp_path)) as ctx:
        return asyncio.run(judged(ctx)).candidates[0].verdicts[0]


@pytest.mark.parametrize(
    ("answer", "config", "reason", "detail"),
    [
        ("SELECT 1", {}, RuleReason.OK, {}),
        ("", {}, RuleReason.EMPTY, {"chars": 0}),
        (" \n", {}, RuleReason.EMPTY, {"chars": 2}),
        ("", {"min_chars": 0}, RuleReason.OK, {}),
        ("ab", {"min_chars": 3}, RuleReason.TOO_SHORT, {"chars": 2, "min_chars": 3}),
        ("abc", {"min_chars": 3, "max_chars": 3}, RuleReason.OK, {}),
        ("abcd", {"max_chars": 3}, RuleReason.TOO_LONG, {"chars": 4, "max_chars": 3}),
        ("abc", {"required": ["a", "c$"]}, RuleReason.OK, {}),
        ("abc", {"required": ["a", "d"]}, RuleReason.REQUIRED_MISSING, {"pattern": "d"}),
        ("abC", {"forbidden": ["x", "(?i)c"]}, RuleReason.FORBIDDEN_FOUND, {"pattern": "(?i)c", "found": "C", "at": 2}),
        ("WITH a AS (SELECT 1) SELECT * FROM a", {"sql": True}, RuleReason.OK, {}),
        ("VALUES (1)", {"sql": "sqlite"}, RuleReason.OK, {}),
        ("hello world", {"sql": True}, RuleReason.UNPARSABLE_SQL, {"problem": "alias, not a query"}),
        ("DROP TABLE t", {"sql": True}, RuleReason.UNPARSABLE_SQL, {"problem": "drop, not a query"}),
        ("SELECT 1; SELECT 2", {"sql": True}, RuleReason.UNPARSABLE_SQL, {"problem": "2 statements"}),
        ("-- SELECT 1", {"sql": True}, RuleReason.UNPARSABLE_SQL, {"problem": "0 statements"}),
    ],
)
def test_the_first_rule_broken_is_the_reason(
    tmp_path: Path, answer: str, config: dict[str, Any], reason: RuleReason, detail: dict[str, Any]
) -> None:
    verdict = judge(tmp_path, answer, **config)
    assert (verdict.reason, verdict.detail) == (reason, detail)
    assert verdict.outcome is (Outcome.PASS if reason is RuleReason.OK else Outcome.FAIL)
    assert verdict.gate == "rules"


def test_an_answer_cut_short_fails_unless_allowed(tmp_path: Path) -> None:
    assert judge(tmp_path, "SELECT 1", FinishReason.LENGTH).reason == RuleReason.TRUNCATED
    assert judge(tmp_path, "SELECT 1", FinishReason.LENGTH, allow_truncated=True).outcome is Outcome.PASS


def test_a_filtered_answer_always_fails(tmp_path: Path) -> None:
    verdict = judge(tmp_path, "SELECT 1", FinishReason.CONTENT_FILTER, allow_truncated=True)
    assert verdict.reason == RuleReason.CONTENT_FILTERED


def test_length_comes_before_any_pattern(tmp_path: Path) -> None:
    verdict = judge(tmp_path, "a" * 5_000_000 + "!", max_chars=512, required=["(a+)+$"])
    assert verdict.reason == RuleReason.TOO_LONG


@pytest.mark.parametrize(
    "sql", ["SELECT ", "SELECT 'a", "SELECT a FROM WHERE", "SELECT " + "(" * 5000 + "1" + ")" * 5000, "(" * LONGEST_SQL]
)
def test_broken_sql_fails_and_harms_nothing(tmp_path: Path, sql: str) -> None:
    assert judge(tmp_path, sql, sql=True).reason == RuleReason.UNPARSABLE_SQL


def test_sql_beyond_any_query_is_not_parsed(tmp_path: Path) -> None:
    verdict = judge(tmp_path, "SELECT " + "a," * 1_000_000 + "a", sql=True)
    assert verdict.reason == RuleReason.UNPARSABLE_SQL
    assert str(LONGEST_SQL) in verdict.detail["problem"]


SLOW = r"^(a|aa)+$"


@pytest.mark.parametrize(("kind", "at"), [("required", 0), ("forbidden", 1)])
def test_a_pattern_that_takes_for_ever_is_error_and_is_named(tmp_path: Path, kind: str, at: int) -> None:
    config: dict[str, Any] = {"required": ["a"], "forbidden": ["x"]}
    config[kind].insert(at, SLOW)
    verdict = judge(tmp_path, "a" * 100 + "b", **config)
    assert (verdict.outcome, verdict.reason) == (Outcome.ERROR, RuleReason.PATTERN_TOO_SLOW)
    assert verdict.detail == {"pattern": SLOW, "detail": "more than 1 s of CPU time"}


@pytest.mark.parametrize(("end", "reason"), [("x", RuleReason.OK), ("", RuleReason.FORBIDDEN_FOUND)])
def test_one_that_takes_a_while_judges_as_any_other(tmp_path: Path, end: str, reason: RuleReason) -> None:
    assert judge(tmp_path, "\n" + " " * 8_000 + "y" + " " * 100 + end, forbidden=[r"\s+$"]).reason == reason


def test_patterns_are_searched_in_any_thread(tmp_path: Path) -> None:
    """As a notebook's run has one of its own: there nothing can be interrupted."""
    found: list[Verdict] = []
    for answer in ("abc", "a" * 100 + "b"):

        def search(answer: str = answer) -> None:
            found.append(judge(tmp_path, answer, forbidden=["(?i)C$", SLOW]))

        thread = threading.Thread(target=search)
        thread.start()
        thread.join()
    assert [verdict.reason for verdict in found] == [RuleReason.FORBIDDEN_FOUND, RuleReason.PATTERN_TOO_SLOW]
    assert found[0].detail == {"pattern": "(?i)C$", "found": "c", "at": 2}


@pytest.mark.parametrize("config", [{"required": ["a("]}, {"min_chars": 5, "max_chars": 4}, {"sql": "tsql"}, {"x": 1}])
def test_a_wrong_config_is_found_before_anything_runs(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RuleFilter(**config)


def test_the_fingerprint_changes_with_any_rule() -> None:
    configs: list[dict[str, Any]] = [{}, {"required": ["a"]}, {"required": ["b"]}, {"forbidden": ["a"]}, {"sql": True}]
    assert len({RuleFilter(**config).fingerprint for config in configs}) == len(configs)


def test_an_answer_that_is_no_query_says_nothing_on_the_users_screen(caplog: pytest.LogCaptureFixture) -> None:
    assert sql_problem("CREATE cityow1sut NOT studios BET airline product age") == "command, not a query"
    assert not caplog.records
