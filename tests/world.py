"""A small text-to-SQL world for end-to-end tests: records, a database, and what a teacher may answer."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from fastdistill.control.store import ResponseStore

SCHEMA = "CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT, country TEXT, people INTEGER)"
COUNTRIES = ("Italy", "Norway", "Japan", "Chile", "Kenya")
CITIES = [(n, f"city{n}", COUNTRIES[n % 5], 1000 * (n * 37 % 101)) for n in range(1, 41)]


def _record(number: int) -> dict[str, Any]:
    country, limit = COUNTRIES[number % 5], 1000 * (number * 13 % 90)
    return {
        "task_id": f"city-{number:04}",
        "schema": SCHEMA,
        "instruction": f"Which cities of {country} have more than {limit} people?",
        "gold_sql": f"SELECT name FROM city WHERE country = '{country}' AND people > {limit}",
        "db_id": "city",
    }


RECORDS = [_record(number) for number in range(60)]

ANSWERS = {
    record["instruction"]: [
        record["gold_sql"],
        f"```sql\n{record['gold_sql']};\n```\nThis lists the cities.",
        "SELECT name FROM city",
        "SELECT nme FROM city",
        "I do not know.",
        "DROP TABLE city",
    ]
    for record in RECORDS
}
"""Two right answers in six, one that runs and is wrong, three that can't run."""


def write_records(folder: Path, records: Sequence[dict[str, Any]] = RECORDS, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def make_database(folder: Path) -> Path:
    path = folder / "city.db"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(SCHEMA)
        connection.executemany("INSERT INTO city VALUES (?, ?, ?, ?)", CITIES)
    connection.close()
    return path


def config(url: str, records: Path, database: Path, *, provider: str = "vllm", **generation: Any) -> dict[str, Any]:
    """The whole pipeline over this world, as a parsed config."""
    return {
        "name": "cities",
        "models": {"teacher": {"provider": provider, "model": "teacher", "base_url": url, "max_concurrency": 8}},
        "steps": [
            {"LoadJsonl": {"path": str(records)}},
            {"CanonicalizeFields": {"fields": ["schema", "instruction"]}},
            {"Deduplicate": {}},
            {
                "TextGeneration": {
                    "num_generations": 3,
                    "system_prompt": "Return SQL only.",
                    "template": "Schema: {{ schema }}\nQuestion: {{ instruction }}\nSQL:",
                    **generation,
                }
            },
            {"CleanSqlOutput": {}},
            {"RuleFilter": {"max_chars": 500, "sql": True}},
            {"SQLiteExecEval": {"db_path": str(database)}},
            {"ScoreFromExecEval": {}},
            {"SelectBest": {"k": 1}},
            {"ExportSFT": {}},
        ],
    }


def pipeline_config(folder: Path, url: str, records: Path, database: Path, **generation: Any) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config(url, records, database, **generation)))
    return path


async def holds(store: ResponseStore, answers: int) -> bool:
    """Whether so many come to be in the store's file, and no more."""
    for _ in range(1000):
        with closing(sqlite3.connect(store.path)) as connection:
            (found,) = connection.execute("SELECT count(*) FROM responses").fetchone()
        if found >= answers:
            return bool(found == answers)
        await asyncio.sleep(0.005)
    return False
