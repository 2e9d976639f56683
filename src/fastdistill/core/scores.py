"""Measures of samples and of scores: pass@k, and how far two sets of scores agree."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy

from fastdistill.core.compare import Difference

Pairs: TypeAlias = Sequence[tuple[float, float]] | numpy.ndarray


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """The chance that one of k draws is right, from `right` of `drawn`, without bias (Chen et al., arXiv:2107.03374).

    Raises:
        ValueError: fewer were drawn than k.
    """
    if not 0 <= right <= drawn or not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} of {right} right among {drawn}")
    return 1 - math.prod(1 - k / n for n in range(drawn - right + 1, drawn + 1))


def agreement(pairs: Pairs, epsilon: float = 0.1) -> dict[str, float | None]:
    """How near paired scores are; `within`: the share of pairs that are no further apart than `epsilon`.

    A correlation has no value (None) where one side is constant. Raises ValueError without pairs.
    """
    if not len(pairs):
        raise ValueError("there are no pairs")
    left, right = numpy.asarray(pairs).T
    gaps = abs(left - right)
    return {
        "mae": float(gaps.mean()),
        "rmse": math.sqrt((gaps * gaps).mean()),
        "within": float((gaps <= epsilon + 1e-12).mean()),
        "pearson": _correlation(left, right),
        "spearman": _correlation(ranks(left), ranks(right)),
    }


def agreement_intervals(pairs: Pairs, epsilon: float = 0.1, resamples: int = 1000) -> dict[str, Difference]:
    """Each measure of `agreement` with the percentile interval of a bootstrap over pairs.

    A correlation's interval is of those draws in which it has a value.
    """
    both, rng = numpy.asarray(pairs), numpy.random.RandomState(0)  # which draws the same in every version of numpy
    drawn = [agreement(both[rng.randint(len(both), size=len(both))], epsilon) for _ in range(resamples)]
    found = {}
    for name, estimate in agreement(pairs, epsilon).items():
        values = sorted(value for one in drawn if (value := one[name]) is not None)
        low, high = (values[int(q * (len(values) - 1))] for q in (0.025, 0.975)) if values else (None, None)
        found[name] = Difference(estimate, low, high)
    return found


def ranks(values: Sequence[float] | numpy.ndarray) -> numpy.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    shared: numpy.ndarray = (counts.cumsum() - (counts - 1) / 2)[place]
    return shared


def _correlation(left: numpy.ndarray, right: numpy.ndarray) -> float | None:
    if left.min() == left.max() or right.min() == right.max():
        return None
    x, y = left - left.mean(), right - right.mean()
    scale = math.sqrt(x @ x) * math.sqrt(y @ y)
    return float(x @ y) / scale if scale else None
