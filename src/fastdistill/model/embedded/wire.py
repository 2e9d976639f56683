"""What the embedded teacher's process and its provider say to each other: one JSON value a line.

The first line from the process is `Ready`; each line to it is a `Request`, or the id of one that is called off; each
further line from it is a `Result`, in the order of completion. A request that is called off gets no result if it had
none yet.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from fastdistill.core.types import Completion, Message


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and how to answer it; bounds hold for what is decoded or converted.

    A token is drawn as in vLLM: temperature, then min_p, top_k and top_p; temperature 0 is greedy, and top_k 0, top_p 1
    and min_p 0 are off. Choice i under seed s equals choice 0 under seed s + i, whatever else is running; without a
    seed each choice is drawn afresh. `top_logprobs` only counts with `logprobs`.
    """

    id: int = 0
    messages: tuple[Message, ...] = ()
    n: Annotated[int, Meta(ge=1)] = 1
    max_tokens: Annotated[int, Meta(ge=1)] = 128
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0


class Ready(msgspec.Struct):
    model: str
    context: int


class Result(msgspec.Struct, omit_defaults=True):
    """The choices, or why the prompt is too long.

    Usage counts every token computed: the end token, and what a stop text cut off, too. Log-probabilities are the
    model's own (temperature 1).
    """

    id: int
    choices: tuple[Completion, ...] = ()
    too_long: str | None = None
