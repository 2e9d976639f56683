"""The main path: how samples go through steps. Read this first.

A pipeline is a flat list of steps. Stream steps are chained as lazy generators; consecutive sample steps run fused,
one coroutine per open sample, so there is no batch and no barrier: a slow answer delays nobody. Samples finish in
any order; the ledger gives them back in input order to the stream steps that follow.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from itertools import groupby
from typing import Protocol

from fastdistill.core.errors import FatalError, SampleError, boundary
from fastdistill.core.step import Context, SampleStep, Step, StreamStep
from fastdistill.core.types import Sample


class Run(Context, Protocol):
    """What the main path needs of a run, beyond what it hands to the steps."""

    @property
    def open_samples(self) -> int:
        """How many samples are worked on at a time; not how many requests are in flight."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether the run is winding down: open samples come home, no new one is begun."""
        ...

    def stop(self, reason: FatalError) -> None: ...

    def timed(self, step: Step) -> AbstractContextManager[None]: ...

    async def finished(self, sample: Sample, *, last: bool) -> None:
        """Writes a sample to the ledger, to be read back; `last`: it has gone through the last sample step."""
        ...

    def read_back(self, *, last: bool) -> Iterator[Sample]:
        """The finished samples that are still in the stream, in input order."""
        ...


async def run_pipeline(steps: Sequence[Step], run: Run) -> None:
    """Takes every sample through every step.

    Raises:
        FatalError: what the run was stopped for; everything paid for is stored by then.
    """
    async with AsyncExitStack() as stack:
        for step in steps:
            await stack.enter_async_context(step.opened(run))
        samples: Iterator[Sample] = iter(())
        groups = [list(group) for _, group in groupby(steps, lambda step: isinstance(step, SampleStep))]
        left = sum(isinstance(group[0], SampleStep) for group in groups)
        in_ledger = left > 0
        for group in groups:
            if isinstance(group[0], SampleStep):
                left -= 1
                fused = [step for step in group if isinstance(step, SampleStep)]
                await run_samples(fused, samples, run, last=left == 0)
                samples = run.read_back(last=left == 0)
            else:
                for step in group:
                    assert isinstance(step, StreamStep)
                    samples = step.run(samples, run)
        for sample in samples:  # the exports write as this loop pulls
            if not in_ledger:
                await run.finished(sample, last=True)


async def run_samples(steps: Sequence[SampleStep], samples: Iterator[Sample], run: Run, *, last: bool) -> None:
    """Takes samples through the fused sample steps, `run.open_samples` at a time."""
    stopped_for: list[FatalError] = []

    workers = 0

    async def work() -> None:
        # The workers share one iterator: whoever is free takes the next sample. Each starts one more while there
        # are too few, for `open_samples` follows what the teachers turn out to take.
        nonlocal workers
        workers += 1
        try:
            while not run.stopping and (sample := next(samples, None)) is not None:
                if workers < run.open_samples:
                    group.create_task(work())
                await run.finished(await run_sample(steps, sample, run), last=last)
                await asyncio.sleep(0)  # a sample that never waited lets the others have their turn
        except FatalError as error:
            stopped_for.append(error)
            run.stop(error)
        finally:
            workers -= 1

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
    if stopped_for:
        raise stopped_for[0]


async def run_sample(steps: Sequence[SampleStep], sample: Sample, run: Run) -> Sample:
    """One sample through all steps; what breaks is recorded with the sample and costs no other."""
    while True:  # again only while a step wants more: candidates come in waves until enough are accepted
        for step in steps:
            try:
                with run.timed(step), boundary(step.name):
                    sample = await step.run(sample, run)
            except SampleError as error:
                return sample.failed(step.name, error)
        if not any(step.wants_more(sample) for step in steps):
            return sample
