"""The embedded teacher's network in torch, for training. Inference is `fastdistill.model.embedded`, in numpy.

Parameters have GGUF's tensor names, so the same names serve training, the package's weights and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.model.embedded.bpe import Tokenizer
from fastdistill.model.embedded.network import Architecture, load_weights
from lab.weights import save_weights


class Norm(nn.Module):
    """RMSNorm over the last axis."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Block(nn.Module):
    """Attention with QK-norm and RoPE, then SwiGLU; both on a normed copy, added to the residual stream."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.attn_norm = Norm(shape.hidden, shape.norm_epsilon)
        self.attn_q = nn.Linear(shape.hidden, queries, bias=False)
        self.attn_k = nn.Linear(shape.hidden, keys, bias=False)
        self.attn_v = nn.Linear(shape.hidden, keys, bias=False)
        self.attn_q_norm = Norm(shape.head_dim, shape.norm_epsilon)
        self.attn_k_norm = Norm(shape.head_dim, shape.norm_epsilon)
        self.attn_output = nn.Linear(queries, shape.hidden, bias=False)
        self.ffn_norm = Norm(shape.hidden, shape.norm_epsilon)
        self.ffn_gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, shape.hidden, bias=False)
        # The block starts as the identity.
        nn.init.zeros_(self.attn_output.weight)
        nn.init.zeros_(self.ffn_down.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, wanted: Tensor | None = None) -> Tensor:
        """x: (batch, length, hidden); cos and sin: (batch, length, 1, head_dim); bias: (batch, 1, length, length).

        With `wanted` (batch, places), only what comes out at those places is computed: (batch, places, hidden).
        """
        normed = self.attn_norm(x)
        key, value = self._heads(self.attn_k(normed)), self._heads(self.attn_v(normed))
        key = rotate(self.attn_k_norm(key), cos, sin)
        if wanted is not None:
            each = torch.arange(len(x))[:, None]
            x, normed, cos, sin = (part[each, wanted] for part in (x, normed, cos, sin))
            bias = bias[each, 0, wanted][:, None]
        query = rotate(self.attn_q_norm(self._heads(self.attn_q(normed))), cos, sin) * self.shape.head_dim**-0.5
        groups = self.shape.heads // self.shape.kv_heads
        key, value = (part.repeat_interleave(groups, dim=2) if groups > 1 else part for part in (key, value))
        # The backward pass of F.scaled_dot_product_attention is slower than this on a CPU.
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) + bias
        mixed = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)
        x = x + self.attn_output(mixed.flatten(2))
        normed = self.ffn_norm(x)
        hidden: Tensor = x + self.ffn_down(F.silu(self.ffn_gate(normed)) * self.ffn_up(normed))
        return hidden

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.shape.head_dim))


class Model(nn.Module):
    """The decoder. Input and output embeddings are one matrix."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.hidden)
        nn.init.normal_(self.token_embd.weight, std=0.02)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = Norm(shape.hidden, shape.norm_epsilon)
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.frequencies = frequencies

    def forward(self, tokens: Tensor, positions: Tensor, bias: Tensor, wanted: Tensor) -> Tensor:
        """The logits (batch, places, vocabulary) at the wanted places (batch, places) of each row.

        tokens and positions: (batch, length); bias is added to the attention scores: (batch, 1, length, length).
        """
        angles = positions[..., None, None] * self.frequencies
        cos = angles.cos().repeat(1, 1, 1, 2)
        sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
        x = self.token_embd(tokens)
        *before, last = self.blk
        for block in before:
            x = block(x, cos, sin, bias)
        logits: Tensor = self.output_norm(last(x, cos, sin, bias, wanted)) @ self.token_embd.weight.T
        return logits

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """The logits (length, vocabulary) after each token of one plain sequence."""
        length = len(tokens)
        bias = torch.full((length, length), -torch.inf).triu(1)[None, None]
        everywhere = torch.arange(length)[None]
        logits: Tensor = self(torch.tensor([tokens]), everywhere, bias, everywhere)
        return logits[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE with the halves of a head as the pairs."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([right, left], dim=-1) * sin


def save(model: Model, tokenizer: Tokenizer, folder: Path, training: dict[str, Any]) -> None:
    """Write the model as a folder that `fastdistill.model.embedded` loads."""
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    save_weights(folder, model.shape, tokenizer, tensors, training)


def load(folder: Path) -> Model:
    """The model of such a folder, its weights rounded to float16 as they are stored."""
    weights = load_weights(folder)
    model = Model(weights.architecture)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights.tensors.items()})
    return model
