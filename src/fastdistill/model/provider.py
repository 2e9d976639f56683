"""What a provider is: it turns one prompt into completions over one wire, and knows its server's habits.

It does not retry, limit, store or count: the client around it does. A provider is one file in `providers/`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from fastdistill.core.types import Completion, Prompt


class ErrorKind(StrEnum):
    """Why a request brought no usable answer; `retry.py` says what follows."""

    REFUSED = "refused"  # nobody listens, or the name does not resolve
    RESET = "reset"  # the connection broke after it stood
    TIMEOUT = "timeout"
    GARBLED = "garbled"  # 200, but not what the protocol says
    RATE_LIMITED = "rate_limited"  # 429
    OVERLOADED = "overloaded"  # 408, 502, 503, 504
    SERVER = "server_error"  # 500 and any other 5xx
    AUTH = "auth"  # 401, 403
    NO_MODEL = "no_model"
    TOO_LONG = "context_too_long"
    UNSUPPORTED = "unsupported"  # the server names a parameter it does not take: `parameter`
    BAD_REQUEST = "bad_request"  # any other 4xx


class ProviderError(Exception):
    """One request failed. The message is for people and says what to do where the provider knows it."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        parameter: str | None = None,
    ) -> None:
        self.kind = kind
        self.status = status
        self.retry_after = retry_after  # seconds
        self.parameter = parameter
        super().__init__(message)


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
    n: bool | None = None
    logprobs: bool | None = None
    json_schema: bool | None = None
    seed: bool | None = None
    notes: tuple[str, ...] = ()


class Price(BaseModel):
    """US dollars for a million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: float = Field(0.0, ge=0)
    completion: float = Field(0.0, ge=0)
    cached: float | None = Field(None, ge=0, description="cached prompt tokens; as `prompt` if not given")


class ModelConfig(BaseModel):
    """What every model's configuration has. A provider's own `Config` adds its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: str
    model: str = Field(min_length=1)
    revision: str | None = Field(
        None,
        description="your own tag for what is behind the name; another one is never answered from old entries",
    )
    max_concurrency: int | None = Field(None, gt=0, description="requests in flight")
    timeout: float = Field(600.0, gt=0, description="seconds for one request, queueing at the server included")
    max_retries: int = Field(8, ge=0, description="for faults that pass: resets, timeouts, 408, 429, 502, 503, 504")
    price: Price | None = None

    default_concurrency: ClassVar[int] = 32

    def parameters(self) -> dict[str, Any]:
        """Fields of this config that would change an answer; they become part of every prompt."""
        return {} if self.revision is None else {"revision": self.revision}

    @property
    def concurrency(self) -> int:
        return self.max_concurrency or self.default_concurrency


class Provider(Protocol):
    """One wire protocol to one endpoint. Built as `Provider(config)`; used inside `async with`."""

    kind: ClassVar[str]
    Config: ClassVar[type[ModelConfig]]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was learnt while answering, for the manifest: parameters that had to be left out, and the like."""
        ...

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        """Up to `n` completions of one request; a server may bring fewer, never more are returned.

        Raises:
            ProviderError: the request brought nothing usable.
        """
        ...

    async def probe(self) -> Capabilities:
        """Asks the endpoint what it is and, with a few one-token requests, what it honours.

        Raises:
            ProviderError: it can't be used at all (nobody there, wrong key, unknown model).
        """
        ...

    async def aclose(self) -> None: ...
