"""Which request goes to which endpoint, and when: slots are filled at once, by the request that fits them best.

Endpoints of one model share one queue. A slot that comes free takes the oldest waiting request, unless one among the
next few shares a longer prefix with what that endpoint has seen (its prefix cache is warm for it), or has used more
recently (caches are smaller than our memory of them), or the oldest is better kept for another endpoint. The first
request of a prefix leads: while it is under way, those that would follow let others pass, but never leave a slot idle.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from itertools import islice

from fastdistill.core.types import Prompt
from fastdistill.model.limits import Limit
from fastdistill.model.provider import Capabilities, Provider
from fastdistill.model.retry import RETRY_AFTER_CAP

LOOKAHEAD = 64  # waiting requests among which a slot chooses; also how often one may be passed by others
PREFIX = 256  # characters of the shortest prefix that counts; each further one is twice as long
REMEMBERED = 4096  # prefixes of one endpoint
LONGEST_COOLING = 30.0  # seconds
LOOKS = 0.02  # seconds after which those who wait for a cooling endpoint look whether it is up, or the run ends


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
    measuring: asyncio.Task[None] | None = None
    tells: bool = False  # how busy it is
    latest: tuple[int, ...] = ()  # prefixes of the request that was sent here last
    _cooled_at: float = float("-inf")
    _refuses_until: float = 0.0  # it said so itself, or nobody listened: whatever is answered meanwhile
    _warm: OrderedDict[int, int] = field(default_factory=OrderedDict)  # prefix -> the tick at which it was used last
    _led: set[int] = field(default_factory=set)  # prefixes that requests under way warm

    @property
    def free(self) -> int:
        """Slots that a request may have; one only, as a probe, until an endpoint that failed answers again."""
        return (1 if self.coolings else self.limit.capacity) - self.in_flight

    @property
    def load(self) -> float:
        return self.in_flight / self.limit.capacity

    def answered(self) -> None:
        self.failures = self.coolings = 0
        self.cooling_until = min(self.cooling_until, self._refuses_until)

    @property
    def is_well(self) -> bool:
        """Whether it was seen to answer, and has not failed twice in a row since."""
        return self.capabilities is not None and self.failures < 2 and not self.coolings

    def broke(self, begun: float, now: float, seconds: float | None = None, *, cools: bool = True) -> None:
        """A request that began then failed. One among answers says nothing; two in a row cool the endpoint, until one
        that is under way is answered: of many requests, two in a row fail by chance.
        """
        self.failures += 1
        if cools and (self.failures > 1 or seconds):
            self.cool(begun, now, seconds, refuses=bool(seconds))

    def cool(self, begun: float, now: float, seconds: float | None = None, *, refuses: bool = True) -> None:
        """Sends nothing more here for a while: as long as it asks for, else longer each time until it answers.

        `begun` is when the request that failed began: all that were under way when the endpoint broke count once.
        """
        if begun >= self._cooled_at or not self.coolings:
            self.coolings += 1
            self._cooled_at = now
        backoff = min(LONGEST_COOLING, 0.5 * 2.0 ** min(self.coolings, 10))
        self.cooling_until = max(self.cooling_until, now + min(seconds or backoff, RETRY_AFTER_CAP))
        if refuses:
            self._refuses_until = self.cooling_until

    def knows(self, prefixes: Sequence[int]) -> tuple[int, int, bool]:
        """How many of the prefixes, from the shortest, it has seen; the tick at which the longest of these was used
        last; whether the next longer one is being computed there now.
        """
        warm, seen, used = self._warm, 0, 0
        for prefix in prefixes:  # in plain loops, as this runs up to `LOOKAHEAD` times for each request
            if (tick := warm.get(prefix)) is None:
                # Each prefix begins with the shorter ones: if the next one is not on its way, no longer one is.
                return seen, used, prefix in self._led
            seen += 1
            used = tick
        return seen, used, False

    def is_warm(self, prefixes: Sequence[int]) -> bool:
        """Whether it has seen the longest, and so all of them."""
        return not prefixes or prefixes[-1] in self._warm

    def begin(self, prefixes: tuple[int, ...]) -> None:
        """A request goes out."""
        self.in_flight += 1
        self.latest = prefixes
        if not self.is_warm(prefixes):
            self._led.update(prefixes)

    def end(self, prefixes: tuple[int, ...], tick: int) -> None:
        """One has come home: its prefixes are warm now, whoever else is under way with them."""
        self.in_flight -= 1
        self._led.difference_update(prefixes)
        _remember(self._warm, prefixes, tick, REMEMBERED)


@dataclass(slots=True, eq=False)
class Slot:
    """A request that waits for a slot, and then holds it: `async with router.slot(prompt) as endpoint`."""

    router: "Router"
    prefixes: tuple[int, ...]
    shared: tuple[int, ...]  # those that some other request had before: only these can make it fit an endpoint
    besides: Endpoint | None
    passed: int = 0
    endpoint: Endpoint | None = None
    turn: asyncio.Future[None] | None = None  # for one that must wait

    async def __aenter__(self) -> Endpoint:
        self.router.enter(self)
        if self.endpoint is None:
            self.turn = asyncio.get_running_loop().create_future()
            try:
                await self.turn
            except asyncio.CancelledError:
                self.router.leave(self)
                raise
            assert self.endpoint is not None
        return self.endpoint

    async def __aexit__(self, *_: object) -> None:
        self.router.leave(self)

    def give(self, endpoint: Endpoint) -> None:
        if self.turn is not None:
            if self.turn.done():  # it was cancelled, and has not noticed yet
                return
            self.turn.set_result(None)
        self.endpoint = endpoint
        endpoint.begin(self.prefixes)


class Router:
    """Gives out the slots of some endpoints. Lives in one event loop."""

    def __init__(self, endpoints: Sequence[Endpoint], ends: Callable[[], bool] = lambda: False) -> None:
        """`ends` says whether the run winds down: then nobody waits for an endpoint that cools."""
        self.endpoints = tuple(endpoints)
        self._ends = ends
        self._ending = False
        self._waiting: deque[Slot] = deque()
        self._asked: OrderedDict[int, int] = OrderedDict()  # prefixes of all requests, the latest last
        self._latest: tuple[Prompt | None, tuple[int, ...], str] = (None, (), "")  # prefixes, and the longest's text
        self._wake: asyncio.TimerHandle | None = None
        self._ticks = 0

    @property
    def capacity(self) -> int:
        """Slots of the endpoints that are up; of all where none is."""
        up = [endpoint for endpoint in self.endpoints if not endpoint.coolings]
        return sum(endpoint.limit.capacity for endpoint in up or self.endpoints)

    @property
    def idle(self) -> bool:
        """Whether there are slots that nobody waits for."""
        return not self._waiting and self._next(asyncio.get_running_loop().time()) is not None

    def slot(self, prompt: Prompt, besides: Endpoint | None = None) -> Slot:
        """Holds a slot for one request; waits while every endpoint is full or cooling.

        `besides` is taken only by one that is alone in line, and finds no other endpoint with a free slot.
        """
        latest, prefixes = self._latest[1], self._prefixes(prompt)
        shared = prefixes
        if prefixes is not latest:  # as it is for the draws of one prompt, and for samples about one thing
            while shared and shared[-1] not in self._asked:
                shared = shared[:-1]
            _remember(self._asked, prefixes, 0, REMEMBERED * len(self.endpoints))
        return Slot(self, prefixes, shared, besides)

    def enter(self, slot: Slot) -> None:
        self._waiting.append(slot)
        self._fill()

    def leave(self, slot: Slot) -> None:
        """Of one that has its slot, or does not want one any more."""
        if slot.endpoint is not None:
            self._ticks += 1
            slot.endpoint.end(slot.prefixes, self._ticks)
        else:
            with suppress(ValueError):  # when a slot came to it after it was cancelled
                self._waiting.remove(slot)
        self._fill()

    def _next(self, now: float, besides: Endpoint | None = None) -> Endpoint | None:
        """The endpoint with the lowest load of those that have a free slot and do not cool."""
        best = None
        for endpoint in self.endpoints:
            if endpoint.free <= 0 or endpoint is besides:
                continue
            if endpoint.cooling_until > now and not self._ending:
                if self._wake is None:  # not in the context of the sample at work, which may end before the run does
                    self._wake = asyncio.get_running_loop().call_later(LOOKS, self._woken, context=Context())
            elif best is None or endpoint.load < best.load:
                best = endpoint
        return best

    def _fill(self) -> None:
        """Hands out every slot that is free."""
        if not self._waiting:
            return
        now = asyncio.get_running_loop().time()
        while self._waiting:
            endpoint = self._next(now)
            if endpoint is None:
                return
            if len(self._waiting) == 1 and self._waiting[0].besides is endpoint:
                endpoint = self._next(now, endpoint) or endpoint
            self._choose(endpoint).give(endpoint)

    def _choose(self, endpoint: Endpoint) -> Slot:
        """Takes the request that fits an endpoint best off the queue; of equals the oldest."""
        oldest = self._waiting[0]
        if len(self._waiting) == 1 or oldest.passed >= LOOKAHEAD:
            return self._waiting.popleft()
        # What goes on where the endpoint was last, and was answered there, fits as well as anything can.
        if oldest.prefixes == endpoint.latest and endpoint.is_warm(oldest.prefixes):
            return self._waiting.popleft()
        fits: dict[int | None, tuple[int, int]] = {None: (0, 0)}  # by the longest prefix, which stands for all of them
        best, best_fit = 0, (-len(oldest.prefixes) - 1, 0)
        for at, slot in enumerate(islice(self._waiting, LOOKAHEAD)):
            longest = slot.shared[-1] if slot.shared else None
            if (fit := fits.get(longest)) is None:
                fit = fits[longest] = self._fit(endpoint, slot.shared)
            if fit > best_fit:
                best, best_fit = at, fit
        oldest.passed += 1
        chosen = self._waiting[best]
        del self._waiting[best]
        return chosen

    def _fit(self, endpoint: Endpoint, prefixes: tuple[int, ...]) -> tuple[int, int]:
        here, used, follows = endpoint.knows(prefixes)
        elsewhere, used_elsewhere = here, 0
        for other in self.endpoints:
            if other is not endpoint:
                seen, tick, _ = other.knows(prefixes)
                if seen >= elsewhere and seen:
                    elsewhere, used_elsewhere = seen, max(used_elsewhere, tick)
        behind = len(prefixes) if follows else 0
        return (2 * here - elsewhere - behind, used - used_elsewhere)

    def _prefixes(self, prompt: Prompt) -> tuple[int, ...]:
        """Hashes of a prompt's beginnings of 256, 512, 1,024 ... characters, the whole prompt not among them."""
        latest, prefixes, longest = self._latest
        if prompt is not latest:  # the draws of one prompt come one after the other
            text = "\x1f".join([message["content"] for message in prompt.messages])
            count = ((len(text) - 1) // PREFIX).bit_length()
            if count != len(prefixes) or not text.startswith(longest):
                prefixes = tuple([hash(text[: PREFIX << power]) for power in range(count)])
                longest = text[: PREFIX << count - 1] if count else ""
            self._latest = (prompt, prefixes, longest)
        return prefixes

    def _woken(self) -> None:
        """Looks again, for all that wait."""
        self._wake = None
        self._ending = self._ending or self._ends()
        self._fill()


def _remember(prefixes: OrderedDict[int, int], new: Sequence[int], tick: int, most: int) -> None:
    for prefix in new:
        prefixes[prefix] = tick
        prefixes.move_to_end(prefix)
    while len(prefixes) > most:
        prefixes.popitem(last=False)
