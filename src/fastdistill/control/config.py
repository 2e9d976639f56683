"""From YAML layers to a checked pipeline. Every error is found before anything is spent, and all are told at once.

Layers are merged in order (`--config`, `--config-env`, `--config-run`, then `--set`). A mapping laid over the list of
steps changes the steps it names: `steps: {TextGeneration: {num_generations: 4}}`. `!reset` takes away what is there, as
in Docker Compose: `null` is a value.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastdistill.control.registry import UnknownName, provider_class, step_class, suggest
from fastdistill.control.session import Pipeline
from fastdistill.core.errors import ConfigError
from fastdistill.core.step import Step
from fastdistill.model.provider import ModelConfig

Parsed = TypeVar("Parsed", bound=BaseModel)

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_NAME_AND_DEFAULT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-([^{]*))?")
_SECRET = {"api_key", "headers", "base_url"}  # a URL may have a password in it


def load_pipeline(layers: Sequence[Path], overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of some YAML files and `a.b=c` overrides.

    Raises:
        ConfigError: with every problem found, each with its path.
    """
    return parse_pipeline(load_layers(layers, overrides))


def load_layers(layers: Sequence[Path], overrides: Sequence[str] = (), base: Any = None) -> Any:
    """Some YAML files and `a.b=c` overrides, one laid on the other, the first on `base`.

    Raises:
        ConfigError: a file can't be read, or a layer changes a step that is not there.
    """
    merged = {} if base is None else base
    for path in layers:
        merged = merge(merged, read_yaml(path))
    for override in overrides:
        merged = merge(merged, nested_override(override))
    return merged


def parse_pipeline(config: object, environment: Mapping[str, str] = os.environ) -> Pipeline:
    """The pipeline that a parsed config describes.

    Raises:
        ConfigError: with every problem found, each with its path.
    """
    problems: list[str] = []
    try:
        config = interpolate(config, environment, problems)
    except RecursionError as error:
        raise ConfigError("the config holds an alias of itself, or is nested too deeply") from error
    if not isinstance(config, dict):
        raise ConfigError("the config must be a mapping with name, models and steps")
    models = _models(config.get("models", {}), problems)
    steps = _steps(config.get("steps"), problems)
    pipeline = _validated(Pipeline, config | {"models": models, "steps": steps}, "", problems)
    if problems or pipeline is None:
        # A model that could not be read is not also missing.
        unread = [f"{name!r} is not under models" for name in config.get("models") or () if name not in models]
        raise ConfigError([p for p in dict.fromkeys(problems) if not any(words in p for words in unread)])
    return pipeline


