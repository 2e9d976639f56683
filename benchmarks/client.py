"""FastDistill as a measured process: runs a config through the public API and prints its account as JSON."""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdistill.control.run import ActiveRun


class FirstRequest:
    """Looks on while a run is at work, for the CPU that was spent before its first sample's request went out."""

    def __init__(self) -> None:
        self.cpu_s: float | None = None

    @contextmanager
    def watch(self, run: "ActiveRun") -> Iterator[None]:
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.002):
                if any(model.meter.requests for model in run.models.values()):
                    self.cpu_s = time.process_time()
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def main() -> None:
    from benchmarks.process import account
    from fastdistill import FatalError, load_pipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    first = FirstRequest()
    said: dict[str, Any]
    try:
        result = load_pipeline([arguments.config], ()).run(output_dir=arguments.output, watch=first.watch)
    except FatalError as error:
        said = {"exit_code": int(error.exit_code), "message": str(error)}
    else:
        said = {
            "exit_code": int(result.exit_code),
            "path": str(result.path),
            "quality": dict(result.quality),
            "timing": dict(result.timing),
            "dist": {Path(entry["path"]).name: entry["sha256"] for entry in result.manifest["outputs"]},
        }
    print(json.dumps({**account(), "before_first_request_cpu_s": first.cpu_s, **said}))


if __name__ == "__main__":
    main()
