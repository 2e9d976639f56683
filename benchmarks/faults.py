"""A teacher that fails: 2 % 500, 2 % 429, 1 % resets, 1 % broken JSON, 0.5 % hangs, and an outage of 10 s.

Beside the clean run: how much longer it takes, whether every record is accounted for, and what was asked twice. The
bound is FIFO with the same attempts (`bound.bound_with_faults`): failed ones hold their slots, and a 429 waits for its
Retry-After. `retried s` is what failed attempts take of the slots; the outage comes on top, without what it interrupts.
`over` is the window's excess over bound and outage, less that of the clean run.
"""

import argparse
import asyncio
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.bound import bound_with_faults
from benchmarks.prefix import NoBrake
from benchmarks.process import measured, save, table
from benchmarks.teacher import MODEL, Options, serving
from fastdistill.control.store import ResponseStore
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Draw
from fastdistill.model.client import ModelClient
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider

CLEAN = Options(slots=64, median=0.2, sigma=0.6)
MIXED = replace(
    CLEAN, fail_429=0.02, fail_500=0.02, fail_reset=0.01, fail_truncated=0.01, fail_hang=0.005, retry_after=1.0
)
OUTAGE = 10.0  # seconds
CASES = {"clean": CLEAN, "faults": MIXED, "faults and outage": replace(MIXED, outage=f"4:{OUTAGE:g}")}
TIMEOUT = 30.0  # seconds for one request
COLUMNS = {
    "case": "",
    "exit": "d",
    "wall s": ".1f",
    "window s": ".1f",
    "bound s": ".1f",
    "retried s": ".2f",
    "window/bound": ".3f",
    "over": "+.3f",
    "hedged": "d",
    "read": ",d",
    "completed": ",d",
    "failed": ",d",
    "lost": "d",
    "requests": ",d",
    "resent": "d",
    "util": ".3f",
    "CPU ms": ".2f",
    "load": ".1f",
}


def run(name: str, options: Options, count: int, folder: Path) -> dict[str, Any]:
    records = workload.write_records(folder / "records.jsonl", count)
    database = folder / "city.db"
    if not database.exists():
        workload.make_database(database)
    with serving(options) as teacher:
        config = folder / "config.yaml"
        config.write_text(
            json.dumps(
                workload.pipeline(teacher.url, records, database, concurrency=options.slots * 5 // 4, timeout=TIMEOUT)
            )
        )
        said = measured("client", config, folder / f"artifacts {name}", timeout=900)
        seen = teacher.stats()
    fastest, retried = bound_with_faults(options, count)
    bound_s = fastest.wall_s + (OUTAGE if options.outage else 0)
    samples = said["quality"]["samples"] if "quality" in said else dict.fromkeys(("read", "completed", "failed"), 0)
    return {
        "case": name,
        "exit": said["exit_code"],
        "wall s": said["wall_s"],
        "window s": seen["window_s"],
        "bound s": bound_s,
        "retried s": retried / options.slots,
        "window/bound": seen["window_s"] / bound_s,
        "hedged": said["timing"]["models"]["teacher"]["hedged"] if "timing" in said else None,
        "read": samples["read"],
        "completed": samples["completed"],
        "failed": samples["failed"],
        "lost": count - samples["completed"] - samples["failed"],
        "requests": seen["requests"],
        "resent": seen["resent_completed"],
        "util": seen["utilisation"],
        "CPU ms": 1000 * said["cpu_s"] / count,
        "load": said["load"],
        "faults": seen["faults"],
        "failures": said.get("quality", {}).get("failures"),
        "message": said.get("message"),
    }


async def _ask_all(url: str, slots: int, count: int, path: Path) -> int:
    """How many requests were asked a second time."""
    config = OpenAIConfig.model_validate(
        {"provider": "vllm", "model": MODEL, "base_url": url, "max_concurrency": slots * 5 // 4, "timeout": TIMEOUT}
    )
    numbers = iter(range(count))
    profile = DecodeProfile(max_tokens=workload.MAX_TOKENS)
    async with ResponseStore(path) as store:
        client = ModelClient("teacher", config, [OpenAIProvider(config)], store, NoBrake())

        async def work() -> None:
            for number in numbers:
                prompt = client.prompt([{"role": "user", "content": workload.content(number)}], profile, {})
                await client.generate(prompt, [Draw(0, workload.SEED)])

        await client.ready()
        await asyncio.gather(*(work() for _ in range(slots * 5 // 2)))
        await client.aclose()
    return client.meter.hedged


def run_client(name: str, options: Options, count: int, folder: Path) -> dict[str, Any]:
    """The model client and the response store alone: what the faults cost where the machine is not the limit."""
    fastest, retried = bound_with_faults(options, count)
    bound_s = fastest.wall_s + (OUTAGE if options.outage else 0)
    with serving(options) as teacher:
        hedged = asyncio.run(_ask_all(teacher.url, options.slots, count, folder / f"{name}.sqlite"))
        seen = teacher.stats()
    return {
        "case": name,
        "window s": seen["window_s"],
        "bound s": bound_s,
        "retried s": retried / options.slots,
        "window/bound": seen["window_s"] / bound_s,
        "hedged": hedged,
        "completed": count,
        "requests": seen["requests"],
        "resent": seen["resent_completed"],
        "util": seen["utilisation"],
        "load": os.getloadavg()[0],
        "faults": seen["faults"],
        "failures": None,
        "message": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4_000)
    parser.add_argument("--output", default="faults", help="name of the JSON file in benchmarks/results")
    parser.add_argument("--slots", type=int, default=64, help="fewer, with fewer records, on a machine that is busy")
    parser.add_argument("--client", action="store_true", help="the model client alone, without pipeline and gates")
    arguments = parser.parse_args()
    one = run_client if arguments.client else run
    cases = {name: replace(options, slots=arguments.slots) for name, options in CASES.items()}
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as folder:
        lines = [one(name, options, arguments.count, Path(folder)) for name, options in cases.items()]
    for line in lines:
        line["over"] = line["window/bound"] - lines[0]["window/bound"]
    print(table(lines, COLUMNS))
    for line in lines:
        for failure in line["failures"] or ():
            print(f"{line['case']}: {failure['reason']} at {failure['step']}: {failure['count']}")
        if line["message"]:
            print(f"{line['case']}: {line['message']}")
    print(f"-> {save(arguments.output, lines)}")


if __name__ == "__main__":
    main()
