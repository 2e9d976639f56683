"""Laws of the comparisons: exact, symmetric, and the same in any order."""

import random
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.core.compare import Difference, mcnemar, paired_bootstrap

counts = st.integers(0, 300)


@given(counts, counts)
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    total = lost + won
    tail = Fraction(sum(comb(total, k) for k in range(min(lost, won) + 1)), 2**total)
    assert mcnemar(lost, won) == pytest.approx(min(1.0, float(2 * tail)), rel=1e-9)
    assert mcnemar(lost, won) == mcnemar(won, lost)


def test_mcnemar_gives_the_published_figure_and_takes_large_counts() -> None:
    assert mcnemar(40, 20) == pytest.approx(0.0135, abs=1e-4)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(50_000, 50_000) == pytest.approx(1.0)
    assert mcnemar(49_000, 51_000) < 1e-9
    with pytest.raises(ValueError, match="-1"):
        mcnemar(-1, 3)


pairs = st.lists(st.tuples(st.integers(0, 8), st.sampled_from((-1.0, 0.0, 1.0))), min_size=1, max_size=60)


@settings(deadline=None)  # the first call imports numpy
@given(pairs, st.randoms(use_true_random=False))
def test_the_interval_holds_the_mean_and_does_not_depend_on_the_order(
    differences: list[tuple[object, float]], dice: random.Random
) -> None:
    found = paired_bootstrap(differences, resamples=400)
    assert found.estimate == pytest.approx(sum(difference for _, difference in differences) / len(differences))
    if len({group for group, _ in differences}) > 1:
        assert found.low is not None and found.high is not None
        assert -1 <= found.low <= found.high <= 1
    shuffled = list(differences)
    dice.shuffle(shuffled)
    assert paired_bootstrap(shuffled, resamples=400) == found


def test_the_interval_covers_what_it_should() -> None:
    """Of 200 experiments whose true difference is 0.1, about 95% have it in their interval."""
    dice = random.Random(7)
    covered = 0
    for _ in range(200):
        drawn = dice.choices((-1.0, 0.0, 1.0), weights=(0.1, 0.7, 0.2), k=150)
        found = paired_bootstrap(enumerate(drawn), resamples=1000)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.1 <= found.high
    assert 180 <= covered <= 198


def test_pairs_of_one_group_count_as_one() -> None:
    alone = [(n, float(n % 5 == 0)) for n in range(100)]
    together = [(n // 20 if n % 5 else 0, float(n % 5 == 0)) for n in range(100)]
    assert _width(paired_bootstrap(together)) > 2 * _width(paired_bootstrap(alone))


def test_nothing_to_compare_is_no_difference() -> None:
    assert paired_bootstrap([]) == Difference(None, None, None)


def test_one_group_alone_has_no_interval() -> None:
    assert paired_bootstrap([("city", 1.0), ("city", 0.0)]) == Difference(0.5, None, None)


def _width(found: Difference) -> float:
    assert found.low is not None and found.high is not None
    return found.high - found.low
