"""Judges the stored candidates of a run again, under other gates, and asks no teacher: a new run, with its lineage.

The candidates come from the ledger of the earlier run, with their answers as the teacher gave them: it is judged what
was asked then, whatever waves or races it was asked in. All of the pipeline after generation runs as in any run.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import takewhile
from operator import is_not
from pathlib import Path

from msgspec.structs import replace

from fastdistill.control.budget import first_accepted
from fastdistill.control.config import load_layers, merge, parse_pipeline, read_yaml
from fastdistill.control.folder import RunFolder, read_json
from fastdistill.control.reports import Lineage, versions
from fastdistill.control.session import Pipeline, RunResult, Watch, execute, run_folder, run_in_loop, unwatched
from fastdistill.core.canonical import digest
from fastdistill.core.errors import ConfigError, InputError, SampleError
from fastdistill.core.files import sha256_file
from fastdistill.core.step import Context, Gate, SampleStep, Step, StreamStep, is_generation
from fastdistill.core.types import Candidate, Failure, Outcome, Sample, Status
from fastdistill.data.generate import TextGeneration

_KEPT = 1024  # stored samples in memory; more than are open at a time, as a rule


def regate(
    run: str,
    layers: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output_dir: Path | None = None,
    run_id: str | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Runs the gates of some YAML layers over the candidates of `run`, an id or its beginning.

    Raises:
        InputError: there is no such run, or it has left no candidates.
        ConfigError: the layers make no pipeline, or one that reads other samples than `run` did.
        FatalError: as for any run.
    """
    stored = StoredRun(RunFolder.find(output_dir, run))
    pipeline = regated(stored, layers, overrides)
    own = digest(["regate", stored.folder.run_id, pipeline.run_id])[:8]
    folder = run_folder(output_dir, f"{pipeline.name}-regate-{own}" if run_id is None else run_id)
    if folder.run_id == stored.folder.run_id:
        raise ConfigError(f"run_id: {run_id!r} is the run to be judged again; give the new one another name")
    lineage = Lineage(stored.folder.run_id, stored.read)
    steps = tuple(_replaying(stored, pipeline, lineage))
    return run_in_loop(execute(pipeline, folder, watch or unwatched, steps, lineage))


class StoredRun:
    """A finished run: its pipeline, its samples, and what its verdicts depended on.

    Raises InputError if it has left no ledger, or has not ended.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        manifest = read_json(folder.manifest)
        if manifest["status"] == "running" or not folder.ledger.exists():
            raise InputError(f"{folder.path}: this run has not ended; run it again to its end, and then regate it")
        self.config = read_yaml(folder.config)
        self.pipeline = parse_pipeline(self.config)
        self._hashes = {entry["path"]: entry["sha256"] for entry in manifest["inputs"]}
        ours = {"fastdistill": ""}  # a step's fingerprint tells of our own code
        self._comparable = manifest["versions"] | ours == versions() | ours
        self._kept: dict[int, Sample] = {}
        self.read = {folder.ledger.absolute(): sha256_file(folder.ledger)}

    def sample(self, index: int) -> Sample:
        if index not in self._kept:
            self.keep(next(self.folder.samples("idx = :index", index=index)))
        return self._kept[index]

    def same_models(self, step: Step, pipeline: Pipeline) -> bool:
        """Whether a step of `pipeline` asks the models that it would have asked in this run."""
        then, now = (
            [(model.provider, model.model, model.parameters()) for name in step.models() if (model := known.get(name))]
            for known in (self.pipeline.models, pipeline.models)
        )
        return then == now

    def gate_like(self, gate: Gate, pipeline: Pipeline) -> str | None:
        """The name of the gate of this run whose verdict on an answer is as good as a new one by `gate`, if any."""
        independent = (gate.alone or type(gate).judge_all is Gate.judge_all) and not gate.gates()
        if not (independent and self._comparable and self.same_models(gate, pipeline)):
            return None
        # The ledger has each answer as it was at the end: the gate saw the same one if no step rewrote it since.
        unchanged = takewhile(lambda step: not getattr(step, "rewrites", False), reversed(self.pipeline.steps))
        return next((step.name for step in unchanged if step.fingerprint == gate.fingerprint), None)

    def unchanged(self, path: Path) -> bool:
        """Whether a file is the one that the run read."""
        path = path.absolute()
        if path not in self.read and path.is_file():
            self.read[path] = sha256_file(path)
        return path in self.read and self.read[path] == self._hashes.get(path.as_posix())

    def keep(self, sample: Sample) -> None:
        if len(self._kept) >= _KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[sample.index] = sample


def regated(stored: StoredRun, layers: Sequence[Path], overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of an earlier run, changed as the layers say.

    A list of steps stands for all steps after generation (or for all steps, if it has the generation too) and brings
    its own `require`; a mapping changes the steps that it names. `target` and `budget` say when to stop asking, and are
    left out. Raises ConfigError if that is no pipeline, or one that would read other samples.
    """
    given = load_layers(layers)
    if not isinstance(given, dict):
        raise ConfigError("the config must be a mapping, like `steps:` and a list")
    steps = given.get("steps")
    base = dict(stored.config)
    if isinstance(steps, list):
        asking = _generating(stored.pipeline)
        kinds = {type(stored.pipeline.steps[at]).__name__ for at in asking}
        if kinds.isdisjoint(name for item in steps for name in (item if isinstance(item, dict) else [str(item)])):
            given["steps"] = [*base["steps"][: asking[-1] + 1], *steps]
        base.pop("require", None)
    config = load_layers((), overrides, merge(base, given))
    pipeline = parse_pipeline({key: value for key, value in config.items() if key not in ("target", "budget")})
    before, now = ([step.fingerprint for step in of.steps[: _generating(of)[0]]] for of in (stored.pipeline, pipeline))
    if before != now:
        raise ConfigError(
            f"steps: the samples are those that {stored.folder.run_id} has read, so the steps before generation"
            " can't be others; leave them out, or use `fastdistill pipeline run`"
        )
    return pipeline


