"""Text-to-SQL from Python, driven by the environment.

    FASTDISTILL_PROVIDER=ollama OLLAMA_MODEL=llama3.1:8b OLLAMA_HOST=http://localhost:11434 OLLAMA_TIMEOUT=240 \
    FASTDISTILL_DATA_PATH=~/.cache/fastdistill/datasets/wikisql/wikisql_1k/train.jsonl \
    FASTDISTILL_DB_PATH=~/.cache/fastdistill/datasets/wikisql/wikisql_1k/train.db \
    python examples/fastdistill/fastdistill_pipeline.py

FASTDISTILL_PROVIDER is ollama (the default), openai, openrouter, vllm, sglang or embedded. Each takes its model from
<PROVIDER>_MODEL, its address and key from its usual variables (OPENAI_BASE_URL, OPENAI_API_KEY, OPENROUTER_API_KEY,
VLLM_BASE_URL, SGLANG_BASE_URL, OLLAMA_HOST), and its time limit in seconds from <PROVIDER>_TIMEOUT.
FASTDISTILL_NUM_GENERATIONS (4) and FASTDISTILL_LIMIT (all records) size the run.
"""

import os
import sys

from rich.console import Console

from fastdistill import (
    CanonicalizeFields,
    CleanSqlOutput,
    DecodeProfile,
    Deduplicate,
    ExportSFT,
    FatalError,
    LoadJsonl,
    Pipeline,
    RuleFilter,
    ScoreFromExecEval,
    SelectBest,
    SQLiteExecEval,
    TextGeneration,
)
from fastdistill.control.progress import live, summary

WIKISQL = "~/.cache/fastdistill/datasets/wikisql/wikisql_1k"


def teacher() -> dict[str, str]:
    """The teacher's configuration, from the environment."""
    provider = os.environ.get("FASTDISTILL_PROVIDER", "ollama")
    prefix = provider.upper()
    model = os.environ.get(f"{prefix}_MODEL") or ("text2sql" if provider == "embedded" else None)
    if model is None:
        sys.exit(f"error: set {prefix}_MODEL to the name of the teacher model")
    config = {"provider": provider, "model": model}
    if timeout := os.environ.get(f"{prefix}_TIMEOUT"):
        config["timeout"] = timeout
    return config


def pipeline() -> Pipeline:
    limit = os.environ.get("FASTDISTILL_LIMIT")
    return Pipeline(
        name="text2sql",
        models={"teacher": teacher()},
        steps=[
            LoadJsonl(
                path=os.environ.get("FASTDISTILL_DATA_PATH", f"{WIKISQL}/train.jsonl"),
                limit=int(limit) if limit else None,
            ),
            CanonicalizeFields(fields=["schema", "instruction"]),
            Deduplicate(),
            TextGeneration(
                model="teacher",
                num_generations=int(os.environ.get("FASTDISTILL_NUM_GENERATIONS", "4")),
                decode_profile=DecodeProfile(temperature=0.8, max_tokens=256),
                system_prompt="Return SQL only.",
                template="Schema: {{ schema }}\nQuestion: {{ instruction }}\nSQL:",
            ),
            CleanSqlOutput(),
            RuleFilter(min_chars=1, max_chars=2000, sql=True),
            SQLiteExecEval(db_path=os.environ.get("FASTDISTILL_DB_PATH", f"{WIKISQL}/train.db")),
            ScoreFromExecEval(),
            SelectBest(k=1),
            ExportSFT(),
        ],
    )


if __name__ == "__main__":
    try:
        result = pipeline().run(watch=live)
    except FatalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    summary(result, Console())
    sys.exit(result.exit_code)
