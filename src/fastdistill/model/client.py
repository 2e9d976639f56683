"""The one way to a model: store → budget → slot → provider → meter. What is stored is never asked for again.

The client retries, tops up choices that a server left out, and lets two samples that ask the same thing share one
answer. It knows no wire protocol (providers do) and no file format (the store does).
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice, repeat
from time import perf_counter
from typing import Any, Protocol

from fastdistill.core.bill import BILLS
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import FatalError, NotAsked, SampleError, TeacherError, Unreachable, together
from fastdistill.core.run import AT_WORK
from fastdistill.core.stats import Histogram
from fastdistill.core.timing import observe
from fastdistill.core.turns import give_turn
from fastdistill.core.types import Answer, Completion, Draw, Message, Prompt, Sample, Usage
from fastdistill.model.budget import OwnBrake
from fastdistill.model.hedge import Hedge
from fastdistill.model.limits import AdaptiveLimit, Limit, Pace
from fastdistill.model.meter import InFlight, Meter
from fastdistill.model.provider import ATTEMPT, Capabilities, ErrorKind, ModelConfig, Provider, ProviderError
from fastdistill.model.retry import GiveUp, Retry, Stop, decide
from fastdistill.model.router import Endpoint, Router
from fastdistill.model.transport import RESENDS


class ResponseStore(Protocol):
    """Answers that were paid for, by key."""

    def get(self, key: str) -> Completion | None: ...

    async def put(self, prompt: Prompt, answers: Sequence[Answer]) -> None:
        """Returns once the answers would survive the process being killed."""
        ...


class Brake(Protocol):
    """Says whether one more request may go out; those in flight come home in any case."""

    def check(self, tokens: int, dollars: float) -> bool:
        """Whether a request of up to so many tokens and dollars must wait for what those in flight turn out to cost.

        Raises:
            NotAsked: the run has enough, or the request would exceed its budget in any case; TimeUp: too late.
            FatalError: the run must stop.
        """
        ...

    async def pause(self, seconds: float) -> None:
        """Sleeps, but not on when the run begins to wind down."""
        ...

    def turn(self) -> "asyncio.Future[None] | None":
        """What to wait for before anything is asked for the sample that is worked on; None: its turn has come."""
        ...

    def asks(self) -> None:
        """The sample that is worked on waits for what is asked for another: it holds up nobody's turn."""
        ...


