"""How well a judge does where execution knows better, counted while a run is at work."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from fastdistill.core.agreement import Agreement, Confusion, corrected_rate
from fastdistill.core.stats import interval
from fastdistill.core.types import Candidate, Outcome
from fastdistill.data.judge import LLMJudge

ENOUGH = 100  # of each kind: below that an interval says little (precision 0.9 is known to 6 points at 100)


class Calibration:
    """One judge's verdicts beside those of the gate that it names as `truth`, and its judges beside each other."""

    def __init__(self, judge: LLMJudge) -> None:
        self._judge = judge
        self._confusion: Counter[str] = Counter()
        self._agreement = Agreement()
        self._unknown: Counter[bool] = Counter()  # passed or not, where there is no truth

    def add(self, candidate: Candidate) -> None:
        verdict = candidate.verdict(self._judge.name)
        if verdict is None or verdict.outcome is Outcome.ERROR:
            return
        scores = verdict.detail.get("judges", {})
        self._agreement.add({name: score >= self._judge.min_score for name, score in scores.items()})
        truth = candidate.verdict(self._judge.truth) if self._judge.truth else None
        passed = verdict.outcome is Outcome.PASS
        if truth is None or truth.outcome is Outcome.ERROR:
            self._unknown[passed] += 1
            return
        right = truth.outcome is Outcome.PASS
        self._confusion[f"{'true' if right == passed else 'false'}_{'pass' if passed else 'fail'}"] += 1

    def report(self) -> dict[str, Any]:
        """The quality report's section.

        `precision` is what it would be over all answers: those that were drawn for calibration count for the others.
        """
        seen, judge = Confusion(**self._confusion), self._judge
        report: dict[str, Any] = {}
        if self._agreement.joint:
            report["agreement"] = {"kappa": self._agreement.kappas(), "alpha": self._agreement.alpha()}
        if judge.truth is None:
            return {**report, "truth": None}
        sensitivity, specificity = seen.sensitivity(), seen.specificity()
        fooled = seen.false_pass / judge.calibrate if judge.calibrate else 0.0
        passed = seen.true_pass + fooled
        judged = self._unknown.total()
        corrected = corrected_rate(self._unknown[True], judged, seen)
        return {
            **report,
            "truth": judge.truth,
            "enough": min(sensitivity.total, specificity.total) >= ENOUGH,
            "confusion": asdict(seen),
            "sensitivity": interval(sensitivity),
            "specificity": interval(specificity),
            "precision": round(seen.true_pass / passed, 6) if passed and judge.calibrate else None,
            "mcc": seen.mcc(),
            "judged_without_truth": judged,
            "corrected_rate": None if corrected is None else interval(corrected),
        }
