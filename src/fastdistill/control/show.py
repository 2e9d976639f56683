"""What the commands print about pipelines, runs and samples. Reads what runs left; a preview runs a few samples."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from fastdistill.control.estimate import estimate, run_shortened
from fastdistill.control.folder import RunFolder, artifacts_root, read_json
from fastdistill.control.progress import summary
from fastdistill.control.session import Pipeline, RunResult
from fastdistill.control.terminal import clock, dollars, printable, say, show_table
from fastdistill.core.errors import EnvironmentFault, ExitCode, InputError
from fastdistill.core.stats import Total
from fastdistill.core.step import Context, SampleStep, StreamFilter
from fastdistill.core.types import Candidate, Outcome, Sample

_STYLE = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.ERROR: "yellow"}


class FirstSamples(StreamFilter):
    """Lets the first `n` samples through, or fewer once `n` were left out: all are where a field is misspelt."""

    n: int

    def looking(self, ctx: Context) -> Callable[[Sample], Sample]:
        return lambda sample: sample

    def run(self, samples: Iterator[Sample | None], ctx: Context) -> Iterator[Sample | None]:
        room = {True: self.n, False: self.n}
        for sample in super().run(samples, ctx):
            yield sample
            room[sample is None] -= 1
            if not room[sample is None]:
                return


def show_info(pipeline: Pipeline, output_dir: Path | None) -> None:
    folder = RunFolder(artifacts_root(output_dir), pipeline.run_id)
    print(yaml.safe_dump(pipeline.resolved(), sort_keys=False, allow_unicode=True), end="")
    kinds = {True: "sample", False: "stream"}
    steps = [(step.name, kinds[isinstance(step, SampleStep)], step.fingerprint) for step in pipeline.steps]
    show_table(("step", "kind", "fingerprint"), steps)
    state = "exists: the run goes on there" if folder.manifest.exists() else "does not exist yet"
    say(f"run folder: {folder.path} ({state})")


def show_preview(pipeline: Pipeline, output_dir: Path | None, n: int) -> None:
    """Takes the first `n` samples through all steps up to the last that works on samples."""
    for sample in run_shortened(pipeline, FirstSamples(n=n), output_dir)[0]:
        print_sample(sample)
    say(f"the answers are kept in {artifacts_root(output_dir) / 'responses.sqlite'}")


def show_estimate(pipeline: Pipeline, output_dir: Path | None, n: int) -> None:
    found = estimate(pipeline, output_dir, n)
    until = f", up to the target of {pipeline.target.accepted:,} accepted" if pipeline.target else ""
    say(f"projected from {found.drawn} of {found.samples:,} samples, drawn at random{until}")
    stored, untold = "all answers were stored", "a server does not tell"
    rows: list[tuple[str, Total | None, Callable[[float], str], str]] = [
        ("prompt tokens", found.prompt_tokens, "{:,.0f}".format, untold),
        ("completion tokens", found.completion_tokens, "{:,.0f}".format, untold),
        ("accepted samples", found.accepted, "{:,.0f}".format, ""),
        (f"time, {found.concurrency} requests in flight", found.seconds, clock, stored),
        ("cost", found.cost_usd, dollars, "no price" if found.prompt_tokens else untold),
    ]
    show_table(
        ("", "estimate", "95% interval"),
        [
            (name, "not known", why) if t is None else (name, words(t.estimate), f"{words(t.low)} to {words(t.high)}")
            for name, t, words, why in rows
        ],
    )


def show_runs(output_dir: Path | None) -> None:
    folders = RunFolder.all(output_dir)
    if not folders:
        raise InputError(f"{artifacts_root(output_dir).absolute()}: no runs here; is --output-dir right?")
    show_table(("run", "status", "started", ">samples", ">accepted", "models"), map(_listed, folders))


def _listed(folder: RunFolder) -> tuple[str, ...]:
    manifest = read_json(folder.manifest)
    samples = read_json(folder.quality_report)["samples"] if folder.quality_report.exists() else {}
    models = ", ".join(model["model"] for model in manifest["models"].values())
    counts = str(samples.get("read", "")), str(samples.get("accepted", ""))
    return folder.run_id, status(folder, manifest), manifest["started"][:16], *counts, models


def show_run(run: str, output_dir: Path | None) -> None:
    folder = RunFolder.find(output_dir, run)
    manifest = read_json(folder.manifest)
    now = status(folder, manifest)
    if manifest["message"] or now == "killed":
        _field(now, manifest["message"])
    if folder.quality_report.exists():
        code, reports = ExitCode(manifest["exit_code"] or 0), (folder.quality_report, folder.timing_report)
        summary(RunResult(folder.run_id, folder.path, folder.dist, code, manifest, *map(read_json, reports)))


def show_sample(run: str, sample_id: str, output_dir: Path | None) -> None:
    """Prints a sample, and the records that were left out for being the same one.

    Raises InputError if no sample, or more than one, is meant.
    """
    folder = RunFolder.find(output_dir, run)
    wanted = sample_id.partition("#")[0]
    where = """
        (:name <> '' AND task_id = :name)
        OR (length(:id) >= 6 AND substr(sample_id, 1, length(:id)) = :id)
        OR (instr(:name, ':') AND json_extract(sample, '$.source') = :name)  -- the whole ledger is parsed for it
    """
    found = list(islice(folder.samples(where, id=wanted, name=sample_id), 6))
    ids = {sample.sample_id[:16]: None for sample in found}
    if len(ids) != 1:
        what = f"several samples are named {wanted!r}: {', '.join(ids)}" if found else f"no sample {wanted!r}"
        remedy = "give a sample id, 6 digits or more of it, a task id, or a place like train.jsonl:8"
        raise InputError(f"{folder.run_id}: {what}; {remedy}")
    for sample in found:
        print_sample(sample)


def status(folder: RunFolder, manifest: dict[str, Any]) -> str:
    """The manifest's status; `killed` for a run that says it is running while nobody holds its folder."""
    if manifest["status"] == "running":
        with suppress(EnvironmentFault), folder.held():
            return "killed"
    return str(manifest["status"])


