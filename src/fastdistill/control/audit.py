"""Measures the gates of a pipeline against the truth, and asks no teacher.

Each record's gold answer takes the teacher's place: a gate that fails it rejects falsely. Then the gold answers are
broken, one place at a time, and a gate that passes a broken one accepts falsely, unless it means the same after all:
where there is a stricter gate (for SQL: perturbed copies of the database) it tells the two apart, and otherwise such a
mutant is counted as `survived`, equivalent or untested.
"""

import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from msgspec.structs import replace
from pydantic import PrivateAttr

from fastdistill.control.audited import audit_file, files_of, is_audited
from fastdistill.control.folder import RunFolder, artifacts_root, write_json
from fastdistill.control.reports import versions
from fastdistill.control.session import Pipeline, Watch, execute, run_in_loop, unwatched
from fastdistill.control.terminal import percent, say, show_table
from fastdistill.core.errors import InputError, SampleError
from fastdistill.core.stats import interval, wilson
from fastdistill.core.step import Context, Gate, Mutation, SampleStep, is_generation
from fastdistill.core.types import Candidate, Completion, FinishReason, Outcome, Prompt, Sample, Verdict

GOLD = "gold"
_PROMPT = Prompt("audit", "gold", (), {})


class Finding(StrEnum):
    """What a gate made of an answer whose truth is known."""

    PASSED = "passed"  # gold
    FALSE_REJECT = "false_reject"
    BROKEN_GOLD = "broken_gold"  # the gate could not judge gold, so its mutants are left out
    REJECTED = "rejected"  # a mutant
    FALSE_ACCEPT = "false_accept"
    SURVIVED = "survived"  # passed, and not told from gold: equivalent or untested
    UNDECIDED = "undecided"  # a mutant that the gate could not judge


@dataclass(frozen=True, slots=True)
class Case:
    """An answer that a gate judged otherwise than it should, or could not judge."""

    index: int
    source: str
    sample_id: str
    operator: str
    finding: Finding
    reason: str
    answer: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is put in the teacher's place. `gate`: it was made for this one alone."""

    operator: str
    text: str
    gold: str
    gate: str | None = None
    may_be_equal: bool = False


def audit(
    pipeline: Pipeline, *, output_dir: Path | None = None, mutants: int = 2, seed: int = 0, watch: Watch | None = None
) -> list[dict[str, Any]]:
    """Audits every gate that asks no model, and writes a report of each under the artifacts root.

    Args:
        mutants: how many to try at most of each sample and each operator, drawn at random by `seed`.

    Raises:
        InputError: no gate knows of a gold answer.
        FatalError: the records or a database can't be read.
    """
    first = next((at for at, step in enumerate(pipeline.steps) if isinstance(step, SampleStep)), len(pipeline.steps))
    steps = tuple(step for step in pipeline.steps[first:] if isinstance(step, SampleStep))
    measured = _Measured(name="Audit", judging=steps, mutants=mutants, seed=seed)
    shortened = Pipeline(name=pipeline.name, steps=(*pipeline.steps[:first], measured), max_error_rate=1)
    with TemporaryDirectory(prefix="fastdistill-") as scratch:
        folder = RunFolder(Path(scratch), "audit", Path(scratch) / "run")
        result = run_in_loop(execute(shortened, folder, watch or unwatched))
    gates = [step for step in steps if is_audited(step)]
    if not measured._counts:
        raise InputError(
            f"{pipeline.name}: no gold answer was found, so there is nothing to measure with; gold_field of an"
            " execution gate names the record's field with it"
        )
    records = {name: result.manifest[name] for name in ("name", "inputs", "content_sha256")}
    records["samples"] = result.quality["samples"]
    reports = [measured.report(gate) | {"measured_on": records} for gate in gates]
    for gate, report in zip(gates, reports, strict=True):
        write_json(audit_file(artifacts_root(output_dir), gate), report)
    return reports


