"""The ledger of one run: every sample with its candidates and verdicts, written in any order, read in input order.

It can be computed again from the records and the response store, so a new start of the run begins a new one.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from fastdistill.control.store import read_completion, write_completion
from fastdistill.control.writer import Writer, connect, fault, insert
from fastdistill.core.types import (
    Candidate,
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
    id INTEGER PRIMARY KEY, provider TEXT, model TEXT, messages TEXT, parameters TEXT);
CREATE TABLE IF NOT EXISTS candidates (
    id INTEGER PRIMARY KEY, idx INTEGER, place INTEGER, candidate_id TEXT, step TEXT, attempt INTEGER, seed INTEGER,
    key TEXT, prompt INTEGER, outcome TEXT, answer TEXT, score REAL, cuts TEXT, completion TEXT);
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
        self._writer = Writer(path, SCHEMA, _write_all, durable=False, every=0.1)

    async def __aenter__(self) -> "Ledger":
        await self._writer.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writer.__aexit__(kind, error, trace)

    async def save(self, sample: Sample) -> None:
        """Writes a sample whole, in place of what was written of it before; soon, not at once."""
        if self._writer.crowded:
            await self._writer.write(None)
        self.submit(sample)

    def submit(self, sample: Sample) -> None:
        """As `save`, for what can't wait."""
        self._writer.submit(_rows(sample))

    async def leave_out_after(self, index: int) -> None:
        """Samples beyond this one are not part of the data set: the run had enough."""
        await self._writer.write(index)

    async def samples(self) -> Iterator[Sample]:
        """The samples that are still in the stream, in input order, lazily."""
        await self._writer.write(None)
        return read_samples(self.path, "status = 'open'")


def read_samples(path: Path, where: str = "1", parameters: Sequence[Any] = ()) -> Iterator[Sample]:
    """Samples of a ledger in input order, lazily; `where` is an SQL condition of ours on the table `samples`."""
    connection = connect(path, readonly=True)
    try:
        found = connection.execute(f"SELECT * FROM samples WHERE {where} ORDER BY idx", parameters)
        while rows := found.fetchmany(_READ_AT_A_TIME):
            chosen = (_json([row[0] for row in rows]),)
            candidates, verdicts = (
                _by_sample(connection.execute(query, chosen)) for query in (_SELECT_CANDIDATES, _SELECT_VERDICTS)
            )
            for row in rows:
                yield _sample(row, candidates.get(row[0], ()), verdicts.get(row[0], ()))
    except sqlite3.Error as error:
        raise fault(path, error) from error
    finally:
        connection.close()


_READ_AT_A_TIME = 64  # samples
_WITHIN = "FROM json_each(?) s CROSS JOIN {0} ON {0}.id BETWEEN s.value * {1} AND (s.value + 1) * {1} - 1"
_SELECT_CANDIDATES = (
    "SELECT candidates.*, prompts.provider, prompts.model, prompts.messages, prompts.parameters "
    + _WITHIN.format("candidates", _PLACES)
    + " JOIN prompts ON prompts.id = candidates.prompt"
)
_SELECT_VERDICTS = "SELECT verdicts.* " + _WITHIN.format("verdicts", _PLACES * _ORDINALS)


