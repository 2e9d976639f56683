"""The proofs of a run: manifest, quality report, timing report, HTML page, data set card and checksums."""

import platform
import sqlite3
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastdistill.control.audited import audit_command, audits_of
from fastdistill.control.budget import Enough
from fastdistill.control.card import complete_dataset
from fastdistill.control.folder import RunFolder, read_json, write_json
from fastdistill.control.run import ActiveRun
from fastdistill.control.tally import Tally
from fastdistill.control.terminal import tallied
from fastdistill.core.canonical import digest
from fastdistill.core.errors import EnvironmentFault, ExitCode, FatalError
from fastdistill.core.files import atomic, sha256_file
from fastdistill.core.stats import interval
from fastdistill.core.step import SampleStep
from fastdistill.core.types import Failure, Outcome, Status

if TYPE_CHECKING:
    from fastdistill.control.session import Pipeline, RunResult

DEPENDENCIES = ("aiohttp", "jinja2", "msgspec", "numpy", "pyarrow", "pydantic", "sqlglot")


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where the candidates of a run come from that asked no teacher."""

    parent_run_id: str
    files: dict[Path, str]
    """The sha256 of the ledger with the candidates, and of what the verdicts depend on that were taken over."""
    reused: Counter[str] = field(default_factory=Counter)
    """By gate, the verdicts that were taken over from the parent."""


class Proofs:
    """Writes what a run can show for itself, from its beginning (status `running`) to its end."""

    def __init__(self, pipeline: "Pipeline", folder: RunFolder, tally: Tally, lineage: Lineage | None = None) -> None:
        self._lineage = lineage
        self._pipeline = pipeline
        self._folder = folder
        self._tally = tally
        self._started = datetime.now(UTC)
        self._audits: dict[str, dict[str, Any] | None] = {}
        self._begun = perf_counter()
        # A run that finds every answer in the store contacts nobody: what an earlier one learnt still holds.
        earlier = read_json(folder.manifest)["models"] if folder.manifest.exists() else {}
        self._endpoints_before = {name: model.get("endpoints", []) for name, model in earlier.items()}
        self._descent = self._descended()

    def begin(self) -> None:
        for of_an_earlier_run in (self._folder.quality_report, self._folder.timing_report, self._folder.report_html):
            of_an_earlier_run.unlink(missing_ok=True)  # should this one be killed, they would pass for its own
        write_json(self._folder.manifest, self._manifest(None, "running", None, ""))

    def finish_dist(self) -> None:
        """Completes the data set's folder, and puts it in place."""
        complete_dataset(self._folder.dist_in_work, self._folder.dist.name, self._pipeline, self._tally)
        self._folder.finish_dist()

    def finish(self, run: ActiveRun) -> "RunResult":
        self._audits = audits_of(self._folder.root, self._pipeline.steps)
        floor = self._pipeline.require.check(self._tally, self._audits)
        missed = [check["requirement"] for check in floor if not check["met"]]
        status, code, message = "complete", ExitCode.OK, ""
        spent = "\n".join(model.meter.spent for model in run.models.values() if model.meter.spent)
        own = Enough(spent, ExitCode.BUDGET) if spent else None
        if missed:
            status, code, message = "below_floor", ExitCode.FLOOR, f"below the floor: {', '.join(missed)}"
            if "audited" in missed:
                gates = ", ".join(gate for gate, audit in self._audits.items() if audit is None)
                message += f"\n{gates}: not audited as it is now: {audit_command(self._folder)}"
        elif (enough := run.exhausted() or run.enough or own) and (enough.exit_code or not self._tally.failed):
            code, message = enough.exit_code, enough.message
        elif self._tally.failed:
            code, message = ExitCode.PARTIAL, failures_message(self._tally)
        elif self._tally.undecided_samples and not self._tally.accepted_samples:
            code, message = ExitCode.PARTIAL, undecided_message(self._tally)
        return self._write(run, floor, status, code, message)

    def abort(self, run: ActiveRun | None, error: FatalError) -> None:
        """The proofs of a run that could not be finished: what there is, and why it ended."""
        status = "interrupted" if error.exit_code is ExitCode.INTERRUPTED else "failed"
        with suppress(OSError, EnvironmentFault):  # the disk may be the very thing that failed
            if run is None:
                write_json(self._folder.manifest, self._manifest(None, status, error.exit_code, str(error)))
            else:
                self._count_the_rest(run, str(error))
                self._write(run, [], status, error.exit_code, str(error))

    def _count_the_rest(self, run: ActiveRun, why: str) -> None:
        """Counts the samples that wait for the last sample steps, done with those that come before a stream step."""
        ends = [
            b.name for a, b in pairwise(self._pipeline.steps) if isinstance(a, SampleStep) > isinstance(b, SampleStep)
        ]
        with suppress(EnvironmentFault):  # it may be the ledger that can't be read
            for sample in self._folder.samples("status = 'open' AND idx > :furthest", furthest=run.furthest):
                self._tally.add(sample.left_out(Status.SKIPPED, Failure(ends[0], "stopped", why)))

    def _write(
        self, run: ActiveRun, floor: list[dict[str, Any]], status: str, code: ExitCode, message: str
    ) -> "RunResult":
        from fastdistill.control.report_html import render_html
        from fastdistill.control.session import RunResult

        folder = self._folder
        manifest, quality, timing = self._manifest(run, status, code, message), self._quality(floor), self._timing(run)
        write_json(folder.manifest, manifest)
        write_json(folder.quality_report, quality)
        write_json(folder.timing_report, timing)
        with atomic(folder.report_html) as file:
            file.write(render_html(manifest, quality, timing))
        return RunResult(folder.run_id, folder.path, folder.dist, code, manifest, quality, timing)

    def _descended(self) -> dict[str, Any]:
        """What the manifest says of where a run comes from. `generation` counts the teachers that came before.

        Raises:
            InputError: there is no such parent.
        """
        root, origin = self._folder.root, self._pipeline.lineage
        kind, parent, generation, role = "run" if origin.role is None else "eval", None, 0, origin.role
        if self._lineage is not None:
            kind, parent = "regate", self._lineage.parent_run_id
            before = read_json(RunFolder(root, parent).manifest)
            generation, role = before.get("generation", 0), before.get("role")
        elif origin.parent is not None:
            found = RunFolder.find(root, origin.parent)
            parent, generation = found.run_id, read_json(found.manifest).get("generation", 0) + 1
        return {"kind": kind, "parent_run_id": parent, "generation": generation, "role": role}

    def _quality(self, floor: list[dict[str, Any]]) -> dict[str, Any]:
        tally = self._tally
        tokens = tally.completion_tokens + tally.prompt_tokens
        per_1000 = round(1000 * tally.accepted_samples / tokens, 4) if tokens else None
        return {
            "run_id": self._folder.run_id,
            "samples": {
                "read": tally.samples,
                "duplicates": tally.statuses[Status.DUPLICATE],
                "contaminated": tally.statuses[Status.CONTAMINATED],
                "elsewhere": tally.statuses[Status.ELSEWHERE],
                "failed": tally.failed,
                "skipped": tally.statuses[Status.SKIPPED],
                "completed": tally.statuses[Status.OPEN],
                "accepted": tally.accepted_samples,
                "undecided": tally.undecided_samples,
                "accept_rate": interval(tally.accept_rate()),
            },
            "candidates": {
                "generated": tally.candidates,
                **{str(outcome): count for outcome, count in sorted(tally.outcomes.items())},
                "selected": tally.selected,
                "finish_reasons": {str(reason): count for reason, count in sorted(tally.finish_reasons.items())},
                "cuts": dict(sorted(tally.cuts.items())),
                "scores": {str(score): count for score, count in sorted(tally.scores.items())},
            },
            "tokens": {
                "prompt": tally.prompt_tokens,
                "completion": tally.completion_tokens,
                "accepted_samples_per_1000_tokens": per_1000,
            },
            "stages": [
                stage | ({"audit": audit} if (audit := self._audits.get(stage["step"])) else {})
                for stage in tally.stages()
            ],
            "failures": [
                {"step": step, "reason": reason, "count": count.count, "examples": count.examples}
                for (step, reason), count in sorted(tally.failures.items())
            ],
            "floor": floor,
        }

    def _timing(self, run: ActiveRun) -> dict[str, Any]:
        return {
            "run_id": self._folder.run_id,
            "wall_s": round(perf_counter() - self._begun, 3),
            "steps": {
                name: {"busy": times.busy.summary(), "queued": times.queued.summary()}
                for name, times in run.step_times.items()
            },
            "models": {name: model.meter.report(model.router.capacity) for name, model in run.models.items()},
        }

    def _manifest(self, run: ActiveRun | None, status: str, code: ExitCode | None, message: str) -> dict[str, Any]:
        folder, tally = self._folder, self._tally
        ended = status != "running"
        steps = self._pipeline.steps if ended else ()
        used = {path.absolute(): content for step in steps for path, content in step.used().items()}
        used |= self._lineage.files if self._lineage else {}
        read = {path.absolute() for step in steps for path in step.inputs() if path.is_file()} - used.keys()
        inputs = used | {path: sha256_file(path) for path in read}
        done = sorted(folder.dist.rglob("*")) if status in ("complete", "below_floor") else ()
        outputs = {path: sha256_file(path) for path in done if path.is_file()}
        return {
            "schema": 1,
            "run_id": folder.run_id,
            "name": self._pipeline.name,
            **self._descent,
            "verdicts_reused": dict(sorted(self._lineage.reused.items())) if self._lineage else {},
            "status": status,
            "exit_code": code,
            "message": message,
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds") if ended else None,
            "config_sha256": digest(self._pipeline.resolved()),
            "versions": versions() if ended else {},
            "environment": {step.name: facts for step in self._pipeline.steps if (facts := step.environment())},
            "inputs": [_file_entry(path, path, content) for path, content in sorted(inputs.items())],
            "models": {
                name: {
                    "provider": config.provider,
                    "model": config.model,
                    "parameters": config.parameters(),
                    "endpoints": ([asdict(found) for found in run.models[name].endpoints] if run else [])
                    or self._endpoints_before.get(name, []),
                    "served": [
                        {"model": model, "build": build, "answers": count}
                        for (provider, asked, model, build), count in sorted(tally.served.items())
                        if (provider, asked) == (config.provider, config.model)
                    ],
                }
                for name, config in self._pipeline.models.items()
            },
            "stages": [
                {key: stage[key] for key in ("step", "type", "fingerprint", "samples_in", "samples_kept")}
                for stage in tally.stages()
            ],
            "content_sha256": {stage: str(content) for stage, content in sorted(tally.hashes.items())},
            "outputs": [_file_entry(path, path.relative_to(folder.path), content) for path, content in outputs.items()],
        }


