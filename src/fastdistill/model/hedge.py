"""Asks a straggler a second time: the first answer wins, the other request is called off. Knows no model."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastdistill.core.errors import NotAsked
from fastdistill.model.provider import ProviderError

T = TypeVar("T")


async def first_of(
    first: Awaitable[T], again: Callable[[], Coroutine[Any, Any, T]], due: Callable[[float], float]
) -> T:
    """What `first` brings, or `again()` if that is started and is faster.

    The first runs in the task of the caller, so that a request which does not straggle costs one timer and no task.

    Args:
        due: asked with the seconds that the first has taken; seconds until to ask it again, or 0 to start the second.

    Raises:
        ProviderError: the first failed, and so did the second if there was one.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    begun, cancelling = loop.time(), task.cancelling()
    timer: asyncio.TimerHandle
    second: asyncio.Task[T] | None = None
    racing, overtaken = True, False

    def look() -> None:
        nonlocal timer, second
        if wait := due(loop.time() - begun):
            timer = loop.call_later(wait, look)
        else:
            second = loop.create_task(again())
            second.add_done_callback(ended)

    def ended(second: asyncio.Task[T]) -> None:
        nonlocal overtaken
        if racing and not second.cancelled() and second.exception() is None:
            overtaken = True
            task.cancel()  # as `asyncio.timeout` does: the caller waits for the first

    timer = loop.call_later(due(0.0), look)
    try:
        return await first
    except asyncio.CancelledError:
        if second is None or not overtaken or task.uncancel() > cancelling:
            raise
        return second.result()
    except ProviderError as error:
        racing = False
        timer.cancel()
        if second is None:
            raise
        try:
            return await second
        except (ProviderError, NotAsked):
            raise error from None
    finally:
        racing = False
        timer.cancel()
        if second is not None:
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
