"""Writes a model's folder as `fastdistill.model.embedded` reads it. Knows nothing of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastdistill.model.embedded.bpe import Tokenizer
from fastdistill.model.embedded.network import Architecture, Array


def save_weights(
    folder: Path,
    architecture: Architecture,
    tokenizer: Tokenizer,
    tensors: Mapping[str, Array],
    training: Mapping[str, Any],
) -> None:
    """Write a model's folder: the tensors rounded to float16, and all else as JSON. `training` is free-form facts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "weights.npz"
    half: dict[str, Any] = {name: tensor.astype(np.float16) for name, tensor in sorted(tensors.items())}
    np.savez(path, **half)
    card = {
        "architecture": asdict(architecture),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "training": dict(training),
        "merges": tokenizer.merges,
    }
    (folder / "model.json").write_text(json.dumps(card) + "\n", encoding="utf-8")
