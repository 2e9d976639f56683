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

import pyarrow.parquet as pq
import pytest
import yaml
from jinja2 import Environment

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
        splits = {"validation": 0.2, "test": 0.2}
        made["steps"][-1] = {"ExportSFT": {**splits, "shapes": ["messages", "prompt_completion", "prompt"]}}
        made["steps"].append({"ExportPreference": {**splits, "length_ratio": [0, 9]}})
        result = parse_pipeline(made).run(output_dir=folder / "artifacts", run_id="done")
        return Finished(folder / "artifacts", result, dict(server.counters.prompts))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_draws_take_turns_over_the_templates(finished: Finished) -> None:
    asked = [sum(count for prompt, count in finished.prompts.items() if key in prompt) for key in ("\nQuestion", "? C")]
    # A request for each draw: between the seeds of two lies that of the other template.
    assert asked == [2 * len(RECORDS), 2 * len(RECORDS)]
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


def test_a_run_that_met_its_target_is_exported_up_to_there(tmp_path: Path) -> None:
    with openai_server(choose(ANSWERS)) as server:
        made = config(server.url, write_records(tmp_path), make_database(tmp_path)) | {"target": {"accepted": 5}}
        result = parse_pipeline(made).run(output_dir=tmp_path / "artifacts", run_id="done")
    (tmp_path / "again").mkdir()
    export_run("done", ["parquet", "jsonl"], [], tmp_path / "again" / "dist", tmp_path / "artifacts")
    assert files(tmp_path / "again" / "dist") == files(result.dataset)


def test_the_card_says_what_an_export_left_out(finished: Finished, tmp_path: Path) -> None:
    export_run("done", ["jsonl"], ["ExportSFT.template='{{ nobody }}'"], tmp_path / "new", finished.root)
    card = (tmp_path / "new" / "README.md").read_text()
    assert f"Left out: 0 duplicate, 0 contaminated and {len(RECORDS)} failed records" in card


