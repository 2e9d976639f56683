"""Evaluates a served model on a fixed set of records, under the gates of a pipeline. Nothing is selected or exported.

An evaluation is a run: its answers are stored, its ledger has every verdict, and it can be compared and explained.
"""

from pathlib import Path
from typing import Any

from fastdistill.control.config import merge, parse_model, validated
from fastdistill.control.session import Origin, Pipeline
from fastdistill.core.errors import ConfigError
from fastdistill.core.step import SampleStep
from fastdistill.data.generate import TextGeneration
from fastdistill.data.load import LoadJsonl
from fastdistill.data.prepare import CanonicalizeFields


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
    generations = [step for step in pipeline.steps if isinstance(step, TextGeneration)]
    if len(generations) != 1:
        raise ConfigError(f"{pipeline.name}: one TextGeneration is evaluated, this has {len(generations)}")
    (asking,) = generations
    if role not in pipeline.models and "model" not in changes:
        raise ConfigError(f"models: there is no {role!r}; add it to the config, or name the model with --model")
    base = pipeline.models.get(role) or pipeline.models[asking.models()[-1]]
    # Its key and its headers are for its own server alone.
    before = base.model_dump() if "base_url" in changes else dict(base)
    model = parse_model(merge(before, changes), f"models.{role}")
    kept = [step for step in pipeline.steps if isinstance(step, CanonicalizeFields | SampleStep)]
    judges = {name: pipeline.models[name] for step in kept if step is not asking for name in step.models()}
    if changes and role in judges:
        raise ConfigError(f"--role {role}: its model judges here, and that must not change; choose another role")
    # Made anew, not copied: a copy would keep the fingerprint.
    alike = {"model": role, "teachers": (), "until": None, "num_generations": draws}
    evaluated = validated(TextGeneration, asking.model_dump() | alike, asking.name)
    load = validated(LoadJsonl, {"path": data, "limit": limit}, "--data")
    config = {
        "name": f"{pipeline.name}-eval-{role}"[:64],
        "models": {**judges, role: model},
        "steps": [load, *(evaluated if step is asking else step for step in kept)],
        "budget": pipeline.budget,
        "max_error_rate": pipeline.max_error_rate,
        "lineage": Origin(role=role),
    }
    return validated(Pipeline, config, f"evaluation of {role}")
