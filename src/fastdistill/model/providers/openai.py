"""OpenAI's chat completions, as OpenAI, OpenRouter, vLLM, SGLang and most other servers speak them. Not streamed.

"200" does not mean that a field was honoured: `probe` finds out for n, logprobs and JSON schemas. What a server
refuses by name is left out from then on if it was neutral, and an error if it was not.
"""

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Completion, FinishReason, Prompt, TokenLogprob, Usage
from fastdistill.model.client import Brake
from fastdistill.model.provider import (
    Capabilities,
    ErrorKind,
    Load,
    ModelConfig,
    ProviderError,
    ServedConfig,
    each_url,
)
from fastdistill.model.transport import (
    AiohttpTransport,
    Fault,
    Response,
    Transport,
    error_kind,
    read_fault,
    refused_names,
    retry_after,
    says_too_long,
    split_thinking,
    without_secrets,
)

Kind = Literal["openai", "openrouter", "vllm", "sglang"]


@dataclass(frozen=True, slots=True)
class _Habits:
    """What differs between the servers behind one protocol."""

    base_url: str
    base_url_variable: str | None
    key_variable: str
    start: str  # what to do when nobody answers
    no_limit: int = 0  # top_k that means "no limit"
    explicit: tuple[tuple[str, Any], ...] = ()  # sent unless set: else the model's generation_config would apply
    version_path: str | None = None  # under the host, not under /v1


_HABITS: Mapping[Kind, _Habits] = {
    "openai": _Habits(
        "https://api.openai.com/v1", "OPENAI_BASE_URL", "OPENAI_API_KEY", "start the server, or correct `base_url`"
    ),
    "openrouter": _Habits(
        "https://openrouter.ai/api/v1", None, "OPENROUTER_API_KEY", "check the network, or correct `base_url`"
    ),
    # vLLM before 0.8 and SGLang refuse top_k 0; both take -1.
    "vllm": _Habits(
        "http://localhost:8000/v1",
        "VLLM_BASE_URL",
        "VLLM_API_KEY",
        "start it with `vllm serve {model}`, or correct `base_url`",
        no_limit=-1,
        explicit=(("repetition_penalty", 1.0),),
        version_path="/version",
    ),
    "sglang": _Habits(
        "http://localhost:30000/v1",
        "SGLANG_BASE_URL",
        "SGLANG_API_KEY",
        "start it with `python -m sglang.launch_server --model-path {model}`, or correct `base_url`",
        no_limit=-1,
        explicit=(("repetition_penalty", 1.0),),
        version_path="/get_server_info",
    ),
}

_OFFICIAL = "api.openai.com"
_OFFICIAL_LACKS = ("top_k", "min_p", "repetition_penalty")  # https://platform.openai.com/docs/api-reference/chat

_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
}

_FINISH = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
}

