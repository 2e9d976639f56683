"""Stored candidates judged again: the teacher is gone, and nothing is judged twice that would come out the same."""

import json
import re
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill import RunResult
from fastdistill.control.cli import main
from fastdistill.control.config import parse_pipeline
from fastdistill.control.diff import compare, show_diff
from fastdistill.control.folder import RunFolder
from fastdistill.control.ledger import read_samples
from fastdistill.control.regate import regate
from fastdistill.core.errors import ConfigError, ExitCode, InputError, TooManyErrors
from fastdistill.core.types import Outcome, Sample
from tests.servers import Call, choose, openai_server, status
from tests.world import ANSWERS, RECORDS, config, make_database, write_records

POISONED = RECORDS[3]["instruction"]
"""The teacher never answers it."""


@dataclass(frozen=True)
class World:
    folder: Path
    config: dict[str, Any]
    result: RunResult

    def again(self, config: object = None, *overrides: str, run_id: str | None = None) -> RunResult:
        """Judges the run again, by a config of its own."""
        layers = []
        if config is not None:
            layers.append(self.folder / "gates.yaml")
            layers[0].write_text(yaml.safe_dump(config))
        return regate("first", layers, overrides, output_dir=self.folder / "artifacts", run_id=run_id)

    def gates(self, **changed: Any) -> dict[str, Any]:
        """The steps after generation, some of them changed."""
        return {
            "steps": [
                {name: body | changed.get(name, {})} for step in self.config["steps"][4:] for name, body in step.items()
            ]
        }


def made(
    folder: Path, until: dict[str, Any] | None = None, *, faults: Any = None, target: dict[str, Any] | None = None
) -> World:
    """A run that is finished, and whose teacher is gone."""
    records = [*RECORDS[:24], {**RECORDS[7], "task_id": "again"}, {"task_id": "bare"}]
    (folder / "dbs").mkdir()
    database = make_database(folder / "dbs")
    with openai_server(choose(ANSWERS), faults=faults or {}) as server:
        pipeline = config(server.url, write_records(folder, records), database)
        pipeline["steps"][6]["SQLiteExecEval"]["db_path"] = str(folder / "dbs" / "{{ db_id }}.db")
        pipeline["steps"][3]["TextGeneration"] |= {"num_generations": 6, "until": until} if until else {}
        pipeline["steps"][3]["TextGeneration"]["system_prompt"] = "SQL for $${x}, only."
        pipeline |= {"max_error_rate": 0.2, "target": target}
        result = parse_pipeline(pipeline).run(output_dir=folder / "artifacts", run_id="first")
    return World(folder, pipeline, result)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("regate"), faults={POISONED: status(400, times=None)})


@pytest.fixture
def world(shared: World, tmp_path: Path) -> Iterator[World]:
    """A copy, to be changed."""
    shutil.copytree(shared.folder / "artifacts", tmp_path / "artifacts")
    yield World(tmp_path, shared.config, shared.result)


def data_set(result: RunResult) -> dict[str, bytes]:
    files = sorted(path for path in result.dataset.rglob("*") if path.is_file())
    return {path.relative_to(result.dataset).as_posix(): path.read_bytes() for path in files}


def stored(result: RunResult) -> list[Sample]:
    return list(read_samples(result.path / "ledger.sqlite"))


def judged(result: RunResult, gate: str) -> int:
    return sum(stage["candidates"]["judged"] for stage in result.quality["stages"] if stage["step"] == gate)


def test_the_same_gates_give_the_same_bytes_and_judge_nothing_again(world: World) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = world.again()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_minflt, after.ru_utime) == (before.ru_minflt, before.ru_utime), "no worker was started"
    assert data_set(again) == data_set(world.result)
    assert again.manifest["content_sha256"] == world.result.manifest["content_sha256"]
    assert again.quality["samples"] == world.result.quality["samples"]
    assert again.quality["failures"] == world.result.quality["failures"]
    reused = again.manifest["verdicts_reused"]
    assert reused == {gate: judged(world.result, gate) for gate in ("RuleFilter", "SQLiteExecEval")}


