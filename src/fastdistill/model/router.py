"""Which request goes to which endpoint, and when: slots are filled at once, by the request that fits them best.

Endpoints of one model share one queue. A slot that comes free takes the oldest waiting request, unless one among the
next few shares a longer prefix with what that endpoint has seen (its prefix cache is warm for it), or has used more
recently (caches are smaller than our memory of them), or the oldest is better kept for another endpoint. The first
request of a prefix leads: while it is under way, those that would follow let others pass, but never leave a slot idle.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice

from fastdistill.core.types import Prompt
from fastdistill.model.limits import Limit
from fastdistill.model.provider import Capabilities, Provider

LOOKAHEAD = 64  # waiting requests among which a slot chooses; also how often one may be passed by others
PREFIX = 256  # characters of the shortest prefix that counts; each further one is twice as long
REMEMBERED = 4096  # prefixes of one endpoint
LONGEST_COOLING = 30.0  # seconds
LOOKS = 0.5  # seconds after which those who wait for a cooling endpoint look whether the run ends


@dataclass(slots=True, eq=False)
class Endpoint:
    """One server of a model, and what is known of it."""

    provider: Provider
    limit: Limit
    capabilities: Capabilities | None = None  # once it was contacted
    asks_n: bool = False  # several choices in one request, once it has shown that it can
    in_flight: int = 0
    failures: int = 0  # since its last answer
    coolings: int = 0  # since its last answer
    cooling_until: float = 0.0
    measured_at: float = 0.0
    tells: bool = False  # how busy it is
    latest: tuple[int, ...] = ()  # prefixes of the request that was sent here last
    _cooled_at: float = float("-inf")
    _warm: OrderedDict[int, int] = field(default_factory=OrderedDict)  # prefix -> the tick at which it was used last
    _led: Counter[int] = field(default_factory=Counter)

    @property
    def free(self) -> int:
        """Slots that a request may have; one only, as a probe, until an endpoint that failed answers again."""
        return (1 if self.coolings else self.limit.capacity) - self.in_flight

    @property
    def load(self) -> float:
        return self.in_flight / max(1, self.limit.capacity)

    def answered(self) -> None:
        self.failures = self.coolings = 0

    def broke(self, begun: float, now: float, seconds: float | None = None) -> None:
        """A request that began then failed. One among answers says nothing; two in a row cool the endpoint."""
        self.failures += 1
        if self.failures > 1 or seconds is not None:
            self.cool(begun, now, seconds)

    def cool(self, begun: float, now: float, seconds: float | None = None) -> None:
        """Sends nothing more here for a while: as long as it asks for, else longer each time until it answers.

        `begun` is when the request that failed began: all that were under way when the endpoint broke count once.
        """
        if begun >= self._cooled_at or not self.coolings:
            self.coolings += 1
            self._cooled_at = now
        backoff = min(LONGEST_COOLING, 0.5 * 2.0 ** min(self.coolings, 10))
        self.cooling_until = max(self.cooling_until, now + (backoff if seconds is None else seconds))

    def warmth(self, prefixes: Sequence[int]) -> int:
        """How many of the prefixes, from the shortest, it has seen."""
        seen = 0
        for prefix in prefixes:  # in a loop, as this runs some hundred times for each request
            if prefix not in self._warm:
                break
            seen += 1
        return seen

    def used(self, prefixes: Sequence[int], seen: int) -> int:
        """The tick at which the longest of the `seen` prefixes was used last."""
        return self._warm[prefixes[seen - 1]] if seen else 0

    def follows(self, prefixes: Sequence[int], seen: int) -> bool:
        """Whether a longer prefix than the `seen` ones that it has is being computed there now."""
        # Each prefix begins with the shorter ones: if the next one is not on its way, no longer one is.
        return seen < len(prefixes) and prefixes[seen] in self._led

    def begin(self, prefixes: tuple[int, ...]) -> None:
        self.in_flight += 1
        self.latest = prefixes
        self._led.update(prefixes)

    def end(self, prefixes: Sequence[int], tick: int) -> None:
        self.in_flight -= 1
        for prefix in prefixes:
            self._led[prefix] -= 1
            if self._led[prefix] <= 0:
                del self._led[prefix]
            self._warm[prefix] = tick
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

    def __init__(self, endpoints: Sequence[Endpoint], ends: Callable[[], bool] = lambda: False) -> None:
        """`ends` says whether the run winds down: then nobody waits for an endpoint that cools."""
        self.endpoints = tuple(endpoints)
        self._ends = ends
        self._ending = False
        self._waiting: deque[_Waiting] = deque()
        self._wake: asyncio.TimerHandle | None = None
        self._ticks = 0

    @property
    def capacity(self) -> int:
        return sum(endpoint.limit.capacity for endpoint in self.endpoints)

    @property
    def idle(self) -> bool:
        """Whether there are slots that nobody waits for."""
        return not self._waiting and bool(self._ready(asyncio.get_running_loop().time()))

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
                waiting.slot.result().end(prefixes, self._tick())
            else:
                with suppress(ValueError):  # when a slot came to it after it was cancelled
                    self._waiting.remove(waiting)
            self._fill()
            raise
        try:
            yield endpoint
        finally:
            endpoint.end(prefixes, self._tick())
            self._fill()

    @contextmanager
    def spare(self, prompt: Prompt, besides: Endpoint) -> Iterator[Endpoint | None]:
        """Holds a slot that nobody waits for, at another endpoint if there is one; None if all are taken."""
        ready = [] if self._waiting else self._ready(asyncio.get_running_loop().time())
        if not ready:
            yield None
            return
        endpoint = min(ready, key=lambda e: (e is besides, e.load))
        prefixes = _prefixes(prompt)
        endpoint.begin(prefixes)
        try:
            yield endpoint
        finally:
            endpoint.end(prefixes, self._tick())
            self._fill()

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def _ready(self, now: float) -> list[Endpoint]:
        return [e for e in self.endpoints if e.free > 0 and (e.cooling_until <= now or self._ending)]

    def _fill(self) -> None:
        """Hands out every slot that is free."""
        while self._waiting:
            now = asyncio.get_running_loop().time()
            ready = self._ready(now)
            if not ready:
                self._wake_when_cool(now)
                return
            endpoint = min(ready, key=lambda e: e.load)
            waiting = self._choose(endpoint)
            if not waiting.slot.done():  # else it was cancelled, and has not noticed yet
                endpoint.begin(waiting.prefixes)
                waiting.slot.set_result(endpoint)

    def _choose(self, endpoint: Endpoint) -> _Waiting:
        """Takes the request that fits an endpoint best off the queue; of equals the oldest."""
        oldest = self._waiting[0]
        # What goes on where the endpoint was last, and was answered there, fits as well as anything can.
        goes_on = oldest.prefixes == endpoint.latest and endpoint.warmth(oldest.prefixes) == len(oldest.prefixes)
        settled = not oldest.prefixes or goes_on or oldest.passed >= LOOKAHEAD
        if settled or len(self._waiting) == 1:
            return self._waiting.popleft()
        best, best_fit = 0, self._fit(endpoint, oldest)
        for at, waiting in enumerate(islice(self._waiting, LOOKAHEAD)):
            if at and (fit := self._fit(endpoint, waiting)) > best_fit:
                best, best_fit = at, fit
        if best == 0:
            return self._waiting.popleft()
        oldest.passed += 1
        chosen = self._waiting[best]
        del self._waiting[best]
        return chosen

    def _fit(self, endpoint: Endpoint, waiting: _Waiting) -> tuple[int, int]:
        prefixes = waiting.prefixes
        here = endpoint.warmth(prefixes)
        used = endpoint.used(prefixes, here)
        elsewhere, used_elsewhere = here, 0
        for other in self.endpoints:
            if other is not endpoint and (seen := other.warmth(prefixes)) >= elsewhere and seen:
                elsewhere = seen
                used_elsewhere = max(used_elsewhere, other.used(prefixes, seen))
        behind = len(prefixes) if endpoint.follows(prefixes, here) else 0
        return (2 * here - elsewhere - behind, used - used_elsewhere)

    def _wake_when_cool(self, now: float) -> None:
        cooling = [e.cooling_until for e in self.endpoints if e.free > 0 and e.cooling_until > now]
        if not cooling:
            return
        at = min(min(cooling) + 0.001, now + LOOKS)
        if self._wake is not None and self._wake.when() > at:
            self._wake.cancel()
            self._wake = None
        if self._wake is None:
            self._wake = asyncio.get_running_loop().call_at(at, self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._ending = self._ending or self._ends()
        self._fill()


def _prefixes(prompt: Prompt) -> tuple[int, ...]:
    """Hashes of a prompt's beginnings of 256, 512, 1,024 ... characters, the whole prompt not among them."""
    if sum(len(message["content"]) for message in prompt.messages) <= PREFIX:
        return ()
    text = "\x1f".join(message["content"] for message in prompt.messages)
    lengths = (PREFIX << power for power in range(len(text).bit_length()))
    return tuple(hash(text[:length]) for length in lengths if length < len(text))
