"""The Ollama provider against a server that keeps Ollama's contract."""

import asyncio
import json
from typing import Any

import pytest
from pydantic import ValidationError

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Completion, FinishReason, LogprobBasis, Prompt, TokenLogprob
from fastdistill.model.provider import Capabilities, ErrorKind, ProviderError
from fastdistill.model.providers.ollama import OllamaConfig, OllamaProvider
from tests.servers import Fault, Reply, Server, garbled, hang, ollama_server, reset, status


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OLLAMA_HOST", "OLLAMA_TIMEOUT", "OLLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def config(url: str, **fields: Any) -> OllamaConfig:
    return OllamaConfig.model_validate({"model": "teacher", "base_url": url, **fields})


def prompt(settings: OllamaConfig, text: str = "hello", extra: dict[str, Any] | None = None, **decode: Any) -> Prompt:
    parameters = DecodeProfile(**decode).parameters() | settings.parameters() | (extra or {})
    return Prompt("ollama", settings.model, ({"role": "user", "content": text},), parameters)


def complete(
    server: Server,
    text: str = "hello",
    *,
    extra: dict[str, Any] | None = None,
    seed: int | None = 7,
    n: int = 1,
    times: int = 1,
    probed: bool = False,
    fields: dict[str, Any] | None = None,
    **decode: Any,
) -> Completion:
    settings = config(server.url, **(fields or {}))

    async def go() -> Completion:
        async with OllamaProvider(settings) as provider:
            if probed:
                await provider.probe()
            for _ in range(times):
                [answer] = await provider.complete(prompt(settings, text, extra, **decode), seed=seed, n=n)
            return answer

    return asyncio.run(go())


