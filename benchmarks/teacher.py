"""A simulated teacher: an OpenAI-compatible server with slots, a queue, latencies and faults that repeat exactly.

It generates nothing: every answer, its duration and its fault follow from a hash of the prompt, the seed and the
choice, so that two clients are measured on the very same work. `python -m benchmarks.teacher --slots 64 --median 0.2`
prints the address; `serving(...)` does so from Python, in a process of its own.

How it behaves: requests beyond the slots wait in one FIFO queue, as in vLLM; n choices take n slots. A client that
goes away frees its slots. Requests for at most 4 tokens are probes: answered at once, and counted apart.
"""

import argparse
import asyncio
import json
import math
import re
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from statistics import NormalDist
from typing import Any, Self, cast

import msgspec
from msgspec import Struct

MODEL = "teacher"
TYPICAL_PROMPT = 1100  # characters; what `by_prompt_length` measures lengths against
BLOCK = 64  # characters of one block of the prefix cache: 16 tokens, as in vLLM
_NORMAL = NormalDist()
_QUESTION = re.compile(r"Which cities of (\w+) have more than (\d+) people")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the teacher behaves; each field is a flag of the command. Durations are seconds, shares 0..1."""

    port: int = 0  # 0: any free one
    slots: int = 64
    median: float = 0.0  # of one choice's latency; 0: all answers come at once
    sigma: float = 0.0  # of its lognormal distribution; 0: fixed
    by_prompt: float = 0.0  # correlation of the (log) latencies of one prompt's draws
    by_prompt_length: float = 0.0  # correlation of the (log) latency with the prompt's (log) length
    answer_tokens: int = 0  # median length of an answer; 0: as long as its SQL and a short remark
    length_by_latency: float = 1.0  # correlation of the answer's length with its latency
    pass_rate: float = 0.7  # share of right answers; a prompt's own rate lies evenly around it
    prefill: float = 0.0  # for one prompt token that is not in the prefix cache
    cache_tokens: int = 0  # size of the prefix cache; 0: there is none
    capacity: str = ""  # "10:0.5,20:2": at 10 s half the slots, at 20 s twice those of the start
    limit: int = 0  # hosted: with so many requests at work or waiting, the next gets a 429; 0: they queue
    rpm: float = 0.0  # hosted: requests a minute, in a bucket that holds 10 s of them; 0: no limit
    tpm: float = 0.0  # hosted: tokens a minute, prompt and answer
    retry_after: float = 1.0  # what a 429 says; 0: nothing
    fail_429: float = 0.0
    fail_500: float = 0.0
    fail_reset: float = 0.0  # the connection breaks after half of the latency
    fail_truncated: float = 0.0  # a body that is not whole JSON, after the whole latency
    fail_hang: float = 0.0  # nothing ever comes; no slot is held
    outage: str = ""  # "5:10": from 5 s on nobody listens for 10 s, and what is under way is lost
    until_eof: bool = False  # ends when its standard input does


class _Body(Struct):
    messages: list[dict[str, Any]]
    n: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None


class _Message(Struct):
    role: str
    content: str


class _Choice(Struct):
    index: int
    message: _Message
    finish_reason: str
    logprobs: Any = None


class _Cached(Struct):
    cached_tokens: int


class _Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _Cached


class _Completion(Struct):
    id: str
    choices: list[_Choice]
    usage: _Usage
    object: str = "chat.completion"
    created: int = 1_700_000_000
    model: str = MODEL
    system_fingerprint: str = "simulated"


@dataclass(frozen=True, slots=True)
class Draw:
    """All that chance decides about one choice."""

    key: int
    latency: float  # seconds in a slot, without prefill
    tokens: int  # length of the answer
    right: bool
    kind: float  # which wrong answer, 0..1
    fault: float  # 0..1, of the first attempt


class Chance:
    """Draws that repeat: the same options, prompt, seed and choice always give the same."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._spread = min(options.pass_rate, 1 - options.pass_rate)

    def prompt(self, content: str) -> bytes:
        return blake2b(content.encode(), digest_size=32).digest()

    def draw(self, content: str, prompt: bytes, seed: int | None, choice: int) -> Draw:
        """What comes of one choice.

        Args:
            content: the text of the last message.
            prompt: what `prompt(content)` gives.
        """
        options = self._options
        own = blake2b(prompt + struct.pack("<qq", -1 if seed is None else seed, choice), digest_size=48).digest()
        key, *bits = struct.unpack("<6Q", own)
        latency_u, length_u, right_u, kind, fault = (value / 2**64 for value in bits)
        shared_u, difficulty = (value / 2**64 for value in struct.unpack_from("<2Q", prompt))
        latency, deviate = options.median, 0.0
        if latency and options.sigma:
            deviate = _mixed(
                (options.by_prompt, _deviate(shared_u) if options.by_prompt else 0.0),
                (options.by_prompt_length, _length_deviate(content) if options.by_prompt_length else 0.0),
                own=_deviate(latency_u),
            )
            latency *= math.exp(options.sigma * deviate)
        tokens = 0
        if options.answer_tokens:
            mixed = _mixed((options.length_by_latency, deviate), own=_deviate(length_u))
            tokens = max(8, round(options.answer_tokens * math.exp(options.sigma * mixed)))
        right = right_u < options.pass_rate + self._spread * (2 * difficulty - 1)
        return Draw(key, latency, tokens, right, kind, fault)

    def latency(self, content: str, seed: int | None, choice: int = 0) -> float:
        """Seconds that one choice holds a slot, prefill apart."""
        return self.draw(content, self.prompt(content), seed, choice).latency

    def fault(self, draw: Draw, attempt: int) -> str:
        """What goes wrong with the attempt-th request for a choice: a name, or nothing."""
        at = (draw.fault + attempt * 0.6180339887498949) % 1  # the golden ratio spreads the attempts evenly
        for name in ("429", "500", "reset", "truncated", "hang"):
            share: float = getattr(self._options, f"fail_{name}")
            if at < share:
                return name
            at -= share
        return ""


