"""One data set by several machines: each takes its shard, their answers are merged, and the whole run asks nothing."""

import asyncio
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill import Shard
from fastdistill.control.config import parse_pipeline
from fastdistill.control.folder import read_json
from fastdistill.control.ledger import read_samples
from fastdistill.control.store import SCHEMA, ResponseStore
from fastdistill.core.errors import ExitCode
from fastdistill.core.types import Status
from tests.command import Command
from tests.control.test_session import World, data_set, teacher, world_in
from tests.control.test_store import PROMPT, answer
from tests.servers import Batch, choose, openai_server, status
from tests.world import RECORDS

SHARDS = ["0/3", "1/3", "2/3"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return world_in(tmp_path)


def written(world: World, config: dict[str, Any]) -> Path:
    path = world.folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_shards_merged_are_the_run_of_one_machine_to_the_byte(world: World, command: Command) -> None:
    with openai_server(teacher) as server:
        config = world.config(server)
        config["require"] = {"min_total": 20}  # of the whole: no shard has as many
        path = written(world, config | {"lineage": {"parent": "before"}})  # which lies on none of the machines
        roots = [world.folder / f"machine{number}" for number in range(3)]
        for shard, root in zip(SHARDS, roots, strict=True):
            assert command("pipeline", "run", "-c", path, "--shard", shard, "-o", root, "-q").code == 0

        merged = command("merge", *roots, roots[0], "-o", world.folder / "merged")
        assert merged.code == 0, merged.err
        told = [line.split(": ")[1] for line in merged.out.splitlines()[:-1]]
        assert sum(int(line.split()[0]) for line in told) == 180
        assert told[3].startswith("0 new answers, ")

        requests = server.counters.requests
        whole = parse_pipeline(config).run(output_dir=world.folder / "merged")
        assert server.counters.requests == requests, "not even a probe"
        alone = parse_pipeline(config).run(output_dir=world.folder / "alone")
    assert data_set(whole) == data_set(alone)
    assert whole.manifest["content_sha256"] == alone.manifest["content_sha256"]


def test_each_sample_is_of_one_shard_and_told_by_the_others(world: World, command: Command) -> None:
    homes: Counter[str] = Counter()
    with openai_server(teacher) as server:
        for shard in SHARDS:
            result = (
                parse_pipeline(world.config(server)).shard(*map(int, shard.split("/"))).run(output_dir=world.folder)
            )
            samples = list(read_samples(result.path / "ledger.sqlite"))
            homes.update(sample.sample_id for sample in samples if sample.status is Status.OPEN)
            counts = result.quality["samples"]
            assert (counts["read"], counts["duplicates"], counts["failed"]) == (61, 1, 0)
            assert counts["completed"] + counts["elsewhere"] == 60
            away = next(sample for sample in samples if sample.status is Status.ELSEWHERE)
            assert "of shard" in command("explain", result.run_id, away.sample_id, "-o", world.folder).out
    assert len(homes) == 60 and set(homes.values()) == {1}


def test_what_a_killed_process_left_in_its_journal_is_merged(tmp_path: Path, command: Command) -> None:
    (tmp_path / "shard").mkdir()
    killed = """
import asyncio, os, signal, sys
from pathlib import Path
from fastdistill.control.store import ResponseStore
from tests.control.test_store import PROMPT, answer

async def go():
    async with ResponseStore(Path(sys.argv[1])) as store:
        await store.put(PROMPT, [answer('x', 0)])
        await store._writer.write(None)
        await store.put(PROMPT, [answer('y', 1)])
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(go())
"""
    subprocess.run([sys.executable, "-c", killed, tmp_path / "shard/responses.sqlite"], cwd=Path(__file__).parents[2])
    merged = command("merge", tmp_path / "shard", "-o", tmp_path / "all")
    assert "2 new answers, 0 known ones" in merged.out, merged.err


def test_what_can_not_be_merged_is_named(tmp_path: Path, command: Command) -> None:
    ended = command("merge", tmp_path / "none", "-o", tmp_path / "all")
    assert ended.code == 3
    assert f"{tmp_path}/none/responses.sqlite: there is no such store" in ended.err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/responses.sqlite").write_text("no database\n" * 1000)
    ended = command("merge", tmp_path / "broken", "-o", tmp_path / "all")
    assert "broken/responses.sqlite: file is not a database" in ended.err
    ended = command("merge", tmp_path / "all", "-o", tmp_path / "all")
    assert "all/responses.sqlite: this is the store to be written" in ended.err


def test_of_two_stores_the_one_that_is_damaged_is_named(tmp_path: Path, command: Command) -> None:
    for name in ("good", "damaged"):
        (tmp_path / name).mkdir()
        filled(tmp_path / name / "responses.sqlite", 100)
    damaged = tmp_path / "damaged/responses.sqlite"
    damaged.write_bytes(damaged.read_bytes()[:4096] + b"\xff" * (damaged.stat().st_size - 4096))
    for its, into in (("good", "damaged"), ("damaged", "all"), ("damaged", "good")):
        ended = command("merge", tmp_path / its, "-o", tmp_path / into)
        assert ended.code == 8 and ended.err.startswith(f"error: {damaged}: "), ended.err


def filled(path: Path, answers: int) -> None:
    """A store, with a prompt for each answer."""
    with closing(sqlite3.connect(path)) as store, store:
        store.executescript(SCHEMA)
        numbers = range(1, answers + 1)
        store.executemany("INSERT INTO prompts VALUES (?, 'vllm', 'm', '[]', '{}')", [(n,) for n in numbers])
        rows = [(n.to_bytes(32), n, n, 0, '{"text": "x", "finish_reason": "stop"}') for n in numbers]
        store.executemany("INSERT INTO responses VALUES (?, ?, ?, ?, ?)", rows)


def test_a_merge_lets_runs_write_meanwhile_and_ends_on_ctrl_c_with_what_it_has(tmp_path: Path) -> None:
    filled(tmp_path / "large.sqlite", 30_000)

    async def go() -> int:
        async with ResponseStore(tmp_path / "all.sqlite") as whole, ResponseStore(tmp_path / "all.sqlite") as of_a_run:
            merging = asyncio.create_task(whole.take_in(tmp_path / "large.sqlite"))
            await asyncio.sleep(0)
            await of_a_run.put(PROMPT, [answer("x")])
            await of_a_run._writer.write(None)
            assert not merging.done()
            merging.cancel()
            with suppress(asyncio.CancelledError):
                await merging
        with closing(sqlite3.connect(tmp_path / "all.sqlite")) as store:
            return int(store.execute("SELECT count(*) FROM responses JOIN prompts ON id = prompt").fetchone()[0])

    assert 1 < asyncio.run(go()) < 30_000


def test_a_batch_of_a_killed_shard_is_gone_on_with_where_it_is_merged(world: World, command: Command) -> None:
    released: list[bool] = []
    with openai_server(teacher, batches={1: Batch(held=lambda: not released)}) as server:
        config = world.config(server, provider="openai", batch={"poll_s": 0.02, "quiet_s": 0.5}, max_concurrency=None)
        path = written(world, config | {"budget": {"max_wall_s": 2}})
        ended = command("pipeline", "run", "-c", path, "--shard", "0/2", "-o", world.folder / "shard", "-q")
        assert ended.code == ExitCode.BUDGET and server.batches[0]["status"] == "in_progress"
        assert command("merge", world.folder / "shard", "-o", world.folder / "all").code == 0
        released.append(True)
        parse_pipeline(config).run(output_dir=world.folder / "all")
        assert server.counters.requests == 3 * 60, "none was paid for twice"


def test_a_shard_counts_errors_among_its_own_samples(world: World, command: Command) -> None:
    with openai_server(teacher, faults={"Question": status(400, times=None)}) as server:
        path = written(world, world.config(server))
        ended = command("pipeline", "run", "-c", path, "--shard", "0/12", "-o", world.folder, "-q")
    assert "samples failed, more than max_error_rate 0.1 allows" in ended.err


def test_records_that_fail_in_every_shard_stop_none(world: World, command: Command) -> None:
    with world.records.open("a") as records:
        records.writelines(
            f'{{"task_id": "bad-{number}"}}\n' for number in range(3)
        )  # 3 of 64, but of a shard's own 13
    with openai_server(teacher) as server:
        path = written(world, world.config(server))
        ended = command("pipeline", "run", "-c", path, "--shard", "0/6", "-o", world.folder, "-q")
    assert "3 of " in ended.err and "max_error_rate" not in ended.err
    assert ended.code == 5


def test_a_shard_that_is_none_is_refused(world: World, command: Command) -> None:
    path = written(world, {"name": "x", "steps": [{"LoadJsonl": {"path": str(world.records)}}]})
    for wrong in ("3/3", "1", "a/b", "-1/3", "1/3/5"):
        ended = command("pipeline", "run", "-c", path, f"--shard={wrong}", "-o", world.folder / "out")
        assert (ended.code, ended.err) == (2, f"error: --shard {wrong}: four shards are 0/4, 1/4, 2/4 and 3/4\n")
    with pytest.raises(ValueError, match="index 3: 3 shards are numbered from 0 to 2"):
        Shard(index=3, of=3)


def test_a_shard_of_a_shard_is_refused(world: World, command: Command) -> None:
    with openai_server(teacher) as server:
        config = world.config(server)
        config["steps"].insert(3, {"Shard": {"index": 0, "of": 2}})
        ended = command("pipeline", "run", "-c", written(world, config), "--shard", "1/2", "-o", world.folder / "out")
    assert (ended.code, ended.err) == (2, "error: --shard 1/2: Shard makes this shard 0/2; drop one\n")


def test_a_run_says_which_shard_it_was(world: World, command: Command) -> None:
    with openai_server(teacher) as server:
        path = written(world, world.config(server))
        ran = command("pipeline", "run", "-c", path, "--shard", "1/3", "-o", world.folder, "--run-id", "second")
    assert "of other shards" in ran.out
    assert "<span>elsewhere</span>" in (world.folder / "runs/second/report.html").read_text()
    config = yaml.safe_load((world.folder / "runs/second/config.yaml").read_text())
    assert config["steps"][3] == {"Shard": {"name": "Shard", "index": 1, "of": 3}}
    assert read_json(world.folder / "runs/second/manifest.json")["status"] == "complete"


def test_a_shard_names_a_sample_of_its_own_to_look_at(world: World, command: Command) -> None:
    with openai_server(choose({record["instruction"]: [record["gold_sql"]] for record in RECORDS})) as server:
        path = written(world, world.config(server))
        for shard in SHARDS:
            ran = command("pipeline", "run", "-c", path, "--shard", shard, "-o", world.folder, "--run-id", shard[0])
            sample_id = ran.out.split(f"fastdistill explain {shard[0]} ")[1].split()[0]
            assert "status: open" in command("explain", shard[0], sample_id, "-o", world.folder).out
