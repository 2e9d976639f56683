"""Measures of samples and of scores: pass@k, and how far two sets of scores agree."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TypeAlias

from fastdistill.core.compare import Difference

Pairs: TypeAlias = Sequence[tuple[float, float]]


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """The chance that one of k draws is right, from `right` of `drawn`, without bias (Chen et al., arXiv:2107.03374).

    Raises:
        ValueError: fewer were drawn than k.
    """
    if not 0 <= right <= drawn or not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} of {right} right among {drawn}")
    return 1 - math.prod(1 - k / n for n in range(drawn - right + 1, drawn + 1))


@dataclass(frozen=True, slots=True)
class ScoreAgreement:
    """How near paired scores are. A correlation has no value (None) where one side is constant."""

    mae: float
    rmse: float
    within: float  # share of the pairs that are no further apart than epsilon
    pearson: float | None
    spearman: float | None


def agreement(pairs: Pairs, epsilon: float = 0.1) -> ScoreAgreement:
    """Raises ValueError without pairs."""
    if not pairs:
        raise ValueError("there are no pairs")
    gaps = [abs(left - right) for left, right in pairs]
    left, right = zip(*pairs, strict=True)
    return ScoreAgreement(
        mae=fmean(gaps),
        rmse=math.sqrt(fmean(gap * gap for gap in gaps)),
        within=fmean(gap <= epsilon + 1e-12 for gap in gaps),
        pearson=_correlation(left, right),
        spearman=_correlation(ranks(left), ranks(right)),
    )


def agreement_intervals(pairs: Pairs, epsilon: float = 0.1, resamples: int = 1000) -> dict[str, Difference]:
    """Each measure of `agreement` with the percentile interval of a bootstrap over pairs.

    A correlation's interval is of those draws in which it has a value.
    """
    import random

    rng = random.Random(0)
    drawn = [asdict(agreement(rng.choices(pairs, k=len(pairs)), epsilon)) for _ in range(resamples)]
    found = {}
    for name, estimate in asdict(agreement(pairs, epsilon)).items():
        values = sorted(one[name] for one in drawn if one[name] is not None)
        low, high = (values[int(q * (len(values) - 1))] for q in (0.025, 0.975)) if values else (None, None)
        found[name] = Difference(estimate, low, high)
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + 1 + bisect_right(ordered, value)) / 2 for value in values]


def _correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    from statistics import StatisticsError, correlation

    try:
        return correlation(left, right)
    except StatisticsError:
        return None
