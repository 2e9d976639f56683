"""The whole pipeline over the embedded teacher's weights behind the real llama.cpp server."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from fastdistill import Pipeline
from fastdistill.control.config import parse_pipeline
from lab.grammar import write_synthetic
from tests.llamacpp import llamacpp_server

pytest.importorskip("xllamacpp", reason="the extra `servers` is not installed")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lab.export_gguf import export

    path = tmp_path_factory.mktemp("gguf") / "teacher.gguf"
    export(Path("src/fastdistill/model/embedded"), path)
    return path


def pipeline(records: Path, teacher: Mapping[str, object], **generation: object) -> Pipeline:
    ask = {
        "system_prompt": "Return SQL only.",
        "template": "Schema: {{ schema }}\nQuestion: {{ instruction }}\nSQL:",
        "decode_profile": {"max_tokens": 96, **dict(generation.pop("decode_profile", {}))},  # type: ignore[call-overload]
        **generation,
    }
    return parse_pipeline(
        {
            "name": "served",
            "models": {"teacher": dict(teacher)},
            "steps": [
                {"LoadJsonl": {"path": str(records)}},
                {"CanonicalizeFields": {"fields": ["schema", "instruction"]}},
                {"TextGeneration": ask},
                "CleanSqlOutput",
                {"SQLiteExecEval": {"db_path": str(records.parent / "databases" / "{{ db_id }}.sqlite")}},
                "ExportSFT",
            ],
        }
    )


def test_a_data_set_is_distilled_from_a_real_server(gguf: Path, tmp_path: Path) -> None:
    records = write_synthetic(tmp_path, 30, 13)
    with llamacpp_server(gguf) as url:
        teacher = {"provider": "openai", "model": str(gguf), "base_url": url, "api_key": "none"}
        result = pipeline(records, teacher, num_generations=3).run(output_dir=tmp_path / "artifacts")
    assert result.exit_code == 0
    assert result.quality["candidates"]["generated"] == 90
    assert result.quality["samples"]["accepted"] >= 18, "about 90% of questions have a right answer among three"
    endpoint = result.manifest["models"]["teacher"]["endpoints"][0]
    assert endpoint["n"] is False, "llama.cpp counts the tokens of one choice only, so it is asked one by one"
    assert endpoint["logprobs"] is True
    assert endpoint["slots"] == 4
    # Every answer has its own usage, so that the sum is right.
    assert result.timing["models"]["teacher"]["requests"] == 90
    assert result.quality["tokens"]["completion"] > 90 * 5


def test_llamacpp_and_the_embedded_engine_give_the_same_greedy_answers(gguf: Path, tmp_path: Path) -> None:
    records = write_synthetic(tmp_path, 20, 13)
    greedy = {"decode_profile": {"temperature": 0}}
    embedded = pipeline(records, {"provider": "embedded"}, **greedy).run(output_dir=tmp_path / "embedded")
    with llamacpp_server(gguf) as url:
        teacher = {"provider": "openai", "model": str(gguf), "base_url": url, "api_key": "none"}
        served = pipeline(records, teacher, **greedy).run(output_dir=tmp_path / "served")
    same = ("samples", "candidates")
    assert [embedded.quality[part] for part in same] == [served.quality[part] for part in same]
