"""What a provider is: it turns one prompt into completions over one wire, and knows its server's habits.

It does not retry, limit, store or count: the client around it does. A provider is one file in `providers/`.
"""

import os
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator

from fastdistill.core.types import Completion, LogprobBasis, Prompt, Usage
from fastdistill.model.budget import ModelBudget

ATTEMPT: ContextVar[int] = ContextVar("attempt", default=0)
"""Of the draw that is asked for, the first of several: without a seed, nothing in a request tells it from another."""


class ErrorKind(StrEnum):
    """Why a request brought no usable answer; `retry.py` says what follows."""

    REFUSED = "refused"  # nobody listens, or the name does not resolve
    RESET = "reset"  # the connection broke after it stood
    TIMEOUT = "timeout"  # ours, or a gateway's: 504
    GARBLED = "garbled"  # 200, but not what the protocol says
    RATE_LIMITED = "rate_limited"  # 429
    OVERLOADED = "overloaded"  # 408, 502, 503
    SERVER = "server_error"  # 500 and any other 5xx
    AUTH = "auth"  # 401, 403, and what else asks for a log-in: 407, redirects
    NO_MODEL = "no_model"
    TOO_LONG = "context_too_long"
    UNSUPPORTED = "unsupported"  # the server names a parameter it does not take: `parameter`
    BAD_REQUEST = "bad_request"  # any other 4xx
    NOT_RECORDED = "not_recorded"  # a recording does not have the answer


class ProviderError(Exception):
    """One request failed. The message is for people and says what to do where the provider knows it."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        retry_after: float | None = None,
        parameter: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.kind = kind
        self.retry_after = retry_after  # seconds
        self.parameter = parameter
        self.remedy = remedy  # where the transport knows better than the provider
        self.elsewhere = False  # the endpoint cools for it: what failed may go to the next one at once
        self.others_answered = True  # since the request was first sent: it may be the request's own fault
        super().__init__(message)


_ONLY_SOME_HAVE = {
    "decision": "has no typed decisions (/v1/systemone); set `read: logprobs` of the judge, or `read: json`",
    "scored": "can't score tokens that it did not sample: that takes vLLM's prompt_logprobs or SGLang's"
    " /generate; serve the model with one of them, and set `provider: vllm` or `provider: sglang`",
    "token_ids": "gives no ids of tokens; remove `token_ids`",
}


def lacks(where: str, name: str) -> ProviderError:
    """The error of a server that does not have what a prompt's parameter of this name asks for."""
    return ProviderError(ErrorKind.UNSUPPORTED, f"{where}: {_ONLY_SOME_HAVE[name]}", parameter=name)


def check_wires(where: str, prompt: Prompt, *, has: str = "") -> None:
    """Raises `lacks` for a prompt that asks for what only some servers have, and this one has not."""
    for name in _ONLY_SOME_HAVE:
        if prompt.parameters.get(name) and name != has:
            raise lacks(where, name)


@dataclass(frozen=True, slots=True)
class Load:
    """What a server's own metrics say of it, at one moment: requests worked on, and requests that wait."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an endpoint was seen to honour; None where it was not tried. Goes into the manifest.

    `n` is whether one request may bring several choices *and* counts the tokens of all of them: a server that
    counts one choice only is asked for them one by one, so that usage stays right.
    """

    endpoint: str
    server: str | None = None  # product and version, where it tells
    served_model: str | None = None
    build: str | None = None  # digest or fingerprint of the served model
    models: tuple[str, ...] = ()
    context_length: int | None = None
    slots: int | None = None  # requests worked on at a time; others wait
    n: bool | None = None
    logprobs: bool | None = None
    json_schema: bool | None = None
    seed: bool | None = None
    logprob_basis: LogprobBasis | None = None
    max_top: int | None = None  # alternatives of a token
    has_token_ids: bool | None = None
    can_score_prompt: bool | None = None  # give the log-probabilities of tokens that it did not sample
    notes: tuple[str, ...] = ()
    probe_tokens: tuple[int, int] = (0, 0)  # of the prompts and the answers that found it out, where it tells


