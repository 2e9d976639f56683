"""Writes log-probabilities of the chosen answers' tokens, for distillation. Knows no server and no tokenizer.

They are those of the whole answer as it was sampled, before any parser, and are not renormalised: what is missing to 1
is the mass beyond the `k` likeliest.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import msgspec
import yaml
from pydantic import Field, model_validator

from fastdistill.core.errors import InputError, SampleError
from fastdistill.core.files import atomic
from fastdistill.core.step import Output
from fastdistill.core.types import Candidate, FinishReason, LogprobBasis, Sample
from fastdistill.data.export.dataset import Splits, Write, in_blocks, parquet_file, row_id

FOLDERS = {"parquet": "logprobs", "axolotl": "axolotl_kd", "distillkit": "distillkit"}


class Scores(NamedTuple):
    """Log-probabilities of one sequence of T tokens; the alternatives, k for each token, flat and row by row.

    A verdict of `ScoreTokens` has the same names in its detail.
    """

    basis: str
    n_prompt_tokens: int | None
    tokens: Sequence[str]
    token_ids: Sequence[int] | None
    logprobs: Sequence[float]
    k: int = 0
    top_tokens: Sequence[str] = ()
    top_ids: Sequence[int] | None = None
    top_logprobs: Sequence[float] = ()
    prompt_ids: Sequence[int] = ()


class ExportLogprobs(Splits):
    """Writes `logprobs/train.parquet`, one row for each chosen candidate, and passes every sample on.

    `scores` takes the values of a `ScoreTokens` step, another model's, in place of those that the answers came with.
    `axolotl` writes `axolotl_kd/train.parquet` besides, for the forward KL of axolotl's KD plugin. It lines rows up
    with the end of the tokenised chat: `template_tail` is how many tokens the student's chat template puts after the
    last one that was sampled. `distillkit` writes `distillkit/train.parquet`, of whole token sequences as DistillKit
    captures them, and the `compression_config.yaml` that reads it.
    """

    version: ClassVar[int] = 2

    formats: tuple[Literal["parquet", "axolotl", "distillkit"], ...] = Field(("parquet",), min_length=1)
    scores: str | None = Field(None, description="name of a ScoreTokens step; null: the answers' own")
    template_tail: int = Field(0, ge=0, description="tokens of the template after the answer's last; 1 for ChatML")
    vocab_size: int | None = Field(None, gt=1, description="of the model that scored; for distillkit")

    @model_validator(mode="after")
    def _knows_whole_sequences(self) -> Self:
        if "distillkit" in self.formats and (self.scores is None or self.vocab_size is None):
            raise ValueError("formats: distillkit needs `scores`, a ScoreTokens with top_logprobs, and `vocab_size`")
        return self

    def gates(self) -> Sequence[str]:
        return () if self.scores is None else (self.scores,)

    def files(self, split: str) -> dict[str, str]:
        return {f"{FOLDERS[form]}/{split}.parquet": form for form in self.formats}

    def writers(self, split: str, dist: Path, stack: ExitStack) -> dict[str, Write]:
        halves = ["token_logprobs.list.element", "top_logprobs.list.element"]
        options: dict[str, dict[str, Any]] = {"parquet": {"use_dictionary": False, "use_byte_stream_split": halves}}
        writers: dict[str, Write] = {}
        for path, form in self.files(split).items():
            file = parquet_file(dist / path, _schema(form), **options.get(form, {}))
            writers[form] = stack.enter_context(in_blocks(stack.enter_context(file)))
        return writers

    def rows(self, sample: Sample, seen: "Counter[str]") -> list[tuple[str, bytes]]:
        return [(form, msgspec.json.encode(row)) for form, row in self._rows(sample, seen)]

    def finish(self, seen: "Counter[str]", ctx: Output) -> None:
        if k := seen.pop("k", 0):
            # Its DistributionQuantizationConfig, of values that are stored as they are.
            exact = {"d": self.vocab_size, "k": k, "exact_k": k, "exact_dtype": "float16", "polynomial_terms": None}
            with atomic(ctx.dist / FOLDERS["distillkit"] / "compression_config.yaml") as text:
                yaml.safe_dump({**exact, "residual_bins": [], "delta_encoding": False, "error_diffusion": False}, text)
        super().finish(seen, ctx)

    def _rows(self, sample: Sample, seen: "Counter[str]") -> Iterator[tuple[str, dict[str, Any]]]:
        for candidate in sample.chosen:
            scores = _own(candidate, sample) if self.scores is None else _given(candidate, self.scores)
            if scores is None:
                remedy = "set decode_profile.logprobs: true, and ask a server that gives them"
                raise SampleError("no_logprobs", f"{sample.source}: an answer without log-probabilities; {remedy}")
            needs = [form for form in self.formats if form != "parquet"]
            if needs and scores.tokens and not scores.top_ids:
                asked = "decode_profile: {logprobs: true, token_ids: true, top_logprobs: 20}, with vLLM or llama.cpp"
                remedy = asked if self.scores is None else f"top_logprobs of {self.scores}"
                raise InputError(f"{self.name}: {needs[0]} needs ids of each token's alternatives; set {remedy}")
            if "parquet" in self.formats:
                seen["rows"] += 1
                yield "parquet", _row(candidate, sample, scores)
            if "axolotl" in self.formats:
                yield from self._axolotl(candidate, sample, scores, seen)
            if "distillkit" in self.formats:
                seen["distillkit_rows"] += 1
                seen["k"] = scores.k
                yield "distillkit", self._distillkit(scores)

    def _axolotl(
        self, candidate: Candidate, sample: Sample, scores: Scores, seen: "Counter[str]"
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """https://github.com/axolotl-ai-cloud/axolotl, integrations/kd/chat_template.py."""
        completion = candidate.completion
        if completion.finish_reason is not FinishReason.STOP:
            seen["axolotl_left_out.cut"] += 1  # the template would end a turn that the teacher did not end
        elif not scores.tokens or not "".join(scores.tokens).startswith(completion.text):
            seen["axolotl_left_out.text_differs"] += 1  # tokens of thinking, or of a character in pieces, or none
        else:
            seen["axolotl_rows"] += 1
            k, tail, top_ids = scores.k, self.template_tail, scores.top_ids or ()
            messages = [{"role": m["role"], "content": m["content"]} for m in candidate.prompt.messages]
            row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": completion.text}]}
            starts = range(0, len(top_ids), k)
            row["target_token_ids"] = [top_ids[at : at + k] for at in starts] + [[*range(k)]] * tail
            row["logprobs"] = [scores.top_logprobs[at : at + k] for at in starts] + [[-math.log(k)] * k] * tail
            yield "axolotl", row | {"fd_id": row_id(sample, candidate)}

    def _distillkit(self, scores: Scores) -> dict[str, Any]:
        """https://github.com/arcee-ai/DistillKit, distillkit/compression and sample_logits_vllm.py.

        The row at a position is of the token after it, so there is one less than tokens. Each has its `k`
        log-probabilities in descending order as half-precision numbers, little-endian, and their ids as one string of
        bits, the highest bit of each id first. The rows before the answer are even, for they are masked: DistillKit
        masks a row by the label at its own position, so labels begin with the last token before the answer.
        """
        import numpy as np

        k, before, answer = scores.k, scores.prompt_ids, scores.token_ids or ()
        even, size = len(before) - 1, self.vocab_size or 0
        ids = np.array([*range(k)] * even + [*(scores.top_ids or ())]).reshape(-1, k)
        if ids.max() >= size:
            raise InputError(f"{self.name}: vocab_size is {size}, and there is a token {ids.max()}: raise it")
        values = np.array([-math.log(k)] * k * even + [*scores.top_logprobs], "<f2").reshape(-1, k)
        bits = (ids[:, :, None] >> np.arange((size - 1).bit_length())[::-1] & 1).astype(np.uint8)
        return {
            "input_ids": [*before, *answer],
            "labels": [-100] * even + [before[-1], *answer],
            "compressed_logprobs": values.view(np.uint8).tolist(),
            "bytepacked_indices": np.packbits(bits.reshape(len(ids), -1), axis=1).tolist(),
        }


