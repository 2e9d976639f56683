import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table
from pydantic import ValidationError

from fastdistill.core.errors import InputError
from fastdistill.core.types import Sample, Status
from fastdistill.data.decontaminate import Decontaminate
from tests.context import TestContext

ITEM = "How many of the restaurants in the town of Lyon serve fish on a Friday night?"  # 16 words
HALF = "how many of the restaurants in the town"  # 8 of them
FOREIGN = "which river of this country is the longest one that flows to the sea"


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in ("What is it?", ITEM, "  ... ")))
    return path


def kept(ctx: TestContext, step: Decontaminate, *texts: str) -> list[str]:
    samples = (Sample(at, f"t:{at}", {"question": text}) for at, text in enumerate(texts))
    return [sample.record["question"] for sample in filter(None, step.run(samples, ctx))]


def step(*against: Path, **options: Any) -> Decontaminate:
    return Decontaminate(name="decontaminate", against=against, fields=("question",), **options)


def test_the_same_words_are_the_same_item(ctx: TestContext, evaluation: Path) -> None:
    assert kept(ctx, step(evaluation), ITEM.upper(), "what IS it", "What is this?", "...") == ["What is this?", "..."]
    assert [sample.status for sample in ctx.discarded] == [Status.CONTAMINATED] * 2
    failure = ctx.discarded[0].failures[0]
    assert (failure.step, failure.reason) == ("decontaminate", "contaminated")
    assert failure.message == "t:0: the same words as eval.jsonl:2"


def test_a_share_of_an_item_counts_not_of_the_sample(ctx: TestContext, evaluation: Path) -> None:
    """Eight words in a row are half of the item; only more than half counts, however long the text around it."""
    inside = f"{FOREIGN} {ITEM[:-7]} {FOREIGN}"
    assert kept(ctx, step(evaluation), HALF, f"{HALF} of", inside, FOREIGN) == [HALF, FOREIGN]
    assert [s.failures[0].message for s in ctx.discarded] == [
        "t:1: 56% of the words of eval.jsonl:2",
        "t:2: 94% of the words of eval.jsonl:2",
    ]


def test_words_in_another_order_or_in_short_runs_are_free(ctx: TestContext, evaluation: Path) -> None:
    words = ITEM.split()
    broken = " ".join(word for at in range(0, 16, 7) for word in (*words[at : at + 7], "perhaps"))
    texts = [" ".join(reversed(words)), broken]
    assert kept(ctx, step(evaluation), *texts) == texts
    assert kept(ctx, step(evaluation, ngram=7), broken) == []


def test_how_much_is_too_much_can_be_chosen(ctx: TestContext, evaluation: Path) -> None:
    assert kept(ctx, step(evaluation, max_coverage=0.4), HALF) == []
    assert kept(ctx, step(evaluation, max_coverage=0.95), ITEM[:-7]) == [ITEM[:-7]]


def test_each_file_has_its_counts_and_the_long_run_only_reports(ctx: TestContext, evaluation: Path) -> None:
    other = evaluation.with_name("other.jsonl")
    other.write_text(json.dumps({"question": FOREIGN}) + "\n" + json.dumps({"else": 1}) + "\n")
    both = step(evaluation, other, max_coverage=0.93)
    long_run = " ".join(FOREIGN.split()[:13])
    assert kept(ctx, both, ITEM, f"{long_run} ocean", FOREIGN, ITEM[:-7], "free") == [f"{long_run} ocean", "free"]
    assert both.findings()["against"] == [
        {"path": str(evaluation), "items": 3, "without_text": 1, "exact": 1, "ngram": 1, "report_ngram": 2},
        {"path": str(other), "items": 2, "without_text": 1, "exact": 1, "ngram": 0, "report_ngram": 2},
    ]
    assert both.inputs() == [evaluation, other]


def test_a_text_without_spaces_is_compared_by_characters(ctx: TestContext, tmp_path: Path) -> None:
    path = tmp_path / "zh.jsonl"
    path.write_text(json.dumps({"question": "北京市有多少家餐厅提供鱼？"}), encoding="utf-8")
    assert kept(ctx, step(path), "请问北京市有多少家餐厅呢", "上海有多少家餐厅？") == ["上海有多少家餐厅？"]


@pytest.mark.parametrize("ending", ["jsonl.gz", "parquet"])
def test_any_file_that_can_be_loaded_will_do(ctx: TestContext, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"eval.{ending}"
    if ending == "parquet":
        write_table(pa.table({"asked": [ITEM]}), path)
    else:
        path.write_bytes(gzip.compress(json.dumps({"asked": ITEM}).encode()))
    assert kept(ctx, step(path, against_fields=("asked",)), ITEM, "free") == ["free"]
    with pytest.raises(InputError, match="no item has question; name its fields in against_fields"):
        kept(ctx, step(path), ITEM)


def test_what_cannot_be_read_stops_before_anything_is_spent(ctx: TestContext, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a data set ends in"):
        step(tmp_path / "eval.csv")
    with pytest.raises(InputError, match="there is no such file"):
        kept(ctx, step(tmp_path / "gone.jsonl"), ITEM)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "x"}\n{"question":\n')
    with pytest.raises(InputError, match=r"broken\.jsonl:2: not a JSON object"):
        kept(ctx, step(broken), ITEM)


def test_a_record_without_the_text_fails_alone(ctx: TestContext, evaluation: Path) -> None:
    records: list[dict[str, Any]] = [{"q": 1}, {"question": 2}, {"question": "x"}]
    samples = (Sample(at, f"t:{at}", record) for at, record in enumerate(records))
    assert [sample.index for sample in filter(None, step(evaluation).run(samples, ctx))] == [2]
    assert ctx.reasons == ["missing_field", "missing_field"]
    assert ctx.discarded[0].failures[0].message == "t:0: no text in question; the record has: q"


def test_it_is_lazy(ctx: TestContext, evaluation: Path) -> None:
    endless = (Sample(at, f"t:{at}", {"question": f"free {at}"}) for at in count())
    assert next(filter(None, step(evaluation).run(endless, ctx))).index == 0
