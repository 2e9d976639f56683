"""The race of a straggler with its second request: who wins, who is called off, and what a cancellation does."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from fastdistill.core.errors import NotAsked
from fastdistill.model.hedge import Hedge
from fastdistill.model.provider import ErrorKind, ProviderError


class Race:
    """Requests whose ends are told; the second is asked at once."""

    def __init__(self) -> None:
        self.called_off: list[str] = []
        self.ends = {name: asyncio.get_running_loop().create_future() for name in ("first", "second")}
        hedge = Hedge[str](lambda waited: 0.0)
        self.sent = True
        again, sent = (lambda: self._ask("second")), (lambda: self.sent)
        self.task = asyncio.ensure_future(hedge.first_of(self._ask("first"), again, sent))

    async def _ask(self, name: str) -> str:
        try:
            return str(await self.ends[name])
        except asyncio.CancelledError:
            self.called_off.append(name)
            raise

    async def end(self, name: str, end: str | Exception) -> None:
        if isinstance(end, Exception):
            self.ends[name].set_exception(end)
        else:
            self.ends[name].set_result(end)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.001)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 10))


@pytest.mark.parametrize(("winner", "loser"), [("first", "second"), ("second", "first")])
def test_the_first_answer_wins_and_the_other_request_is_called_off(winner: str, loser: str) -> None:
    async def go() -> None:
        race = Race()
        await settle()
        await race.end(winner, "answer")
        assert await race.task == "answer"
        assert race.called_off == [loser]
        assert race.task.cancelling() == 0

    run(go)


def test_a_failure_does_not_wait_for_a_second_request_that_is_in_line_for_its_slot() -> None:
    async def go() -> None:
        race = Race()
        race.sent = False
        await settle()
        await race.end("first", ProviderError(ErrorKind.RESET, "broken"))
        with pytest.raises(ProviderError, match="broken"):
            await race.task
        assert race.called_off == ["second"]

    run(go)


def test_who_does_not_straggle_is_asked_once() -> None:
    async def go() -> None:
        asked = []

        async def again() -> str:
            asked.append(True)
            return "second"

        assert await Hedge[str](lambda waited: 5.0).first_of(asyncio.sleep(0, "first"), again, bool) == "first"
        assert asked == []

    run(go)


def test_stragglers_are_asked_again_one_after_the_other_the_oldest_first() -> None:
    async def go() -> None:
        asked: list[str] = []
        two = asyncio.Event()

        async def again(name: str) -> str:
            asked.append(name)
            if len(asked) == 2:
                two.set()
            return name

        free = 2
        hedge = Hedge[str](lambda waited: 0.0 if waited >= 0.02 and len(asked) < free else 0.01)
        races = []
        for name in "abc":
            races.append(asyncio.create_task(hedge.first_of(asyncio.sleep(9, "late"), partial(again, name), bool)))
            await asyncio.sleep(0.002)
        await two.wait()
        await asyncio.sleep(0.05)
        assert asked == ["a", "b"]
        free = 3
        assert await asyncio.gather(*races) == ["a", "b", "c"]

    run(go)


@pytest.mark.parametrize("failure", [ProviderError(ErrorKind.RESET, "second"), NotAsked("not_asked", "the run ends")])
def test_of_two_that_fail_the_first_is_told_and_one_that_fails_leaves_the_other_alone(failure: Exception) -> None:
    async def go() -> None:
        race = Race()
        await settle()
        await race.end("second", failure)
        assert not race.task.done()
        await race.end("first", ProviderError(ErrorKind.TIMEOUT, "first"))
        with pytest.raises(ProviderError, match="first"):
            await race.task

        race = Race()
        await settle()
        await race.end("first", ProviderError(ErrorKind.TIMEOUT, "first"))
        assert not race.task.done()
        await race.end("second", "answer")
        assert await race.task == "answer"

    run(go)


@pytest.mark.parametrize("answered", [False, True], ids=["under way", "in the moment of the second answer"])
def test_who_is_cancelled_from_outside_is_cancelled_with_both(answered: bool) -> None:
    async def go() -> None:
        race = Race()
        await settle()
        race.task.cancel()
        if answered:
            race.ends["second"].set_result("answer")
        with pytest.raises(asyncio.CancelledError):
            await race.task
        assert "first" in race.called_off
        assert all(end.done() for end in race.ends.values())

    run(go)