def _own(candidate: Candidate, sample: Sample) -> Scores | None:
    completion = candidate.completion
    tokens = completion.logprobs
    if tokens is None:
        return None
    # The prompt is counted with the first of its answers only.
    prompt = candidate.prompt.digest
    prompt_tokens = [c.completion.usage.prompt_tokens for c in sample.candidates if c.prompt.digest == prompt]
    k = min((len(token.top) for token in tokens), default=0)
    tops = [top for token in tokens for top in token.top[:k]]
    ids = [token.id for token in tokens if token.id is not None]
    top_ids = [id_ for token in tokens for id_ in token.top_ids[:k]]
    return Scores(
        basis=completion.logprob_basis or LogprobBasis.UNKNOWN,
        n_prompt_tokens=max(prompt_tokens) or None,
        tokens=[token.token for token in tokens],
        token_ids=ids if len(ids) == len(tokens) else None,
        logprobs=[token.logprob for token in tokens],
        k=k,
        top_tokens=[token for token, _ in tops],
        top_ids=top_ids if len(top_ids) == len(tops) else None,
        top_logprobs=[logprob for _, logprob in tops],
    )


def _given(candidate: Candidate, gate: str) -> Scores | None:
    verdict = candidate.verdict(gate)
    return Scores(**verdict.detail) if verdict and "logprobs" in verdict.detail else None


