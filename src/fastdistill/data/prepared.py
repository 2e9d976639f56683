"""What the commands that prepare data sets share: where the sets are kept, and a seeded draw. Never asks a model."""

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fastdistill.core.files import atomic


class Drawn(msgspec.Struct, frozen=True):
    """A data set as written: so many records in `train.jsonl` and `eval.jsonl` of `folder`."""

    folder: Path
    train: int
    eval: int

    def __str__(self) -> str:
        return f"train: {self.train:,} records\neval: {self.eval:,} records\nwritten to {self.folder}"


def cache_folder() -> Path:
    """Where data sets are kept: `FASTDISTILL_CACHE_DIR`, or ~/.cache/fastdistill."""
    return Path(os.environ.get("FASTDISTILL_CACHE_DIR") or "~/.cache/fastdistill").expanduser()


def draw(
    name: str,
    records: Sequence[Mapping[str, Any]],
    samples: int,
    seed: int,
    output: Path | None = None,
    held_out: Sequence[Mapping[str, Any]] | None = None,
) -> Drawn:
    """Writes `samples` of the records for training, and a fifth as many of `held_out` to evaluate.

    Without `held_out`, one record of six is set apart. The same arguments give the same bytes; with the same seed a
    smaller draw begins a larger one, and no record that one draw evaluates with is one that another trains on.

    Raises:
        EnvironmentFault: the files can't be written.
    """
    train = random.Random(f"{name} {seed}").sample(records, len(records))
    if held_out is None:
        held_out, train = train[: len(train) // 6], train[len(train) // 6 :]
    else:
        held_out = random.Random(f"{name} eval {seed}").sample(held_out, len(held_out))
    train, held_out = train[:samples], held_out[: max(1, samples // 5)]
    folder = output or cache_folder() / "datasets" / name
    for split, lines in (("train", train), ("eval", held_out)):
        with atomic(folder / f"{split}.jsonl", "wb") as file:
            file.writelines(msgspec.json.encode(line) + b"\n" for line in lines)
    return Drawn(folder, len(train), len(held_out))
