"""A whole run with the steps that keep things out, several databases and a hard case, and what its proofs say."""

import json
import sqlite3
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fastdistill.control.config import load_pipeline
from fastdistill.control.ledger import read_samples
from fastdistill.control.session import RunResult
from fastdistill.core.types import Status

QUESTIONS = {  # the question, the database, and what the teacher says
    "Which people of the town are older than fifty years?": ("north", "SELECT name FROM p WHERE age > 50"),
    "which people of the town are older than fifty years": ("north", "SELECT name FROM p WHERE age > 50"),
    "How many people live in this town of ours today, all in all?": ("south", "SELECT 20 FROM p LIMIT 1"),
    "Who is the oldest of all people that live in the little town by the sea?": ("south", "SELECT 1"),
    "What are the ages of them?": ("gone", "SELECT age FROM p"),
}
GOLDS = ["SELECT name FROM p WHERE age > 50"] * 2 + ["SELECT count(*) FROM p"] * 2 + ["SELECT age FROM p"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept-out")
    for name in ("north", "south"):
        with closing(sqlite3.connect(folder / f"{name}.db")) as connection:
            connection.execute("CREATE TABLE p(name TEXT, age INT)")
            connection.executemany("INSERT INTO p VALUES (?, ?)", [(f"{name} {at}", 40 + at) for at in range(20)])
            connection.commit()
    said = [{"prompt": question, "completion": sql} for question, (_, sql) in QUESTIONS.items()]
    (folder / "said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    item = "Who is the oldest of all people that live in the little town in the hills?"
    (folder / "eval.jsonl").write_text(json.dumps({"question": item}) + "\n")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> RunResult:
    rows: list[dict[str, Any]] = [
        {"question": question, "db_id": db, "gold_sql": gold}
        for (question, (db, _)), gold in zip(QUESTIONS.items(), GOLDS, strict=True)
    ]
    steps = [
        {"LoadJsonl": {"rows": rows}},
        {"CanonicalizeFields": {"fields": ["question"]}},
        {"Decontaminate": {"against": [str(folder / "eval.jsonl")], "fields": ["question"]}},
        {"NearDuplicates": {"fields": ["question"]}},
        {"TextGeneration": {"template": "{{ question }}"}},
        {"SQLiteExecEval": {"db_path": f"{folder}/{{{{ db_id }}}}.db", "perturbations": 2}},
        {"SelectBest": {}},
        "ExportSFT",
        "ExportHardCases",
    ]
    path = folder / "pipeline.yaml"
    models = {"teacher": {"provider": "replay", "path": str(folder / "said.jsonl")}}
    path.write_text(json.dumps({"name": "kept-out", "models": models, "steps": steps}))
    return load_pipeline([path]).run(output_dir=folder / "artifacts")


def test_each_record_went_where_it_belongs(result: RunResult) -> None:
    samples = list(read_samples(result.path / "ledger.sqlite"))
    assert [sample.status for sample in samples] == [
        Status.OPEN,
        Status.DUPLICATE,
        Status.OPEN,
        Status.CONTAMINATED,
        Status.OPEN,
    ]
    assert samples[1].failures[0].message == f"rows:2: 100% the same as rows:1 ({samples[0].sample_id})"
    assert samples[3].failures[0].message == "rows:4: 81% of the words of eval.jsonl:1"
    verdicts = [sample.candidates[0].verdicts[0].reason for sample in samples if sample.candidates]
    assert verdicts == ["match", "mismatch_perturbed", "database_unreadable"]


def test_the_quality_report_counts_them(result: RunResult, folder: Path) -> None:
    counts = result.quality["samples"]
    assert (counts["read"], counts["duplicates"], counts["contaminated"], counts["failed"]) == (5, 1, 1, 0)
    stages = {stage["step"]: stage for stage in result.quality["stages"]}
    assert stages["Decontaminate"]["samples_rejected"] == {"contaminated": 1}
    assert stages["Decontaminate"]["findings"] == {
        "against": [
            {
                "path": str(folder / "eval.jsonl"),
                "items": 1,
                "without_text": 0,
                "exact": 0,
                "ngram": 1,
                "report_ngram": 1,
            }
        ]
    }
    assert stages["SQLiteExecEval"]["candidates"]["perturbed_match_rate"]["total"] == 2


def test_the_manifest_has_every_database_and_the_hard_cases(result: RunResult, folder: Path) -> None:
    inputs = {Path(entry["path"]).name: entry["sha256"] for entry in result.manifest["inputs"]}
    wanted = {name: sha256((folder / name).read_bytes()).hexdigest() for name in ("north.db", "south.db", "eval.jsonl")}
    assert inputs == wanted
    assert "dist/hard/cases.jsonl" in {entry["path"] for entry in result.manifest["outputs"]}


def test_what_never_passed_is_exported_though_nothing_was_chosen(result: RunResult) -> None:
    (line,) = (result.dataset / "hard" / "cases.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["best"] == "SELECT 20 FROM p LIMIT 1"
    assert row["reasons"] == {"SQLiteExecEval": {"mismatch_perturbed": 1}}
