"""What a step is, and what it is given. A pipeline is a flat list of steps of two kinds.

A *stream* step is a lazy generator over samples (load, canonicalize, deduplicate, export). A *sample* step is a
coroutine over one sample (generate, parse, gate, select). Consecutive sample steps run fused.
"""

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

from pydantic import BaseModel, Field

from fastdistill.core.canonical import digest
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import SampleError
from fastdistill.core.turns import beside, give_turn
from fastdistill.core.types import Answer, Candidate, Draw, Message, Outcome, Prompt, Sample, Status, Verdict


class Model(Protocol):
    """A model behind its response store: the only way a step gets an answer."""

    def prompt(
        self, messages: Sequence[Message], decode: DecodeProfile, extra: dict[str, Any], sample: Sample | None = None
    ) -> Prompt:
        """A prompt for this model. `extra` are fields passed on to the server as they are.

        `sample` is whom it is for: only answers recorded elsewhere may be found by it; no other model looks at it.
        """
        ...

    def stored(self, prompt: Prompt, draws: Sequence[Draw]) -> bool:
        """Whether all of these answers are stored, so that `generate` would ask for none."""
        ...

    async def generate(self, prompt: Prompt, draws: Sequence[Draw]) -> list[Answer | SampleError]:
        """One answer, or what went wrong with it, for each draw, in their order. Stored answers cost nothing.

        Raises:
            FatalError: the endpoint refuses everything.
        """
        ...


class KeyIndex(Protocol):
    """Keys seen so far, on disk, so that memory stays flat in the number of records."""

    def first(self, key: str, value: str) -> str | None:
        """The value that came first under `key`; None, and `value` is kept, if there was none."""
        ...


class Output(Protocol):
    """What a run takes from the steps that write."""

    @property
    def dist(self) -> Path:
        """The folder of the data set being written."""
        ...

    def discard(self, sample: Sample) -> None:
        """Takes a sample out of the stream, with its reason; it stays in the ledger."""
        ...

    def report(self, step: str, found: Mapping[str, Any]) -> None:
        """Puts what a step has to say of its whole work into the quality report, with the step's stage."""
        ...


class Context(Output, Protocol):
    """What a run gives its steps."""

    def model(self, name: str) -> Model: ...

    def index(self, name: str) -> KeyIndex: ...

    def next_index(self) -> int:
        """The index of the next sample that is loaded: 0, 1, 2 ... over all loading steps of the run."""
        ...


@dataclass(frozen=True, slots=True)
class Mutation:
    """A way to break a right answer. `operator` names its kind; `apply` writes the mutant."""

    operator: str
    apply: Callable[[], str]
    may_be_equal: bool = True
    """The mutant may mean the same as the answer all the same."""


class Step(BaseModel, frozen=True, extra="forbid"):
    """A step is its configuration. `name` is what reports call it; the pipeline numbers repeated ones."""

    version: ClassVar[int] = 1
    """Raised when the code changes what the step does, so that its fingerprint changes too."""

    machine_only: ClassVar[frozenset[str]] = frozenset({"name"})
    """Fields that change nothing but how the work is done: not part of the fingerprint."""

    name: str = Field("", description="what reports call this step; the class's name by default")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever the step may judge or write otherwise."""
        config = self.model_dump(mode="json", exclude=set(self.machine_only))
        return digest([type(self).__name__, self.version, config])[:16]

    def inputs(self) -> Sequence[Path]:
        """Files that this step reads; the manifest records their hashes."""
        return ()

    def used(self) -> Mapping[Path, str]:
        """Files that records named, with the sha256 of each at its first use; the manifest records them too."""
        return {}

    def findings(self) -> Mapping[str, Any]:
        """What the quality report says of this step, after a run, beyond what it counts itself."""
        return {}

    def count(self) -> int:
        """How many samples this step brings into the stream, for the progress display. May read files."""
        return 0

    def gates(self) -> Sequence[str]:
        """Names of the gates whose verdicts this step reads; checked before anything is spent."""
        return ()

    def environment(self) -> Mapping[str, Any]:
        """What of this machine the step's work depends on; the manifest records it."""
        return {}

    def models(self) -> Sequence[str]:
        """Names of the models that this step asks; checked before anything is spent."""
        return ()

    def steps(self) -> Sequence[str]:
        """Names of other steps whose candidates this step tells apart; checked before anything is spent."""
        return ()

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        """Holds what the step needs while the run lasts: worker processes, connections."""
        yield


class StreamStep(Step):
    def files(self, split: str) -> Mapping[str, str]:
        """The files of the data set that this step writes for a split, and what their rows are."""
        return {}

    @abstractmethod
    def run(self, samples: Iterator[Any], ctx: Context) -> Iterator[Sample | None]:
        """Yields samples, lazily and in input order; None where one was left out (`ctx.discard`), so that others have
        their turn.

        Args:
            samples: a `Sample` each; only a `StreamFilter` is given the Nones of the steps before it.

        Raises:
            FatalError: the whole stream can't be read or written.
        """


