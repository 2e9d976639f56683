"""OpenAI's chat completions, as OpenAI, OpenRouter, vLLM, SGLang and most other servers speak them. Not streamed.

"200" does not mean that a field was honoured: `probe` finds out for n, logprobs and JSON schemas. What a server
refuses by name is left out from then on if it was neutral, and an error if it was not.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec
from msgspec.json import Decoder
from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import together
from fastdistill.core.turns import LARGE, beside
from fastdistill.core.types import Completion, FinishReason, LogprobBasis, Prompt, Usage
from fastdistill.model.client import Brake
from fastdistill.model.provider import Capabilities, ErrorKind, Load, ModelConfig, ProviderError, ServedConfig, lacks
from fastdistill.model.providers.openai_answers import (
    Decided,
    ListedModel,
    ListedModels,
    Props,
    SGLangScores,
    TokenIds,
    VLLMScores,
    basis_of,
    begins_an_object,
    completions_of,
    decode_answer,
)
from fastdistill.model.transport import Fault, HttpProvider, Response, Transport, Version, error_kind, usage_of

Kind = Literal["openai", "openrouter", "vllm", "sglang"]


class _Habits(NamedTuple):
    """What differs between the servers behind one protocol, which also have a variable each: `VLLM_API_KEY` …"""

    base_url: str
    start: str  # what to do when nobody answers
    version_paths: tuple[str, ...] = ()  # under the host, not under /v1


_HABITS: Mapping[str, _Habits] = {
    "openai": _Habits("https://api.openai.com/v1", "start the server", ("/api/version",)),  # which only Ollama answers
    "openrouter": _Habits("https://openrouter.ai/api/v1", "check the network"),
    "vllm": _Habits("http://localhost:8000/v1", "start it with `vllm serve {model}`", ("/version",)),
    "sglang": _Habits(
        "http://localhost:30000/v1",
        "start it with `python -m sglang.launch_server --model-path {model}`",
        ("/server_info", "/get_server_info"),  # the second of versions before 2026
    ),
}

_OWN = {"vllm": "return_tokens_as_token_ids", "sglang": "return_token_ids"}
"""Servers of one's own, and how each is asked for the ids of tokens; llama.cpp gives them unasked."""

OFFICIAL_LACKS = ("top_k", "min_p", "repetition_penalty")  # https://platform.openai.com/docs/api-reference/chat

NEUTRAL: Mapping[str, tuple[float, ...]] = {
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (1,)),
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty"), (0,)),
    "top_k": (0, -1),
}

_NO_MODEL = re.compile(
    r"\bmodel\b.{0,200}(not found|not exist|not available)|(invalid|unknown|no such) model|not a valid model"
    # Hugging Face's router, transformers serve, DeepSeek, Zhipu
    r"|model_not_(found|supported)|server is pinned to|supported (api )?model names|模型不存在",
    re.IGNORECASE,
)

_SAY_NOTHING_EMPTY = ("stop", "logprobs", "top_logprobs", "token_ids")
_RESPONSE_FORMATS = ("text", "json_object", "json_schema", "structural_tag")  # as they go over the wire

_LOADS = (  # requests running and waiting
    (b"vllm:num_requests_running", b"vllm:num_requests_waiting"),
    (b"sglang:num_running_reqs", b"sglang:num_queue_reqs"),
    (b"llamacpp:requests_processing", b"llamacpp:requests_deferred"),
)
_METRIC = re.compile(
    rb"^(%b)(\{[^}]*\})? (\d{1,15}(?:\.\d*)?(?:e\+\d\d)?)\s*$" % b"|".join(map(b"|".join, _LOADS)), re.M
)
_RANKS = re.compile(rb'[tp]p_rank="\d+",?')  # SGLang: those of one engine each tell of the same requests

_OF_THE_FIRST = ("temperature", "top_p", "frequency_penalty")
_TRIED = ("a plain request", "logprobs", "a JSON schema", "logprobs at temperature 2")
_OLLAMA = "this is Ollama: use `provider: ollama`, for here long prompts are cut without an error"
_TRANSFORMERS = (
    "this is transformers serve: where its generation_config.json has no top_k, it is 50; with --continuous-batching,"
    " instead, the temperature and top_p of the first request since its start hold for all"
)

