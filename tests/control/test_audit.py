"""Gates measured against gold answers and broken ones, and runs that trust no gate that was not."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill.control.audit import audit
from fastdistill.control.cli import main
from fastdistill.control.config import parse_pipeline
from fastdistill.core.errors import ExitCode, InputError
from tests.servers import choose, openai_server
from tests.world import ANSWERS, RECORDS, config, make_database, write_records

NOBODY = "http://127.0.0.1:9"
DOUBLES = [
    {"prompt": f"Double it, {n}.", "gold": f"def f(x):\n    return x * {n}\n", "tests": [f"assert f(3) == {3 * n}"]}
    for n in (2, 3)
]
BROKEN = {"prompt": "Halve it.", "gold": "def f(x):\n    return x / 2\n", "tests": ["assert f(3) == 1"]}


def sql_config(folder: Path, records: list[dict[str, Any]], url: str = NOBODY) -> dict[str, Any]:
    made = config(url, write_records(folder, records), make_database(folder))
    made["steps"] = made["steps"][:-1]
    return made


def audited(made: dict[str, Any], folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The reports by gate, which are the files that were written."""
    reports = audit(parse_pipeline(made), output_dir=folder / "artifacts", **options)
    for report in reports:
        path = folder / "artifacts" / "audits" / f"{report['fingerprint']}.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    return {report["gate"]: report for report in reports}


def python_config(folder: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "doubles",
        "steps": [
            {"LoadJsonl": {"path": str(write_records(folder, records))}},
            {"CanonicalizeFields": {"fields": ["prompt"]}},
            {"CleanPythonOutput": {}},
            {"RuleFilter": {"max_chars": 500}},
            {"PythonExecEval": {"gold_field": "gold", "workers": 1}},
        ],
    }


def test_a_gold_answer_that_a_gate_fails_is_a_false_reject_with_its_reason(tmp_path: Path) -> None:
    made = sql_config(tmp_path, RECORDS[:24])
    made["steps"][5]["RuleFilter"]["max_chars"] = 63
    found = audited(made, tmp_path)
    too_long = [record for record in RECORDS[:24] if len(record["gold_sql"]) > 63]
    rules = found["RuleFilter"]
    assert rules["rates"]["false_reject_rate"]["successes"] == len(too_long) > 0
    assert {case["source"] for case in rules["cases"]} == {
        f"train.jsonl:{RECORDS.index(record) + 1}" for record in too_long
    }
    assert {(case["finding"], case["reason"]) for case in rules["cases"]} == {("false_reject", "too_long")}
    assert rules["operators"] == {}, "it does not claim to know a wrong answer"
    assert found["SQLiteExecEval"]["rates"]["false_reject_rate"]["successes"] == 0


def test_a_broken_query_that_is_right_by_luck_is_a_false_accept_unless_the_gate_has_copies(tmp_path: Path) -> None:
    """No two cities have as many people, on this database."""
    made = sql_config(tmp_path, [{**RECORDS[0], "gold_sql": "SELECT people FROM city"}])
    plain = audited(made, tmp_path)["SQLiteExecEval"]
    made["steps"][6]["SQLiteExecEval"]["perturbations"] = 2
    strict = audited(made, tmp_path)["SQLiteExecEval"]
    (lucky,) = plain["cases"]
    assert (lucky["finding"], lucky["answer"]) == ("false_accept", "SELECT DISTINCT people FROM city")
    assert plain["operators"]["distinct"]["false_accept_rate"]["rate"] == 1
    assert strict["operators"]["distinct"]["rejected"] == 1 and strict["cases"] == []
    assert plain["rates"]["mutants"] == strict["rates"]["mutants"] == 2
    assert plain["fingerprint"] != strict["fingerprint"]


def test_an_audit_repeats_and_its_seed_draws_other_mutants(tmp_path: Path) -> None:
    made = sql_config(tmp_path, RECORDS[:3])
    first, again, other = (audited(made, tmp_path, mutants=1, seed=seed)["SQLiteExecEval"] for seed in (0, 0, 1))
    assert first == again
    assert first["cases"] != other["cases"]


def test_gates_are_measured_also_behind_one_that_takes_rationales_out(tmp_path: Path) -> None:
    made = sql_config(tmp_path, RECORDS[:4])
    made["steps"].insert(4, {"SplitRationale": {"require": "ok"}})
    found = audited(made, tmp_path)
    assert {gate: report["rates"]["golds"] for gate, report in found.items()} == {"RuleFilter": 4, "SQLiteExecEval": 4}


def test_python_is_measured_by_the_full_tests(tmp_path: Path) -> None:
    found = audited(python_config(tmp_path, [*DOUBLES, BROKEN]), tmp_path, mutants=9)["PythonExecEval"]
    assert (found["rates"]["golds"], found["rates"]["broken_golds"]) == (3, 1)
    assert found["rates"]["false_reject_rate"]["total"] == 2, "a broken gold is no false reject"
    (broken,) = [case for case in found["cases"] if case["finding"] == "broken_gold"]
    assert (broken["source"], broken["reason"]) == ("train.jsonl:3", "gold_invalid")
    assert set(found["operators"]) == {"arithmetic", "constant", "return"}
    assert found["rates"]["mutants"] == 6, "those of the broken gold are left out"
    survived = [case["answer"] for case in found["cases"] if case["finding"] == "survived"]
    assert survived == [], "one test tells x * 2 from x + 2 at 3, and from x * (2 + 1)"
    assert found["rates"]["false_accept_rate"]["total"] == 6