def print_sample(sample: Sample) -> None:
    """A sample with all that is known of it."""
    Console().rule(Text(printable(f"{sample.source}  {sample.task_id}")))
    _field("sample id", sample.sample_id)
    _field("status", sample.status)
    for name, value in sample.record.items():
        _field(name, value if isinstance(value, str) else repr(value))
    for failure in sample.failures:
        _field(f"{failure.step}: {failure.reason}", failure.message, "yellow")
    asked = None
    for candidate in sample.candidates:
        if candidate.prompt != asked:
            asked = candidate.prompt
            _field("model", f"{asked.model} ({asked.provider})")
            _field("parameters", ", ".join(f"{k}={v!r}" for k, v in asked.parameters.items()))
            for message in asked.messages:
                _field(message["role"], message["content"], "dim")
        _print_candidate(candidate, sample)


def _print_candidate(candidate: Candidate, sample: Sample) -> None:
    chosen = {c.candidate_id: rank for rank, c in enumerate(sample.chosen)}
    rank = f", selected as {chosen[candidate.candidate_id] + 1}" if candidate.candidate_id in chosen else ""
    score = "" if candidate.score is None else f", score {candidate.score:g}"
    head = f"attempt {candidate.attempt} (seed {candidate.seed}): {candidate.outcome}{score}{rank}"
    say(head, f"bold {_STYLE[candidate.outcome]}")
    done = candidate.completion
    tokens = f"{done.usage.completion_tokens} tokens, {done.finish_reason}"
    _field("  candidate", f"{candidate.candidate_id}  {done.model or ''} {done.build or ''} {tokens}")
    if done.thinking:
        _field("  thinking", done.thinking, "dim")
    if candidate.answer != done.text:
        _field("  raw", done.text, "dim")
    _field("  answer", candidate.answer)
    for cut in candidate.cuts:
        _field(f"  cut: {cut.kind}", cut.text, "dim")
    for verdict in candidate.verdicts:
        detail = ", ".join(f"{name}={value!r}" for name, value in verdict.detail.items())
        text = Text.assemble(f"  {verdict.gate}: ", (f"{verdict.outcome} {verdict.reason}", _STYLE[verdict.outcome]))
        say(text + Text(f" [{verdict.fingerprint}] {detail}", style="dim"))


def _field(name: str, value: str, style: str = "") -> None:
    lines = [printable(line.expandtabs()) for line in value.split("\n")]
    body = "".join(f"\n    {line}" for line in lines) if len(lines) > 1 else f" {lines[0]}"
    say(Text(f"{printable(name)}:", style="bold") + Text(body, style=style))
