"""CPU of a request for each layer of the client, beside a bare aiohttp loop, in one run: ratios, not times.

The teacher answers at once, from a process of its own. The clients take turns, several times over; of each the least
is shown, for whatever else the machine does only adds to it. `provider` is `OpenAIProvider.complete`: the request's
JSON, the transport, the answer's completion.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import aiohttp
import msgspec
import uvloop

from benchmarks.process import save, table
from benchmarks.teacher import MODEL, Options, serving
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Prompt
from fastdistill.model.http1 import Http1Transport
from fastdistill.model.https import AiohttpTransport
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider
from fastdistill.model.transport import Transport

Ask = Callable[[], Awaitable[object]]

_MESSAGES = ({"role": "system", "content": "Return SQL only."}, {"role": "user", "content": "Name three. " * 80})
_PARAMETERS = DecodeProfile(temperature=0.7, max_tokens=128).parameters()
_BODY = msgspec.json.encode({"model": MODEL, "messages": _MESSAGES, "temperature": 0.7, "max_tokens": 128, "seed": 1})
_HEADERS = {"Content-Type": "application/json"}
_TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "http1": partial(Http1Transport, max_body=2**26, keep=4),
    "aiohttp": partial(AiohttpTransport, max_body=2**26, keep=4),
}


async def clients(url: str, stack: AsyncExitStack) -> dict[str, Ask]:
    """One request by each client."""
    connector = aiohttp.TCPConnector(limit=0)
    session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
    chat = f"{url}/v1/chat/completions"
    decode = msgspec.json.Decoder().decode

    async def bare() -> object:
        async with session.post(chat, data=_BODY, headers=_HEADERS) as response:
            return decode(await response.read())

    asks: dict[str, Ask] = {"bare aiohttp": bare}
    for name, make in _TRANSPORTS.items():
        transport = make()
        stack.push_async_callback(transport.aclose)

        async def plain(transport: Transport = transport) -> object:
            return await transport.request("POST", chat, headers=_HEADERS, body=_BODY, timeout=600)

        config = OpenAIConfig(model=MODEL, base_url=url)
        provider = await stack.enter_async_context(OpenAIProvider(config, make()))

        async def whole(provider: OpenAIProvider = provider) -> object:
            return await provider.complete(Prompt("openai", MODEL, _MESSAGES, _PARAMETERS), seed=1, n=1)

        asks |= {f"{name} transport": plain, f"provider over {name}": whole}
    return asks


async def spent(ask: Ask, requests: int, in_flight: int) -> float:
    """Microseconds of CPU a request."""
    left = iter(range(requests))

    async def work(left: Iterator[int]) -> None:
        for _ in left:
            await ask()

    begun = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(work(left))
    return (time.process_time() - begun) / requests * 1e6


async def compare(url: str, requests: int, in_flight: int, rounds: int) -> list[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        asks = await clients(url, stack)
        for ask in asks.values():
            await spent(ask, 4 * in_flight, in_flight)  # opens its connections
        figures: dict[str, list[float]] = {name: [] for name in asks}
        for _ in range(rounds):
            for name, ask in asks.items():
                figures[name].append(await spent(ask, requests // rounds, in_flight))
    bare = min(figures["bare aiohttp"])
    return [
        {"client": name, "CPU us": min(each), "of the bare loop": min(each) / bare} for name, each in figures.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    lines = []
    for loop, run in (("uvloop", uvloop.run), ("asyncio", asyncio.run)):
        with serving(Options(slots=arguments.in_flight, median=0.0)) as teacher:
            found = run(compare(teacher.url, arguments.requests, arguments.in_flight, arguments.rounds))
        lines += [{"loop": loop, **line} for line in found]
    print(table(lines, {"loop": "", "client": "", "CPU us": ".0f", "of the bare loop": ".2f"}))
    print(save("transport", lines))


if __name__ == "__main__":
    main()
