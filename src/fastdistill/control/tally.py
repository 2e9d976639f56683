"""Counts of a run, kept while samples finish: the live progress and the quality report read the same figures.

Memory does not grow with the number of samples. Content hashes are sums of item hashes modulo 2^256, so they don't
depend on the order in which samples finish.
"""

import re
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from operator import methodcaller
from typing import Any

from fastdistill.control.calibration import Calibration
from fastdistill.core.stats import Rate, interval, wilson
from fastdistill.core.step import Step
from fastdistill.core.types import Candidate, FinishReason, Outcome, Sample, Status
from fastdistill.data.judge import LLMJudge
from fastdistill.data.prepare import Shard

EXAMPLES = 3
_HASHED_AT_ONCE = 64  # samples


@dataclass(slots=True)
class Told:
    """How often something went wrong, and what was said of it, the first few in alphabetical order.

    These are the same ones, whatever order the samples finish in.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.count += 1
        if text not in self.examples:
            insort(self.examples, text)
            del self.examples[EXAMPLES:]


@dataclass(slots=True)
class GateCount:
    """One gate's verdicts on candidates. `flags` are the yes/no entries of their details, like `exec_pass`."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    flags: defaultdict[str, Counter[bool]] = field(default_factory=lambda: defaultdict(Counter))
    errors: defaultdict[str, Told] = field(default_factory=lambda: defaultdict(Told))
    scores: Counter[float] = field(default_factory=Counter)

    def pass_rate(self) -> Rate:
        """Passed among those that could be judged: `error` is neither."""
        passed = self.outcomes[Outcome.PASS]
        return wilson(passed, passed + self.outcomes[Outcome.FAIL])

    def flag_rate(self, flag: str) -> Rate:
        counts = self.flags[flag]
        return wilson(counts[True], counts.total())


class ContentHash:
    """Hash of a multiset of items, each a tuple of its identifying parts.

    What is added waits in a list for the next `sum_up`, for many at a time cost less.
    """

    def __init__(self) -> None:
        self._sum = 0
        self._fresh: list[tuple[str, ...]] = []
        self.add = self._fresh.append

    def remove(self, item: tuple[str, ...]) -> None:
        self._sum -= _sum([item])

    def sum_up(self) -> None:
        self._sum += _sum(self._fresh)
        self._fresh.clear()

    def __str__(self) -> str:
        self.sum_up()
        return f"{self._sum % 2**256:064x}"


_bytes, _digest = methodcaller("encode", "utf-8", "surrogatepass"), methodcaller("digest")


def _sum(items: Sequence[Sequence[str]]) -> int:
    return sum(map(int.from_bytes, map(_digest, map(sha256, map(_bytes, map("\x1f".join, items))))))


