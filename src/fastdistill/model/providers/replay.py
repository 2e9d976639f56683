"""Answers recorded elsewhere, read from files: a teacher that needs no server. Never makes an answer up.

A line of a recording (JSON Lines, `.gz` too) says what it answers, in one of three ways, and the answers to it:

    {"messages": [{"role": "user", "content": "2 + 2?"}], "completions": ["4", "Four."]}
    {"prompt": "2 + 2?", "completion": {"text": "4", "finish_reason": "stop", "usage": {"completion_tokens": 1}}}
    {"key": "sum-17", "completion": "4"}

`messages` are all of a prompt's messages, `prompt` is its last user message, `key` is a sample's task id or sample id.
The answers to the same thing, over all lines in their order, are its attempts 0, 1, 2 ...
"""

import asyncio
import gzip
import hashlib
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import convert
from msgspec.structs import replace
from pydantic import Field

from fastdistill.core.canonical import digest, has_lone_surrogate
from fastdistill.core.errors import EnvironmentFault, InputError
from fastdistill.core.files import sha256_file
from fastdistill.core.types import Completion, FinishReason, Prompt
from fastdistill.model.provider import Capabilities, ErrorKind, ModelConfig, Price, Provider, ProviderError
from fastdistill.model.transport import split_thinking


class ReplayConfig(ModelConfig):
    provider: Literal["replay"] = "replay"
    model: str = Field("replay", min_length=1, description="who gave the answers: part of their identity")
    path: Path | tuple[Path, ...] = Field(description="a recording, or a list of them in order; `~` is your home")
    price: Price | None = Price()
    max_concurrency: int | None = Field(256, gt=0, description="answers looked up at a time")

    recorded: ClassVar[bool] = True

    @property
    def files(self) -> Sequence[Path]:
        paths = (self.path,) if isinstance(self.path, Path) else self.path
        return [path.expanduser().absolute() for path in paths]

    @cached_property
    def digests(self) -> Sequence[str]:
        """sha256 of each file.

        Raises:
            InputError: one can't be read.
        """
        try:
            return [sha256_file(path) for path in self.files]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; give the recording's path as `path`") from error

    def parameters(self) -> dict[str, Any]:
        """The files' content is part of every prompt: a changed recording is never answered from old entries."""
        return super().parameters() | {"recording": self.digests}


class ReplayProvider(Provider):
    """Keeps the answers in a temporary database of SQLite's, which is a file once they are many."""

    Config: ClassVar[type[ModelConfig]] = ReplayConfig

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self._answers: sqlite3.Connection | None = None

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        """The answer to attempt number `seed`: see `ModelConfig.recorded`."""
        assert self._answers is not None, "probed before"
        assert seed is not None
        for key in _keys_of(prompt):
            found = "SELECT answer FROM answers WHERE key = ? ORDER BY rowid LIMIT 1 OFFSET ?"
            if answer := self._answers.execute(found, (key, seed)).fetchone():
                return [msgspec.json.decode(answer[0], type=Completion)]
            (count,) = self._answers.execute("SELECT count(*) FROM answers WHERE key = ?", (key,)).fetchone()
            if count:
                message = f"attempt {seed} is not recorded: the prompt has {count} answers"
                raise ProviderError(ErrorKind.NOT_RECORDED, message)
        asked = prompt.messages[-1]["content"][:80]
        message = f"nothing is recorded for the sample, nor for its messages, which end in {asked!r}"
        raise ProviderError(ErrorKind.NOT_RECORDED, message)

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        """Raises InputError, with the file and the line, for what is no recording."""
        if self._answers is None:
            self._answers = await asyncio.to_thread(_indexed, self._config)
        answers, keys = self._answers.execute("SELECT count(*), count(DISTINCT key) FROM answers").fetchone()
        return Capabilities(
            endpoint=", ".join(map(str, self._config.files)),
            server="fastdistill",
            served_model=self._config.model,
            n=False,
            notes=(f"{answers} answers to {keys} prompts",),
        )

    async def aclose(self) -> None:
        if self._answers is not None:
            self._answers.close()


