"""How well FastDistill keeps a teacher busy, beside the bare loop and the bound, in one run.

Small and large: 64 slots of 200 ms with all gates, and 1,024 slots of 100 ms with rule gates and with execution.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.bound import bound, latencies, longest_first
from benchmarks.process import measured, save, table
from benchmarks.teacher import Options, Served, serving

COLUMNS = {
    "case": "",
    "client": "",
    "wall s": ".2f",
    "wall/bound": ".3f",
    "util": ".3f",
    "util/bound": ".3f",
    "req/s": ",.0f",
    "mid req/s": ",.0f",
    "extra": ",d",
    "CPU ms": ".3f",
    "of it start s": ".2f",
    "workers ms": ".3f",
    "RSS MB": ".0f",
    "share": ".2f",
    "load": ".1f",
}


@dataclass(frozen=True, slots=True)
class Case:
    count: int
    slots: int
    median: float
    concurrency: int
    parse_sql: bool = True
    execute: bool = True

    @property
    def options(self) -> Options:
        return Options(slots=self.slots, median=self.median, sigma=0.6)


CASES = {
    "64x2k": Case(2_000, 64, 0.2, 80),
    "64x10k": Case(10_000, 64, 0.2, 80),
    "1024x20k-rules": Case(20_000, 1024, 0.1, 1280, parse_sql=False, execute=False),
    "1024x20k-parse": Case(20_000, 1024, 0.1, 1280, execute=False),
    "1024x20k-sql": Case(20_000, 1024, 0.1, 1280),
}


def run(name: str, case: Case, folder: Path) -> list[dict[str, Any]]:
    """The lines of one case: the bounds, the bare loop, FastDistill."""
    needed = latencies(case.options, case.count)
    fifo, longest = bound(needed, case.slots), longest_first(needed, case.slots)
    records = workload.write_records(folder / f"{name}.jsonl", case.count)
    database = workload.make_database(folder / f"{name}.db") if case.execute else None
    lines: list[dict[str, Any]] = [
        {"case": name, "client": "bound, FIFO", "wall s": fifo.wall_s, "util": fifo.utilisation},
        {"case": name, "client": "longest first", "wall s": longest.wall_s, "util": longest.utilisation},
    ]
    with serving(case.options) as teacher:
        bare = measured(
            "bare", teacher.url, records, folder / f"{name}.out", f"--concurrency={case.concurrency}", timeout=900
        )
        lines.append(_line(name, "bare loop", case, bare, teacher, fifo.wall_s, fifo.utilisation))
        teacher.reset()
        config = folder / f"{name}.yaml"
        config.write_text(
            json.dumps(
                workload.pipeline(
                    teacher.url, records, database, concurrency=case.concurrency, parse_sql=case.parse_sql
                )
            )
        )
        ours = measured("client", config, folder / f"artifacts-{name}", timeout=900)
        lines.append(_line(name, "FastDistill", case, ours, teacher, fifo.wall_s, fifo.utilisation))
    return lines


def _line(
    name: str, client: str, case: Case, said: dict[str, Any], teacher: Served, bound_s: float, bound_utilisation: float
) -> dict[str, Any]:
    seen = teacher.stats()
    if seen["choices"] < case.count:
        raise SystemExit(f"{name}: {client}: {seen['choices']} of {case.count} answered: {said}")
    return {
        "case": name,
        "client": client,
        "wall s": said["wall_s"],
        "wall/bound": said["wall_s"] / bound_s,
        "util": seen["utilisation"],
        "util/bound": seen["utilisation"] / bound_utilisation,
        "req/s": seen["answered"] / seen["window_s"],
        "mid req/s": seen["mid_rate"],
        "extra": seen["choices"] - case.count,  # paid for and not needed: a straggler was asked for again
        "CPU ms": 1000 * said["cpu_s"] / case.count,
        "of it start s": said.get("before_first_request_cpu_s"),
        "workers ms": 1000 * said["workers_cpu_s"] / case.count,
        "RSS MB": said["rss_mb"],
        "share": said["share"],
        "load": said["load"],
        "teacher": seen,
        "said": said,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of: {', '.join(CASES)}")
    parser.add_argument("--output", default="utilisation", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as folder:
        for name in arguments.cases:
            lines += run(name, CASES[name], Path(folder))
    print(table(lines, COLUMNS))
    print(f"-> {save(arguments.output, lines)}")


if __name__ == "__main__":
    main()
