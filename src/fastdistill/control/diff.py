"""Two runs sample by sample: what the second won and lost, at which gate and why, and whether it is more than chance.

Only samples that both runs have are compared. A sample counts as accepted or not; one that a run could not decide
(nothing accepted, and a gate that could not judge) is left out of the rates and counted apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastdistill.control.folder import ENDED, RunFolder, write_json
from fastdistill.control.terminal import percent, points, say, show_table
from fastdistill.core.compare import Difference, mcnemar, paired_bootstrap
from fastdistill.core.errors import InputError
from fastdistill.core.stats import Rate, interval, wilson
from fastdistill.core.types import Outcome, Sample, Status


@dataclass(frozen=True, slots=True)
class Change:
    """A sample that one run accepted and the other did not, and what the other held against it."""

    sample_id: str
    task_id: str
    source: str
    at: str  # the gate, or the step that failed
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run B against run A. Rates are of the `compared` samples; `difference` is B's rate minus A's."""

    run_a: str
    run_b: str
    only_a: int
    only_b: int
    undecided: int
    compared: int
    accepted_a: Rate
    accepted_b: Rate
    both: int
    difference: Difference
    p_value: float
    won: Sequence[Change]
    lost: Sequence[Change]


def compare(a: RunFolder, b: RunFolder, group_by: str | None = None) -> Comparison:
    """Compares two runs by the ids of their samples.

    Args:
        group_by: a field of the records: samples that share it (a database, a table) are not independent.

    Raises:
        InputError: a run has no ledger, no sample is in both, or a record lacks the field.
    """
    before = {sample.sample_id: _ending(sample, None) for sample in a.samples(ENDED)}
    after = {sample.sample_id: _ending(sample, group_by) for sample in b.samples(ENDED)}
    shared = [(before[sample_id], now) for sample_id, now in after.items() if sample_id in before]
    decided = [(first, now) for first, now in shared if not (first.undecided or now.undecided)]
    if not shared:
        raise InputError(f"{a.run_id} and {b.run_id} have no sample in common: were they made of the same records?")
    won = [_change(now, first) for first, now in decided if now.accepted and not first.accepted]
    lost = [_change(first, now) for first, now in decided if first.accepted and not now.accepted]
    both = sum(bool(first.accepted and now.accepted) for first, now in decided)
    return Comparison(
        run_a=a.run_id,
        run_b=b.run_id,
        only_a=len(before) - len(shared),
        only_b=len(after) - len(shared),
        undecided=len(shared) - len(decided),
        compared=len(decided),
        accepted_a=wilson(both + len(lost), len(decided)),
        accepted_b=wilson(both + len(won), len(decided)),
        both=both,
        difference=paired_bootstrap((now.group, bool(now.accepted) - bool(first.accepted)) for first, now in decided),
        p_value=mcnemar(len(lost), len(won)),
        won=won,
        lost=lost,
    )


def show_diff(run_a: str, run_b: str, output_dir: Path | None, group_by: str | None, json: Path | None) -> None:
    """Prints a comparison, and writes it with every sample to the file `json`."""
    found = compare(RunFolder.find(output_dir, run_a), RunFolder.find(output_dir, run_b), group_by)
    if json is not None:
        rates = {name: interval(getattr(found, name)) for name in ("accepted_a", "accepted_b")}
        write_json(json, asdict(found) | rates | {"group_by": group_by})
    say(
        f"{found.compared:,} samples compared; {found.undecided:,} undecided in one of them,"
        f" {found.only_a:,} only in {found.run_a}, {found.only_b:,} only in {found.run_b}"
    )
    rates_of = ((found.run_a, found.accepted_a), (found.run_b, found.accepted_b))
    show_table(
        ("run", ">accepted", "rate, 95% interval"),
        [(run, f"{rate.successes:,}", percent(rate)) for run, rate in rates_of],
    )
    say(f"difference: {points(found.difference)}; McNemar p = {found.p_value:.3g}")
    show_table(
        ("", "at", "reason", ">samples", "for example"),
        [
            (words, *key, f"{len(of_one):,}", ", ".join(c.task_id or c.source for c in of_one[:3]))
            for words, changes in (("won", found.won), ("lost", found.lost))
            for key, of_one in _by_reason(changes)
        ],
    )


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a sample ended in one run."""

    place: tuple[str, str, str]
    """Its id, its task id, and its source."""
    group: str
    accepted: tuple[str, ...]
    """Candidates."""
    undecided: bool
    reasons: Mapping[str, tuple[str, str]]
    """Gate and reason by rejected candidate, who came furthest last; before all, under no id, what else broke."""


def _ending(sample: Sample, group_by: str | None) -> _Ending:
    reasons = {"": next(((f.step, f.reason) for f in reversed(sample.failures)), ("", "no candidates"))}
    accepted: tuple[str, ...] = ()
    undecided = False
    if sample.status is not Status.FAILED:  # which never reached the gates' end
        accepted = tuple(candidate.candidate_id for candidate in sample.accepted)
        failed = [c for c in sample.candidates if c.outcome is Outcome.FAIL]
        for candidate in sorted(failed, key=lambda candidate: len(candidate.verdicts)):
            verdict = next(v for v in candidate.verdicts if v.outcome is Outcome.FAIL)
            reasons[candidate.candidate_id] = (verdict.gate, verdict.reason)
        undecided = not accepted and len(failed) < len(sample.candidates)
    place = (sample.sample_id, sample.task_id, sample.source)
    return _Ending(place, group_of(sample, group_by), accepted, undecided, reasons)


def _change(winner: _Ending, loser: _Ending) -> Change:
    """What the loser held against an answer that the winner accepted, if it has that one."""
    same = [loser.reasons[candidate] for candidate in winner.accepted if candidate in loser.reasons]
    return Change(*winner.place, *(same or [*loser.reasons.values()][-1:])[0])


def group_of(sample: Sample, group_by: str | None) -> str:
    """The samples that belong together: those with one value of the record's field, or else each alone."""
    if group_by is None:
        return sample.sample_id
    if group_by not in sample.record:
        raise InputError(f"{sample.source}: no field {group_by!r}; the record has: {', '.join(sample.record)}")
    return repr(sample.record[group_by])


def _by_reason(changes: Sequence[Change]) -> list[tuple[tuple[str, str], list[Change]]]:
    grouped: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        grouped.setdefault((change.at, change.reason), []).append(change)
    return sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0]))