def _row(candidate: Candidate, sample: Sample, scores: Scores) -> dict[str, Any]:
    parameters = candidate.prompt.parameters
    return {
        "fd_id": row_id(sample, candidate),
        "fd_candidate_id": candidate.candidate_id,
        "fd_model": candidate.prompt.model,
        "temperature": (parameters.get("options") or {}).get("temperature", parameters.get("temperature")),
        "logprob_basis": scores.basis,
        "k": scores.k,
        "n_prompt_tokens": scores.n_prompt_tokens,
        "cut": bool(candidate.cuts),
        "token_ids": scores.token_ids,
        "tokens": scores.tokens if scores.token_ids is None else None,
        "token_logprobs": scores.logprobs,
        "top_ids": scores.top_ids,
        "top_tokens": scores.top_tokens if scores.top_ids is None else None,
        "top_logprobs": scores.top_logprobs,
        "seq_logprob": math.fsum(scores.logprobs),
    }


def _schema(form: str) -> Any:
    import pyarrow as pa

    text, ids, nested = pa.string(), pa.list_(pa.int32()), pa.list_(pa.list_(pa.uint8()))
    texts, halves, turns = pa.list_(text), pa.list_(pa.float16()), pa.struct([("role", text), ("content", text)])
    types = {
        "parquet": {
            "fd_id": text, "fd_candidate_id": text, "fd_model": text, "temperature": pa.float64(),
            "logprob_basis": text, "k": pa.int32(), "n_prompt_tokens": pa.int32(), "cut": pa.bool_(),
            "token_ids": ids, "tokens": texts, "token_logprobs": halves, "top_ids": ids,
            "top_tokens": texts, "top_logprobs": halves, "seq_logprob": pa.float64(),
        },
        "axolotl": {
            "messages": pa.list_(turns), "target_token_ids": pa.list_(ids),
            "logprobs": pa.list_(pa.list_(pa.float32())), "fd_id": text,
        },
        "distillkit": {
            "input_ids": pa.list_(pa.uint64()), "labels": pa.list_(pa.int64()), "compressed_logprobs": nested,
            "bytepacked_indices": nested,  # and nothing of ours: it packs whatever column there is
        },
    }  # fmt: skip
    return pa.schema(list(types[form].items()))
