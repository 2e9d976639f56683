"""Examines what a pipeline stands on: each model's endpoint, and this machine."""

import asyncio
import platform
import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import fields
from itertools import starmap
from pathlib import Path
from typing import Any

from fastdistill.control.folder import artifacts_root
from fastdistill.control.registry import provider_class
from fastdistill.control.session import Pipeline
from fastdistill.control.terminal import say
from fastdistill.core.types import Prompt
from fastdistill.data.execution.python import PythonExecEval
from fastdistill.data.execution.sandbox import available_isolation
from fastdistill.model.provider import Capabilities, ModelConfig, Provider, ProviderError


def examine(pipeline: Pipeline, output_dir: Path | None) -> bool:
    """Prints what was found; whether every endpoint can be used."""
    root = artifacts_root(output_dir).absolute()
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    say(f"machine: {versions}, {free:.1f} GiB free at {existing}")
    if any(isinstance(step, PythonExecEval) for step in pipeline.steps):
        say(f"python sandbox: {available_isolation()}")
    endpoints = [(name, config) for name, model in pipeline.models.items() for config in model.endpoints()]
    profiles = (
        (name, getattr(step, "decode_profile", None)) for step in reversed(pipeline.steps) for name in step.models()
    )
    like = {name: Prompt("", "", (), profile.each[0].parameters()) for name, profile in profiles if profile}
    found = asyncio.run(_probe_all((config, like.get(name)) for name, config in endpoints))
    for (name, config), result in zip(endpoints, found, strict=True):
        if isinstance(result, ProviderError):
            say(f"{name}: {config.model}: can't be used: {result}", "red")
        else:
            say(f"{name}: {config.model}: ready", "green")
            for field in fields(result):
                say(f"  {field.name.replace('_', ' ')}: {_words(getattr(result, field.name))}")
    return not any(isinstance(result, ProviderError) for result in found)


async def _probe_all(models: Iterable[tuple[ModelConfig, Prompt | None]]) -> list[Capabilities | ProviderError]:
    return await asyncio.gather(*starmap(_probe, models))


async def _probe(config: ModelConfig, like: Prompt | None) -> Capabilities | ProviderError:
    provider: Provider = provider_class(config.provider)(config)
    try:
        return await provider.probe(like)
    except ProviderError as error:
        return error
    finally:
        await provider.aclose()


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return "; ".join(map(str, value[:10])) + (f" and {len(value) - 10} more" if len(value) > 10 else "")
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "not known"}[value]
    return str(value)
