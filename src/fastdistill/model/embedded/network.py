"""The embedded teacher's network: a Qwen3 decoder in numpy, on one CPU core. Knows nothing of requests.

The matrix products run over the rows of all sequences at once; attention runs sequence by sequence over its own keys,
so nothing is padded, and what a sequence gets does not depend on which others run beside it (see `_BLOCK`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdistill.model.embedded.bpe import Tokenizer

Array = NDArray[np.float32]

# The order in which BLAS sums depends on how many rows a product has and on where a row stands in it. In products of
# this many rows all come out the same, to the last bit, so decoding multiplies in such blocks. It costs a tenth of the
# speed at 32 sequences, and with it an answer does not depend on what runs beside it.
_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a Qwen3 decoder: RMSNorm, RoPE (half-split), QK-norm, SwiGLU, tied embeddings, grouped queries.

    Source: the Qwen3 technical report, arXiv:2505.09388, section 2.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    rope_theta: float
    norm_epsilon: float


@dataclass(frozen=True, slots=True)
class Weights:
    """A model as read from its folder: `weights.npz` (float16, GGUF's tensor names) and `model.json`."""

    architecture: Architecture
    tokenizer: Tokenizer
    tensors: Mapping[str, Array]
    sha256: str


def load_weights(folder: Path) -> Weights:
    """Read a model's folder. Raises ValueError if the weights are not the ones that model.json was written for."""
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    path = folder / "weights.npz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != card["sha256"]:
        raise ValueError(f"embedded model: {path} does not match the sha256 in model.json; reinstall the package")
    with np.load(path) as archive:
        tensors = {name: archive[name].astype(np.float32) for name in archive.files}
    return Weights(Architecture(**card["architecture"]), Tokenizer(card["merges"]), tensors, digest)


@dataclass(slots=True)
class Cache:
    """Keys and values of one sequence: (layers, 2, kv_heads, capacity, head_dim), of which `length` are filled."""

    both: Array
    length: int = 0

    @classmethod
    def empty(cls, shape: Architecture, capacity: int) -> "Cache":
        return cls(np.empty((shape.layers, 2, shape.kv_heads, capacity, shape.head_dim), np.float32))

    def copy(self, capacity: int) -> "Cache":
        """A cache of another capacity with the same contents."""
        *size, _, dim = self.both.shape
        twin = Cache(np.empty((*size, capacity, dim), np.float32), self.length)
        twin.both[..., : self.length, :] = self.both[..., : self.length, :]
        return twin


class Decoder:
    """The network: token ids in, logits out, with the keys and values of each sequence kept in a cache."""

    def __init__(self, weights: Weights) -> None:
        shape, tensors = weights.architecture, weights.tensors
        self.shape = shape
        self._embedding = tensors["token_embd.weight"]
        self._head = _folded(tensors["output_norm.weight"], self._embedding)
        self._layers = [_Layer(tensors, f"blk.{layer}.", shape) for layer in range(shape.layers)]
        frequencies = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = np.arange(shape.context)[:, None] * frequencies
        self._cos = np.concatenate([np.cos(angles)] * 2, axis=-1).astype(np.float32)[:, None]
        self._sin = np.concatenate([-np.sin(angles), np.sin(angles)], axis=-1).astype(np.float32)[:, None]

    def forward(self, spans: Sequence[tuple[Sequence[int], Cache]]) -> Array:
        """Append each span's tokens to its cache; the logits (spans, vocabulary) after the last token of each."""
        ids, positions = _rows(spans)
        ends = np.cumsum([len(tokens) for tokens, _ in spans])
        cos, sin = self._cos[positions], self._sin[positions]
        # A span by itself has nothing beside it to depend on: a whole prompt goes through in one product.
        multiply = _in_blocks if len(spans) > 1 else np.matmul
        hidden = self._embedding[ids]
        for index, layer in enumerate(self._layers):
            projected = multiply(self._norm(hidden), layer.qkv)
            query, key, value = self._split(layer, projected, cos, sin)
            is_last = index == self.shape.layers - 1
            if is_last:  # all that is left to know is what follows the last token of each span
                keep = np.zeros(_round_up(len(spans)), np.int64)
                keep[: len(spans)] = ends - 1
                query, hidden = query[keep], hidden[keep]
            mixed = np.zeros_like(query)
            for number, (end, (tokens, cache)) in enumerate(zip(ends, spans, strict=True)):
                span = slice(end - len(tokens), end)
                asking = slice(number, number + 1) if is_last else span
                mixed[asking] = _attend(query[asking], key[span], value[span], cache, index)
            hidden = hidden + multiply(mixed.reshape(len(hidden), -1), layer.output)
            hidden = hidden + multiply(_swiglu(multiply(self._norm(hidden), layer.gate_up)), layer.down)
        for tokens, cache in spans:
            cache.length += len(tokens)
        return multiply(self._norm(hidden), self._head)[: len(spans)]

    def _split(self, layer: "_Layer", projected: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """The query (rows, heads, head_dim), scaled for the scores, and key and value (rows, kv_heads, head_dim)."""
        shape = self.shape
        parts = projected.reshape(len(projected), -1, shape.head_dim)
        query, key, value = np.split(parts, (shape.heads, shape.heads + shape.kv_heads), axis=1)
        query = _rotate(self._norm(query) * layer.query_scale, cos, sin)
        key = _rotate(self._norm(key) * layer.key_scale, cos, sin)
        return query, key, value

    def _norm(self, x: Array) -> Array:
        """RMSNorm over the last axis, but for its scale."""
        mean_square = np.einsum("...d,...d->...", x, x) / np.float32(x.shape[-1])
        normed: Array = x * (1 / np.sqrt(mean_square + np.float32(self.shape.norm_epsilon)))[..., None]
        return normed


class _Layer:
    """One block's tensors; matrices are (inputs, outputs), with those that read the same input side by side.

    The scales of the norms are folded into the matrices that follow, the scores' 1/sqrt(head_dim) into the query's.
    """

    def __init__(self, tensors: Mapping[str, Array], prefix: str, shape: Architecture) -> None:
        def joined(*names: str) -> Array:
            return np.concatenate([tensors[f"{prefix}{name}.weight"] for name in names])

        self.qkv = _folded(joined("attn_norm"), joined("attn_q", "attn_k", "attn_v"))
        self.query_scale: Array = joined("attn_q_norm") * np.float32(shape.head_dim**-0.5)
        self.key_scale = joined("attn_k_norm")
        self.output = np.ascontiguousarray(joined("attn_output").T)
        self.gate_up = _folded(joined("ffn_norm"), joined("ffn_gate", "ffn_up"))
        self.down = np.ascontiguousarray(joined("ffn_down").T)


def _folded(scale: Array, matrix: Array) -> Array:
    """A matrix (outputs, inputs) whose inputs are scaled, as (inputs, outputs)."""
    return np.ascontiguousarray((matrix * scale).T)


def _in_blocks(x: Array, matrix: Array) -> Array:
    """x @ matrix, for x of whole blocks of rows."""
    blocks: Array = x.reshape(-1, _BLOCK, x.shape[-1]) @ matrix
    return blocks.reshape(len(x), -1)


def _round_up(rows: int) -> int:
    return -(-rows // _BLOCK) * _BLOCK


def _rows(spans: Sequence[tuple[Sequence[int], Cache]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The token ids of all spans and their positions, both filled up with zeros to whole blocks."""
    ids = [token for tokens, _ in spans for token in tokens]
    positions = [cache.length + at for tokens, cache in spans for at in range(len(tokens))]
    padding = [0] * (_round_up(len(ids)) - len(ids))
    return np.array(ids + padding), np.array(positions + padding)


def _swiglu(gate_up: Array) -> Array:
    """silu(gate) * up, of the two side by side."""
    gate, up = np.split(gate_up, 2, axis=-1)
    activated: Array = gate / (1 + np.exp(-gate)) * up
    return activated


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE with the halves of a head as the pairs: x is (rows, heads, head_dim), cos and sin (rows, 1, head_dim)."""
    half = x.shape[-1] // 2
    rotated: Array = np.concatenate([x[..., half:], x[..., :half]], axis=-1) * sin + x * cos
    return rotated


def _attend(query: Array, key: Array, value: Array, cache: Cache, layer: int) -> Array:
    """Causal attention over a cache, to which the span's keys and values are added.

    key and value are (rows, kv_heads, head_dim), query (rows, heads, head_dim) or only the last of its rows.
    """
    rows, heads, dim = query.shape
    groups = key.shape[1]
    end = cache.length + len(key)
    keys, values = cache.both[layer, :, :, :end]
    keys[:, cache.length :] = key.transpose(1, 0, 2)
    values[:, cache.length :] = value.transpose(1, 0, 2)
    # The query heads of a group share its keys: (groups, heads of the group x rows, head_dim).
    grouped = query.transpose(1, 0, 2).reshape(groups, heads // groups * rows, dim)
    scores: Array = grouped @ keys.transpose(0, 2, 1)
    if rows > 1:
        future = np.arange(end) > np.arange(end - rows, end)[:, None]
        scores[:, np.tile(future, (heads // groups, 1))] = -np.inf
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed: Array = (shares @ values).reshape(heads, rows, dim).transpose(1, 0, 2)
    return mixed
