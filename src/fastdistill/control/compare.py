"""Models side by side on the same records: how often each is right, and which differences are more than chance.

Reads the ledgers of runs, mostly of `fastdistill eval`. The last run is what the others are compared with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fastdistill.control.card import percent
from fastdistill.control.diff import group_of
from fastdistill.control.folder import RunFolder, artifacts_root, read_json, write_json
from fastdistill.control.ledger import read_samples
from fastdistill.control.tally import interval
from fastdistill.core.compare import Difference, mcnemar, paired_bootstrap
from fastdistill.core.errors import InputError
from fastdistill.core.scores import agreement_intervals, pass_at_k
from fastdistill.core.stats import Rate, wilson
from fastdistill.core.types import Outcome, Sample

if TYPE_CHECKING:
    from rich.console import Console

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
        drawn = min((len(item.right) for item in self.items.values()), default=0)
        k = min(K, drawn)
        if not k:
            return 0, Difference(None, None, None)
        values = [(i.group, pass_at_k(len(i.right), sum(i.right), k)) for i in self.items.values()]
        return k, paired_bootstrap(values)

    def diversity(self) -> float | None:
        """Distinct accepted answers for each accepted one: 1 where none was given twice."""
        counts = [(len(set(item.answers)), len(item.answers)) for item in self.items.values() if item.answers]
        return sum(d for d, _ in counts) / sum(n for _, n in counts) if counts else None

    def length(self) -> float | None:
        """Mean completion tokens of an answer."""
        tokens = [count for item in self.items.values() for count in item.tokens]
        return fmean(tokens) if tokens else None


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
    if not folder.ledger.exists():
        raise InputError(f"{folder.ledger}: this run has no ledger yet")
    manifest = read_json(folder.manifest)
    items, undecided = {}, 0
    asked: set[str] = set()
    for sample in read_samples(folder.ledger, "sample_id != '' AND status IN ('open', 'failed')"):
        asked.update(candidate.prompt.model for candidate in sample.candidates)
        item = _item(sample, group_by)
        if item is None:
            undecided += 1
        else:
            items[sample.sample_id] = item
    return Measured(folder.run_id, ", ".join(sorted(asked)), manifest.get("role"), items, undecided)


def pair(one: Measured, other: Measured, epsilon: float = 0.1) -> Pair:
    """`one` against `other`: `won` counts first draws that are right in `one` alone."""
    both = [(item, other.items[key]) for key, item in one.items.items() if key in other.items]
    k = min((min(len(a.right), len(b.right)) for a, b in both), default=0)
    k = min(K, k)
    firsts = [(a.right[0], b.right[0]) for a, b in both]
    won, lost = firsts.count((True, False)), firsts.count((False, True))
    scored = [(a.scores[0], b.scores[0]) for a, b in both]
    known = [(a, b) for a, b in scored if a is not None and b is not None]
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
        pass_at_k=paired_bootstrap((a.group, _at(a, k) - _at(b, k)) for a, b in both if k),
        scores=agreement_intervals(known, epsilon) if known else None,
    )


def noise_floor(run: Measured, epsilon: float = 0.1) -> Mapping[str, Difference] | None:
    """A model's scores against its own second draws: no other model can be expected to agree more."""
    drawn = [item.scores[:2] for item in run.items.values() if len(item.scores) > 1]
    known = [(a, b) for a, b in drawn if a is not None and b is not None]
    return agreement_intervals(known, epsilon) if known else None


