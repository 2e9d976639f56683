"""Small statistics with their sources: intervals for rates, and a histogram that stays small at any count."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, repeat
from statistics import fmean, stdev
from typing import Any

Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Rate:
    """A share `successes / total` with its Wilson score interval (95%); all None for no trials."""

    successes: int
    total: int
    rate: float | None
    low: float | None
    high: float | None


def wilson(successes: int, total: int) -> Rate:
    """Wilson (1927) score interval, without continuity correction: right at 0, at 1 and for small totals.

    Raises:
        ValueError: `successes` is not between 0 and `total`.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is not a share")
    if total == 0:
        return Rate(0, 0, None, None, None)
    share = successes / total
    scale = 1 + Z95**2 / total
    centre = (share + Z95**2 / (2 * total)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2)) / scale
    return Rate(successes, total, share, max(0.0, centre - half), min(1.0, centre + half))


def interval(rate: Rate) -> dict[str, Any]:
    """A rate as the reports write it."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(rate).items()}


@dataclass(frozen=True, slots=True)
class Total:
    """A total over a population, projected from a sample of it, with its 95% interval."""

    estimate: float
    low: float
    high: float


def project_mean(values: Sequence[float], population: int) -> Total:
    """The total over `population` items of which `values` were drawn at random, without replacement.

    Student's interval for the mean with the finite population correction (Cochran, Sampling Techniques, 2.8). What was
    seen is a lower bound. Two values at least.
    """
    count = len(values)
    half = student95(count - 1) * stdev(values) / math.sqrt(count)
    return _total(fmean(values), half, half, count, population, seen=sum(values))


def project_share(successes: int, count: int, population: int) -> Total:
    """How many of `population` succeed, from a random `count` of them: Wilson's interval, narrowed likewise."""
    rate = wilson(successes, count)
    if rate.rate is None or rate.low is None or rate.high is None:
        raise ValueError("nothing was drawn")
    total = _total(rate.rate, rate.rate - rate.low, rate.high - rate.rate, count, population, seen=successes)
    return Total(total.estimate, total.low, min(total.high, population - (count - successes)))


def project_needed(target: int, successes: int, count: int, population: int) -> Total:
    """How many of `population` it takes until `target` have succeeded, all of them at most, from a random `count`.

    The ends of Wilson's interval, and as far beyond them as chance may lead (the negative binomial's deviation).
    """
    rate = wilson(successes, count)

    def needed(share: float | None, deviations: float) -> float:
        if not share:
            return population
        return min(population, max(target, (target + deviations * math.sqrt(target * (1 - share))) / share))

    return Total(needed(rate.rate, 0), needed(rate.high, -Z95), needed(rate.low, Z95))


def student95(freedom: int) -> float:
    """Student's t, two-sided 95% (Fisher's expansion around the normal, right to 1% from 3 degrees on)."""
    z, n = Z95, freedom
    first, second, third = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + first / n + second / n**2 + third / n**3


def _total(mean: float, below: float, above: float, count: int, population: int, *, seen: float) -> Total:
    left = math.sqrt(max(0, population - count) / max(1, population - 1))  # the finite population correction
    return Total(mean * population, max(seen, (mean - below * left) * population), (mean + above * left) * population)


_PER_E = 1 / math.log(1.02)  # buckets


class Histogram:
    """Durations in buckets that grow by 2%: any quantile is right to 1%, whatever the count.

    `add` takes seconds. They wait in a list for the next `sum_up`, for many at a time cost a fraction: who adds without
    end sums up now and then.
    """

    __slots__ = ("_buckets", "_count", "_fresh", "_longest", "_total", "add")

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._fresh: list[float] = []  # not in a bucket yet
        self.add = self._fresh.append
        self._count, self._total, self._longest = 0, 0.0, 0.0

    @property
    def count(self) -> int:
        return self._count + len(self._fresh)

    @property
    def total(self) -> float:
        """Seconds."""
        return self._total + sum(self._fresh)

    def quantile(self, q: float) -> float:
        """The q-quantile in seconds; 0 if nothing was added."""
        return self._quantiles([q])[0]

    def summary(self) -> dict[str, float | int]:
        """count, total and p50 ... p99 in seconds, for a report."""
        p50, p90, p95, p99 = [round(seconds, 6) for seconds in self._quantiles([0.5, 0.9, 0.95, 0.99])]
        return {
            "count": self._count, "total_s": round(self._total, 6),
            "p50_s": p50, "p90_s": p90, "p95_s": p95, "p99_s": p99, "max_s": round(self._longest, 6),
        }  # fmt: skip

    def _quantiles(self, shares: Sequence[float]) -> list[float]:
        self.sum_up()
        buckets = sorted(self._buckets)
        if not buckets:
            return [0.0] * len(shares)
        reached = list(accumulate(map(self._buckets.__getitem__, buckets)))
        places = [buckets[bisect_left(reached, share * self._count)] for share in shares]
        return [min(math.exp(place / _PER_E), self._longest) for place in places]

    def sum_up(self) -> None:
        if fresh := self._fresh:
            logarithms = map(math.log, map(max, fresh, repeat(1e-7)))
            self._buckets.update(map(round, map(_PER_E.__mul__, logarithms)))
            self._count += len(fresh)
            self._total += sum(fresh)
            self._longest = max(self._longest, *fresh)
            fresh.clear()
