"""The ledger: written in any order, read in input order, every sample whole."""

import asyncio
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fastdistill.control.ledger import Ledger, read_samples
from fastdistill.core.errors import EnvironmentFault, SampleError
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
    TokenLogprob,
    Usage,
    Verdict,
)
from fastdistill.data.rules import RuleFilter

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(text, json, max_size=4)
reasons = st.sampled_from(["ok", "too_long", "kaputt"])
prompts = st.builds(
    Prompt,
    provider=st.just("vllm"),
    model=st.sampled_from(["m", "n"]),
    messages=st.lists(
        st.fixed_dictionaries({"role": st.just("user"), "content": st.text('ab\n"\\', max_size=9)}), max_size=2
    ).map(tuple),
    parameters=st.fixed_dictionaries({"temperature": st.sampled_from([0.5, 1.5]), "stop": st.just(["a"])}),
)
verdicts = st.builds(
    Verdict,
    gate=text,
    fingerprint=text,
    outcome=st.sampled_from(Outcome),
    reason=reasons,
    score=st.none() | st.floats(0, 1),
    detail=records,
)
candidates = st.builds(
    Candidate,
    candidate_id=text,
    attempt=st.integers(0, 9),
    seed=st.none() | st.integers(0, 2**31),
    key=text,
    prompt=prompts,
    completion=st.builds(
        Completion,
        text=text,
        finish_reason=st.sampled_from(FinishReason),
        usage=st.just(Usage(3, 4)),
        thinking=text,
        logprobs=st.sampled_from([None, (), (TokenLogprob("a", -0.5, (("b", -1.5),)),)]),
    ),
    answer=text,
    cuts=st.lists(st.builds(Cut, kind=text, text=text), max_size=2).map(tuple),
    verdicts=st.lists(verdicts, max_size=2).map(tuple),
    score=st.none() | st.floats(0, 1),
)
samples = st.builds(
    Sample,
    index=st.integers(0, 10**6),
    source=text,
    record=records,
    task_id=text,
    sample_id=text,
    input=records,
    candidates=st.lists(candidates, max_size=3).map(tuple),
    selection=st.none() | st.lists(text, max_size=2).map(tuple),
    failures=st.lists(st.builds(Failure, text, reasons, text, st.none() | st.integers(0, 9)), max_size=2).map(tuple),
    status=st.sampled_from(Status),
)


def written(path: Path, given: Sequence[Sample]) -> list[Sample]:
    async def go() -> None:
        async with Ledger(path) as ledger:
            await asyncio.gather(*(ledger.save(sample) for sample in given))

    asyncio.run(go())
    return list(read_samples(path))


@settings(max_examples=15, deadline=None)
@given(st.lists(samples, max_size=8, unique_by=lambda sample: sample.index))
def test_a_sample_comes_back_as_it_was_saved(given: list[Sample]) -> None:
    with TemporaryDirectory() as folder:
        found = written(Path(folder) / "ledger.sqlite", given)
    assert found == sorted(given, key=lambda sample: sample.index)


def candidate(answer: str, attempt: int = 0, *, provider: str = "vllm", content: str = "Q") -> Candidate:
    prompt = Prompt(provider, "m", ({"role": "user", "content": content},), {"temperature": 1.0})
    done = Completion(answer, FinishReason.STOP)
    judged = Verdict("RuleFilter", "f", Outcome.PASS, "ok")
    return Candidate(f"c{attempt}", attempt, attempt, f"k{attempt}", prompt, done, answer, verdicts=(judged,))


def sample(index: int, *candidates: Candidate, **fields: Any) -> Sample:
    return Sample(
        index, f"train.jsonl:{index + 1}", {"n": index}, sample_id=f"id{index}", candidates=candidates, **fields
    )


def test_samples_are_read_in_input_order_whatever_order_they_were_written_in(tmp_path: Path) -> None:
    given = [sample(n, *(candidate(f"{n}.{a}", a) for a in range(n % 4))) for n in range(300)]
    shuffled = random.Random(3).sample(given, len(given))
    assert written(tmp_path / "ledger.sqlite", shuffled) == given


def test_a_saved_sample_can_be_read_at_once(tmp_path: Path) -> None:
    async def go() -> None:
        async with Ledger(tmp_path / "ledger.sqlite") as ledger:
            for n in range(5):
                await ledger.save(sample(n, candidate("a")))
                assert [found.index for found in await ledger.samples()] == list(range(n + 1))

    asyncio.run(go())


def test_only_open_samples_are_still_in_the_stream_and_all_stay_in_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    failed = sample(1, candidate("a")).failed("RuleFilter", SampleError("unexpected", "train.jsonl:2: broke"))
    duplicate = sample(2, status=Status.DUPLICATE, failures=(Failure("Deduplicate", "duplicate", "as train.jsonl:1"),))

    async def go() -> list[Sample]:
        async with Ledger(path) as ledger:
            ledger.submit(duplicate)
            ledger.submit(failed)
            await ledger.save(sample(0, candidate("b")))
            await ledger.save(sample(3))
            return list(await ledger.samples())

    assert [found.index for found in asyncio.run(go())] == [0, 3]
    assert list(read_samples(path)) == [sample(0, candidate("b")), failed, duplicate, sample(3)]
    assert [found.index for found in read_samples(path, "task_id = :id", id="")] == [0, 1, 2, 3]
    assert [found.index for found in read_samples(path, "sample_id = :id", id="id1")] == [1]


def test_what_was_submitted_last_is_there_when_the_ledger_is_closed(tmp_path: Path) -> None:
    async def go() -> None:
        async with Ledger(tmp_path / "ledger.sqlite") as ledger:
            for n in range(2000):
                ledger.submit(sample(n))

    asyncio.run(go())
    assert len(list(read_samples(tmp_path / "ledger.sqlite"))) == 2000


