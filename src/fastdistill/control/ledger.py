"""The ledger of one run: every sample with its candidates and verdicts, written in any order, read in input order.

It can be computed again from the records and the response store, so a new start of the run begins a new one.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from fastdistill.control.store import prompt_row
from fastdistill.control.writer import Statement, Writer, connect, fault
from fastdistill.core.types import (
    Candidate,
    Completion,
    Cut,
    Failure,
    Outcome,
    Prompt,
    Sample,
    Status,
    Verdict,
)

SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
    idx INTEGER PRIMARY KEY, sample_id TEXT, task_id TEXT, source TEXT, status TEXT,
    record TEXT, input TEXT, selection TEXT, failures TEXT);
CREATE INDEX IF NOT EXISTS samples_by_id ON samples (sample_id);
CREATE TABLE IF NOT EXISTS prompts (
    id TEXT PRIMARY KEY, provider TEXT, model TEXT, messages TEXT, parameters TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS candidates (
    idx INTEGER, place INTEGER, candidate_id TEXT, step TEXT, attempt INTEGER, seed INTEGER, key TEXT, prompt TEXT,
    outcome TEXT, answer TEXT, score REAL, cuts TEXT, completion TEXT, PRIMARY KEY (idx, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS verdicts (
    idx INTEGER, place INTEGER, ordinal INTEGER, gate TEXT, fingerprint TEXT, outcome TEXT, reason TEXT,
    score REAL, detail TEXT, PRIMARY KEY (idx, place, ordinal)) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


class Ledger:
    """`ledger.sqlite` being written; an async context manager. It replaces an earlier one at the same path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for leftover in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
            leftover.unlink(missing_ok=True)
        self._writer = Writer(path, SCHEMA, durable=False)

    async def __aenter__(self) -> "Ledger":
        await self._writer.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writer.__aexit__(kind, error, trace)

    async def save(self, sample: Sample) -> None:
        """Writes a sample whole, in place of what was written of it before."""
        await self._writer.write(_statements(sample))

    def submit(self, sample: Sample) -> None:
        """As `save`, without waiting for it."""
        self._writer.submit(_statements(sample))

    def samples(self) -> Iterator[Sample]:
        """The samples that are still in the stream, in input order, lazily."""
        return read_samples(self.path, "status = 'open'")


def read_samples(path: Path, where: str = "1", parameters: Sequence[Any] = ()) -> Iterator[Sample]:
    """Samples of a ledger in input order, lazily; `where` is an SQL condition on the table `samples`."""
    connection = connect(path, readonly=True)
    try:
        chosen = f"SELECT idx FROM samples WHERE {where}"  # our own conditions only
        verdicts = groupby(
            connection.execute(
                f"SELECT * FROM verdicts WHERE idx IN ({chosen}) ORDER BY idx, place, ordinal", parameters
            ),
            key=lambda row: row[0],
        )
        candidates = groupby(
            connection.execute(
                "SELECT c.*, p.provider, p.model, p.messages, p.parameters FROM candidates c JOIN prompts p"
                f" ON p.id = c.prompt WHERE c.idx IN ({chosen}) ORDER BY c.idx, c.place",
                parameters,
            ),
            key=lambda row: row[0],
        )
        next_verdicts = _Peek(verdicts)
        next_candidates = _Peek(candidates)
        for row in connection.execute(f"SELECT * FROM samples WHERE {where} ORDER BY idx", parameters):
            yield _sample(row, next_candidates.take(row[0]), next_verdicts.take(row[0]))
    except sqlite3.Error as error:
        raise fault(path, error) from error
    finally:
        connection.close()


class _Peek:
    """Walks groups keyed by rising index; `take(index)` gives that index's rows, or none."""

    def __init__(self, groups: "groupby[int, tuple[Any, ...]]") -> None:
        self._groups = groups
        self._next: tuple[int, list[tuple[Any, ...]]] | None = None

    def take(self, index: int) -> list[tuple[Any, ...]]:
        if self._next is None:
            for key, rows in self._groups:
                self._next = (key, list(rows))
                break
        if self._next is None or self._next[0] != index:
            return []
        rows_of_index = self._next[1]
        self._next = None
        return rows_of_index


