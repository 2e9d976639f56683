import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from pydantic import ValidationError

from fastdistill.core.types import Candidate, Outcome, Sample, Verdict
from fastdistill.data.export.preference import ExportPreference
from tests.context import TestContext, candidate

ASKED = ({"role": "system", "content": "SQL only."}, {"role": "user", "content": "How many?"})


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def answer(
    attempt: int,
    text: str,
    outcome: Outcome = Outcome.PASS,
    score: float | None = None,
    step: str = "TextGeneration",
    result: str | None = None,
) -> Candidate:
    judged = candidate(text, attempt, messages=ASKED).judged(
        Verdict("SQLiteExecEval", "f", outcome, "r", None, {"result_signature": result} if result else {})
    )
    return replace(judged, score=score, step=step, candidate_id=f"{step}-{attempt}")


def export(ctx: TestContext, *candidates: Candidate, **config: Any) -> list[dict[str, Any]]:
    sample = Sample(0, "t.jsonl:1", {"table": "t1"}, "task", "id", {}, candidates)
    assert list(ExportPreference(name="pairs", **config).run(iter([sample]), ctx)) == [sample]
    return rows(ctx, "preference/train.jsonl")


def rows(ctx: TestContext, path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ctx.dist / path).read_bytes().splitlines()]


def texts(pairs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]


def test_a_pair_is_lists_of_messages_and_all_else_is_ours(ctx: TestContext) -> None:
    (pair,) = export(ctx, answer(0, "good", score=1.0), answer(1, "bad", Outcome.FAIL, 0.5))
    assert pair["prompt"] == list(ASKED)
    assert pair["chosen"] == [{"role": "assistant", "content": "good"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "bad"}]
    assert [name for name in pair if not name.startswith("fd_")] == ["prompt", "chosen", "rejected"]
    assert (pair["fd_margin"], pair["fd_by"], pair["fd_rejected_reason"]) == (0.5, "execution", "SQLiteExecEval: r")
    assert pq.read_table(ctx.dist / "preference" / "train.parquet").to_pylist() == [pair]


def test_what_execution_says_comes_before_scores(ctx: TestContext) -> None:
    # The judge likes the wrong one better, and it is rejected all the same.
    pairs = export(ctx, answer(0, "good", score=0.1), answer(1, "bad", Outcome.FAIL, 0.9))
    assert texts(pairs) == [("good", "bad")]


def test_scores_decide_between_accepted_answers_by_a_margin(ctx: TestContext) -> None:
    pairs = export(ctx, answer(0, "aaa", score=0.9), answer(1, "bbb", score=0.75), answer(2, "ccc", score=0.7))
    assert texts(pairs) == [("aaa", "ccc")]
    assert pairs[0]["fd_by"] == "score"
    assert export(ctx, answer(0, "aaa"), answer(1, "bbb")) == []


def test_an_error_is_in_no_pair_and_has_no_label(ctx: TestContext) -> None:
    assert export(ctx, answer(0, "good"), answer(1, "what", Outcome.ERROR)) == []
    assert [row["completion"][0]["content"] for row in rows(ctx, "kto/train.jsonl")] == ["good"]


def test_a_failed_answer_is_never_chosen(ctx: TestContext) -> None:
    assert export(ctx, answer(0, "bad", Outcome.FAIL, 0.9), answer(1, "vile", Outcome.FAIL, 0.0)) == []


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (answer(1, " good\n", Outcome.FAIL), "equal"),
        (answer(1, "fine", Outcome.FAIL, result="r1"), "equal"),
        (answer(1, "bad" * 4, Outcome.FAIL), "length"),
        (answer(1, "b", Outcome.FAIL), "length"),
        (answer(1, "", Outcome.FAIL), "length"),
    ],
)
def test_equal_answers_and_unlike_lengths_make_no_pair(ctx: TestContext, rejected: Candidate, reason: str) -> None:
    assert export(ctx, answer(0, "good", result="r1"), rejected) == []
    assert ctx.reports["pairs"][f"left_out_{reason}"] == 1


def test_the_lowest_scores_are_rejected_and_the_chosen_take_turns(ctx: TestContext) -> None:
    pairs = export(
        ctx,
        answer(0, "good", score=1.0),
        answer(1, "fine", score=0.9),
        answer(2, "bad0", Outcome.FAIL, 0.5),
        answer(3, "bad1", Outcome.FAIL),
        answer(4, "bad2", Outcome.FAIL, 0.1),
    )
    assert texts(pairs) == [("good", "bad2"), ("fine", "bad0")]


