"""Turns of the event loop: work that never waits gives them up, so that answers are taken in meanwhile."""

import asyncio
from collections import deque
from time import perf_counter

_TURN = 0.005  # seconds

_begun = 0.0


async def give_turn() -> None:
    """Between two pieces of work: lets others have their turn once this one has taken 5 ms."""
    global _begun
    if perf_counter() - _begun > _TURN:
        await asyncio.sleep(0)
        _begun = perf_counter()


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
