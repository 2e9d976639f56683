"""The bare loop: workers over one iterator, aiohttp on uvloop, a line of JSON for each answer. Nothing else.

No retries, no store, no gates: what a script would do, and the yardstick for what FastDistill adds.
"""

import argparse
import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from benchmarks import workload
from benchmarks.process import account
from benchmarks.teacher import MODEL


async def distil(url: str, lines: Iterator[bytes], output: Path, concurrency: int) -> int:
    written = 0
    encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode
    with output.open("wb") as file:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

            async def work() -> None:
                nonlocal written
                for line in lines:
                    record = decode(line)
                    async with session.post(
                        f"{url}/v1/chat/completions",
                        data=encode(_body(record)),
                        headers={"Content-Type": "application/json"},
                    ) as response:
                        answer = decode(await response.read())
                    text = answer["choices"][0]["message"]["content"]
                    file.write(encode({"task_id": record["task_id"], "answer": text}) + b"\n")
                    written += 1

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
    return written


def _body(record: dict[str, Any]) -> dict[str, Any]:
    user = f"Schema:\n{record['schema']}\n\nQuestion: {record['instruction']}\nSQL:"
    messages = [{"role": "system", "content": workload.SYSTEM}, {"role": "user", "content": user}]
    return {
        "model": MODEL,
        "messages": messages,
        "temperature": 0.7,
        "max_tokens": workload.MAX_TOKENS,
        "seed": workload.SEED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("records", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--concurrency", type=int, default=80)
    arguments = parser.parse_args()
    with arguments.records.open("rb") as lines:
        written = uvloop.run(distil(arguments.url, lines, arguments.output, arguments.concurrency))
    print(json.dumps({**account(), "written": written}))


if __name__ == "__main__":
    main()
