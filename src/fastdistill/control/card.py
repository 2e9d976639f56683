"""What completes a data set: trainers' configs, checksums, and the card, README.md, that viewers and loaders read.

Facts of the run only, no clock.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fastdistill.control.tally import Tally
from fastdistill.control.terminal import percent
from fastdistill.core.files import atomic, sha256_file
from fastdistill.core.step import is_generation
from fastdistill.core.types import Outcome, Status
from fastdistill.data.export.dataset import FOLDERS
from fastdistill.data.export.trainers import trainer_files
from fastdistill.data.generate import TextGeneration

if TYPE_CHECKING:
    from fastdistill.control.session import Pipeline


def complete_dataset(dist: Path, name: str, pipeline: "Pipeline", tally: Tally) -> None:
    """Adds what is made of all the files that the exports wrote. `name` is what the folder will be called."""
    # `datasets` can't load a config of which one split is empty.
    tables = [path for path in _files_in(dist) if path.suffix in (".parquet", ".jsonl")]
    files = {path.relative_to(dist).as_posix(): rows for path in tables if (rows := _rows(path))}
    texts = trainer_files(name, files)
    for path, text in {**texts, "README.md": dataset_card(pipeline, tally, files)}.items():
        with atomic(dist / path) as file:
            file.write(text)
    lines = [f"{sha256_file(path)}  {path.relative_to(dist).as_posix()}\n" for path in _files_in(dist)]
    with atomic(dist / "checksums.txt") as file:
        file.writelines(lines)


def dataset_card(pipeline: "Pipeline", tally: Tally, files: Mapping[str, int]) -> str:
    """Markdown with the YAML header of the Hugging Face Hub; `files` are rows by path in the data set's folder."""
    header = {
        "license": "other",
        "task_categories": ["text-generation"],
        "tags": ["distillation", "synthetic", "fastdistill"],
        "configs": _configs([*map(Path, files)]),
    }
    answering = {name for step in pipeline.steps if is_generation(step) for name in step.models()}
    models = [
        f"- `{name}`: {config.model} ({config.provider}){'' if name in answering else ', which gave no answers'}"
        for name, config in pipeline.models.items()
    ]
    generation = [
        {
            step.name: step.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
            | ({"until": step.until.model_dump(mode="json")} if step.until else {})
        }
        for step in pipeline.steps
        if isinstance(step, TextGeneration)
    ]
    text = yaml.safe_dump(generation, sort_keys=False, allow_unicode=True, width=100).rstrip()
    asked = ["What they were asked, and how answers were drawn:", "", "```yaml", text, "```", ""]
    gates = [
        f"| {name} | {gate.outcomes.total()} | {gate.outcomes[Outcome.PASS]} | {gate.outcomes[Outcome.FAIL]} |"
        f" {gate.outcomes[Outcome.ERROR]} | {percent(gate.pass_rate())} |"
        for name, gate in tally.gates.items()
    ]
    elsewhere = tally.statuses[Status.ELSEWHERE]
    lines = [
        f"# {pipeline.name}",
        "",
        f"Distilled with FastDistill from {tally.samples} records: {tally.candidates} candidates,"
        f" {tally.selected} selected for {tally.accepted_samples} samples"
        f" (accepted: {percent(tally.accept_rate())}).",
        "",
        "Models:",
        *(models or ["- none"]),
        "",
        *(asked if generation else []),
        "Gates, over candidates, with Wilson 95% intervals:",
        "",
        "| gate | judged | pass | fail | error | pass rate |",
        "|---|---|---|---|---|---|",
        *gates,
        "",
        "| file | rows |",
        "|---|---|",
        *(f"| {path} | {rows} |" for path, rows in files.items()),
        "",
        f"Left out: {tally.statuses[Status.DUPLICATE]} duplicate, {tally.statuses[Status.CONTAMINATED]} contaminated"
        f" and {tally.failed} failed records" + (f"; {elsewhere} are of other shards." if elsewhere else "."),
        "The licence of the records and the teachers' terms apply; `checksums.txt` has the sha256 of every file,",
        "and the run's manifest says where every row comes from.",
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n" + "\n".join(lines) + "\n"


def _rows(path: Path) -> int:
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def _files_in(dist: Path) -> list[Path]:
    return sorted(path for path in dist.rglob("*") if path.is_file())


def _configs(files: Sequence[Path]) -> list[dict[str, object]]:
    """One config for each folder, every split named: a bare glob would mix validation into train.

    Its Parquet files, or else its JSON Lines, where these are of the shapes that come in both.
    """
    tables = [path for path in files if path.suffix == ".parquet"]
    others = {*FOLDERS.values()} - {path.parent.as_posix() for path in tables}
    tables += [path for path in files if path.parent.as_posix() in others]
    folders = sorted({path.parent for path in tables}, key=lambda path: (path.name[:3] != "sft", path))
    return [
        {
            "config_name": folder.as_posix(),
            **({"default": True} if folder == folders[0] else {}),
            "data_files": [{"split": p.stem, "path": p.as_posix()} for p in sorted(tables) if p.parent == folder],
        }
        for folder in folders
    ]
