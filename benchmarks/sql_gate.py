"""What an evaluation costs at `SQLiteExecEval`: of the event loop, and of its workers.

Through the gate as a run uses it: 64 open samples with some candidates each, on one database of 386 cities, from one
event loop, which has everything else of a run to do beside it. Time is CPU time of each side, and wall time; every
verdict is checked. "2 cores/s" is what the CPU times allow two idle cores; a candidate that matches is evaluated once
more on each perturbed copy, which counts as one evaluation here.
"""

import argparse
import asyncio
import os
import resource
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.process import save, table
from fastdistill.core.step import Context
from fastdistill.core.types import Candidate, Completion, FinishReason, Outcome, Prompt, Sample
from fastdistill.data.execution.sqlite import SQLiteExecEval

OPEN = 64
SCHEMA = """
CREATE TABLE state(state_name TEXT PRIMARY KEY, population INT, area REAL, capital TEXT);
CREATE TABLE city(city_id INTEGER PRIMARY KEY, city_name TEXT, population INT, state_name TEXT REFERENCES state);
WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c LIMIT 51)
    INSERT INTO state SELECT 'state ' || i, 400000 + 170777 * i % 9000000, 1000.5 + 7 * i, 'city ' || i FROM c;
WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c LIMIT 386)
    INSERT INTO city SELECT i, 'city ' || i, 10000 + 7919 * i % 900000, 'state ' || i % 51 FROM c;
"""
COLUMNS = {
    "candidates": "d",
    "perturbations": "d",
    "evaluations": ",d",
    "wall/s": ",.0f",
    "loop us": ".0f",
    "workers us": ".0f",
    "CPU/s": ",.0f",
    "2 cores/s": ",.0f",
    "load": ".1f",
}


def gold(number: int) -> str:
    city, state = number % 386, number % 51
    return (
        f"SELECT population FROM city WHERE city_name = 'city {city}'",
        f"SELECT city_name FROM city WHERE state_name = 'state {state}' AND population > {10_000 + number % 9_000}",
        f"SELECT count(*) FROM city WHERE population BETWEEN {number} AND {number + 100_000}",
        f"SELECT area, c.population FROM state s JOIN city c ON city_name = capital WHERE area > {number % 900}",
        f"SELECT state_name, max(population) FROM city GROUP BY state_name HAVING count(*) > {number % 7}",
        f"SELECT city_name FROM city WHERE population > {number} ORDER BY population DESC LIMIT 5",
    )[number % 6]


def samples(count: int, candidates: int) -> Iterator[Sample]:
    """Half of the candidates are right, in other words than gold."""
    prompt = Prompt("vllm", "teacher", ({"role": "user", "content": "How many?"},), {})
    for number in range(count):
        right = f"{gold(number)} -- {number}"
        wrong = f"SELECT city_name FROM city WHERE city_id < {number % 40}"
        texts = [right if attempt % 2 == 0 else f"{wrong} + {attempt}" for attempt in range(candidates)]
        yield Sample(
            number,
            f"bench:{number}",
            {"gold_sql": gold(number)},
            candidates=tuple(
                Candidate(f"{number}.{at}", at, at, f"key-{at}", prompt, Completion(t, FinishReason.STOP), t)
                for at, t in enumerate(texts)
            ),
        )


async def judge(gate: SQLiteExecEval, pending: Iterator[Sample]) -> None:
    ctx = cast(Context, None)  # this gate asks a run for nothing
    async with gate.opened(ctx), asyncio.TaskGroup() as group:

        async def work() -> None:
            for sample in pending:
                judged = await gate.run(sample, ctx)
                wanted = [Outcome.PASS if c.attempt % 2 == 0 else Outcome.FAIL for c in judged.candidates]
                if [c.outcome for c in judged.candidates] != wanted:
                    raise SystemExit(f"{sample.source}: {[c.verdicts for c in judged.candidates]}")

        for _ in range(OPEN):
            group.create_task(work())


def measure(database: Path, evaluations: int, candidates: int, workers: int, perturbations: int) -> dict[str, Any]:
    gate = SQLiteExecEval(db_path=str(database), workers=workers, perturbations=perturbations)
    prepared = list(samples(evaluations // candidates, candidates))
    own, begun = time.process_time(), time.perf_counter()
    uvloop.run(judge(gate, iter(prepared)))
    own, wall = time.process_time() - own, time.perf_counter() - begun
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "own_s": own,
        "workers_s": children.ru_utime + children.ru_stime,
        "wall_s": wall,
        "evaluations": len(prepared) * candidates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", default="sql_gate", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    lines = []
    spent = 0.0  # by the workers of the lines before
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as folder:
        database = Path(folder) / "geography.sqlite"
        with closing(sqlite3.connect(database)) as connection:
            connection.executescript(SCHEMA)
        for candidates, perturbations in ((1, 0), (4, 0), (4, 2)):
            seen = measure(database, arguments.evaluations, candidates, arguments.workers, perturbations)
            count, own, workers = seen["evaluations"], seen["own_s"], seen["workers_s"] - spent
            spent = seen["workers_s"]
            lines.append(
                {
                    "candidates": candidates,
                    "perturbations": perturbations,
                    "evaluations": count,
                    "wall/s": count / seen["wall_s"],
                    "loop us": 1e6 * own / count,
                    "workers us": 1e6 * workers / count,
                    "CPU/s": count / (own + workers),
                    "2 cores/s": 2 * count / (own + workers),
                    "load": os.getloadavg()[0],
                }
            )
    print(table(lines, COLUMNS))
    print(f"-> {save(arguments.output, lines)}")


if __name__ == "__main__":
    main()
