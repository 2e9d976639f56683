"""Examines what a pipeline stands on: each model's endpoint, and this machine."""

import asyncio
import platform
import shutil
import sqlite3
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from fastdistill.control.folder import artifacts_root
from fastdistill.control.registry import provider_class
from fastdistill.control.session import Pipeline
from fastdistill.data.execution.python import PythonExecEval
from fastdistill.data.execution.sandbox import available_isolation
from fastdistill.model.provider import Capabilities, ModelConfig, Provider, ProviderError

_WORDS = {True: "yes", False: "no", None: "not known"}


def examine(pipeline: Pipeline, output_dir: Path | None) -> bool:
    """Prints what was found; whether every endpoint can be used."""
    console = Console()
    root = artifacts_root(output_dir)
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    console.print(
        f"machine: Python {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
        f" {free:.1f} GiB free at {existing}",
        markup=False,
        soft_wrap=True,
    )
    if any(isinstance(step, PythonExecEval) for step in pipeline.steps):
        console.print(f"python sandbox: {available_isolation()}", markup=False, soft_wrap=True)
    found = asyncio.run(_probe_all(pipeline.models))
    for name, result in found.items():
        config = pipeline.models[name]
        if isinstance(result, ProviderError):
            console.print(f"{name}: {config.model}: can't be used: {result}", style="red", markup=False, soft_wrap=True)
        else:
            console.print(f"{name}: {config.model}: ready", style="green", markup=False, soft_wrap=True)
            _print(console, result)
    return not any(isinstance(result, ProviderError) for result in found.values())


async def _probe_all(models: dict[str, ModelConfig]) -> dict[str, Capabilities | ProviderError]:
    results = await asyncio.gather(*(_probe(config) for config in models.values()))
    return dict(zip(models, results, strict=True))


async def _probe(config: ModelConfig) -> Capabilities | ProviderError:
    provider: Provider = provider_class(config.provider)(config)
    try:
        return await provider.probe()
    except ProviderError as error:
        return error
    finally:
        await provider.aclose()


def _print(console: Console, found: Capabilities) -> None:
    for field in fields(found):
        value = getattr(found, field.name)
        if field.name == "models":
            value = ", ".join(value[:10]) + (f" and {len(value) - 10} more" if len(value) > 10 else "")
        elif field.name == "notes":
            value = "; ".join(value)
        elif value is None or isinstance(value, bool):
            value = _WORDS[value]
        console.print(f"  {field.name.replace('_', ' ')}: {value}", markup=False, soft_wrap=True)
