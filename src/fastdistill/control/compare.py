"""Models side by side on the same records: how often each is right, and which differences are more than chance.

Reads the ledgers of runs, mostly of `fastdistill eval`. The last run is what the others are compared with.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from fastdistill.control.diff import group_of
from fastdistill.control.folder import ENDED, RunFolder, read_json, write_json
from fastdistill.control.tally import GateCount
from fastdistill.control.terminal import figure, percent, points, say, show_table
from fastdistill.core.compare import Difference, mcnemar, paired_bootstrap
from fastdistill.core.errors import InputError
from fastdistill.core.scores import agreement_intervals, pass_at_k
from fastdistill.core.stats import Rate, interval, wilson
from fastdistill.core.types import Outcome, Status

K = 8  # of pass@k, or fewer where fewer were drawn


@dataclass(frozen=True, slots=True)
class Item:
    """What became of one record: of its draws in their order, those that could be judged; without any, a wrong one."""

    group: str
    right: tuple[bool, ...]
    scores: tuple[float | None, ...]
    answered: bool
    distinct: int
    """Of the answers that were right."""

    def pass_at(self, k: int) -> float:
        return pass_at_k(len(self.right), sum(self.right), k) if self.answered else 0.0


def diversity(items: Sequence[Item]) -> float | None:
    """Distinct accepted answers for each accepted one: 1 where none was given twice."""
    accepted = sum(sum(item.right) for item in items)
    return sum(item.distinct for item in items) / accepted if accepted else None


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: who was asked, and how often it was right."""

    run_id: str
    role: str | None
    model: str
    samples: int
    undecided: int
    accuracy: Rate  # first draws that every gate passed
    gates: Mapping[str, Rate]  # first draws that it passed, of those that it could judge
    k: int
    pass_at_k: Difference  # over groups
    diversity: float | None
    mean_tokens: float | None  # of an answer's completion
    items: Mapping[str, Item]  # by sample id

    def figures(self, gates: Iterable[str] = ()) -> dict[str, str]:
        """What is shown of a run, in words, with the rates of these gates."""
        return {
            "samples": f"{self.samples:,}",
            "undecided": f"{self.undecided:,}",
            "right, first draw": percent(self.accuracy),
            **{f"  {gate}": percent(self.gates[gate]) if gate in self.gates else "–" for gate in gates},
            "pass@k": f"@{self.k}: {figure(self.pass_at_k.estimate, '{:.1%}')}" if self.k else "–",
            "distinct of the accepted": figure(self.diversity, "{:.2f}"),
            "tokens an answer": figure(self.mean_tokens, "{:.1f}"),
        }

    def report(self) -> dict[str, Any]:
        """All but the items, as the JSON has it."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "items"}
        gates = {name: interval(rate) for name, rate in self.gates.items()}
        return plain | {"accuracy": interval(self.accuracy), "gates": gates}


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
    """The figures of a run. A record that brought no answer counts as one wrong draw.

    Raises InputError if the run has no ledger, or a record lacks the field `group_by`.
    """
    items: dict[str, Item] = {}
    models: set[str] = set()
    gates: defaultdict[str, GateCount] = defaultdict(GateCount)
    tokens: list[int] = []
    undecided = 0
    for sample in folder.samples(ENDED):
        group, drawn = group_of(sample, group_by), sorted(sample.candidates, key=attrgetter("attempt"))
        models.update(candidate.prompt.model for candidate in drawn)
        if drawn and (sample.status is Status.FAILED or drawn[0].outcome is Outcome.ERROR):
            undecided += 1
            continue
        judged = [candidate for candidate in drawn if candidate.outcome is not Outcome.ERROR]
        right = tuple(candidate.outcome is Outcome.PASS for candidate in judged)
        scores = tuple(candidate.score for candidate in judged)
        distinct = len({candidate.answer for candidate in judged if candidate.outcome is Outcome.PASS})
        items[sample.sample_id] = Item(group, right or (False,), scores or (None,), bool(judged), distinct)
        tokens += [candidate.completion.usage.completion_tokens for candidate in judged]
        for verdict in (verdict for first in drawn[:1] for verdict in first.verdicts):
            if not verdict.detail.get("calibration"):  # which decides nothing
                gates[verdict.gate].outcomes[verdict.outcome] += 1
    found = [*items.values()]
    k = common_k(found) if found else 0
    return Measured(
        run_id=folder.run_id,
        role=read_json(folder.manifest).get("role"),
        model=", ".join(sorted(models)),
        samples=len(items),
        undecided=undecided,
        accuracy=wilson(sum(item.right[0] for item in found), len(items)),
        gates={name: gate.pass_rate() for name, gate in gates.items()},
        k=k,
        pass_at_k=paired_bootstrap((item.group, item.pass_at(k)) for item in found),
        diversity=diversity(found),
        mean_tokens=fmean(tokens) if tokens else None,
        items=items,
    )


def pair(one: Measured, other: Measured, epsilon: float = 0.1) -> Pair:
    """`one` against `other`: `won` counts first draws that are right in `one` alone."""
    both = shared(one, other)
    k = common_k(chain(*both))
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
        difference=paired_bootstrap((a.group, fmean(a.right) - fmean(b.right)) for a, b in both),
        pass_at_k=paired_bootstrap((a.group, a.pass_at(k) - b.pass_at(k)) for a, b in both),
        scores=_agreement([(a.scores[0], b.scores[0]) for a, b in both], epsilon),
    )


def shared(one: Measured, other: Measured) -> list[tuple[Item, Item]]:
    """The records that both have."""
    return [(item, other.items[key]) for key, item in one.items.items() if key in other.items]


def common_k(items: Iterable[Item]) -> int:
    """The k at which all of them have a pass@k: one that no answer came to has it at any."""
    return min([K, *(len(item.right) for item in items if item.answered)])


def noise_floor(run: Measured, epsilon: float = 0.1) -> Mapping[str, Difference] | None:
    """A model's scores against its own second draws: no other model can be expected to agree more."""
    return _agreement([item.scores[:2] for item in run.items.values() if len(item.scores) > 1], epsilon)


def show_comparison(
    runs: Sequence[str], output_dir: Path | None, group_by: str | None, epsilon: float, json: Path | None
) -> None:
    """Prints runs side by side, the last against each of the others; writes the figures to the file `json`."""
    measured = [measure(RunFolder.find(output_dir, run), group_by) for run in runs]
    pairs = [pair(measured[-1], other, epsilon) for other in measured[:-1]]
    if pairs and not any(found.compared for found in pairs):
        raise InputError(f"{', '.join(runs)} have no sample in common: were they asked the same records?")
    floor = noise_floor(measured[0], epsilon)
    if json is not None:
        reports = [run.report() for run in measured]
        report = {"group_by": group_by, "epsilon": epsilon, "runs": reports, "pairs": pairs, "noise_floor": floor}
        write_json(json, report)
    gates = dict.fromkeys(gate for run in measured for gate in run.gates)
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


def _agreement(scores: Iterable[tuple[float | None, ...]], epsilon: float) -> Mapping[str, Difference] | None:
    """Of pairs of scores, as far as both are known."""
    known = [(one, other) for one, other in scores if one is not None and other is not None]
    return agreement_intervals(known, epsilon) if known else None
