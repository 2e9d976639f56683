"""What a model cost and how busy it was, counted while it happens. Wall-clock figures: reports only, never data."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from fastdistill.core.stats import Histogram
from fastdistill.core.types import Completion, Usage
from fastdistill.model.provider import Price


@dataclass(slots=True)
class Meter:
    """Counters of one model. `busy` is time at the server, `queued` is waiting for a slot of ours; seconds."""

    price: Price | None = None
    requests: int = 0
    answers: int = 0  # paid for in this run
    stored: int = 0  # found in the response store
    retries: Counter[str] = field(default_factory=Counter)
    usage: Usage = field(default_factory=Usage)
    busy: Histogram = field(default_factory=Histogram)
    queued: Histogram = field(default_factory=Histogram)
    hedged: int = 0  # requests asked a second time
    in_flight: int = 0
    peak: int = 0
    reserved_tokens: int = 0  # that the requests in flight may cost at most
    reserved_cost: float = 0.0  # US dollars, likewise
    first: float | None = None
    last: float | None = None
    _densest: float | None = None  # tokens for a character of a prompt, the most that was seen
    _integral: float = 0.0  # in-flight requests times seconds
    _changed: float = 0.0

    @contextmanager
    def request(self, queued: float, tokens: int) -> Iterator[None]:
        """Holds one request in flight, which waited `queued` seconds and may cost up to `tokens`."""
        begun = self._move(+1)
        self.first = self.first or begun
        self.requests += 1
        try:
            with self._reserved(tokens):
                yield
        finally:
            self.last = self._move(-1)
            self.busy.add(self.last - begun)
            self.queued.add(queued)

    @contextmanager
    def again(self, tokens: int) -> Iterator[None]:
        """Holds a second request for the same answer in flight."""
        self.hedged += 1
        with self._reserved(tokens):
            yield

    def answered(self, completion: Completion, characters: int) -> None:
        """An answer was paid for; its prompt has so many characters."""
        self.answers += 1
        if completion.usage.prompt_tokens and characters:
            ratio = completion.usage.prompt_tokens / characters
            self._densest = max(self._densest or 0.0, ratio)
        used, new = self.usage, completion.usage
        self.usage = Usage(
            used.prompt_tokens + new.prompt_tokens,
            used.completion_tokens + new.completion_tokens,
            used.cached_tokens + new.cached_tokens,
            used.reasoning_tokens + new.reasoning_tokens,
        )

    @property
    def tokens_per_character(self) -> float:
        """Of a prompt, at most: before the first answer 1, for text of any language has hardly more."""
        return 1.0 if self._densest is None else 1.1 * self._densest

    @property
    def tokens(self) -> int:
        """Tokens paid for in this run, prompts and answers."""
        return self.usage.prompt_tokens + self.usage.completion_tokens

    def worst_cost(self, tokens: int) -> float:
        """US dollars for that many tokens, at the dearer of the two prices; 0 without a price."""
        return tokens * max(self.price.prompt, self.price.completion) / 1e6 if self.price else 0.0

    @property
    def cost(self) -> float | None:
        """US dollars paid in this run; None where no price is configured."""
        return None if self.price is None else self.price.cost(self.usage)

    def report(self, concurrency: int) -> dict[str, Any]:
        """The timing report's entry; `slot_utilisation` is mean requests in flight over `concurrency`."""
        window = (self.last - self.first) if self.first is not None and self.last is not None else 0.0
        mean = self._integral / window if window else 0.0
        return {
            "requests": self.requests,
            "answers_paid": self.answers,
            "answers_from_store": self.stored,
            "retries": dict(sorted(self.retries.items())),
            "hedged": self.hedged,
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "window_s": round(window, 3),
            "requests_per_s": round(self.requests / window, 3) if window else None,
            "completion_tokens_per_s": round(self.usage.completion_tokens / window, 1) if window else None,
            "in_flight_mean": round(mean, 2),
            "in_flight_peak": self.peak,
            "concurrency": concurrency,
            "slot_utilisation": round(mean / max(1, concurrency), 4),
            "busy": self.busy.summary(),
            "queued": self.queued.summary(),
            "cost_usd": self.cost,
        }

    @contextmanager
    def _reserved(self, tokens: int) -> Iterator[None]:
        dollars = self.worst_cost(tokens)
        self.reserved_tokens += tokens
        self.reserved_cost += dollars
        try:
            yield
        finally:
            self.reserved_tokens -= tokens
            self.reserved_cost -= dollars

    def _move(self, change: int) -> float:
        now = perf_counter()
        self._integral += self.in_flight * (now - self._changed) if self._changed else 0.0
        self.in_flight += change
        self.peak = max(self.peak, self.in_flight)
        self._changed = now
        return now