class ModelClient:
    """Implements `core.step.Model` for one configured model, with one endpoint or several.

    Without providers it answers from the store alone; what is not there is a SampleError, `not_stored`.
    """

    def __init__(
        self, name: str, config: ModelConfig, providers: Sequence[Provider], store: ResponseStore, brake: Brake
    ) -> None:
        self.name = name
        self.config = config
        self.meter = Meter(config.price)
        self.router = Router([Endpoint(provider, _limit(config)) for provider in providers], ends=self._ends)
        self._store = store
        self._brake = OwnBrake(name, config.budget, self.meter, brake) if config.budget else brake
        self._pace = Pace(config.requests_per_minute, config.tokens_per_minute)
        hedges = (config.hedges if config.hedge is None else config.hedge) and self._pace.unlimited
        self._hedge = Hedge[list[Completion]](self._due) if hedges else None
        self._pacing = asyncio.Lock()
        self._probing = asyncio.Lock()
        self._probed = False
        self._refusal: TeacherError | None = None
        self._refuses_until = 0.0  # by perf_counter
        self._unstorable: FatalError | None = None
        self._asking: dict[str, list[asyncio.Future[None]]] = {}  # by key, those who wait for the same answer
        self._asked_with: tuple[DecodeProfile | None, dict[str, Any], dict[str, Any]] = (None, {}, {})
        self._sizes: tuple[Mapping[str, Any], int, int] = ({}, 0, 0)  # of the latest parameters: see `_most`
        self._answered_at = 0.0  # when the last answer came, by perf_counter
        self._scouted_at = 0.0  # when a server that nobody reached was last looked for
        self._took = Histogram()  # seconds, of requests that were answered
        self._longest = (0, 0.0)  # of how many of them, the 99th percentile in seconds

    def prompt(
        self, messages: Sequence[Message], decode: DecodeProfile, extra: dict[str, Any], sample: Sample | None = None
    ) -> Prompt:
        same, same_extra, parameters = self._asked_with
        if decode is not same or extra is not same_extra:
            parameters = decode.parameters() | self.config.parameters() | extra
            self._asked_with = (decode, extra, parameters)
        if self.config.recorded and sample is not None:
            parameters = parameters | {"sample": [sample.task_id, sample.sample_id]}
        return Prompt(self.config.provider, self.config.model, tuple(messages), parameters)

    def stored(self, prompt: Prompt, draws: Sequence[Draw]) -> bool:
        return all(self._store.get(draw.key(prompt)) is not None for draw in draws)

    async def generate(self, prompt: Prompt, draws: Sequence[Draw]) -> list[Answer | SampleError]:
        keys = [draw.key(prompt) for draw in draws]
        results: dict[str, Answer | SampleError] = {}
        missing = dict(zip(keys, draws, strict=True))
        while missing:
            mine: dict[str, Draw] = {}
            for key, draw in missing.items():
                if completion := self._store.get(key):
                    self.meter.stored += 1
                    results[key] = Answer(draw, key, completion, stored=True)
                    if not mine:  # else others might begin to ask for the same meanwhile
                        await give_turn()
                elif key not in self._asking:
                    mine[key] = draw
            if mine and (turn := self._brake.turn()) is not None:
                await turn  # then look again: others may have asked for the same
            elif mine:
                results |= await self._ask_once(prompt, mine)
                if len(mine) == len(missing):
                    break
            elif others := [self._asking[key] for key in missing if key in self._asking]:
                asked = asyncio.get_running_loop().create_future()
                others[0].append(asked)
                self._brake.asks()
                await asked  # another sample asks the very same; then look again
            missing = {key: draw for key, draw in missing.items() if key not in results}
        if (bills := BILLS.get()) is not None:
            answers = [each for each in results.values() if isinstance(each, Answer)]
            bills[AT_WORK.get()].update({each.key: (self.name, each.completion.usage) for each in answers})
        return [*map(results.__getitem__, keys)]

    async def ready(self, like: Prompt | None = None) -> None:
        """Contacts the endpoints, once, and learns what they honour; `like` as for `Provider.probe`.

        After an outage that outlasted all retries one request looks again now and then, and the others are refused.

        Raises:
            TeacherError: none can be used, or one refuses for good; the message says what to do.
            NotAsked: the run has enough.
        """
        if self._probed:
            return
        before = self._refusal
        if before is not None and (perf_counter() < self._refuses_until or self._probing.locked()):
            raise before.with_traceback(None)  # or each time adds to the last one's, and keeps its frames
        async with self._probing:
            if before is None and self._refusal is not None:
                raise self._refusal
            if not self._probed:
                errors = await self._probe_all(like)
                hopeless = [error for error in errors if error.kind in (ErrorKind.AUTH, ErrorKind.NO_MODEL)]
                if hopeless or len(errors) == len(self.router.endpoints):
                    raise self._refused((hopeless or errors)[0])
                self._probed, self._refusal = True, None

    async def _probe_all(self, like: Prompt | None) -> list[ProviderError]:
        """What is wrong with endpoints. One that says nothing is not waited for long once another is there."""
        endpoints = self.router.endpoints
        probes = [asyncio.create_task(self._probe(endpoint, like)) for endpoint in endpoints]
        late = {*probes}
        try:
            while late and not any(probe.done() and probe.result() is None for probe in probes):
                self._brake.check(0, 0.0)
                _, late = await asyncio.wait(late, timeout=_LOOKS_EVERY, return_when=asyncio.FIRST_COMPLETED)
            if late:
                await asyncio.wait(late, timeout=_PROBED_WITHIN)
        finally:
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
        for endpoint, probe in zip(endpoints, probes, strict=True):
            if probe.cancelled():
                endpoint.cool(0.0, asyncio.get_running_loop().time())
        return [error for probe in probes if not probe.cancelled() and (error := probe.result()) is not None]

    def _refused(self, error: ProviderError) -> TeacherError:
        """What this and every later request is told: an outage is waited out once."""
        self._probed, self._refuses_until = False, perf_counter() + _REFUSES_FOR
        self._refusal = (Unreachable if error.kind in _GONE else TeacherError)(f"{self.name}: {error}")
        return self._refusal

    @property
    def endpoints(self) -> list[Capabilities]:
        """What was learnt of each endpoint, at first contact and since."""
        return [
            replace(found, notes=tuple(dict.fromkeys((*found.notes, *endpoint.provider.notes))))
            for endpoint in self.router.endpoints
            if (found := endpoint.capabilities) is not None
        ]

    async def aclose(self) -> None:
        for endpoint in self.router.endpoints:
            if endpoint.measuring is not None:
                endpoint.measuring.cancel()
                await asyncio.gather(endpoint.measuring, return_exceptions=True)
            await endpoint.provider.aclose()

    async def _probe(
        self, endpoint: Endpoint, like: Prompt | None, within: float | None = None
    ) -> ProviderError | None:
        failures: list[ErrorKind] = []
        clock = asyncio.get_running_loop().time
        begun = clock()
        while True:
            try:
                async with asyncio.timeout(within):
                    endpoint.capabilities = await endpoint.provider.probe(like)
            except (ProviderError, TimeoutError) as failed:
                late = ProviderError(ErrorKind.TIMEOUT, f"first contact took more than {_PROBED_WITHIN:g} s")
                error = failed if isinstance(failed, ProviderError) else late
                # Nobody there at the very start is a mistake to fix, not an outage to wait out; but a model may load.
                few = len(failures) < 3 or error.kind in _EASES
                waits = error.kind is not ErrorKind.REFUSED and within is None and few
                decision = decide(error, failures, self.config.max_retries, random.random())
                if not (waits and isinstance(decision, Retry)):
                    endpoint.cool(begun, clock())
                    error.elsewhere = len(self.router.endpoints) > 1
                    return error
                failures.append(error.kind)
                await self._back_off(decision.delay, error.kind, perf_counter())
            else:
                self.meter.probed(Usage(*endpoint.capabilities.probe_tokens))
                endpoint.asks_n = endpoint.capabilities.n is True
                if slots := endpoint.capabilities.slots:
                    endpoint.limit.told(slots)
                endpoint.answered()
                return None

    async def _ask_once(self, prompt: Prompt, draws: dict[str, Draw]) -> dict[str, Answer | SampleError]:
        if not self.router.endpoints:
            message = f"{self.name}: this answer is not stored, and nobody is asked for it"
            return dict.fromkeys(draws, SampleError("not_stored", message))
        waiting: list[asyncio.Future[None]] = []
        for key in draws:
            self._asking[key] = waiting
        try:
            if not self._probed:
                await self.ready(prompt)
            answers = await (self._request(prompt, draws) if len(draws) == 1 else self._ask(prompt, draws))
        except NotAsked as enough:  # at first contact
            answers = [enough] * len(draws)
        finally:
            for key in draws:
                del self._asking[key]
            for other in waiting:
                if not other.done():
                    other.set_result(None)
        return dict(zip(draws, answers, strict=True))

    async def _ask(self, prompt: Prompt, draws: Mapping[str, Draw]) -> list[Answer | SampleError]:
        """One answer for each of several draws: those that a server can bring as choices of one answer together."""
        limit = self.config.tokens_per_minute
        fits = limit is None or self._most(prompt, len(draws))[1] <= limit
        if fits and all(endpoint.asks_n for endpoint in self.router.endpoints if endpoint.capabilities is not None):
            return await self._side_by_side(prompt, _consecutive(draws))
        return await self._side_by_side(prompt, _each(draws))

    async def _side_by_side(self, prompt: Prompt, requests: Sequence[Mapping[str, Draw]]) -> list[Answer | SampleError]:
        if len(requests) == 1:
            return await self._ask_together(prompt, requests[0])
        asked = await together(*(self._ask_together(prompt, draws) for draws in requests))
        return [*chain.from_iterable(asked)]

    async def _ask_together(self, prompt: Prompt, draws: Mapping[str, Draw]) -> list[Answer | SampleError]:
        """Asks in one request, and one by one for what it does not bring."""
        together = await self._request(prompt, draws)
        rest = dict(islice(draws.items(), len(together), None))
        if not rest:
            return together
        alone = await self._side_by_side(prompt, _each(rest))
        # A refused request says nothing of `n` unless its draws are answered one by one.
        if any(isinstance(answer, Answer) for answer in alone):
            for endpoint in self.router.endpoints:
                endpoint.asks_n = False
        return [*together, *alone]

    async def _request(self, prompt: Prompt, draws: Mapping[str, Draw]) -> list[Answer | SampleError]:
        """Answers for the first of the draws; of several, the others are to be asked for one by one."""
        failures: list[ErrorKind] = []
        tries, waits_until = 0, 0.0
        since = begun = perf_counter()
        while True:
            tries += 1
            try:
                return await self._in_slot(prompt, draws, begun)
            except NotAsked as enough:
                return [enough for _ in draws]
            except ProviderError as error:
                error.others_answered = self._answered_at > since
                decision = decide(error, failures, self.config.max_retries, random.random())
                # Several choices may be what is wrong with it; and one bad choice must not cost the others.
                refused = isinstance(decision, GiveUp) and error.kind in (ErrorKind.BAD_REQUEST, ErrorKind.SERVER)
                if len(draws) > 1 and refused:
                    return []
                match decision:
                    case Retry(delay):
                        self.meter.retries[error.kind] += 1
                        now = perf_counter()
                        waited = await self._back_off(0.0 if error.elsewhere else delay, error.kind, begun)
                        # A short wait is no full try, lest a moment in which all endpoints are gone takes all of them;
                        # but a prompt that breaks a healthy server must come to an end.
                        endless = tries > 3 * self.config.max_retries * len(self.router.endpoints)
                        # One that ran into a time limit has waited for long already.
                        full = (waited and now >= waits_until) or error.kind is ErrorKind.TIMEOUT
                        if full or (endless and error.kind in _OVER_WHEN_ANSWERED):
                            failures.append(error.kind)
                            waits_until = now + delay
                        begun = perf_counter()
                    case GiveUp(reason):
                        return [SampleError(reason, f"{self.name}: {error}") for _ in draws]
                    case Stop():
                        raise self._refused(error) from error

    async def _back_off(self, delay: float, kind: ErrorKind, begun: float) -> bool:
        """Waits before the next try, but no longer than until the server is seen to answer others.

        `begun` is when the request was first in line. Whether the whole delay has passed. Where nobody listened, one of
        all those that wait asks for the server's metrics: once these come, no one has to wait for the first answer.
        """
        now = perf_counter()
        until = now + delay
        while now < until:
            if kind in _OVER_WHEN_ANSWERED and self._answered_at > begun:
                return False
            if kind is ErrorKind.REFUSED and now > self._scouted_at + _SCOUTS_EVERY:
                self._scouted_at = now
                if await self.router.endpoints[0].provider.load():
                    self._answered_at = perf_counter()
                    continue
            pause = min(until - now, _SCOUTS_EVERY)
            await self._brake.pause(pause)
            if self._ends():
                return True
            now = perf_counter()
        return True

    async def _in_slot(self, prompt: Prompt, draws: Mapping[str, Draw], begun: float) -> list[Answer | SampleError]:
        """One request, once the budget, the pace and a slot allow it; asked a second time if it straggles.

        The slot is held until the answers are stored, so that no more can ever be lost than requests are in flight.

        Raises:
            NotAsked: the run has enough.
            ProviderError: it failed.
            FatalError: the run ends, or the answers could not be stored.
        """
        characters, worst = self._most(prompt, len(draws))
        async with self.router.slot(prompt) as endpoint:
            if endpoint.capabilities is None:  # it was not there at first contact
                self._brake.check(worst, self.meter.worst_cost(worst))
                within = _PROBED_WITHIN if self._others_are_well(endpoint) else None
                if error := await self._probe(endpoint, prompt, within):
                    raise error
            if len(draws) > 1 and not endpoint.asks_n:
                return []
            dollars = self.meter.worst_cost(worst)
            sent = None
            if not self._pace.unlimited or self._brake.check(worst, dollars):
                sent = await self._paced(worst, dollars)
            if self._unstorable is not None:
                raise self._unstorable
            tokens = 0
            flight = InFlight(self.meter, begun, worst)
            resends = RESENDS.set(partial(self._resends, flight))
            try:
                with flight:
                    answered = self._complete(endpoint, prompt, draws)
                    if self._hedge is not None:
                        again = partial(self._again, endpoint, prompt, draws, flight)
                        answered = self._hedge.first_of(answered, again, lambda: flight.asked > 1)
                    completions = await answered
                    # Counted before the reservation ends, lest a budget sees neither.
                    tokens = flight.answered(completions, characters)
                    if not tokens and not self.config.recorded:  # the server does not say
                        flight.untold()
                        tokens = worst
            finally:
                RESENDS.reset(resends)
                if sent is not None:
                    self._pace.correct(sent, tokens)
                observe(queued=flight.queued, busy=flight.busy)
            answers = [*map(Answer, draws.values(), draws, completions, repeat(False))]
            try:
                await self._store.put(prompt, answers)
            except FatalError as error:
                self._unstorable = error  # before the slot is free for the next, which could not be stored either
                raise
        if asyncio.get_running_loop().time() - endpoint.measured_at >= _MEASURED_EVERY:
            endpoint.measured_at = float("inf")  # until it has told
            endpoint.measuring = asyncio.create_task(self._measure(endpoint))
        return [*answers]

    async def _paced(self, worst: int, dollars: float) -> list[float]:
        """Returns when a request of up to so many tokens may go out; one after the other, so that only one looks.

        Raises:
            NotAsked: the run has enough.
        """
        async with self._pacing:
            while delay := self._pace.delay(perf_counter(), worst):
                self._brake.check(worst, dollars)
                await self._brake.pause(min(delay, 0.05))  # answers in flight may turn out shorter meanwhile
            while self._brake.check(worst, dollars):
                await self._brake.pause(0.05)  # what is in flight may cost less than it could
            return self._pace.take(perf_counter(), worst)

    def _due(self, waited: float) -> float:
        """Seconds until a request that has taken so long may be asked a second time, or is looked at again; 0: now.

        Past the 99th percentile it may be, if slots are idle. Past four times as much the server has lost it, most
        likely: that is worth a slot which others wait for.
        """
        count, longest = self._longest
        if self._took.count > 1.1 * count:
            longest = self._took.quantile(0.99)
            self._longest = (self._took.count, longest)
        if self._took.count < _ENOUGH_TO_HEDGE:
            return _LOOKS_EVERY
        if waited < longest:
            return longest - waited
        return 0.0 if self.router.idle or waited > _LOST * longest else max(longest / 4, 0.01)

    async def _again(
        self, first: Endpoint, prompt: Prompt, draws: Mapping[str, Draw], flight: InFlight
    ) -> list[Completion]:
        async with self.router.slot(prompt, besides=first) as endpoint:
            if not self._affords(flight):
                raise NotAsked("not_asked", "no second request")  # the first comes home all the same
            if endpoint.capabilities is None and (error := await self._probe(endpoint, prompt, _PROBED_WITHIN)):
                raise error
            RESENDS.set(partial(self._resends, flight))
            flight.again()
            return await self._complete(endpoint, prompt, draws)

    def _affords(self, flight: InFlight) -> bool:
        """Whether the same may go out a second time."""
        try:
            return not self._brake.check(flight.worst, self.meter.worst_cost(flight.worst))
        except (NotAsked, FatalError):
            return False

    def _resends(self, flight: InFlight) -> bool:
        if affords := self._affords(flight):
            flight.resent()
        return affords

    async def _complete(self, endpoint: Endpoint, prompt: Prompt, draws: Mapping[str, Draw]) -> list[Completion]:
        """One request to one endpoint; what it shows of the endpoint is noted there."""
        clock = asyncio.get_running_loop().time
        begun = clock()
        busy = endpoint.free <= 0
        first = next(iter(draws.values()))
        ATTEMPT.set(first.attempt)
        seed = first.attempt if self.config.recorded else first.seed
        try:
            completions = await endpoint.provider.complete(prompt, seed=seed, n=len(draws))
        except ProviderError as error:
            self._note_failure(endpoint, error, begun, clock())
            raise
        endpoint.answered()
        self._answered_at = perf_counter()
        tokens = sum([completion.usage.completion_tokens for completion in completions])
        now = clock()
        if self._hedge is not None:
            self._took.add(now - begun)
        endpoint.limit.answered(begun, now, tokens, busy=busy)
        endpoint.asks_n = endpoint.asks_n and len(completions) >= len(draws)
        if not completions:
            raise ProviderError(ErrorKind.GARBLED, "the response has no choices")
        return completions

    def _note_failure(self, endpoint: Endpoint, error: ProviderError, begun: float, now: float) -> None:
        several = len(self.router.endpoints) > 1
        match error.kind:
            case ErrorKind.RATE_LIMITED:
                endpoint.limit.rate_limited(begun, now)
                if several:
                    endpoint.cool(begun, now, error.retry_after)
            case ErrorKind.REFUSED:
                endpoint.limit.broke()
                if several:
                    endpoint.cool(begun, now)
            case ErrorKind.RESET | ErrorKind.OVERLOADED | ErrorKind.TIMEOUT:
                if error.kind is ErrorKind.TIMEOUT:
                    endpoint.limit.timed_out(begun, now)
                else:
                    endpoint.limit.broke()
                if several:
                    endpoint.broke(begun, now, error.retry_after)
            case ErrorKind.SERVER | ErrorKind.GARBLED:
                endpoint.limit.broke()
                # What no endpoint can answer is the prompts' fault; what others do answer is this one's.
                endpoint.broke(begun, now, cools=self._others_are_well(endpoint))
            case ErrorKind.NO_MODEL if self._others_are_well(endpoint):  # it was started anew, with another one
                endpoint.cool(begun, now)
        error.elsewhere = several and endpoint.cooling_until > now

    def _others_are_well(self, endpoint: Endpoint) -> bool:
        return any(other.is_well for other in self.router.endpoints if other is not endpoint)

    async def _measure(self, endpoint: Endpoint) -> None:
        """Asks the server how busy it is, where somebody wants to know; one that does not say is not asked again."""
        load = await endpoint.provider.load() if self.config.max_concurrency is None else None
        if load is not None:
            endpoint.tells = True
            endpoint.limit.measured(load, busy=endpoint.free <= 0)
        if endpoint.tells:
            endpoint.measured_at = asyncio.get_running_loop().time()

    def _ends(self) -> bool:
        """Whether no further request may go out."""
        try:
            self._brake.check(0, 0.0)
        except (NotAsked, FatalError):
            return True
        return False

    def _most(self, prompt: Prompt, n: int) -> tuple[int, int]:
        """Characters that a request has the model read, and tokens that it may cost at most: a prompt has no more
        tokens than bytes, nor than seen so far.
        """
        parameters, beside, most = self._sizes
        if prompt.parameters is not parameters:
            beside, most = _beside(prompt.parameters), _most_tokens(prompt.parameters)
            self._sizes = (prompt.parameters, beside, most)
        characters = beside + sum([len(message["content"]) for message in prompt.messages])
        return characters, self.meter.most_prompt_tokens(characters) + n * most