def show_comparison(
    runs: Sequence[str], output_dir: Path | None, group_by: str | None, epsilon: float, json: Path | None
) -> None:
    """Prints runs side by side, the last against each of the others; writes the figures to the file `json`."""
    from rich.console import Console

    root = artifacts_root(output_dir)
    measured = [measure(RunFolder.find(root, run), group_by) for run in runs]
    last = measured[-1]
    pairs = [pair(last, other, epsilon) for other in measured[:-1]]
    if not any(p.compared for p in pairs):
        raise InputError(f"{', '.join(runs)} have no sample in common: were they asked the same records?")
    floor = noise_floor(measured[0], epsilon)
    if json is not None:
        write_json(
            json,
            {
                "group_by": group_by,
                "epsilon": epsilon,
                "runs": [summary(run) for run in measured],
                "pairs": [asdict(p) for p in pairs],
                "noise_floor": floor and {name: asdict(value) for name, value in floor.items()},
            },
        )
    print_comparison(measured, pairs, floor, epsilon, Console())


def summary(run: Measured) -> dict[str, Any]:
    """One run's figures, as the JSON has them."""
    k, passed = run.pass_at()
    return {
        "run_id": run.run_id,
        "role": run.role,
        "model": run.model,
        "samples": len(run.items),
        "undecided": run.undecided,
        "accuracy": interval(run.accuracy()),
        "gates": {name: interval(rate) for name, rate in run.gate_rates().items()},
        "k": k,
        "pass_at_k": asdict(passed),
        "diversity": run.diversity(),
        "mean_tokens": run.length(),
    }


def print_comparison(
    runs: Sequence[Measured],
    pairs: Sequence[Pair],
    floor: Mapping[str, Difference] | None,
    epsilon: float,
    console: "Console",
) -> None:
    from rich.table import Table

    table = Table("", *(f"{run.role or run.run_id}: {run.model}" for run in runs), box=None)
    for name, cells in _rows(runs):
        table.add_row(name, *cells)
    console.print(table)
    for found in pairs:
        console.print(
            f"\n{found.run} − {found.against}, on {found.compared:,} samples of both"
            f" ({found.only_run:,} and {found.only_against:,} of one alone):",
            soft_wrap=True,
            markup=False,
        )
        console.print(f"  right: {points(found.difference)}; pass@k: {points(found.pass_at_k)}", markup=False)
        console.print(
            f"  first draws: {found.won} won, {found.lost} lost, McNemar p = {found.p_value:.3g}"
            f"; {'not ' if indistinct(found.difference) else ''}distinguishable",
            markup=False,
        )
        if found.scores is not None:
            console.print(f"  scores: {_words(found.scores, epsilon)}", markup=False, soft_wrap=True)
    if floor is not None:
        said = f"\nnoise floor, {runs[0].role or runs[0].run_id} against itself: {_words(floor, epsilon)}"
        console.print(said, markup=False, soft_wrap=True)


def points(found: Difference) -> str:
    """`+3.2 points [0.1, 6.3]`, or a dash."""
    if found.estimate is None or found.low is None or found.high is None:
        return "–"
    return f"{100 * found.estimate:+.1f} points [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def indistinct(found: Difference) -> bool:
    """Whether the interval holds 0, or there is none."""
    return found.low is None or found.high is None or found.low <= 0 <= found.high


def _rows(runs: Sequence[Measured]) -> Iterator[tuple[str, list[str]]]:
    yield "samples", [f"{len(run.items):,}" for run in runs]
    yield "undecided", [f"{run.undecided:,}" for run in runs]
    yield "right, first draw", [percent(run.accuracy()) for run in runs]
    rates = [run.gate_rates() for run in runs]
    for gate in dict.fromkeys(name for of_run in rates for name in of_run):
        yield f"  {gate}", [percent(of_run[gate]) if gate in of_run else "–" for of_run in rates]
    at_k = [run.pass_at() for run in runs]
    yield "pass@k", [f"@{k}: {100 * (d.estimate or 0):.1f}%" if d.estimate is not None else "–" for k, d in at_k]
    yield "distinct of the accepted", ["–" if (d := run.diversity()) is None else f"{d:.2f}" for run in runs]
    yield "tokens an answer", ["–" if (n := run.length()) is None else f"{n:.1f}" for run in runs]


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


def _at(item: Item, k: int) -> float:
    return pass_at_k(len(item.right), sum(item.right), k)