def answer(content: str, draw: Draw) -> str:
    """The text of one choice: right, runs but wrong, does not run, or no SQL at all."""
    asked = _QUESTION.search(content)
    country, people = asked.groups() if asked else ("Italy", "1000")
    where = f"country = '{country}' AND people > {people}"
    if draw.right:
        sql = f"SELECT name FROM city WHERE {where}"
    elif draw.kind < 0.5:
        sql = f"SELECT name FROM city WHERE country = '{country}' AND people > {int(people) // 2 + 1} LIMIT 1"
    elif draw.kind < 0.75:
        sql = f"SELECT nme FROM city WHERE {where}"
    elif draw.kind < 0.9:
        sql = f"SELECT name FROM city WHERE {where} AND (people"
    else:
        return "I can't tell that from the tables that you gave me."
    remark = f"This looks up the cities of {country} in the table city and compares the column people with {people}."
    missing = 4 * draw.tokens - len(sql) - len(remark)
    return f"```sql\n{sql};\n```\n{remark}{' It is what was asked.' * max(0, missing // 21)}"


@dataclass(slots=True)
class Counters:
    """What `/admin/stats` shows, reset by `/admin/reset`. Times are seconds."""

    requests: int = 0
    probes: int = 0
    answered: int = 0  # requests with a 200 that was sent
    choices: int = 0
    abandoned: int = 0  # the client went away first
    faults: Counter[str] = field(default_factory=Counter)
    resent_completed: int = 0  # choices that were answered before and were asked for again
    resent_after: list[float] = field(default_factory=list)  # when each of these had been answered
    peak_in_flight: int = 0
    peak_waiting: int = 0
    connections: int = 0
    nominal_s: float = 0.0  # what the sequences that were at work should have taken
    held_s: float = 0.0  # what they took: more, where the machine is busy
    first_request: float | None = None
    last_answer: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class _Request:
    """One request under way: `left` of its choices are not done."""

    __slots__ = ("body", "cached", "connection", "content", "draws", "fault", "gone", "left", "prefill", "timers")

    def __init__(self, connection: "_Connection", body: _Body, content: str, draws: list[Draw], fault: str) -> None:
        self.connection = connection
        self.body = body
        self.content = content
        self.draws = draws
        self.fault = fault
        self.left = len(draws)
        self.cached = 0
        self.prefill: float | None = None  # not known before it starts
        self.gone = False
        self.timers: dict[int, tuple[asyncio.TimerHandle, float]] = {}  # choice -> its timer, when it began


