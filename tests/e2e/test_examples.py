"""The examples, run as their users run them: as processes, told by the environment and the command line."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastdistill.data.execution.sandbox import available_isolation
from tests.servers import Call, ollama_server, openai_server
from tests.world import ANSWERS, RECORDS, make_database, write_records

EXAMPLES = Path(__file__).parents[2] / "examples" / "fastdistill"


def teacher(call: Call, index: int) -> str:
    """An answer that depends on the prompt and on seed + index only."""
    answers = next((texts for key, texts in ANSWERS.items() if key in call.prompt), ["red"])
    drawn = hashlib.sha256(f"{call.prompt} {(call.seed or 0) + index}".encode()).digest()
    return answers[drawn[0] % len(answers)]


def run(command: Sequence[object], folder: Path, environment: Mapping[str, object]) -> str:
    """What a command printed, with no more of our environment than a shell needs."""
    own = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "PYTHONPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        env=own | {name: str(value) for name, value in environment.items()},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(folder: Path) -> dict[str, object]:
    return {
        "FASTDISTILL_DATA_PATH": write_records(folder),
        "FASTDISTILL_DB_PATH": make_database(folder),
        "FASTDISTILL_ARTIFACTS_DIR": folder / "artifacts",
    }


def check(folder: Path, provider: str, samples: int) -> None:
    """The one run under the folder: whole, by this provider, and all its rows right."""
    (manifest_file,) = (folder / "artifacts").glob("runs/*/manifest.json")
    manifest = json.loads(manifest_file.read_text())
    assert manifest["status"] == "complete"
    assert (manifest["models"]["teacher"]["provider"], manifest["models"]["teacher"]["model"]) == (
        provider,
        "teacher:8b",
    )
    quality = json.loads((manifest_file.parent / "quality_report.json").read_text())
    assert quality["samples"]["read"] == quality["samples"]["completed"] == samples
    assert quality["candidates"]["generated"] == 4 * samples
    gold = {record["task_id"]: record["gold_sql"] for record in RECORDS}
    lines = (manifest_file.parent / "dist" / "sft" / "train.jsonl").read_text().splitlines()
    assert len(lines) == quality["samples"]["accepted"] > samples / 2
    for row in map(json.loads, lines):
        assert row["messages"][-1]["content"] == gold[row["fd_task_id"]]


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["openai", "vllm", "sglang"])
def test_the_python_example_with_an_openai_compatible_teacher(tmp_path: Path, provider: str) -> None:
    prefix = provider.upper()
    with openai_server(teacher, models=["teacher:8b"], api_key="the-key") as server:
        variables = {
            "FASTDISTILL_PROVIDER": provider,
            f"{prefix}_MODEL": "teacher:8b",
            f"{prefix}_BASE_URL": server.url,
            f"{prefix}_API_KEY": "the-key",
            f"{prefix}_TIMEOUT": 60,
            "FASTDISTILL_LIMIT": 15,
        }
        command = [sys.executable, EXAMPLES / "fastdistill_pipeline.py"]
        printed = run(command, tmp_path, environment(tmp_path) | variables)
    check(tmp_path, provider, 15)
    assert "SQLiteExecEval" in printed


@pytest.mark.slow
def test_the_python_example_with_ollama(tmp_path: Path) -> None:
    with ollama_server(teacher, models=["teacher:8b"]) as server:
        variables = {
            "FASTDISTILL_PROVIDER": "ollama",
            "OLLAMA_MODEL": "teacher:8b",
            "OLLAMA_HOST": server.url,
            "OLLAMA_TIMEOUT": 240,
            "FASTDISTILL_LIMIT": 15,
        }
        run([sys.executable, EXAMPLES / "fastdistill_pipeline.py"], tmp_path, environment(tmp_path) | variables)
    check(tmp_path, "ollama", 15)


@pytest.mark.slow
def test_the_python_example_says_what_is_missing(tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "PYTHONPATH")}
    command = [sys.executable, str(EXAMPLES / "fastdistill_pipeline.py")]
    done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "set OLLAMA_MODEL to the name of the teacher model" in done.stderr


@pytest.mark.slow
def test_the_ollama_config_through_the_command_line(tmp_path: Path) -> None:
    cli = [sys.executable, "-m", "fastdistill.control.cli", "pipeline"]
    config = ["--config", EXAMPLES / "fastdistill_pipeline_ollama.yaml", "--set", "models.teacher.model=teacher:8b"]
    with ollama_server(teacher, models=["teacher:8b"]) as server:
        variables = environment(tmp_path) | {"OLLAMA_HOST": server.url}
        printed = run([*cli, "validate", *config], tmp_path, variables)
        assert "valid; 10 steps" in printed
        printed = run([*cli, "run", *config], tmp_path, variables)
    assert "SQLiteExecEval" in printed
    check(tmp_path, "ollama", 60)


@pytest.mark.slow
@pytest.mark.skipif(available_isolation().level is None, reason=str(available_isolation()))
def test_the_code_config_goes_on_past_answers_and_problems_of_every_kind(tmp_path: Path) -> None:
    right = "def f(x):\n    return x + 1"
    answers = {
        "right": f"Sure:\n\n```python\n{right}\n```",
        "noise": "\x00\x7f\x1b\ufffd" * 500,
        "rust": "fn f(x: i64) -> i64 { x + 1 }",
        "empty": "",
        "huge": "x = 1\n" * 3_400_000,
        "hangs": "def f(x):\n    while True: pass",
        "forged": "import os\nprint('passed')\nos._exit(0)",
        "broken_gold": right,
        "hanging_test": right,
    }
    changes: dict[str, dict[str, object]] = {
        "broken_gold": {"gold_code": "def f(x): return x"},
        "hanging_test": {"tests": ["while True: pass"]},
    }
    problem = {"entry_point": "f", "setup": "", "tests": ["assert f(1) == 2"], "gold_code": right}
    with (tmp_path / "train.jsonl").open("w") as records, (tmp_path / "answers.jsonl").open("w") as recording:
        for name, answer in answers.items():
            record = {"task_id": name, "instruction": name, **problem, **changes.get(name, {})}
            records.write(json.dumps(record) + "\n")
            recording.write(json.dumps({"key": name, "completions": [answer] * 2}) + "\n")
    teacher = {"provider": "replay", "path": str(tmp_path / "answers.jsonl")}
    changed = {
        **{f"models.teacher.{key}": value for key, value in teacher.items()},
        "steps.TextGeneration.num_generations": 2,
        "steps.PythonExecEval.limits.cpu_s": 1,
        "require.min_total": 1,
        "require.pass_rate.PythonExecEval": 0,
    }
    command = [sys.executable, "-m", "fastdistill.control.cli", "pipeline", "run"]
    command += ["--config", str(EXAMPLES / "code_mbpp.yaml")]
    command += [part for key, value in changed.items() for part in ("--set", f"{key}={value}")]
    variables = {"FASTDISTILL_DATA_PATH": tmp_path / "train.jsonl", "FASTDISTILL_ARTIFACTS_DIR": tmp_path / "artifacts"}
    run(command, tmp_path, variables)
    (folder,) = (tmp_path / "artifacts").glob("runs/*")
    quality = json.loads((folder / "quality_report.json").read_text())
    assert (quality["samples"]["accepted"], quality["samples"]["undecided"], quality["samples"]["failed"]) == (1, 2, 0)
    reasons = {stage["step"]: stage["candidates"]["reasons"] for stage in quality["stages"] if "candidates" in stage}
    assert reasons["RuleFilter"] == {"empty": 2, "too_long": 2}
    wanted = {"syntax_error": 4, "limit_cpu": 2, "exited": 2, "gold_invalid": 1, "tests_limit": 2}
    assert reasons["PythonExecEval"] == wanted
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["environment"]["PythonExecEval"]["isolation"] == available_isolation().level


def reasoning_teacher(call: Call, index: int) -> str:
    """Right in three draws of four, each with its own words before the query; the third draw drops the form."""
    gold = next((record["gold_sql"] for record in RECORDS if record["instruction"] in call.prompt), "red")
    draw = ((call.seed or 0) + index) % 4
    query = gold.replace(" > ", " < ") if draw == 3 and call.model == "teacher:8b" else gold
    if call.model == "student:1b" and draw != 2:
        query = gold.replace(" > ", " < ")
    if "### RATIONALE" not in call.messages[0]["content"] or draw == 2:
        return query
    return f"### RATIONALE\nTABLES: city\nFILTERS: country and people, draw {draw}\n### ANSWER\n```sql\n{query};\n```"


def recipe(folder: Path, name: str, *sets: str) -> tuple[Path, dict[str, Any]]:
    """Runs a recipe with the scripted teacher and student; its data set and its quality report."""
    command = [sys.executable, "-m", "fastdistill.control.cli", "pipeline", "run", "--quiet"]
    command += ["--config", str(EXAMPLES / f"{name}.yaml"), *(f"--set={each}" for each in sets)]
    with ollama_server(reasoning_teacher, models=["teacher:8b", "student:1b"]) as server:
        variables = environment(folder) | {"OLLAMA_HOST": server.url}
        run([*command, "--set", "models.teacher.model=teacher:8b"], folder, variables)
    (report,) = (folder / "artifacts").glob("runs/*/quality_report.json")
    return report.parent / "dist", json.loads(report.read_text())


def rows(dist: Path, folder: str) -> list[dict[str, Any]]:
    """The rows of both splits, or of one."""
    files = sorted((dist / folder).glob("*.jsonl")) or [dist / f"{folder}.jsonl"]
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def stage(quality: Mapping[str, Any], step: str) -> Any:
    return next(stage for stage in quality["stages"] if stage["step"] == step)


@pytest.mark.slow
def test_the_recipe_for_distilling_step_by_step(tmp_path: Path) -> None:
    dist, quality = recipe(tmp_path, "recipe_step_by_step")
    split = stage(quality, "SplitRationale")["candidates"]
    assert split["rationale_missing_rate"]["successes"] + split["rationale_ok_rate"]["successes"] == split["judged"]
    written = rows(dist, "sft_pc")
    parts = [row["fd_part"] for row in written]
    assert parts.count("label") == quality["samples"]["accepted"] == 60
    assert 0 < parts.count("rationale") <= 60
    gold = {record["task_id"]: record["gold_sql"] for record in RECORDS}
    for row in written:
        text, system = row["completion"][0]["content"], row["prompt"][0]["content"]
        assert system == f"[{row['fd_part']}] You write SQLite."
        if row["fd_part"] == "label":
            assert text == gold[row["fd_task_id"]]
        else:
            assert text.startswith("TABLES: city\nFILTERS: country and people")
    train, validation = (
        {row["fd_sample_id"] for row in rows(dist, f"sft/{split}")} for split in ("train", "validation")
    )
    assert len(train | validation) == 60
    assert not train & validation
    assert {path.name for path in (dist / "mlx").iterdir()} == {"train.jsonl", "valid.jsonl"}


@pytest.mark.slow
def test_the_recipe_for_data_distillation_and_how_right_its_pseudo_gold_is(tmp_path: Path) -> None:
    dist, quality = recipe(tmp_path, "recipe_data_distillation", "steps.SQLiteExecEval.gold_field=gold_sql")
    vote = stage(quality, "MajorityVote")["candidates"]
    assert vote["pass"] > 0
    right = vote["pseudo_gold_right_rate"]
    assert right["rate"] > 0.9
    gold = {record["task_id"]: record["gold_sql"] for record in RECORDS}
    written = rows(dist, "sft")
    wrong = {row["fd_task_id"] for row in written if row["messages"][-1]["content"] != gold[row["fd_task_id"]]}
    # The figure is what one finds out by looking at the rows: each sample counts once.
    assert (len(wrong), len({row["fd_task_id"] for row in written})) == (
        right["total"] - right["successes"],
        right["total"],
    )
    for row in written:
        share = next(gate["score"] for gate in row["fd_gates"] if gate["gate"] == "MajorityVote")
        assert 0.6 <= share <= 1


@pytest.mark.slow
def test_the_recipe_for_preference_data(tmp_path: Path) -> None:
    dist, quality = recipe(tmp_path, "recipe_preference")
    pairs = rows(dist, "preference")
    assert len(pairs) == stage(quality, "ExportPreference")["report"]["pairs"] > 0
    for pair in pairs:
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert (" > " in chosen, " < " in rejected, pair["fd_by"]) == (True, True, "execution")
    for file in ("lf/preference_train.jsonl", "openai/dpo_train.jsonl", "kto/train.parquet", "configs/trl_dpo.yaml"):
        assert (dist / file).stat().st_size > 0


@pytest.mark.slow
def test_the_recipe_for_preferences_of_the_teacher_over_the_student(tmp_path: Path) -> None:
    dist, _ = recipe(tmp_path, "recipe_preference_teacher_vs_student", "models.student.model=student:1b")
    pairs = rows(dist, "preference")
    assert pairs
    assert {(pair["fd_chosen_model"], pair["fd_rejected_model"]) for pair in pairs} == {("teacher:8b", "student:1b")}
