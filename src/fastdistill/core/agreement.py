"""How far judges can be trusted: agreement among them, and a rate corrected for the mistakes that a judge makes."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from fastdistill.core.stats import Z95, Rate, wilson


def cohen_kappa(joint: Mapping[tuple[Hashable, Hashable], int]) -> float | None:
    """Cohen's kappa (1960) of two judges from how often each pair of labels occurred; None where it has no value.

    It has none without labels, or when both judges only ever gave one and the same.
    """
    total = sum(joint.values())
    if not total:
        return None
    left: Counter[Hashable] = Counter()
    right: Counter[Hashable] = Counter()
    for (one, other), count in joint.items():
        left[one] += count
        right[other] += count
    by_chance = sum(left[label] * right[label] for label in left) / total**2
    agreed = sum(count for (one, other), count in joint.items() if one == other) / total
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)


@dataclass(slots=True)
class Agreement:
    """Labels that several judges gave to the same things, counted as they come; a judge may leave any of them out."""

    joint: dict[tuple[str, str], Counter[tuple[Hashable, Hashable]]] = field(default_factory=dict)
    _coincidences: Counter[tuple[Hashable, Hashable]] = field(default_factory=Counter)

    def add(self, labels: Mapping[str, Hashable]) -> None:
        """The labels of one thing, by judge."""
        judges = sorted(labels)
        for one, other in combinations(judges, 2):
            pair = labels[one], labels[other]
            self.joint.setdefault((one, other), Counter())[pair] += 1
            # Each ordered pair of labels weighs 1 / (m - 1), so that a thing counts once for each label it has.
            for left, right in (pair, pair[::-1]):
                self._coincidences[left, right] += 1 / (len(judges) - 1)  # type: ignore[assignment]

    def kappas(self) -> dict[str, float | None]:
        """Cohen's kappa of every two judges, under `"a, b"`."""
        return {", ".join(pair): cohen_kappa(counts) for pair, counts in sorted(self.joint.items())}

    def alpha(self) -> float | None:
        """Krippendorff's alpha for nominal labels (Content Analysis, chapter 11); None where nothing could differ.

        From 0.80 on conclusions may rest on the labels, from 0.667 on tentative ones.
        """
        totals: Counter[Hashable] = Counter()
        for (left, _), weight in self._coincidences.items():
            totals[left] += weight
        n = sum(totals.values())
        expected = (n * n - sum(count * count for count in totals.values())) / (n - 1) if n > 1 else 0
        if not expected:
            return None
        observed = sum(weight for (left, right), weight in self._coincidences.items() if left != right)
        return 1 - observed / expected


@dataclass(frozen=True, slots=True)
class Confusion:
    """A judge against the truth: counts of right and wrong answers that it passed and failed."""

    true_pass: int = 0
    false_pass: int = 0
    false_fail: int = 0
    true_fail: int = 0

    def sensitivity(self) -> Rate:
        """Right answers that it passes."""
        return wilson(self.true_pass, self.true_pass + self.false_fail)

    def specificity(self) -> Rate:
        """Wrong answers that it fails."""
        return wilson(self.true_fail, self.true_fail + self.false_pass)

    def mcc(self) -> float | None:
        """Matthews' correlation coefficient (1975); None where a row or a column is empty."""
        tp, fp, fn, tn = self.true_pass, self.false_pass, self.false_fail, self.true_fail
        scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return (tp * tn - fp * fn) / scale if scale else None


def corrected_rate(passed: int, judged: int, confusion: Confusion) -> Rate | None:
    """The share of right answers among those judged, given how the judge does where the truth is known.

    Rogan and Gladen's estimator (1978), (p + q0 - 1) / (q1 + q0 - 1) of pass rate, sensitivity q1 and specificity q0,
    with the interval of Lee et al. (arXiv:2511.21140): a delta method on counts that are moved towards a half. None
    for a judge that does no better than chance, or without both kinds of answers.
    """
    right, wrong = confusion.true_pass + confusion.false_fail, confusion.true_fail + confusion.false_pass
    if not (right and wrong and judged):
        return None
    skill = confusion.true_pass / right + confusion.true_fail / wrong - 1
    n, m1, m0 = judged + Z95**2, right + 2, wrong + 2
    p, q1, q0 = (passed + Z95**2 / 2) / n, (confusion.true_pass + 1) / m1, (confusion.true_fail + 1) / m0
    if skill <= 0 or q1 + q0 <= 1:
        return None
    raw = (passed / judged + confusion.true_fail / wrong - 1) / skill
    centre = (p + q0 - 1) / (q1 + q0 - 1)
    missed, found = q1 * (1 - q1) / m1, q0 * (1 - q0) / m0
    spread = math.sqrt(p * (1 - p) / n + centre**2 * missed + (1 - centre) ** 2 * found) / (q1 + q0 - 1)
    shift = 2 * Z95**2 * (centre * missed - (1 - centre) * found)
    low, high = centre + shift - Z95 * spread, centre + shift + Z95 * spread
    return Rate(passed, judged, _unit(raw), _unit(low), _unit(high))


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
