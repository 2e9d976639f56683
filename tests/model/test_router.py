"""Which request gets which slot: order, balance, cancellation, endpoints that cool, and warm prefixes."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.prefix import NoBrake
from benchmarks.teacher import BLOCK, Options, serving
from fastdistill.control.store import ResponseStore
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Completion, Draw, Prompt
from fastdistill.model.client import ModelClient
from fastdistill.model.limits import Limit
from fastdistill.model.provider import Capabilities, Load, ModelConfig
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider
from fastdistill.model.router import LOOKAHEAD, PREFIX, Endpoint, Router

T = TypeVar("T")
LONG = PREFIX + 44  # characters of a beginning that requests share


class Nobody:
    """A provider that is never asked: the router only says who would be."""

    Config: ClassVar[type[ModelConfig]] = ModelConfig
    notes: tuple[str, ...] = ()

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        raise AssertionError

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        raise AssertionError

    async def load(self) -> Load | None:
        raise AssertionError

    async def aclose(self) -> None: ...


class Asker:
    """Requests of a router, each in a task that holds its slot until it is let go."""

    def __init__(self, *capacities: int) -> None:
        self.endpoints = [Endpoint(Nobody(), Limit(capacity)) for capacity in capacities]
        self.router = Router(self.endpoints)
        self.given: list[tuple[str, Endpoint]] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._let_go: dict[str, asyncio.Event] = {}

    async def ask(self, *texts: str) -> None:
        """Starts a request for each of the texts; returns once the router has seen them."""
        for text in texts:
            self._let_go[text] = asyncio.Event()
            self.tasks[text] = asyncio.create_task(self._hold(text))
        await settle()

    async def let_go(self, *texts: str) -> None:
        for text in texts:
            self._let_go[text].set()
        await settle()

    async def cancel(self, text: str) -> None:
        self.tasks[text].cancel()
        await settle()

    async def let_all_go(self) -> None:
        """Lets go whoever holds a slot, until nobody is left."""
        while unfinished := [text for text, task in self.tasks.items() if not task.done()]:
            await self.let_go(*(text for text in unfinished if text in self.holding))
            await asyncio.sleep(0.001)

    @property
    def holding(self) -> list[str]:
        return [text for text, _ in self.given if not self._let_go[text].is_set() and not self.tasks[text].done()]

    def endpoint(self, text: str) -> int:
        return next(self.endpoints.index(endpoint) for given, endpoint in self.given if given == text)

    @property
    def order(self) -> list[str]:
        return [text for text, _ in self.given]

    @property
    def in_flight(self) -> list[int]:
        return [endpoint.in_flight for endpoint in self.endpoints]

    async def _hold(self, text: str) -> None:
        async with self.router.slot(prompt(text)) as endpoint:
            self.given.append((text, endpoint))
            await self._let_go[text].wait()


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def prompt(text: str) -> Prompt:
    return Prompt("vllm", "teacher", ({"role": "user", "content": text},), {})


def begins(name: str, length: int = LONG) -> str:
    """A beginning of so many characters, which is its own for each name."""
    return (f"{name} " * length)[:length]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


def now() -> float:
    return asyncio.get_running_loop().time()


# --- order and balance ---


def test_the_first_to_ask_is_the_first_to_go() -> None:
    async def go() -> list[str]:
        asker = Asker(1)
        names = [f"Q{number}" for number in range(20)]
        await asker.ask(*names)
        await asker.let_all_go()
        assert asker.order == names
        return asker.order

    run(go())


def test_requests_lie_as_the_capacities_do() -> None:
    async def go() -> None:
        asker = Asker(4, 12)
        await asker.ask(*(f"Q{number}" for number in range(8)))
        assert asker.in_flight == [2, 6]
        await asker.ask(*(f"R{number}" for number in range(20)))
        assert asker.in_flight == [4, 12]
        await asker.let_all_go()

    run(go())


def test_the_endpoint_with_the_least_outstanding_work_is_next() -> None:
    async def go() -> None:
        asker = Asker(2, 2)
        await asker.ask("a", "b", "c", "d", "e")
        await asker.let_go(next(text for text in "abcd" if asker.endpoint(text) == 1))
        assert asker.endpoint("e") == 1
        await asker.let_all_go()

    run(go())


_steps = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "let go", "cancel", "both"]), st.integers(0, 99)), max_size=60
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), _steps, st.integers(0, 3))
def test_no_capacity_is_exceeded_no_slot_idles_and_none_leaks(
    capacities: list[int], steps: list[tuple[str, int]], prefixes: int
) -> None:
    async def go() -> None:
        asker = Asker(*capacities)
        for number, (step, pick) in enumerate(steps):
            unfinished = [text for text, task in asker.tasks.items() if not task.done()]
            if step == "ask" or not unfinished:
                await asker.ask(f"{begins(str(pick % prefixes)) if prefixes else ''}Q{number}")
            elif step == "cancel":
                await asker.cancel(unfinished[pick % len(unfinished)])
            elif asker.holding:
                if step == "both":  # in one turn of the loop: a slot comes free for one that was just cancelled
                    asker.tasks[unfinished[pick % len(unfinished)]].cancel()
                await asker.let_go(asker.holding[pick % len(asker.holding)])
            assert all(used <= capacity for used, capacity in zip(asker.in_flight, capacities, strict=True))
            waiting = len([task for task in asker.tasks.values() if not task.done()]) - sum(asker.in_flight)
            assert waiting == 0 or asker.in_flight == capacities
            assert asker.router.idle == (waiting == 0 and asker.in_flight != capacities)
        await asker.let_all_go()
        assert asker.in_flight == [0] * len(capacities)
        assert all(task.cancelled() or task.exception() is None for task in asker.tasks.values())

    run(go())


# --- cancellation ---


def test_who_is_cancelled_while_waiting_is_passed_over() -> None:
    async def go() -> None:
        asker = Asker(1)
        await asker.ask("a", "b", "c")
        await asker.cancel("b")
        await asker.let_go("a")
        assert asker.order == ["a", "c"]
        await asker.let_all_go()
        assert asker.in_flight == [0]

    run(go())


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_slot_that_comes_to_one_who_is_cancelled_in_the_same_moment_goes_to_the_next(cancelled_first: bool) -> None:
    async def go() -> None:
        asker = Asker(1)
        await asker.ask("a", "b", "c")
        if cancelled_first:
            asker.tasks["b"].cancel()
            asker.tasks["a"].cancel()
        else:
            asker.tasks["a"].cancel()
            await asyncio.sleep(0)  # the slot is given to b, which has not run since
            asker.tasks["b"].cancel()
        await settle()
        assert asker.order == ["a", "c"]
        await asker.let_all_go()
        assert asker.in_flight == [0]

    run(go())


# --- endpoints that cool ---


def test_an_endpoint_that_cools_is_passed_over_and_tried_again_with_one_request() -> None:
    async def go() -> None:
        asker = Asker(4, 4)
        asker.endpoints[0].cool(now(), now(), 0.05)
        await asker.ask(*(f"Q{number}" for number in range(6)))
        assert asker.in_flight == [0, 4]
        await asyncio.sleep(0.08)
        assert asker.in_flight == [1, 4], "it has yet to show that it works"
        asker.endpoints[0].answered()
        await asker.ask("R")
        assert asker.in_flight == [3, 4]
        await asker.let_all_go()

    run(go())


def test_while_all_cool_requests_wait_for_the_first_that_does_not() -> None:
    async def go() -> None:
        asker = Asker(2, 2)
        asker.endpoints[0].cool(now(), now(), 30)
        await asker.ask("a", "b")
        assert asker.in_flight == [0, 2]
        asker.endpoints[1].cool(now(), now(), 0.05)  # it is full, so only the far end of the other's cooling is known
        await asker.ask("c")
        await asker.let_go("a", "b")
        assert asker.in_flight == [0, 0]
        await asyncio.sleep(0.08)
        assert asker.in_flight == [0, 1]
        await asker.let_all_go()

    run(go())


def test_one_failure_among_answers_cools_nothing_and_two_in_a_row_do() -> None:
    endpoint = Endpoint(Nobody(), Limit(4))
    for at in range(10):
        endpoint.broke(at, at)
        endpoint.answered()
    assert endpoint.cooling_until == 0
    endpoint.broke(10, 11)
    endpoint.broke(10, 11)
    assert endpoint.cooling_until == 12


def test_all_that_was_under_way_when_an_endpoint_died_counts_as_one_failure() -> None:
    endpoint = Endpoint(Nobody(), Limit(64))
    for _ in range(64):
        endpoint.broke(0.5, 1.0)
    assert endpoint.cooling_until == 2.0
    endpoint.cool(2.0, 2.0)
    assert endpoint.cooling_until == 4.0, "longer, as it fails again"
    endpoint.answered()
    endpoint.cool(5.0, 5.0)
    assert endpoint.cooling_until == 6.0


def test_a_second_request_goes_elsewhere_if_it_can_and_never_before_those_who_wait() -> None:
    async def go() -> None:
        asker = Asker(8, 2)
        first, other = asker.endpoints
        await asker.ask(*(f"Q{number}" for number in range(5)))  # the first has the lower load
        async with asker.router.slot(prompt("again"), besides=first) as second:
            assert second is other
        await asker.ask(*(f"R{number}" for number in range(4)))
        async with asker.router.slot(prompt("again"), besides=first):
            assert asker.in_flight == [8, 2], "the last one that is free"
        await asker.ask(*(f"S{number}" for number in range(2)))
        waiting = asyncio.ensure_future(asker.router.slot(prompt("again"), besides=first).__aenter__())
        await settle()
        assert not waiting.done() and asker.in_flight == [8, 2]
        waiting.cancel()
        await settle()
        await asker.let_all_go()
        other.cool(now(), now(), 30)
        async with asker.router.slot(prompt("again"), besides=first) as second:
            assert second is first
        assert asker.in_flight == [0, 0]

    run(go())


# --- prefixes ---


def test_requests_that_begin_alike_go_to_the_endpoint_that_knows_the_beginning() -> None:
    async def go() -> None:
        asker = Asker(2, 2)
        names = [f"{begins(f'schema {at % 4}')} {at}" for at in range(200)]
        Random(0).shuffle(names)
        await asker.ask(*names)
        await asker.let_all_go()
        homes: dict[str, Counter[int]] = {}
        for text in names:
            homes.setdefault(text[:LONG], Counter())[asker.endpoint(text)] += 1
        at_home = sum(max(counts.values()) for counts in homes.values())
        assert at_home > 0.85 * len(names), "by chance it would be about half"
        assert sum(counts[0] for counts in homes.values()) in range(60, 141), "and both have work"

    run(go())


def test_the_first_of_a_beginning_leads_and_the_others_let_one_pass() -> None:
    async def go() -> None:
        asker = Asker(2)
        a, b = begins("a"), begins("b")
        await asker.ask(f"{a}1", f"{a}2", f"{a}3", f"{b}1")
        # All slots were given as they were asked for; from now on there is a choice.
        assert asker.order == [f"{a}1", f"{a}2"]
        await asker.let_all_go()
        asker = Asker(2)
        await asker.ask("x", "y", f"{a}1", f"{a}2", f"{a}3", f"{b}1")
        await asker.let_go("x", "y")
        assert asker.order[2:] == [f"{a}1", f"{b}1"]
        await asker.let_go(f"{a}1")
        assert asker.order[4:] == [f"{a}2"]
        await asker.let_all_go()

    run(go())


def test_followers_never_leave_a_slot_idle() -> None:
    async def go() -> None:
        asker = Asker(8)
        await asker.ask(*(f"{begins('a')}{number}" for number in range(8)))
        assert asker.in_flight == [8]
        await asker.let_all_go()

    run(go())


def test_nobody_starves_behind_warm_beginnings() -> None:
    async def go() -> None:
        asker = Asker(1)
        warm = begins("warm")
        await asker.ask(f"{warm}0")
        await asker.ask(begins("cold") + "!", *(f"{warm}{number}" for number in range(1, 4 * LOOKAHEAD)))
        await asker.let_all_go()
        passed = asker.order.index(begins("cold") + "!")
        assert 1 < passed <= LOOKAHEAD + 1

    run(go())


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=150), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_however_beginnings_are_mixed_everybody_gets_one_slot(schemas: list[int], capacities: list[int]) -> None:
    async def go() -> None:
        asker = Asker(*capacities)
        names = [f"{begins(f'schema {schema}')} {at}" for at, schema in enumerate(schemas)]
        await asker.ask(*names)
        await asker.let_all_go()
        assert sorted(asker.order) == sorted(names)
        for at, text in enumerate(names):
            assert asker.order.index(text) <= (at + 1) * (LOOKAHEAD + 1)
        assert asker.in_flight == [0] * len(capacities)

    run(go())


# --- the prefix caches of two servers ---

SCHEMAS, QUESTIONS, SLOTS = 24, 25, 4
CACHE = 6 * 1500 // 4  # tokens: a server can keep the beginnings of some six schemas


def schema_prompts() -> list[str]:
    texts = [
        f"{begins(f'schema {schema}', 1400)} question {question:04}" + "?" * 100
        for schema in range(SCHEMAS)
        for question in range(QUESTIONS)
    ]
    Random(1).shuffle(texts)
    return texts


def cached_by_turns(texts: Sequence[str], servers: int) -> float:
    """The share of blocks found in the servers' prefix caches if the requests go to them by turns."""
    caches = [OrderedDict[str, None]() for _ in range(servers)]
    hits = total = 0
    for number, text in enumerate(texts):
        cache, hitting = caches[number % servers], True
        for at in range(BLOCK, len(text) + 1, BLOCK):
            total += 1
            hitting = hitting and text[:at] in cache
            hits += hitting
            cache[text[:at]] = None
            cache.move_to_end(text[:at])
        while len(cache) * BLOCK // 4 > CACHE:
            cache.popitem(last=False)
    return hits / total


