"""Models side by side on the same records: how often each is right, and which differences are more than chance.

Reads the ledgers of runs, mostly of `fastdistill eval`. The last run is what the others are compared with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fastdistill.control.diff import ENDED, group_of
from fastdistill.control.folder import RunFolder, read_json, write_json
from fastdistill.control.tally import interval
from fastdistill.control.terminal import figure, percent, points, say, show_table
from fastdistill.core.compare import Difference, mcnemar, paired_bootstrap
from fastdistill.core.errors import InputError
from fastdistill.core.scores import agreement_intervals, pass_at_k
from fastdistill.core.stats import Rate, wilson
from fastdistill.core.types import Outcome, Sample

K = 8  # of pass@k, or fewer where fewer were drawn


@dataclass(frozen=True, slots=True)
class Item:
    """What became of one record: of its draws in their order, those that could be judged."""

    group: str
    right: tuple[bool, ...]
    scores: tuple[float | None, ...]
    answers: tuple[str, ...]
    """Those accepted."""
    tokens: tuple[int, ...]
    gates: Mapping[str, Outcome]
    """Of the first draw."""

    @property
    def rate(self) -> float:
        return fmean(self.right)

    def pass_at(self, k: int) -> float:
        return pass_at_k(len(self.right), sum(self.right), k)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: who was asked, and the items by sample id."""

    run_id: str
    model: str
    role: str | None
    items: Mapping[str, Item]
    undecided: int

    def accuracy(self) -> Rate:
        """First draws that every gate passed."""
        return wilson(sum(item.right[0] for item in self.items.values()), len(self.items))

    def gate_rates(self) -> dict[str, Rate]:
        """For each gate the share of first draws that it passed, of those that it could judge."""
        names = dict.fromkeys(name for item in self.items.values() for name in item.gates)
        return {name: _passed([item.gates.get(name) for item in self.items.values()]) for name in names}

    def pass_at(self) -> tuple[int, Difference]:
        """k, and pass@k with its interval over groups."""
        k = min(K, min((len(item.right) for item in self.items.values()), default=0))
        return k, paired_bootstrap((item.group, item.pass_at(k)) for item in self.items.values() if k)

    def diversity(self) -> float | None:
        """Distinct accepted answers for each accepted one: 1 where none was given twice."""
        accepted = sum(len(item.answers) for item in self.items.values())
        return sum(len({*item.answers}) for item in self.items.values()) / accepted if accepted else None

    def length(self) -> float | None:
        """Mean completion tokens of an answer."""
        tokens = [count for item in self.items.values() for count in item.tokens]
        return fmean(tokens) if tokens else None

    def figures(self, gates: Iterable[str] = ()) -> dict[str, str]:
        """What is shown of a run, in words, with the rates of these gates."""
        (k, passed), rates = self.pass_at(), self.gate_rates()
        return {
            "samples": f"{len(self.items):,}",
            "undecided": f"{self.undecided:,}",
            "right, first draw": percent(self.accuracy()),
            **{f"  {gate}": percent(rates[gate]) if gate in rates else "–" for gate in gates},
            "pass@k": f"@{k}: {figure(passed.estimate, '{:.1%}')}" if k else "–",
            "distinct of the accepted": figure(self.diversity(), "{:.2f}"),
            "tokens an answer": figure(self.length(), "{:.1f}"),
        }

    def report(self) -> dict[str, Any]:
        """One run's figures, as the JSON has them."""
        k, passed = self.pass_at()
        return {
            "run_id": self.run_id,
            "role": self.role,
            "model": self.model,
            "samples": len(self.items),
            "undecided": self.undecided,
            "accuracy": interval(self.accuracy()),
            "gates": {name: interval(rate) for name, rate in self.gate_rates().items()},
            "k": k,
            "pass_at_k": asdict(passed),
            "diversity": self.diversity(),
            "mean_tokens": self.length(),
        }


@dataclass(frozen=True, slots=True)
class Pair:
    """One run against another on the samples that both have."""

    run: str
    against: str
    compared: int
    only_run: int
    only_against: int
    won: int
    lost: int
    p_value: float
    difference: Difference
    """Of the share of right draws, over groups."""
    pass_at_k: Difference
    scores: Mapping[str, Difference] | None


def measure(folder: RunFolder, group_by: str | None = None) -> Measured:
    """Raises InputError if the run has no ledger, or a record lacks the field `group_by`."""
    manifest = read_json(folder.manifest)
    items: dict[str, Item | None] = {}
    asked: set[str] = set()
    for sample in folder.samples(ENDED):
        asked.update(candidate.prompt.model for candidate in sample.candidates)
        items[sample.sample_id] = _item(sample, group_by)
    decided = {sample_id: item for sample_id, item in items.items() if item is not None}
    models = ", ".join(sorted(asked))
    return Measured(folder.run_id, models, manifest.get("role"), decided, len(items) - len(decided))


