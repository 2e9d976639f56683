"""A pipeline and its runs: checks what must fit together, runs it in its folder, leaves the proofs."""

import asyncio
import gc
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self, TypeAlias

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, field_validator, model_validator

from fastdistill.control.budget import Budget, Target
from fastdistill.control.floor import Floor
from fastdistill.control.folder import RunFolder, artifacts_root
from fastdistill.control.ledger import Ledger
from fastdistill.control.registry import provider_class
from fastdistill.control.reports import Lineage, Proofs
from fastdistill.control.run import ActiveRun
from fastdistill.control.store import ResponseStore
from fastdistill.control.tally import Tally
from fastdistill.core.canonical import digest
from fastdistill.core.errors import ConfigError, EnvironmentFault, ExitCode, FatalError
from fastdistill.core.files import atomic
from fastdistill.core.step import Gate, SampleStep, Step, StreamFilter, StreamStep
from fastdistill.data.export.dataset import Splits
from fastdistill.data.export.logprobs import ExportLogprobs
from fastdistill.data.generate import TextGeneration
from fastdistill.data.prepare import Shard
from fastdistill.model.client import ModelClient
from fastdistill.model.provider import ModelConfig, Provider
from fastdistill.pipeline import run_pipeline

Watch: TypeAlias = Callable[[ActiveRun], AbstractContextManager[None]]
"""Something that looks on while a run is at work, like the progress display."""


def unwatched(run: ActiveRun) -> AbstractContextManager[None]:
    """Nobody looks on."""
    return nullcontext()


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Interrupted(FatalError):
    """The user asked the run to end."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to. `exit_code` is OK, PARTIAL or FLOOR; anything worse is raised."""

    run_id: str
    path: Path
    dataset: Path
    exit_code: ExitCode
    manifest: Mapping[str, Any]
    quality: Mapping[str, Any]
    timing: Mapping[str, Any]


class Origin(BaseModel, frozen=True, extra="forbid"):
    """What a run descends from, for the manifest; it changes nothing that the run does."""

    parent: str | None = Field(None, description="an earlier run under the same artifacts root, by its id or beginning")
    role: str | None = Field(None, description="set by `fastdistill eval`: whose answers these are")


