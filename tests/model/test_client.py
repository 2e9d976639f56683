"""The model client between a real store on disk and real servers: what is paid for, how often, and what is kept."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import pytest

from fastdistill.control.store import ResponseStore
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import BudgetSpent, EnvironmentFault, FatalError, SampleError, TeacherError, Unreachable
from fastdistill.core.types import Answer, Draw, Prompt
from fastdistill.model.client import ModelClient
from fastdistill.model.provider import Capabilities
from fastdistill.model.providers.ollama import OllamaProvider
from fastdistill.model.providers.openai import OpenAIProvider
from tests.servers import (
    Call,
    Fault,
    Server,
    cut,
    free_port,
    garbled,
    ollama_server,
    openai_server,
    rate_limited,
    reset,
    status,
)
from tests.world import holds

T = TypeVar("T")
PROBE = "Name three colours."


class Brake:
    """Lets everything go until it is pulled; nothing while what is in flight could take all."""

    reason: FatalError | None = None
    taken = False
    looks = 0

    def check(self, tokens: int = 0, dollars: float = 0.0) -> bool:
        self.looks += 1
        if self.reason is not None:
            raise self.reason
        return self.taken

    async def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.reason is None and (left := end - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left, 0.01))

    def turn(self) -> None:
        return None

    def asks(self) -> None:
        pass


class Asker:
    """A client with its store; `paid` is what the server answered, without the probe."""

    def __init__(self, server: Server, client: ModelClient, store: ResponseStore, brake: Brake) -> None:
        self.server, self.client, self.store, self.brake = server, client, store, brake

    def prompt(self, text: str = "Q", decode: DecodeProfile | None = None, **extra: Any) -> Prompt:
        return self.client.prompt([{"role": "user", "content": text}], decode or DecodeProfile(), extra)

    async def ask(self, text: str = "Q", n: int = 1, *, seed: int | None = 0, **decode: Any) -> list[Any]:
        draws = [Draw(at, None if seed is None else seed + at) for at in range(n)]
        return await self.client.generate(self.prompt(text, DecodeProfile(**decode)), draws)

    @property
    def paid(self) -> int:
        return requests(self.server)


def requests(server: Server) -> int:
    """Chat requests that were answered, without the probe's."""
    return sum(count for prompt, count in server.counters.prompts.items() if prompt != PROBE)


@asynccontextmanager
async def asking(server: Server, folder: Path, *, kind: str = "vllm", **config: Any) -> AsyncIterator[Asker]:
    fields = {"provider": kind, "model": "teacher", "base_url": server.url, **config}
    provider: Any = OllamaProvider if kind == "ollama" else OpenAIProvider
    parsed = provider.Config.model_validate(fields)
    brake = Brake()
    async with ResponseStore(folder / "responses.sqlite") as store:
        client = ModelClient("teacher", parsed, [provider(parsed)], store, brake)
        try:
            yield Asker(server, client, store, brake)
        finally:
            await client.aclose()


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


async def until(happens: Callable[[], bool]) -> None:
    for _ in range(2000):
        if happens():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def texts(answers: Sequence[Any]) -> list[str]:
    return [answer.completion.text for answer in answers]


# --- the first contact ---


def test_a_server_that_samples_all_as_its_first_request_asks_samples_as_the_run_asks(tmp_path: Path) -> None:
    asked: list[float] = []

    def transformers(call: Call) -> Fault:
        """With --continuous-batching."""
        asked.append(call.body["temperature"])
        message = {"content": f"sampled at {asked[0]}", "role": "assistant"}
        choices = [{"finish_reason": "stop", "index": 0, "message": message}]
        usage = {"completion_tokens": 3, "prompt_tokens": 6, "total_tokens": 9}
        more = {"id": "eeca93c4", "created": 1795753567, "object": "chat.completion"}
        return status(200, {**more, "choices": choices, "model": "teacher@main", "usage": usage})

    async def go() -> tuple[list[Any], list[Capabilities]]:
        async with asking(server, tmp_path, kind="openai") as asker:
            return await asker.ask(temperature=0.7), asker.client.endpoints

    with openai_server(faults=transformers) as server:
        answers, [endpoint] = run(go())
    assert texts(answers) == ["sampled at 0.7"]
    assert len(endpoint.notes) == 1 and "the first request" in endpoint.notes[0]


