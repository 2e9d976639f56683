"""What a user may get wrong: one clear message with place and remedy, an exit code of its kind, and no traceback."""

import json
import os
import resource
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill.control.run import Indexes
from fastdistill.core.errors import EnvironmentFault
from fastdistill.data.execution.sandbox import IsolationLevel, available_isolation
from tests.command import Command, Ended
from tests.servers import Server, choose, openai_server
from tests.world import ANSWERS, RECORDS, config, make_database, write_records


@dataclass(frozen=True)
class World:
    """A folder with everything right, of which each test spoils one thing."""

    folder: Path
    server: Server
    records: Path
    database: Path
    command: Command

    @property
    def config(self) -> dict[str, Any]:
        return config(self.server.url, self.records, self.database)

    def arguments(self, config: object = None, *, verb: str = "run") -> list[str]:
        path = self.folder / "pipeline.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config or self.config))
        output = [] if verb == "validate" else ["--quiet", "--output-dir", str(self.folder / "artifacts")]
        return ["pipeline", verb, "-c", str(path), *output]

    def run(self, config: object = None, *, verb: str = "run") -> Ended:
        return self.command(*self.arguments(config, verb=verb))

    def run_as_process(self, limit_blocks: int | None = None) -> Ended:
        command = [sys.executable, "-m", "fastdistill.control.cli", *self.arguments()]
        if limit_blocks is not None:  # 512 or 1024 bytes each: no file may grow beyond
            command = ["sh", "-c", f"ulimit -f {limit_blocks}; exec {shlex.join(command)}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return Ended(done.returncode, done.stdout, done.stderr)

    @property
    def paid(self) -> int:
        return 3 * sum(count for prompt, count in self.server.counters.prompts.items() if "Question:" in prompt)


@pytest.fixture
def world(tmp_path: Path, command: Command) -> Iterator[World]:
    with openai_server(choose(ANSWERS), context=5000) as server:
        yield World(tmp_path, server, write_records(tmp_path), make_database(tmp_path), command)


@pytest.mark.slow
@pytest.mark.parametrize(("output", "code"), [("> /dev/full", 8), ("2> /dev/full", 0), ("<&- >&- 2>&-", 0)])
def test_an_output_that_takes_nothing_costs_no_run(world: World, output: str, code: int) -> None:
    arguments = [argument for argument in world.arguments() if argument != "--quiet"]
    command = [sys.executable, "-m", "fastdistill.control.cli", *arguments]
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(command)} {output}"],
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # buffers are flushed once more at the end
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    told = "error: the output: No space left on device\n"
    assert done.stderr.endswith(told if code else "") and "Traceback" not in done.stderr
    (manifest,) = world.folder.rglob("manifest.json")
    assert json.loads(manifest.read_bytes())["status"] == "complete"