def _statements(sample: Sample) -> list[Statement]:
    prompts: dict[int, tuple[str, ...]] = {}  # by identity: the candidates of a wave share their prompt
    for candidate in sample.candidates:
        if id(candidate.prompt) not in prompts:
            prompts[id(candidate.prompt)] = prompt_row(candidate.prompt)
    placed = list(enumerate(sample.candidates))
    return [
        ("DELETE FROM candidates WHERE idx = ?", [(sample.index,)]),
        ("DELETE FROM verdicts WHERE idx = ?", [(sample.index,)]),
        ("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [_sample_row(sample)]),
        (
            "INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, ?, ?)",
            list(prompts.values()),
        ),
        (
            "INSERT OR REPLACE INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [_candidate_row(sample.index, place, c, prompts[id(c.prompt)][0]) for place, c in placed],
        ),
        (
            "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (sample.index, place, ordinal, v.gate, v.fingerprint, v.outcome, v.reason, v.score, _json(v.detail))
                for place, c in placed
                for ordinal, v in enumerate(c.verdicts)
            ],
        ),
    ]


_json_encoder = msgspec.json.Encoder()


def _json(value: object) -> str:
    return _json_encoder.encode(value).decode()


def _sample_row(sample: Sample) -> tuple[Any, ...]:
    failures = [asdict(failure) for failure in sample.failures]
    return (
        sample.index, sample.sample_id, sample.task_id, sample.source, sample.status, _json(sample.record),
        _json(sample.input), None if sample.selection is None else _json(sample.selection), _json(failures),
    )  # fmt: skip


def _candidate_row(index: int, place: int, c: Candidate, prompt: str) -> tuple[Any, ...]:
    return (
        index, place, c.candidate_id, c.step, c.attempt, c.seed, c.key, prompt, c.outcome, c.answer, c.score,
        _json(c.cuts), _json(c.completion),
    )  # fmt: skip


def _sample(row: tuple[Any, ...], candidates: list[tuple[Any, ...]], verdicts: list[tuple[Any, ...]]) -> Sample:
    index, sample_id, task_id, source, status, record, input_, selection, failures = row
    by_place: dict[int, list[Verdict]] = {}
    for _, place, _, gate, fingerprint, outcome, reason, score, detail in verdicts:
        verdict = Verdict(gate, fingerprint, Outcome(outcome), reason, score, msgspec.json.decode(detail))
        by_place.setdefault(place, []).append(verdict)
    return Sample(
        index=index,
        source=source,
        record=msgspec.json.decode(record),
        task_id=task_id,
        sample_id=sample_id,
        input=msgspec.json.decode(input_),
        candidates=tuple(_candidate(row, tuple(by_place.get(row[1], ()))) for row in candidates),
        selection=None if selection is None else tuple(msgspec.json.decode(selection)),
        failures=tuple(msgspec.json.decode(failures, type=list[Failure])),
        status=Status(status),
    )


def _candidate(row: tuple[Any, ...], verdicts: tuple[Verdict, ...]) -> Candidate:
    _, _, candidate_id, step, attempt, seed, key, _, _, answer, score, cuts, completion, *asked = row
    provider, model, messages, parameters = asked
    return Candidate(
        candidate_id=candidate_id,
        step=step,
        attempt=attempt,
        seed=seed,
        key=key,
        prompt=Prompt(provider, model, tuple(msgspec.json.decode(messages)), msgspec.json.decode(parameters)),
        completion=msgspec.json.decode(completion, type=Completion),
        answer=answer,
        cuts=tuple(msgspec.json.decode(cuts, type=list[Cut])),
        verdicts=verdicts,
        score=score,
    )