class _Answer(Completion, frozen=True, forbid_unknown_fields=True):
    finish_reason: FinishReason = FinishReason.STOP


class _Message(msgspec.Struct):
    role: str
    content: str


class _Line(msgspec.Struct):
    messages: list[_Message] | None = None
    prompt: str | None = None
    key: str | int | None = None
    completions: list[str | _Answer] | None = None
    completion: str | _Answer | None = None


def _indexed(config: ReplayConfig) -> sqlite3.Connection:
    answers = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    try:
        answers.execute("CREATE TABLE answers (key BLOB, answer BLOB)")
        answers.execute("BEGIN")
        for path, known in zip(config.files, config.digests, strict=True):
            answers.executemany("INSERT INTO answers VALUES (?, ?)", _rows(path, known, config.model))
        answers.execute("CREATE INDEX by_key ON answers (key)")
        answers.execute("COMMIT")
    except BaseException as error:
        answers.close()
        if not isinstance(error, sqlite3.Error):
            raise
        raise EnvironmentFault(f"replay: the temporary folder can't hold the recording: {error}; free space") from error
    return answers


def _rows(path: Path, known: str, model: str) -> Iterator[tuple[bytes, bytes]]:
    """The key of what is answered, and an answer."""
    number, text = 0, b""
    decoder = msgspec.json.Decoder(_Line)
    try:
        with path.open("rb") as raw:
            # Answers are stored under the digest that was taken before: they must be of that very content.
            if hashlib.file_digest(raw, "sha256").hexdigest() != known:
                raise InputError(f"{path}: was changed after this run had begun; run it again")
            raw.seek(0)
            lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for number, text in enumerate(lines, start=1):  # noqa: B007 - `number` is for what is raised
                if text.strip():
                    line = decoder.decode(text)
                    key = _key_of(line)
                    for answer in _answers_of(line):
                        yield key, msgspec.json.encode(_completion(answer, model))
    except (ValueError, RecursionError) as error:  # of msgspec, of canonical JSON, and ours
        problem, remedy = str(error), ""
        if has_lone_surrogate(text):
            problem, remedy = "a lone surrogate is no character", "write both of its pair, or \\ufffd in its place; "
        raise InputError(
            f"{path}:{number}: not a line of a recording ({problem}); {remedy}see teachers.md, Replay"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: can't be read to its end: {error}; fetch the file again") from error
    if number == 0:
        raise InputError(f"{path}: empty; a recording has one JSON object a line")


def _key_of(line: _Line) -> bytes:
    messages = [[message.role, message.content] for message in line.messages or ()]
    given = {"messages": messages, "prompt": line.prompt, "key": line.key}
    keys = [_key(kind, value) for kind, value in given.items() if value not in (None, [], "")]
    if len(keys) != 1:
        raise ValueError(f"needs one of {', '.join(given)}")
    return keys[0]


def _answers_of(line: _Line) -> Sequence[str | _Answer]:
    given = [answer for answer in (*(line.completions or ()), line.completion) if answer is not None]
    if not given:
        raise ValueError("needs completions, or one completion")
    return given


def _keys_of(prompt: Prompt) -> Iterator[bytes]:
    """Under what an answer to a prompt may be recorded, the closest first."""
    for name in prompt.parameters.get("sample", ()):
        yield _key("key", name)
    yield _key("messages", [[message["role"], message["content"]] for message in prompt.messages])
    yield _key("prompt", prompt.messages[-1]["content"])


def _key(kind: str, value: object) -> bytes:
    return bytes.fromhex(digest([kind, str(value) if kind == "key" else value]))


def _completion(answer: str | _Answer, model: str) -> Completion:
    given = convert(_Answer(answer) if isinstance(answer, str) else answer, Completion, from_attributes=True)
    thinking, text = given.thinking, given.text
    if thinking is None:
        thinking, text = split_thinking(text, given.finish_reason)
    return replace(given, text=text, thinking=thinking, model=given.model or model)
