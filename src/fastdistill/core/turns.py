"""Turns of the event loop: work that never waits gives them up, so that answers are taken in meanwhile."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TypeVar

LARGE = 2**17
"""Bytes, or characters: what is larger is worked on `beside` the loop, for it may take longer than a turn."""

T = TypeVar("T")

_TURN = 0.005  # seconds
_thread = ThreadPoolExecutor(1, "beside")  # of several, each would make the loop wait for the interpreter's lock

_begun = 0.0


async def give_turn() -> None:
    """Between two pieces of work: lets others have their turn once this one has taken 5 ms."""
    global _begun
    if perf_counter() - _begun > _TURN:
        await asyncio.sleep(0)
        _begun = perf_counter()


def beside(work: Callable[[], T]) -> asyncio.Future[T]:
    """What `work` will have brought: for what takes longer than a turn and can't be cut. One is done at a time."""
    return asyncio.get_running_loop().run_in_executor(_thread, work)


class Queue:
    """At most so many go on in each round of the loop, the others in their order: what comes in is taken in before."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        if self._left == self._most:
            asyncio.get_running_loop().call_soon(self._next_round)
        if self._left:
            self._left -= 1
        else:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting

    def _next_round(self) -> None:
        self._left = self._most
        while self._left and self._waiting:
            if not (waiting := self._waiting.popleft()).done():  # else it was cancelled
                waiting.set_result(None)
                self._left -= 1
        if self._left < self._most:
            asyncio.get_running_loop().call_soon(self._next_round)
