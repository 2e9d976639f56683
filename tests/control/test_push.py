"""Pushing a data set to a stand-in for the Hub, which answers as its HTTP API does."""

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from fastdistill.control.config import parse_pipeline
from tests.servers import choose, openai_server
from tests.world import ANSWERS, RECORDS, config, make_database, write_records


@dataclass
class Hub:
    """What was committed, by path. It takes one token, and wants every file in the commit itself."""

    url: str = ""
    created: dict[str, object] = field(default_factory=dict)
    committed: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/api/repos/create", self._create)
        app.router.add_post("/api/validate-yaml", self._validate)
        app.router.add_post("/api/datasets/{owner}/{name}/preupload/main", self._preupload)
        app.router.add_post("/api/datasets/{owner}/{name}/commit/main", self._commit)
        return app

    async def _create(self, request: web.Request) -> web.Response:
        if request.headers.get("authorization") != "Bearer hf_right":
            return web.json_response({"error": "Invalid credentials"}, status=401)
        self.created = await request.json()
        return web.json_response({"url": f"{self.url}/datasets/me/cities"})

    async def _validate(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def _preupload(self, request: web.Request) -> web.Response:
        files = (await request.json())["files"]
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        return web.json_response({"files": modes})

    async def _commit(self, request: web.Request) -> web.Response:
        for line in (await request.read()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.messages.append(entry["value"]["summary"])
            else:
                self.committed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = "a" * 40
        url = f"{self.url}/datasets/me/cities/commit/{oid}"
        return web.json_response({"success": True, "commitOid": oid, "commitUrl": url})


@contextmanager
def listening() -> Iterator[Hub]:
    hub, loop, up = Hub(), asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(hub.app())

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        up.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    up.wait(10)
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    with openai_server(choose(ANSWERS)) as server:
        made = config(server.url, write_records(folder, RECORDS[:20]), make_database(folder))
        parse_pipeline(made).run(output_dir=folder / "artifacts", run_id="done")
    return folder / "artifacts"


def push(root: Path, url: str, *arguments: str, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastdistill.control.cli", "push", "done", "--repo", "me/cities", *arguments]
    environment = os.environ | {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [*command, "--output-dir", str(root)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_whole_data_set_arrives_in_one_commit(root: Path) -> None:
    with listening() as hub:
        done = push(root, hub.url, "--private")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/datasets/me/cities/commit/" in done.stdout
    dist = root / "runs" / "done" / "dist"
    written = {p.relative_to(dist).as_posix(): p.read_bytes() for p in dist.rglob("*") if p.is_file()}
    assert hub.committed == written
    assert hub.messages == ["FastDistill run done"]
    assert (hub.created["type"], hub.created["visibility"]) == ("dataset", "private")


def test_a_wrong_token_is_told_with_its_remedy(root: Path) -> None:
    with listening() as hub:
        done = push(root, hub.url, token="hf_wrong")
    assert (done.returncode, hub.committed) == (2, {})
    assert "set HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_wrong" not in done.stderr


def test_a_hub_that_is_not_there(root: Path) -> None:
    done = push(root, "http://127.0.0.1:9")
    assert done.returncode == 8
    assert "is it reachable" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_was_changed_is_not_pushed(root: Path) -> None:
    rows = root / "runs" / "done" / "dist" / "sft" / "train.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before + b"{}\n")
    try:
        with listening() as hub:
            done = push(root, hub.url)
    finally:
        rows.write_bytes(before)
    assert (done.returncode, hub.committed) == (3, {})
    assert f"{rows}: not the file that was written" in done.stderr
