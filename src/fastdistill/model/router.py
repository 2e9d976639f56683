"""Which request goes to which endpoint, and when: slots are filled at once, by the request that fits them best.

Endpoints of one model share one queue. A slot that comes free takes the oldest waiting request, unless one among the
next few shares a longer prefix with what that endpoint has seen (its prefix cache is warm for it), or the oldest is
better kept for another endpoint. The first request of a prefix leads: while it is under way, those that would follow
let others pass, but never leave a slot idle.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastdistill.core.types import Prompt
from fastdistill.model.limits import Limit
from fastdistill.model.provider import Capabilities, Provider

LOOKAHEAD = 64  # waiting requests among which a slot chooses; also how often one may be passed by others
PREFIX = 256  # characters of the shortest prefix that counts; each further one is twice as long
REMEMBERED = 4096  # prefixes of one endpoint
LONGEST_COOLING = 30.0  # seconds


@dataclass(slots=True, eq=False)
class Endpoint:
    """One server of a model, and what is known of it."""

    provider: Provider
    limit: Limit
    capabilities: Capabilities | None = None  # once it was contacted
    asks_n: bool = False  # several choices in one request, once it has shown that it can
    in_flight: int = 0
    failures: int = 0  # since its last answer
    cooling_until: float = 0.0
    measured_at: float = 0.0
    _warm: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _led: Counter[int] = field(default_factory=Counter)

    @property
    def free(self) -> int:
        return self.limit.capacity - self.in_flight

    @property
    def load(self) -> float:
        return self.in_flight / max(1, self.limit.capacity)

    def answered(self) -> None:
        self.failures = 0

    def cool(self, now: float, seconds: float | None = None) -> None:
        """Sends nothing more here for a while: as long as it asks for, else longer with every failure in a row."""
        self.failures += 1
        backoff = min(LONGEST_COOLING, 0.5 * 2.0 ** min(self.failures, 10))
        self.cooling_until = max(self.cooling_until, now + (backoff if seconds is None else seconds))

    def warmth(self, prefixes: Sequence[int]) -> int:
        """How many of the prefixes, from the shortest, it has seen."""
        return next((at for at, prefix in enumerate(prefixes) if prefix not in self._warm), len(prefixes))

    def follows(self, prefixes: Sequence[int]) -> bool:
        """Whether a longer prefix than it has seen is being computed there now."""
        return any(prefix in self._led for prefix in prefixes[self.warmth(prefixes) :])

    def begin(self, prefixes: Sequence[int]) -> None:
        self.in_flight += 1
        self._led.update(prefixes)

    def end(self, prefixes: Sequence[int]) -> None:
        self.in_flight -= 1
        self._led -= Counter(prefixes)
        for prefix in prefixes:
            self._warm[prefix] = None
            self._warm.move_to_end(prefix)
        while len(self._warm) > REMEMBERED:
            self._warm.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Waiting:
    slot: "asyncio.Future[Endpoint]"
    prefixes: tuple[int, ...]
    passed: int = 0


class Router:
    """Gives out the slots of some endpoints. Lives in one event loop."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self._waiting: deque[_Waiting] = deque()
        self._wake: asyncio.TimerHandle | None = None

    @property
    def capacity(self) -> int:
        return sum(endpoint.limit.capacity for endpoint in self.endpoints)

    @property
    def idle(self) -> bool:
        """Whether there are slots that nobody waits for."""
        return not self._waiting and any(endpoint.free > 0 for endpoint in self.endpoints)

    @asynccontextmanager
    async def slot(self, prompt: Prompt) -> AsyncIterator[Endpoint]:
        """Holds a slot for one request; waits while every endpoint is full or cooling."""
        prefixes = _prefixes(prompt)
        waiting = _Waiting(asyncio.get_running_loop().create_future(), prefixes)
        self._waiting.append(waiting)
        self._fill()
        try:
            endpoint = await waiting.slot
        except asyncio.CancelledError:
            if waiting.slot.done() and not waiting.slot.cancelled():
                waiting.slot.result().end(prefixes)
            else:
                self._waiting.remove(waiting)
            self._fill()
            raise
        try:
            yield endpoint
        finally:
            endpoint.end(prefixes)
            self._fill()

    def _fill(self) -> None:
        """Hands out every slot that is free."""
        while self._waiting:
            now = asyncio.get_running_loop().time()
            ready = [e for e in self.endpoints if e.free > 0 and e.cooling_until <= now]
            if not ready:
                self._wake_when_cool(now)
                return
            endpoint = min(ready, key=lambda e: e.load)
            waiting = self._choose(endpoint)
            endpoint.begin(waiting.prefixes)
            waiting.slot.set_result(endpoint)

    def _choose(self, endpoint: Endpoint) -> _Waiting:
        """Takes the request that fits an endpoint best off the queue; of equals the oldest."""
        oldest = self._waiting[0]
        if len(self._waiting) == 1 or not oldest.prefixes or oldest.passed >= LOOKAHEAD:
            return self._waiting.popleft()
        best, best_fit = 0, self._fit(endpoint, oldest)
        for at in range(1, min(LOOKAHEAD, len(self._waiting))):
            if (fit := self._fit(endpoint, self._waiting[at])) > best_fit:
                best, best_fit = at, fit
        if best == 0:
            return self._waiting.popleft()
        oldest.passed += 1
        chosen = self._waiting[best]
        del self._waiting[best]
        return chosen

    def _fit(self, endpoint: Endpoint, waiting: _Waiting) -> float:
        here = endpoint.warmth(waiting.prefixes)
        elsewhere = max((e.warmth(waiting.prefixes) for e in self.endpoints if e is not endpoint), default=0)
        return here - max(0, elsewhere - here) - (len(waiting.prefixes) if endpoint.follows(waiting.prefixes) else 0)

    def _wake_when_cool(self, now: float) -> None:
        cooling = [e.cooling_until for e in self.endpoints if e.free > 0 and e.cooling_until > now]
        if cooling and self._wake is None:
            self._wake = asyncio.get_running_loop().call_at(min(cooling) + 0.001, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._fill()


def _prefixes(prompt: Prompt) -> tuple[int, ...]:
    """Hashes of a prompt's beginnings of 256, 512, 1,024 ... characters, the whole prompt not among them."""
    if sum(len(message["content"]) for message in prompt.messages) <= PREFIX:
        return ()
    text = "\x1f".join(message["content"] for message in prompt.messages)
    lengths = (PREFIX << power for power in range(len(text).bit_length()))
    return tuple(hash(text[:length]) for length in lengths if length < len(text))
