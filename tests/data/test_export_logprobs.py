"""Log-probabilities from servers into Parquet, and scores of given tokens by a server that can."""

import json
import math
import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml
from msgspec import structs
from pydantic import ValidationError

from fastdistill import Pipeline
from fastdistill.control.config import parse_pipeline
from fastdistill.control.ledger import read_samples
from fastdistill.core.errors import ConfigError, InputError, TeacherError, TooManyErrors
from fastdistill.core.types import Candidate, Sample, TokenLogprob
from fastdistill.data.export.logprobs import ExportLogprobs
from tests.context import TestContext, candidate
from tests.servers import Call, Reply, garbled, ollama_server, openai_server

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


def test_logprobs_that_nobody_asks_for_or_gives_are_an_error_with_the_remedy(tmp_path: Path) -> None:
    with openai_server(says, logprobs=False) as server:
        with pytest.raises(ConfigError, match="no answer would have log-probabilities"):
            pipeline(teacher(server.url), "ExportLogprobs", decode={"top_logprobs": 3})
        with pytest.raises(TooManyErrors, match="logprobs: true"):
            pipeline(teacher(server.url), "ExportLogprobs").run(output_dir=tmp_path)


def test_logprobs_may_be_asked_for_in_the_servers_own_words(tmp_path: Path) -> None:
    with openai_server(says) as server:
        kwargs = {"logprobs": True, "top_logprobs": 3}
        result = pipeline(teacher(server.url), "ExportLogprobs", decode={}, generation_kwargs=kwargs).run(
            output_dir=tmp_path
        )
    assert pq.read_metadata(result.dataset / "logprobs" / "train.parquet").num_rows == 4


@pytest.mark.parametrize(("token", "reason"), [(None, "no_logprobs"), ("\ud800", "not_unicode")])
def test_a_sample_that_can_not_be_written_is_counted_nowhere(tmp_path: Path, token: str | None, reason: str) -> None:
    def answered(attempt: int, said: str | None) -> Candidate:
        logprobs = None if said is None else (TokenLogprob(said, -1.0),)
        made = candidate("SELECT", attempt)
        return structs.replace(made, completion=structs.replace(made.completion, logprobs=logprobs))

    good, bad = (
        Sample(at, f"t:{at}", {}, "t", f"id-{at}", candidates=(answered(0, "SELECT"), answered(1, said)))
        for at, said in enumerate(["SELECT", token])
    )
    with closing(TestContext(tmp_path)) as ctx:
        assert list(ExportLogprobs(name="E").run(iter([good, bad]), ctx)) == [good]
    assert ctx.reasons == [reason]
    assert ctx.reports["E"] == {"rows": 2} == {"rows": pq.read_metadata(ctx.dist / "logprobs/train.parquet").num_rows}


def test_a_format_is_named_once() -> None:
    with pytest.raises(ValidationError, match="names something twice"):
        ExportLogprobs(formats=("axolotl", "axolotl"))


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


def test_an_empty_answer_costs_no_other_its_row(tmp_path: Path) -> None:
    said = candidate("SELECT")
    tokens = (TokenLogprob("SELECT", -1.0, (("SELECT", -1.0),), 7, (7,)),)
    answers = [structs.replace(said, completion=structs.replace(said.completion, logprobs=tokens))]
    empty = candidate("", 1)
    answers += [structs.replace(empty, completion=structs.replace(empty.completion, logprobs=()))]
    sample = Sample(0, "t:0", {}, "t", "id", candidates=tuple(answers))
    with closing(TestContext(tmp_path)) as ctx:
        list(ExportLogprobs(name="E", formats=("axolotl",), template_tail=1).run(iter([sample]), ctx))
    assert ctx.reports["E"] == {"axolotl_left_out.text_differs": 1, "axolotl_rows": 1}


def test_axolotls_rows_need_ids_and_the_refusal_says_how_to_get_them(tmp_path: Path) -> None:
    step = {"ExportLogprobs": {"formats": ["axolotl"]}}
    with openai_server(says) as server, pytest.raises(InputError, match="token_ids: true"):
        decode = {"logprobs": True, "top_logprobs": 3}
        pipeline(teacher(server.url), step, decode=decode).run(output_dir=tmp_path)


