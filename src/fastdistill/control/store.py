"""The response store: every paid answer, from the moment it arrives, shared by all runs. Never deletes.

The key is made of what would change the answer (see `core.types.Draw.key`), so resuming is running again.
"""

import asyncio
import sqlite3
import zlib
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, cast

import msgspec
from msgspec.structs import replace

from fastdistill.control.journal import Journal, left_behind, room_for
from fastdistill.control.seen import Seen
from fastdistill.control.writer import Writer, connect, fault, insert
from fastdistill.core.turns import LARGE, Queue, beside, give_turn
from fastdistill.core.types import Answer, Completion, Prompt, PromptColumns, TokenLogprob

SCHEMA = """
CREATE TABLE IF NOT EXISTS prompts (
    id INTEGER PRIMARY KEY, provider TEXT, model TEXT, messages TEXT, parameters TEXT);
CREATE TABLE IF NOT EXISTS responses (
    key BLOB PRIMARY KEY, prompt INTEGER, seed INTEGER, attempt INTEGER, completion TEXT);
PRAGMA user_version = 1;
"""
_ALL = """
SELECT key, prompt, seed, attempt, completion, provider, model, messages, parameters
FROM responses LEFT JOIN prompts ON id = prompt
"""

# Ids of prompts are numbers one after the other: a hash would write to a page of its own for each answer. A prompt that
# comes again after so many others is written again.
_PROMPTS_REMEMBERED = 4096
_GO_ON_AT_ONCE = 16  # answers in a round of the loop: what follows takes some milliseconds; eight cost 5% throughput
_SPARE_JOURNALS = 3  # as many as what comes within a moment under full load needs
_MOST_UNCOMMITTED = 2**24  # characters of answers, before who puts more has to wait

_Entry: TypeAlias = tuple[str, PromptColumns, list[list[Any]]]
"""A prompt's name and columns, and answers to it: the columns of `responses`, the prompt's id to be put in."""