def error(server: Server, text: str = "hello", **arguments: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        complete(server, text, **arguments)
    return caught.value


def probe(server: Server, **fields: Any) -> Capabilities:
    async def go() -> Capabilities:
        async with OllamaProvider(config(server.url, **fields)) as provider:
            return await provider.probe()

    return asyncio.run(go())


# --- what is sent ---


def test_a_request_is_never_cut_and_leaves_nothing_to_the_modelfile() -> None:
    with ollama_server() as server:
        complete(server, temperature=0.8, max_tokens=128, stop=("\n",), fields={"num_ctx": 2048})
    assert server.counters.bodies[0] == {
        "model": "teacher",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": False,
        "truncate": False,
        "shift": False,
        "think": False,
        "keep_alive": "30m",
        "options": {
            "num_ctx": 2048,
            "num_predict": 128,
            "temperature": 0.8,
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "seed": 7,
            "stop": ["\n"],
            "repeat_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
        },
    }


def test_options_of_the_user_win_but_for_the_seed() -> None:
    extra = {"options": {"temperature": 0.1, "mirostat": 1, "seed": 1, "stop": ["x"]}, "format": "json", "tools": []}
    with ollama_server() as server:
        complete(server, extra=extra, stop=("y",), repetition_penalty=1.2)
    body = server.counters.bodies[0]
    assert (body["format"], body["tools"]) == ("json", [])
    assert {name: body["options"][name] for name in ("temperature", "mirostat", "seed", "stop", "repeat_penalty")} == {
        "temperature": 0.1,
        "mirostat": 1,
        "seed": 7,
        "stop": ["x"],
        "repeat_penalty": 1.2,
    }


def test_another_num_ctx_among_the_options_is_refused_before_it_is_sent() -> None:
    with ollama_server() as server:
        told = error(server, extra={"options": {"num_ctx": 8192}})
        complete(server, extra={"options": {"num_ctx": 4096}})
    assert (told.kind, told.parameter) == (ErrorKind.UNSUPPORTED, "num_ctx")
    assert server.counters.requests == 1


def test_a_response_format_is_the_format() -> None:
    schema = {"type": "object"}
    with ollama_server() as server:
        complete(server, response_format="json")
        complete(server, response_format=schema)
        complete(server, response_format=schema, extra={"format": "json"})
    assert [body["format"] for body in server.counters.bodies] == ["json", schema, "json"]


def test_what_changes_answers_is_in_the_parameters() -> None:
    settings = config("", num_ctx=512, think="low", keep_alive=-1, revision="v2")
    assert settings.parameters() == {"revision": "v2", "num_ctx": 512, "think": "low"}


@pytest.mark.parametrize(
    ("parameter", "remedy"),
    [({"decision": {"q": {}}}, "read: logprobs"), ({"scored": "x"}, "vLLM"), ({"token_ids": True}, "token_ids")],
)
def test_what_ollama_lacks_is_refused_before_it_is_sent(parameter: dict[str, Any], remedy: str) -> None:
    with ollama_server() as server:
        told = error(server, extra=parameter)
    assert (told.kind, remedy in str(told), server.counters.requests) == (ErrorKind.UNSUPPORTED, True, 0)


# --- the config ---


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://localhost:11434"),
        ("gpu", "http://gpu:11434"),
        ("gpu:80", "http://gpu:80"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:9", "http://127.0.0.1:9"),
        (":9", "http://127.0.0.1:9"),
        ("[::]:9", "http://[::1]:9"),
        ("https://ollama.com/", "https://ollama.com"),
        ("http://gpu:11434/v1", "http://gpu:11434"),
    ],
)
def test_ollama_host_is_taken_in_every_form(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert OllamaConfig(model="m").base_url == url
    assert config(host).base_url == url


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://u:p@x", "http://x:port"])
def test_a_base_url_that_is_none_or_holds_a_secret_is_an_error(url: str) -> None:
    with pytest.raises(ValidationError):
        config(url)


def test_the_timeout_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config("").timeout == 240
    monkeypatch.setenv("OLLAMA_TIMEOUT", "30")
    assert config("").timeout == 30
    assert config("", timeout=5).timeout == 5
    monkeypatch.setenv("OLLAMA_TIMEOUT", "soon")
    with pytest.raises(ValidationError, match="timeout"):
        config("")


def test_the_key_is_sent_and_in_no_dump() -> None:
    with ollama_server(api_key="secret") as server:
        complete(server, fields={"api_key": "secret"})
        told = error(server)
    assert (told.kind, "set OLLAMA_API_KEY" in str(told)) == (ErrorKind.AUTH, True)
    assert "secret" not in config("", api_key="secret").model_dump_json()


# --- what comes back ---


def test_a_completion_has_text_usage_and_after_a_probe_the_digest() -> None:
    with ollama_server(lambda call, index: "SELECT 1") as server:
        answer = complete(server, "two words", probed=True)
    assert (answer.text, answer.finish_reason, answer.thinking) == ("SELECT 1", FinishReason.STOP, None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 2)
    assert (answer.model, answer.build) == ("teacher", "sha256:5e1f")


def test_n_brings_one_completion() -> None:
    with ollama_server() as server:
        complete(server, n=4)
    assert server.counters.choices == 1


def test_counts_that_are_left_out_are_zero() -> None:
    with ollama_server(lambda call, index: "") as server:
        answer = complete(server)
    assert (answer.text, answer.usage.completion_tokens) == ("", 0)


def test_what_is_null_is_as_if_left_out() -> None:
    said = done(message={"content": "x", "thinking": None}, done_reason=None, logprobs=None, eval_count=None)
    with ollama_server(faults={1: garbled(said), 2: garbled(done(message={"content": None}))}) as server:
        answer = complete(server)
        assert (answer.text, answer.thinking, answer.finish_reason) == ("x", None, FinishReason.STOP)
        assert complete(server).text == ""


def test_an_answer_cut_by_num_predict_says_so() -> None:
    with ollama_server(lambda call, index: "one two three") as server:
        answer = complete(server, max_tokens=2)
    assert (answer.text, answer.finish_reason) == ("one two", FinishReason.LENGTH)


def test_logprobs_are_read() -> None:
    with ollama_server(lambda call, index: "yes") as server:
        assert complete(server, logprobs=True, top_logprobs=1).logprobs == (TokenLogprob("yes", -0.5, (("t0", -1.0),)),)
        assert complete(server).logprobs is None


def test_thinking_is_kept_apart_and_off_unless_asked_for() -> None:
    script = lambda call, index: Reply("x", thinking="hm")  # noqa: E731
    with ollama_server(script, capabilities=("completion", "thinking")) as server:
        assert complete(server).thinking is None
        assert complete(server, fields={"think": True}).thinking == "hm"


def test_thinking_that_a_model_can_not_do_is_an_error() -> None:
    with ollama_server() as server:
        told = error(server, fields={"think": "high"})
    assert (told.kind, told.parameter) == (ErrorKind.UNSUPPORTED, "think")
    assert "set `think: false`" in str(told)
    assert server.counters.requests == 1


# --- errors ---


def done(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "message": {"content": "x"}, "done": True, **fields}).encode()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (status(400, {"error": "invalid"}), ErrorKind.BAD_REQUEST),
        (status(400, {"error": 'option "top_k" must be of type integer'}), ErrorKind.UNSUPPORTED),
        (status(400, {"error": "prompt too long; exceeded max context length by 4 tokens"}), ErrorKind.TOO_LONG),
        (status(404, {"error": "model 'teacher' not found"}), ErrorKind.NO_MODEL),
        (status(500, {"error": "llama runner process has terminated"}), ErrorKind.SERVER),
        (status(503, {"error": "server busy, please try again."}), ErrorKind.OVERLOADED),
        (status(429, {"error": "slow down"}), ErrorKind.RATE_LIMITED),
        (status(200, {"error": "ran out of memory"}), ErrorKind.SERVER),
        (garbled(b'{"message":{"content":"a"}}\n{"done":true}\n'), ErrorKind.GARBLED),
        (garbled(b'{"message":{"content":"a"},"done":false}'), ErrorKind.GARBLED),
        (garbled(b""), ErrorKind.GARBLED),
        (garbled(b"<html>"), ErrorKind.GARBLED),
        (garbled(done(prompt_eval_count=4096)), ErrorKind.TOO_LONG),
        (reset(), ErrorKind.RESET),
        (hang(), ErrorKind.TIMEOUT),
    ],
)
def test_every_way_to_fail_has_its_kind(fault: Fault, kind: ErrorKind) -> None:
    with ollama_server(faults={1: fault}) as server:
        assert error(server, fields={"timeout": 0.5}).kind is kind


