"""Students evaluated under the pipeline's gates, models side by side, and chains of generations."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastdistill.control.compare import Item, measure, noise_floor, pair
from fastdistill.control.config import parse_pipeline
from fastdistill.control.evaluate import evaluation
from fastdistill.control.folder import RunFolder
from fastdistill.control.lineage import advice, ancestry
from fastdistill.control.session import Origin, Pipeline, RunResult
from fastdistill.core.errors import ConfigError, InputError, TeacherError
from fastdistill.core.stats import interval
from tests.command import Command
from tests.servers import Call, openai_server, status
from tests.world import ANSWERS, RECORDS, config, make_database, write_records

# Of the answers of `world`, the first two are right; the third runs and is wrong; the others can't run.
SKILL = {"teacher": 0.5, "before": 0.2, "student": 0.9}
EVAL = RECORDS[30:]


def script(call: Call, index: int) -> str:
    for question, answers in ANSWERS.items():
        if question in call.prompt:
            lucky = call.digest(index) % 1000 < 1000 * SKILL[call.model]
            return str(answers[0 if lucky else 2])
    return "none"


@dataclass(frozen=True)
class World:
    folder: Path
    url: str

    @property
    def config(self) -> dict[str, Any]:
        made = config(self.url, self.folder / "train.jsonl", self.folder / "city.db", until={"accepted": 1})
        return made | {"require": {"min_total": 1}, "target": {"accepted": 3}}

    @property
    def root(self) -> tuple[str, Path]:
        return "--output-dir", self.folder / "artifacts"

    @property
    def pipeline(self) -> Pipeline:
        return parse_pipeline(self.config)

    def evaluate(self, role: str, draws: int = 4) -> RunResult:
        changes = {} if role == "teacher" else {"model": role}
        plan = evaluation(self.pipeline, self.folder / "eval.jsonl", role=role, changes=changes, draws=draws)
        return plan.run(output_dir=self.folder / "artifacts")

    def found(self, result: RunResult) -> RunFolder:
        return RunFolder(self.folder / "artifacts", result.run_id)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    make_database(tmp_path)
    write_records(tmp_path, RECORDS[:30])
    write_records(tmp_path, EVAL, "eval.jsonl")
    with openai_server(script, models=tuple(SKILL)) as server:
        yield World(tmp_path, server.url)


def test_an_evaluation_asks_every_record_the_same_number_of_times(world: World) -> None:
    result = world.evaluate("student")
    assert result.quality["samples"]["read"] == len(EVAL)
    assert result.quality["candidates"]["generated"] == 4 * len(EVAL)  # no waves, no target
    assert (result.manifest["kind"], result.manifest["role"]) == ("eval", "student")
    assert result.manifest["models"]["student"]["model"] == "student"
    assert "floor" in result.quality and not result.quality["floor"]
    assert not list(result.dataset.rglob("*.jsonl"))  # nothing is made of it


def test_the_config_of_an_evaluation_can_be_read_again(world: World) -> None:
    plan = evaluation(world.pipeline, world.folder / "eval.jsonl", role="student", changes={"model": "before"}, draws=2)
    again = parse_pipeline(plan.resolved())
    assert again.run_id == plan.run_id
    other = evaluation(world.pipeline, world.folder / "eval.jsonl", role="student", changes={"model": "x"}, draws=2)
    assert other.run_id != plan.run_id


@pytest.mark.parametrize(
    ("changes", "says"),
    [({}, "there is no 'student'"), ({"model": "x", "timeout": -1}, "timeout"), ({"model": ""}, "model")],
)
def test_a_student_that_can_not_be_asked_is_a_config_error(world: World, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        evaluation(world.pipeline, world.folder / "eval.jsonl", role="student", changes=changes, draws=1)


def test_a_model_that_judges_is_not_exchanged_under_its_name(world: World) -> None:
    made = world.config
    made["steps"].insert(7, {"LLMJudge": {"task": "?", "model": "teacher"}})
    whole, data = parse_pipeline(made), world.folder / "eval.jsonl"
    assert evaluation(whole, data, role="teacher", changes={}, draws=1).models["teacher"] == whole.models["teacher"]
    other = evaluation(whole, data, role="next", changes={"model": "next"}, draws=1)
    assert {name: model.model for name, model in other.models.items()} == {"teacher": "teacher", "next": "next"}
    with pytest.raises(ConfigError, match="--role teacher: its model judges here"):
        evaluation(whole, data, role="teacher", changes={"model": "next"}, draws=1)


@pytest.mark.parametrize(
    ("data", "role", "says"),
    [
        ("eval.csv", "teacher", r"^--data\.path: .*\.parquet"),
        ("eval.jsonl", "a:b", r"^evaluation of a:b\.name: .*pattern"),
    ],
)
def test_an_evaluation_that_can_not_be_made_is_told_in_a_line(world: World, data: str, role: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as told:
        evaluation(world.pipeline, world.folder / data, role=role, changes={"model": "student"}, draws=1)
    assert len(told.value.problems) == 1 and "errors.pydantic.dev" not in str(told.value)


@pytest.mark.parametrize("given", [{"api_key": "sk-own"}, {"headers": {"Authorization": "Bearer sk-own"}}])
def test_a_model_is_asked_with_the_key_that_its_config_has_and_no_other_server_gets_it(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    records, database = write_records(tmp_path, RECORDS[:4]), make_database(tmp_path)
    with openai_server(script, models=tuple(SKILL), api_key="sk-own") as server:
        made = config(server.url, records, database)
        made["models"]["teacher"] |= given
        changes = {"model": "student"}
        own = evaluation(parse_pipeline(made), records, role="student", changes=changes, draws=1)
        assert own.run(output_dir=tmp_path / "artifacts").quality["candidates"]["generated"] == 4
        made["models"]["teacher"]["base_url"] = "http://127.0.0.1:9/v1"
        changes["base_url"] = server.url
        other = evaluation(parse_pipeline(made), records, role="student", changes=changes, draws=1)
        with pytest.raises(TeacherError, match="401"):
            other.run(output_dir=tmp_path / "elsewhere")


def test_a_better_student_is_told_apart_and_a_model_from_itself_is_not(world: World) -> None:
    runs = {role: measure(world.found(world.evaluate(role)), None) for role in SKILL}
    found = pair(runs["student"], runs["before"])
    assert found.compared == len(EVAL)
    assert found.won > found.lost
    assert found.p_value < 0.01
    assert found.difference.low is not None
    assert found.difference.low > 0
    assert found.scores is not None
    same = pair(runs["student"], runs["student"])
    assert (same.won, same.lost, same.p_value) == (0, 0, 1.0)
    floor = noise_floor(runs["teacher"])
    assert floor is not None
    assert floor["mae"].estimate is not None
    assert floor["mae"].estimate > 0  # at temperature 1 it does not even agree with itself


def test_compare_prints_and_writes_what_it_found(world: World, command: Command) -> None:
    ids = [world.evaluate(role).run_id for role in ("teacher", "before", "student")]
    out = world.folder / "compared.json"
    done = command("compare", *ids, "--json", out, "--group-by", "db_id", *world.root)
    assert done.code == 0, done.err
    assert "student: student" in done.out
    assert "McNemar p" in done.out
    assert "noise floor, teacher against itself" in done.out
    written = json.loads(out.read_bytes())
    assert [run["role"] for run in written["runs"]] == ["teacher", "before", "student"]
    assert written["runs"][2]["accuracy"]["rate"] > written["runs"][1]["accuracy"]["rate"]
    assert (written["runs"][0]["k"], written["runs"][0]["samples"]) == (4, len(EVAL))
    # All records are about one database: there is one group, and no interval but its own value.
    assert written["pairs"][0]["difference"]["low"] == written["pairs"][0]["difference"]["high"]
    with pytest.raises(InputError, match="no field 'table'"):
        measure(RunFolder(world.folder / "artifacts", ids[0]), "table")


def test_an_answer_that_never_reached_a_gate_is_not_right(world: World) -> None:
    made = world.config
    made["steps"][6]["SQLiteExecEval"]["db_path"] = str(world.folder / "{{ db_id }}.db")
    records = [{**RECORDS[30], "db_id": "city"}, {key: RECORDS[31][key] for key in RECORDS[31] if key != "db_id"}]
    plan = evaluation(
        parse_pipeline(made | {"max_error_rate": 1}), write_records(world.folder, records, "two.jsonl"),
        role="teacher", changes={}, draws=1,
    )  # fmt: skip
    found = measure(world.found(plan.run(output_dir=world.folder / "artifacts")))
    assert (len(found.items), found.undecided) == (1, 1)


def test_gates_have_the_rates_that_the_quality_report_has(world: World) -> None:
    with openai_server(lambda *_: '{"criteria": {"ok": true}, "score": 5}', models=["judge"]) as server:
        made = world.config
        made["models"]["judge"] = {"provider": "vllm", "model": "judge", "base_url": server.url}
        judge = {"task": "?", "criteria": {"ok": "?"}, "structured": False, "truth": "SQLiteExecEval", "calibrate": 1}
        made["steps"].insert(7, {"LLMJudge": judge})
        plan = evaluation(parse_pipeline(made), world.folder / "eval.jsonl", role="teacher", changes={}, draws=1)
        result = plan.run(output_dir=world.folder / "artifacts")
    rates = {name: interval(rate) for name, rate in measure(world.found(result)).gates.items()}
    stages = {
        stage["step"]: stage["candidates"]["pass_rate"] for stage in result.quality["stages"] if "candidates" in stage
    }
    assert rates == stages
    assert rates["LLMJudge"]["total"] < len(EVAL)


def test_one_run_has_figures_too(world: World, command: Command) -> None:
    done = command("compare", world.evaluate("student").run_id, *world.root)
    assert (done.code, done.err) == (0, "") and "pass@k" in done.out


def test_runs_of_other_records_can_not_be_compared(world: World, command: Command) -> None:
    first = world.evaluate("student").run_id
    write_records(world.folder, RECORDS[:5], "eval.jsonl")
    plan = evaluation(world.pipeline, world.folder / "eval.jsonl", role="student", changes={"model": "before"}, draws=1)
    second = plan.run(output_dir=world.folder / "artifacts", run_id="other").run_id
    done = command("compare", first, second, *world.root)
    assert done.code == 3
    assert "no sample in common" in done.err


def test_runs_of_one_role_are_told_apart_by_their_ids(world: World, command: Command) -> None:
    for run_id in ("first", "second"):
        plan = evaluation(world.pipeline, world.folder / "eval.jsonl", role="teacher", changes={}, draws=1)
        plan.run(output_dir=world.folder / "artifacts", run_id=run_id)
    head = command("compare", "first", "second", *world.root).out.splitlines()[0]
    assert head.split() == ["first:", "teacher", "second:", "teacher"]


def test_generations_are_chained_and_the_chain_is_tested(world: World, command: Command) -> None:
    first = world.pipeline.run(output_dir=world.folder / "artifacts", run_id="born-0")
    second = parse_pipeline(
        world.config | {"models": {"teacher": world.config["models"]["teacher"] | {"model": "student"}},
                        "lineage": {"parent": "born-0"}}
    ).run(output_dir=world.folder / "artifacts", run_id="born-1")  # fmt: skip
    assert (first.manifest["generation"], first.manifest["parent_run_id"]) == (0, None)
    assert (second.manifest["generation"], second.manifest["parent_run_id"]) == (1, "born-0")
    assert [folder.run_id for folder in ancestry(world.folder / "artifacts", "born-1")] == ["born-0", "born-1"]
    done = command("lineage", "born-1", *world.root)
    assert done.code == 0, done.err
    assert "against generation 0" in done.out
    assert "the candidates of" not in command("runs", "show", "born-1", *world.root).out  # it has asked for its own
    runs = [measure(world.found(first)), *[measure(world.found(second))] * 3]
    stop = advice(runs, [pair(after, before) for before, after in pairwise(runs[1:])])
    assert stop == ["stop: the last two generations can't be told from their parents"]
    right, wrong = Item("", (True,) * 8, (None,) * 8, True, 4), Item("", (False,) * 8, (None,) * 8, True, 0)
    before, few = replace(runs[0], items={"a": right, "b": wrong}), {"a": Item("", (True,), (None,), True, 1)}
    # The same answers, of fewer records or fewer draws, have not fallen.
    assert advice([before, replace(before, items={"b": wrong})], []) == []
    assert advice([before, replace(before, items=few)], []) == []
    assert advice([replace(before, items=few), before], []) == []
    fallen = replace(before, items={"a": replace(right, distinct=1)})
    (said,) = advice([before, fallen], [])
    assert said == "stop: distinct answers have fallen from 0.50 to 0.12 of the accepted: a collapse"


def test_a_record_without_an_answer_changes_no_k_and_a_regate_is_no_generation(world: World, command: Command) -> None:
    world.evaluate("teacher", draws=8)
    lost = RECORDS[30]["instruction"]
    with openai_server(script, models=tuple(SKILL), faults={lost: status(400, times=None)}) as server:
        again = evaluation(
            parse_pipeline(config(server.url, world.folder / "train.jsonl", world.folder / "city.db")),
            world.folder / "eval.jsonl", role="student", changes={"model": "student"}, draws=8,
        ).model_copy(update={"lineage": Origin(parent="cities-eval-teacher")})  # fmt: skip
        again.run(output_dir=world.folder / "artifacts", run_id="next")
    gates = world.folder / "gates.yaml"
    gates.write_text("steps: {RuleFilter: {max_chars: 400}}")
    assert command("regate", "next", "--config", gates, "--run-id", "judged", *world.root).code == 5
    first, last = (measure(RunFolder.find(world.folder / "artifacts", run)) for run in ("cities-eval", "next"))
    assert (first.k, last.k, len(last.items)) == (8, 8, len(EVAL))
    both = [(before.pass_at(8), last.items[key].pass_at(8)) for key, before in first.items.items()]
    assert 0 < sum(before for before, _ in both) - sum(after for _, after in both) <= 1
    told = command("lineage", "judged", *world.root).out
    assert [line.split()[0] for line in told.splitlines()[1:4]] == ["0", "1", "1"]
    assert "pass@k has fallen" not in told


def test_a_parent_that_is_not_there_is_told_before_anything_is_asked(world: World) -> None:
    orphan = parse_pipeline(world.config | {"lineage": {"parent": "nobody"}})
    with pytest.raises(InputError, match="no run 'nobody'"):
        orphan.run(output_dir=world.folder / "artifacts")