# --- the store ---


def test_what_is_stored_is_never_asked_for_again(tmp_path: Path) -> None:
    async def go() -> tuple[list[Any], list[Any]]:
        async with asking(server, tmp_path) as first:
            fresh = await first.ask(n=3)
        async with asking(server, tmp_path) as second:
            again = await second.ask(n=3)
            assert (second.client.meter.requests, second.client.meter.stored) == (0, 3)
        return fresh, again

    with openai_server() as server:
        fresh, again = run(go())
        assert texts(fresh) == texts(again)
        assert [answer.stored for answer in fresh + again] == [False] * 3 + [True] * 3
        assert requests(server) == 1


def test_only_the_draws_that_are_missing_are_paid_for(tmp_path: Path) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:
            await asker.ask(n=2)
            return await asker.ask(n=5)

    with openai_server() as server:
        assert [answer.stored for answer in run(go())] == [True, True, False, False, False]
        assert server.counters.bodies[-1]["n"] == 3 and server.counters.bodies[-1]["seed"] == 2


def test_with_everything_stored_no_teacher_is_needed(tmp_path: Path) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:
            return await asker.ask(n=3)

    with openai_server() as server:
        before = run(go())
    assert texts(run(go())) == texts(before), "the server is gone by now"


@pytest.mark.parametrize(
    "change",
    [
        {"text": "another question"},
        {"temperature": 0.5},
        {"max_tokens": 17},
        {"stop": ("x",)},
        {"seed": 9},
        {"config": {"model": "other"}},
        {"config": {"revision": "r2"}},
        {"config": {"kind": "sglang"}},
    ],
    ids=str,
)
def test_a_changed_question_is_never_answered_from_an_old_entry(tmp_path: Path, change: dict[str, Any]) -> None:
    asked = {"text": "Q", "seed": 0, **change}
    config = asked.pop("config", {})

    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:
            await asker.ask()
        async with asking(server, tmp_path, **config) as asker:
            return await asker.ask(**asked)

    with openai_server(models=["teacher", "other"]) as server:
        (answer,) = run(go())
        assert not answer.stored
        assert requests(server) == 2


@pytest.mark.parametrize("config", [{"timeout": 7}, {"max_concurrency": 3}, {"max_retries": 0}, {"api_key": "k"}])
def test_another_time_limit_key_or_concurrency_changes_no_answer(tmp_path: Path, config: dict[str, Any]) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:
            await asker.ask()
        async with asking(server, tmp_path, **config) as asker:
            return await asker.ask()

    with openai_server() as server:
        assert run(go())[0].stored


# --- several choices ---


@pytest.mark.parametrize(
    ("habit", "paid"),
    [
        ({}, 1),
        ({"honours_n": False}, 4),  # one choice comes, whatever is asked
        ({"honours_n": 2}, 4),  # four are refused: then one by one
        ({"usage_of": "one"}, 4),  # counts one choice only: asked one by one, so that usage stays right
        ({"kind": "ollama"}, 4),
    ],
    ids=str,
)
def test_every_draw_has_its_own_answer_and_the_usage_is_right(tmp_path: Path, habit: dict[str, Any], paid: int) -> None:
    kind = habit.get("kind", "vllm")

    async def go() -> tuple[list[Any], Any]:
        async with asking(server, tmp_path, kind=kind) as asker:
            answers = await asker.ask("five words are in this", n=4)
            assert texts(await asker.ask("five words are in this", n=4)) == texts(answers)
            return answers, asker.client.meter

    opened = ollama_server() if kind == "ollama" else openai_server(**habit)
    with opened as server:
        answers, meter = run(go())
        assert len(set(texts(answers))) == 4
        assert [(answer.draw.attempt, answer.draw.seed) for answer in answers] == [(n, n) for n in range(4)]
        assert requests(server) == paid
        assert meter.answers == 4
        assert meter.completion_tokens == sum(len(text.split(" ")) for text in texts(answers))
        assert meter.tokens - meter.probe_tokens == 5 * paid + meter.completion_tokens
        if paid > 1:
            assert {body.get("seed", body.get("options", {}).get("seed")) for body in server.counters.bodies} >= {
                0,
                1,
                2,
                3,
            }


