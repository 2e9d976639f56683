import asyncio
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import perf_counter

from fastdistill.data.execution.patterns import PatternPool

FAST = (re.compile("x"), False)
SLOW = (re.compile(r"(b+)+$"), False)  # takes twice as long for each further b


def searched_here(pool: PatternPool, text: str) -> bool:
    """Whether a search is done before anything else can go on."""
    search = pool.first_broken(text)
    try:
        search.send(None)
    except StopIteration:
        return True
    search.close()
    return False


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Threads that use the CPU without Python's lock, as one does that writes to a database."""
    done, data = Event(), bytes(10_000_000)

    def work() -> None:
        while not done.is_set():
            hashlib.sha256(data)

    threads = [Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_the_time_of_other_threads_is_not_the_searchs() -> None:
    async def search() -> int:
        beside = 0
        async with PatternPool([FAST]) as pool:
            with busy_threads(3):
                end = perf_counter() + 4
                while perf_counter() < end:
                    beside += not searched_here(pool, "c" * 20_000)
        return beside

    assert asyncio.run(search()) == 0


def test_after_a_slow_search_others_are_done_here_again_though_some_wait_for_a_worker() -> None:
    async def search() -> None:
        async with PatternPool([SLOW]) as pool:
            slow = asyncio.create_task(pool.first_broken("b" * 23 + "c"))
            await asyncio.sleep(0)
            assert not searched_here(pool, "c")
            slower = asyncio.create_task(pool.first_broken("b" * 26 + "c"))
            await slow
            assert not slower.done()
            assert searched_here(pool, "c")
            slower.cancel()

    asyncio.run(search())