def _generating(pipeline: Pipeline) -> list[int]:
    """Where in a pipeline candidates are asked for. Raises ConfigError if that is nowhere."""
    found = [at for at, step in enumerate(pipeline.steps) if is_generation(step)]
    if not found:
        raise ConfigError(f"{pipeline.name}: no step asks for candidates: there is nothing to judge again")
    return found


def _replaying(stored: StoredRun, pipeline: Pipeline, lineage: Lineage) -> Iterator[Step]:
    """The steps to run: the stored samples in place of all before generation, and none that asks for candidates."""
    yield _StoredSamples(name="StoredSamples", stored=stored)
    for step in pipeline.steps[_generating(pipeline)[0] :]:
        if is_generation(step):
            like = [(before.name, before.fingerprint) for before in stored.pipeline.steps]
            same = (step.name, step.fingerprint) in like and stored.same_models(step, pipeline)
            yield _StoredCandidates(name=step.name, stored=stored, generation=step, same=same)
        elif isinstance(step, Gate) and (name := stored.gate_like(step, pipeline)):
            yield _StoredVerdicts(name=step.name, stored=stored, gate=step, like=name, lineage=lineage)
        else:
            yield step


# Steps of our own making, never in a config.
class _StoredSamples(StreamStep, arbitrary_types_allowed=True):
    """The samples of the earlier run up to the one that made a target full, before anything was asked for them."""

    stored: StoredRun

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        for sample in first_accepted(self.stored.folder.samples(), self.stored.pipeline.target):
            if sample.candidates and sample.status is not Status.SKIPPED:
                self.stored.keep(sample)
                yield replace(sample, candidates=(), selection=None, failures=(), status=Status.OPEN)
            else:
                ctx.discard(sample)


class _StoredCandidates(SampleStep, arbitrary_types_allowed=True):
    """The candidates that a generation step got then, as far as it would ask for them now."""

    stored: StoredRun
    generation: Step
    same: bool

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        before = self.stored.sample(sample.index)
        failures = [failure for failure in before.failures if failure.step == self.name]
        for failure in failures:
            if failure.attempt is None:
                raise SampleError(failure.reason, failure.message)
        asked: set[tuple[str, str]] = set()
        if not self.same and isinstance(self.generation, TextGeneration):
            asked = {(prompt.provider, prompt.digest) for prompt in self.generation.prompts(sample, ctx)}
        kept = []
        for candidate in (c for c in before.candidates if c.step == self.name):
            if self.same or (candidate.prompt.provider, candidate.prompt.digest) in asked:
                kept.append(replace(candidate, answer=candidate.completion.text, cuts=(), verdicts=(), score=None))
            else:
                message = f"{sample.source}: {self.name} would ask something else now; regate asks nobody"
                failures.append(Failure(self.name, "not_stored", message, candidate.attempt))
        if not kept and not sample.candidates:
            last = [Failure(self.name, "not_stored", f"{sample.source}: nothing is stored"), *failures][-1]
            raise SampleError(last.reason, last.message)
        # As the waves brought them, where several steps ask.
        order = {candidate.candidate_id: at for at, candidate in enumerate(before.candidates)}
        candidates = sorted([*sample.candidates, *kept], key=lambda candidate: order[candidate.candidate_id])
        return replace(sample, candidates=tuple(candidates), failures=(*sample.failures, *failures))


class _StoredVerdicts(SampleStep, arbitrary_types_allowed=True):
    """A gate that judges what it has not judged before: not the same answer, or not by the same files."""

    rewrites = False

    stored: StoredRun
    gate: Gate
    like: str
    lineage: Lineage

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        async with self.gate.opened(ctx):
            yield

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        if all(self.stored.unchanged(path) for path in self.gate.inputs_for(sample)):
            before = {candidate.candidate_id: candidate for candidate in self.stored.sample(sample.index).candidates}
            taken_over = [self._taken_over(candidate, before) for candidate in sample.candidates]
            self.lineage.reused[self.name] += sum(map(is_not, taken_over, sample.candidates))
            sample = replace(sample, candidates=tuple(taken_over))
        return await self.gate.run(sample, ctx)

    def _taken_over(self, candidate: Candidate, before: Mapping[str, Candidate]) -> Candidate:
        stored = before[candidate.candidate_id]
        verdict = stored.verdict(self.like)
        if candidate.outcome is Outcome.FAIL or candidate.verdict(self.name) or candidate.answer != stored.answer:
            return candidate
        # What could not be judged then is tried again: the machine may be less busy, a database mended.
        if verdict is None or verdict.outcome is Outcome.ERROR:
            return candidate
        return candidate.judged(replace(verdict, gate=self.name))