def test_the_same_gates_give_the_same_bytes_where_two_steps_ask_in_waves(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS)) as server:
        until = {"accepted": 3}
        pipeline = config(
            server.url, write_records(tmp_path, RECORDS[:12]), make_database(tmp_path), num_generations=6, until=until
        )
        student = {"name": "student", "template": "{{ instruction }}", "num_generations": 6, "until": until}
        kept = [step for step in pipeline["steps"] if "SelectBest" not in step]
        pipeline["steps"] = [*kept[:4], {"TextGeneration": student}, *kept[4:]]
        first = parse_pipeline(pipeline).run(output_dir=tmp_path / "artifacts", run_id="first")
    waves = [[candidate.step for candidate in sample.candidates] for sample in stored(first)]
    assert any(steps != sorted(steps) for steps in waves), "those of the two steps alternate"
    again = World(tmp_path, pipeline, first).again()
    assert data_set(again) == data_set(first)
    assert again.quality["candidates"] == first.quality["candidates"]


def test_the_new_run_has_its_lineage_and_all_proofs(world: World) -> None:
    again = world.again()
    manifest = json.loads((again.path / "manifest.json").read_text())
    assert (manifest["kind"], manifest["parent_run_id"]) == ("regate", "first")
    assert world.result.manifest["kind"] == "run"
    ledger = next(entry for entry in manifest["inputs"] if entry["path"].endswith("ledger.sqlite"))
    assert Path(ledger["path"]) == (world.folder / "artifacts/runs/first/ledger.sqlite")
    for name in ("config.yaml", "quality_report.json", "timing_report.json", "report.html", "dist/checksums.txt"):
        assert (again.path / name).exists()
    (model,) = again.timing["models"].values()
    assert (model["requests"], model["answers_paid"]) == (0, 0)
    # It is a run like any other: it can be judged again itself.
    third = regate(again.run_id, [], output_dir=world.folder / "artifacts", run_id="third")
    assert data_set(third) == data_set(again)


def test_a_stricter_rule_runs_alone(world: World) -> None:
    again = world.again(world.gates(RuleFilter={"max_chars": 63}))
    assert again.run_id != world.result.run_id
    assert 0 < again.quality["samples"]["accepted"] < world.result.quality["samples"]["accepted"]
    assert again.manifest["verdicts_reused"] == {"SQLiteExecEval": judged(again, "SQLiteExecEval")}
    assert 0 < judged(again, "SQLiteExecEval") < judged(world.result, "SQLiteExecEval")


def test_one_value_can_be_changed_without_a_file(world: World) -> None:
    by_file = world.again(world.gates(RuleFilter={"max_chars": 63}))
    by_value = world.again(None, "steps.RuleFilter.max_chars=63", run_id="by-value")
    assert data_set(by_file) == data_set(by_value)


def test_an_answer_that_another_parser_leaves_otherwise_is_judged_again(tmp_path: Path) -> None:
    """As a run over the stored answers would judge it, which is the truth here."""
    world = made(tmp_path)
    raw = {"steps": world.gates()["steps"][1:]}
    again = world.again(raw)
    whole = world.config | {"steps": [*world.config["steps"][:4], *raw["steps"]]}
    fresh = parse_pipeline(whole).run(output_dir=world.folder / "artifacts", run_id="fresh")
    assert fresh.timing["models"]["teacher"]["answers_paid"] == 0
    assert data_set(again) == data_set(fresh)
    assert again.manifest["content_sha256"] == fresh.manifest["content_sha256"]
    assert 0 < again.manifest["verdicts_reused"]["RuleFilter"] < judged(again, "RuleFilter")


def test_a_verdict_on_an_answer_with_its_rationale_is_none_on_the_answer_alone(tmp_path: Path) -> None:
    rules: list[object] = [{"RuleFilter": {"required": ["SELECT"]}}, "SplitRationale"]
    with openai_server(lambda *_: "### RATIONALE\nSELECT it.\n### ANSWER\nNo.") as server:
        pipeline = config(server.url, write_records(tmp_path, RECORDS[:2]), make_database(tmp_path))
        pipeline["steps"][4:] = rules
        first = parse_pipeline(pipeline).run(output_dir=tmp_path / "artifacts", run_id="first")
    again = World(tmp_path, pipeline, first).again({"steps": rules[::-1]})
    passed = [run.quality["candidates"].get("pass", 0) for run in (first, again)]
    assert passed == [judged(first, "RuleFilter"), 0]


