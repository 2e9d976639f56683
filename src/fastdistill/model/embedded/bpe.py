"""Byte-level BPE and the ChatML template of the embedded teacher. Knows nothing of weights.

Token ids: 0..255 are the bytes, then one id per merge in order of rank, then the three special tokens. Text is first
cut by the pattern of Qwen2's tokenizer (llama.cpp's pre-tokenizer `qwen2`), so `tokenizers` and llama.cpp give the
same ids. Python's `re` has no \\p{N}: outside ASCII, letter-like numbers such as U+2460 are cut as letters.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from fastdistill.model.embedded.wire import Turn

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_PIECES = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Encodes text to token ids and back.

    `merges[rank]` is the pair of token ids that is joined into token 256 + rank.
    """

    def __init__(self, merges: Iterable[Sequence[int]]) -> None:
        self._merged: dict[tuple[int, int], int] = {}
        self._bytes = [bytes([byte]) for byte in range(256)]
        for left, right in merges:
            self._merged[left, right] = len(self._bytes)
            self._bytes.append(self._bytes[left] + self._bytes[right])
        first_special = len(self._bytes)
        self._bytes += [token.encode() for token in SPECIAL_TOKENS]
        self.end_of_text, self.im_start, self.im_end = range(first_special, len(self._bytes))
        self._cache: dict[str, list[int]] = {}

    @property
    def merges(self) -> Sequence[tuple[int, int]]:
        """The pairs that are joined, in order of rank."""
        return list(self._merged)

    @property
    def vocabulary(self) -> Sequence[bytes]:
        """The bytes of every token, by id; special tokens last."""
        return self._bytes

    def encode(self, text: str) -> list[int]:
        """The token ids of plain text. What looks like a special token is encoded as the characters it is made of."""
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            if piece not in self._cache:
                if len(self._cache) > 50_000:
                    self._cache.clear()
                self._cache[piece] = self._merge(piece)
            ids += self._cache[piece]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes[token] for token in ids).decode("utf-8", errors="replace")

    def encode_chat(self, messages: Iterable[Turn]) -> list[int]:
        """ChatML: the ids of the messages (each with role and content), then the opening of the assistant's turn."""
        newline = self.encode("\n")
        ids: list[int] = []
        for message in messages:
            turn = self.encode(f"{message['role']}\n{message['content']}")
            ids += [self.im_start, *turn, self.im_end, *newline]
        return [*ids, self.im_start, *self.encode("assistant\n")]

    def _merge(self, piece: str) -> list[int]:
        ids = list(piece.encode())
        while len(ids) > 1:
            candidates = ((self._merged.get(pair), at) for at, pair in enumerate(pairwise(ids)))
            best = min(((token, at) for token, at in candidates if token is not None), default=None)
            if best is None:
                break
            token, at = best
            ids[at : at + 2] = [token]
        return ids
