"""How many answers the execution gates judge, in a second and in a second of CPU time.

Small, right answers, judged through the gates' pools at their usual number of workers. What it costs to start them is
taken off: a short round is measured first. Beside them a bare `python -I -S -c pass`, started and ended: `bare` says
how many of these one evaluation costs, which depends less on the machine than the seconds do.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

from benchmarks.process import account, save, table
from benchmarks.workload import make_database
from fastdistill.data.execution.python_pool import PythonJob, PythonPool
from fastdistill.data.execution.sqlite import SqlitePool
from fastdistill.data.execution.sqlite_worker import SqlJob

SHORT = 16
COLUMNS = {
    "gate": "",
    "evaluations": ",d",
    "per s": ",.0f",
    "per CPU s": ",.0f",
    "CPU ms": ".2f",
    "bare": ".3f",
    "load": ".1f",
}
CODE = "def square(x):\n    return x * x\n"
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n"
SQL = "SELECT name FROM city WHERE country = 'Italy' AND people > 1000"
GOLD = "SELECT name FROM city WHERE people > 1000 AND country = 'Italy'"


async def python(count: int, mode: Literal["split", "solo"]) -> list[str]:
    job = PythonJob(CODE, (CHECK,), entry_point="square", mode=mode)
    async with PythonPool() as pool:
        return [found.reason for found in await asyncio.gather(*(pool.evaluate(job) for _ in range(count)))]


async def sql(count: int) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as folder:
        job = SqlJob(str(make_database(Path(folder) / "city.db")), SQL, GOLD)
        async with SqlitePool() as pool:
            return [found.reason for found in await asyncio.gather(*(pool.evaluate(job) for _ in range(count)))]


GATES: dict[str, tuple[int, Callable[[int], Coroutine[Any, Any, list[str]]]]] = {
    "Python, split": (1, lambda count: python(count, "split")),
    "Python, solo": (1, lambda count: python(count, "solo")),
    "SQL": (50, sql),
}
"""Each gate with how many evaluations stand for one, and a round of it: what was found of each answer."""


def bare(count: int) -> None:
    for _ in range(count):
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, of this process and all that it started."""
    before, begun = account(), time.perf_counter()
    work()
    after = account()
    return time.perf_counter() - begun, sum(after[key] - before[key] for key in ("cpu_s", "workers_cpu_s"))


def judged(name: str, count: int) -> Callable[[], None]:
    def work() -> None:
        found = asyncio.run(GATES[name][1](count))
        if set(found) != {found[0]} or found[0] not in ("passed", "match"):
            raise SystemExit(f"{name}: {sorted(set(found))}")

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="?", type=int, default=400, help="of a Python gate; others in proportion")
    parser.add_argument("--gate", action="append", choices=GATES, help="only this one; may be repeated")
    arguments = parser.parse_args()
    _, bare_s = (seconds / 50 for seconds in cost(lambda: bare(50)))
    lines = []
    for name in arguments.gate or GATES:
        count = arguments.evaluations * GATES[name][0]
        start, whole = cost(judged(name, SHORT)), cost(judged(name, SHORT + count))
        wall_s, cpu_s = (b - a for a, b in zip(start, whole, strict=True))
        lines.append(
            {
                "gate": name,
                "evaluations": count,
                "per s": count / wall_s,
                "per CPU s": count / cpu_s,
                "CPU ms": 1e3 * cpu_s / count,
                "bare": cpu_s / count / bare_s,
                "load": os.getloadavg()[0],
            }
        )
    print(table(lines, COLUMNS))
    print(f"a bare process: {1e3 * bare_s:.1f} ms of CPU time\n-> {save('gates', lines)}")


if __name__ == "__main__":
    main()
