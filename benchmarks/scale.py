"""Memory and CPU for 10,000, 100,000 and, on request, 1,000,000 records, from a teacher that answers at once."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.process import measured, save, table
from benchmarks.teacher import Options, serving

COLUMNS = {
    "records": ",d",
    "gates": "",
    "client": "",
    "wall s": ".1f",
    "req/s": ",.0f",
    "CPU ms": ".3f",
    "system ms": ".3f",
    "start CPU s": ".2f",
    "RSS MB": ".0f",
    "share": ".2f",
    "load": ".1f",
}


def run(count: int, gates: str, concurrency: int, folder: Path) -> list[dict[str, Any]]:
    """The bare loop's line and FastDistill's. `CPU ms` is for one record, what came before the first request apart."""
    records = workload.write_records(folder / f"{count}.jsonl", count)
    lines = []
    with serving(Options(slots=concurrency)) as teacher:
        for client in ("bare", "client"):
            teacher.reset()
            if client == "bare":
                said = measured("bare", teacher.url, records, folder / "out.jsonl", f"--concurrency={concurrency}")
            else:
                config = folder / "config.yaml"
                settings = workload.pipeline(
                    teacher.url, records, None, concurrency=concurrency, parse_sql=gates == "parse"
                )
                config.write_text(json.dumps(settings))
                said = measured("client", config, folder / f"artifacts-{count}-{gates}", timeout=7200)
            seen = teacher.stats()
            start = said.get("before_first_request_cpu_s") or 0.0
            lines.append(
                {
                    "records": count,
                    "gates": gates if client == "client" else "-",
                    "client": {"bare": "bare loop", "client": "FastDistill"}[client],
                    "wall s": said["wall_s"],
                    "req/s": seen["answered"] / seen["window_s"],
                    "CPU ms": 1000 * (said["cpu_s"] - start) / count,
                    "system ms": 1000 * said["cpu_system_s"] / count,
                    "start CPU s": start,
                    "RSS MB": said["rss_mb"],
                    "share": said["share"],
                    "load": said["load"],
                    "exit_code": said.get("exit_code"),
                    "answered": seen["answered"],
                }
            )
    records.unlink()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[10_000, 100_000], help="e.g. 1000000")
    parser.add_argument("--gates", choices=["rules", "parse"], default="rules", help="parse: rules and the SQL parser")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--output", default="scale", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as folder:
        for count in arguments.counts:
            lines += run(count, arguments.gates, arguments.concurrency, Path(folder))
    print(table(lines, COLUMNS))
    ours = [line for line in lines if line["client"] == "FastDistill"]
    small, large = ours[0], ours[-1]
    print(
        f"from {small['records']:,} to {large['records']:,} records: RSS x {large['RSS MB'] / small['RSS MB']:.2f},"
        f" CPU of a record x {large['CPU ms'] / small['CPU ms']:.2f}"
    )
    print(f"-> {save(arguments.output, lines)}")


if __name__ == "__main__":
    main()