def test_a_prompt_that_is_refused_does_not_take_n_from_the_others(tmp_path: Path) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:
            refused = await asker.ask("forbidden", n=4)
            for at in range(3):
                await asker.ask(f"fine {at}", n=4)
            return refused

    with openai_server(faults={"forbidden": status(400, "content policy", times=None)}) as server:
        assert [error.reason for error in run(go())] == ["bad_request"] * 4
        assert requests(server) == 3


# --- one flight ---


def test_two_samples_that_ask_the_same_pay_once(tmp_path: Path) -> None:
    async def go() -> list[list[Any]]:
        async with asking(server, tmp_path) as asker:
            return await asyncio.gather(*(asker.ask(n=2) for _ in range(5)))

    with openai_server(latency=0.1) as server:
        answers = run(go())
        assert len({tuple(texts(each)) for each in answers}) == 1
        assert requests(server) == 1


def test_two_samples_that_ask_for_some_of_the_same_pay_for_each_answer_once(tmp_path: Path) -> None:
    async def go() -> list[list[Any]]:
        async with asking(server, tmp_path) as asker:
            return [*await asyncio.gather(asker.ask(n=2), asker.ask(n=4), asker.ask(n=3))]

    with openai_server(latency=0.1) as server:
        answers = run(go())
        assert texts(answers[1])[:2] == texts(answers[0])
        assert server.counters.choices - 5 == 4, "the probe takes five choices"


def test_when_the_first_is_cancelled_the_second_asks_and_pays_once(tmp_path: Path) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:
            await asker.client.ready()
            first = asyncio.create_task(asker.ask())
            await until(lambda: server.counters.in_flight == 1)
            second, third = asyncio.create_task(asker.ask()), asyncio.create_task(asker.ask())
            await asyncio.sleep(0.02)
            first.cancel()
            answers = [*await second, *await third]
            assert first.cancelled()
            return answers

    with openai_server(latency=lambda call: 0.0 if call.prompt == PROBE else 0.2) as server:
        assert len(set(texts(run(go())))) == 1
        assert requests(server) == 1


# --- faults ---


def test_faults_that_pass_are_tried_again_and_counted_by_kind(tmp_path: Path) -> None:
    async def go() -> tuple[list[list[Any]], dict[str, int]]:
        # A kept connection that turns out closed is no fault: here each request has one of its own.
        async with asking(server, tmp_path, headers={"Connection": "close"}) as asker:
            found = await asyncio.gather(*(asker.ask(name) for name in faults))
            meter = asker.client.meter
            assert {kind: took.count for kind, took in meter.failed.items()} == meter.retries
            return found, dict(meter.retries)

    faults = {
        "limited": rate_limited("0"),
        "busy": status(503),
        "broken": status(500),
        "reset": reset(),
        "cut": cut(),
        "garbled": garbled(),
    }
    with openai_server(faults=faults) as server:
        found, retries = run(go())
        assert all(isinstance(answer, Answer) for (answer,) in found)
        assert sum(retries.values()) == 6
        assert retries["rate_limited"] == retries["overloaded"] == retries["server_error"] == 1
        assert requests(server) == 6


