"""Byte-level BPE and the ChatML template of the embedded teacher. Knows nothing of weights.

Token ids: 0..255 are the bytes, then one id per merge in order of rank, then the three special tokens. Text is first
cut by the pattern of Qwen2's tokenizer (llama.cpp's pre-tokenizer `qwen2`), so `tokenizers` and llama.cpp give the
same ids. Python's `re` has no \\p{N}: outside ASCII, letter-like numbers such as U+2460 are cut as letters.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, pairwise

from fastdistill.core.types import Message

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_PIECES = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Encodes text to token ids and back.

    `merges[rank]` is the pair of token ids that is joined into token 256 + rank.
    """

    def __init__(self, merges: Iterable[Sequence[int]]) -> None:
        self.merges = [(left, right) for left, right in merges]
        self.vocabulary = [bytes([byte]) for byte in range(256)]  # of every token, by id; special tokens last
        for left, right in self.merges:
            self.vocabulary.append(self.vocabulary[left] + self.vocabulary[right])
        first_special = len(self.vocabulary)
        self.vocabulary += [token.encode() for token in SPECIAL_TOKENS]
        self.end_of_text, self.im_start, self.im_end = range(first_special, len(self.vocabulary))
        self._merged = {pair: 256 + rank for rank, pair in enumerate(self.merges)}
        self._encoded = lru_cache(50_000)(self._merge)

    def encode(self, text: str) -> list[int]:
        """The token ids of plain text. What looks like a special token is encoded as the characters it is made of."""
        return [*chain.from_iterable(map(self._encoded, _PIECES.findall(text)))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.vocabulary[token] for token in ids).decode("utf-8", errors="replace")

    def encode_chat(self, messages: Iterable[Message]) -> list[int]:
        """ChatML: the ids of the messages (each with role and content), then the opening of the assistant's turn."""
        newline = self.encode("\n")
        ids: list[int] = []
        for message in messages:
            turn = self.encode(f"{message['role']}\n{message['content']}")
            ids += [self.im_start, *turn, self.im_end, *newline]
        return [*ids, self.im_start, *self.encode("assistant\n")]

    def _merge(self, piece: str) -> list[int]:
        ids = list(piece.encode())
        while pairs := self._merged.keys() & set(pairwise(ids)):
            first = min(pairs, key=self._merged.__getitem__)
            merged: list[int] = []
            for token in ids:
                if merged and (merged[-1], token) == first:
                    merged[-1] = self._merged[first]
                else:
                    merged.append(token)
            ids = merged
        return ids
