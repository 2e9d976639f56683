"""The ledger of one run: every sample with its candidates and verdicts, written in any order, read in input order.

It can be computed again from the records and the response store, so a new start of the run begins a new one.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import accumulate, pairwise
from operator import is_
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Any, TypeAlias

import msgspec
from msgspec.structs import replace

from fastdistill.control.store import pack, unpack
from fastdistill.control.writer import Writer, connect, fault, insert
from fastdistill.core.errors import EnvironmentFault
from fastdistill.core.turns import LARGE, beside
from fastdistill.core.types import Prompt, Sample, Status

_VERSION = 2


def _fields(json: str, *paths: str) -> str:
    return ", ".join(f"json_extract({json}, '$.{path}') AS {path.rpartition('.')[2]}" for path in paths)


# A row for each sample, most of it one JSON: tables of candidates and of verdicts cost three times as much, written and
# read. The pages are large, for half of a small one would be empty. The views are for people.
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS entries (
    idx INTEGER PRIMARY KEY, sample_id TEXT, task_id TEXT, status TEXT, input TEXT, logprobs TEXT, sample TEXT);
CREATE VIEW IF NOT EXISTS samples AS
    SELECT idx, sample_id, task_id, {_fields("sample", "source")}, status, {_fields("sample", "record")}, input,
    {_fields("sample", "selection", "failures")} FROM entries;
CREATE VIEW IF NOT EXISTS prompts AS
    SELECT idx, c.key AS place,
    {_fields("c.value", "prompt.provider", "prompt.model", "prompt.messages", "prompt.parameters")}
    FROM entries, json_each(sample, '$.candidates') c WHERE provider <> '';
CREATE VIEW IF NOT EXISTS candidates AS
    SELECT idx, c.key AS place, {_fields("c.value", "candidate_id", "step", "attempt", "seed", "key")},
    coalesce((SELECT max(json_extract(v.value, '$.outcome')) FROM json_each(c.value, '$.verdicts') v
        WHERE json_extract(v.value, '$.outcome') <> 'pass'), 'pass') AS outcome,
    {_fields("c.value", "answer", "score", "cuts", "completion")}
    FROM entries, json_each(sample, '$.candidates') c;
CREATE VIEW IF NOT EXISTS verdicts AS
    SELECT idx, c.key AS place, v.key AS ordinal,
    {_fields("v.value", "gate", "fingerprint", "outcome", "reason", "score", "detail")}
    FROM entries, json_each(sample, '$.candidates') c, json_each(c.value, '$.verdicts') v;
PRAGMA user_version = {_VERSION};
"""

_Row: TypeAlias = tuple[int, str, str, str, str, str, str]
"""The columns of `entries`. `sample` lacks what others have, but for the status that it was saved with."""


class Ledger:
    """`ledger.sqlite` being written; an async context manager. It replaces an earlier one at the same path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for leftover in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
            leftover.unlink(missing_ok=True)
        self._writer = Writer(path, SCHEMA, _write_all, durable=False, every=0.1, page_size=65_536)

    async def __aenter__(self) -> "Ledger":
        await self._writer.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writer.__aexit__(kind, error, trace)

    async def keep_up(self) -> None:
        if self._writer.crowded:
            await self._writer.write(None)

    async def save(self, sample: Sample) -> None:
        """Writes a sample whole, in place of what was written of it before; soon, not at once."""
        await self.keep_up()
        large = sum([candidate.completion.size for candidate in sample.candidates]) > LARGE
        self._writer.submit(await beside(partial(_row, sample)) if large else _row(sample))

    def submit(self, sample: Sample) -> None:
        """As `save`, for what can't wait."""
        while self._writer.crowded:  # by a generator that never lets the loop have its turn
            sleep(0.01)
        self._writer.submit(_row(sample))

    async def leave_out_after(self, index: int) -> None:
        """Samples beyond this one are not part of the data set: the run had enough."""
        await self._writer.write(index)

    async def samples(self) -> Iterator[Sample]:
        """The samples that are still in the stream, in input order, lazily."""
        await self._writer.write(None)
        return read_samples(self.path, "status = 'open'")


