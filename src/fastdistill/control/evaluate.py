"""Evaluates a served model on a fixed set of records, under the gates of a pipeline. Nothing is selected or exported.

An evaluation is a run: its answers are stored, its ledger has every verdict, and it can be compared and explained.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdistill.control.config import merge, parse_model
from fastdistill.control.session import Origin, Pipeline
from fastdistill.core.errors import ConfigError
from fastdistill.core.step import SampleStep, Step
from fastdistill.data.generate import TextGeneration
from fastdistill.data.load import LoadJsonl
from fastdistill.data.prepare import CanonicalizeFields
from fastdistill.model.provider import ModelConfig


def evaluation(
    pipeline: Pipeline, data: Path, *, role: str, changes: dict[str, Any], draws: int, limit: int | None = None
) -> Pipeline:
    """A pipeline's generation and gates, over other records and with another model.

    Every record is asked `draws` times: waves, races, ladders of teachers, targets and floors would make what is
    measured depend on the answers.

    Args:
        data: the records to evaluate on.
        role: a name under `models:`; one that is not there begins as the teacher.
        changes: fields of that model's config that are others, like `model` and `base_url`.

    Raises:
        ConfigError: nothing in the pipeline asks for candidates, or the model's config is wrong.
    """
    asked = [step for step in pipeline.steps if isinstance(step, TextGeneration)]
    if len(asked) != 1:
        raise ConfigError(f"{pipeline.name}: one TextGeneration is evaluated, this has {len(asked)}")
    model = _model(pipeline, role, asked[0].models()[-1], changes)
    judges = {name: pipeline.models[name] for s in pipeline.steps if s is not asked[0] for name in s.models()}
    try:
        return Pipeline(
            name=f"{pipeline.name}-eval-{role}"[:64],
            models={**judges, role: model},
            steps=tuple(_steps(pipeline.steps, data, role, draws, limit)),
            budget=pipeline.budget,
            max_error_rate=pipeline.max_error_rate,
            lineage=Origin(role=role),
        )
    except ValueError as error:
        raise ConfigError(f"evaluation of {role}: {error}") from error


def _steps(steps: Sequence[Step], data: Path, role: str, draws: int, limit: int | None) -> Iterator[Step]:
    yield LoadJsonl(path=data, limit=limit)
    for step in steps:
        if isinstance(step, TextGeneration):
            # Made anew, not copied: a copy would keep the fingerprint.
            yield TextGeneration.model_validate(
                step.model_dump() | {"model": role, "teachers": (), "until": None, "num_generations": draws}
            )
        elif isinstance(step, CanonicalizeFields | SampleStep):
            yield step


def _model(pipeline: Pipeline, role: str, teacher: str, changes: dict[str, Any]) -> ModelConfig:
    if role not in pipeline.models and "model" not in changes:
        raise ConfigError(f"models: there is no {role!r}; add it to the config, or name the model with --model")
    base = pipeline.models.get(role) or pipeline.models[teacher]
    # Its key and its headers are for its own server alone.
    before = base.model_dump() if "base_url" in changes else dict(base)
    return parse_model(merge(before, changes), f"models.{role}")
