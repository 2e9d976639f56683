"""The chain of runs that a run descends from, each compared with its parent and with the first: when to stop."""

from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

from fastdistill.control.compare import Measured, Pair, common_k, diversity, indistinct, measure, pair, shared
from fastdistill.control.folder import RunFolder, read_json
from fastdistill.control.terminal import points, say, show_table

COLLAPSE = 0.05  # relative fall of pass@k or diversity against generation 0
_SHOWN = ("right, first draw", "pass@k", "distinct of the accepted", "tokens an answer")


def ancestry(root: Path | None, run: str) -> list[RunFolder]:
    """The run's ancestors from the first, and itself.

    Raises:
        InputError: the run or one of its ancestors is not there.
    """
    folders = [RunFolder.find(root, run)]
    while parent := read_json(folders[0].manifest).get("parent_run_id"):
        found = RunFolder.find(root, parent)
        if found.run_id in {folder.run_id for folder in folders}:
            break  # a run that was named its own ancestor
        folders.insert(0, found)
    return folders


def show_lineage(run: str, output_dir: Path | None, group_by: str | None) -> None:
    """Prints the chain of a run with its paired tests, and whether another generation is worth it."""
    folders = ancestry(output_dir, run)
    runs = [measure(folder, group_by) for folder in folders]
    generations = [read_json(folder.manifest).get("generation", 0) for folder in folders]
    figures = [of_run.figures() for of_run in runs]
    show_table(
        ("generation", "run", "model", *_SHOWN),
        [
            (str(generation), of_run.run_id, of_run.model, *(shown[name] for name in _SHOWN))
            for generation, of_run, shown in zip(generations, runs, figures, strict=True)
        ],
    )
    steps = [pair(after, before) for before, after in pairwise(runs)]
    for of_run, step in zip(runs[1:], steps, strict=True):
        say(f"\n{of_run.run_id}")
        for words, found in (("its parent", step), ("generation 0", pair(of_run, runs[0]))):
            say(
                f"  against {words}: right {points(found.difference)}, pass@k {points(found.pass_at_k)},"
                f" McNemar p = {found.p_value:.3g}, on {found.compared:,} samples"
            )
    born = [step for step, (before, after) in zip(steps, pairwise(generations), strict=True) if before < after]
    for line in advice(runs, born):
        say(line, "yellow")


def advice(runs: Sequence[Measured], steps: Sequence[Pair]) -> list[str]:
    """Reasons to stop, each in a sentence, of the records that are shared; `steps` compare generations with parents."""
    said = []
    if len(steps) >= 2 and all(indistinct(step.difference) for step in steps[-2:]):
        said.append("stop: the last two generations can't be told from their parents")
    both = shared(runs[0], runs[-1])
    k = common_k(chain(*both))
    before, after = (sum(items[at].pass_at(k) for items in both) / max(len(both), 1) for at in (0, 1))
    if after < (1 - COLLAPSE) * before:
        said.append(f"stop: pass@{k} has fallen from {before:.1%} to {after:.1%} since generation 0")
    alike = [items for items in both if len(items[0].right) == len(items[1].right)]  # more draws say more twice
    one, other = (diversity([items[at] for items in alike]) for at in (0, 1))
    if one and other is not None and other < (1 - COLLAPSE) * one:
        said.append(f"stop: distinct answers have fallen from {one:.2f} to {other:.2f} of the accepted: a collapse")
    return said
