"""What is distilled in the benchmarks: questions about one table, each a request of about 1.1 KB, and a pipeline."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.teacher import MODEL

COUNTRIES = ("Italy", "Norway", "Japan", "Chile", "Kenya")
_COLUMNS = (
    *("region TEXT", "founded INTEGER", "area_km2 REAL", "elevation_m REAL", "latitude REAL", "longitude REAL"),
    *("capital INTEGER", "mayor TEXT", "airport_code TEXT", "station_count INTEGER", "park_count INTEGER"),
    *("university_count INTEGER", "museum_count INTEGER", "hospital_count INTEGER", "average_income REAL"),
    *("unemployment_rate REAL", "rainfall_mm REAL", "sunshine_hours REAL", "twin_city TEXT", "website TEXT"),
    *("postal_code TEXT", "time_zone TEXT", "dialing_code TEXT", "school_count INTEGER", "library_count INTEGER"),
)
SCHEMA = "CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT, country TEXT, people INTEGER, {})".format(
    ", ".join(_COLUMNS)
)
SYSTEM = (
    "You write SQLite queries. Return one SELECT statement that answers the question about the schema below, in a"
    " fenced block, and one sentence about it. Use only the tables and columns that are there."
)
TEMPLATE = "Schema:\n{{ schema }}\n\nQuestion: {{ instruction }}\nSQL:"
SEED: int | None = None  # a pipeline makes each prompt's own seed: without one all clients ask for the very same draws
MAX_TOKENS = 512


def question(number: int) -> str:
    return f"Which cities of {COUNTRIES[number % 5]} have more than {number} people?"


def content(number: int) -> str:
    """The last message of a record's prompt: what the teacher tells everything by."""
    return f"Schema:\n{SCHEMA}\n\nQuestion: {question(number)}\nSQL:"


def records(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        gold = f"SELECT name FROM city WHERE country = '{COUNTRIES[number % 5]}' AND people > {number}"
        yield {"task_id": f"c{number}", "schema": SCHEMA, "instruction": question(number), "gold_sql": gold}


def write_records(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(count))
    return path


def make_database(path: Path) -> Path:
    """200 cities, whose people spread over 0 ... 1,000,000."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(SCHEMA)
        rows = [(n, f"city{n}", COUNTRIES[n % 5], n * 7919 % 200 * 5000) for n in range(200)]
        connection.executemany("INSERT INTO city (id, name, country, people) VALUES (?, ?, ?, ?)", rows)
    connection.close()
    return path


def pipeline(
    url: str, records: Path, database: Path | None, *, concurrency: int, parse_sql: bool = True, timeout: float = 600.0
) -> dict[str, Any]:
    """A pipeline as a parsed config: all its steps, or without execution (`database=None`) and without the parser."""
    steps: list[dict[str, Any]] = [
        {"LoadJsonl": {"path": str(records)}},
        {"CanonicalizeFields": {"fields": ["schema", "instruction"]}},
        {"Deduplicate": {}},
        {
            "TextGeneration": {
                "system_prompt": SYSTEM,
                "template": TEMPLATE,
                "decode_profile": {"temperature": 0.7, "max_tokens": MAX_TOKENS},
                "seed": SEED,
            }
        },
        {"CleanSqlOutput": {}},
        {"RuleFilter": {"max_chars": 500, "forbidden": [r"(?i)\b(drop|delete|update)\b"], "sql": parse_sql}},
    ]
    if database is not None:
        steps += [{"SQLiteExecEval": {"db_path": str(database)}}, {"ScoreFromExecEval": {}}]
    steps += [{"SelectBest": {"k": 1}}, {"ExportSFT": {}}]
    teacher = {"provider": "vllm", "model": MODEL, "base_url": url, "max_concurrency": concurrency, "timeout": timeout}
    return {"name": "benchmark", "models": {"teacher": teacher}, "steps": steps}