class Teacher:
    """The server's state: slots, queue, counters, and the history that faults and re-sent requests are told by."""

    def __init__(self, options: Options, loop: asyncio.AbstractEventLoop) -> None:
        self.options = options
        self.loop = loop
        self.slots = options.slots
        self.open: set[_Connection] = set()
        self.chance = Chance(options)
        self.counters = Counters()
        self.port = 0
        self._running = 0
        self._waiting: deque[tuple[_Request, int]] = deque()
        self._waiting_gone = 0
        self._in_flight = 0
        self._attempts: dict[int, int] = {}
        self._completed: dict[int, float] = {}  # when
        self._answers_at = array("d")
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._buckets = [_Bucket(rate / 60) for rate in (options.rpm, options.tpm)]
        self._capacity: list[tuple[float, float]] = []  # (since, slots), from the first request on
        self._server: asyncio.Server | None = None
        self._planned: list[asyncio.TimerHandle] = []

    async def listen(self) -> None:
        server = await self.loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port or self.options.port)
        self._server = server
        self.port = server.sockets[0].getsockname()[1]

    # --- requests ---

    def handle(self, connection: "_Connection", method: bytes, target: bytes, payload: bytes) -> None:
        path, _, query = target.decode().partition("?")
        if path.endswith("/chat/completions") and method == b"POST":
            self._chat(connection, payload)
        elif path.endswith("/models"):
            connection.send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 32768}]})
        elif path == "/version":
            connection.send(200, {"version": "simulated"})
        elif path == "/health":
            connection.send(200, {})
        elif path == "/metrics":
            connection.send(200, self._metrics(), content_type="text/plain; version=0.0.4")
        elif path == "/admin/stats":
            connection.send(200, self.stats())
        elif path == "/admin/reset":
            self._reset(everything="all" in query)
            connection.send(200, {})
        else:
            connection.send(404, {"error": {"message": f"{method.decode()} {path}: there is no such thing here"}})

    def _chat(self, connection: "_Connection", payload: bytes) -> None:
        try:
            body = msgspec.json.decode(payload, type=_Body)
            content = str(body.messages[-1]["content"])
        except (msgspec.DecodeError, IndexError, KeyError) as error:
            connection.send(400, {"error": {"message": str(error), "type": "BadRequestError"}})
            return
        n = body.n or 1
        prompt = self.chance.prompt(content)
        draws = [self.chance.draw(content, prompt, body.seed, choice) for choice in range(n)]
        probe = (body.max_tokens or body.max_completion_tokens or 5) <= 4
        counters = self.counters
        if probe:
            counters.probes += 1
            self._answer(_Request(connection, body, content, draws, ""), probe=True)
            return
        now = self.loop.time()
        if counters.first_request is None:
            counters.first_request = now
            self._capacity = [(now, self.slots)]
            self._plan(now)
        counters.requests += 1
        again = [at for draw in draws if (at := self._completed.get(draw.key)) is not None]
        counters.resent_completed += len(again)
        counters.resent_after += again
        refusal = self._refusal(body, content, n, now)
        fault = self._fault(draws[0])
        if refusal is not None or fault == "429":
            counters.faults["429 fault" if refusal is None else "429"] += 1
            wait = self.options.retry_after if refusal is None else refusal
            headers = f"Retry-After: {math.ceil(wait)}\r\n" if wait else ""
            connection.send(429, {"error": {"message": "rate limit", "type": "rate_limit_error"}}, headers=headers)
            return
        if fault:
            counters.faults[fault] += 1
        if fault == "500":
            connection.send(500, {"error": {"message": "simulated fault", "type": "InternalServerError"}})
            return
        request = _Request(connection, body, content, draws, fault)
        connection.request = request
        self._in_flight += 1
        counters.peak_in_flight = max(counters.peak_in_flight, self._in_flight)
        if fault == "hang":
            return
        for choice in range(n):
            if self._running < self.slots and not self._waiting:
                self._start(request, choice)
            else:
                self._waiting.append((request, choice))
        counters.peak_waiting = max(counters.peak_waiting, len(self._waiting) - self._waiting_gone)

    def _refusal(self, body: _Body, content: str, n: int, now: float) -> float | None:
        """Seconds to wait if the hosted limits turn a request away, else None."""
        if self.options.limit and self._in_flight >= self.options.limit:
            return self.options.retry_after
        if not (self.options.rpm or self.options.tpm):
            return None
        wanted = (1.0, len(content) / 4 + n * (self.options.answer_tokens or 64))
        waits = [bucket.wait(amount, now) for bucket, amount in zip(self._buckets, wanted, strict=True)]
        if max(waits) > 0:
            return max(waits)
        for bucket, amount in zip(self._buckets, wanted, strict=True):
            bucket.take(amount)
        return None

    def _fault(self, draw: Draw) -> str:
        attempt = self._attempts.get(draw.key, 0)
        self._attempts[draw.key] = attempt + 1
        return self.chance.fault(draw, attempt)

    # --- slots ---

    def _start(self, request: _Request, choice: int) -> None:
        if request.prefill is None:
            request.cached = self._cached(request) if self.options.cache_tokens else 0
            request.prefill = self.options.prefill * (_prompt_tokens(request) - request.cached)
        latency = request.draws[choice].latency + (request.prefill if choice == 0 else 0.0)
        if request.fault == "reset":
            latency /= 2
        self.counters.nominal_s += latency
        self._running += 1
        if latency <= 0:
            self._finish(request, choice, None)
        else:
            timer = self.loop.call_later(latency, self._end, request, choice)
            request.timers[choice] = (timer, self.loop.time())

    def _end(self, request: _Request, choice: int) -> None:
        self._finish(request, choice, request.timers.pop(choice)[1])
        self._refill()

    def _finish(self, request: _Request, choice: int, begun: float | None) -> None:
        self._running -= 1
        if begun is not None:
            self.counters.held_s += self.loop.time() - begun
        request.left -= 1
        if request.left == 0:
            request.connection.request = None
            self._in_flight -= 1
            self._answer(request)

    def _refill(self) -> None:
        while self._waiting and self._running < self.slots:
            request, choice = self._waiting.popleft()
            if request.gone:
                self._waiting_gone -= 1
            else:
                self._start(request, choice)

    def abandoned(self, request: _Request) -> None:
        """The client has gone: its sequences stop, as in a real server."""
        request.gone = True
        self.counters.abandoned += 1
        self._in_flight -= 1
        now = self.loop.time()
        if request.fault != "hang":
            self._waiting_gone += request.left - len(request.timers)
        for choice, (timer, begun) in request.timers.items():
            timer.cancel()
            self._running -= 1
            self.counters.held_s += now - begun
            self.counters.nominal_s -= max(0.0, request.draws[choice].latency - (now - begun))
        request.timers.clear()
        self._refill()

    # --- answers ---

    def _answer(self, request: _Request, *, probe: bool = False) -> None:
        counters = self.counters
        if request.fault == "reset":
            request.connection.abort()
            return
        texts = [answer(request.content, draw) for draw in request.draws]
        prompt_tokens = _prompt_tokens(request)
        completion_tokens = len(texts) if probe else sum(max(1, len(text) // 4) for text in texts)
        completion = _Completion(
            f"chatcmpl-{request.draws[0].key:016x}",
            [_Choice(index, _Message("assistant", text), "stop") for index, text in enumerate(texts)],
            _Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, _Cached(request.cached)),
        )
        payload = msgspec.json.encode(completion)
        if request.fault == "truncated":
            request.connection.send_bytes(200, payload[: len(payload) // 2])
            return
        request.connection.send_bytes(200, payload)
        if probe:
            return
        counters.answered += 1
        counters.choices += len(texts)
        counters.prompt_tokens += prompt_tokens
        counters.cached_tokens += request.cached
        counters.completion_tokens += completion_tokens
        counters.last_answer = self.loop.time()
        self._answers_at.append(counters.last_answer)
        self._completed.update({draw.key: counters.last_answer for draw in request.draws})

    def _cached(self, request: _Request) -> int:
        """Tokens of the prompt that the prefix cache holds; takes the whole prompt into it."""
        text = "\x1e".join(str(message.get("content")) for message in request.body.messages)
        chain, hits, hitting = b"", 0, True
        for at in range(0, len(text) - BLOCK + 1, BLOCK):
            chain = blake2b(chain + text[at : at + BLOCK].encode(), digest_size=12).digest()
            if chain in self._blocks:
                self._blocks.move_to_end(chain)
                hits += hitting
            else:
                hitting = False
                self._blocks[chain] = None
        while len(self._blocks) * BLOCK // 4 > self.options.cache_tokens:
            self._blocks.popitem(last=False)
        return hits * BLOCK // 4

    # --- the plan ---

    def _plan(self, now: float) -> None:
        """Capacity changes and the outage, counted from the first request."""
        for entry in filter(None, self.options.capacity.split(",")):
            at, factor = map(float, entry.split(":"))
            slots = max(1, round(self.options.slots * factor))
            self._planned.append(self.loop.call_at(now + at, self._resize, slots))
        if self.options.outage:
            at, length = map(float, self.options.outage.split(":"))
            self._planned.append(self.loop.call_at(now + at, self._go_down, length))

    def _resize(self, slots: int) -> None:
        self.slots = slots
        self._capacity.append((self.loop.time(), slots))
        self._refill()

    def _go_down(self, length: float) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.open):
            connection.abort()
        self.counters.faults["outage"] += 1
        self._planned.append(self.loop.call_later(length, self._come_back))

    def _come_back(self) -> None:
        task = self.loop.create_task(self.listen())
        task.add_done_callback(lambda done: done.result())

    # --- admin ---

    def stats(self) -> dict[str, Any]:
        counters = self.counters
        window = capacity = 0.0
        if counters.first_request is not None and counters.last_answer is not None:
            window = counters.last_answer - counters.first_request
            ends = [since for since, _ in self._capacity[1:]] + [counters.last_answer]
            capacity = sum(
                max(0.0, min(end, counters.last_answer) - since) * slots
                for (since, slots), end in zip(self._capacity, ends, strict=True)
            )
        return {
            **{each.name: getattr(counters, each.name) for each in fields(counters)},
            "in_flight": self._in_flight,
            "running": self._running,
            "waiting": len(self._waiting) - self._waiting_gone,
            "open_connections": len(self.open),
            "slots": self.slots,
            "window_s": window,
            "mid_rate": self._mid_rate(),
            "utilisation": counters.nominal_s / capacity if capacity else 0.0,
            "utilisation_held": counters.held_s / capacity if capacity else 0.0,
        }

    def _mid_rate(self) -> float:
        """Answers a second between the first tenth of all and the last, 0 if there are too few to tell."""
        at, tenth = self._answers_at, len(self._answers_at) // 10
        passed = at[-1 - tenth] - at[tenth] if tenth else 0.0
        return (len(at) - 1 - 2 * tenth) / passed if passed else 0.0

    def _reset(self, *, everything: bool) -> None:
        for timer in self._planned:
            timer.cancel()
        self._planned.clear()
        self.counters = Counters()
        self._answers_at = array("d")
        self.slots = self.options.slots
        self._buckets = [_Bucket(rate / 60) for rate in (self.options.rpm, self.options.tpm)]
        if everything:
            self._attempts.clear()
            self._completed.clear()
            self._blocks.clear()

    def _metrics(self) -> bytes:
        label = f'{{model_name="{MODEL}"}}'
        figures = {
            "vllm:num_requests_running": self._running,
            "vllm:num_requests_waiting": len(self._waiting) - self._waiting_gone,
            "vllm:prompt_tokens_total": self.counters.prompt_tokens,
            "vllm:generation_tokens_total": self.counters.completion_tokens,
            "vllm:prefix_cache_queries_total": self.counters.prompt_tokens,
            "vllm:prefix_cache_hits_total": self.counters.cached_tokens,
        }
        lines = []
        for name, value in figures.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines.append(f"# TYPE {name} {kind}\n{name}{label} {float(value)}\n")
        return "".join(lines).encode()


class _Bucket:
    """A token bucket that holds ten seconds of its rate; a rate of 0 never refuses."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._level = 10 * rate
        self._at: float | None = None

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; 0 or less if it can be now."""
        if not self._rate:
            return 0.0
        self._level = min(10 * self._rate, self._level + self._rate * (now - (now if self._at is None else self._at)))
        self._at = now
        return (min(amount, 10 * self._rate) - self._level) / self._rate

    def take(self, amount: float) -> None:
        self._level -= amount


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; of the headers it reads Content-Length only."""

    __slots__ = ("_buffer", "_teacher", "_transport", "request")

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._buffer = b""
        self.request: _Request | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._teacher.open.add(self)
        self._teacher.counters.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._teacher.open.discard(self)
        if (request := self.request) is not None:
            self.request = None
            self._teacher.abandoned(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = buffer
            return
        length = 0
        at = buffer.find(b"ontent-", 0, end)
        while at >= 0:
            name, _, rest = buffer[at + 7 : at + 40].partition(b":")
            if name.lower() == b"length":
                length = int(rest.partition(b"\r")[0])
                break
            at = buffer.find(b"ontent-", at + 7, end)
        if len(buffer) < end + 4 + length:
            self._buffer = buffer
            return
        self._buffer = b""  # a client that sends before it has its answer is none that we measure
        method, target, _ = buffer[: buffer.index(b"\r")].split(b" ", 2)
        self._teacher.handle(self, method, target, buffer[end + 4 : end + 4 + length])

    def send(self, status: int, content: object, *, headers: str = "", content_type: str = "application/json") -> None:
        body = content if isinstance(content, bytes) else msgspec.json.encode(content)
        self.send_bytes(status, body, headers=headers, content_type=content_type)

    def send_bytes(
        self, status: int, body: bytes, *, headers: str = "", content_type: str = "application/json"
    ) -> None:
        if status == 200 and content_type == "application/json":
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        else:
            head = (
                f"HTTP/1.1 {status} Status\r\nContent-Type: {content_type}\r\n{headers}"
                f"Content-Length: {len(body)}\r\n\r\n"
            ).encode()
        self._transport.write(head + body)

    def abort(self) -> None:
        self._transport.abort()


class Served:
    """A teacher that runs in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.pid = process.pid
        self.url = url

    def stats(self) -> dict[str, Any]:
        return self._get("/admin/stats")

    def reset(self, *, everything: bool = True) -> None:
        """Sets the counters to 0; with `everything` it also forgets what it answered, and its prefix cache."""
        self._get("/admin/reset?all" if everything else "/admin/reset")

    def quiet(self) -> Self:
        """Waits until nothing is under way, as after a client was killed."""
        while self.stats()["in_flight"]:
            time.sleep(0.05)
        return self

    def _get(self, path: str) -> dict[str, Any]:
        for _ in range(300):
            try:
                with urllib.request.urlopen(self.url + path, timeout=30) as response:
                    content: dict[str, Any] = json.load(response)
                return content
            except OSError:
                time.sleep(0.1)  # nobody listens during an outage
        raise SystemExit(f"benchmarks: the teacher does not answer {path}")


@contextmanager
def serving(options: Options) -> Iterator[Served]:
    """Starts a teacher and stops it, by its pid. It also ends if this process dies."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(options).items() if name != "until_eof"]
    command = [sys.executable, "-m", "benchmarks.teacher", *flags, "--until-eof"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("benchmarks: the teacher did not start; see above")
        yield Served(process, url)
    finally:
        process.terminate()
        process.wait()


def _deviate(uniform: float) -> float:
    return _NORMAL.inv_cdf(min(max(uniform, 1e-9), 1 - 1e-9))


def _mixed(*weighted: tuple[float, float], own: float) -> float:
    """A standard normal deviate that has the given correlations with the given ones."""
    rest = 1.0
    total = 0.0
    for weight, deviate in weighted:
        total += weight * deviate
        rest -= weight * weight
    return total + math.sqrt(max(0.0, rest)) * own


def _length_deviate(content: str) -> float:
    return max(-3.0, min(3.0, math.log(max(1, len(content)) / TYPICAL_PROMPT) / 0.35))


def _prompt_tokens(request: _Request) -> int:
    return sum(len(str(message.get("content"))) for message in request.body.messages) // 4


async def _serve(options: Options) -> None:
    loop = asyncio.get_running_loop()
    teacher = Teacher(options, loop)
    await teacher.listen()
    print(f"http://127.0.0.1:{teacher.port}", flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    if options.until_eof:
        loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in fields(Options):
        flag = f"--{option.name.replace('_', '-')}"
        if isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(option.default), default=option.default)
    uvloop.run(_serve(Options(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