def test_of_many_scores_the_outlier_is_not_the_one_rejected(ctx: TestContext) -> None:
    usual = [answer(at, f"n{at:02}", Outcome.FAIL, (40 + at) / 100) for at in range(40)]
    outlier, good = answer(50, "out", Outcome.FAIL, 0.0), answer(60, "yes", score=1.0)
    few, many = ([good, outlier, *usual[:number]] for number in (29, 30))
    assert texts(export(ctx, *few, max_pairs=1)) == [("yes", "out")]
    assert texts(export(ctx, *many, max_pairs=1)) == [("yes", "n00")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("teacher_candidates", [("T-good", "T-bad")]),
        ("student_candidates", [("S-good", "S-bad")]),
        ("teacher_vs_student", [("T-good", "S-bad")]),
    ],
)
def test_pairs_come_from_teacher_student_or_both(ctx: TestContext, source: str, expected: object) -> None:
    pairs = export(
        ctx,
        answer(0, "T-good"),
        answer(1, "T-bad", Outcome.FAIL),
        answer(0, "S-good", step="student"),
        answer(1, "S-bad", Outcome.FAIL, step="student"),
        pair_source=source,
        student_step="student",
    )
    assert texts(pairs) == expected


def test_the_report_tells_how_often_the_chosen_are_longer(ctx: TestContext) -> None:
    export(ctx, answer(0, "long"), answer(1, "sho", Outcome.FAIL), answer(2, "longer", Outcome.FAIL))
    report = ctx.reports["pairs"]
    rate: Any = report["chosen_longer_rate"]
    assert (report["pairs"], rate["successes"], rate["total"], rate["rate"]) == (2, 1, 2, 0.5)


def test_labels_are_mixed_evenly_and_always_in_the_same_order(ctx: TestContext) -> None:
    def samples() -> Iterator[Sample]:
        for n in range(200):
            outcome = Outcome.PASS if n < 100 else Outcome.FAIL  # all right ones come first
            yield Sample(n, f"t:{n}", {}, f"t{n}", f"id{n}", {}, (answer(0, f'answer {n} "label":true', outcome),))

    found = []
    for _ in range(2):
        list(ExportPreference(formats=("jsonl", "llamafactory")).run(samples(), ctx))
        found.append(rows(ctx, "kto/train.jsonl"))
    assert found[0] == found[1]
    same_mix = [row["label"] for row in rows(ctx, "lf/kto_train.jsonl")]
    assert all(4 <= sum(same_mix[n : n + 10]) <= 6 for n in range(0, 200, 10))
    labels = [row["label"] for row in found[0]]
    assert all(4 <= sum(labels[n : n + 10]) <= 6 for n in range(0, 200, 10))
    order = [row["fd_sample_id"] for row in found[0] if row["label"]]
    assert len(order) == 100
    assert order != sorted(order, key=lambda each: int(each[2:]))


def test_each_trainer_gets_its_own_dialect(ctx: TestContext) -> None:
    sample = Sample(0, "t:1", {}, "t", "id", {}, (answer(0, "good"), answer(1, "bad", Outcome.FAIL)))
    list(ExportPreference(formats=("llamafactory", "openai", "axolotl", "trl")).run(iter([sample]), ctx))
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    (llamafactory,) = rows(ctx, "lf/preference_train.jsonl")
    assert (llamafactory["chosen"], llamafactory["rejected"]) == (good, bad)  # a list would be a broken SFT row
    assert llamafactory["messages"] == list(ASKED)
    for row, said, label in zip(rows(ctx, "lf/kto_train.jsonl"), (good, bad), (True, False), strict=True):
        assert (row["messages"], row["label"]) == ([*ASKED, said], label)
        assert {name for name in row if not name.startswith("fd_")} == {"messages", "label"}
    assert rows(ctx, "openai/dpo_train.jsonl") == [
        {
            "input": {"messages": list(ASKED), "tools": [], "parallel_tool_calls": True},
            "preferred_output": [good],
            "non_preferred_output": [bad],
        }
    ]
    files = sorted(path.relative_to(ctx.dist).as_posix() for path in ctx.dist.rglob("*.*"))
    assert files == [
        "kto/train.parquet", "lf/kto_train.jsonl", "lf/preference_train.jsonl", "openai/dpo_train.jsonl",
        "preference/train.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"formats": ["mlx"]}, "ExportPreference writes no mlx"),
        ({"shapes": ["messages"]}, "ExportPreference writes no messages"),
        ({"pair_source": "teacher_vs_student"}, "needs student_step"),
        ({"length_ratio": [2, 0.5]}, "length_ratio"),
        ({"keep_fields": ["margin"]}, "fd_margin already"),
    ],
)
def test_a_wrong_config_is_found_before_anything_is_spent(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ExportPreference(**config)
