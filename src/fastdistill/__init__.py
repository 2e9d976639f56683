"""FastDistill: turn a teacher LLM into training data that can be proved.

The public names are imported when they are first used, so that `import fastdistill` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdistill.control.registry import STEPS

if TYPE_CHECKING:
    from fastdistill.control.config import load_pipeline as load_pipeline
    from fastdistill.control.session import Pipeline as Pipeline
    from fastdistill.control.session import RunResult as RunResult
    from fastdistill.core.decode import DecodeProfile as DecodeProfile
    from fastdistill.core.errors import FatalError as FatalError
    from fastdistill.core.errors import SampleError as SampleError
    from fastdistill.core.step import Gate as Gate
    from fastdistill.core.step import SampleStep as SampleStep
    from fastdistill.core.step import StreamStep as StreamStep
    from fastdistill.data.decontaminate import Decontaminate as Decontaminate
    from fastdistill.data.execution.math import MathExecEval as MathExecEval
    from fastdistill.data.execution.python import PythonExecEval as PythonExecEval
    from fastdistill.data.execution.sqlite import SQLiteExecEval as SQLiteExecEval
    from fastdistill.data.export.hard import ExportHardCases as ExportHardCases
    from fastdistill.data.export.logprobs import ExportLogprobs as ExportLogprobs
    from fastdistill.data.export.preference import ExportPreference as ExportPreference
    from fastdistill.data.export.sft import ExportSFT as ExportSFT
    from fastdistill.data.generate import TextGeneration as TextGeneration
    from fastdistill.data.judge import LLMJudge as LLMJudge
    from fastdistill.data.judge import PairwiseJudge as PairwiseJudge
    from fastdistill.data.judge import ScoreFromJudge as ScoreFromJudge
    from fastdistill.data.load import LoadJsonl as LoadJsonl
    from fastdistill.data.near_duplicates import NearDuplicates as NearDuplicates
    from fastdistill.data.parse import CleanSqlOutput as CleanSqlOutput
    from fastdistill.data.parse_python import CleanPythonOutput as CleanPythonOutput
    from fastdistill.data.prepare import CanonicalizeFields as CanonicalizeFields
    from fastdistill.data.prepare import Deduplicate as Deduplicate
    from fastdistill.data.prepare import Shard as Shard
    from fastdistill.data.rationale import SplitRationale as SplitRationale
    from fastdistill.data.rules import RuleFilter as RuleFilter
    from fastdistill.data.score_tokens import ScoreTokens as ScoreTokens
    from fastdistill.data.select import ScoreFromExecEval as ScoreFromExecEval
    from fastdistill.data.select import SelectBest as SelectBest
    from fastdistill.data.vote import MajorityVote as MajorityVote

_HOMES = STEPS | {
    "Pipeline": "fastdistill.control.session",
    "RunResult": "fastdistill.control.session",
    "load_pipeline": "fastdistill.control.config",
    "DecodeProfile": "fastdistill.core.decode",
    "FatalError": "fastdistill.core.errors",
    "SampleError": "fastdistill.core.errors",
    "Gate": "fastdistill.core.step",
    "SampleStep": "fastdistill.core.step",
    "StreamStep": "fastdistill.core.step",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        return getattr(import_module(home), name)
    raise AttributeError(f"module 'fastdistill' has no attribute {name!r}")
