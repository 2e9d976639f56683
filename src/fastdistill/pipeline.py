"""The main path: how samples go through steps. Read this first.

A pipeline is a flat list of steps. Stream steps are chained as lazy generators; consecutive sample steps run fused,
one coroutine per open sample, so there is no batch and no barrier: a slow answer delays nobody. Samples finish in
any order; the ledger gives them back in input order to the stream steps that follow.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import groupby, takewhile
from typing import NamedTuple

from msgspec.structs import replace

from fastdistill.core.errors import FatalError, NotAsked, SampleError, boundary
from fastdistill.core.run import Run
from fastdistill.core.step import SampleStep, Step, StreamFilter, StreamStep, is_generation
from fastdistill.core.timing import StepTime, Timer
from fastdistill.core.turns import give_turn
from fastdistill.core.types import Sample, Status

_LOOKS_EVERY = 16  # samples, for how many may be open


async def run_pipeline(steps: Sequence[Step], run: Run) -> None:
    """Takes every sample through every step.

    Raises:
        FatalError: what the run was stopped for; everything paid for is stored by then.
    """
    async with AsyncExitStack() as stack:
        for step in steps:
            await stack.enter_async_context(step.opened(run))
        samples: Iterator[Sample | None] = iter(())
        groups = [list(group) for _, group in groupby(steps, lambda step: isinstance(step, SampleStep))]
        left = of = sum(isinstance(group[0], SampleStep) for group in groups)
        for group in groups:
            if isinstance(group[0], SampleStep):
                left -= 1
                fused = [step for step in group if isinstance(step, SampleStep)]
                await run_samples(fused, samples, run, first=left == of - 1, last=left == 0)
                samples = await run.read_back(last=left == 0)
            else:
                for step in group:
                    assert isinstance(step, StreamStep)
                    samples = step.run(samples if isinstance(step, StreamFilter) else filter(None, samples), run)
        for sample in samples:  # the exports write as this loop pulls
            if run.stopped_for:
                raise run.stopped_for
            if sample is not None and not of:  # else it is in the ledger
                await run.finished(sample, last=True)
            await give_turn()


async def run_samples(
    steps: Sequence[SampleStep], samples: Iterator[Sample | None], run: Run, *, first: bool, last: bool
) -> None:
    """Takes samples through the fused sample steps, `run.open_samples` at a time.

    A run that has enough begins no further sample, but takes those that are begun through all steps.
    """
    stages = [Stage.of(step, run) for step in steps]
    asking = [step for step in steps if type(step).wants_more is not SampleStep.wants_more]
    workers = taken = 0
    room = run.open_samples

    async def work() -> None:
        # The workers share one iterator: whoever is free takes the next sample. Each starts one more while there
        # are too few, for `open_samples` follows what the teachers turn out to take.
        nonlocal workers, taken, room
        workers += 1
        try:
            while not (run.stopping if first else run.stopped_for):
                try:
                    sample = next(samples)
                except StopIteration:
                    break
                if sample is None:  # one was left out
                    await run.keep_up()
                else:
                    taken += 1
                    if taken % _LOOKS_EVERY == 0:
                        room = run.open_samples
                    if workers < room:
                        group.create_task(work())
                    run.begins(sample)
                    await run.finished(await run_sample(stages, asking, sample, run), last=last)
                await give_turn()  # samples that never wait let the others have theirs
        except FatalError as error:
            run.stop(error)
        finally:
            workers -= 1

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
    if run.stopped_for:
        raise run.stopped_for


class Stage(NamedTuple):
    """A sample step, and what need not be asked of it for every sample."""

    name: str
    run: Callable[[Sample, Run], Awaitable[Sample]]
    race: Callable[[Sample], Sequence[SampleStep]] | None
    time: StepTime
    draws: bool

    @classmethod
    def of(cls, step: SampleStep, run: Run) -> "Stage":
        races = type(step).race is not SampleStep.race
        return cls(step.name, step.run, step.race if races else None, run.time_of(step), is_generation(step))


async def run_sample(stages: Sequence[Stage], asking: Sequence[SampleStep], sample: Sample, run: Run) -> Sample:
    """One sample through all steps; what breaks, or stops the run, is recorded with the sample and costs no other."""
    try:
        with boundary() as at_work, Timer() as timer:
            while True:  # again only while a step wants more: candidates come in waves until enough are accepted
                for at, (at_work.step, work, race, time, _) in enumerate(stages, 1):
                    if race is not None and (draws := race(sample)):
                        timer.turn_to(None)
                        sample = await run_race(draws, [s for s in stages[at:] if not s.draws], sample, run)
                    else:
                        timer.turn_to(time)
                        sample = await work(sample, run)
                if sample.status is not Status.OPEN:
                    return sample
                for step in asking:
                    at_work.step = step.name
                    if step.wants_more(sample):
                        break
                else:
                    return sample
    except SampleError as error:
        return sample.failed(at_work.step, error)
    except FatalError as error:
        run.stop(error)
        return sample.failed(at_work.step, NotAsked("stopped", str(error)))


async def run_race(draws: Sequence[SampleStep], gates: Sequence[Stage], sample: Sample, run: Run) -> Sample:
    """Draws of one sample side by side through the gates, until enough are accepted; those behind are called off.

    They are looked at in the order of attempts: a fast answer has no better chance than a slow one. The first ones that
    are stored race alone: if they are enough, as when a run is run again, nothing is asked.
    """
    bare = replace(sample, candidates=(), failures=())
    tasks: list[asyncio.Task[Sample]] = []

    def start(some: Iterable[SampleStep]) -> None:
        tasks.extend(asyncio.create_task(run_sample([Stage.of(draw, run), *gates], (), bare, run)) for draw in some)

    start(takewhile(lambda draw: draw.is_stored(bare, run), draws))
    try:
        for at, draw in enumerate(draws):
            if at == len(tasks):
                start(draws[at:])
            done = await tasks[at]
            candidates = (*sample.candidates, *done.candidates)
            sample = replace(sample, candidates=candidates, failures=(*sample.failures, *done.failures))
            skipped = done.status is Status.SKIPPED and (not candidates or run.stopped_for)  # or it would race for ever
            if done.status is Status.FAILED or skipped:
                return replace(sample, status=done.status)
            if not draw.wants_more(sample):
                return sample if sample.candidates else replace(sample, status=Status.FAILED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return sample
