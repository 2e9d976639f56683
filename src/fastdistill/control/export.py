"""`fastdistill export`: writes a finished run's data set again from its ledger. Asks no model and runs no gate."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.control.budget import first_accepted
from fastdistill.control.card import complete_dataset
from fastdistill.control.config import merge, nested_override, parse_pipeline, read_yaml
from fastdistill.control.folder import RunFolder, read_json
from fastdistill.control.registry import step_class
from fastdistill.control.session import Pipeline
from fastdistill.control.tally import Tally
from fastdistill.control.terminal import counted
from fastdistill.core.errors import ConfigError, EnvironmentFault, InputError
from fastdistill.core.types import Sample, Status
from fastdistill.data.export.dataset import Export, Format, Splits


def export_run(
    run: str, formats: Sequence[str], overrides: Sequence[str], to: Path | None, output_dir: Path | None
) -> None:
    """Runs the exports of a run's config over its ledger, with other formats and options, and says what it wrote.

    Raises:
        InputError: there is no such run, or it did not come to its end.
        ConfigError: a format or an override that the run's exports don't have.
        EnvironmentFault: `to` holds something already, or can't be written.
    """
    folder = RunFolder.find(output_dir, run)
    status = read_json(folder.manifest)["status"]
    if status not in ("complete", "below_floor"):
        raise InputError(f"{folder.run_id}: {status}; only a finished run is exported: run it to its end first")
    pipeline = _pipeline(folder, formats, overrides)
    place = to.absolute() if to else folder.path / "export"  # the current folder has a name, too
    draft = place.with_name(f".{place.name}.partial")
    try:
        if to is not None and to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise EnvironmentFault(f"{to}: is there already; remove it, or choose another folder with --to")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        written = _Counted(draft, Tally(pipeline.steps))
        samples = written.samples(first_accepted(folder.samples(), pipeline.target))
        for step in pipeline.steps:
            if isinstance(step, Export):
                samples = step.run(samples, written)
        for _ in samples:
            pass
        complete_dataset(draft, place.name, pipeline, written.tally)
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
    except OSError as error:
        raise EnvironmentFault(f"{error.filename or place}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for name, found in written.tally.reports.items():
        print(f"{name}: {counted(found)}")
    for reason, count in sorted(written.left_out.items()):
        print(f"left out: {count} samples: {reason}")
    print(f"written to {place}")


def _pipeline(folder: RunFolder, formats: Sequence[str], overrides: Sequence[str]) -> Pipeline:
    """The run's pipeline, each of its exports with the formats that it has something for, and no other."""
    if unknown := [name for name in formats if name not in [*Format]]:
        raise ConfigError(f"--format {unknown[0]}: known are: {', '.join(Format)}")
    config = read_yaml(folder.config)
    kinds = {kind: step_class(kind) for item in config["steps"] for kind in item}
    exports = {kind: step for kind, step in kinds.items() if issubclass(step, Export)}
    wanted = {kind: [name for name in formats if name in step.offered()] for kind, step in exports.items()}
    if not any(wanted.values()):
        known = ", ".join(exports) or "none"
        raise ConfigError(f"{folder.run_id}: none of its exports ({known}) writes {', '.join(formats)}")
    for override in overrides:
        if override.partition(".")[0] not in exports:
            raise ConfigError(f"--set {override}: begins with an export of this run: {', '.join(exports)}")
        config = merge(config, nested_override(f"steps.{override}"))
    steps = []
    for item in config["steps"]:
        ((kind, body),) = item.items()
        if not issubclass(kinds[kind], Splits) or wanted.get(kind):
            steps.append({kind: body | {"formats": wanted[kind]} if kind in exports else body})
    return parse_pipeline(config | {"steps": steps})


class _Counted:
    """What exports need of a run (`core.step.Output`), with the samples that they are given and leave out."""

    def __init__(self, dist: Path, tally: Tally) -> None:
        self.dist = dist
        self.tally = tally
        self.left_out: Counter[str] = Counter()

    def samples(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.tally.add(sample)
            if sample.status is Status.OPEN:
                yield sample

    def discard(self, sample: Sample) -> None:
        self.tally.leave(sample)
        failure = sample.failures[-1]
        self.left_out[f"{failure.step}: {failure.reason}"] += 1

    def report(self, step: str, found: Mapping[str, Any]) -> None:
        self.tally.reports[step] = dict(found)