def test_a_draw_that_breaks_the_server_is_given_up_and_its_siblings_live(tmp_path: Path) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:
            return await asker.ask(n=4)

    def poisoned(call: Call) -> Fault | None:
        return status(500, "CUDA error", times=None) if call.seed == 2 else None

    with openai_server(honours_n=False, faults=poisoned) as server:
        answers = run(go())
        assert [type(answer) for answer in answers] == [Answer, Answer, SampleError, Answer]
        assert answers[2].reason == "server_error"
        tries = [body["seed"] for body in server.counters.bodies if body["messages"][-1]["content"] == "Q"]
        assert tries.count(2) == 2, "tried once more, and no more"


def test_an_answer_that_always_takes_too_long_is_given_up_after_its_retries_while_others_are_answered(
    tmp_path: Path,
) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path, max_retries=2) as asker:
            long = asyncio.create_task(asker.ask("long"))
            while not long.done():
                await asker.ask(f"Q{asker.paid}")
            return await long

    with openai_server(faults={"long": status(504, times=None)}, latency=0.01) as server:
        assert run(go())[0].reason == "timeout"
        assert [body["messages"][-1]["content"] for body in server.counters.bodies].count("long") == 3


def test_a_server_that_breaks_for_all_for_some_seconds_costs_no_sample(tmp_path: Path) -> None:
    async def go() -> list[list[Any]]:
        async with asking(server, tmp_path) as asker:
            return await asyncio.gather(*(asker.ask(f"Q{number}") for number in range(60)))

    sick_until = math.inf

    def sick(call: Call) -> Fault | None:
        nonlocal sick_until
        if call.prompt == PROBE:
            return None
        sick_until = min(sick_until, time.monotonic() + 1.5)
        return status(500, "the runner has stopped", times=None) if time.monotonic() < sick_until else None

    with openai_server(faults=sick) as server:
        assert all(isinstance(answer, Answer) for (answer,) in run(go()))


def test_a_prompt_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    async def go() -> list[list[Any]]:
        async with asking(server, tmp_path) as asker:
            return [*await asyncio.gather(asker.ask("word " * 5000), asker.ask("short"))]

    with openai_server() as server:
        (long,), (short,) = run(go())
        assert isinstance(long, SampleError) and long.reason == "context_too_long"
        assert isinstance(short, Answer)


def test_a_key_that_is_refused_midway_stops_and_what_its_sibling_paid_for_is_stored(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking(server, tmp_path) as asker:
            with pytest.raises(TeacherError, match="401"):
                await asker.ask(n=3)
            assert await holds(asker.store, 2)
            assert {asker.store.get(Draw(n, n).key(asker.prompt())) is None for n in (0, 2)} == {False}

    def revoked(call: Call) -> Fault | None:
        return status(401, "revoked", times=None) if call.seed == 1 and call.prompt == "Q" else None

    # The siblings' answers come after the refusal.
    latency = lambda call: 0.2 if call.prompt == "Q" else 0.0  # noqa: E731
    with openai_server(honours_n=False, faults=revoked, latency=latency) as server:
        run(go())
        assert requests(server) == 2


def test_an_unusable_endpoint_is_asked_once_however_many_wait_for_it(tmp_path: Path) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path) as asker:

            async def one(number: int) -> list[Any]:
                try:
                    return await asker.ask(f"Q{number}")
                except FatalError as error:
                    asker.brake.reason = error  # as a run does
                    raise

            return [*await asyncio.gather(*(one(number) for number in range(20)), return_exceptions=True)]

    with openai_server(api_key="secret") as server:
        ends = run(go())
        assert all(isinstance(end, TeacherError) for end in ends)
        assert server.counters.paths["/v1/models"] == 1


@pytest.mark.parametrize("stored", [[1], [0, 2], [1, 4]])
def test_draws_around_stored_ones_are_none_of_those_again(tmp_path: Path, stored: list[int]) -> None:
    """Servers seed the choices of a request one after the other, from the seed of the request on."""

    async def go() -> None:
        async with asking(server, tmp_path) as asker:
            for attempt in stored:
                await asker.client.generate(asker.prompt(), [Draw(attempt, attempt)])
            assert texts(await asker.ask(n=6)) == [f"drawn with {seed}" for seed in range(6)]
            assert asker.paid == 2 * len(stored) + (0 not in stored), "what lies between them goes out together"

    with openai_server(lambda call, index: f"drawn with {(call.seed or 0) + index}") as server:
        run(go())


