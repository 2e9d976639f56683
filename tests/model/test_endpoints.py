"""Several servers of one model: they die, come back, refuse and hang, and no answer is lost or stored twice."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, TypeVar

import pytest
from aiohttp import web

from fastdistill.control.store import ResponseStore
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import EnvironmentFault, FatalError, TeacherError
from fastdistill.core.types import Answer, Draw
from fastdistill.model.client import ModelClient
from fastdistill.model.limits import Limit
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider
from fastdistill.model.retry import RETRY_AFTER_CAP
from fastdistill.model.router import Endpoint
from tests.servers import (
    NOWHERE,
    Call,
    Fault,
    Server,
    free_port,
    garbled,
    hang,
    mixed,
    openai_server,
    rate_limited,
    status,
)
from tests.world import holds

T = TypeVar("T")
PROBE = "Name three colours."


class Brake:
    """Lets everything go until it is pulled."""

    def __init__(self) -> None:
        self.reason: FatalError | None = None
        self._pulled = asyncio.Event()

    def pull(self, reason: FatalError) -> None:
        self.reason = reason
        self._pulled.set()

    def check(self, tokens: int, dollars: float) -> bool:
        if self.reason is not None:
            raise self.reason
        return False

    async def pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._pulled.wait(), seconds)

    def turn(self) -> None:
        return None

    def asks(self) -> None:
        pass


class Asker:
    def __init__(self, client: ModelClient, store: ResponseStore, brake: Brake) -> None:
        self.client, self.store, self.brake = client, store, brake

    async def ask(self, text: str, n: int = 1) -> list[Any]:
        prompt = self.client.prompt([{"role": "user", "content": text}], DecodeProfile(), {})
        return await self.client.generate(prompt, [Draw(at, at) for at in range(n)])

    async def ask_all(self, requests: int, at_once: int = 32, n: int = 1) -> list[Any]:
        """Asks for `Q0`, `Q1` ... and returns the answers in that order."""
        results: dict[int, list[Any]] = {}
        numbers = iter(range(requests))

        async def work() -> None:
            for number in numbers:
                results[number] = await self.ask(f"Q{number}", n)

        await asyncio.gather(*(work() for _ in range(at_once)))
        return [answer for number in range(requests) for answer in results[number]]


@asynccontextmanager
async def asking(urls: list[str], folder: Path, **config: Any) -> AsyncIterator[Asker]:
    fields = {"provider": "vllm", "model": "teacher", "base_url": urls, "max_concurrency": 8, "hedge": False, **config}
    parsed = OpenAIConfig.model_validate(fields)
    providers = [OpenAIProvider(endpoint) for endpoint in parsed.endpoints()]  # type: ignore[arg-type]
    brake = Brake()
    async with ResponseStore(folder / "responses.sqlite") as store:
        client = ModelClient("teacher", parsed, providers, store, brake)
        try:
            yield Asker(client, store, brake)
        finally:
            await client.aclose()


class Restartable:
    """A server that can go away and come back at the same port; `answered` counts over all its lives."""

    def __init__(self, **options: Any) -> None:
        self._options = options | {"port": free_port()}
        self.url = f"http://127.0.0.1:{self._options['port']}/v1"
        self._lives: list[Server] = []
        self._alive = ExitStack()

    async def start(self) -> None:
        self._lives.append(await asyncio.to_thread(self._alive.enter_context, openai_server(**self._options)))

    async def stop(self) -> None:
        await asyncio.to_thread(self._alive.close)

    @property
    def latest(self) -> Server:
        return self._lives[-1]

    @property
    def answered(self) -> Counter[str]:
        return sum((answers(server) for server in self._lives), Counter[str]())


@contextmanager
def restartable(**options: Any) -> Iterator[Restartable]:
    server = Restartable(**options)
    try:
        yield server
    finally:
        server._alive.close()


def answers(*servers: Server) -> Counter[str]:
    """What was answered, without the probes, by prompt."""
    found = sum((server.counters.prompts for server in servers), Counter[str]())
    del found[PROBE]
    return found


def quick(call: Call) -> float:
    return 0.0 if call.prompt == PROBE else Random(call.prompt).uniform(0.002, 0.01)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 50))


async def until(happens: Callable[[], bool]) -> None:
    end = monotonic() + 20
    while not happens():
        assert monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


def complete(found: list[Any], requests: int) -> bool:
    return len(found) == requests and all(isinstance(answer, Answer) for answer in found)


# --- endpoints that share, die and come back ---


def test_several_servers_share_the_work(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path) as asker:
            assert complete(await asker.ask_all(200), 200)
            assert await holds(asker.store, 200)
            assert len(asker.client.endpoints) == 2

    with openai_server(latency=quick) as one, openai_server(latency=quick) as other:
        run(go())
        assert set(answers(one, other).values()) == {1}
        assert min(answers(one).total(), answers(other).total()) > 50
        assert max(one.counters.peak, other.counters.peak) <= 8


def test_an_endpoint_that_is_dead_from_the_start_costs_nothing_but_a_note(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([NOWHERE, server.url], tmp_path) as asker:
            assert complete(await asker.ask_all(100, n=2), 200)
            assert await holds(asker.store, 200)

    with openai_server(latency=quick) as server:
        run(go())
        assert answers(server).total() == 100, "and two choices still come in one request"


def test_the_slots_of_an_endpoint_that_is_down_are_not_counted(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([NOWHERE, server.url], tmp_path) as asker:
            await asker.ask_all(50)
            assert asker.client.router.capacity == 8

    with openai_server(latency=quick) as server:
        run(go())


@pytest.mark.slow
def test_an_endpoint_that_hangs_at_first_contact_holds_nobody_up_for_long_and_is_used_later(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([hung.url, server.url], tmp_path) as asker:
            assert complete(await asker.ask_all(50), 50)
            assert answers(server).total() == 50
            healed.append(True)
            await until(lambda: asker.client.router.endpoints[0].cooling_until < asyncio.get_running_loop().time())
            assert complete([answer for at in range(50) for answer in await asker.ask(f"later {at}")], 50)
            assert answers(hung).total() > 0

    healed: list[bool] = []
    with (
        openai_server(faults=lambda call: None if healed else hang(times=None)) as hung,
        openai_server(latency=quick) as server,
    ):
        run(go())


def test_with_no_endpoint_at_all_the_run_stops_at_once(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([NOWHERE, NOWHERE.replace(":9", ":7")], tmp_path) as asker:
            with pytest.raises(TeacherError, match="teacher: "):
                await asker.ask("Q")

    run(go())


def test_a_model_that_loads_at_first_contact_is_waited_for_and_then_probed(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([server.url], tmp_path) as asker:
            assert complete(await asker.ask("Q"), 1)
            assert asker.client.endpoints[0].n is True

    def loads(call: Call) -> Fault | None:
        return status(503, "Loading model") if call.number <= 20 else None  # the requests of four probes

    with openai_server(faults=loads) as server:
        run(go())
    assert server.counters.requests == 20 + 4 + 1


def test_an_endpoint_that_dies_midway_loses_no_request(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([mortal.url, server.url], tmp_path) as asker:
            await mortal.start()
            work = asyncio.create_task(asker.ask_all(300))
            await until(lambda: mortal.answered.total() > 40)
            await mortal.stop()
            assert complete(await work, 300)
            assert await holds(asker.store, 300)
            assert asker.client.meter.answers == 300

    with restartable(latency=quick) as mortal, openai_server(latency=quick) as server:
        run(go())
        answered = mortal.answered + answers(server)
        assert len(answered) == 300
        assert max(answers(server).values()) == 1
        # What an endpoint had answered when its connections broke is asked again: at most what was in flight.
        assert answered.total() <= 300 + 8


def test_an_endpoint_that_comes_back_is_used_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([mortal.url, server.url], tmp_path) as asker:
            await mortal.start()
            work = asyncio.create_task(asker.ask_all(1500))
            await until(lambda: mortal.answered.total() > 20)
            await mortal.stop()
            before = mortal.answered.total()
            await mortal.start()
            await until(lambda: mortal.answered.total() > before + 20)
            assert complete(await work, 1500)
            assert await holds(asker.store, 1500)

    with restartable(latency=quick) as mortal, openai_server(latency=quick) as server:
        run(go())


def test_an_endpoint_that_comes_up_late_is_probed_then_and_used(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([late.url, server.url], tmp_path) as asker:
            work = asyncio.create_task(asker.ask_all(1500))
            await until(lambda: answers(server).total() > 20)
            assert len(asker.client.endpoints) == 1
            await late.start()
            await until(lambda: late.answered.total() > 20)
            assert len(asker.client.endpoints) == 2
            assert complete(await work, 1500)
            assert await holds(asker.store, 1500)

    with restartable(latency=quick) as late, openai_server(latency=quick) as server:
        run(go())


@pytest.mark.parametrize("late", [False, True], ids=["it had answered", "it was not there at first contact"])
def test_an_endpoint_that_comes_to_serve_another_model_is_left_out_and_the_others_go_on(
    tmp_path: Path, late: bool
) -> None:
    def unknown(call: Call) -> Fault | None:
        return status(404, "The model `teacher` does not exist") if late or call.number > 20 else None

    async def go() -> None:
        if not late:
            await changed.start()
        async with asking([changed.url, server.url], tmp_path) as asker:
            asked = 50
            assert complete(await asker.ask_all(asked), asked)
            if late:
                await changed.start()
            while changed.latest.counters.requests <= (0 if late else 20):
                asked += 50
                assert complete(await asker.ask_all(asked), asked)
            assert complete(await asker.ask_all(asked + 50), asked + 50)

    with restartable(latency=quick, faults=unknown) as changed, openai_server(latency=quick) as server:
        run(go())


def test_while_all_are_down_everybody_waits_and_nothing_is_lost(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path) as asker:
            await asyncio.gather(one.start(), other.start())
            work = asyncio.create_task(asker.ask_all(300, at_once=64))
            await until(lambda: (one.answered + other.answered).total() > 50)
            await asyncio.gather(one.stop(), other.stop())
            await asyncio.sleep(1.5)
            assert not work.done()
            tries = asker.client.meter.requests
            await asyncio.gather(one.start(), other.start())
            assert complete(await work, 300)
            assert await holds(asker.store, 300)
            assert tries < 300, "nobody hammers at servers that are down"

    with restartable(latency=quick) as one, restartable(latency=quick) as other:
        run(go())


def test_when_a_server_tells_its_load_again_all_are_sent_at_once_before_it_has_answered_anybody(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([server.url], tmp_path) as asker:
            await server.start()
            work = asyncio.create_task(asker.ask_all(60, at_once=8))
            await until(lambda: server.answered.total() > 20)
            await server.stop()
            await asyncio.sleep(2.5)  # by now each would wait for seconds
            late.append(2.0)
            await server.start()
            came_back = monotonic()
            await until(lambda: server.latest.counters.peak == 8)
            assert monotonic() - came_back < 1.0
            late.clear()
            assert complete(await work, 60)

    late: list[float] = []
    told = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
    with restartable(latency=lambda call: sum(late, quick(call)), paths={"/metrics": told}) as server:
        run(go())


def test_who_waits_for_endpoints_that_are_down_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path) as asker:
            work = asyncio.gather(*(asker.ask(f"Q{number}") for number in range(20)), return_exceptions=True)
            endpoints = asker.client.router.endpoints
            await until(lambda: min(endpoint.cooling_until for endpoint in endpoints) > 0)
            asker.brake.pull(EnvironmentFault("stop"))
            begun = monotonic()
            ends = await work
            assert monotonic() - begun < 10, "not the minute that the servers asked for"
            assert all(isinstance(end, EnvironmentFault) for end in ends)

    busy = {"Q": rate_limited("60", times=None)}
    with openai_server(faults=busy) as one, openai_server(faults=busy) as other:
        run(go())


def test_who_waits_for_first_contact_with_a_late_endpoint_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def go() -> None:
        await gone.start()
        async with asking([late.url, gone.url], tmp_path) as asker:
            assert complete(await asker.ask_all(20), 20)
            await gone.stop()
            await late.start()
            work = asyncio.gather(*(asker.ask(f"R{number}") for number in range(20)), return_exceptions=True)
            await until(lambda: late.latest.counters.requests > 0)
            await asyncio.sleep(0.1)
            asker.brake.pull(EnvironmentFault("stop"))
            assert all(isinstance(end, EnvironmentFault) for end in await work)

    busy = {PROBE: status(504, times=None, Retry_After="60")}  # longer than the test may take
    with restartable() as gone, restartable(faults=busy) as late:
        run(go())


def test_a_short_outage_of_all_costs_no_request_however_many_endpoints_refuse_it(tmp_path: Path) -> None:
    async def go(endpoints: int) -> None:
        (folder := tmp_path / str(endpoints)).mkdir()
        servers = [alive.enter_context(restartable(latency=quick)) for _ in range(endpoints)]
        await asyncio.gather(*(server.start() for server in servers))
        async with asking([server.url for server in servers], folder) as asker:
            await asker.ask_all(20)
            await asyncio.gather(*(server.stop() for server in servers))
            late = asyncio.create_task(asker.ask("late"))
            await until(lambda: asker.client.meter.retries.total() >= 2 * endpoints)
            assert not late.done()
            await servers[0].start()
            assert complete(await late, 1)

    async def all_at_once() -> None:
        await asyncio.gather(go(2), go(10))

    with ExitStack() as alive:
        run(all_at_once())


# --- endpoints that refuse ---


def test_while_all_endpoints_refuse_everybody_waits_however_short_they_say_it_takes(tmp_path: Path) -> None:
    async def go(asked: str, requests: int) -> None:
        (folder := tmp_path / f"{asked} {requests}").mkdir()
        begun = monotonic()

        def refuses(call: Call) -> Fault | None:
            return None if call.prompt == PROBE or monotonic() > begun + 2 else rate_limited(asked, times=None)

        with openai_server(faults=refuses) as one, openai_server(faults=refuses) as other:
            async with asking([one.url, other.url], folder) as asker:
                assert complete(await asker.ask_all(requests), requests), (asked, requests)

    async def all_at_once() -> None:
        said = ("0", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "0.01")
        await asyncio.gather(*(go(asked, requests) for asked in said for requests in (1, 20)))

    run(all_at_once())


def one_endpoint() -> Endpoint:
    return Endpoint(OpenAIProvider(OpenAIConfig(model="teacher", base_url=NOWHERE)), Limit(1))


def test_no_endpoint_is_left_out_for_longer_than_a_request_would_wait() -> None:
    endpoint = one_endpoint()
    endpoint.cool(1.0, 2.0, 99_999_999.0)
    assert endpoint.cooling_until == 2.0 + RETRY_AFTER_CAP


def test_two_failures_on_end_among_answers_cool_an_endpoint_until_the_next_answer() -> None:
    endpoint = one_endpoint()
    endpoint.broke(1.0, 2.0)
    assert endpoint.cooling_until == 0.0
    endpoint.broke(1.0, 2.0)
    assert endpoint.cooling_until > 2.0
    endpoint.answered()
    assert endpoint.cooling_until <= 2.0


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_an_endpoint_that_refuses_cools_whatever_it_answers_meanwhile(seconds: float | None) -> None:
    endpoint = one_endpoint()
    endpoint.cool(1.0, 2.0, seconds)
    endpoint.answered()
    assert endpoint.cooling_until > 2.0
    if seconds is not None:
        endpoint.broke(2.0, 3.0, seconds)
        endpoint.answered()
        assert endpoint.cooling_until == 8.0


@pytest.mark.parametrize(
    "fault",
    [status(500, times=None), garbled(b"<html>", times=None), status(503, times=None)],
    ids=["500", "html", "503"],
)
@pytest.mark.parametrize("requests", [1, 100])
def test_an_endpoint_that_fails_at_once_draws_no_request_away_from_one_that_answers(
    tmp_path: Path, fault: Fault, requests: int
) -> None:
    async def go() -> None:
        async with asking([sick.url, server.url], tmp_path) as asker:
            assert complete(await asker.ask_all(requests), requests)
            assert asker.client.meter.retries.total() < 25

    def slowly(call: Call) -> float:
        return 0.0 if call.prompt == PROBE else 0.05

    with (
        openai_server(faults=lambda call: None if call.prompt == PROBE else fault) as sick,
        openai_server(latency=slowly) as server,
    ):
        run(go())


def test_prompts_that_no_endpoint_can_bear_are_given_up_and_cool_nobody_for_long(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path) as asker:
            begun = monotonic()
            found = await asker.ask_all(30)
            assert {answer.reason for answer in found} == {"server_error"}
            assert monotonic() - begun < 60
            assert asker.client.meter.requests <= 180, "five tries for each, while nobody is answered"

    def breaks(call: Call) -> Fault | None:
        return None if call.prompt == PROBE else status(500, times=None)

    with openai_server(faults=breaks) as one, openai_server(faults=breaks) as other:
        run(go())


def test_a_429_at_one_sends_the_others_elsewhere_for_as_long_as_it_asks(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([limited.url, server.url], tmp_path) as asker:
            assert complete(await asker.ask_all(200), 200)
            assert await holds(asker.store, 200)
            assert 0 < asker.client.meter.retries["rate_limited"] <= 8, "those that were on their way"

    def refuses(call: Call) -> Fault | None:
        return None if call.prompt == PROBE else rate_limited("30", times=None)

    with openai_server(faults=refuses, latency=quick) as limited, openai_server(latency=quick) as server:
        run(go())
        assert answers(server).total() == 200


def test_a_wrong_key_at_one_is_said_at_once_and_nothing_is_paid(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([locked.url, server.url], tmp_path, api_key="mine") as asker:
            with pytest.raises(TeacherError, match=f"401.*{locked.url}|{locked.url}.*401|Invalid API key"):
                await asker.ask_all(10)

    with openai_server(api_key="another") as locked, openai_server() as server:
        run(go())
        assert answers(server).total() == 0


def test_a_few_percent_of_faults_cost_no_answer_and_cool_no_endpoint_for_long(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path) as asker:
            found = await asker.ask_all(1600)
            assert complete(found, 1600)
            assert await holds(asker.store, 1600)
            assert all(endpoint.coolings <= 1 for endpoint in asker.client.router.endpoints)

    def faults() -> Callable[[Call], Fault | None]:
        broken = mixed(0.05)

        def fault(call: Call) -> Fault | None:
            found = None if call.prompt == PROBE else broken(call)
            return found if found is None or found.status != 500 else None  # a second 500 is the prompt's own fault

        return fault

    with (
        openai_server(latency=quick, faults=faults()) as one,
        openai_server(latency=quick, faults=faults()) as other,
    ):
        run(go())
        # A quarter each at least: either may have cooled for a second, which must be a small part of the whole.
        assert min(answers(one).total(), answers(other).total()) > 400


def test_a_server_that_can_not_bring_several_choices_makes_all_be_asked_one_by_one(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path) as asker:
            found = await asker.ask_all(30, n=3)
            assert complete(found, 90)
            assert asker.client.meter.answers == 90 and await holds(asker.store, 90)

    with openai_server(honours_n=False) as one, openai_server() as other:
        run(go())
        assert answers(one, other).total() == 90


# --- stragglers ---


def straggles(call: Call) -> Fault | None:
    return hang(times=None) if call.prompt == "straggler" else None


def test_a_straggler_is_asked_again_elsewhere_and_the_first_answer_wins(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([hung.url, server.url], tmp_path, hedge=True) as asker:
            await asker.ask_all(150)
            # An idle client asks the first endpoint first.
            (answer,) = await asker.ask("straggler")
            assert isinstance(answer, Answer) and answer.completion.text.endswith("to straggler")
            assert (answer.draw.attempt, answer.draw.seed) == (0, 0)
            assert asker.client.meter.hedged >= 1
            assert asker.client.meter.answers == 151 and await holds(asker.store, 151)
            await until(lambda: asker.client.router.endpoints[0].in_flight == 0)

    with openai_server(latency=quick, faults=straggles) as hung, openai_server(latency=quick) as server:
        run(go())
        assert answers(server)["straggler"] == 1
        assert answers(hung)["straggler"] == 0


def test_the_loser_is_called_off_and_its_slot_is_free(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([slow.url, server.url], tmp_path, hedge=True) as asker:
            await asker.ask_all(150)
            await asker.ask("straggler")
            assert slow.counters.in_flight == 1, "the server would go on"
            assert [endpoint.in_flight for endpoint in asker.client.router.endpoints] == [0, 0]
            assert asker.client.meter.reserved_tokens == 0
            await until(lambda: slow.counters.in_flight == 0)
            assert answers(slow)["straggler"] == 0, "but nobody listens any more"

    def slowly(call: Call) -> float:
        return 3.0 if call.prompt == "straggler" else quick(call)

    with openai_server(latency=slowly) as slow, openai_server(latency=quick) as server:
        run(go())
        assert answers(slow, server)["straggler"] == 1


def test_a_straggler_brings_the_draws_that_it_was_asked_for(tmp_path: Path) -> None:
    async def go(hedge: bool, folder: Path) -> list[Any]:
        async with asking([slow.url if hedge else server.url, server.url], folder, hedge=hedge) as asker:
            await asker.ask_all(150)
            return [(answer.draw, answer.key, answer.completion.text) for answer in await asker.ask("straggler", n=3)]

    def slowly(call: Call) -> float:
        return 30.0 if call.prompt == "straggler" else quick(call)

    with openai_server(latency=slowly) as slow, openai_server(latency=quick) as server:
        folders = tmp_path / "hedged", tmp_path / "plain"
        for folder in folders:
            folder.mkdir()
        hedged = run(go(True, folders[0]))
        assert hedged == run(go(False, folders[1]))
        assert [draw.seed for draw, _, _ in hedged] == [0, 1, 2]


def test_with_hedging_off_nobody_is_asked_twice(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path, hedge=False) as asker:
            await asker.ask_all(150)
            await asker.ask("straggler")
            assert asker.client.meter.hedged == 0

    def slowly(call: Call) -> float:
        return 0.5 if call.prompt == "straggler" else quick(call)

    with openai_server(latency=slowly) as one, openai_server(latency=slowly) as other:
        run(go())
        assert answers(one, other).total() == 151
        assert one.counters.requests + other.counters.requests <= 151 + 8


@pytest.mark.parametrize("config", [{}, {"requests_per_minute": 600_000}], ids=["others wait", "there is a pace"])
def test_nobody_is_asked_twice_while_others_wait_or_requests_are_counted(
    tmp_path: Path, config: dict[str, int]
) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path, hedge=True, max_concurrency=1, **config) as asker:
            await asker.ask_all(150, at_once=8)
            hedged = asker.client.meter.hedged
            straggler = asyncio.create_task(asker.ask("straggler"))
            await until(lambda: one.counters.in_flight + other.counters.in_flight == 1)
            others = [asyncio.create_task(asker.ask(f"R{number}")) for number in range(60 if not config else 0)]
            await asyncio.gather(straggler, *others)
            assert asker.client.meter.hedged == hedged

    def slowly(call: Call) -> float:
        if call.prompt == "straggler":
            return 0.8  # beyond the 99th percentile, but not yet four times as much
        if call.prompt in ("Q50", "Q51", "Q52", "Q53"):
            return 0.4
        return quick(call) + (0.05 if call.prompt.startswith("R") else 0.0)

    with openai_server(latency=slowly) as one, openai_server(latency=slowly) as other:
        run(go())
        assert answers(one, other)["straggler"] == 1


def test_a_request_that_a_server_has_lost_is_asked_again_there_while_others_wait(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([server.url], tmp_path, hedge=None, max_concurrency=4, timeout=60) as asker:
            work = asyncio.create_task(asker.ask_all(400))
            assert complete(await work, 400)
            meter = asker.client.meter
            assert 1 <= meter.hedged <= 8
            assert meter.answers == 400 and await holds(asker.store, 400)
            assert meter.lost_tokens > 0 and meter.tokens > sum(
                answer.completion.usage.completion_tokens + answer.completion.usage.prompt_tokens
                for answer in await work
            ), "what was called off may have cost something"
            brought = sum(answer.completion.usage.completion_tokens for answer in await work)
            assert meter.completion_tokens == brought, "but it brought nothing"
            assert meter.reserved_tokens == meter.in_flight == 0

    with openai_server(latency=quick, faults={"Q200": hang()}) as server:
        run(go())
        assert answers(server)["Q200"] == 1


def test_when_the_run_ends_a_straggler_is_not_asked_again_and_still_comes_home(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([one.url, other.url], tmp_path, hedge=True) as asker:
            await asker.ask_all(150)
            straggler = asyncio.create_task(asker.ask("straggler"))
            await until(lambda: one.counters.in_flight + other.counters.in_flight == 1)
            hedged = asker.client.meter.hedged
            asker.brake.pull(EnvironmentFault("stop"))
            (answer,) = await straggler
            assert isinstance(answer, Answer)
            assert asker.client.meter.hedged == hedged

    def slowly(call: Call) -> float:
        return 1.0 if call.prompt == "straggler" else quick(call)

    with openai_server(latency=slowly) as one, openai_server(latency=slowly) as other:
        run(go())


def test_metrics_that_come_late_hold_up_no_answer(tmp_path: Path) -> None:
    answered = threading.Event()

    async def metrics(request: web.Request) -> web.Response:
        while server.counters.paths["/metrics"] > 1 and not answered.is_set():  # noqa: ASYNC110 - of another loop
            await asyncio.sleep(0.005)
        return web.Response(text="vllm:num_requests_running 8\nvllm:num_requests_waiting 80\n")

    async def go() -> None:
        async with asking([server.url], tmp_path, max_concurrency=None) as asker:
            endpoint = asker.client.router.endpoints[0]
            await asker.ask("Q0")
            await until(lambda: endpoint.limit.capacity == 10)
            endpoint.limit.capacity = 5
            while server.counters.paths["/metrics"] == 1:
                await asker.ask(f"Q{server.counters.answered}")
            answered.set()
            await until(lambda: endpoint.limit.capacity == 10)

    with openai_server(paths={"/metrics": metrics}) as server:
        run(go())


def test_a_second_request_goes_to_no_server_that_was_never_contacted(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([server.url, late.url], tmp_path, hedge=True, timeout=30) as asker:
            await asker.ask_all(110, 8)
            await late.start()
            cooling = asker.client.router.endpoints[1]
            await until(lambda: cooling.cooling_until < asyncio.get_running_loop().time())
            await asker.ask("straggler")
            assert answers(late.latest)["straggler"] == 1 and late.latest.counters.prompts[PROBE] > 0

    with openai_server(faults=straggles) as server, restartable() as late:
        run(go())


def test_a_server_that_tells_its_slots_is_not_sent_many_more_at_first(tmp_path: Path) -> None:
    async def go() -> None:
        async with asking([server.url], tmp_path, provider="openai", max_concurrency=None) as asker:
            assert complete(await asker.ask_all(20), 20)
            assert asker.client.endpoints[0].slots == 2

    with openai_server(latency=quick, slots=2, tells_slots=True) as server:
        run(go())
    assert server.counters.peak == 3, "one waits, lest a slot that comes free does"


def test_the_metrics_of_a_server_set_how_many_are_in_flight(tmp_path: Path) -> None:
    """See `test_limits` for what follows from them; here: they are asked for at each endpoint that has them."""

    async def go() -> None:
        async with asking([server.url], tmp_path, max_concurrency=None) as asker:
            await asker.ask_all(50)
            assert server.counters.paths["/metrics"] == 1, "it does not tell, so it is asked once"

    with openai_server(latency=quick) as server:
        run(go())
