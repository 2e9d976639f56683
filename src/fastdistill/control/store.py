"""The response store: every paid answer, from the moment it arrives, shared by all runs. Never deletes.

The key is made of what would change the answer (see `core.types.Draw.key`), so resuming is running again.
"""

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from fastdistill.control.writer import Writer, connect, fault
from fastdistill.core.types import Answer, Completion, Prompt

SCHEMA = """
CREATE TABLE IF NOT EXISTS prompts (
    id BLOB PRIMARY KEY, provider TEXT, model TEXT, messages TEXT, parameters TEXT);
CREATE TABLE IF NOT EXISTS responses (
    key BLOB PRIMARY KEY, prompt BLOB, seed INTEGER, attempt INTEGER, completion TEXT);
PRAGMA user_version = 1;
"""


class ResponseStore:
    """`responses.sqlite`; an async context manager. Several processes may use one file at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = Writer(path, SCHEMA, durable=True)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(Completion).decode

    async def __aenter__(self) -> "ResponseStore":
        await self._writer.__aenter__()
        self._reader = connect(self.path, readonly=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()
        await self._writer.__aexit__(kind, error, trace)

    def get(self, key: str) -> Completion | None:
        try:
            row = self._reader.execute(
                "SELECT completion FROM responses WHERE key = ?", (bytes.fromhex(key),)
            ).fetchone()
            return None if row is None else self._decode(row[0])
        except (sqlite3.Error, msgspec.DecodeError) as error:
            raise fault(self.path, error) from error

    def count(self) -> int:
        """Answers in the store, of all runs."""
        (count,) = self._reader.execute("SELECT count(*) FROM responses").fetchone()
        return int(count)

    async def put(self, prompt: Prompt, answers: Sequence[Answer]) -> None:
        encode = self._encode
        asked = prompt_row(prompt)
        rows = [
            (bytes.fromhex(a.key), asked[0], a.draw.seed, a.draw.attempt, encode(a.completion).decode())
            for a in answers
        ]
        await self._writer.write(
            [
                ("INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, ?, ?)", [asked]),
                # The first answer under a key stays: whoever comes later asked for something that was there.
                ("INSERT OR IGNORE INTO responses VALUES (?, ?, ?, ?, ?)", rows),
            ]
        )


def prompt_row(prompt: Prompt) -> tuple[bytes, str, str, str, str]:
    """A prompt as the table `prompts` has it. Its id is of the very bytes: a prompt's digest takes equal text in
    another Unicode form for the same, and does not tell providers apart.
    """
    content = (
        prompt.provider,
        prompt.model,
        msgspec.json.encode(prompt.messages).decode(),
        msgspec.json.encode(prompt.parameters).decode(),
    )
    return (hashlib.sha256("\x1f".join(content).encode()).digest(), *content)