_METRIC = re.compile(rb"^([a-z_]+:[a-z_]+)(?:\{[^}]*\})? ([0-9.e+]+)\s*$", re.M)
_RUNNING = (b"vllm:num_requests_running", b"sglang:num_running_reqs", b"llamacpp:requests_processing")
_WAITING = (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs", b"llamacpp:requests_deferred")

_CONCERNS_ALL = {ErrorKind.AUTH, ErrorKind.NO_MODEL, ErrorKind.REFUSED, ErrorKind.RESET, ErrorKind.TIMEOUT}
"""Errors of a probe's request that say something about the endpoint, not about what the request tried."""


class BatchOptions(BaseModel):
    """How requests go through the Batch API: `openai_batch.py`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(10_000, gt=0, le=50_000, description="requests in one batch, at most")
    quiet_s: float = Field(1.0, gt=0, description="seconds without a new request, after which a batch goes out")
    completion_window: str = Field("24h", description="in which the server promises to be done")
    poll_s: float = Field(30.0, gt=0, description="seconds between two looks at a batch, growing tenfold")


class OpenAIConfig(ServedConfig):
    """One model at one endpoint or several; `base_url` gets `/v1` where it has no path. Keys are never dumped."""

    provider: Kind = "openai"
    api_key: SecretStr | None = Field(None, exclude=True, description="by default from the server's own variable")
    headers: dict[str, SecretStr] = Field({}, exclude=True, description="sent with every request")
    batch: BatchOptions | None = Field(
        None, description="true, or its options: use the Batch API; `max_concurrency` is then `size` by default"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_environment(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or (habits := _HABITS.get(fields.get("provider", "openai"))) is None:
            return fields
        url = fields.get("base_url") or os.environ.get(habits.base_url_variable or "") or habits.base_url
        key = fields.get("api_key") or os.environ.get(habits.key_variable) or None
        return {**fields, "base_url": url, "api_key": key}

    @field_validator("base_url")
    @classmethod
    def _normal(cls, given: str | tuple[str, ...], info: ValidationInfo) -> str | tuple[str, ...]:
        official = _HABITS[info.data.get("provider", "openai")].base_url
        return each_url(given, lambda url: _normal_url(url, official))

    @field_validator("batch", mode="before")
    @classmethod
    def _switched(cls, given: Any) -> Any:
        return ({} if given else None) if isinstance(given, bool) else given

    @model_validator(mode="after")
    def _fits_batches(self) -> Self:
        if self.batch is not None and self.hedge:
            raise ValueError("hedge: not with batch, where a second request would only cost twice; remove it")
        if self.batch is not None and not isinstance(self.base_url, str):
            raise ValueError("batch: takes one base_url, for a later run must find its batches at the same server")
        if self.batch is not None and self.max_concurrency is None:
            object.__setattr__(self, "max_concurrency", self.batch.size)
        return self

    @property
    def hedges(self) -> bool:
        # One's own: a second answer costs no money.
        return self.provider in ("vllm", "sglang") and self.batch is None


class OpenAIProvider:
    """Speaks to all four kinds of `OpenAIConfig.provider`, which differ in defaults and a few habits.

    `prompt.parameters` are sent under their own names, those it does not know as they are; the draw's seed wins
    over one among them.
    """

    kind: ClassVar[str] = "openai"
    Config: ClassVar[type[ModelConfig]] = OpenAIConfig

    def __init__(self, config: OpenAIConfig, transport: Transport | None = None) -> None:
        self._config = config
        self._habits = _HABITS[config.provider]
        self._transport = transport or AiohttpTransport()
        self._headers = {
            **({"Authorization": f"Bearer {config.api_key.get_secret_value()}"} if config.api_key else {}),
            **{name: value.get_secret_value() for name, value in config.headers.items()},
        }
        self._official = urlsplit(config.url).hostname == _OFFICIAL
        self._refused: dict[str, str] = dict.fromkeys(_OFFICIAL_LACKS if self._official else (), "not in the API")
        self._limit_name = "max_tokens"
        self._models: tuple[_Model, ...] | None = None
        self._listing = asyncio.Lock()

    @classmethod
    def in_run(cls, config: OpenAIConfig, root: Path, brake: Brake) -> "OpenAIProvider":
        """The provider that a run uses, which may keep something under the artifacts root for the next run."""
        if config.batch is None:
            return cls(config)
        from fastdistill.model.providers.openai_batch import BatchProvider  # which is made of this one

        return BatchProvider(config, config.batch, root / "batches", brake)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def load(self) -> Load | None:
        """From the Prometheus metrics of vLLM, SGLang or llama.cpp."""
        if self._official or self._config.provider == "openrouter":
            return None
        try:
            response = await self._request("GET", self._config.url.removesuffix("/v1") + "/metrics")
        except ProviderError:
            return None
        found = dict(_METRIC.findall(response.body)) if response.status == 200 else {}
        running = next((float(found[name]) for name in _RUNNING if name in found), None)
        waiting = next((float(found[name]) for name in _WAITING if name in found), None)
        return None if running is None or waiting is None else Load(int(running), int(waiting))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was learnt so far about parameters that the endpoint does not take."""
        renamed = () if self._limit_name == "max_tokens" else (f"max_tokens is sent as {self._limit_name}",)
        return tuple(f"{name} is left out: {why}" for name, why in self._refused.items()) + renamed

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        """Up to `n` completions of one request, in the order of their index.

        Raises:
            ProviderError: the request brought nothing usable.
        """
        while True:
            body = self._body(prompt, seed, n)
            try:
                return self._completions(await self._chat(body), body, n)
            except ProviderError as error:
                # Each turn takes one more parameter out of the body, so this ends.
                if self._learn(error, body):
                    continue
                if error.kind is ErrorKind.NO_MODEL:
                    raise await self._with_models(error) from error
                raise

    async def probe(self) -> Capabilities:
        """Lists the models, then asks for a token with n=2, for one with logprobs, and for four with a JSON schema.

        With `batch` it asks for none: that would take a batch.

        Raises:
            ProviderError: nobody there, wrong key, unknown model.
        """
        models = await self._list_models()
        # llama.cpp answers to any name, and lists one model under its own.
        entry = next((model for model in models if model.id == self._config.model or len(models) == 1), None)
        server, notes = await self._identify()
        listed = Capabilities(
            endpoint=self._config.url,
            server=server,
            models=tuple(model.id for model in models),
            context_length=entry.context if entry else None,
        )
        if self._config.batch is not None:
            return replace(listed, notes=tuple(notes))
        two = await self._try(n=2)
        scored = await self._try(logprobs=True)
        shaped = await self._try(max_tokens=4, response_format=_PROBE_SCHEMA)  # the first may be blank
        answer = next((answers[0] for answers in (two, scored, shaped) if isinstance(answers, list)), None)
        for feature, answers in (("a plain request", two), ("logprobs", scored), ("a JSON schema", shaped)):
            if isinstance(answers, ProviderError):
                notes.append(f"{feature} failed: {answers}")
        if answer and answer.model and answer.model != self._config.model:
            notes.append(f"asked for {self._config.model!r}, answers come from {answer.model!r}")
        works = isinstance(two, list)
        return replace(
            listed,
            served_model=answer.model if answer else None,
            build=answer.build if answer else None,
            n=_counts_both(two) if isinstance(two, list) else None,
            logprobs=bool(scored[0].logprobs) if isinstance(scored, list) else (False if works else None),
            json_schema=_begins_an_object(shaped[0].text) if isinstance(shaped, list) else (False if works else None),
            seed=False if "seed" in self._refused else None,
            notes=(*notes, *self.notes),
        )

    # --- the request ---

    def _body(self, prompt: Prompt, seed: int | None, n: int) -> dict[str, Any]:
        """The request's JSON.

        Raises:
            ProviderError: UNSUPPORTED, a parameter that the endpoint is known to refuse is not neutral.
        """
        body: dict[str, Any] = {"model": prompt.model, "messages": prompt.messages}
        body |= dict(self._habits.explicit)
        body |= prompt.parameters
        body.pop("revision", None)
        if not body.get("stop"):
            body.pop("stop", None)
        if not body.get("logprobs"):
            body.pop("logprobs", None)
        if not body.get("top_logprobs"):
            body.pop("top_logprobs", None)
        if body.get("top_k") == 0:
            body["top_k"] = self._habits.no_limit
        if "response_format" in body:
            body["response_format"] = _response_format(body["response_format"])
        if seed is not None:
            body["seed"] = seed
        if n > 1:
            body["n"] = n
        for name in self._refused.keys() & body.keys():
            if not _may_be_left_out(name, body[name]):
                raise self._unsupported(name, body[name], self._refused[name])
            del body[name]
        if self._limit_name != "max_tokens" and "max_tokens" in body:
            body[self._limit_name] = body.pop("max_tokens")
        return body

    def _learn(self, error: ProviderError, body: Mapping[str, Any]) -> bool:
        """Whether the request is to be sent again, without what the server has just refused."""
        name = error.parameter
        if error.status is None or name is None or name not in body:
            return False
        if name == "max_tokens" and "max_completion_tokens" in str(error):
            self._limit_name = "max_completion_tokens"
            return True
        if not _may_be_left_out(name, body[name]):
            return False
        self._refused.setdefault(name, f"refused with status {error.status}")
        return True

    async def _chat(self, body: Mapping[str, Any]) -> Response:
        """The answer to one request, whatever its status."""
        return await self._request("POST", f"{self._config.url}/chat/completions", msgspec.json.encode(body))

    async def _request(
        self, method: str, url: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> Response:
        try:
            response = await self._transport.request(
                method,
                url,
                headers={**self._headers, "Content-Type": content_type},
                body=body,
                timeout=self._config.timeout,
            )
        except ProviderError as error:
            raise ProviderError(error.kind, f"{self._config.provider}: {error}{self._remedy(error.kind)}") from error
        return without_secrets(response, self._headers)

    def _remedy(self, kind: ErrorKind) -> str:
        if kind is ErrorKind.REFUSED:
            return f"; {self._habits.start.format(model=self._config.model)}"
        if kind is ErrorKind.TIMEOUT:
            return "; raise `timeout`, or lower `max_concurrency`"
        return ""

    # --- the answer ---

    def _completions(self, response: Response, body: Mapping[str, Any], n: int) -> list[Completion]:
        if response.status != 200:
            raise self._error(response.status, response, body)
        try:
            answer = msgspec.json.decode(response.body, type=_Answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._garbled(f"{error}", response) from error
        if answer.error is not None:
            raise self._error(None, response, body)
        choices = sorted(answer.choices or (), key=lambda choice: choice.index)
        whole = [choice for choice in choices if choice.error is None and choice.message is not None][:n]
        if not whole:
            fault = next((choice.error for choice in choices if choice.error is not None), None)
            if fault is None:
                raise self._garbled("no choices", response)
            raise self._error(None, replace(response, body=msgspec.json.encode({"error": fault})), body)
        usages = _share(answer.usage or _Usage(), whole)
        return [_completion(answer, choice, usage) for choice, usage in zip(whole, usages, strict=True)]

    def _garbled(self, why: str, response: Response) -> ProviderError:
        text = response.body[:200].decode(errors="replace").strip()
        hint = "; correct `base_url`" if text.startswith("<") else ""
        return ProviderError(
            ErrorKind.GARBLED, f"{self._where}: not a chat completion ({why}): {text!r}{hint}", status=response.status
        )

    def _error(self, status: int | None, response: Response, body: Mapping[str, Any]) -> ProviderError:
        """The error that an answer stands for; `status` is None for one that came under 200."""
        fault = read_fault(response.body)
        status = status or fault.status or 500
        kind, message, parameter = error_kind(status), fault.message, None
        flagged = self._config.provider == "openrouter" and re.search("moderat|flagged", fault.message, re.I)
        if status == 429 and "insufficient_quota" in fault.code:
            kind = ErrorKind.AUTH
        elif status == 403 and flagged:
            kind = ErrorKind.BAD_REQUEST  # this prompt's fault, not the key's
        elif status in (400, 422, 500) and says_too_long(fault):
            kind = ErrorKind.TOO_LONG
        elif status in (400, 422) and _says_no_model(fault):
            kind = ErrorKind.NO_MODEL
        elif status in (400, 422):
            sent = body.keys() - {"model", "messages"}
            parameter = next((name for name in map(_wire_name, refused_names(fault)) if name in sent), None)
        if parameter is not None:
            return self._unsupported(parameter, body[parameter], fault.message, status=status)
        if kind is ErrorKind.AUTH and status == 401:
            variable = self._habits.key_variable
            message += f"; set {variable}" if self._config.api_key is None else f"; the key in {variable} is refused"
        elif kind is ErrorKind.AUTH and status in (402, 429):
            message += "; the account has no credit left"
        elif kind is ErrorKind.TOO_LONG:
            message += _numbers(fault) + "; shorten the prompt, or serve the model with a larger context"
        elif 300 <= status < 400:
            message = f"redirected to {response.headers.get('location')}; set `base_url` to where it leads"
        return ProviderError(
            kind,
            f"{self._where}: {status}: {message}",
            status=status,
            retry_after=retry_after(response.headers, datetime.now(UTC)),
        )

    def _unsupported(self, name: str, value: object, why: str, *, status: int | None = None) -> ProviderError:
        neutral = f"set it to {_NEUTRAL[name][0]:g}" if name in _NEUTRAL else "change or remove it"
        shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:60]} …"
        return ProviderError(
            ErrorKind.UNSUPPORTED,
            f"{self._where}: does not take {name}={shown} ({why}); {neutral}",
            status=status,
            parameter=name,
        )

    @property
    def _where(self) -> str:
        return f"{self._config.provider}: {self._config.url}"

    # --- what the endpoint is ---

    async def _list_models(self) -> tuple["_Model", ...]:
        """What /models lists, asked once; empty where the server has no such list.

        Raises:
            ProviderError: AUTH, or nobody answers.
        """
        async with self._listing:
            if self._models is None:
                response = await self._request("GET", f"{self._config.url}/models")
                if error_kind(response.status) is ErrorKind.AUTH:
                    raise self._error(response.status, response, {})
                try:
                    self._models = tuple(msgspec.json.decode(response.body, type=_Models).data)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    self._models = ()
            return self._models

    async def _with_models(self, error: ProviderError) -> ProviderError:
        """`error`, about the model's name, with the models to choose from."""
        try:
            names = [model.id for model in await self._list_models()]
        except ProviderError:
            names = []
        model = self._config.model
        if model in names or not names:
            remedy = "; correct `base_url` or `model`"
        else:
            near = get_close_matches(model, names, n=10, cutoff=0.5) or names[:10]
            remedy = f"; set `model` to one that is served: {', '.join(near)}{' …' if len(near) < len(names) else ''}"
        return ProviderError(error.kind, f"{error}{remedy}", status=error.status)

    async def _identify(self) -> tuple[str | None, list[str]]:
        """The server's product and version where it tells them, and what is known of it."""
        provider, notes = self._config.provider, []
        if provider == "sglang":
            notes.append("logprobs are of the distribution after temperature and penalties")
        if provider == "openrouter" or self._official:
            return None, notes
        root = self._config.url.removesuffix("/v1")
        # Only Ollama answers /api/version; behind its /v1 num_ctx can't be set, and prompts are cut in silence.
        response = await self._request("GET", root + (self._habits.version_path or "/api/version"))
        try:
            version = msgspec.json.decode(response.body, type=_Version).version
        except (msgspec.DecodeError, UnicodeDecodeError):
            version = None
        if response.status != 200 or version is None:
            return response.headers.get("server"), notes
        if provider == "openai":
            notes.append("this is Ollama: use `provider: ollama`, for here long prompts are cut without an error")
            return f"ollama {version}", notes
        return f"{provider} {version}", notes

    async def _try(self, *, n: int = 1, max_tokens: int = 1, **parameters: Any) -> list[Completion] | ProviderError:
        """The completions of a tiny request, or why there are none.

        Raises:
            ProviderError: the endpoint can't be used at all.
        """
        decode = DecodeProfile(max_tokens=max_tokens, **parameters)
        prompt = Prompt(self._config.provider, self._config.model, _PROBE_MESSAGES, decode.parameters())
        try:
            return await self.complete(prompt, seed=1, n=n)
        except ProviderError as error:
            if error.kind in _CONCERNS_ALL:
                raise
            return error


def share(total: int, weights: Sequence[int]) -> list[int]:
    """Splits `total` in proportion to `weights`, by largest remainder: whole numbers that sum to it exactly."""
    if len(weights) == 1:
        return [total]
    if not sum(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % whole))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


