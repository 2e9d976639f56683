"""While answers are on their way, the event loop is never held for long."""

import asyncio
import gc
import time
from contextlib import nullcontext
from pathlib import Path

import aiohttp  # noqa: F401  what a run imports once, at its first use, does not count
import jinja2  # noqa: F401
import pyarrow.parquet
import pytest

from fastdistill.control.config import parse_pipeline
from fastdistill.control.folder import RunFolder
from fastdistill.control.session import execute
from tests.servers import choose, openai_server
from tests.world import ANSWERS, RECORDS, config, make_database, write_records

assert pyarrow.parquet


def test_nothing_holds_the_loop_for_more_than_20_ms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[float, str]] = []
    run_handle = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        # CPU time of the loop's thread: a busy machine is not our doing.
        answers_are_on_their_way = server.counters.in_flight > 0
        begun = time.thread_time()
        run_handle(handle)
        if answers_are_on_their_way:
            held.append((time.thread_time() - begun, repr(handle)))

    records = [{**record, "task_id": f"{copy}-{at}"} for copy in range(10) for at, record in enumerate(RECORDS)]
    with openai_server(choose(ANSWERS), latency=0.01) as server:
        made = config(server.url, write_records(tmp_path, records), make_database(tmp_path))
        del made["steps"][2]  # duplicates are wanted here
        work = execute(parse_pipeline(made), RunFolder(tmp_path, "run"), lambda _: nullcontext())
        monkeypatch.setattr(asyncio.Handle, "_run", timed)
        gc.freeze()  # as the command does: what was imported is not looked through again and again
        result = asyncio.run(work)
        gc.unfreeze()
    assert result.quality["samples"]["completed"] == len(records)
    assert len(held) > len(records) / 2, "so many turns at least were seen"
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]
