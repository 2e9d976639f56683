import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastdistill.core.types import Sample, Status
from fastdistill.data.near_duplicates import NearDuplicates, canonical_python, canonical_sql
from tests.context import TestContext

QUESTION = "What is the name of the tallest mountain in the northern part of the country?"
NEAR = "what is the name of the tallest mountain in the Northern part of this country"
OTHER = "How many people live in the capital of the region with the most lakes?"


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def kept(ctx: TestContext, *texts: Any, **options: Any) -> list[int]:
    step = NearDuplicates(name="near", fields=("q",), **options)
    samples = (Sample(at, f"t:{at}", {"q": text}, sample_id=f"id-{at}") for at, text in enumerate(texts))
    return [sample.index for sample in filter(None, step.run(samples, ctx))]


def test_the_first_of_near_questions_stays_and_is_named(ctx: TestContext) -> None:
    assert kept(ctx, OTHER, QUESTION, NEAR, QUESTION.upper(), OTHER + " !") == [0, 1]
    assert [(s.status, s.failures[0].reason) for s in ctx.discarded] == [(Status.DUPLICATE, "near_duplicate")] * 3
    assert ctx.discarded[1].failures[0].message == "t:3: 100% the same as t:1 (id-1)"
    assert ctx.discarded[2].failures[0].message == "t:4: 100% the same as t:0 (id-0)"


def test_the_order_decides_who_stays(ctx: TestContext) -> None:
    assert kept(ctx, NEAR, QUESTION) == [0]
    assert "the same as t:0 (id-0)" in ctx.discarded[0].failures[0].message


def test_the_threshold_and_the_shingle_can_be_chosen(ctx: TestContext) -> None:
    assert kept(ctx, QUESTION, NEAR, threshold=0.97) == [0, 1]
    assert kept(ctx, QUESTION, NEAR, shingle=30, threshold=0.9) == [0, 1]


def test_what_was_left_out_is_no_measure_for_others(ctx: TestContext) -> None:
    """Each text is near the one before; the third is near none that stayed."""
    words = [f"word{at}" for at in range(40)]
    chain = [" ".join(words[at : at + 30]) for at in (0, 3, 6)]
    assert kept(ctx, *chain, threshold=0.75) == [0, 2]


def test_short_texts_and_bad_ones(ctx: TestContext) -> None:
    assert kept(ctx, "a", "b", "", "A", 5) == [0, 1, 2]
    assert ctx.reasons == ["near_duplicate", "missing_field"]


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValidationError, match=r"needs datasketch; run `pip install 'fastdistill\[dedup\]'`"):
        NearDuplicates(fields=("q",))


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("select  Name from T where x = 'A' -- c", "SELECT name FROM t\nWHERE x='A' ;", True),
        ("SELECT a FROM t WHERE x <> 1", "SELECT a FROM t WHERE x != 1", True),
        ("SELECT a FROM t WHERE x = 'A'", "SELECT a FROM t WHERE x = 'a'", False),
        ('SELECT a FROM t WHERE x = "Rome"', 'SELECT a FROM t WHERE x = "rome"', False),
        ("SELECT a FROM t WHERE x > 1 AND y > 1", "SELECT a FROM t WHERE y > 1 AND x > 1", False),
        ("SELECT 1", "SELECT 1; SELECT 2", False),
        ("no query at all", "NO query at all", False),
        (f"SELECT {'(' * 3000}1{')' * 3000}", f"select {'(' * 3000}1{')' * 3000}", False),
    ],
)
def test_canonical_sql(left: str, right: str, same: bool) -> None:
    assert (canonical_sql(left) == canonical_sql(right)) is same


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("def f(x):\n  return (x+1)  # one", "def f(x):\n\n    return x + 1", True),
        ("def f(x): return x + 1", "def f(y): return y + 1", False),
        ("def f(x: return", "def f(x:  return", False),
        ("x = '\0'", "x  = '\0'", False),
        (f"x = {'-' * 5000}1", f"x  = {'-' * 5000}1", False),
    ],
)
def test_canonical_python(left: str, right: str, same: bool) -> None:
    assert (canonical_python(left) == canonical_python(right)) is same