class Price(BaseModel, frozen=True, extra="forbid"):
    """US dollars for a million tokens."""

    prompt: float = Field(0.0, ge=0)
    completion: float = Field(0.0, ge=0)
    cached: float | None = Field(None, ge=0, description="cached prompt tokens; as `prompt` if not given")

    def cost(self, usage: Usage) -> float:
        """US dollars."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        return (fresh * self.prompt + usage.cached_tokens * cached + usage.completion_tokens * self.completion) / 1e6


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """What every model's configuration has. A provider's own `Config` adds its fields."""

    provider: str
    model: str = Field(min_length=1)
    revision: str | None = Field(
        None,
        description="your own tag for what is behind the name; another one is never answered from old entries",
    )
    max_concurrency: int | None = Field(
        None, gt=0, description="requests in flight at each endpoint; by default found by itself"
    )
    timeout: float = Field(600.0, gt=0, description="seconds for one request, queueing at the server included")
    max_retries: int = Field(8, ge=0, description="for faults that pass: resets, timeouts, 408, 429, 502, 503, 504")
    price: Price | None = None
    budget: ModelBudget | None = Field(None, description="of this model alone; spent, it is not asked any more")
    hedge: bool | None = Field(
        None, description="ask a straggler a second time when slots are idle; by default only where tokens are free"
    )
    requests_per_minute: int | None = Field(None, gt=0)
    tokens_per_minute: int | None = Field(None, gt=0, description="prompt and completion tokens")

    first_concurrency: ClassVar[int] = 24
    """Requests in flight at first, where `max_concurrency` is not set: the limit then finds itself."""
    recorded: ClassVar[bool] = False
    """True: answers exist already. A prompt says which sample it is for, and each draw has its attempt as its seed."""

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if self.budget and self.budget.max_cost_usd is not None and self.price is None:
            raise ValueError("budget.max_cost_usd: needs a `price` at this model")
        return self

    @property
    def hedges(self) -> bool:
        """What `hedge` is by default."""
        return False

    def parameters(self) -> dict[str, Any]:
        """Fields of this config that would change an answer; they become part of every prompt."""
        return {} if self.revision is None else {"revision": self.revision}

    def endpoints(self) -> "Sequence[ModelConfig]":
        """One config for each server of the model."""
        return (self,)


class ServedConfig(ModelConfig):
    """A model behind one base URL or several, which share the work."""

    base_url: str | tuple[str, ...] = Field("", description="one, or a list for several servers of the same model")
    api_key: SecretStr | None = Field(None, exclude=True, description="by default from the server's own variable")

    @classmethod
    def defaults(cls, provider: str) -> tuple[str, str]:
        """The variable that a base URL comes from, and the base URL where that is not set."""
        return f"{provider.upper()}_BASE_URL", ""

    @classmethod
    def normal_url(cls, url: str) -> str:
        """One base URL as it is used; ValueError if it is not a server's, or has a secret in it."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// or https:// address")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("no user, password or query here; they would be written to files; use `api_key`")
        return parts.geturl()

    @model_validator(mode="before")
    @classmethod
    def _from_environment(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        provider = str(fields.get("provider", cls.model_fields["provider"].default))
        if fields.get("base_url") in ([], ()):
            raise ValueError("base_url: the list is empty; name a server, or leave it out")
        variable, default = cls.defaults(provider)
        url = fields.get("base_url") or os.environ.get(variable) or default
        key = fields.get("api_key") or os.environ.get(f"{provider.upper()}_API_KEY") or ""
        # A file that it comes from, like a mounted secret, leaves a line end.
        return {**fields, "base_url": url, "api_key": (key.strip() or None) if isinstance(key, str) else key}

    @field_validator("base_url")
    @classmethod
    def _normal(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        texts = given.split(",") if isinstance(given, str) else given  # a variable lists several with commas
        urls = tuple(dict.fromkeys(cls.normal_url(text.strip()) for text in texts))
        return urls[0] if len(urls) == 1 else urls

    @property
    def url(self) -> str:
        """The one base URL of a config that `endpoints` gave."""
        assert isinstance(self.base_url, str), "a provider is made for each of `endpoints`"
        return self.base_url

    def endpoints(self) -> "Sequence[ServedConfig]":
        if isinstance(self.base_url, str):
            return (self,)
        return [self.model_copy(update={"base_url": url}) for url in self.base_url]


class Provider(Protocol):
    """One wire protocol to one endpoint. Built as `Provider(config)`; one that inherits from this has its defaults."""

    Config: ClassVar[type[ModelConfig]]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was learnt while answering, for the manifest: parameters that had to be left out, and the like."""
        return ()

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        """Up to `n` completions of one request; a server may bring fewer, never more are returned.

        Raises:
            ProviderError: the request brought nothing usable.
        """
        ...

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        """Asks the endpoint what it is and, with a few one-token requests, what it honours.

        `like` is a prompt of the run, where there is one: a server may sample all requests as its first one asks for.

        Raises:
            ProviderError: it can't be used at all (nobody there, wrong key, unknown model).
        """
        ...

    async def load(self) -> Load | None:
        """How busy the server says it is; None where it does not say."""
        return None

    async def aclose(self) -> None: ...
