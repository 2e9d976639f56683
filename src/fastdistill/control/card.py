"""The data set's card: the README.md that dataset viewers and loaders read. Facts of the run only, no clock."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fastdistill.control.tally import Tally
from fastdistill.core.stats import Rate
from fastdistill.core.types import Outcome, Status

if TYPE_CHECKING:
    from fastdistill.control.session import Pipeline


def dataset_card(pipeline: "Pipeline", tally: Tally, files: Sequence[Path]) -> str:
    """Markdown with the YAML header of the Hugging Face Hub; `files` are relative to the data set's folder."""
    header = {
        "license": "other",
        "task_categories": ["text-generation"],
        "tags": ["distillation", "synthetic", "fastdistill"],
        "configs": _configs(files),
    }
    teachers = [f"- `{name}`: {config.model} ({config.provider})" for name, config in pipeline.models.items()]
    gates = [
        f"| {name} | {gate.outcomes.total()} | {gate.outcomes[Outcome.PASS]} | {gate.outcomes[Outcome.FAIL]} |"
        f" {gate.outcomes[Outcome.ERROR]} | {percent(gate.pass_rate())} |"
        for name, gate in tally.gates.items()
    ]
    lines = [
        f"# {pipeline.name}",
        "",
        f"Distilled with FastDistill from {tally.samples} records: {tally.candidates} candidates,"
        f" {tally.selected} selected for {tally.accepted_samples} samples"
        f" (accepted: {percent(tally.accept_rate())}).",
        "",
        "Teachers:",
        *(teachers or ["- none"]),
        "",
        "Gates, over candidates, with Wilson 95% intervals:",
        "",
        "| gate | judged | pass | fail | error | pass rate |",
        "|---|---|---|---|---|---|",
        *gates,
        "",
        f"Left out: {tally.statuses[Status.DUPLICATE]} duplicate, {tally.statuses[Status.CONTAMINATED]} contaminated"
        f" and {tally.failed} failed records.",
        "The licence of the records and the teachers' terms apply; `checksums.txt` has the sha256 of every file,",
        "and the run's manifest says where every row comes from.",
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n" + "\n".join(lines) + "\n"


def percent(rate: Rate) -> str:
    """`71.0% [68.1, 73.8]`, or a dash."""
    if rate.rate is None or rate.low is None or rate.high is None:
        return "–"
    return f"{rate.rate:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _configs(files: Sequence[Path]) -> list[dict[str, object]]:
    """One config for each folder of Parquet files, every split named: a bare glob would mix validation into train."""
    folders = sorted({path.parent for path in files if path.suffix == ".parquet"})
    return [
        {
            "config_name": folder.as_posix(),
            **({"default": True} if folder == folders[0] else {}),
            "data_files": [
                {"split": path.stem, "path": path.as_posix()}
                for path in sorted(files)
                if path.parent == folder and path.suffix == ".parquet"
            ],
        }
        for folder in folders
    ]
