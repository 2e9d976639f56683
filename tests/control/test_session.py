"""Whole runs over a small world, from Python and from the command line, and what they leave behind."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from msgspec.structs import replace
from pydantic import ValidationError

import fastdistill
from fastdistill import (
    CanonicalizeFields,
    Deduplicate,
    LoadJsonl,
    MathExecEval,
    Pipeline,
    RuleFilter,
    RunResult,
    TextGeneration,
)  # fmt: skip
from fastdistill.control.config import parse_pipeline
from fastdistill.control.ledger import read_samples
from fastdistill.control.run import ActiveRun
from fastdistill.control.session import Interrupted
from fastdistill.core.errors import EnvironmentFault
from fastdistill.core.step import Context, SampleStep, StreamStep
from fastdistill.core.types import Sample
from tests.command import Command
from tests.servers import Call, Server, choose, openai_server, status
from tests.world import ANSWERS, RECORDS, config, make_database, write_records


def teacher(call: Call, index: int) -> str:
    """An answer that depends on the prompt and on seed + index: the same draw, asked for in whatever way."""
    answers = next((texts for key, texts in ANSWERS.items() if key in call.prompt), ["red"])
    drawn = hashlib.sha256(f"{call.prompt} {(call.seed or 0) + index}".encode()).digest()
    return answers[drawn[0] % len(answers)]


def asked(server: Server) -> int:
    """Requests that were answered, without the probe's."""
    return sum(count for prompt, count in server.counters.prompts.items() if "Question:" in prompt)


def data_set(result: RunResult) -> dict[str, str]:
    files = sorted(path for path in result.dataset.rglob("*") if path.is_file())
    return {str(path.relative_to(result.dataset)): sha256(path) for path in files}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class World:
    folder: Path
    records: Path
    database: Path

    def config(self, server: Server, **teacher: Any) -> dict[str, Any]:
        made = config(server.url, self.records, self.database)
        made["models"]["teacher"] |= teacher
        return made

    def run(self, server: Server, output: str, **teacher: Any) -> RunResult:
        return parse_pipeline(self.config(server, **teacher)).run(output_dir=self.folder / output)


@dataclass(frozen=True)
class Finished(World):
    """A run that is done, and the server that it asked."""

    server: Server
    result: RunResult
    config_file: Path

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"