def versions() -> dict[str, str]:
    """What this run was made with: ours, the interpreter's, the libraries'."""
    return {
        "fastdistill": version_of("fastdistill"),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "platform": f"{sys.platform}-{platform.machine()}",
        **{name: version_of(name) for name in DEPENDENCIES},
    }


def version_of(package: str) -> str:
    """Where only its source is there, that is said: a run whose answers are paid for must not fail for a version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def failures_message(tally: Tally) -> str:
    """How many samples failed and why: one line for each step and reason, with an example that names its place."""
    lines = [f"{tally.failed} of {tally.own} samples ended in an error; all others are done"]
    for (step, reason), count in sorted(tally.failures.items(), key=lambda item: -item[1].count):
        lines.append(f"{step}: {reason} ({count.count}): {count.examples[0]}")
    return "\n".join(lines)


def undecided_message(tally: Tally) -> str:
    """Of a run that accepted nothing: how many samples no gate could judge, and why, as with a wrong `gold_field`."""
    gates = [f"{name}: {tallied(gate.reasons)}" for name, gate in tally.gates.items() if gate.outcomes[Outcome.ERROR]]
    undecided = f"{tally.undecided_samples} of {tally.own} could not be judged"
    return "\n".join([f"no sample is accepted, and {undecided}; `fastdistill explain` shows why", *gates])


def _file_entry(path: Path, shown: Path, content: str) -> dict[str, Any]:
    size = path.stat().st_size if path.is_file() else None  # of an input that has gone since
    return {"path": shown.as_posix(), "bytes": size, "sha256": content}