@pytest.mark.parametrize(
    "later",
    [
        lambda first: replace(first, candidates=first.candidates[:1]),
        lambda first: replace(first, candidates=()),
        lambda first: replace(first, candidates=tuple(replace(c, verdicts=()) for c in first.candidates)),
        lambda first: first.failed("ExportSFT", SampleError("not_unicode", "a surrogate")),
    ],
    ids=["fewer candidates", "no candidates", "no verdicts", "failed later"],
)
def test_a_sample_saved_again_replaces_all_that_was_there(tmp_path: Path, later: Callable[[Sample], Sample]) -> None:
    first = sample(0, candidate("a"), candidate("b", 1))
    second = later(first)

    async def go() -> None:
        async with Ledger(tmp_path / "ledger.sqlite") as ledger:
            await ledger.save(first)
            await ledger.save(second)

    asyncio.run(go())
    assert list(read_samples(tmp_path / "ledger.sqlite")) == [second]


def test_a_new_ledger_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    written(path, [sample(0), sample(1)])
    assert written(path, [sample(5)]) == [sample(5)]


def test_the_same_words_to_two_providers_are_two_prompts(tmp_path: Path) -> None:
    given = [sample(0, candidate("a", 0, provider="vllm"), candidate("b", 1, provider="openai"))]
    assert written(tmp_path / "ledger.sqlite", given) == given


@pytest.mark.parametrize("first", [0, 1])
def test_prompts_that_differ_in_unicode_normalisation_only_are_kept_as_they_were_sent(
    tmp_path: Path, first: int
) -> None:
    given = [sample(0, candidate("a", content="caf\u00e9")), sample(1, candidate("a", content="cafe\u0301"))]
    assert written(tmp_path / "ledger.sqlite", [given[first], given[1 - first]]) == given


def test_a_ledger_that_is_not_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database at all\n" * 300)
    with pytest.raises(EnvironmentFault, match=r"ledger\.sqlite: file is not a database"):
        list(read_samples(path))


def test_the_prompt_of_a_wave_is_kept_once(tmp_path: Path) -> None:
    first, other = candidate("a", content="Q" * 1000), candidate("b", 9)
    wave = [replace(first, attempt=attempt) for attempt in range(8)]
    (found,) = written(tmp_path / "ledger.sqlite", [sample(0, *wave, other, other)])
    assert found == sample(0, *wave, other, other)
    assert len({id(c.prompt) for c in found.candidates}) == 2
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        (size,) = database.execute("SELECT length(sample) FROM entries").fetchone()
    assert 1000 < size < 8000


def test_all_can_be_asked_for_with_sql(tmp_path: Path) -> None:
    verdicts = [Verdict("Gate", "f", Outcome(outcome), outcome, 0.5) for outcome in ("pass", "error", "fail")]
    prompt = candidate("").prompt
    judged = [replace(candidate(f"{n}", n), prompt=prompt, verdicts=tuple(verdicts[:n])) for n in range(4)]
    written(tmp_path / "ledger.sqlite", [sample(3, *judged)])
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        outcomes = database.execute("SELECT idx, place, key, answer, outcome FROM candidates ORDER BY idx, place")
        told = zip(range(4), ("pass", "pass", "error", "fail"), strict=True)
        assert outcomes.fetchall() == [(3, n, f"k{n}", f"{n}", outcome) for n, outcome in told]
        whole = database.execute("SELECT idx, source, status, record, input, selection, failures FROM samples")
        assert whole.fetchall() == [(3, "train.jsonl:4", "open", '{"n":3}', "[]", None, "[]")]
        asked = database.execute("SELECT idx, place, provider, model, messages, parameters FROM prompts")
        assert asked.fetchall() == [(3, 0, "vllm", "m", '[{"role":"user","content":"Q"}]', '{"temperature":1.0}')]
        found = database.execute("SELECT idx, ordinal, gate, reason, outcome, score FROM verdicts WHERE place = 3")
        assert found.fetchall() == [(3, n, "Gate", v.reason, v.outcome, 0.5) for n, v in enumerate(verdicts)]


def test_what_a_gate_says_in_types_of_its_own_is_kept(tmp_path: Path) -> None:
    class Reason(str):
        pass

    said = replace(candidate("a"), verdicts=(Verdict("Gate", "f", Outcome.FAIL, Reason("odd"), np.float64(0.25)),))
    assert written(tmp_path / "ledger.sqlite", [sample(0, said)]) == [sample(0, said)]


def test_a_value_of_another_type_than_its_field_is_told_with_its_place(tmp_path: Path) -> None:
    said = replace(candidate("a"), verdicts=(Verdict("Gate", "f", Outcome.FAIL, "odd", True),))
    with pytest.raises(EnvironmentFault, match=r"got `bool` - at `\$\.candidates.*score`; a step gave"):
        written(tmp_path / "ledger.sqlite", [sample(0, said)])


def test_a_ledger_of_another_version_is_told_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE samples (idx INTEGER PRIMARY KEY); PRAGMA user_version = 1")
    with pytest.raises(EnvironmentFault, match=r"ledger\.sqlite: another version .*; start the run again"):
        list(read_samples(path))


@pytest.mark.parametrize("score", [float("inf"), float("nan")])
def test_a_gate_can_not_give_a_score_that_would_be_read_back_as_none(score: float) -> None:
    with pytest.raises(ValueError, match="give a finite one, or None"):
        RuleFilter().verdict(Outcome.PASS, "good", score)
