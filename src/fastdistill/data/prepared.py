"""What the commands that prepare data sets share: where the sets are kept, and a seeded draw. Never asks a model."""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fastdistill.core.files import atomic


@dataclass(frozen=True, slots=True)
class Drawn:
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
    name: str, records: Sequence[Mapping[str, Any]], samples: int, seed: int, output: Path | None, share: int = 6
) -> Drawn:
    """Writes `samples` of the records for training, and a fifth as many, from one in `share` set apart, to evaluate.

    The same arguments give the same bytes; with the same seed a smaller draw begins a larger one, and no record that
    one draw evaluates with is one that another trains on.

    Raises:
        EnvironmentFault: the files can't be written.
    """
    shuffled = random.Random(f"{name} {seed}").sample(records, len(records))
    apart = len(records) // share
    folder = output or cache_folder() / "datasets" / name
    train, held_out = shuffled[apart:][:samples], shuffled[:apart][: max(1, samples // 5)]
    for split, lines in (("train", train), ("eval", held_out)):
        with atomic(folder / f"{split}.jsonl", "wb") as file:
            file.writelines(msgspec.json.encode(line) + b"\n" for line in lines)
    return Drawn(folder, len(train), len(held_out))
