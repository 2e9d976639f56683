"""From YAML layers to a checked pipeline. Every error is found before anything is spent, and all are told at once.

Layers are merged in order (`--config`, `--config-env`, `--config-run`, then `--set`). A mapping laid over the list of
steps changes the steps it names: `steps: {TextGeneration: {num_generations: 4}}`. `!reset` takes away what is there, as
in Docker Compose: `null` is a value.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastdistill.control.registry import UnknownName, provider_class, step_class, suggest
from fastdistill.control.session import Pipeline
from fastdistill.core.errors import ConfigError
from fastdistill.core.step import Step
from fastdistill.model.provider import ModelConfig, Price

Parsed = TypeVar("Parsed", bound=BaseModel)

_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}|[^}]*\}?)")
_SECRET = {"api_key", "headers", "base_url"}  # a URL may have a password in it
_WORDS = {  # those of YAML in place of Python's
    "tuple_type": "must be a list, like [a, b]",
    "dict_type": "must be a mapping, like {a: b}",
    "model_type": "must be a mapping, like {a: b}",
    "too_short": "is empty",
}


def load_pipeline(layers: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline of one YAML file or several, and of `a.b=c` overrides.

    Raises as `load_layers` and `parse_pipeline` do.
    """
    return parse_pipeline(load_layers([layers] if isinstance(layers, str | Path) else layers, overrides))


def load_layers(layers: Sequence[str | Path], overrides: Sequence[str] = (), base: Any = None) -> Any:
    """Some YAML files and `a.b=c` overrides, one laid on the other, the first on `base`.

    Raises ConfigError if a file can't be read, or a layer changes a step that is not there.
    """
    return reduce(merge, [*map(read_yaml, layers), *map(nested_override, overrides)], base or {})


def parse_pipeline(config: object, environment: Mapping[str, str] = os.environ) -> Pipeline:
    """The pipeline that a parsed config describes. Raises ConfigError with every problem found, each with its path."""
    problems: list[str] = []
    try:
        config = interpolate(config, environment, problems)
    except RecursionError as error:
        raise ConfigError("the config holds an alias of itself, or is nested too deeply") from error
    if not isinstance(config, dict):
        raise ConfigError("the config must be a mapping with name, models and steps")
    models, steps = config.get("models", {}), config.get("steps")
    if not isinstance(models, dict):
        problems.append("models: must be a mapping of names, like `teacher: {provider: ollama, model: ...}`")
        models = {}
    if not isinstance(steps, list) or not steps:
        problems.append("steps: required; a list like `- LoadJsonl: {path: train.jsonl}`")
        steps = []
    # A bare one stands for what could not be read, so that all else is checked where it stands.
    bare = ModelConfig(provider="unread", model="unread", price=Price())
    parts = {
        "models": {name: _read(parse_model, body, f"models.{name}", problems) or bare for name, body in models.items()},
        "steps": [
            _read(_step, item, f"steps[{at}]", problems) or Step(name=_kind(item)) for at, item in enumerate(steps)
        ]
        or [Step()],
    }
    pipeline = _read(partial(validated, Pipeline), config | parts, "", problems)
    if pipeline is None or problems:
        raise ConfigError(problems)
    return pipeline


def parse_model(config: object, path: str) -> ModelConfig:
    """The model that a config has at `path`. Raises ConfigError with every problem found."""
    if not isinstance(config, dict) or not isinstance(config.get("provider"), str):
        raise ConfigError(f"{path}.provider: required, for example ollama, openai or vllm")
    try:
        kind: type[ModelConfig] = provider_class(config["provider"]).Config
    except UnknownName as error:
        raise ConfigError(f"{path}.provider: {error}") from error
    return validated(kind, config, path)


def read_yaml(given: str | Path) -> Any:
    """A YAML file, with duplicate keys refused.

    Raises:
        ConfigError: it is missing, not UTF-8, or not YAML; names file, line and column.
    """
    path = Path(given)
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path.absolute()}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return _yaml(text, str(path)) or {}


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{source}{place}: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}") from error


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
            item = {changed[at]: {}} if isinstance(changed[at], str) else changed[at]
            changed[at] = merge(item, value if value is Reset or str(name).isdecimal() else {name: value})
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
        if match[0] == "$${":
            return "${"
        name, default = match.groups()
        if name is None:
            problems.append(f"{path}: {match[0]!r} is no variable; write ${{NAME}} or ${{NAME:-default}}")
            return match[0]
        found = environment.get(name) or default
        if found is None:
            state = "empty" if name in environment else "not set"
            problems.append(f"{path}: the environment variable {name} is {state}: set it, or use ${{{name}:-default}}")
        return match[0] if found is None else found

    return _VARIABLE.sub(replacement, value)


def _step(config: object, path: str) -> Step:
    entry = {config: None} if isinstance(config, str) else config
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"{path}: must be one step, like `- Deduplicate: {{}}`; check the indentation")
    ((name, body),) = entry.items()
    try:
        kind: type[Step] = step_class(str(name))
    except UnknownName as error:
        raise ConfigError(f"{path}: {error}") from error
    return validated(kind, {} if body is None else body, f"{path}.{name}")


def _read(parse: Callable[[object, str], Parsed], config: object, path: str, problems: list[str]) -> Parsed | None:
    try:
        return parse(config, path)
    except ConfigError as error:
        problems += error.problems
        return None


def validated(kind: type[Parsed], config: object, path: str) -> Parsed:
    """Raises ConfigError with every problem found, each with its path, which begins with `path`."""
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        raise ConfigError([*_described(error, path, kind)]) from error


def _described(error: ValidationError, path: str, model: type[BaseModel]) -> Iterator[str]:
    """One line for each problem of a validation error: its path, what is wrong, what was given."""
    for problem in error.errors():
        place = path
        for part in problem["loc"]:
            if "[" in str(part) or part in ("str", "int", "float", "bool"):
                continue  # which type of a union was tried
            place = f"{place}[{part}]" if isinstance(part, int) else _join(place, str(part))
        message = _WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; {suggest(str(problem['loc'][-1]), _fields_at(model, problem['loc'][:-1]))}"
        elif problem["type"] == "missing":
            message = "required, but not given"
        elif _SECRET.isdisjoint(problem["loc"]) and isinstance(given := problem["input"], str | int | float | None):
            message = f"{message} (given: {given!r})"
        for line in message.splitlines():
            yield f"{place}: {line}" if place else line


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names of the fields that a place within a model may have."""
    for part in path:
        field = model.model_fields.get(str(part))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), model)
    return list(model.model_fields)


def nested_override(override: str) -> Any:
    """`a.b=c` as the mapping that it stands for; the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip("."):
        raise ConfigError(f"--set {override}: write it as path=value, like models.teacher.model=llama3")
    value = _yaml(text, f"--set {override}: the value is not YAML")
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
    known = [_kind(item) for item in items]
    many = "is there several times: use its number instead" if named else f"is not there; {suggest(name, known)}"
    raise ConfigError(f"steps.{name}: {many}")


def _kind(item: object) -> str:
    """Which step an item of the list names."""
    return str(next(iter(item), "") if isinstance(item, dict) else item)


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, instead of silently taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor` is not a key; what stands beside it wins over what it brings
            key = self.construct_object(key_node, deep=True)
            is_mapping = isinstance(key, dict)
            if is_mapping or key in seen:
                problem = "a template, {{ ... }}, needs quotes" if is_mapping else f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("!reset", lambda *_: Reset)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)  # no option is a date
