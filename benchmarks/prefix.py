"""What prefix-cache affinity brings: two servers with a prefix cache each, and requests that share 24 long beginnings.

By turns: every second request to the second server, in the order of the records. Both through the same provider.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.process import save, table
from benchmarks.teacher import MODEL, Options, Served, serving
from fastdistill.control.store import ResponseStore
from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Draw
from fastdistill.model.client import ModelClient
from fastdistill.model.providers.openai import OpenAIConfig, OpenAIProvider

SCHEMAS, LENGTH = 24, 1400  # beginnings, and the characters of each
SLOTS, OPEN = 8, 64
OPTIONS = Options(slots=SLOTS, median=0.05, sigma=0.6, prefill=0.0005, cache_tokens=6 * LENGTH // 4)


def prompts(count: int) -> list[str]:
    texts = [f"{f'schema {at % SCHEMAS} ' * LENGTH}"[:LENGTH] + f" question {at:06}" for at in range(count)]
    Random(1).shuffle(texts)
    return texts


async def routed(client: ModelClient, text: str) -> None:
    prompt = client.prompt([{"role": "user", "content": text}], DecodeProfile(), {})
    await client.generate(prompt, [Draw(0, 0)])


class NoBrake:
    def check(self, tokens: int, dollars: float) -> bool:
        return False

    async def pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), seconds)

    def turn(self) -> None:
        return None

    def asks(self) -> None:
        pass


async def run(texts: list[str], servers: list[Served], *, turns: bool, folder: Path) -> float:
    """Seconds for all prompts."""
    config = OpenAIConfig.model_validate(
        {"provider": "vllm", "model": MODEL, "base_url": [server.url for server in servers], "max_concurrency": SLOTS}
    )
    providers = [OpenAIProvider(endpoint) for endpoint in config.endpoints()]  # type: ignore[arg-type]
    limits = [asyncio.Semaphore(SLOTS) for _ in providers]
    async with ResponseStore(folder / f"responses {turns}.sqlite") as store:
        client = ModelClient("teacher", config, providers, store, NoBrake())
        await client.ready()
        by_turns = cycle(zip(providers, limits, strict=True))

        async def turn(text: str) -> None:
            provider, limit = next(by_turns)
            async with limit:
                prompt = client.prompt([{"role": "user", "content": text}], DecodeProfile(), {})
                await provider.complete(prompt, seed=0, n=1)

        ask: Callable[[str], Coroutine[Any, Any, None]] = turn if turns else lambda text: routed(client, text)
        waiting = iter(texts)

        async def work() -> None:
            for text in waiting:
                await ask(text)

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(OPEN)))
        seconds = time.perf_counter() - begun
        await client.aclose()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_200)
    texts = prompts(parser.parse_args().count)
    lines = []
    with tempfile.TemporaryDirectory(prefix="fastdistill-bench-") as folder:
        for name, turns in (("by turns", True), ("FastDistill", False)):
            with serving(OPTIONS) as one, serving(OPTIONS) as other:
                seconds = asyncio.run(run(texts, [one, other], turns=turns, folder=Path(folder)))
                stats = [one.stats(), other.stats()]
            cached, asked = (sum(each[f"{kind}_tokens"] for each in stats) for kind in ("cached", "prompt"))
            lines.append(
                {"requests go": name, "wall s": seconds, "req/s": len(texts) / seconds, "cached": cached / asked}
            )
    print(table(lines, {"requests go": "", "wall s": ".1f", "req/s": ".1f", "cached": ".3f"}))
    print(f"-> {save('prefix', lines)}")


if __name__ == "__main__":
    main()
