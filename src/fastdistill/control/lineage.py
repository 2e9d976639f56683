"""The chain of runs that a run descends from, each compared with its parent and with the first: when to stop."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fastdistill.control.card import percent
from fastdistill.control.compare import Measured, Pair, indistinct, measure, pair, points
from fastdistill.control.folder import RunFolder, artifacts_root, read_json

COLLAPSE = 0.05  # relative fall of pass@k or diversity against generation 0


def chain(root: Path, run: str) -> list[RunFolder]:
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
    from rich.console import Console
    from rich.table import Table

    runs = [measure(folder, group_by) for folder in chain(artifacts_root(output_dir), run)]
    console = Console()
    table = Table("generation", "run", "model", "right, first draw", "pass@k", "diversity", "tokens", box=None)
    for generation, of_run in enumerate(runs):
        k, passed = of_run.pass_at()
        table.add_row(
            str(generation),
            of_run.run_id,
            of_run.model,
            percent(of_run.accuracy()),
            "–" if passed.estimate is None else f"@{k}: {passed.estimate:.1%}",
            "–" if (distinct := of_run.diversity()) is None else f"{distinct:.3f}",
            "–" if (length := of_run.length()) is None else f"{length:.1f}",
        )
    console.print(table)
    steps = [pair(after, before) for before, after in pairwise(runs)]
    for of_run, step in zip(runs[1:], steps, strict=True):
        console.print(f"\n{of_run.run_id}", markup=False, soft_wrap=True)
        for words, found in (("its parent", step), ("generation 0", pair(of_run, runs[0]))):
            console.print(
                f"  against {words}: right {points(found.difference)}, pass@k {points(found.pass_at_k)},"
                f" McNemar p = {found.p_value:.3g}, on {found.compared:,} samples",
                markup=False,
                soft_wrap=True,
            )
    for line in advice(runs, steps):
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def advice(runs: Sequence[Measured], steps: Sequence[Pair]) -> list[str]:
    """Reasons to stop, each in a sentence; `steps` compare each run with its parent."""
    said = []
    if len(steps) >= 2 and all(indistinct(step.difference) for step in steps[-2:]):
        said.append("stop: the last two generations can't be told from their parents")
    first, last = runs[0], runs[-1]
    before, after = first.pass_at()[1].estimate, last.pass_at()[1].estimate
    if len(runs) > 1 and before and after is not None and after < (1 - COLLAPSE) * before:
        said.append(f"stop: pass@k has fallen from {before:.1%} to {after:.1%} since generation 0")
    one, other = first.diversity(), last.diversity()
    if len(runs) > 1 and one and other is not None and other < (1 - COLLAPSE) * one:
        said.append(f"stop: distinct answers have fallen from {one:.2f} to {other:.2f} of the accepted: a collapse")
    return said
