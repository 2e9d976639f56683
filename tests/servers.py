"""Real listening servers that answer like OpenAI-compatible ones and like Ollama, as a script says.

Every answer is a function of its request, so runs repeat. Both count what they were asked and what they answered:

    with openai_server(faults={3: rate_limited("1"), "poison": status(500, times=None)}) as server:
        ...  # server.url, server.counters

As a process, `python -m tests.servers --help`: it prints its URL as the first line, and GET /stats tells the counters.
"""

import argparse
import asyncio
import hashlib
import json
import random
import socket
import ssl
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Call:
    """One chat request, as a server sees it. `number` counts chat requests from 1."""

    number: int
    model: str
    messages: Sequence[Mapping[str, str]]
    seed: int | None
    n: int
    max_tokens: int | None
    body: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """The last message's text."""
        return self.messages[-1]["content"]

    def digest(self, index: int) -> int:
        """A number that depends on the messages, the seed and the choice's index only."""
        text = json.dumps([self.messages, self.seed, index], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Reply:
    """A scripted answer. Tokens are its words."""

    text: str | None
    thinking: str | None = None
    finish: str = "stop"


Decide = Callable[[Call, str, Mapping[str, Any]], Sequence[float]]
"""The probabilities of the options of a question, which has a name."""

Script = Callable[[Call, int], str | Reply]
"""The answer to the choice of an index."""


def echo(call: Call, index: int) -> str:
    """The default script: differs by messages, seed and index, and by nothing else."""
    return f"answer {call.digest(index):016x} to {call.prompt}"


def choose(answers: Mapping[str, Sequence[str]]) -> Script:
    """One of the answers under the first key that the prompt contains; `echo` where there is none."""

    def script(call: Call, index: int) -> str:
        for key, texts in answers.items():
            if key in call.prompt:
                return texts[call.digest(index) % len(texts)]
        return echo(call, index)

    return script


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong, for the first `times` requests that match; None: for all of them.

    `reset` breaks the connection before an answer, `cut` in the middle of it; `hang` never answers; `body` answers
    with `status` and exactly this body.
    """

    action: Literal["body", "reset", "cut", "hang"] = "body"
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int | None = 1


def status(code: int, message: object = None, *, times: int | None = 1, **headers: str) -> Fault:
    """An error in OpenAI's shape, or `message` as the whole body if it is not a string."""
    body = (
        {"error": {"message": message or f"status {code}"}} if message is None or isinstance(message, str) else message
    )
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(status=code, body=json.dumps(body).encode(), headers=sent, times=times)


def rate_limited(retry_after: str | None = None, *, times: int | None = 1) -> Fault:
    return status(429, "slow down", times=times, **({} if retry_after is None else {"Retry_After": retry_after}))


def garbled(body: bytes = b'{"choices": [{"ind', *, code: int = 200, times: int | None = 1) -> Fault:
    """A whole answer that is not what the protocol says; truncated JSON by default."""
    return Fault(status=code, body=body, times=times)


def reset(*, times: int | None = 1) -> Fault:
    return Fault("reset", times=times)


def cut(*, times: int | None = 1) -> Fault:
    return Fault("cut", times=times)


def hang(*, times: int | None = 1) -> Fault:
    return Fault("hang", times=times)


Faults = Mapping[int | str, Fault] | Callable[[Call], Fault | None]
"""By the number of the request, by a text that the prompt contains, or by a function of the call."""


def mixed(rate: float, *, retry_after: str = "0.05", seed: int = 0) -> Callable[[Call], Fault | None]:
    """Faults of every kind that passes, at a rate in [0, 1]; the same for the n-th request of the same prompt."""
    kinds = [rate_limited(retry_after), status(500), status(503), reset(), cut(), garbled()]
    asked: Counter[str] = Counter()

    def fault(call: Call) -> Fault | None:
        asked[call.prompt] += 1
        dice = random.Random(f"{seed} {call.digest(0)} {asked[call.prompt]}")
        return dice.choice(kinds) if dice.random() < rate else None

    return fault


@dataclass(slots=True)
class Counters:
    requests: int = 0  # chat requests, faults included
    answered: int = 0  # chat requests answered 200 to a client that was still there
    choices: int = 0
    resent: int = 0  # choices of the same messages, seed and index that were answered more than once
    in_flight: int = 0
    peak: int = 0
    connections: int = 0
    paths: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)  # answered, by prompt
    bodies: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=1000))  # of the latest chat requests
    headers: deque[dict[str, str]] = field(default_factory=lambda: deque(maxlen=1000))
    seen: set[int] = field(default_factory=set)

    def totals(self) -> dict[str, Any]:
        hidden = {"bodies", "headers", "seen"}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in hidden}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both servers take."""

    script: Script = echo
    models: Sequence[str] = ("teacher",)
    latency: float | Callable[[Call], float] = 0.0  # seconds in a slot
    slots: int | None = None  # requests worked on at a time; the others queue
    faults: Faults = field(default_factory=dict)
    context: int = 4096  # tokens (words) of a prompt beyond which it is refused
    api_key: str | None = None
    port: int = 0
    tls: ssl.SSLContext | None = None  # speaks HTTPS with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """How a batch goes: it ends as `ends` once `seconds` have passed, with the first `answered` lines answered.

    `breaks` breaks the connection that makes it, before it is made or after.
    """

    seconds: float = 0.0
    held: Callable[[], object] = bool  # once they have passed, it goes on while this is true
    ends: Literal["completed", "failed", "expired", "cancelled"] = "completed"
    answered: int | None = None
    code: str = "invalid_request"  # of a failure
    breaks: Literal["before", "after"] | None = None
    unseen: int = 0  # looks at it that are answered 503
    spoils: Callable[[list[str]], list[str]] = list  # what becomes of the lines of the answers


@dataclass(frozen=True, kw_only=True)
class OpenAIOptions(Options):
    """The habits of OpenAI-compatible servers."""

    honours_n: bool | int = True  # False: silently one choice; a number: 400 beyond it, as llama.cpp
    usage_of: Literal["all", "one", "none"] = "all"
    logprobs: bool = True
    logprob_basis: Literal["raw", "post_temperature"] = "raw"
    ids: Literal["asked", "always", "never"] = "asked"  # as vLLM and SGLang, as llama.cpp, as OpenAI
    decides: "Decide | None" = None  # answers /v1/systemone; None: 404
    label_mass: float | Callable[[str], float] | None = 0.998  # of a type of question; None: untold, as transformers
    scores_prompts: bool = False  # /tokenize, and prompt_logprobs as vLLM, /generate as SGLang
    json_schema: bool = True
    thinks: Literal["reasoning_content", "reasoning", "inline"] = "reasoning_content"
    refuses: Sequence[str] = ()  # parameters answered with OpenAI's 400
    unknown_model: Literal["404", "400", "any"] = "404"
    lists_models: bool = True
    tells_slots: bool = False  # as llama.cpp
    batches: Mapping[int, Batch] = field(default_factory=dict)  # by number from 1
    largest_file: int = 2**30  # bytes; a larger one is answered 413
    paths: Mapping[str, Any] = field(default_factory=dict)  # further GET paths and their text or JSON
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of every answer


@dataclass(frozen=True, kw_only=True)
class OllamaOptions(Options):
    """The habits of Ollama."""

    digest: str = "sha256:5e1f"
    capabilities: Sequence[str] = ("completion",)
    parameters: str = ""  # of the Modelfile
    size_vram: int = 1000  # of 1000
    version: str = "0.33.0"


class Server(ABC):
    """A running server: its address and what it has counted."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.counters = Counters()
        self.url = ""
        self.closing = asyncio.Event()
        self._slots: asyncio.Semaphore | None = None
        self._used: Counter[int | str] = Counter()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._count_and_check], client_max_size=64 * 2**20)
        app.router.add_get("/stats", self._stats)
        self._slots = asyncio.Semaphore(self.options.slots) if self.options.slots else None
        self.add_routes(app.router)
        return app

    @abstractmethod
    def add_routes(self, router: web.UrlDispatcher) -> None: ...

    @abstractmethod
    def error(self, http: int, message: str, /) -> web.Response:
        """An error in the server's own shape."""

    async def answer(self, request: web.Request, call: Call, respond: Callable[[], web.Response]) -> web.StreamResponse:
        """Counts, faults, queues and works on a chat request, then lets `respond` write the answer."""
        counters = self.counters
        counters.requests += 1
        counters.bodies.append(dict(call.body))
        counters.headers.append(dict(request.headers))
        with self._in_flight():
            fault = self._fault(call)
            if fault is not None and fault.action != "cut":
                return await self._go_wrong(request, fault)
            async with self._slot():
                await asyncio.sleep(self._latency(call))
            response = respond()
            if fault is not None:
                return await self._cut(request, response)
            if response.status == 200 and request.transport is not None and not request.transport.is_closing():
                self._count_answer(call)
            return response

    def tokens(self, reply: Reply, limit: int | None) -> tuple[list[str], str]:
        """The tokens of an answer, cut at `limit`, and why it ends."""
        words = (reply.text or "").split(" ") if reply.text else []
        if limit is not None and 0 <= limit < len(words):
            return words[:limit], "length"
        return words, reply.finish

    def reply(self, call: Call, index: int) -> Reply:
        reply = self.options.script(call, index)
        return Reply(reply) if isinstance(reply, str) else reply

    def prompt_tokens(self, call: Call) -> int:
        return sum(len(message["content"].split()) for message in call.messages)

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        self.counters.in_flight += 1
        self.counters.peak = max(self.counters.peak, self.counters.in_flight)
        try:
            yield
        finally:
            self.counters.in_flight -= 1

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._slots is None:
            yield
        else:
            async with self._slots:
                yield

    def _latency(self, call: Call) -> float:
        latency = self.options.latency
        return latency(call) if callable(latency) else latency

    def _fault(self, call: Call) -> Fault | None:
        faults = self.options.faults
        if callable(faults):
            return faults(call)
        for key, fault in faults.items():
            matches = call.number == key if isinstance(key, int) else key in call.prompt
            if matches and (fault.times is None or self._used[key] < fault.times):
                self._used[key] += 1
                return fault
        return None

    async def _go_wrong(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        if fault.action == "hang":
            await self.closing.wait()
        if fault.action in ("hang", "reset"):
            _abort(request)
        headers = {"Content-Type": "application/json", **fault.headers}
        return web.Response(status=fault.status, body=fault.body, headers=headers)

    async def _cut(self, request: web.Request, whole: web.Response) -> web.StreamResponse:
        body = whole.body if isinstance(whole.body, bytes) else b""
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        _abort(request)
        return response

    def _count_answer(self, call: Call) -> None:
        counters = self.counters
        counters.answered += 1
        counters.prompts[call.prompt] += 1
        for index in range(call.n):
            counters.choices += 1
            key = call.digest(index)
            if call.seed is not None:
                counters.resent += key in counters.seen
                counters.seen.add(key)

    async def _stats(self, request: web.Request) -> web.Response:
        return web.json_response(self.counters.totals())

    @web.middleware
    async def _count_and_check(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        self.counters.paths[request.path] += 1
        key = self.options.api_key
        if key is not None and request.headers.get("Authorization") != f"Bearer {key}":
            return self.error(401, "Invalid API key")
        response: web.StreamResponse = await handler(request)
        return response


class OpenAIServer(Server):
    options: OpenAIOptions

    def __init__(self, options: OpenAIOptions) -> None:
        super().__init__(options)
        self.files: dict[str, bytes] = {}
        self.words: dict[int, str] = {}  # by token id
        self.batches: list[dict[str, Any]] = []
        self.asked_for_batches = 0  # those that were not made among them

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/v1/chat/completions", self._chat)
        if self.options.decides:
            router.add_post("/v1/systemone", self._systemone)
        if self.options.scores_prompts:
            router.add_post("/tokenize", self._tokenize)
            router.add_post("/v1/completions", self._complete)
            router.add_post("/generate", self._generate)
        router.add_post("/v1/files", self._upload)
        router.add_get("/v1/files/{id}/content", self._content)
        router.add_post("/v1/batches", self._create_batch)
        router.add_get("/v1/batches", self._list_batches)
        router.add_get("/v1/batches/{id}", self._batch)
        router.add_get("/v1/models", self._models)
        if self.options.tells_slots:
            router.add_get("/props", _constant({"total_slots": self.options.slots}))
        for path, value in self.options.paths.items():
            router.add_get(path, _constant(value))

    def error(self, http: int, message: str, /, **more: Any) -> web.Response:
        return web.json_response({"error": {"message": message, "type": "error", "code": http, **more}}, status=http)

    async def _models(self, request: web.Request) -> web.Response:
        if not self.options.lists_models:
            return web.Response(status=500, text="Internal Server Error")
        same = {"object": "model", "owned_by": "llamacpp" if self.options.tells_slots else "vllm"}
        data = [{"id": name, "max_model_len": self.options.context, **same} for name in self.options.models]
        return web.json_response({"object": "list", "data": data})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        call = self._call(json.loads(await request.read()))
        return await self.answer(request, call, lambda: self._respond(call))

    def _call(self, body: Mapping[str, Any]) -> Call:
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        number = self.counters.requests + 1
        n = 1 if self.options.honours_n is False else body.get("n", 1)
        return Call(number, body["model"], body["messages"], body.get("seed"), n, limit, body)

    # vLLM's generate/structured_decisions, whose answers transformers serve has too

    async def _systemone(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        messages = [{"role": "user", "content": body["state"]}]
        call = Call(self.counters.requests + 1, body["model"], messages, None, 1, None, body)
        return await self.answer(request, call, lambda: self._decide(call))

    def _decide(self, call: Call) -> web.Response:
        assert self.options.decides is not None
        answers, diagnostics = {}, {}
        for name, question in call.body["questions"].items():
            kind, criteria = question["type"], question.get("criteria")
            shares = list(self.options.decides(call, name, question))
            if kind == "noul":
                answers[name] = {"type": kind, "noul": shares[0]}
            elif kind == "score":
                assert len(shares) == len(criteria) >= 2
                found = {"score": sum(at * share for at, share in enumerate(shares)), "confidence": max(shares)}
                by_level = {str(at): share for at, share in enumerate(shares)}
                legend = {str(at): level for at, level in enumerate(criteria)}
                answers[name] = {"type": kind, **found, "legend": legend, "probabilities": by_level}
            else:
                return self.error(400, "'type' must be one of: choice, score, noul")
            mass = self.options.label_mass
            diagnostics[name] = {"label_mass": mass(kind) if callable(mass) else mass, "argmax_is_label": True}
        usage = {"input_tokens": self.prompt_tokens(call), "output_tokens": 0}
        told = {} if self.options.label_mass is None else {"diagnostics": diagnostics}
        return web.json_response({"model": call.model, "answers": answers, "usage": usage, **told})

    # vLLM's serve/tokenize and the prompt_logprobs of its completions; a token is a word, its id is `token_id`

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        text = body.get("prompt")
        if text is None:
            text = "".join(f"<{m['role']}> {m['content']} " for m in body["messages"]) + "<assistant>"
        tokens = [self.token_id(word) for word in text.split(" ")]
        return web.json_response({"count": len(tokens), "max_model_len": self.options.context, "tokens": tokens})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        messages = [{"role": "user", "content": str(body["prompt"])}]
        call = Call(self.counters.requests + 1, body["model"], messages, None, 1, body["max_tokens"], body)
        return await self.answer(request, call, lambda: self._score(call))

    def _score(self, call: Call) -> web.Response:
        ids = call.body["prompt"]
        if len(ids) + call.body["max_tokens"] > self.options.context:
            return self.error(400, f"This model's maximum context length is {self.options.context} tokens")
        rows = [
            {str(at): {"logprob": -at / 1000, "rank": 9, "decoded_token": self.words.get(at, f"#{at}")}} for at in ids
        ]
        for row in rows:
            for value, at, text in self._alternatives(call.body["prompt_logprobs"]):
                row[str(at)] = {"logprob": value, "rank": 1, "decoded_token": text}
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": [None, *rows[1:]]}
        return web.json_response({"model": call.model, "choices": [choice]})

    # SGLang's own /generate: entries are [logprob, id, text], and the first one has no log-probability

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        messages = [{"role": "user", "content": str(body["input_ids"])}]
        call = Call(self.counters.requests + 1, "", messages, None, 1, body["sampling_params"]["max_new_tokens"], body)
        return await self.answer(request, call, lambda: self._generated(call))

    def _generated(self, call: Call) -> web.Response:
        body, ids = call.body, call.body["input_ids"]
        if len(ids) + (call.max_tokens or 0) > self.options.context:
            return self.error(
                400,
                f"Requested token count exceeds the model's maximum context length of {self.options.context} tokens",
            )
        heat = body["sampling_params"]["temperature"] if self.options.logprob_basis == "post_temperature" else 1
        shown = ids[body["logprob_start_len"] :]
        scored = [[-at / 1000 / heat, at, self.words.get(at, f"#{at}")] for at in shown]
        tops = [self._alternatives(body["top_logprobs_num"]) for _ in shown]
        meta: dict[str, Any] = {
            "prompt_tokens": len(ids),
            "input_token_logprobs": [[None, *scored[0][1:]], *scored[1:]],
        }
        if body["top_logprobs_num"]:
            meta["input_top_logprobs"] = [None, *tops[1:]]
        return web.json_response({"text": "x", "meta_info": meta | {"output_token_logprobs": [[-0.5, 1, "x"]]}})

    def _alternatives(self, k: int) -> list[list[Any]]:
        return [[-0.0001 * (at + 1), self.token_id(f"t{at}"), f"t{at}"] for at in range(k)]

    def token_id(self, word: str) -> int:
        number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big")
        self.words[number] = word
        return number

    # https://platform.openai.com/docs/api-reference/batch

    async def _upload(self, request: web.Request) -> web.Response:
        if (request.content_length or 0) > self.options.largest_file:
            return self.error(413, "Request Entity Too Large")
        form = await request.post()
        sent = form["file"]
        assert isinstance(sent, web.FileField) and form["purpose"] == "batch"
        return web.json_response({"id": self._keep(sent.file.read()), "object": "file", "purpose": "batch"})

    async def _content(self, request: web.Request) -> web.Response:
        return web.Response(body=self.files[request.match_info["id"]])

    async def _create_batch(self, request: web.Request) -> web.Response:
        self.asked_for_batches += 1
        script = self.options.batches.get(self.asked_for_batches, Batch())
        if script.breaks == "before":
            _abort(request)
            return self.error(503, "nobody reads this")
        asked = json.loads(await request.read())
        batch = {
            "id": f"batch_{len(self.batches) + 1}",
            "status": "in_progress",
            "created_at": int(time.time()),
            **asked,
        }
        self.batches.append(batch)
        lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
        asyncio.get_running_loop().call_later(script.seconds, self._end_batch, batch, script, lines)
        if script.breaks == "after":
            _abort(request)
        return web.json_response(batch)

    async def _list_batches(self, request: web.Request) -> web.Response:
        newest_first = self.batches[::-1]
        after = [at + 1 for at, batch in enumerate(newest_first) if batch["id"] == request.query.get("after")]
        rest = newest_first[after[0] if after else 0 :]
        page = rest[:2]  # small, so that there are several
        return web.json_response({"object": "list", "data": page, "has_more": len(rest) > len(page)})

    async def _batch(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        number = next((at for at, batch in enumerate(self.batches, 1) if batch["id"] == name), None)
        if number is None:
            return self.error(404, f"No batch found with id '{name}'.")
        if self.counters.paths[request.path] <= self.options.batches.get(number, Batch()).unseen:
            return self.error(503, "try again")
        return web.json_response(self.batches[number - 1])

    def _end_batch(self, batch: dict[str, Any], script: Batch, lines: Sequence[Mapping[str, Any]]) -> None:
        if script.held():
            asyncio.get_running_loop().call_later(0.01, self._end_batch, batch, script, lines)
            return
        if script.ends == "failed":
            problems = {"data": [{"code": script.code, "message": f"scripted: {script.code}", "line": 1}]}
            batch.update(status="failed", errors=problems)
            return
        output: list[str] = []
        errors: list[str] = []
        for at, line in enumerate(lines):
            answered = script.answered is None or at < script.answered
            response = self._respond_to_line(line["body"]) if answered else None
            error = None if answered else {"code": f"batch_{script.ends}", "message": "not executed"}
            result = json.dumps({"custom_id": line["custom_id"], "response": response, "error": error})
            (output if response is not None and response["status_code"] == 200 else errors).append(result)
        batch.update(
            status=script.ends,
            output_file_id=self._keep("\n".join(script.spoils(output)).encode()) if output else None,
            error_file_id=self._keep("\n".join(errors).encode()) if errors else None,
        )

    def _respond_to_line(self, body: Mapping[str, Any]) -> dict[str, Any]:
        call = self._call(body)
        self.counters.requests += 1
        self.counters.bodies.append(dict(body))
        if fault := self._fault(call):
            return {"status_code": fault.status, "body": json.loads(fault.body)}
        response = self._respond(call)
        if response.status == 200:
            self._count_answer(call)
        return {"status_code": response.status, "body": json.loads(response.text or "")}

    def _keep(self, content: bytes) -> str:
        self.files[f"file-{len(self.files) + 1}"] = content
        return f"file-{len(self.files)}"

    def _respond(self, call: Call) -> web.Response:
        options = self.options
        for name in options.refuses:
            if name in call.body:
                remedy = "Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return self.error(
                    400,
                    f"Unsupported parameter: '{name}' is not supported with this model. {remedy}",
                    param=name,
                    code="unsupported_parameter",
                )
        if call.model not in options.models and options.unknown_model != "any":
            message = f"The model `{call.model}` does not exist."
            return self.error(int(options.unknown_model), message, type="NotFoundError", param="model")
        if not isinstance(options.honours_n, bool) and call.n > options.honours_n:
            return self.error(400, "n_cmpl cannot be greater than the number of slots, please increase -np")
        prompt_tokens = self.prompt_tokens(call)
        if prompt_tokens + (call.max_tokens or 0) > options.context:
            return self.error(
                400,
                f"request ({prompt_tokens} tokens) exceeds the available context size ({options.context} tokens),"
                " try increasing it",
                type="exceed_context_size_error",
                n_prompt_tokens=prompt_tokens,
                n_ctx=options.context,
            )
        choices, written = [], []
        for index in range(call.n):
            reply = self.reply(call, index)
            if options.json_schema and (call.body.get("response_format") or {}).get("type") == "json_schema":
                reply = replace(reply, text='{ "colour": "red" }')
            tokens, finish = self.tokens(reply, call.max_tokens)
            choices.append(self._choice(call, index, reply, tokens, finish))
            written.append(len(tokens) + len((reply.thinking or "").split()))
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": sum(written) if options.usage_of == "all" else written[0],
        }
        answer = {"id": f"c{call.number}", "model": call.model, "choices": choices, "usage": usage, **options.extra}
        if options.usage_of == "none":
            del answer["usage"]
        return web.json_response(answer)

    def _choice(self, call: Call, index: int, reply: Reply, tokens: list[str], finish: str) -> dict[str, Any]:
        content = None if reply.text is None else " ".join(tokens)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reply.thinking is not None and self.options.thinks == "inline":
            message["content"] = f"<think>{reply.thinking}</think>\n\n{content}"
        elif reply.thinking is not None:
            message[self.options.thinks] = reply.thinking
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": finish, "logprobs": None}
        if call.body.get("logprobs") and self.options.logprobs:
            scored = _logprobs(tokens, call.body.get("top_logprobs", 0))
            heat = call.body.get("temperature", 1) if self.options.logprob_basis == "post_temperature" else 1
            for entry in (entry for token in scored for entry in (token, *token["top_logprobs"])):
                entry["logprob"] /= heat or 1
                number = self.token_id(entry["token"])
                if self.options.ids == "always":
                    entry["id"] = number
                elif self.options.ids == "asked" and call.body.get("return_tokens_as_token_ids"):
                    spelt = f"token_id:{number}"
                    entry["bytes"] = list((entry["token"] if "top_logprobs" in entry else spelt).encode())
                    entry["token"] = spelt
            choice["logprobs"] = {"content": scored}
        if call.body.get("return_token_ids") and self.options.ids == "asked":
            choice["response_token_ids"] = [self.token_id(token) for token in tokens]
        return choice


class OllamaServer(Server):
    options: OllamaOptions

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/api/chat", self._chat)
        router.add_post("/api/show", self._show)
        router.add_get("/api/tags", self._tags)
        router.add_get("/api/ps", self._ps)
        router.add_get("/api/version", _constant({"version": self.options.version}))

    def error(self, http: int, message: str, /) -> web.Response:
        return web.json_response({"error": message}, status=http)

    async def _tags(self, request: web.Request) -> web.Response:
        models = [{"name": _tagged(name), "digest": self.options.digest, "size": 1000} for name in self.options.models]
        return web.json_response({"models": models})

    async def _show(self, request: web.Request) -> web.Response:
        name = json.loads(await request.read())["model"]
        if not self._has(name):
            return self.error(404, f"model '{name}' not found")
        return web.json_response(
            {
                "parameters": self.options.parameters,
                "template": "{{ .Prompt }}",
                "model_info": {"general.architecture": "qwen3", "qwen3.context_length": self.options.context},
                "capabilities": list(self.options.capabilities),
            }
        )

    async def _ps(self, request: web.Request) -> web.Response:
        loaded = {"size": 1000, "size_vram": self.options.size_vram, "context_length": self.options.context}
        return web.json_response({"models": [{"name": _tagged(name), **loaded} for name in self.options.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        if not body.get("messages"):
            return self._loaded(body)
        options = body.get("options") or {}
        number = self.counters.requests + 1
        call = Call(number, body["model"], body["messages"], options.get("seed"), 1, options.get("num_predict"), body)
        return await self.answer(request, call, lambda: self._respond(call))

    def _loaded(self, body: Mapping[str, Any]) -> web.Response:
        if not self._has(body["model"]):
            return self.error(404, f"model '{body['model']}' not found")
        message = {"role": "assistant", "content": ""}
        return web.json_response({"model": body["model"], "message": message, "done": True, "done_reason": "load"})

    def _respond(self, call: Call) -> web.Response:
        body, options = call.body, call.body.get("options") or {}
        if not self._has(call.model):
            return self.error(404, f"model '{call.model}' not found")
        thinks = "thinking" in self.options.capabilities
        if not thinks and body.get("think"):
            return self.error(400, f'"{call.model}" does not support thinking')
        context = min(options.get("num_ctx", 4096), self.options.context)
        prompt_tokens = self.prompt_tokens(call)
        if prompt_tokens >= context:
            if body.get("truncate", True) is False:
                over = prompt_tokens - context
                return self.error(400, f"prompt too long; exceeded max context length by {over} tokens")
            prompt_tokens = context // 2
        reply = self.reply(call, 0)
        if body.get("format"):
            reply = replace(reply, text='{ "colour": "red" }')
        tokens, finish = self.tokens(reply, call.max_tokens)
        thinking = reply.thinking if thinks and body.get("think", True) else None
        head: dict[str, Any] = {"model": call.model, "created_at": "2026-01-01T00:00:00Z"}
        counts = {
            "prompt_eval_count": prompt_tokens,
            "eval_count": len(tokens),
            "load_duration": 1000,
            "total_duration": 2000,
        }
        last = {"done": True, "done_reason": finish, **{name: count for name, count in counts.items() if count}}
        if body.get("logprobs"):
            last["logprobs"] = _logprobs(tokens, body.get("top_logprobs", 0))
        assert body.get("stream") is False
        thought = {} if thinking is None else {"thinking": thinking}
        message = {"role": "assistant", "content": " ".join(tokens), **thought}
        return web.json_response({**head, "message": message, **last})

    def _has(self, model: str) -> bool:
        return _tagged(model) in map(_tagged, self.options.models)


NOWHERE = "http://127.0.0.1:9/v1"
"""Where nobody listens."""


def free_port() -> int:
    """For a server that goes away and comes back: below the ports that a system hands out, lest another is given it."""
    while True:
        port = random.SystemRandom().randrange(16_384, 32_768)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


S = TypeVar("S", bound=Server)


@contextmanager
def openai_server(script: Script = echo, **options: Any) -> Iterator[OpenAIServer]:
    """An OpenAI-compatible server while the block lasts; `options` are `OpenAIOptions`. `url` ends in /v1."""
    with _running(OpenAIServer(OpenAIOptions(script=script, **options)), "/v1") as server:
        yield server


@contextmanager
def ollama_server(script: Script = echo, **options: Any) -> Iterator[OllamaServer]:
    """An Ollama server while the block lasts; `options` are `OllamaOptions`."""
    with _running(OllamaServer(OllamaOptions(script=script, **options)), "") as server:
        yield server


@contextmanager
def _running(server: S, suffix: str) -> Iterator[S]:
    started, loops = threading.Event(), []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        async with _listening(server, suffix):
            started.set()
            await server.closing.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    while not started.wait(0.1):
        assert thread.is_alive(), "the server did not start"
    try:
        yield server
    finally:
        loops[0].call_soon_threadsafe(server.closing.set)
        thread.join()


@asynccontextmanager
async def _listening(server: Server, suffix: str) -> AsyncIterator[None]:
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1, keepalive_timeout=3600)
    await runner.setup()
    port, tls = server.options.port, server.options.tls
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls, backlog=4096, reuse_address=True).start()
    server.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{runner.addresses[0][1]}{suffix}"
    try:
        yield
    finally:
        await runner.cleanup()


def _abort(request: web.Request) -> None:
    """Breaks the connection with a TCP reset."""
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()


def _constant(value: object) -> Callable[[web.Request], Any]:
    if callable(value):
        return value

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=value) if isinstance(value, str) else web.json_response(value)

    return handler


def _logprobs(tokens: Sequence[str], top: int) -> list[dict[str, Any]]:
    def entry(token: str, logprob: float, **more: Any) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, **more}

    return [entry(token, -0.5, top_logprobs=[entry(f"t{at}", -1.0 - at) for at in range(top)]) for token in tokens]


def _tagged(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


async def _main(server: Server, suffix: str) -> None:
    async with _listening(server, suffix):
        print(server.url, flush=True)
        await server.closing.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted teacher; prints its URL and serves until it is ended.")
    parser.add_argument("--kind", choices=["openai", "ollama"], default="openai")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", dest="models", help="a served model; may be repeated")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds in a slot")
    parser.add_argument("--slots", type=int, help="requests worked on at a time")
    parser.add_argument("--context", type=int, default=4096, help="words of a prompt beyond which it is refused")
    parser.add_argument("--api-key")
    parser.add_argument("--fault-rate", type=float, default=0.0, help="share of requests that go wrong, in [0, 1]")
    parser.add_argument("--answers", type=Path, help='a JSON file: {"part of a prompt": ["answer", ...]}')
    arguments = parser.parse_args()
    options: dict[str, Any] = {
        "script": choose(json.loads(arguments.answers.read_text())) if arguments.answers else echo,
        "models": arguments.models or ["teacher"],
        "latency": arguments.latency,
        "slots": arguments.slots,
        "context": arguments.context,
        "api_key": arguments.api_key,
        "faults": mixed(arguments.fault_rate),
        "port": arguments.port,
    }
    if arguments.kind == "openai":
        asyncio.run(_main(OpenAIServer(OpenAIOptions(**options)), "/v1"))
    else:
        asyncio.run(_main(OllamaServer(OllamaOptions(**options)), ""))


if __name__ == "__main__":
    main()
