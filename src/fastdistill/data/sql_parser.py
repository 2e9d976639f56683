"""Parses SQL beside the event loop: it takes a quarter of a second to import, and milliseconds for a long text."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from fastdistill.core.turns import beside

_LONG = 1000  # characters

_imported = False

T = TypeVar("T")


@asynccontextmanager
async def parser() -> AsyncIterator[None]:
    """Has it imported, at the same time as the first answers are asked for."""
    importing = beside(_import)
    try:
        yield
    finally:
        await importing


async def parsed(work: Callable[[str], T], text: str) -> T:
    """What `work`, which uses the parser, makes of a text."""
    if _imported and len(text) <= _LONG:
        return work(text)
    return await beside(partial(work, text))


def _import() -> None:
    global _imported
    import sqlglot

    assert sqlglot
    _imported = True