def read_yaml(path: Path) -> Any:
    """A YAML file, with duplicate keys refused.

    Raises:
        ConfigError: it is missing, not UTF-8, or not YAML; names file, line and column.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path.absolute()}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    try:
        return yaml.load(text, _Loader) or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings are merged, a mapping on a list changes its named items, all else replaces.

    What is reset stays as a mark, for a layer may be laid on a base that is merged later; `interpolate` leaves it out.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        if over.get("provider", base.get("provider")) != base.get("provider"):
            return deepcopy(over)  # another provider has other keys
        merged = {key: merge(value, over[key]) if key in over else deepcopy(value) for key, value in base.items()}
        return merged | {key: deepcopy(value) for key, value in over.items() if key not in base}
    if isinstance(base, list) and isinstance(over, dict):
        changed = list(base)
        for name, value in over.items():
            at = _place(changed, str(name))
            item = changed[at]
            body = item if str(name).isdecimal() else (item[name] if isinstance(item, dict) else None)
            new = merge({} if body is None else body, value)
            changed[at] = new if str(name).isdecimal() or new is Reset else {name: new}
        return [item for item in changed if item is not Reset]
    return deepcopy(over)


class Reset:
    """Stands where a layer has `!reset`."""


def interpolate(value: Any, environment: Mapping[str, str], problems: list[str], path: str = "") -> Any:
    """Replaces `${NAME}` and `${NAME:-default}` in every string; `$${` stands for `${`. Leaves out what is reset."""
    if isinstance(value, dict):
        return {
            key: interpolate(inner, environment, problems, _join(path, str(key)))
            for key, inner in value.items()
            if inner is not Reset
        }
    if isinstance(value, list):
        return [
            interpolate(inner, environment, problems, f"{path}[{at}]")
            for at, inner in enumerate(value)
            if inner is not Reset
        ]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replacement(match: "re.Match[str]") -> str:
        if match[1] is None:
            return "${"
        parts = _NAME_AND_DEFAULT.fullmatch(match[1]) if match[0].endswith("}") else None
        if parts is None:
            problems.append(f"{path}: {match[0]!r} is no variable; write ${{NAME}} or ${{NAME:-default}}")
            return ""
        name, default = parts.groups()
        found = environment.get(name) or default
        if found is None:
            state = "empty" if name in environment else "not set"
            problems.append(f"{path}: the environment variable {name} is {state}: set it, or use ${{{name}:-default}}")
            return ""
        return found

    return _VARIABLE.sub(replacement, value)


def describe(error: ValidationError, path: str, model: type[BaseModel]) -> list[str]:
    """One line for each problem of a validation error: its path, what is wrong, what was given."""
    problems = []
    for problem in error.errors():
        place = path
        for part in problem["loc"]:
            place = f"{place}[{part}]" if isinstance(part, int) else _join(place, str(part))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; {suggest(str(problem['loc'][-1]), _fields_at(model, problem['loc'][:-1]))}"
        elif problem["type"] == "missing":
            message = "required, but not given"
        elif _SECRET.isdisjoint(problem["loc"]) and isinstance(given := problem["input"], str | int | float | None):
            message = f"{message} (given: {given!r})"
        problems.append(f"{place}: {message}" if place else message)
    return problems


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names of the fields that a place within a model may have."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = [kind for kind in _parts(field.annotation) if hasattr(kind, "model_fields")] if field else []
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)


def _parts(annotation: Any) -> Iterator[Any]:
    """A type and all the types that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _models(given: Any, problems: list[str]) -> dict[str, ModelConfig]:
    if not isinstance(given, dict):
        problems.append("models: must be a mapping of names, like `teacher: {provider: ollama, model: ...}`")
        return {}
    models = {}
    for name, body in given.items():
        path = f"models.{name}"
        if isinstance(body, ModelConfig):
            models[name] = body
        elif not isinstance(body, dict) or not isinstance(body.get("provider"), str):
            problems.append(f"{path}.provider: required, for example ollama, openai or vllm")
        elif (kind := _known(provider_class, body["provider"], f"{path}.provider", problems)) and (
            parsed := _validated(kind.Config, body, path, problems)
        ):
            models[name] = parsed
    return models


def _steps(given: Any, problems: list[str]) -> list[Step]:
    if not isinstance(given, list) or not given:
        problems.append("steps: required; a list like `- LoadJsonl: {path: train.jsonl}`")
        return []
    steps = []
    for at, item in enumerate(given):
        entry = {item: None} if isinstance(item, str) else item
        if isinstance(item, Step):
            steps.append(item)
        elif not isinstance(entry, dict) or len(entry) != 1:
            problems.append(f"steps[{at}]: must be one step, like `- Deduplicate: {{}}`; check the indentation")
        else:
            ((name, body),) = entry.items()
            path = f"steps[{at}].{name}"
            kind = _known(step_class, str(name), f"steps[{at}]", problems)
            if kind and not isinstance(body, dict | None):
                problems.append(f"{path}: must be a mapping of the step's options")
            elif kind and (parsed := _validated(kind, body or {}, path, problems)):
                steps.append(parsed)
    return steps


def _known(find: Callable[[str], Any], name: str, path: str, problems: list[str]) -> Any:
    try:
        return find(name)
    except UnknownName as error:
        problems.append(f"{path}: {error}")
        return None


def _validated(kind: type[Parsed], body: dict[str, Any], path: str, problems: list[str]) -> Parsed | None:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problems += describe(error, path, kind)
        return None


def nested_override(override: str) -> Any:
    """`a.b=c` as the mapping that it stands for; the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip("."):
        raise ConfigError(f"--set {override}: write it as path=value, like models.teacher.model=llama3")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    for part in reversed(re.findall(r"[^.\[\]]+", path)):
        value = {part: value}
    return value


def _place(items: list[Any], name: str) -> int:
    """Where in a list the item called `name` is: by number, or by a step's name."""
    if name.isdecimal() and int(name) < len(items):
        return int(name)
    named = [at for at, item in enumerate(items) if item == name or (isinstance(item, dict) and name in item)]
    if len(named) == 1:
        return named[0]
    known = [str(item if isinstance(item, str) else next(iter(item), "")) for item in items]
    many = "is there several times: use its number instead" if named else f"is not there; {suggest(name, known)}"
    raise ConfigError(f"steps.{name}: {many}")


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, instead of silently taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor` is not a key; what stands beside it wins over what it brings
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool):
                if key in seen:
                    problem = f"the key {key!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("!reset", lambda *_: Reset)