def pair(one: Measured, other: Measured, epsilon: float = 0.1) -> Pair:
    """`one` against `other`: `won` counts first draws that are right in `one` alone."""
    both = [(item, other.items[key]) for key, item in one.items.items() if key in other.items]
    k = min(K, min((min(len(a.right), len(b.right)) for a, b in both), default=0))
    firsts = [(a.right[0], b.right[0]) for a, b in both]
    won, lost = firsts.count((True, False)), firsts.count((False, True))
    return Pair(
        run=one.run_id,
        against=other.run_id,
        compared=len(both),
        only_run=len(one.items) - len(both),
        only_against=len(other.items) - len(both),
        won=won,
        lost=lost,
        p_value=mcnemar(lost, won),
        difference=paired_bootstrap((a.group, a.rate - b.rate) for a, b in both),
        pass_at_k=paired_bootstrap((a.group, a.pass_at(k) - b.pass_at(k)) for a, b in both if k),
        scores=_agreement([(a.scores[0], b.scores[0]) for a, b in both], epsilon),
    )


def noise_floor(run: Measured, epsilon: float = 0.1) -> Mapping[str, Difference] | None:
    """A model's scores against its own second draws: no other model can be expected to agree more."""
    return _agreement([item.scores[:2] for item in run.items.values() if len(item.scores) > 1], epsilon)


def show_comparison(
    runs: Sequence[str], output_dir: Path | None, group_by: str | None, epsilon: float, json: Path | None
) -> None:
    """Prints runs side by side, the last against each of the others; writes the figures to the file `json`."""
    measured = [measure(RunFolder.find(output_dir, run), group_by) for run in runs]
    pairs = [pair(measured[-1], other, epsilon) for other in measured[:-1]]
    if not any(found.compared for found in pairs):
        raise InputError(f"{', '.join(runs)} have no sample in common: were they asked the same records?")
    floor = noise_floor(measured[0], epsilon)
    if json is not None:
        report = {
            "group_by": group_by,
            "epsilon": epsilon,
            "runs": [run.report() for run in measured],
            "pairs": [asdict(found) for found in pairs],
            "noise_floor": None if floor is None else {name: asdict(value) for name, value in floor.items()},
        }
        write_json(json, report)
    gates = dict.fromkeys(gate for run in measured for gate in run.gate_rates())
    figures = [run.figures(gates) for run in measured]
    roles = [run.role for run in measured]
    names = [run.role if run.role and roles.count(run.role) == 1 else run.run_id for run in measured]
    show_table(
        ("", *(f"{name}: {run.model}" for name, run in zip(names, measured, strict=True))),
        [(name, *(of_run[name] for of_run in figures)) for name in figures[0]],
    )
    for found in pairs:
        say(
            f"\n{found.run} − {found.against}, on {found.compared:,} samples of both"
            f" ({found.only_run:,} and {found.only_against:,} of one alone):"
        )
        say(f"  right: {points(found.difference)}; pass@k: {points(found.pass_at_k)}")
        say(
            f"  first draws: {found.won} won, {found.lost} lost, McNemar p = {found.p_value:.3g}"
            f"; {'not ' if indistinct(found.difference) else ''}distinguishable"
        )
        if found.scores is not None:
            say(f"  scores: {_words(found.scores, epsilon)}")
    if floor is not None:
        say(f"\nnoise floor, {names[0]} against itself: {_words(floor, epsilon)}")


def indistinct(found: Difference) -> bool:
    """Whether the interval holds 0, or there is none."""
    return found.low is None or found.high is None or found.low <= 0 <= found.high


def _words(scores: Mapping[str, Difference], epsilon: float) -> str:
    names = {"mae": "MAE", "rmse": "RMSE", "within": f"agreement@{epsilon:g}"}
    return ", ".join(
        f"{names.get(name, name)} " + ("–" if d.estimate is None else f"{d.estimate:.3f} [{d.low:.3f}, {d.high:.3f}]")
        for name, d in scores.items()
    )


def _item(sample: Sample, group_by: str | None) -> Item | None:
    """None where the first draw could not be judged. A record that brought no answer counts as one wrong draw."""
    group = group_of(sample, group_by)
    drawn = sorted(sample.candidates, key=lambda candidate: candidate.attempt)
    if not drawn:
        return Item(group, (False,), (None,), (), (), {})
    if drawn[0].outcome is Outcome.ERROR:
        return None
    judged = [candidate for candidate in drawn if candidate.outcome is not Outcome.ERROR]
    return Item(
        group=group,
        right=tuple(candidate.outcome is Outcome.PASS for candidate in judged),
        scores=tuple(candidate.score for candidate in judged),
        answers=tuple(candidate.answer for candidate in judged if candidate.outcome is Outcome.PASS),
        tokens=tuple(candidate.completion.usage.completion_tokens for candidate in judged),
        gates={verdict.gate: verdict.outcome for verdict in drawn[0].verdicts},
    )


def _passed(outcomes: Sequence[Outcome | None]) -> Rate:
    passed = outcomes.count(Outcome.PASS)
    return wilson(passed, passed + outcomes.count(Outcome.FAIL))


def _agreement(scores: Iterable[tuple[float | None, ...]], epsilon: float) -> Mapping[str, Difference] | None:
    """Of pairs of scores, as far as both are known."""
    known = [(one, other) for one, other in scores if one is not None and other is not None]
    return agreement_intervals(known, epsilon) if known else None