def _by_sample(rows: Iterable[tuple[Any, ...]]) -> dict[int, list[tuple[Any, ...]]]:
    found: dict[int, list[tuple[Any, ...]]] = {}
    for row in sorted(rows, key=itemgetter(0)):
        found.setdefault(row[1], []).append(row)
    return found


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the tables have of one sample."""

    sample: tuple[Any, ...]
    prompts: list[tuple[Any, ...]]
    candidates: list[tuple[Any, ...]]
    verdicts: list[tuple[Any, ...]]


def _rows(sample: Sample) -> _Rows:
    index = sample.index
    first = index * _PLACES
    prompts: dict[int, tuple[Any, ...]] = {}  # the candidates of a wave share theirs
    candidates, verdicts = [], []
    for place, candidate in enumerate(sample.candidates):
        id_, prompt = first + place, candidate.prompt
        if id(prompt) not in prompts:
            prompts[id(prompt)] = (id_, *prompt.columns)
        candidates.append((id_, index, place, *_candidate_columns(candidate, prompts[id(prompt)][0])))
        for ordinal, v in enumerate(candidate.verdicts):
            judged = (v.gate, v.fingerprint, v.outcome, v.reason, v.score, _json(v.detail) if v.detail else "{}")
            verdicts.append((id_ * _ORDINALS + ordinal, index, place, ordinal, *judged))
    return _Rows(_sample_row(sample), list(prompts.values()), candidates, verdicts)


def _write_all(connection: sqlite3.Connection, entries: Sequence[_Rows | int]) -> None:
    # Of two for the same sample the later one counts.
    latest = {entry.sample[0]: entry for entry in entries if isinstance(entry, _Rows)}
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        known = connection.execute(
            "SELECT idx FROM samples WHERE idx IN (SELECT value FROM json_each(?))", (_json(list(latest)),)
        )
        for (index,) in known.fetchall():
            for table, ids in (("prompts", _PLACES), ("candidates", _PLACES), ("verdicts", _PLACES * _ORDINALS)):
                within = (index * ids, (index + 1) * ids - 1)
                connection.execute(f"DELETE FROM {table} WHERE id BETWEEN ? AND ?", within)
        insert(connection, "INSERT OR REPLACE INTO samples", [rows.sample for rows in latest.values()])
        for table in ("prompts", "candidates", "verdicts"):
            insert(
                connection, f"INSERT INTO {table}", [row for rows in latest.values() for row in getattr(rows, table)]
            )
        for entry in entries:
            if isinstance(entry, int):
                connection.execute("UPDATE samples SET status = 'skipped' WHERE idx > ? AND status = 'open'", (entry,))


_json_encoder = msgspec.json.Encoder()
_decode_cuts = msgspec.json.Decoder(tuple[Cut, ...]).decode
_decode_failures = msgspec.json.Decoder(tuple[Failure, ...]).decode


# To call an enumeration takes ten times as long.
_OUTCOMES = {str(outcome): outcome for outcome in Outcome}
_STATUSES = {str(status): status for status in Status}


def _json(value: object) -> str:
    return _json_encoder.encode(value).decode()


def _sample_row(sample: Sample) -> tuple[Any, ...]:
    record, content = sample.record, sample.input
    taken = all([field in record and record[field] is value for field, value in content.items()])
    # An input that is fields of the record is written as their names.
    return (
        sample.index, sample.sample_id, sample.task_id, sample.source, sample.status, _json(record),
        _json(list(content) if taken else content),
        None if sample.selection is None else _json(sample.selection),
        _json(sample.failures) if sample.failures else "[]",
    )  # fmt: skip


def _candidate_columns(c: Candidate, prompt: int) -> tuple[Any, ...]:
    return (
        c.candidate_id, c.step, c.attempt, c.seed, c.key, prompt, c.outcome, c.answer, c.score,
        _json(c.cuts) if c.cuts else "[]", write_completion(c.completion),
    )  # fmt: skip


def _sample(row: tuple[Any, ...], candidates: Sequence[tuple[Any, ...]], verdicts: Sequence[tuple[Any, ...]]) -> Sample:
    index, sample_id, task_id, source, status, record, input_, selection, failures = row
    by_place: dict[int, list[Verdict]] = {}
    for _, _, place, _, gate, fingerprint, outcome, reason, score, detail in verdicts:
        told = {} if detail == "{}" else msgspec.json.decode(detail)
        verdict = Verdict(gate, fingerprint, _OUTCOMES[outcome], reason, score, told)
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
        status=_STATUSES[status],
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
        completion=read_completion(completion),
        answer=answer,
        cuts=_decode_cuts(cuts),
        verdicts=verdicts,
        score=score,
    )
