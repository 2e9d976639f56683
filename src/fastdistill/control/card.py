"""What completes a data set: trainers' configs, checksums, and the card, README.md, that viewers and loaders read.

Facts of the run only, no clock.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fastdistill.control.tally import Tally
from fastdistill.control.terminal import percent
from fastdistill.core.files import atomic, sha256_file
from fastdistill.core.types import Outcome, Status
from fastdistill.data.export.trainers import trainer_files
from fastdistill.data.generate import TextGeneration

if TYPE_CHECKING:
    from fastdistill.control.session import Pipeline


def complete_dataset(dist: Path, name: str, pipeline: "Pipeline", tally: Tally) -> None:
    """Adds what is made of all the files that the exports wrote. `name` is what the folder will be called."""
    files = [path.relative_to(dist) for path in _files_in(dist) if _has_rows(path)]
    texts = trainer_files(name, {file.as_posix() for file in files})
    for path, text in {**texts, "README.md": dataset_card(pipeline, tally, files)}.items():
        with atomic(dist / path) as file:
            file.write(text)
    lines = [f"{sha256_file(path)}  {path.relative_to(dist).as_posix()}\n" for path in _files_in(dist)]
    with atomic(dist / "checksums.txt") as file:
        file.writelines(lines)


def dataset_card(pipeline: "Pipeline", tally: Tally, files: Sequence[Path]) -> str:
    """Markdown with the YAML header of the Hugging Face Hub; `files` are relative to the data set's folder."""
    header = {
        "license": "other",
        "task_categories": ["text-generation"],
        "tags": ["distillation", "synthetic", "fastdistill"],
        "configs": _configs(files),
    }
    teachers = [f"- `{name}`: {config.model} ({config.provider})" for name, config in pipeline.models.items()]
    generation = [
        {step.name: step.model_dump(mode="json", exclude_defaults=True, exclude={"name"})}
        for step in pipeline.steps
        if isinstance(step, TextGeneration)
    ]
    asked = yaml.safe_dump(generation, sort_keys=False, allow_unicode=True, width=100) if generation else ""
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
        *(
            ["What they were asked, and how answers were drawn:", "", "```yaml", asked.rstrip(), "```", ""]
            if asked
            else []
        ),
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


def _has_rows(path: Path) -> bool:
    """`datasets` can't load a config of which one split is empty."""
    if path.suffix != ".parquet":
        return path.stat().st_size > 0
    from pyarrow.parquet import read_metadata

    return bool(read_metadata(path).num_rows)


def _files_in(dist: Path) -> list[Path]:
    return sorted(path for path in dist.rglob("*") if path.is_file())


def _configs(files: Sequence[Path]) -> list[dict[str, object]]:
    """One config for each folder of Parquet files, every split named: a bare glob would mix validation into train."""
    folders = sorted(
        {path.parent for path in files if path.suffix == ".parquet"}, key=lambda path: (path.name[:3] != "sft", path)
    )
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
