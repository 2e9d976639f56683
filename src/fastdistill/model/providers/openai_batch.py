"""OpenAI's Batch API: the requests and answers of `openai.py`, at the server's leisure and for less money.

Requests are gathered until none has come for a while or the batch is full, go out as one file, and each gets its
line of the answers. A batch is put on record before it is made: a run that finds records of an earlier one goes on
with those batches, so none is paid for twice. Wire: https://platform.openai.com/docs/api-reference/batch
"""

import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from time import time_ns
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from fastdistill.core.canonical import digest, with_characters
from fastdistill.core.errors import EnvironmentFault, FatalError, NotAsked, TeacherError, TimeUp
from fastdistill.core.files import atomic
from fastdistill.core.turns import give_turn
from fastdistill.model.client import Brake
from fastdistill.model.provider import ATTEMPT, ErrorKind, ProviderError
from fastdistill.model.providers.openai import BatchOptions, OpenAIConfig, OpenAIProvider
from fastdistill.model.transport import Response, transport_for

LARGEST = 100 * 10**6  # bytes of one batch: half of what OpenAI takes
KEPT = 30 * 86_400 * 10**9  # nanoseconds; OpenAI deletes the answers of a batch after 30 days
CLOCKS_DIFFER = 3600  # seconds, at most, between the server's clock and ours
SLOWEST = 10  # times `poll_s`
AT_ONCE = 16  # who wait for the same, between two turns of the event loop

_ENDPOINT = "/v1/chat/completions"
_ENDED = {"completed", "failed", "expired", "cancelled"}

_LASTS = {ErrorKind.AUTH, ErrorKind.NO_MODEL, ErrorKind.BAD_REQUEST, ErrorKind.TOO_LONG, ErrorKind.UNSUPPORTED}

T = TypeVar("T")
_Answers: TypeAlias = dict[str, Response | str]
"""By custom id, each until it is asked for; words say why there is none."""


@dataclass(slots=True, eq=False)
class _Batch:
    """Requests that go out together. `path` is its record, and `path.stem` its name: the time when it was begun."""

    path: Path
    requests: list[str] = field(default_factory=list)  # custom ids: a digest of what is asked for, and a number
    id: str | None = None  # the server's; None: not known to have been made
    form: bytearray = field(default_factory=bytearray)  # what is to be uploaded; put together at once it takes long
    ended: "asyncio.Task[tuple[_State, _Answers]] | None" = None


