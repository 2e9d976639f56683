"""Processes killed with -9 at random moments: nothing that was stored is asked for again, and nothing is lost."""

import asyncio
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fastdistill.control.store import ResponseStore
from tests.servers import Server, choose, openai_server
from tests.world import ANSWERS, RECORDS, make_database, pipeline_config, write_records

KILLS = 12


@contextmanager
def started(config: Path, output: Path) -> "Iterator[subprocess.Popen[str]]":
    """The command at work in a process of its own, killed at the end if it still runs."""
    command = [sys.executable, "-m", "fastdistill.control.cli", "pipeline", "run", "--quiet"]
    arguments = ["--config", str(config), "--output-dir", str(output)]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(config: Path, output: Path) -> None:
    with started(config, output) as process:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def data_set(output: Path) -> dict[str, str]:
    """sha256 of every file of the one data set under `output`."""
    (dist,) = output.glob("runs/*/dist")
    files = sorted(path for path in dist.rglob("*") if path.is_file())
    return {str(path.relative_to(dist)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(output: Path) -> int:
    """Answers that the response store would give back."""

    async def count() -> int:
        async with ResponseStore(output / "responses.sqlite") as store:
            with closing(sqlite3.connect(store.path)) as connection:
                return int(connection.execute("SELECT count(*) FROM responses").fetchone()[0])

    output.mkdir(exist_ok=True)
    return asyncio.run(count())


@pytest.mark.slow
def test_a_run_killed_at_random_moments_pays_for_nothing_twice_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    draws = len(RECORDS) * 3
    records, database = write_records(tmp_path), make_database(tmp_path)
    with openai_server(choose(ANSWERS), latency=0.02, slots=8) as server:
        config = pipeline_config(tmp_path, server.url, records, database)
        undisturbed = tmp_path / "undisturbed"
        begun = time.monotonic()
        finish(config, undisturbed)
        duration = time.monotonic() - begun
        expected = data_set(undisturbed)
        assert stored(undisturbed) == draws

        dice = random.Random(7)
        kills = runs = 0
        output = tmp_path / f"killed-{runs}"
        while kills < KILLS:
            before, answered, begun = stored(output), answers(server), time.monotonic()
            with started(config, output) as process:
                try:
                    code = process.wait(timeout=dice.uniform(0.3, 1.0) * duration)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    # What the server answered and the store has not: in the socket, or in the process.
                    assert 0 <= answers(server) - answered - (stored(output) - before) <= 8 * 3
                    continue
            assert code == 0
            # The machine may have been busy when the undisturbed run was: then no kill would ever come in time.
            duration = min(duration, 2 * (time.monotonic() - begun))
            assert stored(output) == draws
            assert answers(server) - answered == draws - before, "what was stored was asked for again"
            assert data_set(output) == expected
            runs += 1
            output = tmp_path / f"killed-{runs}"
        finish(config, output)
        assert data_set(output) == expected


def answers(server: Server) -> int:
    """Answers given so far, three to a request, without the probe's."""
    return 3 * sum(count for prompt, count in server.counters.prompts.items() if "Question:" in prompt)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_in_flight_and_says_how_to_go_on(tmp_path: Path) -> None:
    records, database = write_records(tmp_path), make_database(tmp_path)
    with openai_server(choose(ANSWERS), latency=0.3, slots=8) as server:
        config = pipeline_config(tmp_path, server.url, records, database)
        output = tmp_path / "artifacts"
        with started(config, output) as process:
            while answers(server) < 24 or not server.counters.in_flight:  # the first eight are done, others under way
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, message = process.communicate()
        assert process.returncode == 130
        assert "run the same command again" in message
        assert "Traceback" not in message
        assert stored(output) == answers(server) > 24, "answers in flight were paid for, and are kept"
        (manifest,) = output.glob("runs/*/manifest.json")
        assert json.loads(manifest.read_text())["status"] == "interrupted"
        finish(config, output)
        assert answers(server) == len(RECORDS) * 3


@pytest.mark.slow
def test_a_third_ctrl_c_ends_what_waits_for_a_store_that_is_held_and_costs_no_answer(tmp_path: Path) -> None:
    records, database = write_records(tmp_path), make_database(tmp_path)
    with openai_server(choose(ANSWERS), latency=1.0, slots=8) as server:
        config = pipeline_config(tmp_path, server.url, records, database)
        output = tmp_path / "artifacts"
        with started(config, output) as process:
            while not answers(server):
                time.sleep(0.01)
            with closing(sqlite3.connect(output / "responses.sqlite", timeout=60, isolation_level=None)) as holder:
                holder.execute("BEGIN IMMEDIATE")
                before = answers(server)
                while answers(server) == before:
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
                while server.counters.in_flight:
                    time.sleep(0.01)
                while process.poll() is None:
                    time.sleep(0.5)  # by when the run waits for the store
                    process.send_signal(signal.SIGINT)
            _, message = process.communicate()
        assert process.returncode == -signal.SIGINT and "Traceback" not in message
        assert 0 <= answers(server) - stored(output) <= 8 * 3, "what was in flight may be lost, and nothing else"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_asks_a_command_to_end_before_its_run_has_begun_is_answered(
    tmp_path: Path, number: signal.Signals
) -> None:
    config = tmp_path / "pipeline.yaml"
    os.mkfifo(config)
    with started(config, tmp_path) as process, config.open("w"):  # which opens when the command does, and waits
        process.send_signal(number)
        _, message = process.communicate()
    assert process.returncode == 130
    assert message == "error: interrupted; what was paid for is stored: run the same command again to go on\n"


@pytest.mark.slow
def test_a_terminal_that_has_gone_changes_no_exit_code(tmp_path: Path) -> None:
    config = tmp_path / "pipeline.yaml"
    os.mkfifo(config)
    screen, terminal = os.openpty()
    command = [sys.executable, "-m", "fastdistill.control.cli", "pipeline", "run", "--config", str(config)]
    with os.fdopen(terminal, "w") as stderr, subprocess.Popen(command, stderr=stderr) as process, config.open("w"):
        os.close(screen)
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 130


@pytest.mark.slow
def test_what_nohup_keeps_from_a_command_does_not_end_it(tmp_path: Path) -> None:
    records, database = write_records(tmp_path), make_database(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with openai_server(choose(ANSWERS), latency=0.1) as server:
            config = pipeline_config(tmp_path, server.url, records, database)
            with started(config, tmp_path / "artifacts") as process:
                while not answers(server):
                    time.sleep(0.01)
                process.send_signal(signal.SIGHUP)
                assert process.wait() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_two_runs_at_the_same_folder_are_told_apart_by_one_clear_message(tmp_path: Path) -> None:
    records, database = write_records(tmp_path), make_database(tmp_path)
    told = threading.Event()
    with openai_server(choose(ANSWERS), latency=lambda _: 0.0 if told.is_set() else 1.0, slots=4) as server:
        config = pipeline_config(tmp_path, server.url, records, database)
        with started(config, tmp_path / "artifacts") as first:
            while answers(server) < 4:
                time.sleep(0.01)
            with started(config, tmp_path / "artifacts") as second:
                _, message = second.communicate()
            told.set()  # until then the first has enough to do
            assert second.returncode == 8
            assert f"process {first.pid}" in message
            assert "--run-id" in message
            assert first.wait() == 0