_CONCERNS_ALL = {ErrorKind.AUTH, ErrorKind.NO_MODEL, ErrorKind.REFUSED, ErrorKind.RESET, ErrorKind.TIMEOUT}
"""Errors of a probe's request that say something about the endpoint, not about what the request tried."""
_TELLS_NOTHING = {ErrorKind.GARBLED, ErrorKind.OVERLOADED, ErrorKind.RATE_LIMITED, ErrorKind.SERVER}
"""Where no request gets anything else: llama.cpp says 503 while it loads, a gateway 500 with no server behind it."""


class BatchOptions(BaseModel, frozen=True, extra="forbid"):
    """How requests go through the Batch API: `openai_batch.py`."""

    size: int = Field(10_000, gt=0, le=50_000, description="requests in one batch, at most")
    quiet_s: float = Field(1.0, gt=0, description="seconds without a new request, after which a batch goes out")
    completion_window: str = Field("24h", description="in which the server promises to be done")
    poll_s: float = Field(30.0, gt=0, description="seconds between two looks at a batch, growing tenfold")


class OpenAIConfig(ServedConfig):
    """One model at one endpoint or several; `base_url` gets `/v1` where it has no path. Keys are never dumped."""

    provider: Kind = "openai"
    headers: dict[str, SecretStr] = Field({}, exclude=True, description="sent with every request")
    batch: BatchOptions | None = Field(
        None, description="true, or its options: use the Batch API; `max_concurrency` is then `size` by default"
    )

    @classmethod
    def defaults(cls, provider: str) -> tuple[str, str]:
        variable = "" if provider == "openrouter" else f"{provider.upper()}_BASE_URL"
        return variable, _HABITS.get(provider, _HABITS["openai"]).base_url

    @classmethod
    def normal_url(cls, url: str) -> str:
        """The URL that `/chat/completions` follows."""
        url = super().normal_url(url.rstrip("/").removesuffix("/chat/completions"))
        known = f"{url}/v1" in [habits.base_url for habits in _HABITS.values()]
        return f"{url}/v1" if known or not urlsplit(url).path else url

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
        return self.provider in _OWN and self.batch is None


