"""kill -9 in the middle of a run, and the same run again: what is asked twice, and whether the data set is the same.

An answer that is on its way to the client when the process dies can't be known to it: some few may be asked for again.
`oldest ms` says how long before the kill the first of these had been sent; `too late` are those sent after it, while
the system still took the process apart, with its sockets last.
"""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.process import command, measured, save, table
from benchmarks.teacher import Options, serving

COLUMNS = {
    "kill": "d",
    "answered before": ",d",
    "resent": "d",
    "too late": "d",
    "oldest ms": ".1f",
    "answered in all": ",d",
    "exit": "d",
    "completed": ",d",
    "same data set": "",
    "load": ".1f",
}


def run(number: int, kill_at: int, config: Path, artifacts: Path, teacher: Any, wanted: Any) -> dict[str, Any]:
    """Kills a run once `kill_at` requests were answered, and runs it again."""
    teacher.reset()
    process = subprocess.Popen(command("client", config, artifacts), stdout=subprocess.DEVNULL)
    while teacher.stats()["answered"] < kill_at:
        if process.poll() is not None:
            raise SystemExit("crash: the run ended before it could be killed")
        time.sleep(0.005)
    killed = time.monotonic()  # the clock of the teacher's loop, too
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = teacher.quiet().stats()["answered"]
    teacher.reset(everything=False)  # a straggler may have been asked twice before
    said = measured("client", config, artifacts, timeout=600)
    seen = teacher.stats()
    return {
        "kill": number,
        "answered before": before,
        "resent": seen["resent_completed"],
        "too late": sum(at > killed for at in seen["resent_after"]),
        "oldest ms": 1000 * max([killed - at for at in seen["resent_after"]], default=0.0),
        "answered in all": before + seen["answered"],
        "exit": said["exit_code"],
        "completed": said["quality"]["samples"]["completed"] if "quality" in said else 0,
        "same data set": "yes" if said.get("dist") == wanted else "NO",
        "load": said["load"],
        "message": said.get("message"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=3, help="kills, at evenly spread places")
    parser.add_argument("--slots", type=int, default=64, help="of the teacher; a quarter more requests are in flight")
    parser.add_argument("--rules", action="store_true", help="rule gates without the SQL parser, and no execution")
    parser.add_argument("--median", type=float, default=0.2, help="the teacher's latency in seconds")
    parser.add_argument("--output", default="crash", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as name:
        folder = Path(name)
        records = workload.write_records(folder / "records.jsonl", arguments.count)
        database = None if arguments.rules else workload.make_database(folder / "city.db")
        with serving(Options(slots=arguments.slots, median=arguments.median, sigma=0.6)) as teacher:
            config = folder / "config.yaml"
            asked = {"concurrency": arguments.slots * 5 // 4, "parse_sql": not arguments.rules}
            config.write_text(json.dumps(workload.pipeline(teacher.url, records, database, **asked)))
            whole = measured("client", config, folder / "whole", timeout=600)
            lines = []
            for number in range(1, arguments.kills + 1):
                kill_at = number * arguments.count // (arguments.kills + 1)
                lines.append(run(number, kill_at, config, folder / f"killed{number}", teacher, whole.get("dist")))
    print(table(lines, COLUMNS))
    print(f"-> {save(arguments.output, lines)}")


if __name__ == "__main__":
    main()
