"""Agreement among judges, and rates corrected for a judge's mistakes, against published figures and by simulation."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistill.core.agreement import Agreement, Confusion, cohen_kappa, corrected_rate


def test_kappa_of_a_worked_example() -> None:
    # 50 proposals, two readers: 20 both yes, 15 both no, 5 and 10 apart: 0.70 seen, 0.50 by chance.
    assert cohen_kappa({("y", "y"): 20, ("y", "n"): 5, ("n", "y"): 10, ("n", "n"): 15}) == pytest.approx(0.4)


def test_kappa_has_no_value_where_nothing_could_differ() -> None:
    assert cohen_kappa({("y", "y"): 7}) is None
    assert cohen_kappa({}) is None


def test_alpha_of_krippendorffs_own_example() -> None:
    # Computing Krippendorff's Alpha-Reliability (2011), part C: four observers, twelve units, with gaps: 0.743.
    observers = {
        "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    }
    agreement = Agreement()
    for unit in range(12):
        agreement.add({name: labels[unit] for name, labels in observers.items() if labels[unit] is not None})
    assert agreement.alpha() == pytest.approx(0.743, abs=5e-4)
    assert set(agreement.kappas()) == {"A, B", "A, C", "A, D", "B, C", "B, D", "C, D"}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2))
def test_judges_who_agree_have_one_and_no_two_have_more(labels: list[tuple[bool, bool]]) -> None:
    same, any_ = Agreement(), Agreement()
    for left, right in labels:
        same.add({"a": left, "b": left})
        any_.add({"a": left, "b": right})
    assert same.alpha() in (None, pytest.approx(1.0))
    assert (any_.alpha() or 0) <= 1 + 1e-9


def test_a_perfect_judge_needs_no_correction() -> None:
    rate = corrected_rate(60, 100, Confusion(true_pass=200, true_fail=200))
    assert rate is not None
    assert rate.rate == pytest.approx(0.6)


def test_a_judge_that_knows_nothing_can_not_be_corrected() -> None:
    assert corrected_rate(50, 100, Confusion(50, 50, 50, 50)) is None
    assert corrected_rate(50, 100, Confusion(true_pass=50)) is None


@pytest.mark.parametrize(("share", "sensitivity", "specificity"), [(0.3, 0.9, 0.7), (0.6, 0.8, 0.9), (0.9, 0.95, 0.6)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(
    share: float, sensitivity: float, specificity: float
) -> None:
    rng = random.Random(5)

    def passes(chance: float, count: int) -> int:
        return sum(rng.random() < chance for _ in range(count))

    held, bias = 0, 0.0
    for _ in range(400):
        found, caught = passes(sensitivity, 100), passes(specificity, 100)
        judged = passes(share * sensitivity + (1 - share) * (1 - specificity), 400)
        rate = corrected_rate(judged, 400, Confusion(found, 100 - caught, 100 - found, caught))
        assert rate is not None
        assert rate.low is not None
        assert rate.high is not None
        assert rate.rate is not None
        held += rate.low <= share <= rate.high
        bias += rate.rate - share
    assert held >= 0.92 * 400
    assert abs(bias / 400) < 0.02