class BatchProvider(OpenAIProvider):
    """Implements `Provider`; a request returns when its batch has ended, and a request that failed joins the next.

    What keeps a whole batch from being answered is a FatalError: the records stay, and the next run goes on. It also
    ends the wait when the run's time is up, or when it winds down for a reason other than having enough.
    """

    def __init__(self, config: OpenAIConfig, options: BatchOptions, records: Path, brake: Brake) -> None:
        # A kept connection that turns out to be dead has its request sent again, which could make a batch twice.
        super().__init__(config, transport_for(config.url, max_body=2**30, keep=0))
        self._options = options
        self._records = records
        self._brake = brake
        self._recalled: asyncio.Task[dict[str, list[tuple[_Batch, str]]]] | None = None
        self._gathering: _Batch | None = None
        self._at_server: set[_Batch] = set()
        self._tasks: dict[asyncio.Task[Any], asyncio.Semaphore] = {}  # ended by aclose; the door to what each brings
        if self._official:
            self._limit_name = "max_completion_tokens"  # every model takes it; to learn it would cost a batch

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().aclose()

    async def _chat(self, body: Mapping[str, Any]) -> Response:
        apart = self._config.parameters() | ({} if "seed" in body else {"attempt": ATTEMPT.get()})
        key = digest({**body, **apart})[:32]
        if self._recalled is None:
            self._recalled = self._start(self._recall())
        earlier = (await self._shared(self._recalled)).get(key, [])
        while earlier:
            answer = await self._answer(*earlier.pop())
            if isinstance(answer, Response) and answer.status == 200:
                return answer
        answer = await self._answer(*self._join(key, body))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _join(self, key: str, body: Mapping[str, Any]) -> tuple[_Batch, str]:
        """Adds a request to the batch that is being gathered, or to a new one where it does not fit."""
        request = msgspec.json.encode(body)
        batch = self._gathering
        if batch is None or len(batch.requests) >= self._options.size or len(batch.form) + len(request) > LARGEST:
            batch = self._gathering = _Batch(self._records / f"{time_ns()}.json")
            batch.form += _HEAD.format(name=batch.path.stem).encode()
        custom_id = f"{key}-{len(batch.requests)}"
        line = {"custom_id": custom_id, "method": "POST", "url": _ENDPOINT, "body": msgspec.Raw(request)}
        batch.requests.append(custom_id)
        batch.form += msgspec.json.encode(line) + b"\n"
        return batch, custom_id

    async def _answer(self, batch: _Batch, custom_id: str) -> Response | Exception:
        """The answer of a batch to one of its requests, or what it is to be told."""
        if batch.ended is None:
            batch.ended = self._start(self._carry(batch))
        state, answers = await self._shared(batch.ended)
        answer = answers.pop(custom_id, "this request was not answered")
        if isinstance(answer, Response):
            return answer
        words = f"{self._where}: batch {state.id} is {state.status}, {answer}"
        if state.status == "cancelled":
            return TeacherError(f"{words}; run again to ask for what is missing in a new batch")
        return ProviderError(ErrorKind.OVERLOADED, words)

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work, context=Context())  # for many samples, not for the one at work
        self._tasks[task] = asyncio.Semaphore(AT_ONCE)
        return task

    async def _shared(self, task: asyncio.Task[T]) -> T:
        """What a task brings to many: they go on a few at a time, for all at once would hold the loop."""
        async with self._tasks[task]:
            await asyncio.wait([task])
            return task.result()

    # --- one batch, from its first request to its answers ---

    async def _carry(self, batch: _Batch) -> "tuple[_State, _Answers]":
        if batch.id is None:
            await self._gather(batch)
            await self._create(batch, await self._upload(batch))
        while (state := await self._end(batch)).status == "failed":
            full = any(problem.code == "token_limit_exceeded" for problem in state.problems)
            if not (full and self._at_server):
                batch.path.unlink(missing_ok=True)  # nothing of it was worked on
                words = "; ".join(problem.message for problem in state.problems[:3]) or "no reason given"
                remedy = "; lower `batch.size`, or wait until other batches are done" if full else ""
                raise TeacherError(f"{self._where}: batch {state.id} failed: {words}{remedy}")
            await self._wait(self._options.poll_s)
            await self._create(batch, state.input_file_id)
        return state, await self._read(batch, state)

    async def _gather(self, batch: _Batch) -> None:
        """Returns when a batch is full, or has not grown for a while."""
        while self._gathering is batch:
            size = len(batch.requests)
            await asyncio.sleep(self._options.quiet_s)
            if self._gathering is batch and len(batch.requests) == size:
                self._gathering = None
        await self._wait(0)

    async def _upload(self, batch: _Batch) -> str:
        """The id of its file."""
        form, batch.form = batch.form, bytearray()
        form += f"\r\n--fastdistill-{batch.path.stem}--\r\n".encode()
        sent = (form, f"multipart/form-data; boundary=fastdistill-{batch.path.stem}")
        return (await self._patiently(partial(self._call, _decode_file, "POST", "/files", *sent))).id

    async def _create(self, batch: _Batch, file_id: str) -> None:
        batch.id = None
        await self._record(batch)
        window, name = self._options.completion_window, {"fastdistill": batch.path.stem}
        asked = {"input_file_id": file_id, "endpoint": _ENDPOINT, "completion_window": window, "metadata": name}
        request = msgspec.json.encode(asked)

        async def create() -> _State:
            if (found := await self._find(batch)) is not None:
                return found  # by a request that broke off
            return await self._call(_decode_state, "POST", "/batches", request)

        batch.id = (await self._patiently(create)).id
        await self._record(batch)

    async def _end(self, batch: _Batch) -> "_State":
        """The state of a batch once it has ended."""
        self._at_server.add(batch)
        look = partial(self._call, _decode_state, "GET", f"/batches/{batch.id}")
        delays = self._delays()
        while (state := await self._patiently(look, batch)).status not in _ENDED:
            try:
                await self._wait(next(delays))
            except FatalError as reason:
                goes_on = ", ".join(sorted(str(other.id) for other in self._at_server))
                if goes_on in str(reason):
                    raise  # another batch has said it
                raise type(reason)(f"{reason}; still at the server, for the next run to read: {goes_on}") from reason
        self._at_server.discard(batch)
        return state

    async def _read(self, batch: _Batch, state: "_State") -> _Answers:
        answers: _Answers = {}
        for file_id in (state.error_file_id, state.output_file_id):  # of two lines for a request, the better one stays
            if file_id is not None:
                answers |= await self._patiently(partial(self._lines, file_id), batch)
        return answers

    async def _lines(self, file_id: str) -> _Answers:
        """The answers in a file. A line that can't be read is as good as missing, and costs no other."""
        body = await self._call(bytes, "GET", f"/files/{file_id}/content")
        answers: _Answers = {}
        for text in io.BytesIO(body):
            with suppress(ValueError):  # msgspec's are, and Unicode's
                line = _read_line(text)
                if line.response is not None:
                    response = Response(line.response.status_code, {}, bytes(line.response.body))
                    answers.setdefault(line.custom_id, response)
                elif line.error is not None:
                    answers.setdefault(line.custom_id, f"{line.error.code}: {line.error.message}")
            await give_turn()
        if body.strip() and not answers:
            what = f"{self._where}: not what GET /files/{file_id}/content should bring: {body[:200]!r}"
            raise ProviderError(ErrorKind.GARBLED, what)
        return answers

    # --- the records ---

    async def _record(self, batch: _Batch) -> None:
        def write() -> None:
            with atomic(batch.path, "wb") as file:
                file.write(msgspec.json.encode(_Record(self._config.url, batch.id, batch.requests)))

        await asyncio.to_thread(write)

    async def _recall(self) -> dict[str, list[tuple[_Batch, str]]]:
        """Earlier runs' batches and custom ids, by the digest of what is asked for, the oldest first."""
        lines: dict[str, list[tuple[_Batch, str]]] = {}
        for batch in await asyncio.to_thread(lambda: list(self._recorded())):
            if batch.id is None:  # the run ended while it was being made; or another model or run is about to
                found = await self._patiently(partial(self._find, batch))
                if found is None:
                    continue
                batch.id = found.id
                await self._record(batch)
            for custom_id in batch.requests:
                lines.setdefault(custom_id.partition("-")[0], []).append((batch, custom_id))
            await give_turn()
        return lines

    def _recorded(self) -> Iterator[_Batch]:
        for path in sorted(self._records.glob("[0-9]*.json")):
            try:
                begun, record = int(path.stem), msgspec.json.decode(path.read_bytes(), type=_Record)
            except FileNotFoundError:
                continue  # another run has just done with it
            except ValueError as error:  # msgspec's are
                raise EnvironmentFault(f"{path} is no record of a batch: {error}; remove it, then run again") from error
            if begun < time_ns() - KEPT:
                path.unlink(missing_ok=True)
            elif record.url == self._config.url:
                yield _Batch(path, record.requests, record.batch)

    async def _find(self, batch: _Batch) -> "_State | None":
        """The batch at the server that has this one's name, if it was made and has not failed."""
        after, begun = "", int(batch.path.stem) / 1e9
        while True:
            page = await self._call(_decode_page, "GET", f"/batches?limit=100{after}")
            for state in page.data:
                if (state.metadata or {}).get("fastdistill") == batch.path.stem and state.status != "failed":
                    return state
            if not page.has_more or not page.data or page.data[-1].created_at < begun - CLOCKS_DIFFER:
                return None  # the newest come first
            after = f"&after={page.data[-1].id}"

    # --- the wire ---

    async def _patiently(self, work: Callable[[], Awaitable[T]], batch: _Batch | None = None) -> T:
        """What `work` brings, which is tried again for as long as a batch is worth it; then the whole run stops."""
        record = batch.path if batch else self._records
        delays = islice(self._delays(), self._config.max_retries)
        while True:
            try:
                return await work()
            except ProviderError as error:
                delay = next(delays, None)
                if delay is None or error.kind in _LASTS:
                    raise TeacherError(
                        f"{error}; what was submitted is on record in {record}: run again to go on with it,"
                        f" or remove {'it' if batch else 'a record'} to ask anew"
                    ) from error
                await self._wait(max(delay, error.retry_after or 0.0))

    def _delays(self) -> Iterator[float]:
        delay = self._options.poll_s
        while True:
            yield delay
            delay = min(1.5 * delay, SLOWEST * self._options.poll_s)

    async def _wait(self, seconds: float) -> None:
        """Sleeps; raises FatalError or TimeUp as soon as the run must not wait for anything."""
        await self._brake.pause(seconds)
        try:
            self._brake.check(0, 0.0)
        except TimeUp:
            raise
        except NotAsked:
            await asyncio.sleep(seconds)  # the run has enough: what is under way comes home all the same

    async def _call(self, decode: Callable[[bytes], T], method: str, path: str, *sent: Any) -> T:
        """What the server answers; `sent` are a body and its content type, as `_request` takes them."""
        response = await self._request(method, self._config.url + path, *sent)
        place = f"{method} {path.partition('?')[0]}"
        if not 200 <= response.status < 300:
            error = self._error(response, {})
            what = f"{error}{'; or lower `batch.size`' if response.status == 413 else ''} ({place})"
            raise ProviderError(error.kind, what, retry_after=error.retry_after)
        try:
            return decode(response.body)
        except ValueError as error:  # msgspec's are, and Unicode's
            raise ProviderError(ErrorKind.GARBLED, f"{self._where}: not what {place} should bring: {error}") from error