def test_only_what_was_asked_for_is_written_with_other_options(finished: Finished, tmp_path: Path) -> None:
    export_run(
        "done",
        ["mlx"],
        ["ExportSFT.validation=0", "ExportSFT.test=0", "ExportSFT.system_prompt=Hi"],
        tmp_path / "new",
        finished.root,
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


def test_the_folder_where_one_stands_can_be_written_to(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_run("done", ["mlx"], [], Path(), finished.root)
    assert "./" + tmp_path.name + "/mlx" in (tmp_path / "configs" / "mlx_lora.yaml").read_text()


def test_the_quality_report_tells_what_the_exports_wrote(finished: Finished) -> None:
    reports = {stage["step"]: stage["report"] for stage in finished.result.quality["stages"] if "report" in stage}
    written = dict(reports["ExportSFT"])
    assert written.pop("rows") == finished.result.quality["candidates"]["selected"]
    assert list(written) == ["test_samples", "train_samples", "validation_samples"]
    assert sum(written.values()) == len(RECORDS)
    assert reports["ExportPreference"]["pairs"] == reports["ExportPreference"]["chosen_longer_rate"]["total"] > 0


LOAD = """
import sys
from datasets import get_dataset_config_names, load_dataset
for name in get_dataset_config_names("./dist"):
    for split, rows in load_dataset("./dist", name).items():
        print(name, split, rows.num_rows, *(column for column in rows.column_names if not column.startswith("fd_")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["parquet", "jsonl"])
def test_the_datasets_library_loads_every_config_and_split(finished: Finished, tmp_path: Path, format_: str) -> None:
    export_run("done", [format_], [], tmp_path / "dist", finished.root)
    own = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=own | offline | {"HOME": str(tmp_path)},
        cwd=tmp_path,
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
        for split in ("test", "train", "validation"):
            rows = (finished.result.dataset / name / f"{split}.jsonl").read_bytes().count(b"\n")
            assert rows > 0
            expected.append(f"{name} {split} {rows} {shown}")
    assert done.stdout.splitlines() == expected


def configs(*paths: str, **rows: int) -> Iterator[tuple[str, Any]]:
    for path, text in trainer_files("dist", dict.fromkeys(paths, 100) | rows).items():
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
        "sft/test.parquet",
        "lf/preference_train.jsonl",
        "lf/preference_validation.jsonl",
        "lf/kto_train.jsonl",
        "lf/kto_validation.jsonl",
    ]
    made = dict(configs(*names))
    index = made["dataset_info.json"]
    assert [entry["file_name"] for entry in index.values()] == names
    assert {entry["formatting"] for entry in index.values()} == {"sharegpt"}
    assert [name for name, entry in index.items() if entry.get("ranking")] == ["fd_preference", "fd_preference_valid"]
    assert index["fd_kto"]["columns"] == {"messages": "messages", "kto_tag": "label"}
    for path in ("sft", "dpo", "kto"):
        named = made[f"configs/llamafactory_{path}.yaml"]
        assert {named["dataset"], named["eval_dataset"]} <= index.keys()


# --- what trainers that are not installed here ask of a row, by what they publish ---


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def checked_messages(messages: Any) -> list[str]:
    """Roles, in their order. https://cookbook.openai.com/examples/chat_finetuning_data_prep has these rules."""
    assert isinstance(messages, list)
    for message in messages:
        assert message.keys() == {"role", "content"}
        assert message["role"] in ("system", "user", "assistant")
        assert isinstance(message["content"], str)
        assert message["content"].strip()
    return [message["role"] for message in messages]


def test_openais_files_keep_to_the_rules_that_it_publishes(finished: Finished, tmp_path: Path) -> None:
    """https://developers.openai.com/api/docs/guides/supervised-fine-tuning, .../direct-preference-optimization."""
    export_run("done", ["openai"], [], tmp_path / "new", finished.root)
    folder = tmp_path / "new" / "openai"
    assert len(list(folder.iterdir())) == 6
    for split in ("train", "valid", "test"):
        fine_tuning, preferences = jsonl(folder / f"sft_{split}.jsonl"), jsonl(folder / f"dpo_{split}.jsonl")
        if split == "train":
            assert min(len(fine_tuning), len(preferences)) >= 10, "it takes no less"
        for row in fine_tuning:
            assert row.keys() == {"messages"}
            roles = checked_messages(row["messages"])
            assert (roles[-1], roles.count("assistant")) == ("assistant", 1)
        for row in preferences:
            assert row.keys() == {"input", "preferred_output", "non_preferred_output"}
            assert row["input"].keys() == {"messages", "tools", "parallel_tool_calls"}
            assert (row["input"]["tools"], row["input"]["parallel_tool_calls"]) == ([], True)
            assert checked_messages(row["input"]["messages"])[-1] == "user"
            for output in ("preferred_output", "non_preferred_output"):
                assert checked_messages(row[output]) == ["assistant"]
            assert row["preferred_output"] != row["non_preferred_output"]
        # A token has a byte at least: rows of fewer bytes than 65,536, its least limit on an example, are whole.
        lines = [
            line for name in ("sft", "dpo") for line in (folder / f"{name}_{split}.jsonl").read_bytes().split(b"\n")
        ]
        assert max(map(len, lines)) < 65_536


CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TRIMMING = """{% for m in messages %}<|start|>{{ m.role }}<|end|>

{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}"""


@pytest.mark.parametrize("template", [CHATML, TRIMMING])
def test_axolotls_chat_template_default_finds_every_answer_of_a_pair(
    finished: Finished, tmp_path: Path, template: str
) -> None:
    """prompt_strategies/dpo/chat_template.py: it renders the answer after a dummy turn, and looks for it in there."""
    export_run("done", ["axolotl"], [], tmp_path / "new", finished.root)
    made = yaml.safe_load((tmp_path / "new" / "configs" / "axolotl_dpo.yaml").read_text())
    (source,) = made["datasets"]
    assert (made["rl"], source["type"], source["name"], source["split"]) == (
        "dpo", "chat_template.default", "preference", "train"
    )  # fmt: skip
    table = pq.read_table(tmp_path / "new" / source["name"] / f"{source['split']}.parquet")
    assert table.num_rows > 10
    # Of the columns that it knows, there are those that are meant, and no other.
    known = {"messages", "system", "tools", "images", "reasoning_content", "prompt", "chosen", "rejected", "label"}
    assert known & set(table.column_names) == {source["field_messages"], "chosen", "rejected"}
    render = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
    for row in table.to_pylist():
        prompt = row[source["field_messages"]]
        assert checked_messages(prompt)[-1] == "user"
        assert render(messages=prompt, add_generation_prompt=True).rstrip().endswith(("assistant", "<|end|>"))
        for name in ("chosen", "rejected"):
            answer = row[name][-1]
            assert checked_messages([answer]) == ["assistant"]
            shown = render(messages=[{"role": "user", "content": "[[dummy_message]]"}, answer])
            found = shown[shown.find(answer["content"]) :].rstrip()
            assert found in (answer["content"] + "<|im_end|>", answer["content"] + "<|eot|>")


def test_axolotls_chat_template_reads_messages_and_trains_on_the_last_one(finished: Finished, tmp_path: Path) -> None:
    """prompt_strategies/chat_template.py, whose `roles_to_train` is the assistant by default."""
    export_run("done", ["axolotl"], [], tmp_path / "new", finished.root)
    made = yaml.safe_load((tmp_path / "new" / "configs" / "axolotl_sft.yaml").read_text())
    assert [source["split"] for source in made["datasets"] + made["test_datasets"]] == ["train", "validation"]
    for source in made["datasets"] + made["test_datasets"]:
        assert (source["type"], "field_messages" in source) == ("chat_template", False)
        table = pq.read_table(tmp_path / "new" / source["name"] / f"{source['split']}.parquet")
        assert not {"system", "tools", "images"} & set(table.column_names), "columns that change what is rendered"
        for row in table.to_pylist():
            roles = checked_messages(row["messages"])
            assert (roles[-1], roles.count("assistant")) == ("assistant", 1)


def test_a_split_without_rows_is_not_offered(finished: Finished, tmp_path: Path) -> None:
    export_run("done", ["trl", "mlx"], ["ExportSFT.validation=0.0000001"], tmp_path / "new", finished.root)
    assert (tmp_path / "new" / "sft_pc" / "validation.parquet").exists()
    header = yaml.safe_load((tmp_path / "new" / "README.md").read_text().split("---")[1])
    (sft,) = (each for each in header["configs"] if each["config_name"] == "sft_pc")
    assert [data["split"] for data in sft["data_files"]] == ["test", "train"]
    assert "eval_strategy" not in yaml.safe_load((tmp_path / "new" / "configs" / "trl_sft.yaml").read_text())


def test_the_card_and_the_checksums_have_every_split_and_no_config_trains_on_the_test(finished: Finished) -> None:
    dist = finished.result.dataset
    card = (dist / "README.md").read_text()
    held_out = [path for path in files(dist) if Path(path).stem == "test"]
    assert len(held_out) == 5 * 2
    for path in held_out:
        if path.endswith(".jsonl"):
            assert f"| {path} | {(dist / path).read_bytes().count(bytes([10]))} |\n" in card
        assert f"  {path}\n" in (dist / "checksums.txt").read_text()
    texts = {path: text for path, text in files(dist).items() if path.startswith("configs/")}
    assert texts
    assert not [path for path, text in texts.items() if b"test.parquet" in text or b"split: test" in text]


def test_what_one_export_keeps_for_a_test_no_other_trains_on() -> None:
    made = config("http://localhost:1", Path("train.jsonl"), Path("city.db"))
    made["steps"][-1] = {"ExportSFT": {"test": 0.1}}
    made["steps"].append("ExportLogprobs")
    made["steps"][3]["TextGeneration"]["decode_profile"] = {"logprobs": True}
    with pytest.raises(ConfigError, match="exports differ in `test` or `group_by`; give all of them the same"):
        parse_pipeline(made)
    made["steps"][-1] = {"ExportLogprobs": {"test": 0.1}}
    parse_pipeline(made)


def test_two_exports_that_would_write_the_same_file_are_found_before_anything_is_spent() -> None:
    made = config("http://localhost:1", Path("train.jsonl"), Path("city.db"))
    made["steps"].append({"ExportSFT": {"name": "again", "shapes": ["messages"]}})
    with pytest.raises(ConfigError, match=r"two exports write sft/train.parquet, sft/train.jsonl; give one other"):
        parse_pipeline(made)
    made["steps"][-1]["ExportSFT"]["formats"] = ["mlx"]
    parse_pipeline(made)
    for twice, path in (("ExportLogprobs", "logprobs/train.parquet"), ("ExportHardCases", "hard/cases.jsonl")):
        with pytest.raises(ConfigError, match=f"two exports write {path}"):
            parse_pipeline(made | {"steps": [*made["steps"], twice, twice]})


@pytest.mark.parametrize(
    ("train", "valid", "batch", "iters"), [(1000, 50, 16, 124), (1000, 0, 16, 124), (40, 9, 9, 8), (5, 0, 5, 2)]
)
def test_mlx_takes_as_many_steps_as_two_epochs_have_batches(train: int, valid: int, batch: int, iters: int) -> None:
    rows = {"mlx/train.jsonl": train} | ({"mlx/valid.jsonl": valid} if valid else {})
    made = dict(configs(**rows))["configs/mlx_lora.yaml"]
    assert (made["batch_size"], made["iters"]) == (batch, iters)


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