# The simulated teacher's process is given its pipes' ends back when they are collected.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_two_servers_find_more_in_their_prefix_caches_than_by_turns(tmp_path: Path) -> None:
    texts = schema_prompts()

    async def go(urls: list[str]) -> None:
        config = OpenAIConfig.model_validate(
            {"provider": "vllm", "model": "teacher", "base_url": urls, "max_concurrency": SLOTS, "hedge": False}
        )
        providers = [OpenAIProvider(endpoint) for endpoint in config.endpoints()]  # type: ignore[arg-type]
        async with ResponseStore(tmp_path / "responses.sqlite") as store:
            client = ModelClient("teacher", config, providers, store, NoBrake())
            waiting = iter(texts)

            async def work() -> None:
                for text in waiting:
                    asked = client.prompt([{"role": "user", "content": text}], DecodeProfile(), {})
                    await client.generate(asked, [Draw(0, 0)])

            try:
                await asyncio.gather(*(work() for _ in range(64)))
            finally:
                await client.aclose()

    options = Options(slots=SLOTS, median=0.004, cache_tokens=CACHE)
    with serving(options) as one, serving(options) as other:
        asyncio.run(asyncio.wait_for(go([one.url, other.url]), 60))
        stats = [one.stats(), other.stats()]
    assert sum(each["answered"] for each in stats) == len(texts)
    assert min(each["answered"] for each in stats) > len(texts) / 4, "both have work"
    share = sum(each["cached_tokens"] for each in stats) / sum(each["prompt_tokens"] for each in stats)
    assert share / cached_by_turns(texts, 2) > 1.5
