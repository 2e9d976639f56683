"""Brings the answers of several machines together: where all answers are stored, a run asks nothing."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from fastdistill.control.folder import RunFolder, artifacts_root
from fastdistill.control.store import ResponseStore
from fastdistill.core.errors import InputError
from fastdistill.core.files import atomic


def merge(roots: Sequence[Path], output_dir: Path | None) -> None:
    """Copies the answers in the stores of some artifacts roots into the store of another, and says how many.

    Raises:
        InputError: a root has no store, or is the one to be written.
        EnvironmentFault: a store can't be read or written. Those before it are merged.
    """
    stores = [RunFolder(root.expanduser(), "").responses for root in roots]
    into = RunFolder(artifacts_root(output_dir), "").responses
    for store in stores:
        if not store.exists():
            raise InputError(f"{store}: there is no such store; give the --output-dir of a run on another machine")
        if into.exists() and store.samefile(into):
            raise InputError(f"{store}: this is the store to be written; choose another --output-dir")
    into.parent.mkdir(parents=True, exist_ok=True)
    asyncio.run(_merge(stores, into))
    print(f"merged into {into}")


async def _merge(stores: Sequence[Path], into: Path) -> None:
    async with ResponseStore(into) as whole:
        for store in stores:
            async with ResponseStore(store):
                pass  # what a killed run has left in its journals is in its store now
            new, known = await whole.take_in(store)
            print(f"{store}: {new:,} new answers, {known:,} known ones")
            for record in store.parent.glob("batches/*.json"):  # what a run may ask for may be at the server already
                if not (copy := into.parent / "batches" / record.name).exists():
                    with atomic(copy, "wb") as file:
                        file.write(record.read_bytes())
