"""What an answer costs in the response store: to write, to find, and to not find, at 10,000 to 1,000,000 answers.

All of it as a run does it: through `ResponseStore`, from 64 coroutines, each answer in the journal before the next. The
figures are CPU time of the process, threads included, and wall time; the answers are made outside the clock.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import workload
from benchmarks.process import account, save, table
from benchmarks.teacher import MODEL
from fastdistill.control.store import ResponseStore
from fastdistill.core.types import Answer, Completion, Draw, FinishReason, Prompt, Usage

PARAMETERS = {"temperature": 0.7, "max_tokens": workload.MAX_TOKENS}  # the same for all, as a step has them
CHUNK = 10_000
WORKERS = 64
LOOKUPS = 10_000
COLUMNS = {
    "answers": ",d",
    "insert us": ".1f",
    "insert wall us": ".1f",
    "hit us": ".1f",
    "miss us": ".1f",
    "file MB": ",.0f",
    "RSS MB": ".0f",
    "load": ".1f",
}


async def measure(counts: list[int], folder: Path) -> list[dict[str, Any]]:
    lines = []
    keys: list[str] = []
    chance = random.Random(0)
    path = folder / "responses.sqlite"
    async with ResponseStore(path) as store:
        cpu = wall = 0.0
        since = 0
        while len(keys) < max(counts):
            entries = [_entry(number) for number in range(len(keys), len(keys) + CHUNK)]
            cpu_begun, begun = time.process_time(), time.perf_counter()
            await _insert(store, entries)
            cpu, wall = cpu + time.process_time() - cpu_begun, wall + time.perf_counter() - begun
            since += CHUNK
            keys += [answer.key for _, answer in entries]
            if len(keys) in counts:
                wanted = [chance.choice(keys) for _ in range(LOOKUPS)]
                lines.append(
                    {
                        "answers": len(keys),
                        "insert us": 1e6 * cpu / since,  # of those since the line before
                        "insert wall us": 1e6 * wall / since,
                        "hit us": _look_up(store, wanted, found=True),
                        "miss us": _look_up(store, [key[::-1] for key in wanted], found=False),
                        "file MB": _size_mb(folder),
                        "RSS MB": account()["rss_mb"],
                        "load": os.getloadavg()[0],
                    }
                )
                cpu = wall = 0.0
                since = 0
    return lines


async def _insert(store: ResponseStore, entries: list[tuple[Prompt, Answer]]) -> None:
    pending = iter(entries)

    async def work() -> None:
        for prompt, answer in pending:
            await store.put(prompt, [answer])

    async with asyncio.TaskGroup() as group:
        for _ in range(WORKERS):
            group.create_task(work())


def _look_up(store: ResponseStore, keys: list[str], *, found: bool) -> float:
    """Microseconds of CPU for one look-up."""
    begun = time.process_time()
    for key in keys:
        if (store.get(key) is not None) is not found:
            raise SystemExit(f"store: {key} is {'not ' if found else ''}there")
    return 1e6 * (time.process_time() - begun) / len(keys)


def _size_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("responses.sqlite*") if file.suffix != ".journal") / 2**20


def _entry(number: int) -> tuple[Prompt, Answer]:
    messages = (
        {"role": "system", "content": workload.SYSTEM},
        {"role": "user", "content": workload.content(number)},
    )
    prompt = Prompt("vllm", MODEL, messages, PARAMETERS)
    draw = Draw(0, workload.SEED)
    text = f"```sql\n{workload.question(number)}\n```\nThis looks up the cities in the table city."
    completion = Completion(text, FinishReason.STOP, Usage(350, 60), model=MODEL, build="simulated")
    return prompt, Answer(draw, draw.key(prompt), completion, stored=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[10_000, 100_000], help="multiples of 10000")
    parser.add_argument("--output", default="store", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as folder:
        lines = uvloop.run(measure(arguments.counts, Path(folder)))
    print(table(lines, COLUMNS))
    print(f"-> {save(arguments.output, lines)}")


if __name__ == "__main__":
    main()
