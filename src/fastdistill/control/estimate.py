"""What a run would cost, before it is paid for: a random few of its samples go through teacher and gates.

The answers are stored like any others, so the run itself will not pay for them again.
"""

import heapq
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from hashlib import sha256
from math import inf
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import PrivateAttr

from fastdistill.control.folder import RunFolder, artifacts_root
from fastdistill.control.run import open_at
from fastdistill.control.session import Pipeline, execute, run_in_loop, unwatched
from fastdistill.core.bill import BILLS, Bill
from fastdistill.core.errors import InputError
from fastdistill.core.stats import Total, project_mean, project_needed, project_share
from fastdistill.core.step import Context, SampleStep, StreamStep
from fastdistill.core.types import Sample, Status, Usage


class RandomSamples(StreamStep):
    """Lets `n` samples through, drawn at random but always the same ones: those whose ids hash lowest."""

    n: int

    _seen: int = PrivateAttr(0)  # samples to draw from
    _bills: dict[int, Bill] = PrivateAttr(default_factory=dict)
    """What each of those drawn asks for from here on, by its index."""

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        BILLS.set(self._bills)
        yield

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample | None]:
        drawn: list[tuple[int, int, Sample]] = []
        for sample in samples:
            self._seen += 1
            lowest = -int.from_bytes(sha256(f"estimate {sample.sample_id}".encode()).digest())
            heapq.heappush(drawn, (lowest, sample.index, sample))
            if len(drawn) > self.n:
                heapq.heappop(drawn)
            yield None  # others, and Ctrl-C, have their turn
        for sample in sorted((sample for _, _, sample in drawn), key=lambda sample: sample.index):
            self._bills[sample.index] = {}
            yield sample


@dataclass(frozen=True, slots=True)
class Estimate:
    """Projections with 95% intervals, for all samples, or for those that a run with a target asks for.

    `seconds` supposes that requests go on to take as long, with `concurrency` in flight at the model that takes the
    longest, or as fast as its limits a minute allow; None if every answer was stored already. `cost_usd` is None
    without prices. So are it and the tokens where a server does not tell them.
    """

    samples: int
    drawn: int
    concurrency: int
    prompt_tokens: Total | None
    completion_tokens: Total | None
    accepted: Total
    seconds: Total | None
    cost_usd: Total | None


def run_shortened(pipeline: Pipeline, few: StreamStep, output_dir: Path | None) -> tuple[list[Sample], dict[str, Any]]:
    """Runs `few` samples up to the last step that works on samples; the samples and the timing report.

    The response store is the shared one, and there is no run folder. They may cost no more than the run may.
    """
    places = [place for place, step in enumerate(pipeline.steps, 1) if isinstance(step, SampleStep)]
    end, at = max(places, default=len(pipeline.steps)), pipeline.read_at
    steps = (*pipeline.steps[:at], few, *pipeline.steps[at:end])
    name, models, budget = pipeline.name, pipeline.models, pipeline.budget
    shortened = Pipeline(name=name, models=models, steps=steps, budget=budget, max_error_rate=1)
    with TemporaryDirectory(prefix="fastdistill-") as scratch:
        folder = RunFolder(artifacts_root(output_dir), "preview", Path(scratch) / "run")
        result = run_in_loop(execute(shortened, folder, unwatched))
        return list(folder.samples()), dict(result.timing)


def estimate(pipeline: Pipeline, output_dir: Path | None, n: int) -> Estimate:
    """Raises InputError if there are no two samples to draw."""
    few = RandomSamples(n=n, name="draw")
    samples, timing = run_shortened(pipeline, few, output_dir)
    # One that failed would fail in the run too; of one that a budget left out nothing is known.
    drawn = [sample for sample in samples if sample.index in few._bills and sample.status is not Status.SKIPPED]
    if sum(bool(sample.candidates) for sample in drawn) < 2:
        why = next((f"; like: {failure.message}" for sample in samples for failure in sample.failures), "")
        raise InputError(f"an estimate needs two samples at least that a teacher answered{why}")
    bills = [few._bills[sample.index].values() for sample in drawn]
    seen = few._seen
    accepted = sum(sample.status is Status.OPEN and bool(sample.accepted) for sample in drawn)
    target = pipeline.target.accepted if pipeline.target else seen
    needed: tuple[float, ...] = (seen,) * 3
    if pipeline.target:
        slots = sum(told["concurrency"] for told in timing["models"].values())
        uncounted = slots, 0, open_at(slots)  # which are open when the target is met, and have been asked by then
        counted = astuple(project_needed(target, accepted, len(drawn), seen))
        needed = tuple(min(seen, part + more) for part, more in zip(counted, uncounted, strict=True))

    def total(of: Callable[[str, Usage], float], least: float = 0.0) -> Total:
        found = project_mean([sum(of(*asked) for asked in bill) for bill in bills], seen)
        parts = zip(astuple(found), needed, strict=True)
        return Total(*(max(least, amount * part / seen) for amount, part in parts))

    def time(model: str) -> Total:
        # By tokens, for these are known of each answer: together they take as long as the answers did on average.
        told, limits = timing["models"][model], pipeline.models[model]
        weights = [usage.completion_tokens + 1 for bill in bills for name, usage in bill if name == model]
        per_weight = told["busy"]["total_s"] / told["answers_paid"] * len(weights) / max(1, sum(weights))
        spacing = 60 / (limits.requests_per_minute or inf) * told["requests"] / told["answers_paid"]
        per_token = 60 / (limits.tokens_per_minute or inf)
        spans: list[Callable[[Usage], float]] = [
            lambda usage: (usage.completion_tokens + 1) * per_weight / told["concurrency"],
            lambda usage: spacing,
            lambda usage: per_token * (usage.prompt_tokens + usage.completion_tokens),
        ]
        least = told["busy"]["total_s"] / told["requests"]  # a batch takes its time, however few are in it

        def seconds(span: Callable[[Usage], float]) -> Total:
            return total(lambda name, usage: span(usage) if name == model else 0.0, least)

        return max(map(seconds, spans), key=attrgetter("estimate"))

    times = {name: time(name) for name, told in timing["models"].items() if told["answers_paid"]}
    slowest = max(times or timing["models"], key=lambda name: times[name].estimate if times else 0)
    prices = {name: config.price for name, config in pipeline.models.items() if config.price is not None}
    asked = {name for bill in bills for name, _ in bill}
    telling = {name for bill in bills for name, usage in bill if usage != Usage() or pipeline.models[name].recorded}
    tell, priced = asked <= telling, asked <= prices.keys()
    return Estimate(
        samples=seen,
        drawn=len(drawn),
        concurrency=timing["models"][slowest]["concurrency"],
        prompt_tokens=total(lambda _, usage: usage.prompt_tokens) if tell else None,
        completion_tokens=total(lambda _, usage: usage.completion_tokens) if tell else None,
        accepted=Total(*(min(count, target) for count in astuple(project_share(accepted, len(drawn), seen)))),
        seconds=times.get(slowest),
        cost_usd=total(lambda name, usage: prices[name].cost(usage)) if tell and priced else None,
    )
