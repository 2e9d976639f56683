"""Asks a straggler a second time: the first answer wins, the other request is called off. Knows no model."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastdistill.core.errors import NotAsked
from fastdistill.model.provider import ProviderError

T = TypeVar("T")


class Hedge(Generic[T]):
    """Those requests under way that may be asked again. One timer looks after the oldest: the others are due later."""

    def __init__(self, due: Callable[[float], float]) -> None:
        """`due` gives, for the seconds that a request has taken, those until it is asked again, or 0: now.

        The longer a request has taken, the sooner it is due.
        """
        self._due = due
        self._alone: dict[_Race[T], None] = {}  # the oldest first
        self._looks = False

    async def first_of(
        self, first: Awaitable[T], again: Callable[[], Coroutine[Any, Any, T]], sent: Callable[[], bool]
    ) -> T:
        """What `first` brings, or `again()` if that is started and is faster. `sent` says whether it is out of line.

        The first runs in the task of the caller, so that a request which does not straggle costs no task.

        Raises:
            ProviderError: the first failed, and so did the second if there was one.
        """
        task = asyncio.current_task()
        assert task is not None
        race = _Race(task, again, asyncio.get_running_loop().time(), task.cancelling())
        self._alone[race] = None
        if not self._looks:
            self._look()
        try:
            return await first
        except asyncio.CancelledError:
            if race.second is None or not race.overtaken or task.uncancel() > race.cancelling:
                raise
            return race.second.result()
        except ProviderError as error:
            race.over = True
            if race.second is None or not sent():  # it may wait for the very slot that this one holds
                raise
            try:
                return await race.second
            except (ProviderError, NotAsked):
                raise error from None
        finally:
            self._alone.pop(race, None)
            race.over = True
            if race.second is not None:
                race.second.cancel()
                await asyncio.gather(race.second, return_exceptions=True)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        oldest = next(iter(self._alone), None)
        self._looks = oldest is not None
        if oldest is None:
            return
        if wait := self._due(loop.time() - oldest.begun):
            loop.call_later(wait, self._look)
        else:
            del self._alone[oldest]
            oldest.start()
            loop.call_soon(self._look)  # once this one is in line


@dataclass(slots=True, eq=False)
class _Race(Generic[T]):
    """A request in the task of who waits for it, and from `start` on a second one for the same."""

    task: asyncio.Task[Any]
    again: Callable[[], Coroutine[Any, Any, T]]
    begun: float
    cancelling: int  # how often the task was to be cancelled before
    second: asyncio.Task[T] | None = None
    over: bool = False
    overtaken: bool = False

    def start(self) -> None:
        self.second = asyncio.create_task(self.again())
        self.second.add_done_callback(self._ended)

    def _ended(self, second: asyncio.Task[T]) -> None:
        if not self.over and not second.cancelled() and second.exception() is None:
            self.overtaken = True
            self.task.cancel()  # as `asyncio.timeout` does: the caller waits for the first
