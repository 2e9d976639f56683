"""Log-probabilities from servers into Parquet, and scores of given tokens by a server that can."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from fastdistill import Pipeline
from fastdistill.control.config import parse_pipeline
from fastdistill.control.ledger import read_samples
from fastdistill.core.errors import InputError, TeacherError, TooManyErrors
from fastdistill.data.export.logprobs import ExportLogprobs
from tests.servers import Call, Reply, ollama_server, openai_server

ASK = {"logprobs": True, "top_logprobs": 3, "token_ids": True}


def pipeline(
    models: Mapping[str, Any], *steps: Any, decode: Mapping[str, Any] = ASK, records: int = 4, **generation: Any
) -> Pipeline:
    rows = [{"question": f"Q{number}"} for number in range(records)]
    ask: Any = {"template": "{{ question }}", "decode_profile": dict(decode), **generation}
    loaded: list[Any] = [{"LoadJsonl": {"rows": rows}}, {"CanonicalizeFields": {"fields": ["question"]}}]
    loaded.append({"TextGeneration": ask})
    return parse_pipeline({"name": "scored", "models": dict(models), "steps": [*loaded, *steps]})


def teacher(url: str, provider: str = "vllm", **fields: Any) -> dict[str, Any]:
    return {"teacher": {"provider": provider, "model": "teacher", "base_url": url, **fields}}


def says(call: Call, index: int) -> str:
    return "SELECT name FROM city"


def test_a_row_has_the_tokens_their_alternatives_and_the_basis(tmp_path: Path) -> None:
    with openai_server(says, logprob_basis="post_temperature") as server:
        decode = {**ASK, "temperature": 0.5}
        result = pipeline(teacher(server.url), "ExportLogprobs", decode=decode, num_generations=2).run(
            output_dir=tmp_path
        )
        ids = [server.token_id(word) for word in says(None, 0).split()]  # type: ignore[arg-type]
        tops = [server.token_id(f"t{at}") for at in range(3)]
    file = pq.ParquetFile(result.dataset / "logprobs" / "train.parquet")
    rows = file.read().to_pylist()
    assert len(rows) == 8
    row = rows[1]
    assert row["fd_id"].endswith("#1")
    assert (row["temperature"], row["logprob_basis"], row["k"]) == (0.5, "post_temperature", 3)
    assert (row["token_ids"], row["tokens"], row["top_ids"], row["top_tokens"]) == (ids, None, tops * 4, None)
    assert row["token_logprobs"] == [-1.0] * 4
    assert row["top_logprobs"] == [-2.0, -4.0, -6.0] * 4, "not renormalised"
    assert row["seq_logprob"] == -4
    assert {row["n_prompt_tokens"] for row in rows} == {1}, "the second choice of a request knows its prompt too"
    columns = [file.metadata.row_group(0).column(at) for at in range(file.metadata.num_columns)]
    halves = [c for c in columns if "token_logprobs" in c.path_in_schema or "top_logprobs" in c.path_in_schema]
    assert all("BYTE_STREAM_SPLIT" in c.encodings and c.compression == "ZSTD" for c in halves)
    assert [str(file.schema_arrow.field(name).type) for name in ("token_logprobs", "top_ids")] == [
        "list<element: halffloat>",
        "list<element: int32>",
    ]


def test_without_ids_the_tokens_texts_stand_in_their_place(tmp_path: Path) -> None:
    with ollama_server(says) as server:
        asked = pipeline(teacher(server.url, "ollama"), "ExportLogprobs", decode={"logprobs": True, "top_logprobs": 1})
        result = asked.run(output_dir=tmp_path)
    row = pq.read_table(result.dataset / "logprobs" / "train.parquet").to_pylist()[0]
    assert (row["token_ids"], row["tokens"]) == (None, says(None, 0).split())  # type: ignore[arg-type]
    assert (row["top_ids"], row["top_tokens"], row["logprob_basis"]) == (None, ["t0"] * 4, "unknown")


def test_stored_answers_give_the_same_file(tmp_path: Path) -> None:
    with openai_server(says) as server:
        first = pipeline(teacher(server.url), "ExportLogprobs").run(output_dir=tmp_path, run_id="first")
    second = pipeline(teacher(server.url), "ExportLogprobs").run(output_dir=tmp_path, run_id="second")
    files = [(run.dataset / "logprobs" / "train.parquet").read_bytes() for run in (first, second)]
    assert files[0] == files[1]


def test_answers_without_logprobs_are_an_error_with_the_remedy(tmp_path: Path) -> None:
    with openai_server(says) as server, pytest.raises(TooManyErrors, match="logprobs: true"):
        pipeline(teacher(server.url), "ExportLogprobs", decode={}).run(output_dir=tmp_path)


# --- axolotl ---


AXOLOTL = {"ExportLogprobs": {"formats": ["parquet", "axolotl"], "template_tail": 1}}


def test_axolotls_rows_line_up_with_the_end_of_the_chat(tmp_path: Path) -> None:
    with openai_server(lambda call, index: "SELECT") as server:
        result = pipeline(teacher(server.url), AXOLOTL).run(output_dir=tmp_path)
        tops = [server.token_id(f"t{at}") for at in range(3)]
    rows = pq.read_table(result.dataset / "axolotl_kd" / "train.parquet").to_pylist()
    assert len(rows) == 4
    assert rows[0]["messages"] == [{"role": "user", "content": "Q0"}, {"role": "assistant", "content": "SELECT"}]
    assert rows[0]["target_token_ids"] == [tops, [0, 1, 2]]
    assert rows[0]["logprobs"] == [[-1, -2, -3], pytest.approx([-math.log(3)] * 3)]


def test_answers_that_could_not_line_up_are_left_out_and_counted(tmp_path: Path) -> None:
    def script(call: Call, index: int) -> Reply:
        # The scripted server's tokens are words without their spaces: of several they do not make the text.
        answers = {"Q0": Reply("SELECT", finish="length"), "Q1": Reply("SELECT 1")}
        return answers.get(call.prompt, Reply("SELECT"))

    with openai_server(script) as server:
        result = pipeline(teacher(server.url), AXOLOTL).run(output_dir=tmp_path)
    told = json.dumps(result.quality)
    assert '"axolotl_left_out.cut": 1' in told
    assert '"axolotl_left_out.text_differs": 1' in told
    assert '"axolotl_rows": 2' in told


def test_axolotls_rows_need_ids_and_the_refusal_says_how_to_get_them(tmp_path: Path) -> None:
    step = {"ExportLogprobs": {"formats": ["axolotl"]}}
    with openai_server(says) as server, pytest.raises(InputError, match="token_ids: true"):
        decode = {"logprobs": True, "top_logprobs": 3}
        pipeline(teacher(server.url), step, decode=decode).run(output_dir=tmp_path)
    with pytest.raises(ValidationError, match="alternatives"):
        ExportLogprobs(formats=("axolotl",), scores="ScoreTokens")


# --- scores of given tokens ---


@pytest.mark.parametrize("same_tokenizer", [False, True])
def test_a_teacher_scores_the_students_samples(tmp_path: Path, same_tokenizer: bool) -> None:
    score = {"ScoreTokens": {"model": "scorer", "same_tokenizer": same_tokenizer}}
    with openai_server(says) as student, openai_server(scores_prompts=True, models=("scorer",)) as scorer:
        models = {**teacher(student.url), "scorer": {"provider": "vllm", "model": "scorer", "base_url": scorer.url}}
        asked = pipeline(models, score, {"ExportLogprobs": {"scores": "ScoreTokens"}})
        result = asked.run(output_dir=tmp_path)
        ids = [scorer.token_id(word) for word in says(None, 0).split()]  # type: ignore[arg-type]
        paid = scorer.counters.paths["/v1/completions"]
        again = asked.run(output_dir=tmp_path)
    rows = pq.read_table(result.dataset / "logprobs" / "train.parquet").to_pylist()
    assert [row["token_ids"] for row in rows] == [ids] * 4
    expected = [-number / 1000 for number in ids]
    assert rows[0]["token_logprobs"] == pytest.approx(expected, rel=1e-3)
    assert rows[0]["seq_logprob"] == pytest.approx(sum(expected))
    assert (rows[0]["n_prompt_tokens"], rows[0]["logprob_basis"], rows[0]["k"]) == (3, "raw", 0)
    assert paid == scorer.counters.paths["/v1/completions"] == 4, "scores are stored like answers"
    assert again.exit_code == 0
    bodies = [body for body in scorer.counters.bodies if "prompt_logprobs" in body]
    assert {(body["max_tokens"], body["prompt_logprobs"]) for body in bodies} == {(1, 0)}


@pytest.mark.parametrize("kind", ["openai", "sglang", "ollama", "embedded", "vllm"])
def test_a_server_that_can_not_score_ends_the_run_with_the_reason(tmp_path: Path, kind: str) -> None:
    """The vllm here stands for something else that lacks /tokenize."""
    make: Any = ollama_server if kind == "ollama" else openai_server
    with make(says) as server:
        models = teacher(server.url)
        models["teacher"] = {"provider": kind, "model": "teacher"}
        if kind != "embedded":
            models["teacher"]["base_url"] = server.url
        with pytest.raises(TeacherError, match=r"can't score tokens that it did not sample.*vLLM"):
            pipeline(models, "ScoreTokens", decode={"max_tokens": 8}).run(output_dir=tmp_path)


def test_an_answer_that_does_not_fit_is_not_scored_and_costs_no_other(tmp_path: Path) -> None:
    def long_at_times(call: Call, index: int) -> str:
        return "word " * 60 if call.prompt == "Q0" else "SELECT 1"

    with openai_server(long_at_times) as student, openai_server(scores_prompts=True, context=40) as scorer:
        models = {**teacher(student.url), "scorer": teacher(scorer.url)["teacher"]}
        result = pipeline(models, {"ScoreTokens": {"model": "scorer"}}).run(output_dir=tmp_path)
    found = [c.verdicts[0] for s in read_samples(result.path / "ledger.sqlite") for c in s.candidates]
    assert [v.outcome for v in found] == ["error", "pass", "pass", "pass"]
    assert "40" in found[0].detail["detail"]


def test_without_ids_the_same_tokens_can_not_be_scored(tmp_path: Path) -> None:
    with openai_server(says, scores_prompts=True) as server:
        step = {"ScoreTokens": {"same_tokenizer": True}}
        result = pipeline(teacher(server.url), step, decode={}).run(output_dir=tmp_path)
    found = [c.verdicts[0] for s in read_samples(result.path / "ledger.sqlite") for c in s.candidates]
    assert {(v.outcome, v.reason) for v in found} == {("error", "cannot_score")}
    assert "token_ids: true" in found[0].detail["detail"]
