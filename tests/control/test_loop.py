"""While answers are on their way, the event loop is never held for long."""

import asyncio
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401  what a run imports once, at its first use, does not count
import jinja2  # noqa: F401
import pyarrow.parquet
import pytest

from fastdistill.control.config import parse_pipeline
from fastdistill.control.folder import RunFolder
from fastdistill.control.session import RunResult, execute, tuned
from tests.servers import Call, Server, choose, openai_server
from tests.world import ANSWERS, RECORDS, config, make_database, write_records

assert pyarrow.parquet

pytestmark = pytest.mark.alone

Watched = Callable[[dict[str, Any], Server], tuple[RunResult, list[tuple[float, str]]]]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Runs a config; also gives each turn of the loop that had answers on their way, with its CPU seconds."""

    def run(made: dict[str, Any], server: Server) -> tuple[RunResult, list[tuple[float, str]]]:
        held: list[tuple[float, str]] = []
        run_handle = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            # CPU time of the loop's thread: a busy machine is not our doing.
            before, begun = server.counters.in_flight, time.thread_time()
            run_handle(handle)
            if before or server.counters.in_flight:
                held.append((time.thread_time() - begun, repr(handle)))

        work = execute(parse_pipeline(made), RunFolder(tmp_path, "run"), lambda _: nullcontext())
        monkeypatch.setattr(asyncio.Handle, "_run", timed)
        with tuned():
            return asyncio.run(work), held

    return run


def test_nothing_holds_the_loop_for_more_than_20_ms(tmp_path: Path, watched: Watched) -> None:
    records = [{**record, "task_id": f"{copy}-{at}"} for copy in range(10) for at, record in enumerate(RECORDS)]
    with openai_server(choose(ANSWERS), latency=0.01) as server:
        made = config(server.url, write_records(tmp_path, records), make_database(tmp_path))
        del made["steps"][2]  # duplicates are wanted here
        result, held = watched(made, server)
    assert result.quality["samples"]["completed"] == len(records)
    assert len(held) > len(records) / 2, "so many turns at least were seen"
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]


def test_nor_do_many_records_that_are_left_out(tmp_path: Path, watched: Watched) -> None:
    repeated = [{**RECORDS[0], "task_id": f"again-{at}"} for at in range(3_000)]
    records = [*RECORDS, *[RECORDS[1]] * 3_000, *repeated]  # the same tasks, and other tasks with the same content
    path = write_records(tmp_path, records)
    with path.open("a") as file:
        file.write("{\n" * 600)
    with openai_server(choose(ANSWERS), latency=1.0) as server:
        made = config(server.url, path, make_database(tmp_path))
        made["models"]["teacher"]["max_concurrency"] = 100  # so that all is read while answers are on their way
        result, held = watched(made, server)
    samples = result.quality["samples"]
    assert (samples["completed"], samples["duplicates"], samples["failed"]) == (len(RECORDS), 6_000, 600)
    assert len(held) > 20, "so many turns at least were seen"
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]


def test_nor_do_many_candidates_of_a_sample(tmp_path: Path, watched: Watched) -> None:
    def query(call: Call, index: int) -> str:
        some = f"SELECT name, count(*) AS n{index} FROM city WHERE people > {call.digest(index)} AND country IN (1, 2)"
        return f"{some} GROUP BY name ORDER BY 2 DESC -- {'a' * 2000}"

    latency = {record["instruction"]: 0.1 * at for at, record in enumerate(RECORDS[:12])}
    with openai_server(query, latency=lambda call: latency.get(call.prompt, 0.0)) as server:
        made = config(server.url, write_records(tmp_path, RECORDS[:12]), make_database(tmp_path))
        generation = {"num_generations": 64, "template": "{{ instruction }}"}
        rules = {"sql": True, "forbidden": [f"(?i)as an ai.{{0,{at}}}model" for at in range(50)]}
        best = {"SelectBest": {"distinct": "sql"}}
        made["steps"] = [*made["steps"][:3], {"TextGeneration": generation}, {"RuleFilter": rules}, best, "ExportSFT"]
        result, held = watched(made, server)
    assert (result.quality["samples"]["accepted"], result.quality["candidates"]["pass"]) == (12, 12 * 64)
    assert len(held) > 100, "so many turns at least were seen"
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]