# --- scores of given tokens ---


def scored_by(student: Any, scorer: Any, provider: str = "vllm") -> dict[str, Any]:
    return {**teacher(student.url), "scorer": {"provider": provider, "model": "scorer", "base_url": scorer.url}}


@pytest.mark.parametrize("same_tokenizer", [False, True])
@pytest.mark.parametrize(("provider", "path"), [("vllm", "/v1/completions"), ("sglang", "/generate")])
def test_a_teacher_scores_the_students_samples(tmp_path: Path, same_tokenizer: bool, provider: str, path: str) -> None:
    score = {"ScoreTokens": {"model": "scorer", "same_tokenizer": same_tokenizer}}
    habits: Any = {"scores_prompts": True, "models": ("scorer",)}
    habits["logprob_basis"] = "post_temperature" if provider == "sglang" else "raw"
    with openai_server(says) as student, openai_server(**habits) as scorer:
        asked = pipeline(scored_by(student, scorer, provider), score, {"ExportLogprobs": {"scores": "ScoreTokens"}})
        result = asked.run(output_dir=tmp_path)
        ids = [scorer.token_id(word) for word in says(None, 0).split()]  # type: ignore[arg-type]
        paid = scorer.counters.paths[path]
        again = asked.run(output_dir=tmp_path)
    rows = pq.read_table(result.dataset / "logprobs" / "train.parquet").to_pylist()
    assert [row["token_ids"] for row in rows] == [ids] * 4
    expected = [-number / 1000 for number in ids]
    assert rows[0]["token_logprobs"] == pytest.approx(expected, rel=1e-3)
    assert rows[0]["seq_logprob"] == pytest.approx(sum(expected))
    assert (rows[0]["n_prompt_tokens"], rows[0]["logprob_basis"], rows[0]["k"]) == (3, "raw", 0)
    assert paid == scorer.counters.paths[path] == 4, "scores are stored like answers"
    assert again.exit_code == 0
    bodies = [body for body in scorer.counters.bodies if "prompt_logprobs" in body or "input_ids" in body]
    assert len(bodies) == 4
    for body in bodies:
        if provider == "vllm":
            assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 0)
        else:  # one token earlier, for the first one has no value; at temperature 1 nothing is divided by it
            assert (body["return_logprob"], body["logprob_start_len"], body["top_logprobs_num"]) == (True, 2, 0)
            assert body["sampling_params"] == {"max_new_tokens": 1, "temperature": 1.0}


@pytest.mark.parametrize(
    "broken",
    [
        {"meta_info": {"input_token_logprobs": [[None, 1, None], [-0.5, 2, "x"]]}},
        {"meta_info": {"input_token_logprobs": [[None, 1, None]] * 5}},
        {"meta_info": {}},
    ],
)
def test_values_that_are_not_of_the_tokens_asked_about_are_no_scores(tmp_path: Path, broken: Any) -> None:
    with openai_server(says) as student, openai_server(scores_prompts=True, models=("scorer",)) as scorer:
        says_so = garbled(json.dumps(broken).encode(), times=None)
        scorer.options = replace(scorer.options, faults=lambda call: None if "colours" in call.prompt else says_so)
        models = scored_by(student, scorer, "sglang")
        models["scorer"]["max_retries"] = 0
        result = pipeline(models, {"ScoreTokens": {"model": "scorer"}}).run(output_dir=tmp_path)
    found = [c.verdicts[0] for s in read_samples(result.path / "ledger.sqlite") for c in s.candidates]
    assert {(v.outcome, v.reason) for v in found} == {("error", "cannot_score")}
    assert "not one for each token" in found[0].detail["detail"]


@pytest.mark.parametrize("kind", ["openai", "sglang", "ollama", "embedded", "vllm"])
def test_a_server_that_can_not_score_ends_the_run_with_the_reason(tmp_path: Path, kind: str) -> None:
    """The vllm and the sglang here stand for something else that lacks /tokenize."""
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


# --- DistillKit ---


class Decoded(NamedTuple):
    ids: list[int]
    values: list[float]


