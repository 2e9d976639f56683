"""Intervals against published values, and quantiles against the exact ones."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistill.core.stats import Histogram, Rate, wilson


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (45, 50, 0.7864, 0.9565),
        (50, 50, 0.9287, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, total: int, low: float, high: float) -> None:
    rate = wilson(successes, total)
    assert rate.rate == successes / total
    assert rate.low == pytest.approx(low, abs=5e-5)
    assert rate.high == pytest.approx(high, abs=5e-5)


def test_no_trials_have_no_rate() -> None:
    assert wilson(0, 0) == Rate(0, 0, None, None, None)


@pytest.mark.parametrize(("successes", "total"), [(-1, 3), (4, 3), (1, 0)])
def test_what_is_not_a_share_is_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="not a share"):
        wilson(successes, total)


@given(st.integers(1, 10**9).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_holds_the_rate_and_stays_within_0_and_1(share: tuple[int, int]) -> None:
    rate = wilson(*share)
    assert rate.rate is not None and rate.low is not None and rate.high is not None
    assert 0 <= rate.low <= rate.rate + 1e-12 and rate.rate - 1e-12 <= rate.high <= 1


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_of_failures_mirrors_that_of_successes(share: tuple[int, int]) -> None:
    successes, total = share
    rate, mirrored = wilson(successes, total), wilson(total - successes, total)
    assert rate.low is not None and mirrored.high is not None
    assert rate.low == pytest.approx(1 - mirrored.high, abs=1e-12)


@given(st.lists(st.floats(1e-6, 1e5), min_size=1, max_size=300), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_quantile_is_right_to_one_percent(seconds: list[float], q: float) -> None:
    histogram = Histogram()
    for each in seconds:
        histogram.add(each)
    exact = sorted(seconds)[math.ceil(q * len(seconds)) - 1]
    assert histogram.quantile(q) == pytest.approx(exact, rel=0.0101)
    assert histogram.quantile(q) <= max(seconds)


def test_a_histogram_that_is_summed_up_stays_small() -> None:
    histogram = Histogram()
    for n in range(100_000):
        histogram.add(0.001 + n / 1000)
        if n % 1000 == 999:
            histogram.sum_up()
    assert len(pickle.dumps(histogram)) < 15_000
    assert histogram.count == 100_000


def test_an_empty_histogram_has_a_summary() -> None:
    assert Histogram().summary() == {
        "count": 0, "total_s": 0.0, "p50_s": 0.0, "p90_s": 0.0, "p95_s": 0.0, "p99_s": 0.0, "max_s": 0.0,
    }  # fmt: skip


def test_durations_of_zero_count_too() -> None:
    histogram = Histogram()
    for seconds in (0.0, 0.0, 1.0):
        histogram.add(seconds)
    assert histogram.quantile(0.5) <= 1e-6
    assert histogram.quantile(1) == pytest.approx(1, rel=0.01)
    assert histogram.summary()["total_s"] == 1.0
