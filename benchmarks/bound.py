"""How fast a teacher with slots could possibly be: always full, in the order of the records, and longest first.

Nobody knows an answer's length before it is there, so FIFO is the bound; longest first shows what knowing would bring.
"""

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

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
    arguments = parser.parse_args()
    options = Options(slots=arguments.slots, median=arguments.median, sigma=arguments.sigma)
    lines = []
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
