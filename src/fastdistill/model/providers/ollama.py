"""Ollama's native chat. Its /v1 is not used: num_ctx can't be set there, and prompts that are too long are cut.

Requests carry `truncate: false, shift: false` and a constant `num_ctx`: a prompt that does not fit is an error, and
the model is not loaded anew between two requests. There is no `n`: one request brings one completion.
"""

import os
import re
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct
from msgspec.json import Decoder
from pydantic import Field, model_validator

from fastdistill.core.turns import LARGE, beside
from fastdistill.core.types import Completion, LogprobBasis, Prompt
from fastdistill.model.provider import Capabilities, ErrorKind, ModelConfig, ProviderError, ServedConfig, check_wires
from fastdistill.model.transport import (
    Count,
    Fault,
    HttpProvider,
    Response,
    Token,
    Transport,
    Version,
    completion,
    error_kind,
    usage_of,
)

S = TypeVar("S", bound=Struct)

_SAME = ("num_ctx", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
_OPTIONS = {**{name: name for name in _SAME}, "max_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}
"""Decode parameters that travel in `options`, under Ollama's names."""

_FIXED = {"stream": False, "truncate": False, "shift": False}

_EXPLICIT = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent where the decode profile has none: a Modelfile's own would apply in silence."""

_DECODE_ONLY = {*_OPTIONS, "stop", "logprobs", "top_logprobs", "token_ids", "response_format", "options", "revision"}

_LOADS = 330.0
"""Seconds; Ollama itself gives a model 5 minutes to load (OLLAMA_LOAD_TIMEOUT)."""


class OllamaConfig(ServedConfig):
    """One model of an Ollama server or several; `base_url` may be `host:port`. The key is never dumped."""

    first_concurrency: ClassVar[int] = 4  # OLLAMA_NUM_PARALLEL is 1; what goes beyond waits in the server

    provider: Literal["ollama"] = "ollama"
    timeout: float = Field(240.0, gt=0, description="seconds for one request; by default OLLAMA_TIMEOUT, or 240")
    num_ctx: int = Field(4096, gt=0, description="tokens of context; another value makes the server load anew")
    think: bool | Literal["low", "medium", "high", "max"] = Field(
        False, description="let a thinking model think; what it thinks is kept apart from the answer"
    )
    keep_alive: str | int = Field("30m", description="how long the model stays loaded; -1: for good")

    @model_validator(mode="before")
    @classmethod
    def _timeout_from_environment(cls, fields: Any) -> Any:
        timeout = os.environ.get("OLLAMA_TIMEOUT")
        return {"timeout": timeout, **fields} if timeout and isinstance(fields, dict) else fields

    @classmethod
    def defaults(cls, provider: str) -> tuple[str, str]:
        return "OLLAMA_HOST", "http://localhost:11434"

    @classmethod
    def normal_url(cls, url: str) -> str:
        """A URL from what OLLAMA_HOST may hold: `host`, `host:port`, `:port`, or a URL; a server's 0.0.0.0 is us."""
        bare = "://" not in url
        url = f"http://{'127.0.0.1' if url.startswith(':') else ''}{url}" if bare else url
        parts = urlsplit(super().normal_url(url))
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname or "", parts.hostname or "")
        port = parts.port or (11434 if bare else None)
        path = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/api")
        return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}{path}"

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"num_ctx": self.num_ctx, "think": self.think}


