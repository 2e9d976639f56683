"""The perturbed copies of a run's databases: made once each, by a process that runs no query of a model."""

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from fastdistill.data.execution.worker_pool import interpreter_environment


class CopyError(Exception):
    """A database can't be copied; the message names it and says why."""


class PerturbedCopies:
    """An async context manager over a temporary folder with `number` copies of each database that is asked for."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._made: dict[str, asyncio.Task[list[str]]] = {}
        self._turn = asyncio.Semaphore(1)  # the cores are for the workers

    async def __aenter__(self) -> Self:
        self._folder = TemporaryDirectory(prefix="fastdistill-")
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._made.values():
            task.cancel()
        await asyncio.gather(*self._made.values(), return_exceptions=True)
        self._folder.cleanup()

    async def of(self, path: str, sha256: str) -> list[str]:
        """The copies of the database at `path`, by their seeds 0, 1, 2 ...; one content is copied once.

        Raises:
            CopyError: it can't be copied.
        """
        task = self._made.get(sha256)
        if task is None:
            task = self._made[sha256] = asyncio.create_task(self._make(path, len(self._made)))
        return await asyncio.shield(task)  # it is not for the one who was the first to ask

    async def _make(self, path: str, number: int) -> list[str]:
        copies = [str(Path(self._folder.name, f"{number}-{seed}.sqlite")) for seed in range(self._number)]
        async with self._turn:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "fastdistill.data.execution.sqlite_perturb", path, *copies),
                stdin=DEVNULL,
                stderr=PIPE,
                env=interpreter_environment(),
                start_new_session=True,
            )
            try:
                _, said = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode:
            raise CopyError(f"database {path}: no perturbed copy: {said.decode(errors='replace').strip()[-500:]}")
        return copies