def world_in(folder: Path) -> World:
    return World(folder, write_records(folder, [*RECORDS, {**RECORDS[7], "task_id": "again"}]), make_database(folder))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return world_in(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    world = world_in(tmp_path_factory.mktemp("finished"))
    with openai_server(teacher) as server:
        made = world.config(server, max_concurrency=1)
        path = world.folder / "pipeline.yaml"
        path.write_text(yaml.safe_dump(made))
        result = parse_pipeline(made).run(output_dir=world.folder / "artifacts")
        yield Finished(world.folder, world.records, world.database, server, result, path)


# --- the same data set, however it was made ---


@pytest.mark.parametrize(
    ("habit", "teacher_config"),
    [({}, {"max_concurrency": 32}), ({"honours_n": False}, {}), ({"honours_n": 2}, {})],
    ids=["32 at a time", "n ignored", "n refused"],
)
def test_the_same_draws_give_the_same_bytes(
    finished: Finished, tmp_path: Path, habit: dict[str, Any], teacher_config: dict[str, Any]
) -> None:
    jitter: Callable[[Call], float] = lambda call: call.digest(0) % 7 / 500  # noqa: E731
    with openai_server(teacher, latency=jitter, **habit) as server:
        again = parse_pipeline(finished.config(server, **teacher_config)).run(output_dir=tmp_path / "again")
    assert data_set(again) == data_set(finished.result)
    assert again.run_id == finished.result.run_id
    assert again.manifest["content_sha256"] == finished.result.manifest["content_sha256"]


def test_a_second_run_pays_nothing_and_changes_nothing(finished: Finished, tmp_path: Path) -> None:
    shutil.copy(finished.artifacts / "responses.sqlite", tmp_path)
    requests = finished.server.counters.requests
    for _ in range(2):
        again = parse_pipeline(finished.config(finished.server)).run(output_dir=tmp_path)
        assert finished.server.counters.requests == requests, "not even a probe"
        assert data_set(again) == data_set(finished.result)
        (model,) = again.timing["models"].values()
        assert (model["requests"], model["answers_paid"], model["answers_from_store"]) == (0, 0, 180)


def test_a_changed_threshold_costs_no_request_and_has_a_run_of_its_own(finished: Finished, tmp_path: Path) -> None:
    shutil.copy(finished.artifacts / "responses.sqlite", tmp_path)
    requests = finished.server.counters.requests
    stricter = finished.config(finished.server)
    stricter["steps"][5]["RuleFilter"]["max_chars"] = 64
    result = parse_pipeline(stricter).run(output_dir=tmp_path)
    assert finished.server.counters.requests == requests
    assert result.run_id != finished.result.run_id
    assert 0 < result.quality["samples"]["accepted"] < finished.result.quality["samples"]["accepted"]


# --- the proofs ---


def test_the_manifest_tells_the_truth_about_every_file(finished: Finished) -> None:
    manifest = json.loads((finished.result.path / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["exit_code"] == 0
    assert manifest == json.loads(json.dumps(finished.result.manifest))
    on_disk = {path.relative_to(finished.result.path).as_posix() for path in finished.result.dataset.rglob("*.*")}
    assert {entry["path"] for entry in manifest["outputs"]} == on_disk
    for entry in manifest["outputs"] + manifest["inputs"]:
        path = finished.result.path / entry["path"]
        assert (entry["bytes"], entry["sha256"]) == (path.stat().st_size, sha256(path))
    assert {Path(entry["path"]).name for entry in manifest["inputs"]} == {"train.jsonl", "city.db"}
    (served,) = manifest["models"]["teacher"]["served"]
    assert (served["model"], served["answers"]) == ("teacher", 180)


def test_the_checksums_are_those_of_the_files(finished: Finished) -> None:
    lines = (finished.result.dataset / "checksums.txt").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert listed == {name: digest for name, digest in data_set(finished.result).items() if name != "checksums.txt"}


def test_the_quality_report_adds_up(finished: Finished) -> None:
    quality = json.loads((finished.result.path / "quality_report.json").read_text())
    samples, candidates = quality["samples"], quality["candidates"]
    assert samples["read"] == 61
    assert samples["read"] == samples["duplicates"] + samples["failed"] + samples["completed"]
    assert (samples["duplicates"], samples["failed"]) == (1, 0)
    assert candidates["generated"] == 180 == sum(candidates.get(outcome, 0) for outcome in ("pass", "fail", "error"))
    assert candidates["selected"] == samples["accepted"] == len(rows(finished.result))
    stages = {stage["step"]: stage for stage in quality["stages"]}
    assert [stage["step"] for stage in quality["stages"]] == [
        next(iter(step)) for step in finished.config(finished.server)["steps"]
    ]
    rules, execution = stages["RuleFilter"]["candidates"], stages["SQLiteExecEval"]["candidates"]
    assert rules["judged"] == 180
    assert execution["judged"] == rules["pass"] + rules["error"]
    assert execution["pass"] == candidates["pass"]
    for before, after in zip(quality["stages"], quality["stages"][1:], strict=False):
        assert before["samples_kept"] == after["samples_in"]
    for stage in quality["stages"]:
        assert stage["samples_in"] - stage["samples_kept"] == sum(stage["samples_rejected"].values())


def test_the_timing_report_counts_what_was_sent(finished: Finished) -> None:
    timing = json.loads((finished.result.path / "timing_report.json").read_text())
    generation = timing["steps"]["TextGeneration"]
    assert set(generation["busy"]) == {"count", "total_s", "p50_s", "p90_s", "p95_s", "p99_s", "max_s"}
    assert set(timing["steps"]) == {
        "TextGeneration", "CleanSqlOutput", "RuleFilter", "SQLiteExecEval", "ScoreFromExecEval", "SelectBest",
    }  # fmt: skip


def test_every_row_is_an_answer_that_the_gates_passed(finished: Finished) -> None:
    gold = {record["task_id"]: record["gold_sql"] for record in RECORDS}
    assert rows(finished.result)
    for row in rows(finished.result):
        assert row["messages"][-1] == {"role": "assistant", "content": gold[row["fd_task_id"]]}
        assert {gate["outcome"] for gate in row["fd_gates"]} == {"pass"}


def rows(result: RunResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.dataset / "sft" / "train.jsonl").read_text().splitlines()]


def test_one_prompt_that_breaks_the_server_is_counted_apart(world: World) -> None:
    poison = {RECORDS[5]["instruction"]: status(500, times=None)}
    with openai_server(teacher, faults=poison) as server:
        result = world.run(server, "artifacts", max_retries=1)
    assert result.exit_code == 5
    samples = result.quality["samples"]
    assert (samples["read"], samples["failed"], samples["completed"]) == (61, 1, 59)
    (failure,) = result.quality["failures"]
    assert (failure["step"], failure["reason"], failure["count"]) == ("TextGeneration", "server_error", 1)
    assert "CUDA" in failure["examples"][0] or "500" in failure["examples"][0]


def test_a_run_of_which_no_answer_could_be_judged_does_not_pass_for_done(world: World) -> None:
    with openai_server(teacher) as server:
        gates = (RuleFilter(max_chars=200), MathExecEval(gold_field="gold"))
        result = quick(server, world.records, *gates).run(output_dir=world.folder / "artifacts")
    assert result.exit_code == 5
    said = result.manifest["message"].splitlines()
    assert said[0].startswith("no sample is accepted, and 60 of 61 could not be judged")
    assert said[1:] == ["MathExecEval: gold_invalid 60"]


def test_a_run_that_is_stopped_accounts_for_every_record_that_it_took(world: World) -> None:
    def script(call: Call, index: int) -> str:
        if asked(server) == 3 and index == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return teacher(call, index)

    with openai_server(script) as server, pytest.raises(Interrupted):
        world.run(server, "artifacts", max_concurrency=1)
    (folder,) = (world.folder / "artifacts" / "runs").iterdir()
    samples = json.loads((folder / "quality_report.json").read_text())["samples"]
    assert samples["read"] == len(list(read_samples(folder / "ledger.sqlite")))
    assert samples["skipped"] > 0
    assert samples["read"] == samples["duplicates"] + samples["failed"] + samples["skipped"] + samples["completed"]


class Interrupting(SampleStep):
    """Asks for the end of the run at the eleventh sample, by Ctrl-C."""

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        if sample.index == 10:
            os.kill(os.getpid(), signal.SIGINT)
        if sample.index >= 10:
            await cast(ActiveRun, ctx).pause(60)
        return sample


def test_a_run_that_is_stopped_while_it_asks_nobody_does_not_pass_for_complete(tmp_path: Path) -> None:
    load = LoadJsonl(rows=tuple({"question": str(at)} for at in range(500)))
    made = Pipeline(name="stopped", steps=(load, CanonicalizeFields(fields=("question",)), Interrupting()))
    with pytest.raises(Interrupted):
        made.run(output_dir=tmp_path)


def test_a_notebook_that_is_interrupted_leaves_no_run_at_work_behind_it(tmp_path: Path) -> None:
    load = LoadJsonl(rows=tuple({"question": str(at)} for at in range(500)))
    made = Pipeline(name="stopped", steps=(load, CanonicalizeFields(fields=("question",)), Interrupting()))

    async def cell() -> None:
        made.run(output_dir=tmp_path)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="run the same command again"):
        asyncio.run(cell())
    assert "fastdistill" not in [thread.name for thread in threading.enumerate()]
    assert signal.getsignal(signal.SIGINT) is before


def test_times_of_nanoseconds_are_no_end_of_a_run(tmp_path: Path) -> None:
    moments, spans = pa.array([10**18 + 1000], pa.timestamp("ns", "UTC")), pa.array([1000], pa.duration("ns"))
    pq.write_table(pa.table({"question": ["When?"], "at": moments, "within": spans}), tmp_path / "t.parquet")
    steps = (LoadJsonl(path=tmp_path / "t.parquet"), CanonicalizeFields(fields=("question",)), Idle())
    result = Pipeline(name="times", steps=steps).run(output_dir=tmp_path)
    (sample,) = read_samples(result.path / "ledger.sqlite")
    assert str(sample.record["at"]).startswith("2001-09-09")


class Idle(SampleStep):
    async def run(self, sample: Sample, ctx: Context) -> Sample:
        return sample


class InterruptingTheExport(StreamStep):
    """Asks for the end of the run while the exports pull; a sample takes long enough for the loop to have its turn."""

    signal: int

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        for sample in samples:
            if sample.index == 10:
                os.kill(os.getpid(), self.signal)
            time.sleep(0.01)
            yield sample


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exports_end_where_the_run_is_asked_to(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    load = LoadJsonl(rows=tuple({"question": str(at)} for at in range(100)))
    steps = (load, CanonicalizeFields(fields=("question",)), InterruptingTheExport(signal=number))
    with pytest.raises(Interrupted):
        Pipeline(name="stopped", steps=steps).run(output_dir=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    assert not (folder / "dist").exists()
    assert signal.getsignal(number) is before


def test_a_server_that_says_nothing_at_first_contact_is_not_waited_for_once_the_run_is_to_end(world: World) -> None:
    calls: list[Call] = []

    def latency(call: Call) -> float:
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(call)
        return 30.0

    with openai_server(teacher, latency=latency) as server:
        with pytest.raises(Interrupted):
            world.run(server, "artifacts")
        assert server.counters.answered == 0


@pytest.mark.parametrize("group", [0, 1])
def test_what_stands_between_two_groups_of_sample_steps_is_counted_where_a_run_is_stopped(
    tmp_path: Path, group: int
) -> None:
    load = LoadJsonl(rows=tuple({"question": str(at), "gold": str(at)} for at in range(500)))
    first, second = (Interrupting(), Idle()) if group == 0 else (Idle(), Interrupting())
    steps = (load, CanonicalizeFields(fields=("question",)), first, Deduplicate(fields=("gold",)), second)
    with pytest.raises(Interrupted):
        Pipeline(name="stopped", steps=steps).run(output_dir=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    quality = json.loads((folder / "quality_report.json").read_text())
    samples = quality["samples"]
    assert samples["read"] == len(list(read_samples(folder / "ledger.sqlite"))) > 10
    assert (samples["completed"] > 10) == (group == 1)
    assert samples["skipped"] == samples["read"] - samples["completed"] > 0
    kept = {stage["step"]: stage["samples_kept"] for stage in quality["stages"]}
    assert kept[first.name or type(first).__name__] == samples["read"]
    assert kept["Deduplicate"] == samples["completed"]


class WrongType(SampleStep):
    async def run(self, sample: Sample, ctx: Context) -> Sample:
        return replace(sample, source=cast(Any, 5))


def test_a_ledger_that_can_not_be_read_back_leaves_reports_that_say_so(tmp_path: Path) -> None:
    load = LoadJsonl(rows=({"question": "1"}, {"question": "2"}))
    steps = (load, CanonicalizeFields(fields=("question",)), WrongType(), Deduplicate(), Idle())
    with pytest.raises(EnvironmentFault, match="mend that step"):
        Pipeline(name="wrong", steps=steps).run(output_dir=tmp_path)
    (manifest,) = tmp_path.glob("runs/*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "failed"


class Killing(SampleStep):
    """Ends the run at once, by Ctrl-C and Ctrl-C again."""

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        os.kill(os.getpid(), signal.SIGINT)
        await cast(ActiveRun, ctx).pause(60)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
        return sample


class InterruptingTheEnd(SampleStep):
    """Ctrl-C, once, as soon as the run winds down by itself; `in_flight` says how many requests were."""

    in_flight: ClassVar[list[asyncio.Task[int]]] = []

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        if sample.index == 0:
            self.in_flight[:] = [asyncio.create_task(self._interrupt(cast(ActiveRun, ctx)))]
        return sample

    async def _interrupt(self, run: ActiveRun) -> int:
        await run.pause(60)
        os.kill(os.getpid(), signal.SIGINT)
        return run.models["teacher"].meter.in_flight


@pytest.mark.parametrize(
    "end", [{"target": {"accepted": 1}}, {"budget": {"max_tokens": 2_500, "max_wall_s": 1}}], ids=["target", "budget"]
)
def test_ctrl_c_while_a_run_winds_down_lets_the_answers_come_home(world: World, end: Mapping[str, Any]) -> None:
    write_records(world.folder, RECORDS[:8])
    first = RECORDS[0]["instruction"]

    ended: list[bool] = []

    def latency(call: Call) -> float:
        if "Question:" not in call.prompt or ended:
            return 0.0
        return 0.5 if first in call.prompt else 2.5  # by when all have been sent

    with openai_server(teacher, latency=latency) as server:
        with pytest.raises(Interrupted):
            quick(server, world.records, InterruptingTheEnd(), **end).run(output_dir=world.folder / "artifacts")
        (in_flight,) = InterruptingTheEnd.in_flight
        assert in_flight.result() > 1
        ended.append(True)
        assert asked(server) == 1 + in_flight.result()
        quick(server, world.records).run(output_dir=world.folder / "artifacts")
    assert asked(server) == len({record["instruction"] for record in RECORDS[:8]}), "what came home is not asked again"


def test_the_reports_of_an_earlier_run_do_not_pass_for_those_of_one_that_was_killed(tmp_path: Path) -> None:
    steps = (LoadJsonl(rows=({"question": "1"},)), CanonicalizeFields(fields=("question",)))
    earlier = Pipeline(name="earlier", steps=steps).run(output_dir=tmp_path, run_id="same")
    assert (earlier.path / "quality_report.json").exists()
    with pytest.raises(asyncio.CancelledError):
        Pipeline(name="killed", steps=(*steps, Killing())).run(output_dir=tmp_path, run_id="same")
    left = {path.name for path in earlier.path.iterdir()}
    assert not left & {"quality_report.json", "timing_report.json", "report.html"}
    assert json.loads((earlier.path / "manifest.json").read_text())["status"] == "running"


def test_a_stream_step_among_the_gates_leaves_the_counts_right(world: World) -> None:
    with openai_server(teacher) as server:
        made = world.config(server)
        made["steps"][6:6] = [{"Deduplicate": {"fields": ["gold_sql"]}}]
        result = parse_pipeline(made).run(output_dir=world.folder / "artifacts")
    assert result.quality["samples"]["read"] == 61
    assert result.quality["candidates"]["generated"] == 180


def test_a_sample_that_the_export_leaves_out_is_counted_once(world: World) -> None:
    write_records(world.folder, [{k: v for k, v in record.items() if k != "db_id"} for record in RECORDS[:20]])
    with openai_server(teacher) as server:
        made = world.config(server)
        made["max_error_rate"] = 1
        made["steps"][-1] = {"ExportSFT": {"validation": 0.2, "group_by": "db_id"}}
        result = parse_pipeline(made).run(output_dir=world.folder / "artifacts")
    samples = result.quality["samples"]
    assert samples["failed"] > 0
    assert (samples["read"], samples["failed"] + samples["completed"], samples["accepted"]) == (20, 20, 0)


# --- Pipeline, from Python ---


def quick(server: Server, records: Path, *more: Any, **fields: Any) -> Pipeline:
    """A pipeline without a database."""
    return Pipeline(
        name="quick",
        models={"teacher": {"provider": "vllm", "model": "teacher", "base_url": server.url}},
        steps=(
            LoadJsonl(path=records),
            CanonicalizeFields(fields=("schema", "instruction")),
            Deduplicate(),
            TextGeneration(template="Question: {{ instruction }}"),
            *more,
        ),
        **fields,
    )


def test_a_pipeline_runs_inside_a_running_event_loop(world: World) -> None:
    async def cell(server: Server) -> RunResult:
        await asyncio.sleep(0)
        return quick(server, world.records, RuleFilter()).run(output_dir=world.folder / "artifacts")

    with openai_server(teacher) as server:
        assert asyncio.run(cell(server)).exit_code == 0


def test_an_error_inside_a_running_event_loop_is_the_same_error(world: World) -> None:
    world.records.unlink()

    async def cell(server: Server) -> None:
        with pytest.raises(Exception, match="there is no such file"):
            quick(server, world.records).run(output_dir=world.folder / "artifacts")

    with openai_server() as server:
        asyncio.run(cell(server))


def test_repeated_steps_are_numbered_and_names_of_your_own_stay() -> None:
    steps = (RuleFilter(), RuleFilter(name="short", max_chars=9), RuleFilter(), RuleFilter(name="RuleFilter#2"))
    pipeline = Pipeline(name="names", steps=(LoadJsonl(rows=({},)), CanonicalizeFields(fields=("a",)), *steps))
    assert [step.name for step in pipeline.steps[2:]] == ["RuleFilter", "short", "RuleFilter#3", "RuleFilter#2"]


def test_repeated_gates_all_judge_and_are_reported_apart(world: World) -> None:
    with openai_server(teacher) as server:
        gates = (RuleFilter(max_chars=200), RuleFilter(max_chars=70), RuleFilter(name="tiny", max_chars=20))
        floor = {"pass_rate": {"RuleFilter#2": 0.0}}
        result = quick(server, world.records, *gates, require=floor).run(output_dir=world.folder / "artifacts")
    judged = [stage["candidates"] for stage in result.quality["stages"] if "candidates" in stage]
    assert [gate["judged"] for gate in judged] == [60, judged[0]["pass"], judged[1]["pass"]]
    assert judged[0]["pass"] > judged[1]["pass"] > judged[2]["pass"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name"),
        ({"steps": ()}, "steps"),
        ({"models": {}}, r"steps\[2\]\.TextGeneration: 'teacher' is not under models: \(none\)"),
        ({"models": {"teacher": {"provider": "vlm", "model": "m"}}}, "did you mean vllm"),
        ({"models": {"teacher": {"provider": "vllm", "model": "m", "timeout": -1}}}, "timeout"),
        (
            {"require": {"pass_rate": {"Rules": 0.5}}},
            r"require\.pass_rate\.Rules: there is no gate 'Rules'; there are: none",
        ),
        ({"max_error_rate": 2}, "max_error_rate"),
        ({"models": {"teacher": {"provider": "vllm", "model": "m", "base_url": []}}}, "base_url: the list is empty"),
        (
            {"models": {"teacher": {"provider": "vllm", "model": "m", "tokens_per_minute": 100}}},
            r"max_tokens: 512 is more than models\.teacher\.tokens_per_minute \(100\)",
        ),
        ({"step": ()}, "step"),
        ({"steps": (CanonicalizeFields(fields=("a",)),)}, r"steps\[0\]\.CanonicalizeFields: brings no records"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_when_the_pipeline_is_built(change: Mapping[str, Any], message: str) -> None:
    right: dict[str, Any] = {
        "name": "right",
        "models": {"teacher": {"provider": "vllm", "model": "m"}},
        "steps": (LoadJsonl(rows=({},)), CanonicalizeFields(fields=("a",)), TextGeneration(template="{{ a }}")),
    }
    Pipeline(**right)
    with pytest.raises(ValidationError, match=message):
        Pipeline(**{**right, **change})


def test_a_sample_step_needs_samples_with_an_id() -> None:
    with pytest.raises(ValidationError, match="RuleFilter: CanonicalizeFields must come before it"):
        Pipeline(name="a", steps=(LoadJsonl(path=Path("a.jsonl")), RuleFilter()))


@pytest.mark.parametrize("run_id", ["../outside", "a/b", "", "."])
def test_a_run_id_that_leaves_the_folder_of_runs_is_refused(world: World, run_id: str) -> None:
    with openai_server() as server, pytest.raises(Exception, match="run_id"):
        quick(server, world.records).run(output_dir=world.folder / "artifacts", run_id=run_id)


THIRD_PARTY = '''
from fastdistill import Gate
from fastdistill.core.types import Outcome

class NoStar(Gate):
    """Fails answers that select everything."""

    word: str = "*"

    async def judge(self, candidate, sample, ctx):
        found = self.word in candidate.answer
        return self.verdict(Outcome.FAIL if found else Outcome.PASS, "star" if found else "ok")
'''


def test_a_third_party_step_comes_by_entry_point(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site = world.folder / "site"
    info = site / "nostar-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "nostar_plugin.py").write_text(THIRD_PARTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nostar\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastdistill.steps]\nNoStar = nostar_plugin:NoStar\n")
    monkeypatch.syspath_prepend(str(site))
    with openai_server(teacher) as server:
        made = world.config(server)
        made["steps"][5:] = [{"NoStar": {"word": "name"}}]
        result = parse_pipeline(made).run(output_dir=world.folder / "artifacts")
        stage = result.quality["stages"][-1]
        assert (stage["type"], stage["candidates"]["judged"]) == ("NoStar", 180)
        assert stage["candidates"]["reasons"]["star"] == stage["candidates"]["fail"] > 0
        made["steps"][5] = {"NoStars": {}}
        with pytest.raises(Exception, match="NoStars is not known; did you mean NoStar"):
            parse_pipeline(made)


# --- the command line ---


def test_validate_says_what_would_run(finished: Finished, command: Command) -> None:
    ended = command("pipeline", "validate", "-c", finished.config_file)
    assert (ended.code, ended.out) == (
        0, f"{finished.config_file}: valid; 10 steps, run id {finished.result.run_id}\n",
    )  # fmt: skip


def test_info_shows_the_resolved_pipeline_and_its_folder(finished: Finished, command: Command) -> None:
    ended = command("pipeline", "info", "-c", finished.config_file, "-o", finished.artifacts)
    assert ended.code == 0
    shown = yaml.safe_load(ended.out.split("max_error_rate: ")[0])
    assert shown["models"]["teacher"]["model"] == "teacher"
    assert shown["steps"][3]["TextGeneration"]["num_generations"] == 3
    for step in parse_pipeline(finished.config(finished.server)).steps:
        assert step.fingerprint in ended.out
    assert f"run folder: {finished.result.path} (exists: the run goes on there)" in ended.out
    elsewhere = command("pipeline", "info", "-c", finished.config_file, "-o", finished.folder / "elsewhere")
    assert "does not exist yet" in elsewhere.out


def test_a_preview_stores_its_answers_and_leaves_no_run(finished: Finished, tmp_path: Path, command: Command) -> None:
    before = asked(finished.server)
    ended = command("pipeline", "preview", "-c", finished.config_file, "-o", tmp_path, "-n", 2)
    assert ended.code == 0
    assert asked(finished.server) - before == 2
    assert RECORDS[0]["instruction"] in ended.out and RECORDS[1]["instruction"] in ended.out
    assert RECORDS[2]["instruction"] not in ended.out
    assert "RuleFilter: " in ended.out and "Return SQL only." in ended.out
    assert not (tmp_path / "runs").exists()
    again = command("pipeline", "preview", "-c", finished.config_file, "-o", tmp_path, "-n", 2)
    assert asked(finished.server) - before == 2
    assert again.out == ended.out


def test_records_that_no_step_works_on_are_previewed_and_sharded_before_they_are_written(
    tmp_path: Path, command: Command
) -> None:
    records = write_records(tmp_path, RECORDS[:6])
    steps = [{"LoadJsonl": {"path": str(records)}}, {"CanonicalizeFields": {"fields": ["instruction"]}}, "ExportSFT"]
    written = tmp_path / "copied.yaml"
    written.write_text(json.dumps({"name": "copied", "steps": steps}))
    shown = command("pipeline", "preview", "-c", written, "-n", 2, "-o", tmp_path / "artifacts")
    assert (shown.code, shown.out.count("sample id:")) == (0, 2), shown.err
    sharded = command("pipeline", "run", "-c", written, "--shard", "1/2", "-o", tmp_path / "artifacts", "--quiet")
    assert sharded.code == 0, sharded.err


def test_a_preview_of_records_that_all_fail_shows_as_many_as_it_was_asked_for(
    finished: Finished, tmp_path: Path, command: Command
) -> None:
    misspelt = "steps.CanonicalizeFields.fields=[instructoin]"
    ended = command("pipeline", "preview", "-c", finished.config_file, "-o", tmp_path, "-n", 2, "--set", misspelt)
    assert ended.out.count("no field instructoin") == 2


def test_runs_are_listed_and_shown(finished: Finished, command: Command) -> None:
    listed = command("runs", "list", "-o", finished.artifacts)
    assert listed.code == 0
    (line,) = [line for line in listed.out.splitlines() if finished.result.run_id in line]
    assert line.split()[1] == "complete"
    accepted = finished.result.quality["samples"]["accepted"]
    assert line.split()[3:] == ["61", str(accepted), "teacher"]
    shown = command("runs", "show", finished.result.run_id[:9], "-o", finished.artifacts)
    assert shown.code == 0
    assert f"{finished.result.run_id}  complete" in shown.out
    for word in ("SQLiteExecEval", "RuleFilter", str(finished.result.dataset)):
        assert word in shown.out


def test_a_run_is_shown_without_its_ledger(finished: Finished, command: Command, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished.artifacts, tmp_path / "copy"))
    (root / "runs" / finished.result.run_id / "ledger.sqlite").unlink()
    shown = command("runs", "show", finished.result.run_id, "-o", root)
    assert shown.code == 0 and "manifest" in shown.out and "fastdistill explain" not in shown.out


def test_a_row_is_explained_from_any_of_its_names(finished: Finished, command: Command) -> None:
    row = rows(finished.result)[0]
    names = [row["fd_id"], row["fd_sample_id"], row["fd_sample_id"][:12], row["fd_task_id"]]
    outputs = [command("explain", finished.result.run_id, name, "-o", finished.artifacts) for name in names]
    assert {ended.code for ended in outputs} == {0}
    assert len({ended.out for ended in outputs}) == 1
    told = outputs[0].out
    record = next(record for record in RECORDS if record["task_id"] == row["fd_task_id"])
    for word in (record["instruction"], row["fd_candidate_id"], "Return SQL only.", "temperature=1.0", "selected as 1"):
        assert word in told
    assert told.count("RuleFilter: ") == 3, "every candidate, with its verdicts"
    assert "train.jsonl:" in told


def test_a_row_whose_record_came_twice_and_a_record_without_an_id_are_explained_too(
    tmp_path: Path, command: Command
) -> None:
    broken = {key: value for key, value in RECORDS[1].items() if key != "instruction"}
    records, database = write_records(tmp_path, [RECORDS[0], RECORDS[0], broken]), make_database(tmp_path)
    with openai_server(choose(ANSWERS)) as server:
        made = parse_pipeline(config(server.url, records, database) | {"max_error_rate": 1})
        result = made.run(output_dir=tmp_path / "artifacts")
    (first, *_) = rows(result)
    told = command("explain", result.run_id, first["fd_id"], "-o", tmp_path / "artifacts").out
    assert "selected as 1" in told and "status: duplicate" in told
    told = command("explain", result.run_id, "train.jsonl:3", "-o", tmp_path / "artifacts").out
    assert "status: failed" in told and "missing_field" in told


def test_the_candidates_of_a_sample_are_told_apart(finished: Finished, command: Command) -> None:
    told = command("explain", finished.result.run_id, "city-0000", "-o", finished.artifacts).out
    assert [f"attempt {n} (seed " in told for n in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("explain", "RUN", "no-such-sample"), 3, "no sample 'no-such-sample'"),
        (("explain", "RUN", ""), 3, "give a sample id, 6 digits or more of it, a task id, or a place"),
        (("explain", "no-such-run", "city-0000"), 3, "no run 'no-such-run'; there are: cities-"),
        (("runs", "show", "no-such-run"), 3, "no run 'no-such-run'"),
    ],
)
def test_what_is_not_there_is_told(
    finished: Finished, command: Command, arguments: tuple[str, ...], code: int, message: str
) -> None:
    given = [finished.result.run_id if argument == "RUN" else argument for argument in arguments]
    ended = command(*given, "-o", finished.artifacts)
    assert ended.code == code
    assert message in ended.err


def test_no_runs_at_all(tmp_path: Path, command: Command) -> None:
    ended = command("runs", "list", "-o", tmp_path)
    assert (ended.code, ended.out) == (3, "")
    assert "no runs here; is --output-dir right?" in ended.err


def test_doctor_looks_at_each_server_of_a_model(finished: Finished, tmp_path: Path, command: Command) -> None:
    with openai_server(teacher) as server:
        several = f"models.teacher.base_url=[{server.url}, http://127.0.0.1:1/v1]"
        found = command("doctor", "-c", finished.config_file, "--set", several, "-o", tmp_path)
    assert found.code == 4
    assert "teacher: teacher: ready" in found.out
    assert "can't be used" in found.out and "127.0.0.1:1" in found.out


def test_source_that_is_not_installed_runs_to_its_end(finished: Finished, tmp_path: Path) -> None:
    shutil.copy(finished.artifacts / "responses.sqlite", tmp_path)
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(pytest.__file__).parent.parent.iterdir():
        if not entry.name.lower().strip("_").startswith("fastdistill"):
            (packages / entry.name).symlink_to(entry)
    run = ["pipeline", "run", "-c", str(finished.config_file), "-o", str(tmp_path), "--quiet"]
    source = os.pathsep.join([str(Path(fastdistill.__file__).parents[1]), str(packages)])
    for arguments in (["--version"], run):
        code = f"from fastdistill.control.cli import main; main({arguments!r})"
        ended = subprocess.run(  # `-S`: without the packages of this interpreter
            [sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "runs" / finished.result.run_id / "manifest.json").read_bytes())
    assert manifest["versions"]["fastdistill"] == "not installed"


def test_what_a_server_says_can_not_steer_the_terminal(finished: Finished, tmp_path: Path, command: Command) -> None:
    with openai_server(teacher, faults=lambda _: status(401, "go \x1b]0;mine\x07", times=None)) as server:
        here = ["-c", finished.config_file, "-o", tmp_path, "--set", f"models.teacher.base_url={server.url}"]
        found, ran = command("doctor", *here), command("pipeline", "run", *here)
    assert (found.code, ran.code) == (4, 4)
    assert "401: go" in found.out and "401: go" in ran.err
    assert "\x1b" not in found.out + ran.err


def test_a_terminal_that_knows_ascii_alone_is_told_all(finished: Finished) -> None:
    run = finished.result.run_id
    arguments = ["compare", run, run, "-o", str(finished.artifacts)]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = subprocess.check_output(
        [sys.executable, "-m", "fastdistill.control.cli", *arguments], env={**os.environ, **ascii_only}, text=True
    )
    assert f"{run} \\u2212 {run}, on" in told


def test_doctor_asks_first_as_the_run_will(finished: Finished, tmp_path: Path, command: Command) -> None:
    with openai_server(teacher) as server:
        here, hot = (f"models.teacher.base_url={server.url}", "steps.TextGeneration.decode_profile.temperature=0.7")
        command("doctor", "-c", finished.config_file, "--set", here, "--set", hot, "-o", tmp_path)
    assert server.counters.bodies[0]["temperature"] == 0.7


def test_doctor_knows_a_healthy_endpoint_from_a_sick_one(finished: Finished, tmp_path: Path, command: Command) -> None:
    healthy = command("doctor", "-c", finished.config_file, "-o", tmp_path)
    assert healthy.code == 0
    assert "teacher: teacher: ready" in healthy.out
    assert "n: yes" in healthy.out and f"endpoint: {finished.server.url}" in healthy.out
    sick = command("doctor", "-c", finished.config_file, "--set", "models.teacher.model=other", "-o", tmp_path)
    assert sick.code == 4
    assert "can't be used" in sick.out and "teacher" in sick.out


def test_the_command_ends_like_the_run(finished: Finished, tmp_path: Path, command: Command) -> None:
    shutil.copy(finished.artifacts / "responses.sqlite", tmp_path)
    run = ["pipeline", "run", "-c", finished.config_file, "-o", tmp_path]
    good = command(*run)
    assert good.code == 0
    assert str(tmp_path / "runs" / finished.result.run_id / "dist") in good.out
    below = command(*run, "-q", "--set", "require.accept_rate=0.99", "--run-id", "demanding")
    assert (below.code, below.out) == (6, "")
    assert "below the floor: accept_rate" in below.err
    assert json.loads((tmp_path / "runs" / "demanding" / "manifest.json").read_text())["status"] == "below_floor"
    wrong = command(*run, "--set", "steps.TextGeneration.num_generation=3")
    assert wrong.code == 2
    assert "unknown key; did you mean num_generations?" in wrong.err
