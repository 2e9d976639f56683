"""How close the limit that finds itself comes to the best fixed one, on simulated servers in virtual time."""

import argparse
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from benchmarks.process import save, table
from fastdistill.model.limits import AdaptiveLimit, Limit
from fastdistill.model.provider import Load, ModelConfig

MEDIAN, SIGMA = 0.2, 0.6  # seconds, of a lognormal distribution
TRIED = (16, 24, 32, 48, 64, 96, 128, 192, 256, 300, 384, 512, 640)


@dataclass(frozen=True, slots=True)
class Work:
    """One request: how long it holds a slot, in seconds, and the length of its answer."""

    seconds: float
    tokens: int = 100


def lognormal(requests: int, seed: int, median: float = MEDIAN, sigma: float = SIGMA) -> list[Work]:
    dice = random.Random(seed)
    return [Work(dice.lognormvariate(math.log(median), sigma)) for _ in range(requests)]


@dataclass(slots=True)
class _Sent:
    begun: float
    busy: bool
    work: Work


@dataclass(slots=True)
class Outcome:
    """What a simulation came to; `capacities` is the limit after each event."""

    seconds: float = 0.0
    refused: int = 0
    cuts: int = 0
    capacities: list[int] = field(default_factory=list)


def simulate(
    limit: Limit,
    work: Sequence[Work],
    slots: int | Callable[[float], int],
    *,
    slowed: Callable[[int], float] = lambda running: 1.0,
    refuses_beyond: int | None = None,
    tells: bool = False,
    breaks: Callable[[int], bool] = lambda number: False,
) -> Outcome:
    """A client with as much work as there is, and a server with slots and one queue; all times are virtual.

    Args:
        slots: how many requests are worked on at a time, or that as a function of the time.
        slowed: by which factor an answer takes longer with so many at work.
        refuses_beyond: so many in flight; the next gets a 429 within 10 ms.
        tells: the server has metrics, asked every half second.
        breaks: whether the connection of the n-th request breaks when its answer would come.
    """
    todo = deque(reversed(work))
    now, in_flight, running, sent, told = 0.0, 0, 0, 0, 0.0
    queue: deque[_Sent] = deque()
    events: list[tuple[float, int, str, _Sent]] = []
    outcome = Outcome()

    def free() -> bool:
        return running < (slots if isinstance(slots, int) else slots(now))

    def start(request: _Sent, number: int) -> None:
        nonlocal running
        running += 1
        kind = "broken" if breaks(number) else "answer"
        heapq.heappush(events, (now + request.work.seconds * slowed(running), number, kind, request))

    while todo or in_flight:
        while todo and in_flight < limit.capacity:
            in_flight += 1
            sent += 1
            request = _Sent(now, in_flight >= limit.capacity, todo.pop())
            if refuses_beyond is not None and in_flight > refuses_beyond:
                heapq.heappush(events, (now + 0.01, sent, "429", request))
            elif free():
                start(request, sent)
            else:
                queue.append(request)
        now, _, kind, request = heapq.heappop(events)
        in_flight -= 1
        before = limit.capacity
        if kind == "429":
            limit.rate_limited(request.begun, now)
            outcome.refused += 1
            outcome.cuts += limit.capacity < before
            todo.append(request.work)
        else:
            running -= 1
            if kind == "answer":
                limit.answered(request.begun, now, request.work.tokens, busy=request.busy)
            else:
                limit.broke()
                todo.append(request.work)
            while queue and free():
                sent += 1
                start(queue.popleft(), sent)
            if tells and now >= told + 0.5:
                told = now
                limit.measured(Load(running, len(queue)), busy=in_flight + 1 >= limit.capacity)
        outcome.capacities.append(limit.capacity)
    outcome.seconds = now
    return outcome


def adaptive() -> AdaptiveLimit:
    return AdaptiveLimit(ModelConfig.first_concurrency)


@dataclass(frozen=True, slots=True)
class Case:
    """A server, and the fixed limits of which the best one is what counts; `server` is what `simulate` takes."""

    name: str
    slots: int = 100_000
    server: dict[str, Any] = field(default_factory=dict)
    slow_share: float = 0.0  # of the answers: these take ten times as long
    changes: bool = False  # the slots halve after a third of the time, and double after two
    fixed: Sequence[int] = TRIED

    def over_the_best(self, requests: int, seed: int) -> float:
        """How many times as long as with the best fixed limit it takes."""
        work = lognormal(requests, seed)
        if self.slow_share:
            dice = random.Random(seed)
            work = [Work(each.seconds * (10 if dice.random() < self.slow_share else 1)) for each in work]
        slots = self._changing(work) if self.changes else self.slots
        best = min(simulate(Limit(fixed), work, slots, **self.server).seconds for fixed in self.fixed)
        return simulate(adaptive(), work, slots, **self.server).seconds / best

    def _changing(self, work: Sequence[Work]) -> Callable[[float], int]:
        third = simulate(Limit(10 * self.slots), work, self.slots).seconds / 3
        return lambda now: self.slots if now < third else self.slots // 2 if now < 2 * third else 2 * self.slots


def queues(slots: int) -> Case:
    """No setting beats one that never leaves a FIFO queue empty."""
    return Case(f"{slots} slots", slots, fixed=(10 * slots,))


def _refuses(beyond: int) -> Case:
    return Case(f"429 beyond {beyond} in flight", server={"refuses_beyond": beyond}, fixed=(beyond,))


def _broken(share: float) -> Callable[[int], bool]:
    """Of the first 10,000 requests: late ones would make the tail a matter of luck."""
    dice = random.Random(0)
    return {number for number in range(10_000) if dice.random() < share}.__contains__


CASES = (
    *map(queues, (8, 64, 200, 512, 1000)),
    Case("512 slots, 5% broken at first", 512, {"breaks": _broken(0.05)}, fixed=(5120,)),
    Case("512 slots, 20% take ten times", 512, slow_share=0.2, fixed=(5120,)),
    *(Case(f"{slots} slots, halve and double", slots, changes=True, fixed=(20 * slots,)) for slots in (8, 64, 512)),
    *map(_refuses, (10, 20, 100, 300, 600)),
    Case("slowed by 1 + b/32", 256, {"slowed": lambda batch: 1 + batch / 32}),
    Case("slowed by 1 + b/128", 256, {"slowed": lambda batch: 1 + batch / 128}),
    Case("the same, 20% take ten times", 512, {"slowed": lambda batch: 1 + batch / 128}, slow_share=0.2),
    *(
        Case(f"slowed by 1 + (b/{knee})^2", server={"slowed": lambda batch, knee=knee: 1 + (batch / knee) ** 2})
        for knee in (32, 64, 128, 300)
    ),
    *(
        Case(f"by (b/{knee})^2 beyond {knee}", server={"slowed": lambda b, knee=knee: max(1.0, (b / knee) ** 2)})
        for knee in (64, 300)
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=16)
    arguments = parser.parse_args()
    lines = []
    for case in CASES:
        ratios = [case.over_the_best(arguments.requests, seed) for seed in range(arguments.seeds)]
        lines.append({"server": case.name, "mean %": 100 * fmean(ratios) - 100, "worst %": 100 * max(ratios) - 100})
    print(table(lines, {"server": "", "mean %": ".1f", "worst %": ".1f"}))
    print(f"-> {save('limits', lines)}")


if __name__ == "__main__":
    main()