class _Record(Struct):
    url: str
    batch: str | None
    requests: list[str]


class _File(Struct):
    id: str


class _Problem(Struct):
    message: str = ""
    code: str | None = None


class _Problems(Struct):
    data: list[_Problem] | None = None


class _State(Struct):
    """A batch as the server has it."""

    id: str
    status: str
    created_at: int = 0
    input_file_id: str = ""
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: _Problems | None = None
    metadata: dict[str, Any] | None = None

    @property
    def problems(self) -> list[_Problem]:
        return (self.errors and self.errors.data) or []


class _Page(Struct):
    data: list[_State]
    has_more: bool = False


class _Reply(Struct):
    status_code: int
    body: msgspec.Raw


class _Line(Struct):
    custom_id: str
    response: _Reply | None = None
    error: _Problem | None = None


# The beginning of a form as RFC 7578 has it. JSON has no bare line ends, so the boundary is unique.
_HEAD = (
    '--fastdistill-{name}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    '--fastdistill-{name}\r\nContent-Disposition: form-data; name="file"; filename="{name}.jsonl"\r\n'
    "Content-Type: application/jsonl\r\n\r\n"
)

_decode_file = msgspec.json.Decoder(_File).decode
_decode_state = msgspec.json.Decoder(_State).decode
_decode_page = msgspec.json.Decoder(_Page).decode
_decode_line = msgspec.json.Decoder(_Line).decode


def _read_line(text: bytes) -> _Line:
    try:
        return _decode_line(text)
    except ValueError:  # msgspec's are, and Unicode's
        return _decode_line(with_characters(text))