# --- the wire ---


class _Cached(Struct):
    cached_tokens: int | None = None


class _Reasoning(Struct):
    reasoning_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None
    completion_tokens_details: _Reasoning | None = None


class _Top(Struct):
    token: str
    logprob: float


class _Token(Struct):
    token: str
    logprob: float
    top_logprobs: list[_Top] | None = None


class _Logprobs(Struct):
    content: list[_Token] | None = None


class _Message(Struct):
    content: str | None = None
    reasoning_content: str | None = None  # SGLang, DeepSeek, older vLLM
    reasoning: str | None = None  # OpenRouter, vLLM
    refusal: str | None = None


class _Choice(Struct):
    index: int = 0
    message: _Message | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    error: Any = None


class _Answer(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    error: Any = None


class _Meta(Struct):
    n_ctx: int | None = None


class _Model(Struct):
    id: str
    max_model_len: int | None = None  # vLLM, SGLang
    context_length: int | None = None  # OpenRouter
    context_window: int | None = None  # Groq
    meta: _Meta | None = None  # llama.cpp; the context of one slot

    @property
    def context(self) -> int | None:
        return (
            self.max_model_len or self.context_length or self.context_window or (self.meta.n_ctx if self.meta else None)
        )


class _Models(Struct):
    data: list[_Model]


class _Version(Struct):
    version: str | None = None


_PROBE_MESSAGES = ({"role": "user", "content": "Name three colours."},)
_PROBE_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string"}},
    "required": ["colour"],
    "additionalProperties": False,
}