def test_an_unknown_model_names_the_installed_ones_and_how_to_get_it() -> None:
    with ollama_server(models=("qwen3:8b", "llama3")) as server:
        told = error(server, fields={"model": "qwen3"})
    assert told.kind is ErrorKind.NO_MODEL
    assert "ollama pull qwen3" in str(told)
    assert "qwen3:8b, llama3:latest" in str(told)


def test_nobody_listening_says_what_to_start() -> None:
    with ollama_server() as server:
        pass
    told = error(server)
    assert (told.kind, "ollama serve" in str(told)) == (ErrorKind.REFUSED, True)


def test_a_prompt_that_is_too_long_is_an_error_and_not_cut() -> None:
    with ollama_server() as server:
        told = error(server, "word " * 100, fields={"num_ctx": 64})
    assert told.kind is ErrorKind.TOO_LONG
    assert "num_ctx is 64: raise `num_ctx`" in str(told)


# --- the probe ---


def test_a_probe_looks_the_model_up_and_loads_it() -> None:
    with ollama_server(models=("other", "teacher:latest")) as server:
        found = probe(server)
    assert found == Capabilities(
        endpoint=server.url,
        server="ollama 0.33.0",
        served_model="teacher",
        build="sha256:5e1f",
        models=("other:latest", "teacher:latest"),
        context_length=4096,
        n=False,
        logprob_basis=LogprobBasis.UNKNOWN,
        max_top=20,
        has_token_ids=False,
        can_score_prompt=False,
    )
    assert server.counters.paths["/api/chat"] == 1
    assert server.counters.requests == 0  # a preload is no request for an answer


def test_a_probe_notes_what_applies_in_silence() -> None:
    with ollama_server(parameters="stop  <|end|>\ntemperature 0.6\n", size_vram=250, context=2048) as server:
        notes = " | ".join(probe(server, think=True).notes)
    assert "parameters apply: stop <|end|> |" in notes  # temperature is sent
    assert "75 % of the model" in notes
    assert "num_ctx is 4096, but the model was made for 2048" in notes
    assert "can't think" in notes


@pytest.mark.parametrize(("habits", "kind"), [({"models": ()}, ErrorKind.NO_MODEL), ({"api_key": "k"}, ErrorKind.AUTH)])
def test_a_probe_fails_where_no_request_can_succeed(habits: dict[str, Any], kind: ErrorKind) -> None:
    with ollama_server(**habits) as server, pytest.raises(ProviderError) as caught:
        probe(server)
    assert caught.value.kind is kind