def test_what_all_tests_pass_has_survived_and_is_no_false_accept(tmp_path: Path) -> None:
    untested = {**DOUBLES[0], "tests": ["assert f(2) == 4"]}  # 2 + 2 is 4 as well
    found = audited(python_config(tmp_path, [untested]), tmp_path, mutants=9)["PythonExecEval"]
    assert [case["answer"] for case in found["cases"]] == ["def f(x):\n    return (x + 2)\n"]
    assert found["operators"]["arithmetic"]["survived"] == 1
    assert found["rates"]["false_accept_rate"]["successes"] == 0
    assert found["rates"]["at_most"]["successes"] == 1


def math_config(folder: Path, answers: list[Any], **gate: Any) -> dict[str, Any]:
    records = [{"prompt": f"What is it, {at}?", "answer": answer} for at, answer in enumerate(answers)]
    return {
        "name": "sums",
        "steps": [
            {"LoadJsonl": {"path": str(write_records(folder, records))}},
            {"CanonicalizeFields": {"fields": ["prompt"]}},
            {"MathExecEval": gate},
        ],
    }


def test_mathematics_is_measured_with_other_numbers(tmp_path: Path) -> None:
    answers = ["48 + 24 = 72\n#### 72", 1200, "$7.50", r"\boxed{3} or \boxed{4}"]
    made = math_config(tmp_path, answers)
    made["steps"].append({"MajorityVote": {"gate": "MathExecEval", "result": "answer"}})
    (exact,) = audited(made, tmp_path).values()
    assert exact["gate"] == "MathExecEval", "of a vote nothing can be said with one answer"
    assert (exact["rates"]["golds"], exact["rates"]["broken_golds"]) == (4, 1)
    assert exact["rates"]["false_reject_rate"]["total"] == 3
    assert set(exact["operators"]) == {"off_by_one", "sign", "times_ten", "half", "digits"}
    assert exact["rates"]["false_accept_rate"]["total"] == exact["rates"]["mutants"] == 18
    assert [case["finding"] for case in exact["cases"]] == ["broken_gold"]
    loose = audited(math_config(tmp_path, answers, tolerance=0.01), tmp_path)["MathExecEval"]
    accepted = [(case["finding"], case["answer"]) for case in loose["cases"] if case["operator"] == "off_by_one"]
    assert accepted == [("false_accept", r"\boxed{1199}"), ("false_accept", r"\boxed{1201}")]


def test_without_a_gold_answer_there_is_nothing_to_measure_with(tmp_path: Path) -> None:
    made = sql_config(tmp_path, [{k: v for k, v in record.items() if k != "gold_sql"} for record in RECORDS[:3]])
    with pytest.raises(InputError, match="no gold answer was found"):
        audited(made, tmp_path)


def test_a_run_carries_the_audited_rates_and_can_demand_them(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    with openai_server(choose(ANSWERS)) as server:
        made = sql_config(tmp_path, RECORDS[:12], server.url)
        made["require"] = {"audited": True}
        unaudited = parse_pipeline(made).run(output_dir=root)
        assert unaudited.exit_code is ExitCode.FLOOR
        message = unaudited.manifest["message"]
        assert "RuleFilter, SQLiteExecEval: not audited as it is now: fastdistill audit --config " in message
        command(*message.partition("fastdistill ")[2].split(), "--quiet")
        trusted = parse_pipeline(made).run(output_dir=root)
        assert trusted.exit_code is ExitCode.OK
        rates = {stage["step"]: stage.get("audit") for stage in trusted.quality["stages"]}
        assert rates["SQLiteExecEval"]["golds"] == 12 and rates["SQLiteExecEval"]["mutants"] > 0
        assert rates["TextGeneration"] is None
        # Another database is not the one that was audited, and a changed gate is another gate.
        with closing(sqlite3.connect(tmp_path / "city.db")) as database, database:
            database.execute("INSERT INTO city VALUES (99, 'new', 'Italy', 1)")
        floor = parse_pipeline(made).run(output_dir=root).quality["floor"]
        assert floor == [{"requirement": "audited", "required": 2, "reached": 1, "met": False}]


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == ExitCode.OK


def test_the_command_prints_a_table_and_what_was_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = sql_config(tmp_path, RECORDS[:8])
    made["steps"][5]["RuleFilter"]["max_chars"] = 63
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(made))
    command("audit", "-c", str(path), "-o", str(tmp_path / "artifacts"), "--mutants", "1")
    text = capsys.readouterr().out
    assert "RuleFilter: false_reject: train.jsonl:" in text and "too_long" in text
    assert "comparison" in text and "audits" in text