_PROBED_WITHIN = 10.0  # seconds, for an endpoint while there is another
_LOOKS_EVERY = 0.25  # seconds
_REFUSES_FOR = 5.0  # seconds
_SCOUTS_EVERY = 0.1  # seconds
_OVER_WHEN_ANSWERED = {ErrorKind.REFUSED, ErrorKind.RESET, ErrorKind.TIMEOUT, ErrorKind.GARBLED}
"""Faults of a server or of the network, not of its load: an answer to somebody else shows that they are over."""
_EASES = (ErrorKind.OVERLOADED, ErrorKind.RATE_LIMITED)  # of itself, in time
_GONE = {ErrorKind.REFUSED, ErrorKind.RESET, ErrorKind.TIMEOUT, ErrorKind.SERVER, *_EASES}  # no word on key or model
_MEASURED_EVERY = 0.5  # seconds
_ENOUGH_TO_HEDGE = 100  # answers, before the 99th percentile means anything
_LOST = 4  # times the 99th percentile


def _each(draws: Mapping[str, Draw]) -> list[dict[str, Draw]]:
    return [{key: draw} for key, draw in draws.items()]


def _consecutive(draws: Mapping[str, Draw]) -> list[dict[str, Draw]]:
    """Draws by runs of their seeds: servers seed the choices of one request one after the other."""
    runs: list[dict[str, Draw]] = []
    following: int | None = None
    for key, draw in draws.items():
        if runs and (draw.seed is None or draw.seed == following):
            runs[-1][key] = draw
        else:
            runs.append({key: draw})
        following = None if draw.seed is None else draw.seed + 1
    return runs


def _beside(parameters: Mapping[str, Any]) -> int:
    """Characters that are read beside the messages: token ids have more of them than the text that they stand for."""
    return sum([len(str(parameters[name])) for name in ("scored", "decision") if name in parameters])


def _most_tokens(parameters: Mapping[str, Any]) -> int:
    """Tokens of one answer, at most; 0 where nothing limits them."""
    limits = (
        parameters.get("max_tokens"),
        parameters.get("max_completion_tokens"),
        (parameters.get("options") or {}).get("num_predict"),
    )
    return max((limit for limit in limits if isinstance(limit, int)), default=0)


def _limit(config: ModelConfig) -> Limit:
    if config.max_concurrency is not None:
        return Limit(config.max_concurrency)
    return AdaptiveLimit(config.first_concurrency, patience=config.timeout / 4)
