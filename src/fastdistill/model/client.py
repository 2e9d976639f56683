"""The one way to a model: store → limit → provider → meter. What is stored is never asked for again.

The client retries, tops up choices that a server left out, and lets two samples that ask the same thing share one
answer. It knows no wire protocol (providers do) and no file format (the store does).
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Protocol

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import FatalError, SampleError, TeacherError
from fastdistill.core.timing import observe
from fastdistill.core.types import Answer, Completion, Draw, Message, Prompt
from fastdistill.model.meter import Meter
from fastdistill.model.provider import Capabilities, ErrorKind, ModelConfig, Provider, ProviderError
from fastdistill.model.retry import GiveUp, Retry, Stop, decide


class ResponseStore(Protocol):
    """Answers that were paid for, by key."""

    def get(self, key: str) -> Completion | None: ...

    async def put(self, prompt: Prompt, answers: Sequence[Answer]) -> None:
        """Returns once the answers would survive the process being killed."""
        ...


class Brake(Protocol):
    """Says whether the run is winding down: then no new request goes out, while those in flight come home."""

    def check(self) -> None:
        """Raises FatalError if it is."""
        ...


class ModelClient:
    """Implements `core.step.Model` for one configured model."""

    def __init__(self, name: str, config: ModelConfig, provider: Provider, store: ResponseStore, brake: Brake) -> None:
        self.name = name
        self.config = config
        self.meter = Meter(config.price)
        self.capabilities: Capabilities | None = None  # once the endpoint was contacted
        self._provider = provider
        self._store = store
        self._brake = brake
        self._slots = asyncio.Semaphore(config.concurrency)
        self._probing = asyncio.Lock()
        self._asks_n = False  # several choices in one request, once the server has shown that it can
        self._asking: dict[str, asyncio.Event] = {}

    def prompt(self, messages: Sequence[Message], decode: DecodeProfile, extra: dict[str, Any]) -> Prompt:
        parameters = decode.parameters() | self.config.parameters() | extra
        return Prompt(self.config.provider, self.config.model, tuple(messages), parameters)

    async def generate(self, prompt: Prompt, draws: Sequence[Draw]) -> list[Answer | SampleError]:
        results: dict[str, Answer | SampleError] = {}
        draw_by_key = {draw.key(prompt): draw for draw in draws}
        while missing := {key: draw for key, draw in draw_by_key.items() if key not in results}:
            mine: dict[str, Draw] = {}
            for key, draw in missing.items():
                if completion := self._store.get(key):
                    self.meter.stored += 1
                    results[key] = Answer(draw, key, completion, stored=True)
                elif key not in self._asking:
                    mine[key] = draw
            if mine:
                results |= await self._ask_once(prompt, mine)
            elif others := [self._asking[key] for key in missing if key in self._asking]:
                await others[0].wait()  # another sample asks the very same; then look again
        return [results[key] for key in draw_by_key]

    async def ready(self) -> Capabilities:
        """Contacts the endpoint, once, and learns what it honours.

        Raises:
            TeacherError: it can't be used; the message says what to do.
        """
        async with self._probing:
            if self.capabilities is None:
                self.capabilities = await self._probe()
                self._asks_n = self.capabilities.n is True
        return self.capabilities

    @property
    def endpoint(self) -> Capabilities | None:
        """What was learnt of the endpoint, at first contact and since; None before it."""
        if self.capabilities is None:
            return None
        notes = dict.fromkeys((*self.capabilities.notes, *self._provider.notes))
        return replace(self.capabilities, notes=tuple(notes))

    async def aclose(self) -> None:
        await self._provider.aclose()

    async def _probe(self) -> Capabilities:
        failures: list[ErrorKind] = []
        while True:
            try:
                return await self._provider.probe()
            except ProviderError as error:
                # Nobody there at the very start is a mistake to fix, not an outage to wait out.
                waits = error.kind is not ErrorKind.REFUSED and len(failures) < 3
                decision = decide(error, failures, self.config.max_retries, random.random())
                if not (waits and isinstance(decision, Retry)):
                    raise TeacherError(f"{self.name}: {error}") from error
                failures.append(error.kind)
                await asyncio.sleep(decision.delay)

    async def _ask_once(self, prompt: Prompt, draws: dict[str, Draw]) -> dict[str, Answer | SampleError]:
        done = asyncio.Event()
        self._asking |= dict.fromkeys(draws, done)
        try:
            await self.ready()
            answers = await self._ask(prompt, list(draws.values()))
        finally:
            for key in draws:
                del self._asking[key]
            done.set()
        return {draw.key(prompt): answer for draw, answer in zip(draws.values(), answers, strict=True)}

    async def _ask(self, prompt: Prompt, draws: Sequence[Draw]) -> list[Answer | SampleError]:
        """One answer for each draw: in one request where the server brings several choices, else side by side."""
        if len(draws) == 1:
            return await self._request(prompt, draws)
        if self._asks_n:
            answers = await self._request(prompt, draws)
            rest = draws[len(answers) :]
            return [*answers, *(await self._ask(prompt, rest) if rest else ())]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._settled(prompt, draw)) for draw in draws]
        settled = [task.result() for task in tasks]
        for fatal in settled:
            if isinstance(fatal, FatalError):
                raise fatal
        return [answer for answer in settled if not isinstance(answer, FatalError)]

    async def _settled(self, prompt: Prompt, draw: Draw) -> Answer | SampleError | FatalError:
        """What is fatal to the run comes back as a value: raised, it would cancel siblings that are being paid for."""
        try:
            (answer,) = await self._request(prompt, [draw])
        except FatalError as error:
            return error
        return answer

    async def _request(self, prompt: Prompt, draws: Sequence[Draw]) -> list[Answer | SampleError]:
        """Answers for the first draws, at least one; fewer than asked for where the server does not honour `n`."""
        failures: list[ErrorKind] = []
        while True:
            try:
                completions = await self._in_slot(prompt, draws)
            except ProviderError as error:
                if len(draws) > 1 and error.kind is ErrorKind.BAD_REQUEST:
                    self._asks_n = False  # llama.cpp refuses n beyond its slots, some refuse any
                    return []
                decision = decide(error, failures, self.config.max_retries, random.random())
                match decision:
                    case Retry(delay):
                        self.meter.retries[error.kind] += 1
                        failures.append(error.kind)
                        await asyncio.sleep(delay)
                    case GiveUp(reason):
                        return [SampleError(reason, f"{self.name}: {error}") for _ in draws]
                    case Stop():
                        raise TeacherError(f"{self.name}: {error}") from error
            else:
                self._asks_n = self._asks_n and len(completions) >= len(draws)
                got = list(zip(draws, completions, strict=False))
                answers = [Answer(draw, draw.key(prompt), completion, stored=False) for draw, completion in got]
                await self._store.put(prompt, answers)
                for answer in answers:
                    self.meter.answered(answer.completion)
                return [*answers]

    async def _in_slot(self, prompt: Prompt, draws: Sequence[Draw]) -> list[Completion]:
        begun = perf_counter()
        async with self._slots:
            self._brake.check()
            queued = perf_counter() - begun
            with self.meter.request(queued):
                try:
                    completions = await self._provider.complete(prompt, seed=draws[0].seed, n=len(draws))
                finally:
                    observe(queued=queued, busy=perf_counter() - begun - queued)
        if not completions:
            raise ProviderError(ErrorKind.GARBLED, "the response has no choices")
        return completions