def test_another_database_is_another_question(tmp_path: Path) -> None:
    world = made(tmp_path)
    with closing(sqlite3.connect(tmp_path / "dbs" / "city.db")) as database, database:
        database.execute("DELETE FROM city WHERE country = 'Italy'")
        database.execute("ALTER TABLE city RENAME COLUMN people TO souls")
    again = world.again()
    assert again.manifest["verdicts_reused"] == {"RuleFilter": judged(world.result, "RuleFilter")}
    assert again.quality["samples"]["accepted"] == 0
    assert again.quality["samples"]["undecided"] > 0


def test_other_prompts_are_not_stored_and_nobody_is_asked(world: World) -> None:
    changed = json.loads(json.dumps(world.config))
    changed["steps"][3]["TextGeneration"]["system_prompt"] = "Other words."
    with pytest.raises(TooManyErrors, match="most often not_stored at TextGeneration"):
        world.again(changed, run_id="other")
    samples = [sample for sample in read_samples(world.folder / "artifacts/runs/other/ledger.sqlite")]
    assert {sample.failures[-1].reason for sample in samples if sample.failures} >= {"not_stored"}
    assert not any(sample.candidates for sample in samples)


@pytest.mark.parametrize("step", ["LLMJudge", "PairwiseJudge"])
def test_a_judge_that_was_never_asked_says_that_its_word_is_not_stored(world: World, step: str) -> None:
    gates = [{"CleanSqlOutput": {}}, {step: {"task": "{{ instruction }}"}}, {"ExportSFT": {}}]
    judge = {"provider": "vllm", "model": "judge", "base_url": "http://127.0.0.1:1"}
    again = world.again({"models": {"judge": judge}, "steps": gates})
    if step == "LLMJudge":
        verdicts = [v for sample in stored(again) for c in sample.candidates if (v := c.verdict(step))]
        assert {(v.outcome, v.reason) for v in verdicts} == {(Outcome.ERROR, "not_stored")}
        assert "judge: this answer is not stored, and nobody is asked for it" in verdicts[0].detail["detail"]
    else:
        assert {f.reason for sample in stored(again) for f in sample.failures if f.step == step} == {"not_stored"}


def test_pairs_are_compared_again_as_they_were(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS)) as teacher, openai_server(prefers_the_longer, models=("judge",)) as server:
        pipeline = config(teacher.url, write_records(tmp_path, RECORDS[:24]), make_database(tmp_path))
        pipeline["models"]["judge"] = {"provider": "vllm", "model": "judge", "base_url": server.url}
        pipeline["steps"][6]["SQLiteExecEval"]["require"] = "exec_pass"
        pairs = {"PairwiseJudge": {"task": "{{ instruction }}"}}
        pipeline["steps"][7:8] = [{"ScoreFromJudge": {"gate": "SQLiteExecEval"}}, pairs]
        result = parse_pipeline(pipeline).run(output_dir=tmp_path / "artifacts", run_id="first")
    assert {c.score for sample in stored(result) for c in sample.chosen} > {1.0}
    again = World(tmp_path, pipeline, result).again()
    assert data_set(again) == data_set(result)
    assert again.manifest["content_sha256"] == result.manifest["content_sha256"]
    reused = {gate: judged(result, gate) for gate in ("RuleFilter", "SQLiteExecEval")}
    assert again.manifest["verdicts_reused"] == reused, "a score is no other answer"


def prefers_the_longer(call: Call, index: int) -> str:
    found = re.search(r"<answer A>\n(.*)\n</answer A>\n<answer B>\n(.*)\n</answer B>", call.prompt, re.DOTALL)
    return "A" if found is None or len(found[1]) > len(found[2]) else "B"


def test_the_whole_pipeline_may_be_given_again(world: World) -> None:
    assert data_set(world.again(world.config)) == data_set(world.result)


def test_other_records_are_refused(world: World) -> None:
    changed = json.loads(json.dumps(world.config))
    changed["steps"][1]["CanonicalizeFields"]["fields"] = ["instruction"]
    with pytest.raises(ConfigError, match="the steps before generation can't be others"):
        world.again(changed)
    with pytest.raises(ConfigError, match="another name"):
        world.again(run_id="first")
    with pytest.raises(ConfigError, match="unknown key"):
        world.again({"steps": [{"RuleFilter": {"max_char": 5}}]})
    with pytest.raises(ConfigError, match="must be a mapping"):
        world.again([{"RuleFilter": {}}])


