"""What the embedded teacher's process and its provider say to each other: one JSON object a line.

The first line from the process is `Ready`; each line to it is `Asked` or `Cancelled`, each further line from it
`Result`, in the order of completion. Choice i under seed s equals choice 0 under seed s + i, whatever else is running.
A cancelled request gets no result if it had none yet.
"""

from typing import Annotated, Literal, TypeAlias, TypedDict

import msgspec
from msgspec import Meta

from fastdistill.core.types import FinishReason, TokenLogprob

Key: TypeAlias = str | int | float


class Turn(TypedDict):
    role: str
    content: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is drawn: as in vLLM, temperature, then min_p, top_k and top_p. Temperature 0 is greedy.

    top_k 0, top_p 1 and min_p 0 are off. Without a seed each choice is drawn afresh.
    """

    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0)] | None = None


class Request(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt and how to answer it; bounds hold for what is decoded. `top_logprobs` only counts with `logprobs`."""

    messages: tuple[Turn, ...]
    n: Annotated[int, Meta(ge=1)] = 1
    max_tokens: Annotated[int, Meta(ge=1)] = 128
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0


class Choice(msgspec.Struct, frozen=True):
    """One answer. `tokens` counts every token computed: the end token, and what a stop text cut off, too.

    Log-probabilities are the model's own (temperature 1).
    """

    text: str
    finish_reason: FinishReason
    tokens: int
    logprobs: tuple[TokenLogprob, ...] | None


class Asked(Request, frozen=True, kw_only=True):
    id: Key


class Cancelled(msgspec.Struct):
    cancel: Key


class Ready(msgspec.Struct):
    model: str
    context: int


class Result(msgspec.Struct, omit_defaults=True):
    """The choices, or what is wrong with the request."""

    id: Key | None
    choices: tuple[Choice, ...] = ()
    prompt_tokens: int = 0
    error: str | None = None
    code: Literal["context_length_exceeded", "invalid_request", None] = None
