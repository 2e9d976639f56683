"""Two runs on the same samples: is what separates them more than chance? Knows no run and no sample, only counts."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy


@dataclass(frozen=True, slots=True)
class Difference:
    """An estimate with its 95% interval, None for a single group; all None where there was nothing to compare."""

    estimate: float | None
    low: float | None
    high: float | None


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value of McNemar's test: were `lost` and `won` pairs as likely as each other?

    `min(1, 2 * P(X <= min(lost, won)))` for X binomial with `lost + won` trials and p = 1/2 (McNemar 1947; exact
    form as in Fagerland et al. 2013). Pairs that agree say nothing and are not counted.

    Raises:
        ValueError: a count is negative.
    """
    if lost < 0 or won < 0:
        raise ValueError(f"{lost} and {won} are not counts")
    total, fewer = lost + won, min(lost, won)
    log_all = total * math.log(2)
    of_total = math.lgamma(total + 1)
    tail = math.fsum(
        math.exp(of_total - math.lgamma(k + 1) - math.lgamma(total - k + 1) - log_all) for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def paired_bootstrap(differences: Iterable[tuple[object, float]], resamples: int = 10_000, seed: int = 0) -> Difference:
    """The mean of paired differences, with the percentile interval of a bootstrap over whole groups.

    Args:
        differences: the group of each pair, like its database, and its difference. Pairs of a group are drawn
            together, for they are not independent; give each pair a group of its own if they are.
        resamples: how often to draw (Efron & Tibshirani 1993, 13.3).
        seed: the same pairs in any order and the same seed give the same interval.
    """
    groups: dict[object, tuple[float, int]] = {}
    for group, difference in differences:
        total, size = groups.get(group, (0.0, 0))
        groups[group] = (total + difference, size + 1)
    if len(groups) < 2:  # of one alone, every draw is the same: that says nothing of how groups differ
        return Difference(next((total / size for total, size in groups.values()), None), None, None)
    # Groups of the same total and size are interchangeable: how often each kind is drawn is multinomial.
    kinds = sorted(Counter(groups.values()).items())
    totals = numpy.array([total for (total, _), _ in kinds])
    sizes = numpy.array([float(size) for (_, size), _ in kinds])
    counts = numpy.array([count for _, count in kinds])
    drawn = numpy.random.default_rng(seed).multinomial(len(groups), counts / len(groups), size=resamples)
    low, high = numpy.quantile((drawn @ totals) / (drawn @ sizes), (0.025, 0.975))
    return Difference(float((counts @ totals) / (counts @ sizes)), float(low), float(high))