def _write_all(connection: sqlite3.Connection, entries: Sequence[_Row | int]) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        rows = [entry for entry in entries if not isinstance(entry, int)]
        insert(connection, "INSERT OR REPLACE INTO entries", rows)  # of two for the same sample the later one stays
        if len(rows) < len(entries):
            last = min(entry for entry in entries if isinstance(entry, int))
            connection.execute("UPDATE entries SET status = 'skipped' WHERE idx > ? AND status = 'open'", (last,))


def read_samples(path: Path, where: str = "1", **parameters: str | int) -> Iterator[Sample]:
    """Samples of a ledger in input order, lazily; `where` is an SQL condition of ours on the table `entries`.

    Raises:
        EnvironmentFault: the file is none that this version can read.
    """
    connection = connect(path, readonly=True)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            remedy = "start the run again with the same config: its answers are stored, and nothing is asked twice"
            raise EnvironmentFault(f"{path}: another version of fastdistill wrote it; {remedy}")
        rows = connection.execute(f"SELECT * FROM entries WHERE {where} ORDER BY idx", parameters)
        yield from map(_sample, rows)
    except sqlite3.Error as error:
        raise fault(path, error) from error
    except msgspec.DecodeError as error:
        remedy = "a step gave a sample a value of another type than the field has; mend that step"
        raise EnvironmentFault(f"{path}: {error}; {remedy}") from error
    finally:
        connection.close()


def _plain(value: object) -> object:
    """What is said in a type of its own: NumPy's floats by a gate, pandas' times (of nanoseconds) in a record."""
    for kind in (str, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, datetime | timedelta):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode
_decode = msgspec.json.Decoder().decode
_decode_sample = msgspec.json.Decoder(Sample).decode
_STATUSES = {str(status): status for status in Status}  # to call an enumeration takes ten times as long
_AS_BEFORE = Prompt("", "", (), {})  # the one of the candidate before
_ELSEWHERE: dict[str, Any] = {}


def _row(sample: Sample) -> _Row:
    content, candidates = sample.input, sample.candidates
    if len(candidates) > 1:
        others = [replace(c, prompt=_AS_BEFORE) if c.prompt is b.prompt else c for b, c in pairwise(candidates)]
        candidates = (candidates[0], *others)
    slim = replace(sample, sample_id="", task_id="", input=_ELSEWHERE, candidates=candidates)
    logprobs = ""
    if any(found := [c.completion.logprobs for c in candidates]):
        logprobs = _encode([None if each is None else pack(each) for each in found]).decode()
        bare = [replace(c, completion=replace(c.completion, logprobs=None)) for c in candidates]
        slim = replace(slim, candidates=bare)
    # An input that is fields of the record is written as their names.
    taken = all(map(is_, map(sample.record.get, content), content.values()))
    return (
        sample.index, sample.sample_id, sample.task_id, str(sample.status),
        _encode(list(content) if taken else content).decode(), logprobs, _encode(slim).decode(),
    )  # fmt: skip


def _sample(row: _Row) -> Sample:
    _, sample_id, task_id, status, input_, logprobs, text = row
    sample = _decode_sample(text)
    content, candidates = _decode(input_), sample.candidates
    if isinstance(content, list):
        content = dict(zip(content, map(sample.record.get, content), strict=True))
    if logprobs:
        found = [None if each is None else unpack(each) for each in _decode(logprobs)]
        whole = [replace(c.completion, logprobs=each) for c, each in zip(candidates, found, strict=True)]
        candidates = tuple([replace(c, completion=each) for c, each in zip(candidates, whole, strict=True)])
    if len(candidates) > 1:
        candidates = tuple(accumulate(candidates, lambda b, c: c if c.prompt.provider else replace(c, prompt=b.prompt)))
    return replace(
        sample, sample_id=sample_id, task_id=task_id, status=_STATUSES[status], input=content, candidates=candidates
    )
