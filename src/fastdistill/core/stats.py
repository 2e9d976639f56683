"""Small statistics with their sources: intervals for rates, and a histogram that stays small at any count."""

import math
from dataclasses import dataclass, field

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


_GROWTH = math.log(1.02)


@dataclass(slots=True)
class Histogram:
    """Durations in buckets that grow by 2%: any quantile is right to 1%, whatever the count."""

    buckets: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        bucket = round(math.log(max(seconds, 1e-7)) / _GROWTH)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    def quantile(self, q: float) -> float:
        """The q-quantile in seconds; 0 if nothing was added."""
        wanted = q * self.count
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return min(math.exp(bucket * _GROWTH), self.longest)
        return 0.0

    def summary(self) -> dict[str, float | int]:
        """count, total and p50 ... p99 in seconds, for a report."""
        quantiles = {f"p{q}_s": round(self.quantile(q / 100), 6) for q in (50, 90, 95, 99)}
        return {"count": self.count, "total_s": round(self.total, 6), **quantiles, "max_s": round(self.longest, 6)}
