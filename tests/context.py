"""A context for tests: a real index on disk, a real folder, scripted models, and what was discarded."""

import sqlite3
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from fastdistill.core.step import Model
from fastdistill.core.types import Candidate, Completion, FinishReason, Prompt, Sample


class SqliteIndex:
    """Keys seen so far, in a table of their own."""

    def __init__(self, database: sqlite3.Connection, name: str) -> None:
        self._database = database
        self._name = name

    def first(self, key: str, value: str) -> str | None:
        found = self._database.execute(
            "SELECT value FROM seen WHERE name = ? AND key = ?", (self._name, key)
        ).fetchone()
        if found is None:
            self._database.execute("INSERT INTO seen VALUES (?, ?, ?)", (self._name, key, value))
            return None
        return str(found[0])


class TestContext:
    __test__ = False

    def __init__(self, folder: Path, models: Mapping[str, Model] | None = None) -> None:
        self.dist = folder / "dist"
        self.discarded: list[Sample] = []
        self.reports: dict[str, dict[str, object]] = {}
        self._models = models or {}
        self._numbers = count()
        self._database = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS seen (name TEXT, key TEXT, value TEXT, PRIMARY KEY (name, key)) WITHOUT ROWID"
        )
        self._database.execute("BEGIN")  # one transaction, never committed: the index lasts as long as the context

    def model(self, name: str) -> Model:
        return self._models[name]

    def index(self, name: str) -> SqliteIndex:
        return SqliteIndex(self._database, name)

    def next_index(self) -> int:
        return next(self._numbers)

    def discard(self, sample: Sample) -> None:
        self.discarded.append(sample)

    def close(self) -> None:
        self._database.close()

    def report(self, step: str, found: Mapping[str, object]) -> None:
        self.reports[step] = dict(found)

    @property
    def reasons(self) -> list[str]:
        """The last reason of each discarded sample."""
        return [sample.failures[-1].reason for sample in self.discarded]


def candidate(
    answer: str = "SELECT 1",
    attempt: int = 0,
    finish: FinishReason = FinishReason.STOP,
    messages: tuple[Mapping[str, str], ...] = ({"role": "user", "content": "How many?"},),
) -> Candidate:
    """A candidate as the generator makes it: its answer is the completion's text."""
    prompt = Prompt("scripted", "teacher-1", messages, {"temperature": 0.0})
    completion = Completion(answer, finish)
    return Candidate(f"candidate-{attempt}", attempt, attempt, f"key-{attempt}", prompt, completion, answer)