class _Measured(SampleStep):
    """Takes gold answers and mutants through all steps after generation; every gate judges what concerns it."""

    judging: tuple[SampleStep, ...]
    mutants: int
    seed: int

    _counts: dict[tuple[str, str], Counter[Finding]] = PrivateAttr(default_factory=dict)
    """By gate and operator."""
    _cases: dict[str, list[Case]] = PrivateAttr(default_factory=dict)
    _stricter: dict[str, Gate] = PrivateAttr(default_factory=dict)

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for step in self.judging:
                if is_audited(step) and (stricter := step.stricter()):
                    self._stricter[step.name] = stricter
                    await stack.enter_async_context(stricter.opened(ctx))
                await stack.enter_async_context(step.opened(ctx))
            yield

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        answers = self._answers(sample)
        if not answers:
            raise SampleError("no_gold", f"{sample.source}: no gate finds a gold answer in this record")
        completions = (Completion(answer.text, FinishReason.STOP) for answer in answers)
        candidates = [Candidate(f"{at}", at, None, "", _PROMPT, c, c.text) for at, c in enumerate(completions)]
        sample = given = sample.with_candidates(candidates)
        for step in self.judging:
            if is_generation(step):
                sample = given
            elif step.rewrites and not step.models():
                sample = await step.run(sample, ctx)
            elif is_audited(step):
                mine = [a for a in answers if a.gate in (None, step.name) and a.gold == (step.gold(sample) or a.gold)]
                await self._measure(step, mine, [sample.candidates[answers.index(a)] for a in mine], sample, ctx)
        return replace(sample, candidates=(), selection=None)

    def _answers(self, sample: Sample) -> list[_Answer]:
        chance = random.Random(f"{self.seed} {sample.sample_id}")
        answers: dict[tuple[str, str | None], _Answer] = {}
        for gate in filter(is_audited, self.judging):
            gold = gate.gold(sample)
            if gold is None:
                continue
            answers.setdefault((gold, None), _Answer(GOLD, gold, gold))
            by_operator: dict[str, list[Mutation]] = {}
            for mutation in gate.mutations(gold, sample):
                by_operator.setdefault(mutation.operator, []).append(mutation)
            for operator, mutations in sorted(by_operator.items()):
                for mutation in chance.sample(mutations, min(self.mutants, len(mutations))):
                    text = mutation.apply()
                    if text != gold:
                        answer = _Answer(operator, text, gold, gate.name, mutation.may_be_equal)
                        answers.setdefault((text, gate.name), answer)
        return list(answers.values())

    async def _measure(
        self, gate: Gate, answers: Sequence[_Answer], candidates: Sequence[Candidate], sample: Sample, ctx: Context
    ) -> None:
        judged = list(zip(answers, candidates, await _judged(gate, candidates, sample, ctx), strict=True))
        passed = [(answer, candidate) for answer, candidate, verdict in judged if verdict.outcome is Outcome.PASS]
        golds = {answer.gold for answer, _ in passed if answer.operator == GOLD}
        doubtful = [candidate for answer, candidate in passed if answer.may_be_equal and answer.gold in golds]
        if doubtful and (stricter := self._stricter.get(gate.name)):
            again = await _judged(stricter, doubtful, sample, ctx)
            doubtful = [c for c, verdict in zip(doubtful, again, strict=True) if verdict.outcome is not Outcome.FAIL]
        for answer, candidate, verdict in judged:
            if answer.operator == GOLD:
                finding = _OF_GOLD[verdict.outcome]
            elif answer.gold not in golds:
                continue
            else:
                finding = Finding.SURVIVED if candidate in doubtful else _OF_MUTANT[verdict.outcome]
            self._counts.setdefault((gate.name, answer.operator), Counter())[finding] += 1
            if finding not in (Finding.PASSED, Finding.REJECTED):
                detail = ", ".join(f"{name}={value!r}" for name, value in verdict.detail.items())
                place = (sample.index, sample.source, sample.sample_id)
                case = Case(*place, answer.operator, finding, str(verdict.reason), answer.text, detail[:500])
                self._cases.setdefault(gate.name, []).append(case)

    def report(self, gate: Gate) -> dict[str, Any]:
        """What was found of one gate, as its file has it."""
        operators = {at[1]: counts for at, counts in sorted(self._counts.items()) if at[0] == gate.name}
        golds = operators.pop(GOLD, Counter())
        mutants = sum(operators.values(), Counter())
        cases = sorted(self._cases.get(gate.name, ()), key=lambda case: (case.index, case.operator, case.answer))
        return {
            "gate": gate.name,
            "type": type(gate).__name__,
            "fingerprint": gate.fingerprint,
            "rates": {
                "golds": golds.total(),
                "broken_golds": golds[Finding.BROKEN_GOLD],
                "false_reject_rate": _rate(golds[Finding.FALSE_REJECT], golds[Finding.PASSED]),
                "mutants": mutants.total(),
                **_accepts(mutants),
            },
            "operators": {
                name: {finding: counts[finding] for finding in _OF_MUTANTS} | _accepts(counts)
                for name, counts in operators.items()
            },
            "seed": self.seed,
            "mutants_per_sample_and_operator": self.mutants,
            "inputs": [{"path": path, "sha256": content} for path, content in sorted(files_of(gate).items())],
            "versions": versions(),
            "cases": [asdict(case) for case in cases],
        }


