"""A finished run written again for other trainers, and what the trainers' own loader says of it."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdistill.control.config import parse_pipeline
from fastdistill.control.export import export_run
from fastdistill.control.folder import write_json
from fastdistill.control.session import RunResult
from fastdistill.core.errors import ConfigError, EnvironmentFault, InputError, TeacherError
from fastdistill.data.export.trainers import trainer_files
from tests.servers import Call, choose, openai_server, status
from tests.world import ANSWERS, RECORDS, config, make_database, write_records

TEMPLATES = ["${HOME} {{ schema }}\nQuestion: {{ instruction }}", "{{ instruction }} {{ schema }}"]


@dataclass(frozen=True)
class Finished:
    root: Path
    result: RunResult
    prompts: dict[str, int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    with openai_server(choose(ANSWERS)) as server:
        templates = [text.replace("${", "$${") for text in TEMPLATES]
        made = config(server.url, write_records(folder), make_database(folder), template=templates, num_generations=4)
        made["steps"][-1] = {"ExportSFT": {"validation": 0.2, "shapes": ["messages", "prompt_completion", "prompt"]}}
        made["steps"].append({"ExportPreference": {"validation": 0.2, "length_ratio": [0, 9]}})
        result = parse_pipeline(made).run(output_dir=folder / "artifacts", run_id="done")
        return Finished(folder / "artifacts", result, dict(server.counters.prompts))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_draws_take_turns_over_the_templates(finished: Finished) -> None:
    asked = [sum(count for prompt, count in finished.prompts.items() if key in prompt) for key in ("\nQuestion", "? C")]
    assert asked == [len(RECORDS), len(RECORDS)]  # requests, each for two draws
    rows = [json.loads(line) for line in (finished.result.dataset / "kto" / "train.jsonl").read_bytes().splitlines()]
    for row in rows:
        first, second = (text.split("{{")[0].strip() for text in TEMPLATES)
        assert row["prompt"][-1]["content"].startswith(first) is (row["fd_attempt"] % 2 == 0), second


def test_the_same_formats_give_the_same_bytes(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    export_run("done", ["parquet", "jsonl"], [], None, finished.root)
    again = finished.root / "runs" / "done" / "export"
    assert f"written to {again}" in capsys.readouterr().out
    before, after = files(finished.result.dataset), files(again)
    assert before.keys() == after.keys()
    differ = {name for name in before if before[name] != after[name]}
    # The configs name the folder that they lie in.
    assert all(name.startswith("configs/") or name == "checksums.txt" for name in differ)


def test_only_what_was_asked_for_is_written_with_other_options(finished: Finished, tmp_path: Path) -> None:
    export_run(
        "done", ["mlx"], ["ExportSFT.validation=0", "ExportSFT.system_prompt=Hi"], tmp_path / "new", finished.root
    )
    assert sorted(files(tmp_path / "new")) == ["README.md", "checksums.txt", "configs/mlx_lora.yaml", "mlx/train.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "new" / "mlx" / "train.jsonl").read_bytes().splitlines()]
    assert len(rows) == finished.result.quality["candidates"]["selected"]
    assert all(row["messages"][0] == {"role": "system", "content": "Hi"} for row in rows)


def test_quotas_of_difficulty_do_not_depend_on_speed_and_can_be_changed_afterwards(tmp_path: Path) -> None:
    made = []
    for number in (1, 2):

        def latency(call: Call, number: int = number) -> float:
            return random.Random(f"{number} {call.seed} {call.prompt}").uniform(0, 0.05)

        (folder := tmp_path / str(number)).mkdir()
        with openai_server(choose(ANSWERS), latency=latency) as server:
            run = config(server.url, write_records(folder), make_database(folder), num_generations=6)
            run["steps"][-1] = {"ExportSFT": {"difficulty_quotas": {0.5: 3, "0.7": 4}}}
            made.append(parse_pipeline(run).run(output_dir=folder / "artifacts", run_id="done"))
    first, second = (files(result.dataset / "sft") for result in made)
    assert first == second
    report = next(s["report"] for s in made[0].quality["stages"] if s["step"] == "ExportSFT")
    assert (report["difficulty_to_0.5"], report["difficulty_to_0.7"]) == (3, 4)
    assert report["left_out_difficulty_to_0.5"] > 0
    again = tmp_path / "again"
    override = "ExportSFT.difficulty_quotas={0.5: 0, 0.7: 0}"
    export_run("done", ["jsonl"], [override], again, tmp_path / "1" / "artifacts")
    hard = [json.loads(line)["fd_id"] for line in (again / "sft" / "train.jsonl").read_bytes().splitlines()]
    both = [json.loads(line)["fd_id"] for line in first["train.jsonl"].splitlines()]
    assert len(both) == len(hard) + 7
    assert set(hard) < set(both)


@pytest.mark.parametrize(
    ("formats", "overrides", "problem"),
    [
        (["mxl"], [], "--format mxl: known are: parquet"),
        (["mlx"], ["TextGeneration.seed=1"], "begins with an export of this run: ExportSFT, ExportPreference"),
        (["mlx"], ["ExportSFT.seed=1"], "unknown key"),
        (["mlx"], ["ExportSFT.target=concat"], "there is no gate 'SplitRationale'"),
    ],
)
def test_what_a_run_can_not_give_is_said(
    finished: Finished, formats: list[str], overrides: list[str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        export_run("done", formats, overrides, None, finished.root)


def test_nothing_is_overwritten_and_nothing_half_is_exported(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(EnvironmentFault, match="is there already"):
        export_run("done", ["mlx"], [], tmp_path, finished.root)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    manifest = finished.root / "runs" / "killed" / "manifest.json"
    manifest.parent.mkdir()
    write_json(manifest, {"status": "running"})
    with pytest.raises(InputError, match="running; only a finished run"):
        export_run("killed", ["mlx"], [], None, finished.root)


def test_the_quality_report_tells_what_the_exports_wrote(finished: Finished) -> None:
    reports = {stage["step"]: stage["report"] for stage in finished.result.quality["stages"] if "report" in stage}
    assert reports["ExportSFT"] == {"rows": finished.result.quality["candidates"]["selected"]}
    assert reports["ExportPreference"]["pairs"] == reports["ExportPreference"]["chosen_longer_rate"]["total"] > 0


LOAD = """
import sys
from datasets import get_dataset_config_names, load_dataset
for name in get_dataset_config_names("./dist"):
    for split, rows in load_dataset("./dist", name).items():
        print(name, split, rows.num_rows, *(column for column in rows.column_names if not column.startswith("fd_")))