def _completion(answer: _Answer, choice: _Choice, usage: Usage) -> Completion:
    message = choice.message or _Message()
    finish = _FINISH.get(choice.finish_reason or "", FinishReason.OTHER)
    thinking, text = message.reasoning_content or message.reasoning or None, message.content or ""
    if thinking is None:
        thinking, text = split_thinking(text, finish)
    return Completion(
        text=text,
        finish_reason=FinishReason.CONTENT_FILTER if message.refusal and not text else finish,
        usage=usage,
        thinking=thinking,
        model=answer.model,
        build=answer.system_fingerprint,
        logprobs=None if (tokens := _tokens(choice)) is None else tuple(map(_token, tokens)),
    )


def _tokens(choice: _Choice) -> list[_Token] | None:
    return choice.logprobs.content if choice.logprobs else None


def _token(token: _Token) -> TokenLogprob:
    return TokenLogprob(token.token, token.logprob, tuple((top.token, top.logprob) for top in token.top_logprobs or ()))


def _share(usage: _Usage, choices: Sequence[_Choice]) -> list[Usage]:
    """One usage for each choice; they sum to what was reported, which is all that the server tells.

    Completion tokens go by the number of tokens with logprobs, or else by length; the prompt goes with the first.
    """
    counted = [_tokens(choice) for choice in choices]
    written = [_length(choice.message) for choice in choices]
    weights = written if None in counted else [len(tokens or ()) for tokens in counted]
    completion = share(usage.completion_tokens or 0, weights)
    details = usage.completion_tokens_details or _Reasoning()
    reasoning = share(details.reasoning_tokens or 0, completion)
    usages = [
        Usage(completion_tokens=tokens, reasoning_tokens=thought)
        for tokens, thought in zip(completion, reasoning, strict=True)
    ]
    cached = (usage.prompt_tokens_details or _Cached()).cached_tokens or 0
    usages[0] = replace(usages[0], prompt_tokens=usage.prompt_tokens or 0, cached_tokens=cached)
    return usages