Look: TypeAlias = Generator[None, None, Sample]
"""Gives others their turn at each `yield`, and returns the sample."""


class StreamFilter(StreamStep):
    """A stream step that looks at one sample at a time."""

    @abstractmethod
    def looking(self, ctx: Context) -> "Callable[[Sample], Sample | Look]":
        """A function that gives a sample as it goes on, or as it is left out (`Sample.left_out`).

        It may raise SampleError: that sample fails. One that takes long for a large record is a generator.

        Raises:
            FatalError: no sample can be looked at.
        """

    def run(self, samples: Iterator[Sample | None], ctx: Context) -> Iterator[Sample | None]:
        look = self.looking(ctx)
        for sample in samples:
            if sample is None:
                yield None
                continue
            try:
                seen = look(sample)
                if not isinstance(seen, Sample):  # asking `Generator`, an abstract class, takes long
                    seen = yield from seen
            except SampleError as error:
                seen = sample.failed(self.name, error)
            if seen.status is Status.OPEN:
                yield seen
            else:
                ctx.discard(seen)
                yield None


class SampleStep(Step):
    rewrites: ClassVar[bool] = True
    """Whether it may change an answer that is there: a verdict given before it was on another answer."""

    generates: ClassVar[bool] = True
    """Of a step that asks models: it asks them for candidates, and not what they think of them."""

    @abstractmethod
    async def run(self, sample: Sample, ctx: Context) -> Sample:
        """The sample with what this step found. It may see a sample again that has got more candidates since.

        Raises:
            SampleError: this sample can't go on.
        """

    def race(self, sample: Sample) -> "Sequence[SampleStep]":
        """Steps to run side by side in place of this one, each for one candidate; none, as a rule."""
        return ()

    def is_stored(self, sample: Sample, ctx: Context) -> bool:
        """Of a step that races: whether it would ask for nothing, for its candidate is stored."""
        return False

    def wants_more(self, sample: Sample) -> bool:
        """Whether a sample that has gone through all steps should go through them again."""
        return False


class Gate(SampleStep):
    """A sample step that judges candidates. A subclass writes `judge`, or `judge_all` to judge them together.

    A candidate that an earlier gate failed is not judged again: gates are ordered cheapest first.
    """

    rewrites: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    alone: ClassVar[bool] = False
    """Of a gate that writes `judge_all`: its verdict on a candidate does not depend on the others all the same."""

    def inputs_for(self, sample: Sample) -> Sequence[Path]:
        """Files that a verdict on this sample depends on; `inputs` has them all once the samples have passed."""
        return self.inputs()

    def gold(self, sample: Sample) -> str | None:
        """The record's right answer, as a teacher would write it; None if this gate knows of none."""
        return None

    def mutations(self, gold: str, sample: Sample) -> Sequence[Mutation]:
        """Ways to break a right answer, for an audit of what this gate lets through."""
        return ()

    def stricter(self) -> "Gate | None":
        """A gate that tells more answers from gold than this one, for an audit of what it let through."""
        return None

    def looks_at(self, candidate: Candidate) -> bool:
        """Whether it judges a candidate that it has not judged yet."""
        return candidate.outcome is not Outcome.FAIL

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        name = self.name
        open_ = [c for c in sample.candidates if c.verdict(name) is None and self.looks_at(c)]
        if not open_:
            return sample
        verdicts = await self.judge_all(open_, sample, ctx)
        judged = {c.candidate_id: c.judged(v) for c, v in zip(open_, verdicts, strict=True)}
        return sample.with_candidates([judged.get(c.candidate_id, c) for c in sample.candidates])

    async def judge_all(self, candidates: Sequence[Candidate], sample: Sample, ctx: Context) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for candidate in candidates:
            if verdicts:
                await give_turn()
            verdicts.append(await self.judge(candidate, sample, ctx))
        return verdicts

    async def judge(self, candidate: Candidate, sample: Sample, ctx: Context) -> Verdict:
        raise TypeError(f"{type(self).__name__} does not implement judge")

    def verdict(self, outcome: Outcome, reason: str, score: float | None = None, **detail: Any) -> Verdict:
        if score is not None and not isfinite(score):
            raise ValueError(f"the score {score} has no place in JSON; give a finite one, or None")
        return Verdict(self.name, self.fingerprint, outcome, reason, score, detail)


async def rewritten(sample: Sample, change: Callable[[Candidate], Candidate]) -> Sample:
    """The sample with each of its candidates changed, and turns between them."""
    candidates: list[Candidate] = []
    for candidate in sample.candidates:
        if candidates:
            await give_turn()
        large = len(candidate.answer) > _LARGE
        candidates.append(await beside(partial(change, candidate)) if large else change(candidate))
    return sample.with_candidates(candidates)


_LARGE = 2**15  # characters, which some parsers read in some milliseconds


def is_generation(step: Step) -> bool:
    """Whether a step asks a model for candidates."""
    return isinstance(step, SampleStep) and step.generates and bool(step.models())
