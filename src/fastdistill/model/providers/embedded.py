"""The embedded teacher: a small text-to-SQL model that comes with the package and runs in a process of its own.

It needs no server, no key and no download. What it can do, and how it was trained, is in lab/teacher_card.md.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
from pydantic import Field, field_validator

from fastdistill.core.types import Completion, LogprobBasis, Prompt
from fastdistill.model.embedded.wire import Ready, Request, Result
from fastdistill.model.provider import Capabilities, ErrorKind, ModelConfig, Provider, ProviderError, check_wires

_LINE_LIMIT = 1 << 28  # bytes; all choices of a request with all their log-probabilities are one line
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "logprobs", "top_logprobs")
_NOT_SENT = ("revision", "token_ids", "weights")
_NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}


class EmbeddedConfig(ModelConfig):
    provider: Literal["embedded"] = "embedded"
    model: str = Field("text2sql", min_length=1, description="a label")
    path: Path | None = Field(None, description="a folder with another model, as lab/ writes them")
    max_concurrency: int | None = Field(32, gt=0, description="requests in flight; by default as many as it has slots")

    @field_validator("path")
    @classmethod
    def _is_a_model(cls, path: Path | None) -> Path | None:
        if path is not None and not (path / "model.json").is_file():
            raise ValueError(f"{path}: no model.json; give the folder of a model that lab/train_teacher.py wrote")
        return path

    def parameters(self) -> dict[str, Any]:
        if self.path is None:
            return super().parameters()
        return super().parameters() | {"weights": json.loads((self.path / "model.json").read_bytes())["sha256"]}


class EmbeddedProvider(Provider):
    """Asks `fastdistill.model.embedded.worker`, which it starts when it first needs it; `wire` says what passes."""

    Config: ClassVar[type[ModelConfig]] = EmbeddedConfig

    def __init__(self, config: EmbeddedConfig) -> None:
        self._config = config
        self._starting = asyncio.Lock()
        self._worker: tuple[Process, asyncio.Task[None]] | None = None  # and who reads what it says
        self._waiting: dict[int, asyncio.Future[Result]] = {}
        self._ready: Ready
        self._asked = 0

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        check_wires("embedded", prompt, has="token_ids")
        request: dict[str, Any] = {"messages": prompt.messages, "n": n, "seed": seed}
        for name, value in sorted(prompt.parameters.items()):
            if name in _SAMPLING:
                request[name] = value
            elif name not in _NOT_SENT and value != _NEUTRAL.get(name):
                message = f"embedded: the model does not take {name}; remove it"
                raise ProviderError(ErrorKind.UNSUPPORTED, message, parameter=name)
        result = await self._ask(request)
        if result.too_long is not None:
            raise ProviderError(ErrorKind.TOO_LONG, f"embedded: {result.too_long}")
        return [*result.choices]

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        await self._started()
        return Capabilities(
            endpoint="embedded",
            server="fastdistill",
            served_model=self._ready.model,
            build=self._ready.model,
            models=(self._config.model,),
            context_length=self._ready.context,
            n=True,
            logprobs=True,
            json_schema=False,
            seed=True,
            logprob_basis=LogprobBasis.RAW,
            max_top=20,
            has_token_ids=True,
            can_score_prompt=False,
        )

    async def aclose(self) -> None:
        if self._worker is not None:
            process, reader = self._worker
            with suppress(ProcessLookupError):
                process.kill()
            await reader
            self._worker = None

    async def _ask(self, request: dict[str, Any]) -> Result:
        stdin = (await self._started()).stdin
        assert stdin is not None
        self._asked += 1
        key = self._asked
        try:
            line = msgspec.json.encode(msgspec.convert({"id": key, **request}, Request))
        except msgspec.ValidationError as error:
            raise ProviderError(ErrorKind.BAD_REQUEST, f"embedded: {error}") from error
        answer = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            stdin.write(line + b"\n")
            await stdin.drain()
            return await asyncio.wait_for(answer, self._config.timeout)
        except TimeoutError as error:
            raise ProviderError(ErrorKind.TIMEOUT, f"embedded: no answer in {self._config.timeout:g} s") from error
        except ConnectionError as error:
            raise ProviderError(ErrorKind.RESET, "embedded: the model's process ended") from error
        finally:
            del self._waiting[key]
            if answer.cancelled():  # nobody waits for it any more
                stdin.write(b"%d\n" % key)

    async def _started(self) -> Process:
        async with self._starting:
            if self._worker is None or self._worker[0].returncode is not None:
                await self.aclose()
                command = [sys.executable, "-P", "-m", "fastdistill.model.embedded.worker"]
                command += [] if self._config.path is None else [str(self._config.path)]
                process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=_LINE_LIMIT)
                assert process.stdout is not None
                if not (line := await process.stdout.readline()):
                    code = await process.wait()
                    raise ProviderError(ErrorKind.RESET, f"embedded: the model's process ended at once, with {code}")
                self._ready = msgspec.json.decode(line, type=Ready)
                self._worker = process, asyncio.create_task(self._read(process))  # ends with the process
            return self._worker[0]

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        while (line := await process.stdout.readline()).endswith(b"\n"):  # else it died within it
            result = msgspec.json.decode(line, type=Result)
            waiting = self._waiting.get(result.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(result)
        await process.wait()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ProviderError(ErrorKind.RESET, "embedded: the model's process ended"))
