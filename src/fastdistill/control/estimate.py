"""What a run would cost, before it is paid for: a random few of its samples go through teacher and gates.

The answers are stored like any others, so the run itself will not pay for them again.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import PrivateAttr

from fastdistill.control.folder import RunFolder, artifacts_root
from fastdistill.control.session import Pipeline, execute, run_in_loop, unwatched
from fastdistill.core.errors import InputError
from fastdistill.core.stats import Total, project_mean, project_share
from fastdistill.core.step import Context, SampleStep, StreamStep
from fastdistill.core.types import Sample
from fastdistill.model.provider import Price


class RandomSamples(StreamStep):
    """Lets `n` samples through, drawn at random but always the same ones: those whose ids hash lowest."""

    n: int

    _seen: int = PrivateAttr(0)

    @property
    def seen(self) -> int:
        """How many samples there were to draw from."""
        return self._seen

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        drawn: list[tuple[int, int, Sample]] = []
        for sample in samples:
            self._seen += 1
            lowest = -int.from_bytes(sha256(f"estimate {sample.sample_id}".encode()).digest())
            heapq.heappush(drawn, (lowest, sample.index, sample))
            if len(drawn) > self.n:
                heapq.heappop(drawn)
        yield from sorted((sample for _, _, sample in drawn), key=lambda sample: sample.index)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Projections for all samples, with 95% intervals.

    `seconds` supposes that requests go on to take as long, with `concurrency` in flight; None if every answer was
    stored already. `cost_usd` is None without prices.
    """

    samples: int
    drawn: int
    concurrency: int
    prompt_tokens: Total
    completion_tokens: Total
    accepted: Total
    seconds: Total | None
    cost_usd: Total | None


def shortened(pipeline: Pipeline, few: StreamStep) -> Pipeline:
    """The pipeline with `few` samples only, up to its last step that works on samples."""
    at = [place for place, step in enumerate(pipeline.steps) if isinstance(step, SampleStep)]
    first, end = (at[0], at[-1] + 1) if at else (len(pipeline.steps),) * 2
    steps = (*pipeline.steps[:first], few, *pipeline.steps[first:end])
    return Pipeline(name=pipeline.name, models=pipeline.models, steps=steps, max_error_rate=1)


def run_shortened(pipeline: Pipeline, few: StreamStep, output_dir: Path | None) -> tuple[list[Sample], dict[str, Any]]:
    """Runs a few samples, with the shared response store and no run folder; the samples and the timing report."""
    root = artifacts_root(output_dir)
    with TemporaryDirectory(prefix="fastdistill-") as scratch:
        folder = RunFolder(root, "preview", Path(scratch) / "run")
        result = run_in_loop(execute(shortened(pipeline, few), folder, unwatched))
        return list(folder.samples()), dict(result.timing)


def estimate(pipeline: Pipeline, output_dir: Path | None, n: int) -> Estimate:
    """Raises InputError if there are no two samples to draw."""
    few = RandomSamples(n=n, name="draw")
    samples, timing = run_shortened(pipeline, few, output_dir)
    drawn = [sample for sample in samples if sample.candidates]
    if len(drawn) < 2:
        raise InputError("an estimate needs two samples at least that a teacher answered")
    models = timing["models"].values()
    concurrency = sum(model["concurrency"] for model in models)
    answers = sum(model["answers_paid"] for model in models)
    busy = sum(model["busy"]["total_s"] for model in models)
    prices = {config.model: config.price for config in pipeline.models.values()}
    # Time goes by tokens: a sample takes its share of the busy time that an answer took on average.
    tokens = [_tokens(sample, "completion_tokens") for sample in drawn]
    per_token = busy / max(1, answers) * sum(len(sample.candidates) for sample in drawn) / max(1.0, sum(tokens))
    return Estimate(
        samples=few.seen,
        drawn=len(drawn),
        concurrency=concurrency,
        prompt_tokens=project_mean([_tokens(sample, "prompt_tokens") for sample in drawn], few.seen),
        completion_tokens=project_mean(tokens, few.seen),
        accepted=project_share(sum(bool(sample.accepted) for sample in drawn), len(drawn), few.seen),
        seconds=project_mean([count * per_token / concurrency for count in tokens], few.seen) if answers else None,
        cost_usd=None if None in prices.values() else project_mean([_cost(s, prices) for s in drawn], few.seen),
    )


def _tokens(sample: Sample, kind: str) -> float:
    return float(sum(getattr(candidate.completion.usage, kind) for candidate in sample.candidates))


def _cost(sample: Sample, prices: Mapping[str, Price | None]) -> float:
    asked = [(prices.get(candidate.prompt.model), candidate.completion.usage) for candidate in sample.candidates]
    return sum(price.cost(usage) for price, usage in asked if price is not None)
