"""While answers are on their way, the event loop is never held for long."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random
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

    run_handle = asyncio.Handle._run

    def run(made: dict[str, Any], server: Server) -> tuple[RunResult, list[tuple[float, str]]]:
        held: list[tuple[float, str]] = []

        def timed(handle: asyncio.Handle) -> None:
            if threading.current_thread() is not threading.main_thread():  # the server's loop
                run_handle(handle)
                return
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


def test_nor_do_answers_with_many_log_probabilities(tmp_path: Path, watched: Watched) -> None:
    latency = {record["instruction"]: 0.1 * at for at, record in enumerate(RECORDS[:6])}
    words = " ".join(f"w{at}" for at in range(600))
    with openai_server(lambda *_: words, latency=lambda call: latency.get(call.prompt, 0.0), context=10_000) as server:
        made = config(server.url, write_records(tmp_path, RECORDS[:6]), make_database(tmp_path))
        profile = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1000}
        generation = {"num_generations": 2, "template": "{{ instruction }}", "decode_profile": profile}
        made["steps"] = [*made["steps"][:3], {"TextGeneration": generation}, "ExportSFT"]
        result, held = watched(made, server)
        assert result.quality["candidates"]["pass"] == 12
        assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]
        generation["num_generations"] = 4  # half of them are stored
        result, held = watched(made, server)
    assert result.quality["candidates"]["pass"] == 24
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]


def test_nor_do_long_records(tmp_path: Path, watched: Watched) -> None:
    """They are compared with each other, and with an evaluation file, while answers are on their way."""

    def text(seed: int) -> str:
        return " ".join(f"{number:x}" for number in Random(seed).choices(range(100_000), k=10_000))

    records = [{**record, "context": text(at)} for at, record in enumerate(RECORDS[:12])]
    held_out = write_records(tmp_path, [{"context": text(99)}, *RECORDS], "eval.jsonl")
    with openai_server(latency=1.0) as server:
        made = config(server.url, write_records(tmp_path, records), make_database(tmp_path))
        fields = {"fields": ["context"]}
        filters = [{"NearDuplicates": fields}, {"Decontaminate": {"against": [str(held_out)], **fields}}]
        made["steps"] = [*made["steps"][:2], *filters, made["steps"][3], "ExportSFT"]
        result, held = watched(made, server)
    assert result.quality["samples"]["completed"] == 12
    assert len(held) > 100, "so many turns at least were seen"
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]


def test_nor_do_long_answers(tmp_path: Path, watched: Watched) -> None:
    def answer(call: Call, index: int) -> str:
        said = f"### RATIONALE\n{'It is plain to see. ' * 1500}{'1 ' * 5000}\n### ANSWER\n"
        terms = " OR ".join(f"(people > {at} AND country = {at})" for at in range(90))
        return f"{said}SELECT name, {call.digest(index)} FROM city WHERE {terms}"

    latency = {record["instruction"]: 0.3 * at for at, record in enumerate(RECORDS[:4])}
    with openai_server(answer, latency=lambda call: latency.get(call.prompt, 0.0), context=100_000) as server:
        made = config(server.url, write_records(tmp_path, RECORDS[:4]), make_database(tmp_path))
        profile = {"max_tokens": 50_000}
        generation = {"num_generations": 8, "template": "{{ instruction }}", "decode_profile": profile}
        gates = ["SplitRationale", "CleanSqlOutput", {"RuleFilter": {"sql": True}}]
        best = [{"SelectBest": {"distinct": distinct, "name": distinct}} for distinct in ("sql", "path")]
        made["steps"] = [*made["steps"][:3], {"TextGeneration": generation}, *gates, *best, "ExportSFT"]
        result, held = watched(made, server)
    assert result.quality["candidates"]["pass"] == 4 * 8
    assert len(held) > 100, "so many turns at least were seen"
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]


def test_nor_does_a_slow_pattern(tmp_path: Path, watched: Watched) -> None:
    latency = {record["instruction"]: 0.2 * at for at, record in enumerate(RECORDS[:6])}
    answer = f"SELECT{' ' * 8_000}1"
    with openai_server(lambda *_: answer, latency=lambda call: latency.get(call.prompt, 0.0), context=20_000) as server:
        made = config(server.url, write_records(tmp_path, RECORDS[:6]), make_database(tmp_path))
        generation = {"template": "{{ instruction }}", "decode_profile": {"max_tokens": 10_000}}
        rules = {"forbidden": [r"\s+$"]}  # from each of the spaces to the last
        made["steps"] = [*made["steps"][:3], {"TextGeneration": generation}, {"RuleFilter": rules}, "ExportSFT"]
        result, held = watched(made, server)
    assert result.quality["samples"]["accepted"] == 6
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]


def test_nor_does_an_export_in_the_middle(tmp_path: Path, watched: Watched) -> None:
    """It writes a row group, and the last one, while the answers of the steps after it are on their way."""
    records = [{**RECORDS[at % 60], "task_id": f"{at}", "instruction": f"{at}"} for at in range(300)]

    def answer(call: Call, index: int) -> str:
        return " ".join(f"{number:x}" for number in Random(call.digest(index)).choices(range(10**6), k=4_000))

    with openai_server(answer, latency=0.05, context=100_000) as server:
        made = config(server.url, write_records(tmp_path, records), make_database(tmp_path))
        made["models"]["teacher"]["max_concurrency"] = 40
        profile = {"max_tokens": 10_000}
        steps: list[Any] = []
        for name, template in (("first", "{{ instruction }}"), ("second", "again {{ instruction }}")):
            generation = {"name": name, "template": template, "decode_profile": profile}
            steps += [{"TextGeneration": generation}, {"ExportSFT": {"name": f"{name}_sft", "formats": ["parquet"]}}]
        steps[3] = {"ExportHardCases": {}}
        made["steps"] = [*made["steps"][:3], *steps]
        result, held = watched(made, server)
    assert result.quality["samples"]["completed"] == 300
    assert pyarrow.parquet.read_metadata(result.dataset / "sft" / "train.parquet").num_row_groups > 1
    assert max(held)[0] < 0.02, sorted(held, reverse=True)[:5]