"""


@pytest.mark.slow
def test_the_datasets_library_loads_every_config_and_split(finished: Finished, tmp_path: Path) -> None:
    own = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=own | offline | {"HOME": str(tmp_path)},
        cwd=finished.result.dataset.parent,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = []
    columns = {
        "sft": "messages",
        "sft_pc": "prompt completion",
        "kto": "prompt completion label",
        "preference": "prompt chosen rejected",
        "prompts": "prompt",
    }
    for name, shown in columns.items():
        for split in ("train", "validation"):
            rows = (finished.result.dataset / name / f"{split}.jsonl").read_bytes().count(b"\n")
            assert rows > 0
            expected.append(f"{name} {split} {rows} {shown}")
    assert done.stdout.splitlines() == expected


def configs(*paths: str) -> Iterator[tuple[str, Any]]:
    for path, text in trainer_files("dist", paths).items():
        yield path, json.loads(text) if path.endswith(".json") else yaml.safe_load(text)


def test_a_config_names_only_files_that_are_there() -> None:
    assert dict(configs()) == {}
    without = dict(configs("sft_pc/train.parquet", "sft/train.parquet", "mlx/train.jsonl"))
    assert sorted(without) == [
        "configs/axolotl_sft.yaml", "configs/llamafactory_sft.yaml", "configs/mlx_lora.yaml", "configs/trl_sft.yaml",
        "dataset_info.json",
    ]  # fmt: skip
    assert "test_datasets" not in without["configs/axolotl_sft.yaml"]
    assert "eval_dataset" not in without["configs/llamafactory_sft.yaml"]
    assert "dataset_test_split" not in without["configs/trl_sft.yaml"]
    assert list(without["dataset_info.json"]) == ["fd_sft"]
    assert without["configs/mlx_lora.yaml"]["mask_prompt"] is True


def test_llamafactory_never_reads_the_formatting_that_adds_words_of_its_own() -> None:
    names = [
        "sft/train.parquet",
        "sft/validation.parquet",
        "lf/preference_train.jsonl",
        "lf/preference_validation.jsonl",
    ]
    made = dict(configs(*names))
    index = made["dataset_info.json"]
    assert [entry["file_name"] for entry in index.values()] == names
    assert {entry["formatting"] for entry in index.values()} == {"sharegpt"}
    assert [name for name, entry in index.items() if entry.get("ranking")] == ["fd_preference", "fd_preference_valid"]
    for path in ("sft", "dpo"):
        named = made[f"configs/llamafactory_{path}.yaml"]
        assert {named["dataset"], named["eval_dataset"]} <= index.keys()


def test_a_split_without_rows_is_not_offered(finished: Finished, tmp_path: Path) -> None:
    export_run("done", ["trl", "mlx"], ["ExportSFT.validation=0.0000001"], tmp_path / "new", finished.root)
    assert (tmp_path / "new" / "sft_pc" / "validation.parquet").exists()
    header = yaml.safe_load((tmp_path / "new" / "README.md").read_text().split("---")[1])
    (sft,) = (each for each in header["configs"] if each["config_name"] == "sft_pc")
    assert [data["split"] for data in sft["data_files"]] == ["train"]
    assert "eval_strategy" not in yaml.safe_load((tmp_path / "new" / "configs" / "trl_sft.yaml").read_text())


def test_a_student_that_no_step_asks_is_found_before_anything_is_spent() -> None:
    made = config("http://localhost:1", Path("train.jsonl"), Path("city.db"))
    made["steps"].append({"ExportPreference": {"pair_source": "teacher_vs_student", "student_step": "pupil"}})
    with pytest.raises(ConfigError, match="there is no step named 'pupil'; there are: LoadJsonl"):
        parse_pipeline(made)


def test_a_teacher_that_refuses_ends_a_run_with_several_templates(tmp_path: Path) -> None:
    templates = ["{{ instruction }} one", "{{ instruction }} two"]
    with openai_server(choose(ANSWERS), faults={"two": status(401, times=None)}) as server:
        made = config(server.url, write_records(tmp_path), make_database(tmp_path), template=templates)
        with pytest.raises(TeacherError):
            parse_pipeline(made).run(output_dir=tmp_path / "artifacts")