class Tally:
    """Takes every sample once, when it has gone through all gates or has left the stream before."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        at = max((at for at, step in enumerate(steps) if isinstance(step, Shard)), default=0)
        self._before_shards = [step.name for step in steps[:at]]
        self.samples = 0
        self.statuses: Counter[Status] = Counter()
        self.left_at: defaultdict[str, Counter[Status]] = defaultdict(Counter)
        self.accepted_samples = 0
        self.undecided_samples = 0  # nothing accepted, and at least one candidate that could not be judged
        self.outcomes: Counter[Outcome] = Counter()
        self.selected = 0
        self.cuts: Counter[str] = Counter()
        self.scores: Counter[float] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        # (finish reason, provider, model asked for, model served, build) of every candidate's answer
        self._answers: Counter[tuple[FinishReason, str, str, str | None, str | None]] = Counter()
        self.gates: defaultdict[str, GateCount] = defaultdict(GateCount)
        self.failures: defaultdict[tuple[str, str], Told] = defaultdict(Told)
        self.hashes: defaultdict[str, ContentHash] = defaultdict(ContentHash)
        self.reports: dict[str, dict[str, Any]] = {}  # by step: what it says of its whole work
        self.calibrations = {step.name: Calibration(step) for step in steps if isinstance(step, LLMJudge)}

    def add(self, sample: Sample) -> None:
        status, hashes = sample.status, self.hashes
        self.samples += 1
        self.statuses[status] += 1
        if sample.failures and status in (Status.OPEN, Status.FAILED):
            for failure in sample.failures:
                self.failures[failure.step, failure.reason].add(failure.message)
        hashes["samples"].add((sample.sample_id, sample.source))
        if self.samples % _HASHED_AT_ONCE == 0:
            for content in hashes.values():
                content.sum_up()
        outcomes = [self._candidate(candidate, hashes) for candidate in sample.candidates]
        if status is not Status.OPEN:
            self.left_at[sample.failures[-1].step][status] += 1
            return
        if Outcome.PASS in outcomes:
            self.accepted_samples += 1
        elif Outcome.ERROR in outcomes:
            self.undecided_samples += 1
        for rank, candidate in enumerate(sample.chosen):
            self.selected += 1
            hashes["selected"].add((candidate.candidate_id, str(rank), candidate.answer))

    def leave(self, sample: Sample) -> None:
        """A sample that was added while it was open leaves the stream after all: an export can't take it."""
        failure = sample.failures[-1]
        self.statuses[Status.OPEN] -= 1
        self.statuses[sample.status] += 1
        self.left_at[failure.step][sample.status] += 1
        self.failures[failure.step, failure.reason].add(failure.message)
        if sample.accepted:
            self.accepted_samples -= 1
        elif any(candidate.outcome is Outcome.ERROR for candidate in sample.candidates):
            self.undecided_samples -= 1
        for rank, candidate in enumerate(sample.chosen):
            self.selected -= 1
            self.hashes["selected"].remove((candidate.candidate_id, str(rank), candidate.answer))

    @property
    def own(self) -> int:
        """Samples that are not another shard's."""
        return self.samples - self.statuses[Status.ELSEWHERE]

    def error_rate(self) -> tuple[int, int]:
        """How many samples failed, of how many; without those that fail before `Shard`, for they fail in each shard."""
        shared = sum(self.left_at[name][Status.FAILED] for name in self._before_shards)
        return self.failed - shared, self.own - shared

    @property
    def failed(self) -> int:
        return self.statuses[Status.FAILED]

    @property
    def candidates(self) -> int:
        return self.outcomes.total()

    @property
    def finish_reasons(self) -> Counter[FinishReason]:
        reasons: Counter[FinishReason] = Counter()
        for (reason, *_), count in self._answers.items():
            reasons[reason] += count
        return reasons

    @property
    def served(self) -> Counter[tuple[str, str, str, str]]:
        """(provider, model asked for, model served, build) of every candidate's answer."""
        served: Counter[tuple[str, str, str, str]] = Counter()
        for (_, provider, asked, model, build), count in self._answers.items():
            served[provider, asked, model or "", build or ""] += count
        return served

    def accept_rate(self) -> Rate:
        """Samples with an accepted candidate, among those that could be decided."""
        return wilson(self.accepted_samples, self.statuses[Status.OPEN] - self.undecided_samples)

    def flag_rate(self, flag: str) -> Rate:
        """A flag's rate over the first gate that sets it."""
        return next((gate.flag_rate(flag) for gate in self.gates.values() if flag in gate.flags), wilson(0, 0))

    def stages(self) -> list[dict[str, Any]]:
        """The quality report's stages, in the order of the steps."""
        in_stream = self.samples
        stages: list[dict[str, Any]] = []
        for step in self.steps:
            left = self.left_at[step.name]
            kept = in_stream - left.total()
            stage: dict[str, Any] = {
                "step": step.name,
                "type": type(step).__name__,
                "fingerprint": step.fingerprint,
                "samples_in": in_stream,
                "samples_kept": kept,
                "samples_rejected": {str(status): count for status, count in sorted(left.items())},
            }
            if step.name in self.gates:
                stage["candidates"] = _gate_report(self.gates[step.name])
            if step.name in self.reports:
                stage["report"] = self.reports[step.name]
            if step.name in self.calibrations:
                stage["calibration"] = self.calibrations[step.name].report()
            if found := step.findings():
                stage["findings"] = dict(found)
            stages.append(stage)
            in_stream = kept
        return stages

    def _candidate(self, candidate: Candidate, hashes: Mapping[str, ContentHash]) -> Outcome:
        outcome, candidate_id = candidate.outcome, candidate.candidate_id
        prompt, completion = candidate.prompt, candidate.completion
        usage = completion.usage
        self.outcomes[outcome] += 1
        self._answers[
            completion.finish_reason, prompt.provider, prompt.model, completion.model, completion.build
        ] += 1  # fmt: skip
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        for cut in candidate.cuts:
            self.cuts[cut.kind] += 1
        if candidate.score is not None:
            self.scores[round(candidate.score, 2)] += 1
        hashes["candidates"].add((candidate_id, completion.text))
        if self.calibrations:
            for calibration in self.calibrations.values():
                calibration.add(candidate)
        for verdict in candidate.verdicts:
            name, said, detail = verdict.gate, verdict.outcome, verdict.detail
            if detail and detail.get("calibration"):
                continue  # it decides nothing
            gate = self.gates[name]
            gate.outcomes[said] += 1
            if said is not Outcome.PASS:
                gate.reasons[verdict.reason] += 1
            if verdict.score is not None:
                gate.scores[round(verdict.score, 2)] += 1
            if detail:
                for flag, value in detail.items():
                    if isinstance(value, bool):
                        gate.flags[flag][value] += 1
                if error := detail.get("exec_error"):
                    gate.errors[error_group(str(error))].add(str(error))
            hashes[name].add((candidate_id, said, verdict.reason))
        return outcome


def error_group(message: str) -> str:
    """An execution error without its particulars, so that equal mistakes count together.

    `no such column: t.naem` becomes `no such column`, `near "FORM": syntax error` becomes `syntax error`.
    """
    message = re.sub(r'near "[^"]*": ', "", message)
    return re.sub(r":\s.*|\(.*|[\"'`][^\"'`]*[\"'`]|\d+", "", message).strip() or message


def _gate_report(gate: GateCount) -> dict[str, Any]:
    report: dict[str, Any] = {
        "judged": gate.outcomes.total(),
        **{str(outcome): gate.outcomes[outcome] for outcome in Outcome},
        "pass_rate": interval(gate.pass_rate()),
        "reasons": dict(sorted(gate.reasons.items())),
    }
    for flag in sorted(gate.flags):
        report[f"{flag}_rate"] = interval(gate.flag_rate(flag))
    if gate.scores:
        report["scores"] = {str(score): count for score, count in sorted(gate.scores.items())}
    if gate.errors:
        report["exec_errors"] = [
            {"error": group, "count": told.count, "examples": told.examples}
            for group, told in sorted(gate.errors.items(), key=lambda item: (-item[1].count, item[0]))
        ]
    return report
