"""pass@k, and agreement of scores."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistill.core.scores import agreement, agreement_intervals, pass_at_k, ranks


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_draw(case: tuple[int, int, int]) -> None:
    drawn, right, k = case
    subsets = list(combinations([True] * right + [False] * (drawn - right), k))
    assert pass_at_k(drawn, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("case", [(3, 4, 1), (3, 1, 4), (3, -1, 1), (0, 0, 1)])
def test_pass_at_k_of_nothing_that_was_drawn_is_an_error(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*case)


def test_agreement_of_a_worked_example() -> None:
    found = agreement([(1.0, 1.0), (0.5, 0.6), (0.0, 0.5), (0.2, 0.1)], epsilon=0.1)
    assert found["mae"] == pytest.approx(0.175)
    assert found["rmse"] == pytest.approx(math.sqrt((0.01 + 0.25 + 0.01) / 4))
    assert found["within"] == 0.75
    assert found["pearson"] == pytest.approx(0.7982, abs=1e-4)
    assert found["spearman"] == pytest.approx(0.8)


def test_a_constant_side_has_no_correlation() -> None:
    found = agreement([(1.0, 0.1), (1.0, 0.9)])
    assert (found["pearson"], found["spearman"]) == (None, None)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_agreement_does_not_depend_on_who_comes_first(pairs: list[tuple[float, float]]) -> None:
    one, other = agreement(pairs), agreement([(b, a) for a, b in pairs])
    assert (one["mae"], one["rmse"], one["within"]) == (other["mae"], other["rmse"], other["within"])
    assert one["pearson"] == (None if other["pearson"] is None else pytest.approx(other["pearson"], nan_ok=True))


def test_equal_values_share_their_mean_rank() -> None:
    assert list(ranks([3.0, 1.0, 3.0, 2.0])) == [3.5, 1.0, 3.5, 2.0]


def test_intervals_hold_the_estimate() -> None:
    pairs = [(n % 7 / 7, n % 5 / 5) for n in range(60)]
    for found in agreement_intervals(pairs, resamples=200).values():
        assert found.estimate is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.estimate <= found.high
