"""What a model cost and how busy it was, counted while it happens. Wall-clock figures: reports only, never data."""

import math
from asyncio import CancelledError
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Self

from fastdistill.core.stats import Histogram
from fastdistill.core.types import Completion, Usage
from fastdistill.model.provider import ErrorKind, Price, ProviderError

_WORKED_ON = {ErrorKind.RESET, ErrorKind.TIMEOUT, ErrorKind.GARBLED}  # the server may have, and may charge for it
TEMPLATE = 64  # tokens that a chat template adds to a prompt, at most
_LONG = 4 * TEMPLATE  # characters of a prompt beyond which its text, and not the template, makes the most of its tokens


@dataclass(slots=True)
class Meter:
    """Counters of one model. `busy` is time at the server, `queued` is waiting for a slot of ours; seconds."""

    price: Price | None = None
    requests: int = 0
    answers: int = 0  # paid for in this run
    stored: int = 0  # found in the response store
    retries: Counter[str] = field(default_factory=Counter)
    failed: dict[str, Histogram] = field(default_factory=dict)  # seconds at the server of requests that failed, by kind
    busy: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    hedged: int = 0  # requests asked a second time
    lost_tokens: int = 0  # that these may have cost where they were called off; in `usage` too
    probe_tokens: int = 0  # that first contact cost; in `usage` too
    unknown_tokens: int = 0  # that requests of which nobody said it may have cost at most; not in `usage`
    in_flight: int = 0
    peak: int = 0
    reserved_tokens: int = 0  # that the requests in flight may cost at most
    spent: str | None = None  # why nothing more is asked: the model's own budget
    first: float = 0.0  # when the first request went out, by perf_counter
    last: float = 0.0  # when the last one ended
    completion_tokens: int = 0  # of the answers that came home
    _densest: float | None = None  # tokens for a character of a long prompt, a little more than was seen
    _supposed: float = 1.0  # the same until a long one was seen: text of any language has hardly more
    _prompt_tokens: int = 0
    _completion_tokens: int = 0
    _cached_tokens: int = 0

    def answered(self, usage: Usage, characters: int) -> int:
        """An answer was paid for; its prompt has so many characters. The tokens of both."""
        self.answers += 1
        self.completion_tokens += usage.completion_tokens
        if usage.prompt_tokens and characters >= _LONG:
            self._densest = max(self._densest or 0.0, 1.1 * usage.prompt_tokens / characters)
        elif characters:
            self._supposed = max(self._supposed, (usage.prompt_tokens - TEMPLATE) / characters)
        self.paid(usage)
        return usage.prompt_tokens + usage.completion_tokens

    def probed(self, usage: Usage) -> None:
        """First contact with an endpoint cost so much."""
        self.probe_tokens += usage.prompt_tokens + usage.completion_tokens
        self.paid(usage)

    def paid(self, usage: Usage) -> None:
        """So much was paid for, or may have been."""
        self._prompt_tokens += usage.prompt_tokens
        self._completion_tokens += usage.completion_tokens
        self._cached_tokens += usage.cached_tokens

    @property
    def usage(self) -> Usage:
        """What was paid for in this run, and what requests that were called off may have cost."""
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def most_prompt_tokens(self, characters: int) -> int:
        """Of a prompt of so many characters."""
        dense = self._supposed if self._densest is None else self._densest
        return TEMPLATE + math.ceil(characters * dense)

    @property
    def tokens(self) -> int:
        """Tokens paid for in this run, prompts and answers."""
        return self._prompt_tokens + self._completion_tokens

    def worst_cost(self, tokens: int) -> float:
        """US dollars for that many tokens, at the dearer of the two prices; 0 without a price."""
        return tokens * max(self.price.prompt, self.price.completion) / 1e6 if self.price else 0.0

    @property
    def cost(self) -> float | None:
        """US dollars paid in this run; None where no price is configured."""
        return None if self.price is None else self.price.cost(self.usage)

    def report(self, concurrency: int) -> dict[str, Any]:
        """The timing report's entry; `slot_utilisation` is mean requests in flight over `concurrency`, 1 at most."""
        window = max(0.0, self.last - self.first)
        mean = self.busy.total / window if window else 0.0
        return {
            "requests": self.requests,
            "answers_paid": self.answers,
            "answers_from_store": self.stored,
            "retries": dict(sorted(self.retries.items())),
            "failed": {kind: took.summary() for kind, took in sorted(self.failed.items())},
            "hedged": self.hedged,
            "lost_tokens": self.lost_tokens,
            "probe_tokens": self.probe_tokens,
            "unknown_tokens": self.unknown_tokens,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "cached_tokens": self._cached_tokens,
            "window_s": round(window, 3),
            "requests_per_s": round(self.requests / window, 3) if window else None,
            "completion_tokens_per_s": round(self.completion_tokens / window, 1) if window else None,
            "in_flight_mean": round(mean, 2),
            "in_flight_peak": self.peak,
            "concurrency": concurrency,
            "slot_utilisation": round(min(1.0, mean / max(1, concurrency)), 4),
            "busy": self.busy.summary(),
            "queued": self.queued.summary(),
            "cost_usd": self.cost,
            "budget_spent": self.spent,
        }


@dataclass(slots=True, eq=False)
class InFlight:
    """One request in flight, which waited since `wanted` and may cost `worst` tokens; of use once, in `with`."""

    meter: Meter
    wanted: float  # seconds by perf_counter, as `sent`
    worst: int
    sent: float = 0.0
    queued: float = 0.0  # seconds before it went out
    busy: float = 0.0  # seconds that it took, once it has ended
    asked: int = 1

    def __enter__(self) -> Self:
        meter = self.meter
        self.sent = sent = perf_counter()
        self.queued = sent - self.wanted
        meter.first = meter.first or sent
        meter.requests += 1
        meter.in_flight += 1
        if meter.in_flight > meter.peak:
            meter.peak = meter.in_flight
        meter.reserved_tokens += self.worst
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        meter = self.meter
        meter.reserved_tokens -= self.asked * self.worst
        meter.in_flight -= 1
        meter.last = perf_counter()
        self.busy = busy = meter.last - self.sent
        meter.busy.add(busy)
        meter.queued.add(self.queued)
        if isinstance(error, CancelledError):
            self.untold()
        elif isinstance(error, ProviderError):
            meter.failed.setdefault(error.kind, Histogram()).add(busy)
            if error.kind in _WORKED_ON:
                self.untold()

    def resent(self) -> None:
        """The same goes out again, for its connection broke at once; what the first cost nobody says."""
        self.meter.requests += 1
        self.meter.retries[ErrorKind.RESET] += 1
        self.meter.unknown_tokens += self.worst

    def untold(self) -> None:
        """Nobody says what it cost: a budget counts the worst."""
        self.meter.unknown_tokens += self.asked * self.worst

    def again(self) -> None:
        """The same is asked a second time."""
        self.asked += 1
        self.meter.hedged += 1
        self.meter.reserved_tokens += self.worst

    def answered(self, completions: Sequence[Completion], characters: int) -> int:
        """It was answered; the tokens of it.

        One that was asked a second time is counted twice: nobody says what the request that was called off had cost by
        then, but it was for the same draw, so the winner's usage is what it would have come to.
        """
        tokens = sum([self.meter.answered(completion.usage, characters) for completion in completions])
        if self.asked > 1:
            self.meter.lost_tokens += tokens
            for completion in completions:
                self.meter.paid(completion.usage)
        return tokens