def _length(message: _Message | None) -> int:
    texts = (message.content, message.reasoning_content or message.reasoning) if message else ()
    return sum(len(text) for text in texts if text)


def _response_format(asked: object) -> object:
    """A schema in OpenAI's envelope; what already has the wire's form stays as it is."""
    if asked == "json":
        return {"type": "json_object"}
    if not isinstance(asked, Mapping) or asked.get("type") in ("text", "json_object", "json_schema", "structural_tag"):
        return asked
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked, "strict": True}}


def _may_be_left_out(name: str, value: object) -> bool:
    # Without `n` one answer comes, and the client asks for the rest; without `seed` an answer is only not repeatable.
    return name in ("n", "seed") or value in _NEUTRAL.get(name, ())


def _wire_name(name: str) -> str:
    # llama.cpp's word for more choices than it has slots.
    return "n" if name == "n_cmpl" else name


def _says_no_model(fault: Fault) -> bool:
    if fault.parameter == "model" or "model_not_found" in fault.code:
        return True
    words = r"\bmodel\b.{0,200}(not found|not exist|not available)|(invalid|unknown|no such) model|not a valid model"
    return re.search(words, fault.message, re.IGNORECASE) is not None


def _numbers(fault: Fault) -> str:
    """llama.cpp gives both numbers as fields; all others have them in the words."""
    asked, limit = fault.fields.get("n_prompt_tokens"), fault.fields.get("n_ctx")
    if asked is None or limit is None or (str(asked) in fault.message and str(limit) in fault.message):
        return ""
    return f" (prompt {asked} tokens, context {limit})"


def _counts_both(answers: Sequence[Completion]) -> bool:
    return len(answers) == 2 and sum(answer.usage.completion_tokens for answer in answers) >= 2


def _begins_an_object(text: str) -> bool | None:
    """Whether the first tokens of an answer keep to the schema; None if they are blank, which says nothing."""
    begun = text.lstrip()
    return begun.startswith("{") if begun else None


def _normal_url(url: str, default: str) -> str:
    """The URL that `/chat/completions` follows.

    Raises:
        ValueError: not a URL of a server, or one with a secret in it.
    """
    url = url.strip().rstrip("/").removesuffix("/chat/completions")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url: {url!r} is not an http:// or https:// address")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base_url: no user, password or query here; they would be written to files. Use `headers`")
    return f"{url}/v1" if not parts.path or f"{url}/v1" == default else url