# --- the brake and the bound ---


def test_of_the_many_that_wait_for_what_is_in_flight_one_looks_at_a_time(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking(server, tmp_path, max_concurrency=500) as asker:
            await asker.client.ready()
            asker.brake.taken = True
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(asker.ask(f"Q{number}")) for number in range(500)]
                await asyncio.sleep(0.5)
                assert asker.brake.looks < 500 + 50 and asker.paid == 0, "each once, and one of them again and again"
                asker.brake.taken = False
            assert all(isinstance(task.result()[0], Answer) for task in tasks)

    with openai_server() as server:
        run(go())


def test_after_the_brake_nothing_new_goes_out_and_what_is_in_flight_is_stored(tmp_path: Path) -> None:
    async def go() -> list[Any]:
        async with asking(server, tmp_path, max_concurrency=4) as asker:
            await asker.client.ready()
            tasks = [asyncio.create_task(asker.ask(f"Q{number}")) for number in range(20)]
            await until(lambda: server.counters.in_flight == 4)
            asker.brake.reason = EnvironmentFault("stop")
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert await holds(asker.store, 4)
            return ends

    with openai_server(latency=lambda call: 0.0 if call.prompt == PROBE else 0.2) as server:
        ends = run(go())
        assert [isinstance(end, list) for end in ends].count(True) == 4
        assert [isinstance(end, EnvironmentFault) for end in ends].count(True) == 16
        assert requests(server) == 4


def test_a_request_that_waits_to_be_tried_again_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def go() -> float:
        async with asking(server, tmp_path) as asker:
            await asker.client.ready()
            task = asyncio.create_task(asker.ask("limited"))
            await until(lambda: asker.client.meter.retries.total() == 1)
            asker.brake.reason = EnvironmentFault("stop")
            begun = perf_counter()
            with pytest.raises(EnvironmentFault):
                await task
            return perf_counter() - begun

    with openai_server(faults={"limited": rate_limited("2")}) as server:
        assert run(go()) < 1


def test_no_more_requests_are_in_flight_than_configured_and_no_fewer(tmp_path: Path) -> None:
    async def go() -> Any:
        async with asking(server, tmp_path, max_concurrency=7) as asker:
            await asyncio.gather(*(asker.ask(f"Q{number}", n=2) for number in range(60)))
            return asker.client.meter

    with openai_server(honours_n=False, latency=0.02) as server:
        meter = run(go())
        assert server.counters.peak == meter.peak == 7
        assert meter.requests == 120
        assert meter.report(7)["slot_utilisation"] > 0.5


def test_a_request_that_waits_to_be_tried_again_holds_no_slot(tmp_path: Path) -> None:
    async def go() -> list[str]:
        done: list[str] = []
        async with asking(server, tmp_path, max_concurrency=1) as asker:

            async def one(text: str) -> None:
                await asker.ask(text)
                done.append(text)

            await asker.client.ready()
            await asyncio.gather(one("limited"), one("a"), one("b"))
        return done

    with openai_server(faults={"limited": rate_limited("1")}) as server:
        assert run(go()) == ["a", "b", "limited"]


def test_the_price_of_what_was_paid(tmp_path: Path) -> None:
    async def go() -> Any:
        price = {"prompt": 2.0, "completion": 4.0}
        async with asking(server, tmp_path, price=price) as asker:
            await asker.ask("two words", n=2)
            return asker.client.meter

    with openai_server() as server:
        meter = run(go())
        assert meter.usage.completion_tokens == meter.completion_tokens + 8, "first contact is paid for as well"
        assert meter.cost == pytest.approx(((2 + 12) * 2.0 + meter.usage.completion_tokens * 4.0) / 1e6)


