"""The ledger of one run: every sample with its candidates and verdicts, written in any order, read in input order.

It can be computed again from the records and the response store, so a new start of the run begins a new one.
"""

import sqlite3
from collections.abc import Iterator, Sequence
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
CREATE TABLE IF NOT EXISTS prompts (
    id BLOB PRIMARY KEY, provider TEXT, model TEXT, messages TEXT, parameters TEXT);
CREATE TABLE IF NOT EXISTS candidates (
    id INTEGER PRIMARY KEY, idx INTEGER, place INTEGER, candidate_id TEXT, step TEXT, attempt INTEGER, seed INTEGER,
    key TEXT, prompt BLOB, outcome TEXT, answer TEXT, score REAL, cuts TEXT, completion TEXT);
CREATE TABLE IF NOT EXISTS verdicts (
    id INTEGER PRIMARY KEY, idx INTEGER, place INTEGER, ordinal INTEGER, gate TEXT, fingerprint TEXT, outcome TEXT,
    reason TEXT, score REAL, detail TEXT);
PRAGMA user_version = 1;
"""
# The ids keep what belongs to a sample together, and in order: `idx`, then `place`, then `ordinal`.
_PLACES = 1 << 16  # candidates of a sample
_ORDINALS = 1 << 8  # verdicts on a candidate


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

    def leave_out_after(self, index: int) -> None:
        """Samples beyond this one are not part of the data set: the run had enough."""
        self._writer.submit([("UPDATE samples SET status = 'skipped' WHERE idx > ? AND status = 'open'", [(index,)])])

    def samples(self) -> Iterator[Sample]:
        """The samples that are still in the stream, in input order, lazily."""
        return read_samples(self.path, "status = 'open'")


def read_samples(path: Path, where: str = "1", parameters: Sequence[Any] = ()) -> Iterator[Sample]:
    """Samples of a ledger in input order, lazily; `where` is an SQL condition of ours on the table `samples`."""
    connection = connect(path, readonly=True)
    try:
        for row in connection.execute(f"SELECT * FROM samples WHERE {where} ORDER BY idx", parameters):
            first = row[0] * _PLACES
            candidates = connection.execute(
                "SELECT c.*, p.provider, p.model, p.messages, p.parameters FROM candidates c"
                " JOIN prompts p ON p.id = c.prompt WHERE c.id BETWEEN ? AND ? ORDER BY c.id",
                (first, first + _PLACES - 1),
            ).fetchall()
            verdicts = connection.execute(
                "SELECT place, gate, fingerprint, outcome, reason, score, detail FROM verdicts"
                " WHERE id BETWEEN ? AND ? ORDER BY id",
                (first * _ORDINALS, (first + _PLACES) * _ORDINALS - 1),
            ).fetchall()
            yield _sample(row, candidates, verdicts)
    except sqlite3.Error as error:
        raise fault(path, error) from error
    finally:
        connection.close()


def _statements(sample: Sample) -> list[Statement]:
    prompts = {id(c.prompt): c.prompt for c in sample.candidates}  # the candidates of a wave share theirs
    prompt_rows = {key: prompt_row(prompt) for key, prompt in prompts.items()}
    first = sample.index * _PLACES
    placed = [(first + place, place, c) for place, c in enumerate(sample.candidates)]
    return [
        ("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [_sample_row(sample)]),
        ("DELETE FROM candidates WHERE id BETWEEN ? AND ?", [(first, first + _PLACES - 1)]),
        ("DELETE FROM verdicts WHERE id BETWEEN ? AND ?", [(first * _ORDINALS, (first + _PLACES) * _ORDINALS - 1)]),
        ("INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, ?, ?)", list(prompt_rows.values())),
        (
            "INSERT OR REPLACE INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(id_, sample.index, *_candidate_row(place, c, prompt_rows[id(c.prompt)][0])) for id_, place, c in placed],
        ),
        (
            "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (id_ * _ORDINALS + ordinal, sample.index, place, ordinal, *_verdict_row(verdict))
                for id_, place, c in placed
                for ordinal, verdict in enumerate(c.verdicts)
            ],
        ),
    ]


_json_encoder = msgspec.json.Encoder()
_decode_completion = msgspec.json.Decoder(Completion).decode
_decode_cuts = msgspec.json.Decoder(tuple[Cut, ...]).decode
_decode_failures = msgspec.json.Decoder(tuple[Failure, ...]).decode


def _json(value: object) -> str:
    return _json_encoder.encode(value).decode()


def _sample_row(sample: Sample) -> tuple[Any, ...]:
    record = sample.record
    taken = all(field in record and record[field] is value for field, value in sample.input.items())
    # An input that is fields of the record is written as their names.
    return (
        sample.index, sample.sample_id, sample.task_id, sample.source, sample.status, _json(sample.record),
        _json(list(sample.input) if taken else sample.input),
        None if sample.selection is None else _json(sample.selection), _json(sample.failures),
    )  # fmt: skip


def _verdict_row(v: Verdict) -> tuple[Any, ...]:
    return v.gate, v.fingerprint, v.outcome, v.reason, v.score, _json(v.detail)


def _candidate_row(place: int, c: Candidate, prompt: bytes) -> tuple[Any, ...]:
    return (
        place, c.candidate_id, c.step, c.attempt, c.seed, c.key, prompt, c.outcome, c.answer, c.score,
        _json(c.cuts), _json(c.completion),
    )  # fmt: skip


def _sample(row: tuple[Any, ...], candidates: list[tuple[Any, ...]], verdicts: list[tuple[Any, ...]]) -> Sample:
    index, sample_id, task_id, source, status, record, input_, selection, failures = row
    by_place: dict[int, list[Verdict]] = {}
    for place, gate, fingerprint, outcome, reason, score, detail in verdicts:
        verdict = Verdict(gate, fingerprint, Outcome(outcome), reason, score, msgspec.json.decode(detail))
        by_place.setdefault(place, []).append(verdict)
    fields = msgspec.json.decode(record)
    taken = msgspec.json.decode(input_)
    return Sample(
        index=index,
        source=source,
        record=fields,
        task_id=task_id,
        sample_id=sample_id,
        input={name: fields[name] for name in taken} if isinstance(taken, list) else taken,
        candidates=tuple(_candidate(row, tuple(by_place.get(row[2], ()))) for row in candidates),
        selection=None if selection is None else tuple(msgspec.json.decode(selection)),
        failures=_decode_failures(failures),
        status=Status(status),
    )


def _candidate(row: tuple[Any, ...], verdicts: tuple[Verdict, ...]) -> Candidate:
    _, _, _, candidate_id, step, attempt, seed, key, _, _, answer, score, cuts, completion, *asked = row
    provider, model, messages, parameters = asked
    return Candidate(
        candidate_id=candidate_id,
        step=step,
        attempt=attempt,
        seed=seed,
        key=key,
        prompt=Prompt(provider, model, tuple(msgspec.json.decode(messages)), msgspec.json.decode(parameters)),
        completion=_decode_completion(completion),
        answer=answer,
        cuts=_decode_cuts(cuts),
        verdicts=verdicts,
        score=score,
    )
