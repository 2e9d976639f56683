"""What every provider must do, whatever its wire: one list of claims, run through each of them.

The scripted servers keep to the wires of OpenAI-compatible servers and of Ollama; the embedded model and, with the
extra `servers`, llama.cpp are real models. LiteLLM takes part where it is installed. A provider of your own joins by
one more entry of `BACKENDS`.
"""

import asyncio
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastdistill.control.registry import provider_class
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Completion, FinishReason, LogprobBasis, Prompt
from fastdistill.model.provider import Capabilities, ErrorKind, ProviderError
from tests.llamacpp import llamacpp_server
from tests.servers import Call, Reply, Server, ollama_server, openai_server

QUESTION = "Schema: CREATE TABLE city (name TEXT, people INTEGER);\nQuestion: List the name of the city.\nSQL:"


@dataclass(frozen=True)
class Backend:
    """A configured provider, and its server where that is a scripted one."""

    config: Mapping[str, Any]
    server: Server | None = None
    thinks: bool = False
    any_model: bool = False  # answers to whatever name
    ids: bool = False

    def prompt(self, text: str = QUESTION, extra: Mapping[str, Any] | None = None, **decode: Any) -> Prompt:
        config = self.parsed()
        parameters = (
            DecodeProfile(**{"max_tokens": 40, **decode}).parameters() | config.parameters() | dict(extra or {})
        )
        return Prompt(config.provider, config.model, ({"role": "user", "content": text},), parameters)

    def parsed(self, **fields: Any) -> Any:
        return provider_class(self.config["provider"]).Config.model_validate({**self.config, **fields})

    def ask(self, *prompts: Prompt, seed: int | None = 7, n: int = 1, **fields: Any) -> list[list[Completion]]:
        async def go(provider: Any) -> list[list[Completion]]:
            return [await provider.complete(prompt, seed=seed, n=n) for prompt in prompts]

        found: list[list[Completion]] = self.run(go, **fields)
        return found

    def run(self, work: Any, **fields: Any) -> Any:
        async def go() -> Any:
            config = self.parsed(**fields)
            provider = provider_class(config.provider)(config)
            try:
                return await work(provider)
            finally:
                await provider.aclose()

        return asyncio.run(asyncio.wait_for(go(), 60))


def script(call: Call, index: int) -> Reply:
    return Reply(f"SELECT name FROM city WHERE id = {call.digest(index)}", thinking="hm")


@contextmanager
def scripted(kind: str, **habits: Any) -> Iterator[Backend]:
    make: Any = ollama_server if kind == "ollama" else openai_server
    with make(script, context=200, **habits) as server:
        config = {"provider": kind, "model": "teacher", "base_url": server.url}
        config |= {"think": True} if kind == "ollama" else {}
        config |= {"model": "openai/teacher", "api_key": "none"} if kind == "litellm" else {}
        yield Backend(config, server, thinks=True, ids=kind in ("vllm", "sglang"))


@contextmanager
def embedded(_: Path) -> Iterator[Backend]:
    yield Backend({"provider": "embedded"}, any_model=True, ids=True)


@contextmanager
def llamacpp(folder: Path) -> Iterator[Backend]:
    from lab.export_gguf import export

    export(Path("src/fastdistill/model/embedded"), folder / "teacher.gguf")
    with llamacpp_server(folder / "teacher.gguf") as url:
        config = {"provider": "openai", "model": str(folder / "teacher.gguf"), "base_url": url, "api_key": "none"}
        yield Backend(config, any_model=True, ids=True)


BACKENDS: dict[str, Any] = {
    "openai": lambda _: scripted("openai"),
    "vllm": lambda _: scripted("vllm"),
    "sglang": lambda _: scripted("sglang"),
    "ollama": lambda _: scripted("ollama", capabilities=("completion", "thinking")),
    "embedded": embedded,
}
if find_spec("xllamacpp") is not None:
    BACKENDS["llamacpp"] = llamacpp
if find_spec("litellm") is not None:
    BACKENDS["litellm"] = lambda _: scripted("litellm")


# LiteLLM leaves connections of its own to the garbage collector.
UNTIDY = {"litellm": [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]}
NAMED = [pytest.param(name, marks=UNTIDY.get(name, [])) for name in BACKENDS]


@pytest.fixture(scope="module", params=NAMED)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with BACKENDS[request.param](tmp_path_factory.mktemp(request.param)) as made:
        yield made


def test_sampling_parameters_reach_the_model(backend: Backend) -> None:
    greedy = backend.prompt(temperature=0.0, max_tokens=3)
    [[first], [second]] = backend.ask(greedy, greedy)
    assert (first.text, first.finish_reason) == (second.text, FinishReason.LENGTH)
    if backend.server is not None:
        body = backend.server.counters.bodies[-1]
        sent = {**body, **body.get("options", {})}
        assert (sent["temperature"], sent.get("max_tokens", sent.get("num_predict")), sent["seed"]) == (0, 3, 7)


def test_no_more_choices_come_than_were_asked_for_and_each_has_its_usage(backend: Backend) -> None:
    [answers] = backend.ask(backend.prompt(), n=3)
    assert 1 <= len(answers) <= 3
    assert all(answer.usage.completion_tokens > 0 for answer in answers)
    assert [bool(answer.usage.prompt_tokens) for answer in answers] == [at == 0 for at in range(len(answers))]