def test_a_text_to_be_scored_is_part_of_what_a_budget_reserves(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking(server, tmp_path, budget={"max_tokens": 1_000}) as asker:
            prompt = asker.prompt("Q", DecodeProfile(max_tokens=1), scored="word " * 400)
            (answer,) = await asker.client.generate(prompt, [Draw(0, None)])
            assert isinstance(answer, BudgetSpent)

    with openai_server() as server:
        run(go())
    assert not server.counters.paths["/tokenize"]


def test_tokens_a_minute_are_kept_where_a_server_reports_no_usage(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking(server, tmp_path, tokens_per_minute=60) as asker:
            await asker.ask("first", max_tokens=10)
            looks = asker.brake.looks
            second = asyncio.create_task(asker.ask("second", max_tokens=10))
            await until(lambda: second.done() or asker.brake.looks > looks + 1)
            assert not second.done()
            asker.brake.reason = EnvironmentFault("stop")
            with pytest.raises(EnvironmentFault):
                await second

    with openai_server(usage_of="none") as server:
        run(go())
    assert requests(server) == 1


def test_choices_that_are_together_more_than_a_minute_allows_are_asked_for_one_by_one(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking(server, tmp_path, tokens_per_minute=6_000) as asker:
            prompt = asker.prompt("Q", DecodeProfile(max_tokens=2_500))
            async with asyncio.timeout(10):  # what an answer did not take is the next one's at once
                answers = await asker.client.generate(prompt, [Draw(attempt, attempt) for attempt in range(20)])
            assert all(isinstance(answer, Answer) for answer in answers)

    with openai_server() as server:
        run(go())
    assert requests(server) == 20


@asynccontextmanager
async def gone(folder: Path) -> AsyncIterator[tuple[Asker, Callable[..., Server]]]:
    """A client that has found its server gone, and what starts one in its place."""
    with ExitStack() as up:
        start = partial(openai_server, port=free_port())
        async with asking(up.enter_context(start()), folder, max_retries=1) as asker:
            await asker.ask("Q1")
            await asyncio.to_thread(up.close)
            with pytest.raises(Unreachable, match="nobody answers"):
                await asker.ask("Q2")
            yield asker, lambda **options: up.enter_context(start(**options))


def test_an_outage_that_outlasts_the_retries_is_waited_out_once_and_then_looked_after(tmp_path: Path) -> None:
    async def go() -> None:
        async with gone(tmp_path) as (asker, start):
            start()
            begun = asker.client.meter.retries.total()
            told = []
            for _ in range(2):
                with pytest.raises(Unreachable, match="nobody answers") as refused:
                    await asker.ask("Q3")
                told.append(len(refused.traceback))
            assert asker.client.meter.retries.total() == begun
            assert told[0] == told[1], "or the traceback grows with each, and keeps every sample in memory"
            found: list[Any] = []
            while not found:  # some seconds later one looks again
                await asyncio.sleep(0.1)
                with suppress(Unreachable):
                    found = await asker.ask("Q3")
            assert all(isinstance(answer, Answer) for answer in [*found, *await asker.ask("Q4")])

    run(go())


@pytest.mark.slow
def test_a_server_that_is_back_and_says_nothing_yet_is_asked_by_one_alone(tmp_path: Path) -> None:
    async def go() -> None:
        async with gone(tmp_path) as (asker, start):
            loading = start(faults={PROBE: Fault("hang", times=None)})
            looks = None
            while not loading.counters.requests:
                looks = looks or asyncio.create_task(asker.ask("Q3"))
                await asyncio.sleep(0.1)
                if looks.done():
                    assert isinstance(looks.exception(), Unreachable)
                    looks = None
            assert looks is not None
            await asyncio.wait([looks], timeout=12)  # longer than a late endpoint is waited for beside others
            with pytest.raises(Unreachable):
                await asker.ask("Q4")
            looks.cancel()
            assert requests(loading) == 0

    asyncio.run(go())
