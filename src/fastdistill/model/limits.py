"""How many requests to one endpoint are in flight: a fixed number, or one that finds itself. Pure: no clock, no tasks.

Self-hosted servers queue instead of refusing, so 429 never comes: what shows too many requests is time spent in the
server's queue. By Little's law throughput times the latency without a queue is the number of slots at work. The limit
grows with each answer, up to some times that number, while twice as many in flight bring clearly more answers. Then it
rests where a queue of up to one and a half slots' worth keeps the slots busy. Now and then it tries more and less, and
keeps what the throughput says: a batch that slows every answer down and still answers more in all is worth it. Where
more in flight brought clearly less, it goes down for as long as that brings more.

A 429 cuts the limit once for each burst: by a little, and deeper with each burst that follows at once. From there it
halves the way to where the 429 came, and tries more with care. Where more requests time out than are answered, half
remain.

Latency is per token, so that longer answers are not taken for a longer queue.
"""

import math
from bisect import bisect
from collections import deque
from dataclasses import dataclass

from fastdistill.model.provider import Load

HEADROOM = 1.25  # requests in flight for each slot: an answer that leaves finds the next one waiting
CROWDED = 2.5
BURST = 0.5  # seconds
CUT = 0.7  # at most, after a 429; one cut for each burst
RAMP = 8  # more in flight for each answer, at first
PROVED = 4  # the ramp's limit: so many requests in flight for each slot that is known to be at work
GREW = 1.3  # times the answers a second, with twice as many in flight: less, twice, ends the ramp
SMALLEST_WINDOW = 24  # answers: of fewer, chance ends a ramp
STEADY_WINDOW = 128  # answers, once the ramp is over: chance must not decide
STEP = 1.5  # a trial is of so many times more, or less
FELL = 0.85  # times the answers a second, with more in flight: the next trial is of less
SPOILT = 0.1  # broken requests for each answer
JUST_BELOW = 0.95  # the first cut; squared with each one that follows without a window of answers between
NEAR = 0.98
PROBE_EVERY = 16  # windows
OLD = 1.002  # the best latency is forgotten by this much a window, in case the work has changed
MOST = 0.7  # of what is in flight: a server that tells of less has not all of it
GROWTH = 1.02  # beyond a capacity where a 429 came, with the first trial after it


