"""How fast a teacher with slots could possibly be: always full, in the order of the records, and longest first.

Nobody knows an answer's length before it is there, so FIFO is the bound; longest first shows what knowing would bring.
`--predict` orders the requests that wait by a length that is predicted from the prompt's, in virtual time.
"""

import argparse
import heapq
import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from statistics import fmean
from typing import Any

from benchmarks import workload
from benchmarks.process import save, table
from benchmarks.teacher import Chance, Options


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds, and utilisation of the slots until the last answer."""

    wall_s: float
    utilisation: float


def bound(latencies: Sequence[float], slots: int) -> Bound:
    """Slots that take the next request the moment they are free."""
    ends = [0.0] * min(slots, len(latencies))
    for latency in latencies:
        heapq.heapreplace(ends, ends[0] + latency)
    wall = max(ends)
    return Bound(wall, sum(latencies) / (slots * wall) if wall else 0.0)


def longest_first(latencies: Sequence[float], slots: int) -> Bound:
    return bound(sorted(latencies, reverse=True), slots)


def predicted_first(pairs: Sequence[tuple[float, float]], slots: int, waiting: int) -> Bound:
    """Longest first of those that wait, by a line fitted to what has come back: log seconds over log characters.

    Only the sign of its slope matters for the order: the longest prompts first, or the shortest.

    Args:
        pairs: characters of the prompt and seconds of the answer, in the order of the records.
        waiting: requests among which a free slot chooses.
    """
    stream = iter(pairs)
    pool = sorted(islice(stream, waiting))
    running: list[tuple[float, float, float]] = []  # (end, characters, seconds)
    n = sx = sy = sxy = now = worked = 0.0
    while pool or running:
        if pool and len(running) < slots:
            characters, seconds = pool.pop(-1 if n * sxy >= sx * sy else 0)
            for following in islice(stream, 1):
                insort(pool, following)
            worked += seconds
            heapq.heappush(running, (now + seconds, characters, seconds))
        else:
            now, characters, seconds = heapq.heappop(running)
            x, y = math.log(characters), math.log(seconds)
            n, sx, sy, sxy = n + 1, sx + x, sy + y, sxy + x * y
    return Bound(now, worked / (slots * now))


def predictable(count: int, slots: int, correlation: float, options: Options, seed: int) -> dict[str, Any]:
    """A workload whose log latency has that correlation with the prompt's log length; seconds of each order."""
    dice = Random(seed)
    pairs = []
    for _ in range(count):
        x, own = dice.gauss(), dice.gauss()
        deviate = correlation * x + math.sqrt(1 - correlation**2) * own
        pairs.append((1100 * math.exp(0.35 * x), options.median * math.exp(options.sigma * deviate)))
    needed = [seconds for _, seconds in pairs]
    fifo = bound(needed, slots).wall_s
    return {
        "records": count,
        "slots": slots,
        "correlation": correlation,
        "fifo s": fifo,
        "all known": longest_first(needed, slots).wall_s / fifo,
        "waiting known": predicted_first([(1.0 + s, s) for s in needed], slots, slots).wall_s / fifo,
        "predicted": predicted_first(pairs, slots, slots).wall_s / fifo,
    }


def bound_with_faults(options: Options, count: int) -> tuple[Bound, float]:
    """FIFO with every attempt that the teacher's faults make necessary; and the seconds of slots that failed ones take.

    A 429 comes at once and is tried again after `retry_after`, a 500 at once; a reset takes half of its latency, a
    truncated answer all of it. A hang takes no slot, and is noticed at once: a client can't do that.
    """
    chance = Chance(options)
    slots = [0.0] * min(options.slots, count)
    again: list[tuple[float, int, int]] = []  # (not before, record, attempt)
    fresh = iter(range(count))
    wall = worked = failed = 0.0
    while True:
        now = slots[0]
        number, attempt = next(fresh, -1) if not (again and again[0][0] <= now) else -1, 0
        if number < 0:
            if not again:
                return Bound(wall, worked / (options.slots * wall)), failed
            earliest, number, attempt = heapq.heappop(again)
            now = max(now, earliest)
        content = workload.content(number)
        draw = chance.draw(content, chance.prompt(content), workload.SEED, 0)
        fault = chance.fault(draw, attempt)
        takes = draw.latency * {"": 1.0, "reset": 0.5, "truncated": 1.0}.get(fault, 0.0)
        if takes:
            heapq.heapreplace(slots, now + takes)
        worked += takes
        if fault:
            failed += takes
            wait = options.retry_after if fault == "429" else 0.0
            heapq.heappush(again, (now + takes + wait, number, attempt + 1))
        else:
            wall = max(wall, now + takes)


def latencies(options: Options, count: int) -> list[float]:
    """What the first `count` records of the workload take, one choice each."""
    chance = Chance(options)
    return [chance.latency(workload.content(number), workload.SEED) for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, nargs="+", default=[2_000, 10_000, 20_000])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--median", type=float, default=0.2)
    parser.add_argument("--sigma", type=float, default=0.6)
    parser.add_argument("--predict", action="store_true", help="what an order by predicted length brings")
    arguments = parser.parse_args()
    options = Options(slots=arguments.slots, median=arguments.median, sigma=arguments.sigma)
    lines: list[dict[str, Any]] = []
    if arguments.predict:
        for count, slots in ((2_000, 64), (10_000, 64), (10_000, 1024), (20_000, 1024)):
            for correlation in (0.0, 0.5, 0.8, 0.95):
                runs = [predictable(count, slots, correlation, options, seed) for seed in range(5)]
                lines.append({key: fmean(run[key] for run in runs) for key in runs[0]})
        columns = {"records": ",.0f", "slots": ",.0f", "correlation": ".2f", "fifo s": ".2f"}
        print(table(lines, {**columns, "all known": ".3f", "waiting known": ".3f", "predicted": ".3f"}))
        save("order", lines)
        return
    for count in arguments.count:
        needed = latencies(options, count)
        fifo, longest = bound(needed, options.slots), longest_first(needed, options.slots)
        lines.append(
            {
                "records": count,
                "slots": options.slots,
                "fifo s": fifo.wall_s,
                "fifo util": fifo.utilisation,
                "longest s": longest.wall_s,
                "longest util": longest.utilisation,
            }
        )
    columns = {"records": "d", "slots": "d", "fifo s": ".2f", "fifo util": ".3f"}
    print(table(lines, {**columns, "longest s": ".2f", "longest util": ".3f"}))
    save("bound", lines)


if __name__ == "__main__":
    main()