class ResponseStore:
    """`responses.sqlite`; an async context manager. Several processes may use one file at the same time.

    An answer is in a journal beside the file at once, and in the file a moment later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = Writer[_Entry | Journal](path, SCHEMA, self._write_all, durable=True, every=0.1)
        self._journal: Journal | None = None
        self._spare: list[Journal] = []  # with nothing in it
        self._uncommitted: dict[str, Completion] = {}  # by key
        self._given = self._committed = 0  # characters of answers
        self._failed = False  # something could not be committed: no journal is to be dropped
        self._queue = Queue(_GO_ON_AT_ONCE)
        self._prompts: OrderedDict[str, int] = OrderedDict()  # ids of the latest, by provider and digest
        self._mine = Seen()  # keys
        self._writing: set[asyncio.Future[None]] = set()  # large answers
        self._last = 0  # id of the latest prompt, as this process left it
        self._alone = not path.exists()  # all answers are of this process, so that only its own keys can be found

    async def __aenter__(self) -> "ResponseStore":
        await self._writer.__aenter__()
        self._reader = connect(self.path, readonly=True)
        try:
            for entries in left_behind(self.path):
                self._alone = False
                for entry in map(_decode_entry, entries):
                    if not all(self.get(row[0].hex()) for row in entry[2]):
                        self._submit(entry)
                await self._writer.write(None)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*self._writing, return_exceptions=True)
        self._reader.close()
        try:
            await self._writer.__aexit__(kind, error, trace)
        finally:
            for journal in filter(None, (self._journal, *self._spare)):
                journal.close(keep=self._failed or bool(self._uncommitted))  # the writer was not waited for

    def get(self, key: str) -> Completion | None:
        if self._alone and key not in self._mine:
            return None
        if (completion := self._uncommitted.get(key)) is not None:
            return completion
        try:
            row = self._reader.execute(
                "SELECT completion FROM responses WHERE key = ?", (bytearray.fromhex(key),)
            ).fetchone()
            return None if row is None else read_completion(row[0])
        except (sqlite3.Error, msgspec.DecodeError, ValueError, zlib.error) as error:
            raise fault(self.path, error) from error

    async def put(self, prompt: Prompt, answers: Sequence[Answer]) -> None:
        """Stores answers before anything else can happen, and returns when it is their turn to be worked on.

        Raises:
            EnvironmentFault: the disk is full, or the file can't be written.
        """
        if sum([answer.completion.size for answer in answers]) <= LARGE:
            self._take(prompt, answers, _rows(answers))
        else:
            writing = asyncio.ensure_future(self._take_large(prompt, answers))
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)
            await asyncio.shield(writing)  # it goes on even if who asked is called off: the answers were paid for
        if self._is_behind:
            await self._writer.write(None)
        await self._queue.turn()

    async def take_in(self, other: Path) -> tuple[int, int]:
        """Copies the answers in another store's file; how many were new, and how many known.

        A few at a time, so that runs which use this file can write meanwhile.

        Raises:
            EnvironmentFault: that file can't be read, or this one can't be written. What was copied stays.
        """
        self._alone = False
        new = known = 0
        for key, prompt, seed, attempt, completion, *columns in _all_in(other):
            if self.get(key.hex()):
                known += 1
            else:
                new += 1
                self._submit((f"{other} {prompt}", cast(PromptColumns, columns), [[key, 0, seed, attempt, completion]]))
            if self._is_behind:
                await self._writer.write(None)
            await give_turn()
        await self._writer.write(None)
        return new, known

    @property
    def _is_behind(self) -> bool:
        return self._writer.crowded or self._given - self._committed > _MOST_UNCOMMITTED

    async def _take_large(self, prompt: Prompt, answers: Sequence[Answer]) -> None:
        self._take(prompt, answers, await beside(partial(_rows, answers)))

    def _take(self, prompt: Prompt, answers: Sequence[Answer], rows: list[list[Any]]) -> None:
        entry = (f"{prompt.provider} {prompt.digest}", prompt.columns, rows)
        self._append(_encode_entry(entry))
        for answer in answers:
            self._uncommitted.setdefault(answer.key, answer.completion)
            if self._alone:
                self._mine.add(answer.key)
        self._submit(entry)

    def _submit(self, entry: _Entry) -> None:
        self._given += _size(entry[2])
        self._writer.submit(entry)

    def _append(self, entry: bytes) -> None:
        if self._journal is not None and not self._uncommitted:
            self._journal.clear()
        while self._journal is None or not self._journal.append(entry):
            full, self._journal = self._journal, None
            if full is not None:
                self._writer.submit(full)
            try:
                self._journal = self._spare.pop() if self._spare else Journal(self.path, room_for(entry))
            except OSError as error:
                raise fault(self.path, error) from error

    def _write_all(self, connection: sqlite3.Connection, entries: Sequence[_Entry | Journal]) -> None:
        """A journal comes after all that is in it."""
        try:
            self._insert(connection, [entry for entry in entries if not isinstance(entry, Journal)])
        except BaseException:
            self._failed = True
            raise
        for entry in entries:
            if isinstance(entry, Journal):
                self._give_back(entry)
                continue
            rows = entry[2]
            self._committed += _size(rows)
            for row in rows:
                self._uncommitted.pop(row[0].hex(), None)

    def _give_back(self, journal: Journal) -> None:
        if self._failed or len(self._spare) == _SPARE_JOURNALS:
            journal.close(keep=self._failed)
        else:
            journal.clear()
            self._spare.append(journal)

    def _insert(self, connection: sqlite3.Connection, entries: Sequence[_Entry]) -> None:
        new: dict[str, int] = {}
        prompts: list[tuple[Any, ...]] = []
        responses: list[list[Any]] = []
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            last = connection.execute("SELECT max(rowid) FROM prompts").fetchone()[0] or 0
            self._alone = self._alone and last == self._last  # another process begins with a prompt of its own
            for asked, columns, rows in entries:
                id_ = self._prompts.get(asked) or new.get(asked)
                if id_ is None:
                    id_ = new[asked] = last = last + 1
                    prompts.append((id_, *columns))
                for row in rows:
                    row[1] = id_
                responses += rows
            insert(connection, "INSERT INTO prompts", prompts)
            # The first answer under a key stays: whoever comes later asked for something that was there.
            insert(connection, "INSERT OR IGNORE INTO responses", responses)
        self._last = last
        self._prompts.update(new)
        while len(self._prompts) > _PROMPTS_REMEMBERED:
            self._prompts.popitem(last=False)


def _all_in(path: Path) -> Iterator[tuple[Any, ...]]:
    with closing(connect(path, readonly=True)) as connection:
        try:
            yield from connection.execute(_ALL)
        except sqlite3.Error as error:
            raise fault(path, error) from error


def _rows(answers: Sequence[Answer]) -> list[list[Any]]:
    """Not made in the writer's thread: what has no JSON costs its own sample."""
    return [[bytearray.fromhex(a.key), 0, a.draw.seed, a.draw.attempt, write_completion(a.completion)] for a in answers]


def _size(rows: list[list[Any]]) -> int:
    return sum([len(row[-1]) for row in rows])


_encode_entry = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(_Entry).decode
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Completion).decode
_decode_logprobs = msgspec.json.Decoder(tuple[TokenLogprob, ...]).decode
_UNPACKED, _PACKED = '"logprobs":null,', '"logprobs":"'  # neither can stand in a JSON string


def write_completion(completion: Completion) -> str:
    """A completion as JSON, its log-probabilities packed."""
    if completion.logprobs is None:
        return _encode(completion).decode()
    packed = pack(completion.logprobs)
    return _encode(replace(completion, logprobs=None)).decode().replace(_UNPACKED, f'{_PACKED}{packed}",')


def read_completion(text: str) -> Completion:
    """A completion as `write_completion` wrote it, or with its log-probabilities as plain JSON."""
    head, packed, rest = text.partition(_PACKED)
    if not packed:
        return _decode(text)
    packed, _, tail = rest.partition('",')
    return replace(_decode(f"{head}{_UNPACKED}{tail}"), logprobs=unpack(packed))


def pack(logprobs: Sequence[TokenLogprob]) -> str:
    """Log-probabilities as one string.

    With 20 alternatives for each token that halves what is by far the largest part of an answer. Level 6 would take a
    seventh less room and five times as long.
    """
    return b64encode(zlib.compress(_encode(logprobs), 1)).decode()


def unpack(packed: str) -> tuple[TokenLogprob, ...]:
    return _decode_logprobs(zlib.decompress(b64decode(packed)))