class Limit:
    """`capacity` is how many requests may be in flight now: here what the user said. All times are seconds of one
    monotonic clock.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def answered(self, begun: float, now: float, tokens: int, *, busy: bool) -> None:
        """A request brought an answer. `busy`: as many requests were in flight as were allowed."""

    def rate_limited(self, begun: float, now: float) -> None: ...

    def broke(self) -> None:
        """A 5xx or a broken connection: says nothing about how many requests are right."""

    def timed_out(self, begun: float, now: float) -> None: ...

    def told(self, slots: int) -> None:
        """The server has so many: at first contact."""

    def measured(self, load: Load, *, busy: bool) -> None: ...


@dataclass(slots=True)
class _Window:
    """Answers since some moment, and what they say of the capacity that was in force."""

    begun: float
    wanted: int
    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    load: int = 0  # capacities in force when they were sent, summed up; on the ramp only
    was_busy: bool = False
    broken: int = 0

    @property
    def spoilt(self) -> bool:
        """Whether so much broke that it says nothing about the capacity."""
        return self.broken > SPOILT * self.answers


@dataclass(frozen=True, slots=True)
class _Trial:
    """Another capacity, tried for one window or half of it; `capacity` was in force before. Throughputs to come to:"""

    capacity: int
    hopeful: float  # in half of the window, to go on
    enough: float  # to keep what was tried
    astonishing: float = math.inf  # of so few in flight: the server itself has become faster


class AdaptiveLimit(Limit):
    """Starts small and finds the knee. `capacity` stays within [1, ceiling].

    `patience` is how many seconds an answer may take at the rate seen so far: a slow server is not buried in requests
    that would end in time-outs.
    """

    def __init__(self, start: int = 8, ceiling: int = 8192, patience: float = 60.0) -> None:
        super().__init__(start)
        self._patience = patience
        self._ceiling = ceiling
        self._ramping = True
        self._capacities: list[tuple[float, int]] = [(-math.inf, start)]  # on the ramp: from when on
        self._rates: list[tuple[float, float]] = []  # on the ramp: mean capacity and answers a second of each window
        self._stalled = False  # on the ramp: the last window brought hardly more than one with half as many in flight
        self._slots = 1.5 * start  # known to be at work; at first a guess
        self._first = math.inf  # when the first answer came
        self._early = _Window(0.0, 0)  # all answers to what had been sent before, not just the fast ones
        self._window: _Window | None = None
        self._settling = 0  # answers still to come of requests sent under an earlier capacity
        self._quiet = 0  # windows since the last trial
        self._rest = 1  # windows between trials: more with each one that does not pay
        self._best = float("inf")  # seconds a token, without a queue as far as is known
        self._trial: _Trial | None = None
        self._fell = False  # more in flight brought clearly less
        self._peaked = False  # then less brought more: latency tells no slots
        self._last_cut = float("-inf")
        self._refused_at = float("inf")  # a capacity beyond which a 429 may come
        self._care = GROWTH  # how far beyond it the next trial may go
        self._cut = JUST_BELOW  # with the next 429
        self._measured = False  # the server's metrics rule
        self._late = 0  # timeouts since the last cut, beyond the answers

    def answered(self, begun: float, now: float, tokens: int, *, busy: bool) -> None:
        tokens = max(tokens, 1)
        self._late = max(0, self._late - 1)
        self._first = min(self._first, now)
        if begun < self._first:
            self._early.tokens += tokens
            self._early.seconds += now - begun
            self._best = self._early.seconds / self._early.tokens
        if self._window is None:
            self._window = _Window(begun, SMALLEST_WINDOW)
        if self._settling > 0:
            self._settling -= 1
            self._window.begun = now
            return
        window = self._window
        window.answers += 1
        window.tokens += tokens
        window.seconds += now - begun
        window.was_busy |= busy
        if self._ramping:
            window.load += self._was(begun)
            if not window.spoilt and (higher := self._higher(window, now)) > self.capacity:
                self._move(higher)
                self._capacities.append((now, self.capacity))
        if window.answers >= window.wanted and now > window.begun:
            if (
                self._trial
                and window.wanted < self._full
                and self._trial.hopeful < window.tokens / (now - window.begun) < self._trial.astonishing
            ):
                window.wanted = self._full
                return
            self._close(window, now)
            wanted = max(SMALLEST_WINDOW, self.capacity // 8) if self._ramping else self._full
            self._window = _Window(now, wanted if self._trial is None else wanted // 2)

    def rate_limited(self, begun: float, now: float) -> None:
        if begun < self._last_cut:
            return  # sent before the last cut: of the same burst
        self._last_cut = now
        if self._ramping:
            self._move(self._was(begun))
            self._ramping = False
        self._refused_at = self.capacity
        self._care = GROWTH
        if self._trial is not None:
            self._change(self._trial.capacity)  # where none came
            self._trial = None
            self._quiet, self._rest = 0, PROBE_EVERY
        else:
            self._change(min(self.capacity * self._cut, self.capacity - 1))
            self._cut = max(self._cut**2, CUT)
            self._quiet, self._rest = PROBE_EVERY // 2, PROBE_EVERY
        self._window = _Window(now, self._full)

    def broke(self) -> None:
        if self._window is not None:
            self._window.broken += 1

    def timed_out(self, begun: float, now: float) -> None:
        """Where more do than are answered, too many queue for a time limit, ours or a gateway's: half of them remain.

        Fewer are the fault of long answers.
        """
        self.broke()
        self._late += begun >= self._last_cut
        if self._late > self.capacity / 4:
            self._cut, self._late = 0.5, 0
            self.rate_limited(begun, now)

    def told(self, slots: int) -> None:
        """Begins there, without a ramp: a gateway may have more behind it, which trials find."""
        self._ramping = False
        self._move(math.ceil(slots * HEADROOM))

    def measured(self, load: Load, *, busy: bool) -> None:
        """The server says itself how many it works on and how many wait: that beats any inference.

        But not one that has not most of what is in flight: a gateway queues it, or spreads it over several servers.
        """
        self._measured = not busy or load.running + load.waiting > MOST * self.capacity
        if not self._measured:
            return
        if load.waiting > (HEADROOM - 1) * load.running > 0:
            self._ramping = False
            self._move(load.running * HEADROOM)
        elif load.waiting == 0 and busy:
            self._move(min(self.capacity * 2, self._reach()))

    def _close(self, window: _Window, now: float) -> None:
        trial, self._trial = self._trial, None
        if window.spoilt or not window.was_busy or (self._measured and not self._ramping):
            if trial is not None:
                self._change(trial.capacity)
            return
        self._cut = JUST_BELOW
        throughput = window.tokens / (now - window.begun)
        latency = window.seconds / window.tokens
        if self._ramping:
            self._climb(window, now, throughput * self._best)
            return
        self._best = min(self._best * OLD, latency)
        slots = throughput * self._best
        if trial is not None and not self._judge(trial, throughput):
            pass
        elif self.capacity < NEAR * self._refused_at < math.inf and latency < CROWDED * self._best:
            self._change(self._reach())
        elif (latency < HEADROOM * self._best and not self._peaked) or self._quiet >= self._rest:
            pays, astonishing = 1.03, math.inf
            if self._fell:
                tried = self.capacity / HEADROOM
            elif self.capacity > CROWDED * HEADROOM * slots:
                tried, pays, astonishing = slots * CROWDED / HEADROOM, 0.9, STEP * throughput
            else:
                known = trial.capacity if trial and throughput > trial.astonishing else self.capacity
                tried = min(known * STEP, self._reach(), max(self._bearable(window, now), self.capacity))
                pays = 1 + 0.12 * (tried / self.capacity - 1)
            self._trial = _Trial(self.capacity, throughput * min(1, pays), throughput * pays, astonishing)
            self._change(tried)
        self._quiet += 1

    def _climb(self, window: _Window, now: float, slots: float) -> None:
        """Ends the ramp where twice as many brought hardly more answers in two windows on end, of which one may be
        chance, or where all that is allowed was in flight.
        """
        load, rate = window.load / window.answers, window.answers / (now - window.begun)
        before = next((other for less, other in reversed(self._rates) if less < load / 2), 0.0)
        self._rates.append((load, rate))
        self._slots = max(self._slots, slots)
        stalled, self._stalled = self._stalled, rate < GREW * before
        if (stalled and self._stalled) or load >= self.capacity >= self._higher(window, now):
            self._ramping = False
            self._change(slots * STEP * max(1.0, before / rate))  # the rate is low by chance, or too many in flight

    def _judge(self, trial: _Trial, throughput: float) -> bool:
        """Keeps what was tried if more is clearly more, or less is as good."""
        if throughput > trial.enough:
            self._peaked = self._fell
            self._quiet = self._rest = 1  # it paid: look further
            return True
        self._quiet, self._rest = 0, min(2 * self._rest, PROBE_EVERY)
        if self.capacity < trial.capacity and not self._fell:
            self._best *= CROWDED / HEADROOM  # it was not a queue that made the answers slow
        self._fell = self.capacity > trial.capacity and throughput < FELL * trial.hopeful
        self._change(trial.capacity)
        return False

    @property
    def _full(self) -> int:
        """Answers of a window, once the ramp is over."""
        return max(STEADY_WINDOW, 2 * self.capacity)

    def _higher(self, window: _Window, now: float) -> float:
        bearable = max(self._bearable(window, now), self._capacities[0][1])
        return min(self.capacity + RAMP, PROVED * self._slots, bearable, self._ceiling)

    def _was(self, then: float) -> int:
        """The capacity on the ramp, then."""
        return self._capacities[bisect(self._capacities, (then, math.inf)) - 1][1]

    def _bearable(self, window: _Window, now: float) -> float:
        """As many as are answered within `patience`, at the rate of the window."""
        return self._patience * window.answers / max(now - window.begun, 1e-3)

    def _reach(self) -> float:
        """How far the limit may grow: half of the way to where a 429 came, and from close to there on beyond it, by a
        little, and by more each time that none comes.
        """
        if self.capacity < NEAR * self._refused_at:
            return math.ceil((self.capacity + self._refused_at) / 2) if self._refused_at < math.inf else math.inf
        self._refused_at *= self._care
        self._care = min(self._care**2, STEP)
        return max(self._refused_at, self.capacity + 1)

    def _change(self, capacity: float) -> None:
        self._settling = self.capacity
        self._move(capacity)

    def _move(self, capacity: float) -> None:
        self.capacity = min(max(1, round(capacity)), self._ceiling)


class Pace:
    """Keeps requests and tokens within what a provider allows in any minute, spread evenly but for `BURST` at once.

    A request that may cost more tokens than a minute has goes out alone in its minute.
    """

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.unlimited = requests_per_minute is None and tokens_per_minute is None
        self._requests = requests_per_minute or math.inf
        self._tokens = tokens_per_minute or math.inf
        self._requests_until = float("-inf")
        self._tokens_until = float("-inf")
        self._sent: deque[list[float]] = deque()  # of the last minute: when, tokens
        self._within = 0.0  # tokens of these

    def delay(self, now: float, tokens: int) -> float:
        """Seconds until a request of up to so many tokens may go out; less when an answer turns out shorter than it was
        said to be.
        """
        while self._sent and self._sent[0][0] <= now - 60:
            self._within -= self._sent.popleft()[1]
        until = max(now, self._requests_until, self._tokens_until)
        requests, within = len(self._sent), self._within
        for at, took in self._sent:
            if requests < self._requests and within + tokens <= self._tokens:
                break
            until = max(until, at + 60)
            requests, within = requests - 1, within - took
        return until - now

    def take(self, now: float, tokens: int) -> list[float]:
        """A request goes out that may cost so many tokens; what `correct` wants of it."""
        self._requests_until = max(self._requests_until, now - BURST) + 60 / self._requests
        self._tokens_until = max(self._tokens_until, now - BURST) + 60 * tokens / self._tokens
        self._sent.append([now, tokens])
        self._within += tokens
        return self._sent[-1]

    def correct(self, sent: list[float], tokens: int) -> None:
        """A request took so many tokens, no more and no fewer."""
        more = tokens - sent[1]
        self._tokens_until += 60 * more / self._tokens
        if self._sent and sent[0] >= self._sent[0][0]:
            self._within += more
        sent[1] = tokens