class OllamaProvider(HttpProvider[OllamaConfig]):
    """Speaks /api/chat.

    `options` among a prompt's parameters win over the decode profile, but not over the draw's seed, and `num_ctx`
    stays what the config says. `format` wins over `response_format`. Other parameters go out as they are.
    """

    Config: ClassVar[type[ModelConfig]] = OllamaConfig
    _remedy = "start it with `ollama serve`, or correct `base_url`"
    _crowded = ": one model answers OLLAMA_NUM_PARALLEL (1) at a time"
    _expected = "what Ollama answers"
    _doubt = "; is `base_url` right?"

    def __init__(self, config: OllamaConfig, transport: Transport | None = None) -> None:
        super().__init__(config, transport)
        self._envelope = {"model": config.model, "keep_alive": config.keep_alive, **_FIXED}
        self._digest: str | None = None

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        """One completion, whatever `n`."""
        body = self._body(prompt, seed)
        response = await self._whole("/api/chat", body)
        read = partial(self._completion, response, body["options"]["num_ctx"])
        return [await beside(read) if len(response.body) > LARGE else read()]

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        """Looks the model up, and loads it. From then on completions carry its digest as their build."""
        num_ctx = self._config.num_ctx
        version = (await self._ask("/api/version", Version)).version
        tags = await self._models("/api/tags")
        show = await self._ask("/api/show", _Show, {"model": self._config.model})
        name = _tagged(self._config.model)
        self._digest = tags[name].digest if name in tags else None
        loading: dict[str, Any] = {**self._envelope, "messages": [], "options": {"num_ctx": num_ctx}}
        await self._whole("/api/chat", loading, timeout=max(_LOADS, self._config.timeout))
        loaded = (await self._models("/api/ps")).get(name)
        lengths = (value for name, value in show.model_info.items() if name.endswith(".context_length"))
        trained = next((value for value in lengths if isinstance(value, int)), None)
        return Capabilities(
            endpoint=self._config.url,
            server=f"ollama {version}",
            served_model=self._config.model,
            build=self._digest,
            models=tuple(tags),
            context_length=num_ctx if trained is None else min(num_ctx, trained),
            n=False,
            logprob_basis=LogprobBasis.UNKNOWN,
            max_top=20,
            has_token_ids=False,
            can_score_prompt=False,
            notes=tuple(self._notes(show, trained, loaded)),
        )

    # --- the request ---

    def _body(self, prompt: Prompt, seed: int | None) -> dict[str, Any]:
        check_wires(self._where, prompt)
        parameters = prompt.parameters
        options = {"num_ctx": self._config.num_ctx, **_EXPLICIT}
        options |= {wire: parameters[name] for name, wire in _OPTIONS.items() if parameters.get(name) is not None}
        if parameters.get("stop"):
            options["stop"] = parameters["stop"]
        num_ctx = options["num_ctx"]
        options |= parameters.get("options") or {}
        if options["num_ctx"] != num_ctx:
            message = f"ollama: options.num_ctx is {options['num_ctx']}, the model's is {num_ctx}; set `num_ctx` of the"
            message += " model instead, for each change makes the server load it anew"
            raise ProviderError(ErrorKind.UNSUPPORTED, message, parameter="num_ctx")
        if seed is not None:
            options["seed"] = seed
        body = self._envelope | {
            "model": prompt.model,
            "messages": prompt.messages,
            "think": self._config.think,  # left out it would be true for every model that can
            "options": options,
        }
        if (format_ := parameters.get("response_format")) is not None:
            body["format"] = format_
        if parameters.get("logprobs"):
            body |= {"logprobs": True, "top_logprobs": parameters.get("top_logprobs", 0)}
        return body | {name: value for name, value in parameters.items() if name not in _DECODE_ONLY}

    async def _models(self, path: str) -> "dict[str, _Listed]":
        return {_tagged(model.name): model for model in (await self._ask(path, _List)).models}

    async def _ask(self, path: str, type_: type[S], body: dict[str, Any] | None = None) -> S:
        return self._decode(await self._whole(path, body), Decoder(type_).decode)

    async def _whole(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Response:
        """The answer, if its status is 200."""
        method, sent = ("GET", None) if body is None else ("POST", msgspec.json.encode(body))
        response = await self._request(method, self._config.url + path, sent, timeout=timeout)
        if response.status == 200:
            return response
        error = self._fault(response)
        if error.kind is ErrorKind.NO_MODEL and body is not None:
            with suppress(ProviderError):
                installed = ", ".join(await self._models("/api/tags")) or "none"
                error = ProviderError(error.kind, f"{error}; installed: {installed}")
        raise error

    # --- the answer ---

    def _completion(self, response: Response, num_ctx: int) -> Completion:
        answer = self._decode(response, _decode_answer)
        if answer.error:
            raise self._fault(response)
        if not answer.done:
            raise self._garbled("it ends before `done`", response)
        usage = usage_of(answer.prompt_eval_count, answer.eval_count)
        if usage.prompt_tokens >= num_ctx:
            size = f"the prompt has {usage.prompt_tokens} tokens, num_ctx is {num_ctx}"
            raise self._failed(ErrorKind.TOO_LONG, 200, f"{size}: it may have been cut; raise `num_ctx`", response)
        return completion(
            answer.message.content or "",
            answer.message.thinking or None,
            answer.logprobs or None,
            finish=answer.done_reason or "stop",
            usage=usage,
            model=answer.model,
            build=self._digest,
            logprob_basis=LogprobBasis.UNKNOWN if answer.logprobs else None,
        )

    def _fault(self, response: Response) -> ProviderError:
        fault = Fault.read(response.body)
        status = 500 if response.status == 200 else response.status
        kind, message, parameter = error_kind(status), fault.message, None
        if kind is ErrorKind.NO_MODEL:
            pull = f"get it with `ollama pull {self._config.model}`"
            message += f"; {pull}" if "model" in message else "; correct `base_url`"
        elif status in (401, 403):
            message += "; set OLLAMA_API_KEY" if self._config.api_key is None else "; the key is refused"
        elif status in (400, 500) and fault.says_too_long:
            kind = ErrorKind.TOO_LONG
            message += f"; num_ctx is {self._config.num_ctx}: raise `num_ctx`, or shorten the prompt"
        elif status == 400 and (named := _refused(message)) is not None:
            kind, parameter = ErrorKind.UNSUPPORTED, named
            message += "; set `think: false`" if named == "think" else f"; change or remove {named}"
        return self._failed(kind, status, message, response, parameter)

    def _notes(self, show: "_Show", trained: int | None, loaded: "_Listed | None") -> list[str]:
        notes = []
        if trained is not None and self._config.num_ctx > trained:
            notes.append(f"num_ctx is {self._config.num_ctx}, but the model was made for {trained}")
        if self._config.think and show.capabilities and "thinking" not in show.capabilities:
            notes.append("`think` is set, but the model can't think")
        own = [" ".join(line.split()) for line in show.parameters.splitlines() if line.strip()]
        applied = [line for line in own if line.split(" ")[0] not in _OPTIONS.values()]
        if applied:
            notes.append(f"the Modelfile's own parameters apply: {', '.join(applied)}")
        if loaded is not None and loaded.size_vram < loaded.size:
            off_gpu = 100 - 100 * loaded.size_vram // loaded.size
            notes.append(f"{off_gpu} % of the model is not on the GPU but runs on the CPU")
        return notes


# --- the wire; Go leaves out what is zero ---


class _Listed(Struct):
    name: str
    digest: str | None = None
    size: int = 0  # bytes
    size_vram: int = 0  # of a model that is loaded


class _List(Struct):
    models: list[_Listed] = []


class _Show(Struct):
    parameters: str = ""
    model_info: dict[str, Any] = {}
    capabilities: list[str] = []


class _Message(Struct, frozen=True):
    content: str | None = ""  # Go leaves out what others write as null
    thinking: str | None = ""


class _Answer(Struct):
    model: str | None = None
    message: _Message = _Message()
    done: bool = False
    done_reason: str | None = ""
    prompt_eval_count: Count = 0
    eval_count: Count = 0
    logprobs: list[Token] | None = None
    error: Any = None


_decode_answer = Decoder(_Answer).decode


def _refused(message: str) -> str | None:
    """The parameter that a 400 is about: `"x" does not support thinking`, `option "top_k" must be of type integer`."""
    if re.search(r"\bthink(ing)?\b", message):
        return "think"
    option = re.search(r"option \"?(\w+)\"?|\b(top_logprobs|logprobs|format)\b", message)
    return next((name for name in option.groups() if name), None) if option else None


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