def test_a_probe_that_says_yes_to_n_brings_them_all(backend: Backend) -> None:
    found: Capabilities = backend.run(lambda provider: provider.probe())
    if found.n:
        [answers] = backend.ask(backend.prompt(), n=3)
        assert len(answers) == 3


def test_a_seed_repeats_an_answer_and_another_one_does_not(backend: Backend) -> None:
    warm = backend.prompt(temperature=2.0)
    texts = [backend.ask(warm, seed=seed)[0][0].text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_an_answer_says_why_it_ends_which_model_gave_it_and_what_it_thought(backend: Backend) -> None:
    [[whole]] = backend.ask(backend.prompt(temperature=0.0))
    assert whole.finish_reason is FinishReason.STOP
    assert whole.model
    assert whole.thinking == ("hm" if backend.thinks else None)
    assert "hm" not in whole.text


def test_logprobs_come_in_descending_order_with_their_basis(backend: Backend) -> None:
    asked = True if backend.config["provider"] in ("vllm", "sglang") else None
    [[answer]] = backend.ask(backend.prompt(temperature=0.0, logprobs=True, top_logprobs=3, token_ids=asked))
    assert answer.logprobs
    assert abs(len(answer.logprobs) - answer.usage.completion_tokens) <= 1, "thinking or an end token apart"
    for token in answer.logprobs:
        values = [logprob for _, logprob in token.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert all(value <= 0 for value in (token.logprob, *values))
        assert (token.id is not None) == backend.ids


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of LiteLLM's
@pytest.mark.parametrize("kind", [each for each in NAMED if each.values[0] in ("openai", "litellm")])
def test_log_probabilities_in_no_form_that_is_known_cost_an_answer_only_themselves(kind: str) -> None:
    choice = {"index": 0, "message": {"content": "SELECT 1"}, "finish_reason": "stop", "logprobs": 5}
    with scripted(kind, extra={"choices": [choice]}) as backend:
        [[answer]] = backend.ask(backend.prompt(logprobs=True))
    assert (answer.text, answer.logprobs) == ("SELECT 1", None)


def test_the_basis_of_logprobs_is_probed_and_kept_with_each_answer(backend: Backend) -> None:
    async def go(provider: Any) -> tuple[Capabilities, Completion]:
        found = await provider.probe()
        return found, (await provider.complete(backend.prompt(logprobs=True, top_logprobs=2), seed=1, n=1))[0]

    found, answer = backend.run(go)
    tells = backend.config["provider"] not in ("ollama", "litellm")
    assert found.logprob_basis == (LogprobBasis.RAW if tells else found.logprob_basis)
    assert answer.logprob_basis == (found.logprob_basis or LogprobBasis.UNKNOWN)
    if found.has_token_ids is not None:
        assert found.has_token_ids == backend.ids


@pytest.mark.parametrize("wire", ["decision", "scored"])
def test_what_only_some_servers_have_is_refused_with_a_remedy(backend: Backend, wire: str) -> None:
    asked = backend.prompt(extra={wire: {"q": {"type": "noul", "instructions": "?"}} if wire == "decision" else "x"})
    with pytest.raises(ProviderError) as caught:
        backend.ask(asked)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert ("read: logprobs" if wire == "decision" else "vLLM") in str(caught.value)


def test_a_prompt_that_is_too_long_is_told_apart(backend: Backend) -> None:
    fields = {"num_ctx": 200} if backend.config["provider"] == "ollama" else {}
    with pytest.raises(ProviderError) as caught:
        backend.ask(backend.prompt("city " * 2000), **fields)
    assert caught.value.kind is ErrorKind.TOO_LONG


def test_a_wrong_model_and_nobody_at_all_are_told_apart(backend: Backend) -> None:
    if backend.config["provider"] == "embedded":  # it has no address and one model
        with pytest.raises(ValidationError, match="base_url"):
            backend.parsed(base_url="http://127.0.0.1:9")
        return
    if not backend.any_model:
        with pytest.raises(ProviderError) as caught:
            name = "openai/nobody" if backend.config["provider"] == "litellm" else "nobody"
            backend.ask(Prompt("", name, backend.prompt().messages, backend.prompt().parameters))
        assert caught.value.kind is ErrorKind.NO_MODEL
    with openai_server() as gone:
        pass
    with pytest.raises(ProviderError) as caught:
        backend.ask(backend.prompt(), base_url=gone.url)
    assert caught.value.kind is ErrorKind.REFUSED


def test_a_request_that_is_called_off_harms_no_other(backend: Backend) -> None:
    async def go(provider: Any) -> str:
        await provider.complete(backend.prompt(max_tokens=1), seed=1, n=1)  # whatever has to start has started
        task = asyncio.create_task(provider.complete(backend.prompt(), seed=1, n=1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        [answer] = await provider.complete(backend.prompt(temperature=0.0), seed=1, n=1)
        return str(answer.text)

    assert backend.run(go).startswith("SELECT")


def test_litellm_that_is_not_installed_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(ValidationError, match=r"pip install 'fastdistill\[litellm\]'"):
        provider_class("litellm").Config(model="anthropic/claude-sonnet-4-5")