def decoded(row: Mapping[str, Any], config: Mapping[str, Any]) -> list[Decoded]:
    """What DistillKit reads of a row whose values are all exact: bytes of numbers, and a string of bits of ids.

    Written from its `DistributionQuantizationConfig`: https://github.com/arcee-ai/DistillKit.
    """
    assert config["exact_k"] == config["k"]
    assert (config["delta_encoding"], config["residual_bins"], config["polynomial_terms"]) == (False, [], None)
    width = math.ceil(math.log2(config["d"]))
    letter = {"float16": "e", "float32": "f"}[config["exact_dtype"]]
    found = []
    for numbers, packed in zip(row["compressed_logprobs"], row["bytepacked_indices"], strict=True):
        bits = "".join(f"{byte:08b}" for byte in packed)
        assert len(packed) == math.ceil(config["k"] * width / 8)
        ids = [int(bits[at * width : (at + 1) * width], 2) for at in range(config["k"])]
        found.append(Decoded(ids, list(struct.unpack(f"<{config['k']}{letter}", bytes(numbers)))))
    return found


DISTILLKIT = {"formats": ["distillkit"], "scores": "ScoreTokens", "vocab_size": 65_537}


@pytest.mark.parametrize("provider", ["vllm", "sglang"])
def test_distillkit_reads_whole_sequences_with_the_alternatives_of_the_answer(tmp_path: Path, provider: str) -> None:
    score = {"ScoreTokens": {"model": "scorer", "same_tokenizer": True, "top_logprobs": 3}}
    with openai_server(says) as student, openai_server(scores_prompts=True, models=("scorer",)) as scorer:
        asked = pipeline(scored_by(student, scorer, provider), score, {"ExportLogprobs": {**DISTILLKIT, "test": 0.5}})
        result = asked.run(output_dir=tmp_path)
        prompt = [scorer.token_id(word) for word in ("<user>", "Q0", "<assistant>")]
        answer = [scorer.token_id(word) for word in says(None, 0).split()]  # type: ignore[arg-type]
        tops = [scorer.token_id(f"t{at}") for at in range(3)]
    folder = result.dataset / "distillkit"
    config = yaml.safe_load((folder / "compression_config.yaml").read_text())
    assert (config["d"], config["k"], config["exact_dtype"]) == (65_537, 3, "float16")
    rows = [row for split in ("train", "test") for row in pq.read_table(folder / f"{split}.parquet").to_pylist()]
    assert len(rows) == 4
    (row,) = (row for row in rows if row["input_ids"][1] == prompt[1])
    assert row["input_ids"] == prompt + answer
    # Its loss is masked by the label at the same position, and the last token has no row: both as it captures them.
    assert row["labels"] == [-100, -100, prompt[2], *answer]
    found = decoded(row, config)
    assert len(found) == len(row["input_ids"]) - 1
    told = [label >= 0 for label in row["labels"][:-1]]
    assert [each.ids for each, kept in zip(found, told, strict=True) if kept] == [tops] * len(answer)
    for each, kept in zip(found, told, strict=True):
        expected = [-0.0001, -0.0002, -0.0003] if kept else [-math.log(3)] * 3
        assert each.values == pytest.approx(expected, rel=1e-3)
    schema = pq.read_schema(folder / "train.parquet")
    types = [str(schema.field(name).type) for name in ("input_ids", "compressed_logprobs", "bytepacked_indices")]
    assert types == ["list<element: uint64>", *["list<element: list<element: uint8>>"] * 2]
    assert schema.names == ["input_ids", "labels", "compressed_logprobs", "bytepacked_indices"], "it packs every column"


def test_what_distillkit_lacks_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="distillkit needs `scores`, a ScoreTokens with top_logprobs, and"):
        ExportLogprobs(formats=("distillkit",), scores="ScoreTokens")
    for score, size, remedy in (({}, 65_537, "set top_logprobs of ScoreTokens"), ({"top_logprobs": 2}, 9, "raise it")):
        with openai_server(says) as student, openai_server(scores_prompts=True, models=("scorer",)) as scorer:
            step = {"ScoreTokens": {"model": "scorer", **score}}
            export = {"ExportLogprobs": {**DISTILLKIT, "vocab_size": size}}
            with pytest.raises(InputError, match=remedy):
                pipeline(scored_by(student, scorer), step, export).run(output_dir=tmp_path)