def show_audit(reports: Sequence[Mapping[str, Any]], output_dir: Path | None) -> None:
    """Prints what each gate lets through and holds back, with an example of each kind, and where all of it is."""
    for report in reports:
        say(report["gate"], "bold")
        show_table(("answers", ">rejected", ">accepted", ">survived", ">error", "wrongly, 95% interval"), _rows(report))
    for report in reports:
        for finding in (Finding.FALSE_REJECT, Finding.FALSE_ACCEPT, Finding.BROKEN_GOLD, Finding.SURVIVED):
            cases = [case for case in report["cases"] if case["finding"] == finding]
            shown = 10 if finding is Finding.FALSE_REJECT else 2
            for case in cases[:shown]:
                say(
                    f"{report['gate']}: {finding}: {case['source']} {case['operator']} {case['reason']}:"
                    f" {' '.join(case['answer'].split())[:200]}"
                )
            if len(cases) > shown:
                say(f"{report['gate']}: {finding}: {len(cases) - shown} more", "dim")
        say(f"{report['gate']}: {artifacts_root(output_dir) / 'audits' / report['fingerprint']}.json")


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    wrong = report["rates"]["false_reject_rate"]
    golds = (wrong["successes"], wrong["total"] - wrong["successes"], "", report["rates"]["broken_golds"])
    yield GOLD, *map(str, golds), percent(wrong)
    for name, found in report["operators"].items():
        yield name, *(str(found[f]) for f in _OF_MUTANTS), percent(found["false_accept_rate"])


_OF_MUTANTS = (Finding.REJECTED, Finding.FALSE_ACCEPT, Finding.SURVIVED, Finding.UNDECIDED)
_OF_GOLD = {Outcome.PASS: Finding.PASSED, Outcome.FAIL: Finding.FALSE_REJECT, Outcome.ERROR: Finding.BROKEN_GOLD}
_OF_MUTANT = {Outcome.PASS: Finding.FALSE_ACCEPT, Outcome.FAIL: Finding.REJECTED, Outcome.ERROR: Finding.UNDECIDED}


def _accepts(counts: Counter[Finding]) -> dict[str, Any]:
    """The rate of false accepts, and what it is at most: if nothing that survived is equivalent."""
    accepted, survived, rejected = (counts[f] for f in (Finding.FALSE_ACCEPT, Finding.SURVIVED, Finding.REJECTED))
    return {"false_accept_rate": _rate(accepted, rejected), "at_most": _rate(accepted + survived, rejected)}


def _rate(wrong: int, right: int) -> dict[str, Any]:
    return interval(wilson(wrong, wrong + right))


async def _judged(gate: Gate, candidates: Sequence[Candidate], sample: Sample, ctx: Context) -> list[Verdict]:
    """Each candidate by itself, at once where one has nothing to do with another."""
    if gate.alone:
        return await gate.judge_all(candidates, sample, ctx)
    return [verdict for candidate in candidates for verdict in await gate.judge_all([candidate], sample, ctx)]
