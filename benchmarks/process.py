"""Runs a client in a process of its own, with its own account of time and memory, and shows what came of it."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def account() -> dict[str, float]:
    """CPU seconds of this process and of its ended children, and its peak memory in MB (Linux)."""
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not ru_maxrss, which begins with that of the parent.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split(maxsplit=1)[0])
    return {
        "cpu_s": own.ru_utime + own.ru_stime,
        "cpu_system_s": own.ru_stime,
        "workers_cpu_s": workers.ru_utime + workers.ru_stime,
        "rss_mb": peak / 1024,
    }


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]


def measured(module: str, *arguments: object, timeout: float = 1800.0) -> dict[str, Any]:
    """What a client that prints its account as JSON says of itself; `wall_s` is from its start to its end."""
    # An installed package has its bytecode: to compile it at every start is nobody's cost.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    done = subprocess.run(
        command(module, *arguments), stdout=subprocess.PIPE, text=True, timeout=timeout, env=environment
    )
    wall = time.perf_counter() - begun
    if not done.stdout:
        raise SystemExit(f"benchmarks.{module} ended with {done.returncode}; see above")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"wall_s": wall, "load": os.getloadavg()[0], "share": said["cpu_s"] / wall, **said}


def save(name: str, content: object) -> Path:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ".gitignore").write_text("*\n")
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def table(entries: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Lines under a head; `columns` gives each key its format, like `.1f`."""
    texts = [[_text(entry.get(key), form) for key, form in columns.items()] for entry in entries]
    widths = [max(map(len, column)) for column in zip(list(columns), *texts, strict=True)]
    lines = [list(columns), *texts]
    return "\n".join(
        "  ".join(text.ljust(width) if at == 0 else text.rjust(width) for at, (text, width) in enumerate(zipped))
        for zipped in (list(zip(line, widths, strict=True)) for line in lines)
    )


def _text(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
