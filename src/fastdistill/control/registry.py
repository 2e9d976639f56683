"""Names that a config may use, and where their classes live. Classes are imported when they are named, not before.

A third party adds a step or a provider with an entry point of the group `fastdistill.steps` or
`fastdistill.providers`, named as in the config and pointing at the class.
"""

from importlib import import_module
from typing import Any

STEPS = {
    "LoadJsonl": "fastdistill.data.load",
    "CanonicalizeFields": "fastdistill.data.prepare",
    "Deduplicate": "fastdistill.data.prepare",
    "Shard": "fastdistill.data.prepare",
    "NearDuplicates": "fastdistill.data.near_duplicates",
    "Decontaminate": "fastdistill.data.decontaminate",
    "TextGeneration": "fastdistill.data.generate",
    "CleanSqlOutput": "fastdistill.data.parse",
    "CleanPythonOutput": "fastdistill.data.parse_python",
    "RuleFilter": "fastdistill.data.rules",
    "SQLiteExecEval": "fastdistill.data.execution.sqlite",
    "PythonExecEval": "fastdistill.data.execution.python",
    "SplitRationale": "fastdistill.data.rationale",
    "MajorityVote": "fastdistill.data.vote",
    "MathExecEval": "fastdistill.data.execution.math",
    "LLMJudge": "fastdistill.data.judge",
    "ScoreFromJudge": "fastdistill.data.judge",
    "PairwiseJudge": "fastdistill.data.judge",
    "ScoreFromExecEval": "fastdistill.data.select",
    "SelectBest": "fastdistill.data.select",
    "ExportSFT": "fastdistill.data.export.sft",
    "ExportHardCases": "fastdistill.data.export.hard",
    "ScoreTokens": "fastdistill.data.score_tokens",
    "ExportLogprobs": "fastdistill.data.export.logprobs",
    "ExportPreference": "fastdistill.data.export.preference",
}

PROVIDERS = {
    "openai": "fastdistill.model.providers.openai:OpenAIProvider",
    "openrouter": "fastdistill.model.providers.openai:OpenAIProvider",
    "vllm": "fastdistill.model.providers.openai:OpenAIProvider",
    "sglang": "fastdistill.model.providers.openai:OpenAIProvider",
    "ollama": "fastdistill.model.providers.ollama:OllamaProvider",
    "litellm": "fastdistill.model.providers.litellm:LiteLLMProvider",
    "embedded": "fastdistill.model.providers.embedded:EmbeddedProvider",
    "replay": "fastdistill.model.providers.replay:ReplayProvider",
}


class UnknownName(ValueError):
    """The message suggests the nearest known name."""


def step_class(name: str) -> Any:
    """The class of a step. Raises UnknownName if no step has this name."""
    return _load("fastdistill.steps", name, STEPS)


def provider_class(kind: str) -> Any:
    """The class of a provider. Raises UnknownName if no provider has this name."""
    return _load("fastdistill.providers", kind, PROVIDERS)


def suggest(name: str, known: list[str]) -> str:
    """`did you mean ...?`, or the known names if none is near."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known are: {', '.join(sorted(known))}"


def _load(group: str, name: str, builtin: dict[str, str]) -> Any:
    if name in builtin:
        module, _, attribute = builtin[name].partition(":")
        return getattr(import_module(module), attribute or name)
    from importlib.metadata import entry_points

    third_party = {point.name: point for point in entry_points(group=group)}
    if name in third_party:
        return third_party[name].load()
    raise UnknownName(f"{name} is not known; {suggest(name, [*builtin, *third_party])}")
