"""The OpenAI-compatible provider against servers with the habits of real ones."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Completion, FinishReason, LogprobBasis, Prompt, TokenLogprob, Usage
from fastdistill.model.provider import Capabilities, ErrorKind, Load, ProviderError
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider
from fastdistill.model.providers.openai_answers import share
from fastdistill.model.retry import GiveUp, Retry, decide
from fastdistill.model.transport import transport_for
from tests.servers import Call, Fault, Reply, Server, garbled, hang, mixed, openai_server, rate_limited, reset, status


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI", "OPENROUTER", "VLLM", "SGLANG"):
        monkeypatch.delenv(f"{name}_BASE_URL", raising=False)
        monkeypatch.delenv(f"{name}_API_KEY", raising=False)


def config(url: str, **fields: Any) -> OpenAIConfig:
    return OpenAIConfig.model_validate({"provider": "openai", "model": "teacher", "base_url": url, **fields})


def prompt(text: str = "hello", model: str = "teacher", extra: dict[str, Any] | None = None, **decode: Any) -> Prompt:
    parameters = DecodeProfile(**decode).parameters() | (extra or {})
    return Prompt("openai", model, ({"role": "user", "content": text},), parameters)


def complete(
    server: Server, *prompts: Prompt, seed: int | None = 7, n: int = 1, **fields: Any
) -> list[list[Completion]]:
    async def go() -> list[list[Completion]]:
        async with OpenAIProvider(config(server.url, **fields)) as provider:
            return [await provider.complete(each, seed=seed, n=n) for each in prompts or (prompt(),)]

    return asyncio.run(go())


def error(server: Server, asked: Prompt | None = None, *, n: int = 1, **fields: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        complete(server, asked or prompt(), n=n, **fields)
    return caught.value


def probe(server: Server, **fields: Any) -> Capabilities:
    async def go() -> Capabilities:
        async with OpenAIProvider(config(server.url, **fields)) as provider:
            return await provider.probe()

    return asyncio.run(go())


# --- what is sent ---


def test_sampling_parameters_are_sent_explicitly() -> None:
    with openai_server() as server:
        complete(server, prompt(stop=("\n",), presence_penalty=0.5), n=2)
    assert server.counters.bodies[0] == {
        "model": "teacher",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 1,
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "max_tokens": 512,
        "stop": ["\n"],
        "presence_penalty": 0.5,
        "seed": 7,
        "n": 2,
    }


def test_unknown_fields_go_out_as_they_are_and_the_revision_does_not() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "revision": "v2", "seed": 1}
    with openai_server() as server:
        complete(server, prompt(extra=extra), seed=7)
        complete(server, prompt(extra=extra), seed=None)
    first, second = server.counters.bodies
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert "revision" not in first
    assert (first["seed"], second["seed"]) == (7, 1)  # the draw's own wins


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_servers_with_a_generation_config_are_told_that_nothing_is_limited(kind: str) -> None:
    with openai_server() as server:
        complete(server, prompt(), provider=kind)
        complete(server, prompt(top_k=5, repetition_penalty=1.2), provider=kind)
    neutral, limited = server.counters.bodies
    assert (neutral["top_k"], neutral["repetition_penalty"]) == (-1, 1)
    assert (limited["top_k"], limited["repetition_penalty"]) == (5, 1.2)


def test_a_schema_is_put_in_its_envelope_and_a_wire_form_stays() -> None:
    schema = {"type": "object", "properties": {}}
    wire = {"type": "json_schema", "json_schema": {"name": "mine", "schema": schema}}
    with openai_server() as server:
        complete(server, *(prompt(response_format=asked) for asked in ("json", schema, wire)))
    sent = [body["response_format"] for body in server.counters.bodies]
    assert sent == [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        wire,
    ]


def test_the_key_and_headers_are_sent() -> None:
    with openai_server(api_key="k") as server:
        complete(server, api_key="k", headers={"X-Title": "t"})
    assert server.counters.headers[0]["Authorization"] == "Bearer k"
    assert server.counters.headers[0]["X-Title"] == "t"


# --- the config ---


@pytest.mark.parametrize(
    ("kind", "given", "normal"),
    [
        ("openai", "", "https://api.openai.com/v1"),
        ("openrouter", "", "https://openrouter.ai/api/v1"),
        ("openrouter", "https://openrouter.ai/api/", "https://openrouter.ai/api/v1"),
        ("vllm", "", "http://localhost:8000/v1"),
        ("sglang", "", "http://localhost:30000/v1"),
        ("vllm", "http://gpu:8000", "http://gpu:8000/v1"),
        ("vllm", "http://gpu:8000/v1/", "http://gpu:8000/v1"),
        ("openai", "https://x.com/v1/chat/completions", "https://x.com/v1"),
        ("openai", "https://x.com/v1beta/openai/", "https://x.com/v1beta/openai"),
    ],
)
def test_base_urls_are_tolerant(kind: str, given: str, normal: str) -> None:
    assert config(given, provider=kind).base_url == normal


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x", "http://", "http://:8", "http://u:p@x/v1", "http://x/v1?key=s"]
)
def test_a_base_url_that_is_none_or_holds_a_secret_is_an_error(url: str) -> None:
    with pytest.raises(ValidationError, match="base_url"):
        config(url)


def test_defaults_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://gpu:9/")
    monkeypatch.setenv("VLLM_API_KEY", "secret\r\n")
    found = OpenAIConfig(provider="vllm", model="m")
    assert found.base_url == "http://gpu:9/v1"
    assert found.api_key is not None and found.api_key.get_secret_value() == "secret"


def test_secrets_are_in_no_dump() -> None:
    dumped = config("http://x", api_key="secret", headers={"A": "secret"})
    assert "secret" not in dumped.model_dump_json()
    assert "secret" not in repr(dumped)
    assert OpenAIConfig.model_validate(dumped.model_dump()).base_url == dumped.base_url


# --- what comes back ---


def test_a_completion_has_text_usage_and_who_answered() -> None:
    extra = {
        "system_fingerprint": "fp",
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
    }
    with openai_server(lambda call, index: Reply("SELECT 1", thinking="hm hm"), extra=extra) as server:
        [[answer]] = complete(server)
    assert (answer.text, answer.thinking, answer.finish_reason) == ("SELECT 1", "hm hm", FinishReason.STOP)
    assert (answer.model, answer.build) == ("teacher", "fp")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 4)
    assert (usage.cached_tokens, usage.reasoning_tokens) == (3, 2)


@pytest.mark.parametrize("where", ["reasoning_content", "reasoning"])
def test_thinking_is_kept_apart(where: str) -> None:
    with openai_server(lambda call, index: Reply("x", thinking="hm"), thinks=where) as server:
        [[answer]] = complete(server)
    assert (answer.text, answer.thinking) == ("x", "hm")


def test_inline_thinking_is_kept_apart_with_the_lines_behind_it_and_the_rest_is_verbatim() -> None:
    with openai_server(lambda call, index: Reply("x ", thinking="hm"), thinks="inline") as server:
        [[answer]] = complete(server)
    assert (answer.text, answer.thinking) == ("x ", "hm")


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", FinishReason.STOP),
        ("length", FinishReason.LENGTH),
        ("content_filter", FinishReason.CONTENT_FILTER),
        ("tool_calls", FinishReason.OTHER),
    ],
)
def test_finish_reasons_and_no_content(finish: str, reason: FinishReason) -> None:
    with openai_server(lambda call, index: Reply(None, finish=finish)) as server:
        [[answer]] = complete(server)
    assert (answer.text, answer.finish_reason) == ("", reason)


def test_an_answer_cut_by_max_tokens_says_so() -> None:
    with openai_server(lambda call, index: "one two three") as server:
        [[answer]] = complete(server, prompt(max_tokens=2))
    assert (answer.text, answer.finish_reason) == ("one two", FinishReason.LENGTH)


def by_index(call: Call, index: int) -> str:
    return "word " * index + "end"


def test_choices_share_the_usage_exactly() -> None:
    with openai_server(by_index) as server:
        [scored] = complete(server, prompt(logprobs=True, top_logprobs=2), n=3)
        [plain] = complete(server, n=3)
    assert [answer.usage.completion_tokens for answer in scored] == [1, 2, 3]  # by their logprobs
    assert sum(answer.usage.completion_tokens for answer in plain) == 6
    assert [answer.usage.prompt_tokens for answer in plain] == [1, 0, 0]
    assert scored[0].logprobs == (TokenLogprob("end", -0.5, (("t0", -1.0), ("t1", -2.0))),)
    assert plain[0].logprobs is None


def test_choices_come_by_index_and_no_more_than_asked() -> None:
    choices = [{"index": at, "message": {"content": str(at)}, "finish_reason": "stop"} for at in (2, 0, 1)]
    with openai_server(extra={"choices": choices}) as server:
        [answers] = complete(server, n=2)
    assert [answer.text for answer in answers] == ["0", "1"]


def test_fewer_choices_than_asked_are_what_there_is() -> None:
    with openai_server(honours_n=False) as server:
        [answers] = complete(server, n=4)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("told", "counted"),
    [
        ({"prompt_tokens": 5.0, "completion_tokens": 4.0}, (5, 4, 0)),
        ({"prompt_tokens": 5, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 9.0}}, (5, 4, 5)),
        ({"prompt_tokens": 5, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": -1}}, (5, 4, 0)),
        ({"prompt_tokens": -5, "completion_tokens": 4}, (0, 0, 0)),
        ({"prompt_tokens": 5, "completion_tokens": 10**18}, (0, 0, 0)),
        ({"prompt_tokens": 5, "completion_tokens": 2.5}, (0, 0, 0)),
    ],
)
def test_whole_floats_are_counts_and_what_can_not_be_one_is_as_if_nothing_was_told(
    told: dict[str, Any], counted: tuple[int, int, int]
) -> None:
    with openai_server(extra={"usage": told}) as server:
        [[answer]] = complete(server)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == counted


def test_content_may_come_in_parts_with_the_thinking_among_them() -> None:
    text = [{"type": "text", "text": "SELECT "}, {"type": "output_text", "text": "1"}]
    text.insert(1, {"type": "reasoning_text", "text": "hm"})
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    choices = [
        {"index": at, "message": {"content": parts}, "finish_reason": "stop"}
        for at, parts in enumerate((text, thinking + text))
    ]
    with openai_server(extra={"choices": choices}) as server:
        [answers] = complete(server, n=2)
    assert [(answer.text, answer.thinking) for answer in answers] == [("SELECT 1", None), ("SELECT 1", "hm")]
    assert sum(answer.usage.completion_tokens for answer in answers) > 0


def test_thinking_that_only_the_total_has_is_counted() -> None:
    usage = {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 399}  # as Gemini's; xAI has the details too
    with openai_server(extra={"usage": usage | {"completion_tokens_details": {"reasoning_tokens": 386}}}) as server:
        [[answer]] = complete(server)
    assert answer.usage == Usage(12, 387, 0, 386)


def test_no_usage_is_zero() -> None:
    with openai_server(usage_of="none") as server:
        [[answer]] = complete(server)
    assert answer.usage.completion_tokens == 0


@given(total=st.integers(0, 10_000), weights=st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_shares_are_whole_and_sum_to_the_total(total: int, weights: list[int]) -> None:
    parts = share(total, weights)
    assert sum(parts) == total
    assert all(part >= 0 for part in parts)
    if sum(weights) == total and total:
        assert parts == weights


# --- parameters that a server refuses ---


def test_a_neutral_parameter_that_is_refused_is_left_out_from_then_on() -> None:
    with openai_server(refuses=("top_k", "min_p")) as server:
        complete(server, prompt("a"), prompt("b"))
    sent = [{"top_k", "min_p"} & body.keys() for body in server.counters.bodies]
    assert sent == [{"top_k", "min_p"}, {"min_p"}, set(), set()]


def test_a_parameter_that_is_not_neutral_is_an_error_with_a_remedy() -> None:
    with openai_server(refuses=("top_k",)) as server:
        told = error(server, prompt(top_k=40))
        with pytest.raises(ProviderError) as known:
            complete(server, prompt(), prompt(top_k=40))
    for found in (told, known.value):
        assert (found.kind, found.parameter) == (ErrorKind.UNSUPPORTED, "top_k")
        assert "set it to 0" in str(found)


def test_max_tokens_is_renamed_where_asked_for() -> None:
    with openai_server(refuses=("max_tokens",)) as server:
        complete(server, prompt(max_tokens=3), prompt(max_tokens=3))
    names = ["max_tokens" in body for body in server.counters.bodies]
    assert names == [True, False, False]
    assert server.counters.bodies[-1]["max_completion_tokens"] == 3


def test_a_seed_that_is_refused_is_left_out() -> None:
    with openai_server(refuses=("seed",)) as server:
        complete(server)
        found = probe(server)
    assert "seed" not in server.counters.bodies[1]
    assert found.seed is False
    assert any("seed" in note for note in found.notes)


def test_more_choices_than_slots_are_asked_for_one_by_one() -> None:
    with openai_server(honours_n=2) as server:
        [answers] = complete(server, n=8)
    assert len(answers) == 1
    assert "n" not in server.counters.bodies[1]


def test_a_validation_error_names_its_parameter_too() -> None:
    detail = {"detail": [{"loc": ["body", "min_p"], "msg": "Extra inputs are not permitted"}]}
    with openai_server(faults={1: status(422, detail)}) as server:
        complete(server)
    assert "min_p" not in server.counters.bodies[1]


BOTH = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."


@pytest.mark.parametrize(
    ("message", "sent", "left_out"),
    [
        (BOTH, {"temperature": 0.7}, "top_p"),  # Claude
        (BOTH.replace("`", ""), {"temperature": 0.7}, "top_p"),
        (f"litellm.BadRequestError: AnthropicException - {BOTH} {'x' * 200}", {"temperature": 0.7}, "top_p"),
        ("temperature is deprecated for this model.", {}, "temperature"),
        ("body.min_p: property 'body.min_p' is unsupported", {}, "min_p"),  # Cerebras
        ("InternalError.Algo.InvalidParameter: Range of top_k should be [1, 100]", {}, "top_k"),  # DashScope
    ],
)
def test_a_refusal_in_prose_names_its_parameter(message: str, sent: dict[str, Any], left_out: str) -> None:
    with openai_server(faults={1: status(400, message)}) as server:
        complete(server, prompt(**sent))
    first, second = server.counters.bodies
    assert first.keys() - second.keys() == {left_out}


def test_the_official_api_is_not_sent_what_it_lacks() -> None:
    provider = OpenAIProvider(config(""))
    assert {"top_k", "min_p"} & provider._body(prompt(), 1, 1).keys() == set()
    with pytest.raises(ProviderError, match="top_k=40"):
        provider._body(prompt(top_k=40), 1, 1)


# --- errors ---

OPENAI_401 = {"error": {"message": "Incorrect API key", "type": "invalid_request_error", "code": "invalid_api_key"}}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (rate_limited("1"), ErrorKind.RATE_LIMITED),
        (status(503, times=None), ErrorKind.OVERLOADED),
        (status(408), ErrorKind.OVERLOADED),
        (status(500), ErrorKind.SERVER),
        (garbled(b"Internal Server Error", code=500), ErrorKind.SERVER),
        (garbled('{"error": "服务繁忙"}'.encode("gbk"), code=503), ErrorKind.OVERLOADED),
        (status(401, OPENAI_401), ErrorKind.AUTH),
        (status(402, "Insufficient credits"), ErrorKind.AUTH),
        (status(403, {"detail": "Forbidden"}), ErrorKind.AUTH),
        (status(429, {"error": {"message": "quota", "code": "insufficient_quota"}}), ErrorKind.AUTH),
        (status(400, {"error": "malformed"}), ErrorKind.BAD_REQUEST),
        (status(422, {"detail": "no"}), ErrorKind.BAD_REQUEST),
        (status(301), ErrorKind.AUTH),
        (status(504), ErrorKind.TIMEOUT),
        (status(404, {"error": {"message": "x", "code": "model_not_found"}}), ErrorKind.NO_MODEL),
        (status(400, "openai/x is not a valid model ID"), ErrorKind.NO_MODEL),
        (status(400, {"detail": "Server is pinned to 'X'; requested 'Y'."}), ErrorKind.NO_MODEL),
        (status(400, "The supported API model names are a or b, but you passed c."), ErrorKind.NO_MODEL),
        (status(400, {"error": {"code": "1211", "message": "模型不存在，请检查模型代码。"}}), ErrorKind.NO_MODEL),
        (status(400, {"error": {"message": "x", "code": "model_not_supported"}}), ErrorKind.NO_MODEL),
        (status(400, "maximum context length is 512 tokens, you requested 600"), ErrorKind.TOO_LONG),
        (status(500, "the context length is exceeded"), ErrorKind.TOO_LONG),
        (status(413), ErrorKind.TOO_LONG),
        (status(200, {"error": {"message": "no", "code": 429}}), ErrorKind.RATE_LIMITED),
        (status(200, {"error": {"message": "no"}}), ErrorKind.SERVER),
        (status(200, {"choices": [{"index": 0, "error": {"code": 502, "message": "up"}}]}), ErrorKind.OVERLOADED),
        (garbled(), ErrorKind.GARBLED),
        (garbled(b""), ErrorKind.GARBLED),
        (garbled(b"<html>hello"), ErrorKind.GARBLED),
        (garbled(b"\xff\xff"), ErrorKind.GARBLED),
        (garbled(b"[]"), ErrorKind.GARBLED),
        (garbled(b'{"x":' + b"[" * 99_999), ErrorKind.GARBLED),
        (status(200, {"choices": []}), ErrorKind.GARBLED),
        (status(200, {"choices": [{"index": 0}]}), ErrorKind.GARBLED),
        (status(200, {"choices": [{"message": {"content": 5}}]}), ErrorKind.GARBLED),
        (reset(), ErrorKind.RESET),
        (hang(), ErrorKind.TIMEOUT),
    ],
)
def test_every_way_to_fail_has_its_kind(fault: Fault, kind: ErrorKind) -> None:
    with openai_server(faults={1: fault}) as server:
        assert error(server, timeout=0.5).kind is kind


def test_a_choice_that_failed_leaves_the_others() -> None:
    choices = [{"index": 0, "error": {"code": 502}}, {"index": 1, "message": {"content": "x"}}]
    with openai_server(extra={"choices": choices}) as server:
        [answers] = complete(server, n=2)
    assert [answer.text for answer in answers] == ["x"]


@pytest.mark.parametrize("nothing", [None, "", False, {}])
def test_an_error_that_says_nothing_is_none(nothing: object) -> None:
    choices = [{"index": 0, "error": nothing, "message": {"content": "x"}}]
    with openai_server(extra={"choices": choices, "error": nothing}) as server:
        [[answer]] = complete(server)
    assert answer.text == "x"


def test_retry_after_is_handed_on() -> None:
    with openai_server(faults={1: rate_limited("2.5"), 2: status(503, Retry_After_Ms="300")}) as server:
        assert error(server).retry_after == 2.5
        assert error(server).retry_after == 0.3


def test_a_wrong_key_names_the_variable_to_set() -> None:
    with openai_server(api_key="k") as server:
        assert "set VLLM_API_KEY" in str(error(server, provider="vllm"))
        assert "the key (`api_key`, or else OPENAI_API_KEY) is refused" in str(error(server, api_key="wrong"))


def test_an_unknown_model_lists_the_served_ones_asked_once() -> None:
    with openai_server(models=("qwen-7b", "qwen-72b")) as server:
        told = error(server, prompt(model="qwen7b"), model="qwen7b")

        async def many() -> None:
            async with OpenAIProvider(config(server.url, model="qwen7b")) as provider:
                asked = (provider.complete(prompt(model="qwen7b"), seed=1, n=1) for _ in range(8))
                assert len(await asyncio.gather(*asked, return_exceptions=True)) == 8

        before = server.counters.paths["/v1/models"]
        asyncio.run(many())
        assert server.counters.paths["/v1/models"] == before + 1
    assert told.kind is ErrorKind.NO_MODEL
    assert "qwen-7b, qwen-72b" in str(told)


def test_a_wrong_path_says_what_to_correct() -> None:
    with openai_server() as server:
        told = error(server, base_url=server.url.replace("/v1", "/v2"))
    assert told.kind is ErrorKind.NO_MODEL
    assert "correct `base_url`" in str(told)


def test_a_prompt_that_is_too_long_tells_both_numbers() -> None:
    with openai_server(context=10) as server:
        told = error(server, prompt("word " * 20, max_tokens=1))
    assert told.kind is ErrorKind.TOO_LONG
    assert "(20 tokens)" in str(told) and "(10 tokens)" in str(told)


def test_nobody_listening_says_what_to_start() -> None:
    with openai_server() as server:
        pass
    told = error(server, provider="vllm")
    assert told.kind is ErrorKind.REFUSED
    assert "vllm serve teacher" in str(told)


def test_a_flagged_prompt_at_openrouter_is_not_a_wrong_key() -> None:
    fault = status(403, "model requires moderation. Your input was flagged for x")
    with openai_server(faults={1: fault}) as server:
        assert error(server, provider="openrouter").kind is ErrorKind.BAD_REQUEST


def test_a_refused_schema_concerns_the_run() -> None:
    refusal = {"error": {"message": "Invalid schema for response_format 'answer'", "param": "response_format"}}
    with openai_server(faults={1: status(400, refusal)}) as server:
        told = error(server, prompt(response_format={"type": "object"}))
    assert (told.kind, told.parameter) == (ErrorKind.UNSUPPORTED, "response_format")


# --- the probe ---


def test_a_probe_of_an_honest_server() -> None:
    with openai_server(paths={"/version": {"version": "0.32.0"}}, extra={"system_fingerprint": "fp"}) as server:
        found = probe(server, provider="vllm")
    assert found == Capabilities(
        endpoint=server.url,
        server="vllm 0.32.0",
        served_model="teacher",
        build="fp",
        models=("teacher",),
        context_length=4096,
        n=True,
        logprobs=True,
        json_schema=True,
        logprob_basis=LogprobBasis.RAW,
        max_top=20,
        has_token_ids=True,
        can_score_prompt=True,
        probe_tokens=(12, 8),
    )
    assert server.counters.requests == 4
    assert {body["max_tokens"] for body in server.counters.bodies} == {1, 4}


@pytest.mark.parametrize(
    ("habits", "found"),
    [
        ({"honours_n": False}, {"n": False}),
        ({"usage_of": "one"}, {"n": False}),
        ({"honours_n": 1}, {"n": False}),
        ({"logprobs": False}, {"logprobs": False}),
        ({"refuses": ("logprobs",)}, {"logprobs": False}),
        ({"json_schema": False}, {"json_schema": False}),
        ({"refuses": ("response_format",)}, {"json_schema": False}),
        ({"lists_models": False}, {"models": (), "context_length": None, "n": True}),
    ],
)
def test_a_probe_finds_what_200_hides(habits: dict[str, Any], found: dict[str, Any]) -> None:
    with openai_server(**habits) as server:
        capabilities = probe(server)
    assert {name: getattr(capabilities, name) for name in found} == found


def test_a_probe_notes_who_really_answers_and_what_was_left_out() -> None:
    with openai_server(unknown_model="any", refuses=("top_k",), extra={"model": "/models/other.gguf"}) as server:
        found = probe(server, model="mine")
    assert found.served_model == "/models/other.gguf"
    assert any("asked for 'mine'" in note for note in found.notes)
    assert any("top_k is left out" in note for note in found.notes)


def test_a_probe_knows_ollama_behind_its_v1() -> None:
    with openai_server(paths={"/api/version": {"version": "0.33.0"}}) as server:
        found = probe(server)
    assert found.server == "ollama 0.33.0"
    assert any("provider: ollama" in note for note in found.notes)


@pytest.mark.parametrize("basis", ["raw", "post_temperature"])
def test_a_probe_measures_of_which_distribution_logprobs_are(basis: str) -> None:
    with openai_server(paths={"/get_server_info": {"version": "0.5.4"}}, logprob_basis=basis) as server:
        found = probe(server, provider="sglang")
    assert (found.server, found.logprob_basis) == ("sglang 0.5.4", basis)
    assert (found.max_top, found.has_token_ids, found.can_score_prompt) == (20, True, True)


def test_the_version_of_sglang_is_asked_for_where_it_now_is() -> None:
    with openai_server(paths={"/server_info": {"version": "0.6.1"}}) as server:
        assert probe(server, provider="sglang").server == "sglang 0.6.1"
    assert "/get_server_info" not in server.counters.paths, "it would warn of each such request"


def test_where_no_alternatives_come_the_basis_is_unknown() -> None:
    with openai_server(refuses=("top_logprobs",)) as server:
        found = probe(server)
    assert (found.logprobs, found.logprob_basis, found.max_top) == (True, "unknown", 0)


@pytest.mark.parametrize(
    ("kind", "ids", "tops"), [("vllm", "asked", True), ("sglang", "asked", False), ("openai", "always", True)]
)
def test_token_ids_come_in_every_form(kind: str, ids: str, tops: bool) -> None:
    with openai_server(lambda call, index: "SELECT 1", ids=ids) as server:
        [[answer]] = complete(server, prompt(logprobs=True, top_logprobs=2, token_ids=True), provider=kind)
    assert answer.logprobs is not None
    assert [token.token for token in answer.logprobs] == ["SELECT", "1"]
    assert [token.id for token in answer.logprobs] == [server.token_id("SELECT"), server.token_id("1")]
    assert answer.logprobs[0].top_ids == ((server.token_id("t0"), server.token_id("t1")) if tops else ())


def test_alternatives_are_in_descending_order_whatever_the_server_puts_first() -> None:
    tops = [{"token": "b", "logprob": -2.0}, {"token": "a", "logprob": -0.2}]
    content = {"content": [{"token": "b", "logprob": -2.0, "top_logprobs": tops}]}
    choice = {"index": 0, "message": {"content": "b"}, "finish_reason": "stop", "logprobs": content}
    with openai_server(extra={"choices": [choice]}) as server:
        [[answer]] = complete(server)
    assert answer.logprobs == (TokenLogprob("b", -2.0, (("a", -0.2), ("b", -2.0))),)


@pytest.mark.parametrize("bytes_", ["SELECT", [1.5], [300], {"a": 1}, None])
def test_bytes_of_a_token_that_are_none_cost_its_text_alone(bytes_: object) -> None:
    content = {"content": [{"token": "token_id:17", "logprob": -0.5, "bytes": bytes_}]}
    choice = {"index": 0, "message": {"content": "SELECT"}, "finish_reason": "stop", "logprobs": content}
    with openai_server(extra={"choices": [choice]}) as server:
        [[answer]] = complete(server)
    assert answer.text == "SELECT"
    assert answer.logprobs == (TokenLogprob("token_id:17", -0.5, id=17),)


@pytest.mark.parametrize("content", ["SELECT", [{"token": None, "logprob": -0.5}], [{"token": "a", "logprob": "-0.5"}]])
def test_log_probabilities_that_are_none_cost_the_answer_only_themselves(content: object) -> None:
    choice = {"index": 0, "message": {"content": "SELECT"}, "finish_reason": "stop", "logprobs": {"content": content}}
    with openai_server(extra={"choices": [choice]}) as server:
        [[answer]] = complete(server)
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("SELECT", "stop", None)
    assert answer.usage.completion_tokens > 0


def test_half_a_character_costs_neither_its_answer_nor_the_others_of_the_request() -> None:
    """As of a gateway in JavaScript that cuts a text in UTF-16."""
    texts = ["SELECT 1", "SELECT '\ud83d"]
    with openai_server(lambda _, index: texts[index]) as server:
        [[whole, cut]] = complete(server, n=2)
    assert (whole.text, cut.text) == ("SELECT 1", "SELECT '\ufffd")
    assert server.counters.requests == 1


@pytest.mark.parametrize("choices", [5, [5], [{"message": 5, "logprobs": None}]])
def test_choices_that_are_none_are_garbled(choices: object) -> None:
    with openai_server(extra={"choices": choices}) as server, pytest.raises(ProviderError) as raised:
        complete(server)
    assert raised.value.kind is ErrorKind.GARBLED


def test_token_ids_that_a_server_can_not_give_are_refused_before_anything_is_sent() -> None:
    for fields in ({"provider": "openrouter"}, {"base_url": "https://api.openai.com/v1"}):
        provider = OpenAIProvider(config("http://x").model_copy(update=fields))
        with pytest.raises(ProviderError, match="gives no ids of tokens"):
            provider._body(prompt(token_ids=True), 1, 1)


RUNNING = 'vllm:num_requests_running{engine="0",model_name="m"} '
WAITING = 'vllm:num_requests_waiting{engine="0",model_name="m"} '


@pytest.mark.parametrize(
    ("told", "load"),
    [
        (f"# HELP x\n{RUNNING}5.0\n{WAITING}3.0\n", Load(5, 3)),
        (f"{RUNNING}5.0\r\n{WAITING}1e+03\r\n", Load(5, 1000)),
        (
            f"{RUNNING}5.0\n{RUNNING.replace('0', '1')}7.0\n{WAITING}3.0\n{WAITING.replace('0', '1')}0.0\n"
            'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 3.0\n',
            Load(12, 3),
        ),
        ('sglang:num_running_reqs{tp_rank="0"} 5.0\nsglang:num_queue_reqs{tp_rank="0"} 2.0\n', Load(5, 2)),
        (
            "".join(
                f'sglang:num_running_reqs{{dp_rank="{dp}",model_name="m",pp_rank="0",tp_rank="{tp}"}} {5 + dp}\n'
                f'sglang:num_queue_reqs{{dp_rank="{dp}",model_name="m",pp_rank="0",tp_rank="{tp}"}} 1.0\n'
                for dp, tp in ((0, 0), (0, 1), (1, 2), (1, 3))  # --enable-metrics-for-all-schedulers
            ),
            Load(11, 2),
        ),
        ("llamacpp:requests_processing 2\nllamacpp:requests_deferred 0\n", Load(2, 0)),
        *((f"{RUNNING}{value}\n{WAITING}3.0\n", None) for value in ("e", "1.2.3", "1e999", "9" * 400, "NaN", "", "-1")),
        (RUNNING, None),
        ("", None),
    ],
)
def test_what_a_server_tells_of_its_load_is_of_all_its_engines_and_nonsense_is_nothing(
    told: str, load: Load | None
) -> None:
    with openai_server(paths={"/metrics": told}) as server:

        async def go() -> Load | None:
            async with OpenAIProvider(config(server.url)) as provider:
                return await provider.load()

        assert asyncio.run(go()) == load


def test_a_403_to_what_a_working_key_asks_for_is_no_wrong_key() -> None:
    def fault(call: Call) -> Fault | None:
        return (
            status(403, "You are not allowed to request logprobs from this model") if "logprobs" in call.body else None
        )

    with openai_server(faults=fault) as server:
        found = probe(server)
    assert (found.n, found.logprobs) == (True, False)


def test_a_probe_survives_a_feature_that_breaks_the_server() -> None:
    def fault(call: Call) -> Fault | None:
        return status(500) if "response_format" in call.body else None

    with openai_server(faults=fault) as server:
        found = probe(server)
    assert (found.n, found.json_schema) == (True, False)


@pytest.mark.parametrize(
    ("habits", "kind"),
    [
        ({"api_key": "k"}, ErrorKind.AUTH),
        ({"models": ("other",)}, ErrorKind.NO_MODEL),
        ({"faults": {"colours": garbled(b"<html>Welcome", times=None)}}, ErrorKind.GARBLED),
        ({"faults": {"colours": status(503, "Loading model", times=None)}}, ErrorKind.OVERLOADED),
        ({"faults": {"colours": status(500, "Cannot connect to host", times=None)}}, ErrorKind.SERVER),
        ({"faults": {"colours": rate_limited(times=None)}}, ErrorKind.RATE_LIMITED),
    ],
)
def test_a_probe_fails_where_no_request_can_succeed(habits: dict[str, Any], kind: ErrorKind) -> None:
    with openai_server(**habits) as server, pytest.raises(ProviderError) as caught:
        probe(server)
    assert caught.value.kind is kind


# --- the servers themselves ---


def test_answers_repeat_and_differ_by_seed_and_index() -> None:
    def texts(seed: int) -> list[str]:
        with openai_server() as server:
            return [answer.text for answer in complete(server, seed=seed, n=2)[0]]

    assert texts(1) == texts(1)
    assert len({*texts(1), *texts(2)}) == 4


def test_the_server_counts_what_is_answered_twice() -> None:
    with openai_server() as server:
        complete(server, prompt("a"), prompt("b"), seed=1)
        assert server.counters.resent == 0
        complete(server, prompt("a"), seed=1, n=2)
    assert (server.counters.requests, server.counters.choices, server.counters.resent) == (3, 4, 1)
    assert server.counters.prompts == {"a": 2, "b": 1}


def test_slots_bound_the_work_and_the_peak_is_seen() -> None:
    async def burst(url: str) -> float:
        async with OpenAIProvider(config(url)) as provider:
            begun = asyncio.get_running_loop().time()
            await asyncio.gather(*(provider.complete(prompt(str(at)), seed=at, n=1) for at in range(8)))
            return asyncio.get_running_loop().time() - begun

    with openai_server(latency=0.05, slots=2) as server:
        assert asyncio.run(burst(server.url)) >= 0.2
    assert server.counters.peak == 8


def test_stats_are_served() -> None:
    async def stats(url: str) -> Any:
        transport = transport_for(url)
        try:
            return (await transport.request("GET", url, headers={}, body=None, timeout=5)).body
        finally:
            await transport.aclose()

    with openai_server() as server:
        complete(server)
        counted = json.loads(asyncio.run(stats(server.url.removesuffix("/v1") + "/stats")))
    assert (counted["requests"], counted["answered"], counted["prompts"]) == (1, 1, {"hello": 1})


def test_mixed_faults_are_the_same_in_every_run_and_pass() -> None:
    async def answered(url: str) -> list[str]:
        async def one(provider: OpenAIProvider, text: str) -> str:
            failures: list[ErrorKind] = []
            while True:
                try:
                    return (await provider.complete(prompt(text), seed=1, n=1))[0].text
                except ProviderError as error:
                    step = decide(error, failures, 8, 0.0)
                    if isinstance(step, GiveUp):
                        return step.reason
                    assert isinstance(step, Retry)
                    failures.append(error.kind)
                    await asyncio.sleep(step.delay / 20)

        async with OpenAIProvider(config(url)) as provider:
            return await asyncio.gather(*(one(provider, f"question {at}") for at in range(100)))

    def run() -> tuple[list[str], int]:
        with openai_server(faults=mixed(0.3)) as server:
            return asyncio.run(answered(server.url)), server.counters.requests

    first, second = run(), run()
    assert first == second
    assert first[1] > 120
    assert sum(text.startswith("answer ") for text in first[0]) >= 95  # the others met 500 twice


def test_a_server_runs_as_a_process(tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({"hello": ["SELECT 1"]}))
    command = [sys.executable, "-m", "tests.servers", "--answers", str(answers), "--model", "m", "--latency", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()

            async def ask() -> str:
                async with OpenAIProvider(config(url, model="m")) as provider:
                    return (await provider.complete(prompt(model="m"), seed=1, n=1))[0].text

            assert asyncio.run(ask()) == "SELECT 1"
        finally:
            process.terminate()