class OpenAIProvider(HttpProvider[OpenAIConfig]):
    """Speaks to all four kinds of `OpenAIConfig.provider`, which differ in defaults and a few habits.

    `prompt.parameters` are sent under their own names, those it does not know as they are; the draw's seed wins
    over one among them.
    """

    Config: ClassVar[type[ModelConfig]] = OpenAIConfig
    _expected = "a chat completion"

    def __init__(self, config: OpenAIConfig, transport: Transport | None = None) -> None:
        super().__init__(config, transport, config.headers)
        self._habits = _HABITS[config.provider]
        self._remedy = self._habits.start.format(model=config.model) + ", or correct `base_url`"
        self._root = config.url.removesuffix("/v1")
        self._official = urlsplit(config.url).hostname == "api.openai.com"
        self._hosted = self._official or config.provider == "openrouter"
        self._refused: dict[str, str] = dict.fromkeys(OFFICIAL_LACKS if self._official else (), "not in the API")
        self._limit_name = "max_tokens"
        self._translated: tuple[Mapping[str, Any], dict[str, Any]] = ({}, {})  # the latest parameters, as they are sent
        self._basis = LogprobBasis.UNKNOWN  # until it is probed
        self._models: tuple[ListedModel, ...] | None = None
        self._listing = asyncio.Lock()

    @classmethod
    def in_run(cls, config: OpenAIConfig, root: Path, brake: Brake) -> "OpenAIProvider":
        """The provider that a run uses, which may keep something under the artifacts root for the next run."""
        if config.batch is None:
            return cls(config)
        from fastdistill.model.providers.openai_batch import BatchProvider  # which is made of this one

        return BatchProvider(config, config.batch, root / "batches", brake)

    async def load(self) -> Load | None:
        """From the Prometheus metrics of vLLM, SGLang or llama.cpp."""
        if self._hosted:
            return None
        found = Counter[bytes]()
        with suppress(ProviderError):
            told = await self._request("GET", f"{self._root}/metrics", timeout=5.0)
            engines = {(name, _RANKS.sub(b"", labels)): value for name, labels, value in _METRIC.findall(told.body)}
            for (name, _), value in engines.items():
                found[name] += int(float(value))
        both = (Load(found[names[0]], found[names[1]]) for names in _LOADS if found.keys() >= {*names})
        return next(both, None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was learnt so far about parameters that the endpoint does not take."""
        renamed = () if self._limit_name == "max_tokens" else (f"max_tokens is sent as {self._limit_name}",)
        return tuple(f"{name} is left out: {why}" for name, why in self._refused.items()) + renamed

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        """Up to `n` completions of one request, in the order of their index.

        A prompt whose parameters have `decision` or `scored` brings one: see `_decide` and `_score`.
        """
        if "decision" in prompt.parameters:
            return [await self._decide(prompt)]
        if "scored" in prompt.parameters:
            return [await self._score(prompt)]
        while True:
            body = self._body(prompt, seed, n)
            try:
                response = await self._chat(body)
                read = partial(self._completions, response, body, n)
                return await beside(read) if len(response.body) > LARGE else read()
            except ProviderError as error:
                # Each turn takes one more parameter out of the body, so this ends.
                if self._learn(error, body):
                    continue
                if error.kind is ErrorKind.NO_MODEL:
                    raise await self._with_models(error) from error
                raise

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        """Lists the models, and asks for four tokens with a JSON schema, then for one with n=2 and two with logprobs.

        With `batch` it asks for none: that would take a batch.
        """
        # Side by side, for until they are answered no other request goes out. None is called off for another's error:
        # uvloop would complain of a handshake that fails just then.
        asked: tuple[Awaitable[Any], ...] = (self._list_models(), self._identify(), self._tries(like))
        models, server, tries = await together(*asked)
        notes = [_OLLAMA] if server and server.startswith("ollama ") else []
        # llama.cpp answers to any name, and lists one model under its own.
        entry = next((model for model in models if model.id == self._config.model or len(models) == 1), None)
        failures = {what: tried for what, tried in zip(_TRIED, tries, strict=True) if isinstance(tried, ProviderError)}
        if len(failures) == len(tries) and all(error.kind in _TELLS_NOTHING for error in failures.values()):
            raise failures[_TRIED[0]]
        notes += [f"{what} failed: {error}" for what, error in failures.items()]
        two, scored, shaped, hot = ([] if isinstance(tried, ProviderError) else tried for tried in tries)
        answers = [*two, *scored, *shaped, *hot]
        answer = answers[0] if answers else None
        if answer and answer.model and answer.model != self._config.model:
            revised = answer.model.startswith(f"{self._config.model}@")
            other = f"asked for {self._config.model!r}, answers come from {answer.model!r}"
            notes.append(_TRANSFORMERS if revised else other)
        token, warm = ((tried[0].logprobs or [None])[0] if tried else None for tried in (scored, hot))
        if token and len(token.top) > 1:
            self._basis = basis_of(token, warm)
        refused = False if two else None  # known only where a plain request works
        return Capabilities(
            endpoint=self._config.url,
            server=server,
            models=tuple(model.id for model in models),
            context_length=entry.context if entry else None,
            slots=await self._slots(models),
            served_model=answer.model if answer else None,
            build=answer.build if answer else None,
            n=len(two) == 2 and sum(one.usage.completion_tokens for one in two) >= 2 if two else None,
            logprobs=token is not None if scored else refused,
            json_schema=begins_an_object(shaped[0].text) if shaped else refused,
            seed=False if "seed" in self._refused else None,
            logprob_basis=self._basis if token else None,
            max_top=len(token.top) if token else None,
            has_token_ids=token.id is not None if token else None,
            can_score_prompt=self._config.provider in _OWN,
            notes=(*notes, *self.notes),
            probe_tokens=(sum(a.usage.prompt_tokens for a in answers), sum(a.usage.completion_tokens for a in answers)),
        )

    # --- the request ---

    def _body(self, prompt: Prompt, seed: int | None, n: int) -> dict[str, Any]:
        """The request's JSON; ProviderError UNSUPPORTED if a parameter known to be refused is not neutral."""
        parameters, sent = self._translated
        if prompt.parameters is not parameters:
            sent = self._in_their_words(prompt.parameters)
            self._translated = (prompt.parameters, sent)
        body = {"model": prompt.model, "messages": prompt.messages, **sent}
        if seed is not None:
            body["seed"] = seed
        if n > 1:
            body["n"] = n
        if self._refused:
            for name in self._refused.keys() & body.keys():
                if not _may_be_left_out(name, body[name]):
                    raise self._unsupported(name, body[name], self._refused[name])
                del body[name]
        if self._limit_name != "max_tokens" and "max_tokens" in body:
            body[self._limit_name] = body.pop("max_tokens")
        return body

    def _in_their_words(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        body = chat_parameters(parameters)
        if body.pop("token_ids", None):
            if self._hosted:
                raise lacks(self._where, "token_ids")
            if name := _OWN.get(self._config.provider):
                body[name] = True
        if self._config.provider in _OWN:
            body.setdefault("repetition_penalty", 1.0)  # else the model's generation_config would apply
            if body.get("top_k") == 0:
                body["top_k"] = -1  # vLLM before 0.8 and SGLang refuse 0
        return body

    def _learn(self, error: ProviderError, body: Mapping[str, Any]) -> bool:
        """Whether the request is to be sent again, without what the server has just refused."""
        name = error.parameter
        if name == "max_tokens" and "max_completion_tokens" in str(error):
            self._limit_name = "max_completion_tokens"
        elif name is not None and _may_be_left_out(name, body[name]):
            self._refused.setdefault(name, "the server refuses it")
        else:
            return False
        return True

    async def _chat(self, body: Mapping[str, Any]) -> Response:
        """The answer to one request, whatever its status."""
        return await self._request("POST", f"{self._config.url}/chat/completions", msgspec.json.encode(body))

    # --- other requests than chat completions ---

    async def _decide(self, prompt: Prompt) -> Completion:
        """Answers to typed questions, as JSON: `answers`, and vLLM's `diagnostics`; nothing is generated.

        https://github.com/huggingface/transformers, cli/serving/systemone.py; vLLM, generate/structured_decisions.
        """
        state = "\n\n".join(message["content"] for message in prompt.messages)
        body = {"model": prompt.model, "state": state, "questions": prompt.parameters["decision"]}
        response = await self._asked(f"{self._config.url}/systemone", body, "decision")
        said = self._decode(response, Decoder(Decided).decode)
        text = msgspec.json.encode({"answers": said.answers, "diagnostics": said.diagnostics}).decode()
        usage = usage_of(said.usage.input_tokens, said.usage.output_tokens)
        return Completion(text, FinishReason.STOP, usage, model=said.model)

    async def _score(self, prompt: Prompt) -> Completion:
        """The given answer (its text, or its token ids) with log-probabilities; `text` is JSON of the ids before it.

        By vLLM's `prompt_logprobs`, or SGLang's own /generate.
        """
        if self._config.provider not in _OWN:
            raise lacks(self._where, "scored")
        given, model, k = prompt.parameters["scored"], {"model": prompt.model}, prompt.parameters["top_logprobs"]
        begin = await self._token_ids({**model, "messages": prompt.messages})
        text = {**model, "prompt": given, "add_special_tokens": False}
        ids = await self._token_ids(text) if isinstance(given, str) else [*given]
        whole = begin + ids
        if self._config.provider == "vllm":
            url, basis, answer = f"{self._config.url}/completions", self._basis, Decoder[Any](VLLMScores)
            body = {**model, "prompt": whole, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
        else:
            # Nothing is told of the first token, so it begins one earlier. Where SGLang divides by the temperature,
            # it is by this one: the values are the model's own either way.
            url, basis, answer = f"{self._root}/generate", LogprobBasis.RAW, Decoder(SGLangScores)
            sampling = {"max_new_tokens": 1, "temperature": 1.0}
            body = {"input_ids": whole, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": k}
            body |= {"logprob_start_len": len(begin) - 1, "return_text_in_logprobs": True}
        response = await self._asked(url, body, "scored")
        read = partial(self._decode, response, lambda text: tuple(answer.decode(text).of(ids, k)))
        scores = await beside(read) if len(response.body) > LARGE else read()
        if len(scores) != len(ids) or any(len(score.top) < k for score in scores):
            raise self._garbled("its log-probabilities are not one for each token, with the alternatives", response)
        how: dict[str, Any] = {"logprobs": scores, "logprob_basis": basis}
        return Completion(msgspec.json.encode(begin).decode(), FinishReason.STOP, Usage(len(whole), 0), **how)

    async def _token_ids(self, body: Mapping[str, Any]) -> list[int]:
        response = await self._asked(f"{self._root}/tokenize", body, "scored")
        return self._decode(response, Decoder(TokenIds).decode).tokens

    async def _asked(self, url: str, body: Mapping[str, Any], wire: str) -> Response:
        """The answer, if its status is 200; UNSUPPORTED where the server, or the model, lacks the wire."""
        response = await self._request("POST", url, msgspec.json.encode(body))
        if response.status == 200:
            return response
        error, fault = self._error(response, {}), Fault.read(response.body)
        lacking = response.status in (404, 405, 501) and not _says_no_model(fault)
        # A decision's 400: its labels are no single tokens of this model, and the like.
        if lacking or (wire == "decision" and error.kind is ErrorKind.BAD_REQUEST):
            raise lacks(f"{self._where}: {response.status}: {fault.message}", wire) from error
        raise error

    # --- the answer ---

    def _completions(self, response: Response, body: Mapping[str, Any], n: int) -> list[Completion]:
        if response.status != 200:
            raise self._error(response, body)
        answer = self._decode(response, decode_answer)
        if answer.error:  # some gateways write one that is empty
            raise self._error(response, body)
        completions = completions_of(answer, n, self._basis)
        if not completions:
            fault = next((choice.error for choice in answer.choices or () if choice.error), None)
            if fault is None:
                raise self._garbled("no choices", response)
            said = Response(response.status, response.headers, msgspec.json.encode({"error": fault}))
            raise self._error(said, body)
        return completions

    def _error(self, response: Response, body: Mapping[str, Any]) -> ProviderError:
        """The error that an answer stands for; it may have come under 200."""
        fault = Fault.read(response.body)
        status = response.status if response.status != 200 else fault.status or 500
        kind, message, parameter = error_kind(status), fault.message, None
        flagged = self._config.provider == "openrouter" and re.search("moderat|flagged", fault.message, re.I)
        if status == 429 and "insufficient_quota" in fault.code:
            kind = ErrorKind.AUTH
        elif status == 403 and flagged:
            kind = ErrorKind.BAD_REQUEST  # this prompt's fault, not the key's
        elif status in (400, 422, 500) and fault.says_too_long:
            kind = ErrorKind.TOO_LONG
        elif status in (400, 422) and _says_no_model(fault):
            kind = ErrorKind.NO_MODEL
        elif status in (400, 422):
            parameter = _refused(fault, {name: body[name] for name in body.keys() - {"model", "messages"}})
        if parameter is not None:
            return self._unsupported(parameter, body[parameter], fault.message)
        if kind is ErrorKind.AUTH and status == 401:
            variable = f"{self._config.provider.upper()}_API_KEY"
            refused = f"the key (`api_key`, or else {variable}) is refused"
            message += f"; set {variable}" if self._config.api_key is None else f"; {refused}"
        elif kind is ErrorKind.AUTH and status in (402, 429):
            message += "; the account has no credit left"
        elif kind is ErrorKind.TOO_LONG and status != 413:
            message += "; shorten the prompt, or serve the model with a larger context"
        return self._failed(kind, status, message, response)

    def _unsupported(self, name: str, value: object, why: str) -> ProviderError:
        neutral = f"set it to {NEUTRAL[name][0]:g}" if name in NEUTRAL else "change or remove it"
        shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:60]} …"
        message = f"{self._where}: does not take {name}={shown} ({why}); {neutral}"
        return ProviderError(ErrorKind.UNSUPPORTED, message, parameter=name)

    # --- what the endpoint is ---

    async def _list_models(self) -> tuple[ListedModel, ...]:
        """What /models lists, asked once; empty where the server has no such list. Raises AUTH, or nobody answers."""
        async with self._listing:
            if self._models is None:
                response = await self._request("GET", f"{self._config.url}/models")
                if error_kind(response.status) is ErrorKind.AUTH:
                    raise self._error(response, {})
                if response.status == 503:
                    return ()  # as it loads: to be asked again
                self._models = ()
                with suppress(ProviderError):
                    self._models = tuple(self._decode(response, Decoder(ListedModels).decode).data)
            return self._models

    async def _with_models(self, error: ProviderError) -> ProviderError:
        """`error`, about the model's name, with the models to choose from."""
        names: list[str] = []
        with suppress(ProviderError):
            names = [model.id for model in await self._list_models()]
        model = self._config.model
        if model in names or not names:
            remedy = "; correct `base_url` or `model`"
        else:
            near = get_close_matches(model, names, n=10, cutoff=0.5) or names[:10]
            remedy = f"; set `model` to one that is served: {', '.join(near)}{' …' if len(near) < len(names) else ''}"
        return ProviderError(error.kind, f"{error}{remedy}")

    async def _identify(self) -> str | None:
        """The server's product and version where it tells them."""
        if self._hosted:
            return None
        product = "ollama" if self._config.provider == "openai" else self._config.provider
        said = None
        for path in self._habits.version_paths:
            response = await self._request("GET", f"{self._root}{path}")
            said = response.headers.get("server")
            with suppress(ProviderError):
                return f"{product} {self._decode(response, Decoder(Version).decode).version}"
        return said

    async def _slots(self, models: tuple[ListedModel, ...]) -> int | None:
        """Of llama.cpp, which tells them also where it has no metrics."""
        if all(model.owned_by != "llamacpp" for model in models):
            return None
        with suppress(ProviderError):
            response = await self._request("GET", f"{self._root}/props", timeout=5.0)
            return self._decode(response, Decoder(Props).decode).total_slots
        return None

    async def _tries(self, like: Prompt | None) -> "list[list[Completion] | ProviderError]":
        if self._config.batch is not None:
            return [[] for _ in _TRIED]
        scores = {"logprobs": True, "top_logprobs": 20, "token_ids": self._config.provider in _OWN}
        first = {name: value for name, value in like.parameters.items() if name in _OF_THE_FIRST} if like else {}
        # The first alone, for `transformers serve` with continuous batching samples all others as its first request
        # asks. Of several tokens, for the first may be blank.
        shaped = await self._try(max_tokens=4, response_format=_PROBE_SCHEMA, **first)
        well = not isinstance(shaped, ProviderError)
        three = ({"n": 2}, scores, {**scores, "temperature": 2.0})
        two, scored, hot = await together(*(self._try(**each, well=well) for each in three))
        if isinstance(scored, ProviderError):
            scored = await self._try(logprobs=True, well=well)
        return [two, scored, shaped, hot]

    async def _try(
        self, *, n: int = 1, max_tokens: int = 1, well: bool = False, **parameters: Any
    ) -> list[Completion] | ProviderError:
        """The completions of a tiny request, or why there are none; raises if the endpoint can't be used at all.

        `well`: it has answered already. Then a 403 is about what is asked, as OpenAI's to log-probabilities of some
        models.
        """
        sent = DecodeProfile(max_tokens=max_tokens).parameters() | parameters
        prompt = Prompt(self._config.provider, self._config.model, _PROBE_MESSAGES, sent)
        try:
            return await self.complete(prompt, seed=1, n=n)
        except ProviderError as error:
            if error.kind in _CONCERNS_ALL and not (well and error.kind is ErrorKind.AUTH):
                raise
            return error


_PROBE_MESSAGES = ({"role": "user", "content": "Name three colours."},)
_PROBE_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string"}},
    "required": ["colour"],
    "additionalProperties": False,
}


def chat_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as OpenAI's chat completions have them, without those that say nothing."""
    body = {name: value for name, value in parameters.items() if value or name not in _SAY_NOTHING_EMPTY}
    body.pop("revision", None)
    asked = body.get("response_format")
    if asked == "json":
        body["response_format"] = {"type": "json_object"}
    elif isinstance(asked, Mapping) and asked.get("type") not in _RESPONSE_FORMATS:
        schema = {"name": "answer", "schema": asked, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def _may_be_left_out(name: str, value: object) -> bool:
    # Without `n` one answer comes, and the client asks for the rest; without `seed` an answer is only not repeatable.
    return name in ("n", "seed") or value in NEUTRAL.get(name, ())


def _refused(fault: Fault, sent: Mapping[str, Any]) -> str | None:
    """Which of the parameters that were sent is refused, as far as the words tell."""
    names = ["n" if name == "n_cmpl" else name for name in fault.refused_names()]  # llama.cpp's word for n
    named = next((name for name in names if name in sent), None)
    if named is not None and not re.search(r"\bboth\b", fault.message):
        return named
    # Claude does not take temperature and top_p both; others name what they refuse in prose, without quotes.
    words = _WORD.findall(fault.message) if len(fault.message) < 200 else []  # a longer one may quote the prompt
    spare = (name for name in names + words if name in NEUTRAL and name in sent and _may_be_left_out(name, sent[name]))
    return next(spare, named)


_WORD = re.compile(r"[a-z]+(?:_[a-z]+)*")


def _says_no_model(fault: Fault) -> bool:
    return fault.parameter == "model" or any(map(_NO_MODEL.search, (fault.code, fault.message)))
