from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fastdistill.core.canonical import canonical_json, sample_id
from fastdistill.core.errors import ConfigError
from fastdistill.core.types import Sample, Status
from fastdistill.data.prepare import CanonicalizeFields, Deduplicate
from tests.context import TestContext

CANONICALIZE = CanonicalizeFields(name="canonicalize", fields=("q",))


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def canonicalize(
    ctx: TestContext, *records: Mapping[str, Any], step: CanonicalizeFields = CANONICALIZE
) -> list[Sample]:
    samples = (Sample(index, f"t.jsonl:{index + 1}", record) for index, record in enumerate(records))
    return [*filter(None, step.run(samples, ctx))]


def test_a_sample_is_its_task_and_its_fields_alone(ctx: TestContext) -> None:
    (sample,) = canonicalize(ctx, {"task_id": "a", "q": "x", "gold": "y"})
    assert (sample.task_id, sample.input) == ("a", {"q": "x"})
    assert sample.sample_id == sample_id("a", canonical_json({"q": "x"}))


def test_task_ids_may_be_integers_or_absent(ctx: TestContext) -> None:
    samples = canonicalize(ctx, {"task_id": 17, "q": 1}, {"q": 2}, {"task_id": None, "q": 3})
    assert [sample.task_id for sample in samples] == ["17", "", ""]


@pytest.mark.parametrize("task_id", [True, 1.5, ["a"], {"a": 1}])
def test_another_task_id_fails(ctx: TestContext, task_id: object) -> None:
    assert canonicalize(ctx, {"task_id": task_id, "q": 1}) == []
    assert ctx.reasons == ["bad_task_id"]


def test_a_missing_field_is_named_with_those_there(ctx: TestContext) -> None:
    canonicalize(ctx, {"question": "x", "gold": "y"})
    failure = ctx.discarded[0].failures[0]
    assert (failure.step, failure.reason) == ("canonicalize", "missing_field")
    assert failure.message == "t.jsonl:1: no field q; the record has: question, gold"


@pytest.mark.parametrize("value", [float("nan"), b"bytes", "\ud800", {"\u00e9": 1, "e\u0301": 2}])
def test_what_has_no_canonical_form_fails_alone(ctx: TestContext, value: object) -> None:
    samples = canonicalize(ctx, {"task_id": "bad", "q": value}, {"task_id": "good", "q": "x"})
    assert [sample.task_id for sample in samples] == ["good"]
    assert ctx.reasons == ["not_canonical"]


def test_a_task_id_of_other_content_names_both_places(ctx: TestContext) -> None:
    samples = canonicalize(ctx, {"task_id": "a", "q": 1}, {"task_id": "a", "q": 2}, {"task_id": "b", "q": 1})
    assert [sample.index for sample in samples] == [0, 2]
    (failure,) = ctx.discarded[0].failures
    assert failure.reason == "task_id_conflict"
    assert "t.jsonl:2" in failure.message
    assert "t.jsonl:1" in failure.message
    assert ctx.discarded[0].status is Status.FAILED


@pytest.mark.parametrize("task", [{"task_id": "a"}, {}, {"task_id": "cafe\u0301"}])
def test_the_same_task_again_is_a_duplicate_of_the_first(ctx: TestContext, task: dict[str, str]) -> None:
    again = {"task_id": "caf\u00e9"} if "e\u0301" in task.get("task_id", "") else task
    assert len(canonicalize(ctx, {**task, "q": 1}, {**again, "q": 1.0, "gold": "other"})) == 1
    (sample,) = ctx.discarded
    assert sample.status is Status.DUPLICATE
    assert sample.failures[0].message == "t.jsonl:2: the same task as t.jsonl:1"


def test_content_that_looks_like_a_task_id_is_not_one(ctx: TestContext) -> None:
    other = sample_id("", canonical_json({"q": 1}))
    assert len(canonicalize(ctx, {"q": 1}, {"task_id": other, "q": 1})) == 2


def test_deduplicate_compares_the_input_whatever_the_task(ctx: TestContext) -> None:
    samples = canonicalize(ctx, {"task_id": "a", "q": 1}, {"task_id": "b", "q": 1.0}, {"task_id": "c", "q": 2})
    kept = filter(None, Deduplicate(name="dedup").run(iter(samples), ctx))
    assert [sample.task_id for sample in kept] == ["a", "c"]
    assert [(s.task_id, s.status, s.failures[0].reason) for s in ctx.discarded] == [
        ("b", Status.DUPLICATE, "duplicate")
    ]
    assert ctx.discarded[0].failures[0].message == "t.jsonl:2: the same content as t.jsonl:1"


def test_deduplicate_may_compare_other_fields(ctx: TestContext) -> None:
    samples = canonicalize(ctx, {"q": 1, "gold": "x"}, {"q": 2, "gold": "x"}, {"q": 3})
    kept = filter(None, Deduplicate(fields=("gold",)).run(iter(samples), ctx))
    assert [sample.record["q"] for sample in kept] == [1]
    assert ctx.reasons == ["duplicate", "missing_field"]


def test_deduplicate_with_nothing_to_compare_says_so(ctx: TestContext) -> None:
    with pytest.raises(ConfigError, match="CanonicalizeFields"):
        list(Deduplicate().run(iter([Sample(0, "t.jsonl:1", {"q": 1})]), ctx))


def test_both_steps_are_lazy(ctx: TestContext) -> None:
    endless = (Sample(index, "s", {"q": index}) for index in iter(int, 1))
    assert next(filter(None, Deduplicate().run(CANONICALIZE.run(endless, ctx), ctx))).index == 0
