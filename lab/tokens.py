"""Learn the merges of the embedded teacher's tokenizer, and spell its tokens as other software does."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from fastdistill.model.embedded.bpe import SPECIAL_TOKENS
from lab.export_gguf import byte_letters

QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learn_merges(texts: Iterable[str], vocabulary: int) -> list[tuple[int, int]]:
    """The merges, as pairs of token ids, of a byte-level BPE of that many tokens, special ones included."""
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pieces()
    plain = vocabulary - len(SPECIAL_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=plain, initial_alphabet=alphabet, show_progress=False)
    # A list, because an iterator is read from other threads, which one over a SQLite connection does not survive.
    reference.train_from_iterator(list(texts), trainer)
    ids = {letter: byte for byte, letter in enumerate(byte_letters())}
    merges = []
    for left, right in json.loads(reference.to_str())["model"]["merges"]:
        merges.append((ids[left], ids[right]))
        ids[left + right] = len(ids)
    if len(ids) != plain:
        raise ValueError(f"the texts gave {len(ids)} tokens, not {plain}; give more of them")
    return merges


def reference_tokenizer(merges: Iterable[tuple[int, int]]) -> Tokenizer:
    """The same tokenizer in the `tokenizers` package, without special tokens."""
    spelled = byte_letters()
    pairs = []
    for left, right in merges:
        pairs.append((spelled[left], spelled[right]))
        spelled.append(spelled[left] + spelled[right])
    reference = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(spelled)}, merges=pairs))
    reference.pre_tokenizer = pieces()
    return reference


def pieces() -> pre_tokenizers.PreTokenizer:
    """Qwen2's pre-tokenizer."""
    split = pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
