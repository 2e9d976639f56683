"""Pairs of a better and a worse answer, for DPO and its kin, and the same answers with labels, for KTO.

What execution says comes first, scores only between answers that it can't tell apart. Judges nothing itself.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean, pstdev
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from fastdistill.core.stats import wilson
from fastdistill.core.step import Output
from fastdistill.core.types import Candidate, Outcome, Sample
from fastdistill.data.export.dataset import FD_COLUMNS, Example, Export, Shape, candidate_columns
from fastdistill.data.select import best_first

PAIRS = frozenset({Shape.PREFERENCE, Shape.OPENAI_DPO, Shape.LLAMAFACTORY_DPO})
LABELLED = frozenset({Shape.KTO, Shape.LLAMAFACTORY_KTO})
MANY = 32  # scores
PAIR_COLUMNS = (
    "fd_id", "fd_sample_id", "fd_task_id", "fd_chosen_id", "fd_rejected_id", "fd_chosen_model", "fd_rejected_model",
    "fd_by", "fd_rejected_reason", "fd_score_chosen", "fd_score_rejected", "fd_margin", "fd_len_chosen",
    "fd_len_rejected",
)  # fmt: skip


class ExportPreference(Export):
    """Writes pairs to `preference/` and labelled answers to `kto/` of the data set, and passes every sample on.

    An accepted answer is chosen over one that a gate failed, or over an accepted one whose score is lower by at least
    `min_margin`. An answer with an `error` is in no pair: nobody knows what it is worth. Pairs of equal answers (the
    same words, or the same result of execution), and those whose lengths differ too much, are left out: students learn
    length before they learn what is right. With `teacher_vs_student` the teacher's answers are chosen over the
    student's (direct preference knowledge distillation, arXiv:2406.19774). The prompt is the rejected answer's.
    """

    version: ClassVar[int] = 3

    writes: ClassVar[frozenset[Shape]] = PAIRS | LABELLED

    shapes: tuple[Shape, ...] = Field((Shape.PREFERENCE, Shape.KTO), min_length=1)
    pair_source: Literal["teacher_candidates", "student_candidates", "teacher_vs_student"] = "teacher_candidates"
    student_step: str | None = Field(None, description="name of the TextGeneration step that asks the student")
    max_pairs: int = Field(2, gt=0, description="pairs of a sample at most; in kto/, answers with each label")
    min_margin: float = Field(0.2, gt=0, description="between the scores of two accepted answers")
    length_ratio: tuple[float, float] = Field((0.5, 2.0), description="of chosen to rejected, in characters")
    result: str = Field("result_signature", description="entry of a verdict's detail; answers that share it are equal")

    @model_validator(mode="after")
    def _knows_the_student(self) -> "ExportPreference":
        if self.student_step is None and self.pair_source != "teacher_candidates":
            raise ValueError(f"pair_source: {self.pair_source} needs student_step, the step that asks the student")
        if not 0 <= self.length_ratio[0] <= 1 <= self.length_ratio[1]:
            raise ValueError("length_ratio: from at most 1 to at least 1, like [0.5, 2]")
        return self

    def steps(self) -> Sequence[str]:
        return () if self.student_step is None else (self.student_step,)

    def columns(self, shape: Shape) -> tuple[str, ...]:
        return FD_COLUMNS if shape in LABELLED else PAIR_COLUMNS

    def examples(self, sample: Sample, seen: "Counter[str]") -> Iterator[Example]:
        students = [c for c in sample.candidates if c.step == self.student_step]
        teachers = [c for c in sample.candidates if c.step != self.student_step]
        better = students if self.pair_source == "student_candidates" else teachers
        worse = teachers if self.pair_source == "teacher_candidates" else students
        for chosen, rejected in self._pairs(better, worse, seen):
            seen["pairs"] += 1
            seen[f"pairs_by_{_decided_by(rejected)}"] += 1
            seen["chosen_longer"] += len(chosen.answer) > len(rejected.answer)
            yield self._example(sample, chosen, rejected)
        both = sample.candidates if self.pair_source == "teacher_vs_student" else better
        for candidate, label in self._labelled(both):
            seen[f"kto_{str(label).lower()}"] += 1
            columns = candidate_columns(sample, candidate) | self.kept(sample)
            yield Example(LABELLED, self.prompt(sample, candidate), _said(candidate), columns, label=label)

    def finish(self, seen: "Counter[str]", ctx: Output) -> None:
        longer = asdict(wilson(seen["chosen_longer"], seen["pairs"]))
        rate = {name: value and round(value, 6) for name, value in longer.items()}
        ctx.report(self.name, {"pairs": 0, **dict(sorted(seen.items())), "chosen_longer_rate": rate})

    def _pairs(
        self, better: Sequence[Candidate], worse: Sequence[Candidate], seen: "Counter[str]"
    ) -> Iterator[tuple[Candidate, Candidate]]:
        """The lowest scores are rejected first, each by the best answer that has been in the fewest pairs."""
        accepted = sorted((c for c in better if c.outcome is Outcome.PASS), key=best_first)
        used: Counter[str] = Counter()
        for rejected in _worst_first(c for c in worse if c.outcome is not Outcome.ERROR):
            reason = None
            for chosen in sorted((c for c in accepted if c is not rejected), key=lambda c: used[c.candidate_id]):
                reason = self._why_not(chosen, rejected)
                if reason is None:
                    used[chosen.candidate_id] += 1
                    yield chosen, rejected
                    break
            if reason is not None:
                seen[f"left_out_{reason}"] += 1
            if used.total() == self.max_pairs:
                return

    def _why_not(self, chosen: Candidate, rejected: Candidate) -> str | None:
        """Why two answers make no pair, if they don't."""
        same_class = rejected.outcome is Outcome.PASS
        if same_class and (_margin(chosen, rejected) or 0.0) < self.min_margin:
            return "small_margin"
        results = [self._result(chosen), self._result(rejected)]
        if _words(chosen) == _words(rejected) or (results[0] is not None and results[0] == results[1]):
            return "equal"
        low, high = self.length_ratio
        if not low * len(rejected.answer) <= len(chosen.answer) <= high * len(rejected.answer):
            return "length"
        return None

    def _result(self, candidate: Candidate) -> Any:
        return next((v.detail[self.result] for v in candidate.verdicts if self.result in v.detail), None)

    def _labelled(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, bool]]:
        """The best accepted and the worst rejected answers, each text once; also where no pair can be made."""
        right = sorted((c for c in candidates if c.outcome is Outcome.PASS), key=best_first)
        wrong = _worst_first(c for c in candidates if c.outcome is Outcome.FAIL)
        for ranked, label in ((right, True), (wrong, False)):
            first: dict[str, Candidate] = {}
            for candidate in ranked:
                if candidate.answer.strip():
                    first.setdefault(_words(candidate), candidate)
            for candidate in [*first.values()][: self.max_pairs]:
                yield candidate, label

    def _example(self, sample: Sample, chosen: Candidate, rejected: Candidate) -> Example:
        failed = next((v for v in rejected.verdicts if v.outcome is Outcome.FAIL), None)
        values = (
            f"{sample.sample_id}#{chosen.candidate_id[:8]}>{rejected.candidate_id[:8]}", sample.sample_id,
            sample.task_id, chosen.candidate_id, rejected.candidate_id, chosen.prompt.model, rejected.prompt.model,
            _decided_by(rejected), f"{failed.gate}: {failed.reason}" if failed else None,
            chosen.score, rejected.score, _margin(chosen, rejected), len(chosen.answer), len(rejected.answer),
        )  # fmt: skip
        columns = dict(zip(PAIR_COLUMNS, values, strict=True)) | self.kept(sample)
        return Example(PAIRS, self.prompt(sample, rejected), _said(chosen), columns, _said(rejected))


def _decided_by(rejected: Candidate) -> str:
    return "score" if rejected.outcome is Outcome.PASS else "execution"


def _said(candidate: Candidate) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": candidate.answer}]


def _words(candidate: Candidate) -> str:
    return " ".join(candidate.answer.split())


def _margin(chosen: Candidate, rejected: Candidate) -> float | None:
    return None if chosen.score is None or rejected.score is None else round(chosen.score - rejected.score, 6)


def _worst_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Failed before accepted; among each the lowest score, and those without one, which never ran, last.

    The lowest of many scores is an outlier, from which less is learnt: of `MANY` and more, those nearest to two
    standard deviations below the mean come first (arXiv:2502.16825).
    """
    candidates = list(candidates)
    scores = [candidate.score for candidate in candidates if candidate.score is not None]
    low = min(scores, default=0.0) if len(scores) < MANY else fmean(scores) - 2 * pstdev(scores)

    def place(candidate: Candidate) -> tuple[bool, bool, float, int, str]:
        passed, score = candidate.outcome is Outcome.PASS, candidate.score
        return (passed, score is None, abs((score or 0.0) - low), candidate.attempt, candidate.candidate_id)

    return sorted(candidates, key=place)