class Pipeline(BaseModel, frozen=True, extra="forbid"):
    """A named list of steps and the models that they ask.

    From Python: `Pipeline(name="text2sql", models={"teacher": {"provider": "ollama", ...}}, steps=[...]).run()`.
    """

    name: str = Field(pattern=_NAME, max_length=64)
    models: dict[str, SerializeAsAny[ModelConfig]] = Field(default_factory=dict)
    steps: tuple[SerializeAsAny[Step], ...] = Field(min_length=1)
    require: Floor = Floor()
    target: Target | None = None
    budget: Budget = Budget()
    lineage: Origin = Origin()
    max_error_rate: float = Field(0.1, ge=0, le=1, description="share of samples that may fail before the run stops")

    @field_validator("models", mode="before")
    @classmethod
    def _of_their_provider(cls, models: Any) -> Any:
        if not isinstance(models, dict):
            return models
        return {
            name: provider_class(str(body.get("provider"))).Config.model_validate(body)
            if isinstance(body, dict)
            else body
            for name, body in models.items()
        }

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        object.__setattr__(self, "steps", tuple(_named(self.steps)))
        placed = [(f"steps[{at}].{step.name}", step) for at, step in enumerate(self.steps)]
        problems = [
            f"{place}: {model!r} is not under models: ({', '.join(self.models) or 'none'})"
            for place, step in placed
            for model in step.models()
            if model not in self.models
        ]
        problems += [
            f"{place}.decode_profile.max_tokens: {most:,} is more than models.{model}.tokens_per_minute ({limit:,})"
            " allows; lower it, or raise that if the provider allows more"
            for place, step in placed
            if (most := getattr(getattr(step, "decode_profile", None), "max_tokens", None))
            for model in step.models()
            if model in self.models and (limit := self.models[model].tokens_per_minute) and most > limit
        ]
        names = [step.name for step in self.steps]
        unread = {step.name for step in self.steps if type(step) is Step}  # what is wrong with these is told already
        problems += [
            f"steps: two are named {name!r}; a name is given once"
            for name in {*names} - unread
            if names.count(name) > 1
        ]
        kinds = [type(step).__name__ for step in self.steps]
        first_sample_step = next((at for at, step in enumerate(self.steps) if isinstance(step, SampleStep)), None)
        if first_sample_step is not None and "CanonicalizeFields" not in {*kinds[:first_sample_step], *unread}:
            problems.append(
                f"steps[{first_sample_step}].{kinds[first_sample_step]}: CanonicalizeFields must come before it,"
                " for it gives each sample its id"
            )
        if isinstance(self.steps[0], StreamFilter | Splits):  # or the run would complete, with nothing
            problems.append(f"steps[0].{kinds[0]}: brings no records; begin with LoadJsonl")
        gates = [step.name for step in self.steps if isinstance(step, Gate)]
        named = [(f"require.pass_rate.{gate}", gate) for gate in self.require.pass_rate]
        named += [(place, gate) for place, step in placed for gate in step.gates()]
        problems += [
            f"{place}: there is no gate {gate!r}; there are: {', '.join(gates) or 'none'}"
            for place, gate in named
            if gate not in gates and gate not in unread
        ]
        problems += [  # a judge would never be calibrated, and never say so
            f"{place}: {gate} must come before it, for it reads {gate}'s verdicts"
            for at, (place, step) in enumerate(placed)
            for gate in step.gates()
            if gate in names[at:]
        ]
        problems += [
            f"{place}: there is no step named {other!r}; there are: {', '.join(names)}"
            for place, step in placed
            for other in step.steps()
            if other not in names
        ]
        written = Counter(path for step in self.steps if isinstance(step, StreamStep) for path in step.files("train"))
        if twice := [path for path, count in written.items() if count > 1]:
            remedy = "give one other `formats` or `shapes`, or leave it out"
            problems.append(f"steps: two exports write {', '.join(twice)}; {remedy}")
        kept = {(step.test, step.group_by) for step in self.steps if isinstance(step, Splits)}
        if len(kept) > 1 and any(share for share, _ in kept):
            what = "give all of them the same, or what one keeps for a test is trained on by way of another"
            problems.append(f"steps: exports differ in `test` or `group_by`; {what}")
        asking = [step for step in self.steps if isinstance(step, TextGeneration)]
        recorded = any(self.models[name].recorded for step in asking for name in step.models() if name in self.models)
        asked = any(step.decode_profile.logprobs or "logprobs" in step.generation_kwargs for step in asking)
        if asking and not recorded and not asked:
            problems += [
                f"{place}: no answer would have log-probabilities; set decode_profile.logprobs: true"
                for place, step in placed
                if isinstance(step, ExportLogprobs) and step.scores is None
            ]
        unpriced = [name for name, config in self.models.items() if config.price is None]
        if self.budget.max_cost_usd is not None and unpriced:
            problems.append(f"budget.max_cost_usd: needs a price at models.{', models.'.join(unpriced)}")
        read = [step for step in self.steps if type(step) is not Step]
        groups = [sample_step for sample_step, _ in groupby(read, lambda step: isinstance(step, SampleStep))]
        if self.target is not None and groups.count(True) > 1:
            problems.append("target: needs the steps that work on samples one after the other, without others between")
        if self.target is not None:
            last = max((at for at, step in enumerate(self.steps) if isinstance(step, SampleStep)), default=len(kinds))
            problems += [
                f"target: steps[{at}].{kind} leaves out accepted samples; put it before the steps that work on samples"
                for at, kind in enumerate(kinds[last:], last)
                if kind in ("Deduplicate", "NearDuplicates", "Decontaminate", "Shard")
            ]
        writes = [*map(_writes, self.steps)]
        if any(writes):
            at = writes.index(True)
            problems += [
                f"{place}: what it leaves out, rejects or rewrites, {names[at]} has written by then;"
                f" put it before {names[at]}"
                for place, step in placed[at:]
                if isinstance(step, StreamFilter | Gate) or (isinstance(step, SampleStep) and step.rewrites)
            ]
        parted = groupby(placed, lambda each: isinstance(each[1], StreamStep))
        parts = [[*group] for streams, group in parted if not streams]
        judged = [any(isinstance(step, Gate) for _, step in part) for part in parts]
        problems += [  # its first wave would be enough, whatever the gates say
            f"{place}.until: knows only the gates that follow without a step between that looks at all samples; put"
            " that step before the generation, or behind the gates"
            for at, part in enumerate(parts)
            for place, step in part
            if isinstance(step, TextGeneration) and step.until and any(judged[at:]) > judged[at]
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def run_id(self) -> str:
        """Name and hash of all that makes the data set: the same pipeline runs in the same folder, and so resumes."""
        models = {name: [config.provider, config.model, config.parameters()] for name, config in self.models.items()}
        steps = [[step.name, step.fingerprint] for step in self.steps]
        return f"{self.name}-{digest([self.name, models, steps])[:8]}"

    @property
    def read_at(self) -> int:
        """The place of the first step that works on single samples, or writes them: all that come have been read."""
        found = (at for at, step in enumerate(self.steps) if isinstance(step, SampleStep) or _writes(step))
        return next(found, len(self.steps))

    def shard(self, index: int, of: int) -> "Pipeline":
        """What the `index`-th of so many machines has to do. Floor and lineage are the whole data set's, and left out.

        Raises ConfigError if the steps have a `Shard` already: of two, the one might leave nothing to the other.
        """
        if other := next((step for step in self.steps if isinstance(step, Shard)), None):
            raise ConfigError(f"--shard {index}/{of}: {other.name} makes this shard {other.index}/{other.of}; drop one")
        steps = (*self.steps[: self.read_at], Shard(index=index, of=of), *self.steps[self.read_at :])
        return Pipeline.model_validate(dict(self) | {"steps": steps, "require": Floor(), "lineage": Origin()})

    def resolved(self) -> dict[str, Any]:
        """The whole configuration with its defaults, as YAML would have it, without secrets."""
        return {
            "name": self.name,
            "models": {name: config.model_dump(mode="json") for name, config in self.models.items()},
            "steps": [{type(step).__name__: step.model_dump(mode="json")} for step in self.steps],
            "require": self.require.model_dump(mode="json", exclude_defaults=True),
            "target": self.target and self.target.model_dump(mode="json"),
            "budget": self.budget.model_dump(mode="json", exclude_defaults=True),
            "lineage": self.lineage.model_dump(mode="json", exclude_defaults=True),
            "max_error_rate": self.max_error_rate,
        }

    def run(
        self, *, output_dir: Path | str | None = None, run_id: str | None = None, watch: Watch | None = None
    ) -> RunResult:
        """Runs the pipeline; run again after a crash or Ctrl-C, it goes on where it was.

        Args:
            output_dir: the artifacts root; by default FASTDISTILL_ARTIFACTS_DIR, or `./artifacts`.
            run_id: a name of your own for the run's folder.
            watch: what looks on, like `fastdistill.control.progress.live`, which shows how far the run is.

        Raises:
            FatalError: the run could not be finished; everything that was paid for is stored.
        """
        return run_in_loop(
            execute(self, run_folder(output_dir, self.run_id if run_id is None else run_id), watch or unwatched)
        )


def run_folder(output_dir: Path | str | None, run_id: str) -> RunFolder:
    """Raises ConfigError if `run_id` can't name a folder."""
    if not re.fullmatch(_NAME, run_id):
        raise ConfigError(f"run_id: {run_id!r} can't name a folder; use letters, digits, '.', '_' and '-'")
    return RunFolder(artifacts_root(Path(output_dir) if output_dir is not None else None), run_id)


async def execute(
    pipeline: Pipeline, folder: RunFolder, watch: Watch, steps: Sequence[Step] = (), lineage: Lineage | None = None
) -> RunResult:
    """Runs a pipeline in its folder, in the running event loop.

    With a `lineage`, `steps` stand in for the pipeline's, which are those reported, and no server is asked.
    """
    brake = _Brake()
    with folder.held():
        stop_on_signals(brake, folder)
        tally = Tally(pipeline.steps)
        proofs = Proofs(pipeline, folder, tally, lineage)
        with atomic(folder.config) as file:
            yaml.safe_dump(_literal(pipeline.resolved()), file, sort_keys=False, allow_unicode=True, width=100)
        folder.begin_dist()
        proofs.begin()
        run: ActiveRun | None = None
        try:
            async with AsyncExitStack() as stack:
                store = await stack.enter_async_context(ResponseStore(folder.responses))
                ledger = await stack.enter_async_context(Ledger(folder.ledger))
                models = {
                    name: ModelClient(name, config, () if lineage else _providers(config, folder, brake), store, brake)
                    for name, config in pipeline.models.items()
                }
                for model in models.values():
                    stack.push_async_callback(model.aclose)
                run = brake.run = ActiveRun(
                    dist=folder.dist_in_work,
                    ledger=ledger,
                    models=models,
                    tally=tally,
                    max_error_rate=pipeline.max_error_rate,
                    target=pipeline.target,
                    budget=pipeline.budget,
                )
                stack.callback(run.close)
                with watch(run):
                    await run_pipeline(steps or pipeline.steps, run)
                run.check_error_rate_at_end()
            proofs.finish_dist()
            return proofs.finish(run)
        except FatalError as error:
            proofs.abort(run, error)
            raise
        except OSError as error:
            fault = EnvironmentFault(f"{error.filename or folder.path}: {error.strerror or error}; then run it again")
            proofs.abort(run, fault)
            raise fault from error


class _Brake:
    """Lets the clients, which are made first, ask the run, which is made of them."""

    run: ActiveRun | None = None

    def check(self, tokens: int, dollars: float) -> bool:
        assert self.run is not None
        return self.run.check(tokens, dollars)

    async def pause(self, seconds: float) -> None:
        assert self.run is not None
        await self.run.pause(seconds)

    def turn(self) -> asyncio.Future[None] | None:
        assert self.run is not None
        return self.run.turn()

    def asks(self) -> None:
        assert self.run is not None
        self.run.asks()


def stop_on_signals(brake: _Brake, folder: RunFolder) -> None:
    """The first Ctrl-C (SIGTERM, SIGHUP) lets answers in flight come home, the second ends the run, the third us."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    handled = _heeded()

    def stop() -> None:
        run = brake.run
        if run is None or run.stopped_for is not None:
            task.cancel()
            for number in handled:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)
            return
        run.stop(
            Interrupted(
                f"interrupted: answers so far are in {folder.responses}; run the same command again to go on from there"
            )
        )

    if isinstance(thread := threading.current_thread(), _Beside):
        thread.stop = partial(loop.call_soon_threadsafe, stop)
    for number in handled:
        loop.add_signal_handler(number, stop)


def _heeded() -> list[signal.Signals]:
    """The signals that a run may handle: none outside of the main thread, and none that is ignored, as nohup has it."""
    here = threading.current_thread() is threading.main_thread()
    return [number for number in _ENDING if here and signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Leaves the handlers of signals as they were; a run sets its own."""
    handlers = {number: signal.getsignal(number) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python


class _Beside(threading.Thread):
    """A run beside a loop that runs already; who waits for it has the signals, and hands them on."""

    stop: Callable[[], object] = staticmethod(lambda: None)  # nothing is asked yet


def run_in_loop(work: Coroutine[Any, Any, RunResult]) -> RunResult:
    """Runs a coroutine to its end, on uvloop where there is one; in a thread of its own inside a notebook's loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(work)
    results: list[RunResult | BaseException] = []

    def target() -> None:
        try:
            results.append(_run(work))
        except BaseException as error:
            results.append(error)

    thread = _Beside(target=target, name="fastdistill")
    with _handlers_kept():
        for number in _heeded():
            signal.signal(number, lambda *_: thread.stop())
        thread.start()
        thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _run(work: Coroutine[Any, Any, RunResult]) -> RunResult:
    factory = None
    if sys.platform != "win32" and sys.implementation.name == "cpython":
        import uvloop

        factory = uvloop.new_event_loop
    with _handlers_kept(), tuned(), asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


@contextmanager
def tuned() -> Iterator[None]:
    """Sets the interpreter up for a run.

    Looks for cycles less often, of which samples make hardly any, and never among what was there before the run. And a
    thread gets the interpreter's lock after 2 ms, not 5: to store a group of answers, it needs the lock several times.
    """
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    sys.setswitchinterval(0.002)
    gc.freeze()
    gc.set_threshold(20_000, 100, 100)  # at 50,000 a look took up to 60 ms
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.unfreeze()


def _providers(config: ModelConfig, folder: RunFolder, brake: _Brake) -> list[Provider]:
    kind = provider_class(config.provider)
    # A provider whose requests outlive a run keeps them under the root, and wants to know when the run winds down.
    make = partial(kind.in_run, root=folder.root, brake=brake) if hasattr(kind, "in_run") else kind
    return [make(endpoint) for endpoint in config.endpoints()]


def _literal(value: Any) -> Any:
    """A value as a config must have it to be read as it is: no variable is meant by `${`."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _writes(step: Step) -> bool:
    return isinstance(step, StreamStep) and bool(step.files("train"))


def _named(steps: tuple[Step, ...]) -> Iterator[Step]:
    """Gives every step a name of its own: its class's, numbered from the second on."""
    used: set[str] = {step.name for step in steps if step.name}
    for step in steps:
        if step.name:
            yield step
            continue
        kind = type(step).__name__
        name, number = kind, 1
        while name in used:
            number += 1
            name = f"{kind}#{number}"
        used.add(name)
        yield step.model_copy(update={"name": name})
