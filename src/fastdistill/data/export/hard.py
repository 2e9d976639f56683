"""Writes the samples that the teacher does not get right, with what it tried: what to look at, or to teach, next."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
from pydantic import Field

from fastdistill.core.errors import SampleError
from fastdistill.core.step import Context, StreamStep
from fastdistill.core.types import Candidate, Outcome, Sample, Status
from fastdistill.data.export.dataset import candidate_columns, jsonl_file


class ExportHardCases(StreamStep):
    """Writes `hard/cases.jsonl` of the data set, and passes every sample on.

    A hard case has a candidate that failed a gate, and a pass rate of `max_pass_rate` or less: accepted candidates
    among those that could be judged. Where none failed, gold or the machine is at fault, and nothing is written.
    """

    version: ClassVar[int] = 2

    max_pass_rate: float = Field(0.0, ge=0, lt=1, description="accepted candidates among those that could be judged")

    def files(self, split: str) -> dict[str, str]:
        return {"hard/cases.jsonl": "cases"}

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        with jsonl_file(ctx.dist / "hard" / "cases.jsonl") as write:
            for sample in samples:
                try:
                    if row := self._row(sample):
                        write(msgspec.json.encode(row) + b"\n")
                except UnicodeEncodeError as error:
                    failure = SampleError("not_unicode", f"{sample.source}: a lone surrogate in a row: {error}")
                    ctx.discard(sample.failed(self.name, failure))
                    continue
                yield sample

    def _row(self, sample: Sample) -> dict[str, Any]:
        outcomes = Counter(candidate.outcome for candidate in sample.candidates)
        passed, failed = outcomes[Outcome.PASS], outcomes[Outcome.FAIL]
        if sample.status is not Status.OPEN or not failed or passed > self.max_pass_rate * (passed + failed):
            return {}
        reasons: dict[str, Counter[str]] = {}
        for candidate in sample.candidates:
            for verdict in candidate.verdicts:
                if verdict.outcome is not Outcome.PASS:
                    reasons.setdefault(verdict.gate, Counter())[str(verdict.reason)] += 1
        best = max(sample.candidates, key=_closeness)
        return {
            "id": sample.sample_id,
            "record": sample.record,
            "attempts": len(sample.candidates),
            "pass_rate": passed / (passed + failed),
            "reasons": {gate: dict(sorted(counts.items())) for gate, counts in reasons.items()},
            "best": best.answer,
            "fd_source": sample.source,
            **candidate_columns(sample, best),
        }


def _closeness(candidate: Candidate) -> tuple[bool, int, float, int]:
    """The further through the gates, the better; then the higher score, then the earlier attempt."""
    passed = sum(verdict.outcome is Outcome.PASS for verdict in candidate.verdicts)
    return candidate.outcome is Outcome.PASS, passed, candidate.score or 0.0, -candidate.attempt