def test_a_run_that_has_not_ended_is_refused(world: World) -> None:
    (world.folder / "artifacts/runs/first/ledger.sqlite").unlink()
    with pytest.raises(InputError, match="run it again to its end"):
        world.again()


@pytest.mark.parametrize("siblings", ["keep", "cancel"])
def test_what_was_asked_in_waves_is_judged_as_it_was_asked(tmp_path: Path, siblings: str) -> None:
    world = made(tmp_path, {"accepted": 1, "wave": 2, "siblings": siblings})
    assert data_set(world.again()) == data_set(world.result)
    strict = world.again(world.gates(RuleFilter={"max_chars": 63}))
    asked = [[c.candidate_id for c in sample.candidates] for sample in stored(world.result)]
    assert [[c.candidate_id for c in sample.candidates] for sample in stored(strict)] == asked


def test_what_came_after_a_full_target_stays_out(tmp_path: Path) -> None:
    world = made(tmp_path, target={"accepted": 8})
    again = world.again()
    assert data_set(again) == data_set(world.result)
    assert again.quality["samples"]["accepted"] == 8


def test_diff_tells_who_was_lost_and_why(world: World) -> None:
    strict = world.again(world.gates(RuleFilter={"max_chars": 63}), run_id="strict")
    root = world.folder / "artifacts"
    found = compare(RunFolder(root, "first"), RunFolder(root, "strict"))
    accepted = {s.sample_id for s in stored(world.result) if s.accepted}
    left = {s.sample_id for s in stored(strict) if s.accepted}
    assert {change.sample_id for change in found.lost} == accepted - left
    assert {(change.at, change.reason) for change in found.lost} == {("RuleFilter", "too_long")}
    assert (found.won, found.both, found.only_a, found.only_b) == ([], len(left), 0, 0)
    assert found.accepted_b.successes == len(left)
    assert found.difference.estimate == pytest.approx(-len(accepted - left) / found.compared)
    assert found.p_value == pytest.approx(2 * 0.5 ** len(accepted - left))
    back = compare(RunFolder(root, "strict"), RunFolder(root, "first"))
    assert [change.sample_id for change in back.won] == [change.sample_id for change in found.lost]
    assert back.p_value == found.p_value


def test_a_sample_that_could_not_be_judged_is_neither_won_nor_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = made(tmp_path)
    with closing(sqlite3.connect(tmp_path / "dbs" / "city.db")) as database, database:
        database.execute("ALTER TABLE city RENAME COLUMN people TO souls")  # every gold query is broken now
    world.again(run_id="broken")
    root = tmp_path / "artifacts"
    found = compare(RunFolder(root, "first"), RunFolder(root, "broken"))
    broken = [s for s in read_samples(root / "runs/broken/ledger.sqlite", "status = 'open'")]
    undecided = [s for s in broken if any(c.outcome is Outcome.ERROR for c in s.candidates)]
    assert found.undecided == len(undecided) > 0
    assert not found.won and not found.lost
    assert found.compared == 0
    show_diff("first", "broken", root, None, None)
    assert "difference: –" in capsys.readouterr().out


def test_the_commands_say_it(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts = str(world.folder / "artifacts")

    def command(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, "-o", artifacts])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    code, text = command("regate", "first", "--set", "steps.RuleFilter.max_chars=63", "--run-id", "strict")
    assert code == ExitCode.PARTIAL, "as the first run ended: some records failed"
    assert "candidates of first again; verdicts taken over" in text
    file = world.folder / "diff.json"
    code, text = command("diff", "first", "strict", "--group-by", "db_id", "--json", str(file))
    assert code == ExitCode.OK and "McNemar" in text and "too_long" in text
    assert len(json.loads(file.read_text())["lost"]) > 0
    for place in (world.folder, file / "below"):
        code, text = command("diff", "first", "strict", "--json", str(place))
        assert code == ExitCode.ENVIRONMENT and f"writing {place}: " in text
    assert command("diff", "first", "strict", "--group-by", "nothing")[0] == ExitCode.INPUT
    assert command("regate", "nobody")[0] == ExitCode.INPUT