@pytest.mark.slow
def test_who_reads_no_further_is_told_nothing_and_costs_no_run(world: World) -> None:
    arguments = [argument for argument in world.arguments() if argument != "--quiet"]
    command = shlex.join([sys.executable, "-m", "fastdistill.control.cli", *arguments])
    done = subprocess.run(
        ["sh", "-c", f"({command} 2> errors; echo $? > code) | true"], cwd=world.folder, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0 and (world.folder / "code").read_text() == "141\n"
    assert "error" not in (world.folder / "errors").read_text()
    (manifest,) = world.folder.rglob("manifest.json")
    assert json.loads(manifest.read_bytes())["status"] == "complete"


@pytest.mark.slow
def test_what_runs_python_needs_no_open_descriptor(world: World) -> None:
    problem = {"question": "2", "gold": "def f(): return 2", "tests": ["assert f() == 2"]}
    (world.folder / "problems.jsonl").write_text(json.dumps(problem))
    steps = [
        {"LoadJsonl": {"path": str(world.folder / "problems.jsonl")}},
        {"CanonicalizeFields": {"fields": ["question"]}},
    ]
    generate = {"TextGeneration": {"template": "{{ question }}"}}
    gate = {"PythonExecEval": {"gold_field": "gold"}}
    arguments = world.arguments({**world.config, "steps": [*steps, generate, gate]}, verb="run")
    command = shlex.join([sys.executable, "-m", "fastdistill.control.cli", *arguments])
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(IsolationLevel.BUBBLEWRAP not in available_isolation().levels, reason="needs bubblewrap")
def test_a_system_that_can_be_read_only_and_one_folder_to_write_to_are_enough(world: World) -> None:
    folder = str(world.folder)
    system = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--bind", folder, folder]
    command = [*system, "--chdir", "/", sys.executable, "-m", "fastdistill.control.cli", *world.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_more_keys_than_the_disk_has_room_for_are_told_with_the_place() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with closing(Indexes()) as indexes, pytest.raises(EnvironmentFault, match=r"^TMPDIR .* free some space"):
            index = indexes.open("keys")
            for number in range(100_000):
                index.first(f"{number:0100}", "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_named(world: World) -> None:
    ended = world.run_as_process(limit_blocks=0)
    assert ended.code == 8 and "config.yaml: File too large" in ended.err


def test_a_missing_file(world: World) -> None:
    world.records.unlink()
    ended = world.run()
    assert ended.code == 3
    assert str(world.records) in ended.err
    assert world.paid == 0


def test_every_config_error_at_once_with_its_path(world: World) -> None:
    bad = world.config
    bad["steps"][3]["TextGeneration"]["num_generation"] = 2
    bad["steps"][5]["RuleFilter"]["max_chars"] = -1
    bad["steps"].append({"ExportSTF": {}})
    bad["models"]["teacher"]["num_ctx"] = "${NO_SUCH_VARIABLE}"
    bad["requires"] = {}
    ended = world.run(bad, verb="validate")
    assert ended.code == 2
    assert "steps[3].TextGeneration.num_generation: unknown key; did you mean num_generations?" in ended.err
    assert "steps[5].RuleFilter.max_chars: " in ended.err
    assert "steps[10]: ExportSTF is not known; did you mean ExportSFT?" in ended.err
    assert "models.teacher.num_ctx: the environment variable NO_SUCH_VARIABLE is not set" in ended.err
    assert "requires: unknown key; did you mean require?" in ended.err
    assert world.paid == 0


@pytest.mark.parametrize(
    ("text", "place"),
    [("name: x\nname: y\n", ":2:1"), ("name: [x\n", ":2:1"), ("- a\n", "must be a mapping"), ("", "steps: required")],
)
def test_a_config_that_is_not_one(world: World, text: str, place: str) -> None:
    ended = world.run(text, verb="validate")
    assert ended.code == 2
    assert place in ended.err


def test_a_record_without_a_field_that_the_template_needs(world: World) -> None:
    write_records(world.folder, [{**RECORDS[0], "note": "x"}, *RECORDS[1:]])
    needs_note = world.config
    needs_note["steps"][3]["TextGeneration"]["template"] = "Question: {{ note }}"
    ended = world.run(needs_note)
    assert ended.code == 5
    assert "train.jsonl:" in ended.err
    assert "'note' is undefined; the record has: task_id, schema, instruction" in ended.err
    assert world.paid <= 3


def test_one_bad_record_costs_no_other(world: World) -> None:
    lines = world.records.read_bytes().splitlines()
    lines[3] = b'{"task_id": "x", "schema": "caf\xe9"}'
    lines[5] = b'{"task_id": "y", "schema": 1'
    lines[7] = b'{"task_id": "z", "instruction": "no schema"}'
    world.records.write_bytes(b"\n".join(lines) + b"\n")
    ended = world.run_as_process()
    assert ended.code == 5
    assert "3 of 60 samples ended in an error" in ended.err
    assert "train.jsonl:4: not valid UTF-8 (byte 0xe9" in ended.err
    assert "train.jsonl:8: no field schema" in ended.err
    assert world.paid == 57 * 3


def test_the_same_task_id_with_other_content(world: World) -> None:
    write_records(world.folder, [*RECORDS, {**RECORDS[1], "task_id": RECORDS[0]["task_id"]}])
    ended = world.run()
    assert ended.code == 5
    assert "train.jsonl:61: task id 'city-0000' belongs to other content at train.jsonl:1" in ended.err
    assert world.paid == 60 * 3


def test_a_database_that_is_none(world: World) -> None:
    world.database.write_text("hello")
    ended = world.run()
    assert ended.code == 3
    assert f"{world.database}: not a SQLite database" in ended.err
    assert world.paid == 0


def test_a_record_of_ten_megabytes(world: World) -> None:
    huge = {**RECORDS[0], "task_id": "huge", "instruction": "word " * 2_000_000}
    write_records(world.folder, [*RECORDS, huge])
    ended = world.run()
    assert ended.code == 5
    assert "1 of 61 samples ended in an error" in ended.err
    assert "context_too_long" in ended.err
    assert world.paid == 60 * 3


@pytest.mark.parametrize("verb", ["run", "preview"])
def test_an_output_folder_that_is_a_file(world: World, verb: str) -> None:
    *words, _ = world.arguments(verb=verb)
    ended = world.command(*(word for word in words if word != "--quiet"), world.records)
    assert ended.code == 8
    assert f"{world.records}" in ended.err and "choose another --output-dir" in ended.err


def test_an_artifacts_folder_whose_variable_is_empty_is_the_default(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTDISTILL_ARTIFACTS_DIR", "")
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path / 'artifacts'}: no runs here" in world.command("runs", "list").err


def test_an_empty_data_set(world: World) -> None:
    world.records.write_text("\n\n")
    ended = world.run()
    assert ended.code == 3
    assert f"{world.records}: no records" in ended.err


def test_a_full_disk_loses_nothing_that_was_stored(world: World) -> None:
    ended = world.run_as_process(limit_blocks=400)
    assert ended.code == 8
    assert "free some space and run" in ended.err
    paid = world.paid
    assert world.run().code == 0
    # The requests in flight when the disk was full could not be stored; all before were, and none was sent after.
    assert world.paid - 60 * 3 <= 8 * 3
    assert paid > 0


def test_too_many_failures_stop_the_run(world: World) -> None:
    write_records(world.folder, [{"task_id": str(n), "schema": "x"} for n in range(200)])
    ended = world.run()
    assert ended.code == 5
    assert "more than max_error_rate 0.1 allows" in ended.err
    assert "no field instruction" in ended.err


def test_a_wrong_key_and_an_unknown_model(tmp_path: Path, command: Command) -> None:
    records, database = write_records(tmp_path), make_database(tmp_path)
    with openai_server(choose(ANSWERS), api_key="secret") as server:
        world = World(tmp_path, server, records, database, command)
        ended = world.run()
        assert ended.code == 4
        assert "401" in ended.err and "VLLM_API_KEY" in ended.err
    with openai_server(choose(ANSWERS), models=["other"]) as server:
        world = World(tmp_path, server, records, database, command)
        ended = world.run()
        assert ended.code == 4
        assert "other" in ended.err


GOLD = RECORDS[0]["gold_sql"]
FOREVER = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) SELECT count(*) FROM c, city"
NOISE = "\0\x7f\x1b\ufffd" * 500
BAD_SQL = [
    (GOLD, GOLD, "match"),
    (NOISE, GOLD, "sql_error"),
    ("def f(x):\n    return x", GOLD, "sql_error"),
    ("", GOLD, "not_a_query"),
    (f"SELECT '{'x' * 5_000_000}'", GOLD, "sql_error"),
    (FOREVER, GOLD, "limit_ops"),
    ("DROP TABLE city", GOLD, "not_a_query"),
    (GOLD, "SELECT nme FROM city", "gold_invalid"),
    (GOLD, FOREVER, "gold_invalid"),
]
BAD_MATH = [
    (r"\boxed{5}", "5", "match"),
    (NOISE, "5", "no_answer"),
    ("def f(x):\n    return x", "5", "no_answer"),
    ("", "5", "no_answer"),
    ("9" * 5_000_000, "5", "no_answer"),
    (r"\boxed{9^{9^{9^9}}}", "5", "compare_budget"),
    (r"\boxed{\sum_{k=1}^{10000000} \frac{1}{k}}", r"\sqrt{25}", "compare_budget"),
    (r"\boxed{5}", None, "gold_invalid"),
]


@pytest.mark.parametrize("kind", ["sql", "math"])
def test_an_answer_or_a_gold_of_any_kind_ends_as_what_it_is_and_the_run_goes_on(
    tmp_path: Path, kind: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_database(tmp_path)
    gate = {"SQLiteExecEval": {"db_path": "city.db"}} if kind == "sql" else {"MathExecEval": {"limits": {"cpu_s": 0.3}}}
    cases = BAD_SQL if kind == "sql" else BAD_MATH
    records, recording = tmp_path / "train.jsonl", tmp_path / "recorded.jsonl"
    with records.open("w") as asked, recording.open("w") as answered:
        for number, (answer, gold, _) in enumerate(cases):
            asked.write(
                json.dumps({"task_id": str(number), "q": f"{number}?", "gold_sql": gold, "answer": gold}) + "\n"
            )
            answered.write(json.dumps({"key": str(number), "completions": [answer]}) + "\n")
    steps = [{"LoadJsonl": {"path": "train.jsonl"}}, {"CanonicalizeFields": {"fields": ["q"]}}]
    steps += [{"TextGeneration": {"template": "{{ q }}"}}, gate, {"ExportSFT": {}}]
    models = {"teacher": {"provider": "replay", "path": "recorded.jsonl"}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"name": "bad", "models": models, "steps": steps}))
    done = command("pipeline", "run", "-c", "pipeline.yaml", "--quiet", "--output-dir", "out")
    assert (done.code, done.err) == (0, "")
    (ledger,) = (tmp_path / "out").glob("runs/*/ledger.sqlite")
    with closing(sqlite3.connect(ledger)) as database:
        found = database.execute("SELECT reason, outcome FROM verdicts ORDER BY idx").fetchall()
    assert [reason for reason, _ in found] == [reason for *_, reason in cases]
    blamed = {"sql_error", "not_a_query", "limit_ops", "no_answer"}
    assert {reason for reason, outcome in found if outcome == "fail"} == blamed & {reason for reason, _ in found}
    assert {outcome for reason, outcome in found if reason in ("gold_invalid", "compare_budget")} == {"error"}


def test_nobody_listens(world: World) -> None:
    nobody = world.config
    nobody["models"]["teacher"]["base_url"] = "http://127.0.0.1:9"
    ended = world.run(nobody)
    assert ended.code == 4
    assert "vllm serve" in ended.err


def test_the_floor_has_an_exit_code_of_its_own(world: World) -> None:
    demanding = world.config | {"require": {"exec_pass_rate": 0.99}}
    ended = world.run(demanding)
    assert ended.code == 6
    assert "below the floor: exec_pass_rate" in ended.err
    (manifest,) = (world.folder / "artifacts").glob("runs/*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "below_floor"
