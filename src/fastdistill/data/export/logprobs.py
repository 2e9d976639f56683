"""Writes log-probabilities of the chosen answers' tokens, for distillation. Knows no server and no tokenizer.

They are those of the whole answer as it was sampled, before any parser, and are not renormalised: what is missing to 1
is the mass beyond the `k` likeliest.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any, Literal, NamedTuple, Self

import msgspec
from pydantic import Field, model_validator

from fastdistill.core.errors import InputError, SampleError
from fastdistill.core.step import Context
from fastdistill.core.types import Candidate, FinishReason, LogprobBasis, Sample, Status
from fastdistill.data.export.dataset import Splits, Write, parquet_file, row_id


class Scores(NamedTuple):
    """Log-probabilities of one sequence of T tokens; the alternatives, k for each token, flat and row by row."""

    logprob_basis: str
    n_prompt_tokens: int | None
    tokens: Sequence[str]
    token_ids: Sequence[int] | None
    token_logprobs: Sequence[float]
    k: int = 0
    top_tokens: Sequence[str] = ()
    top_ids: Sequence[int] | None = None
    top_logprobs: Sequence[float] = ()


class ExportLogprobs(Splits):
    """Writes `logprobs/train.parquet`, one row for each chosen candidate, and passes every sample on.

    `scores` takes the values of a `ScoreTokens` step, another model's, in place of those that the answers came with.
    `axolotl` writes `axolotl_kd/train.parquet` besides, for the forward KL of axolotl's KD plugin. It lines rows up
    with the end of the tokenised chat: `template_tail` is how many tokens the student's chat template puts after the
    last one that was sampled.
    """

    formats: tuple[Literal["parquet", "axolotl"], ...] = Field(("parquet",), min_length=1)
    scores: str | None = Field(None, description="name of a ScoreTokens step; null: the answers' own")
    template_tail: int = Field(0, ge=0, description="tokens of the template after the answer's last; 1 for ChatML")

    @model_validator(mode="after")
    def _has_alternatives(self) -> Self:
        if self.scores is not None and "axolotl" in self.formats:
            raise ValueError(
                "formats: axolotl needs each token's alternatives, and ScoreTokens gives the token's alone"
            )
        return self

    def gates(self) -> Sequence[str]:
        return () if self.scores is None else (self.scores,)

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        seen: Counter[str] = Counter()
        with ExitStack() as stack:
            halves = ["token_logprobs.list.element", "top_logprobs.list.element"]
            options = {"use_dictionary": False, "use_byte_stream_split": halves}
            writers: dict[tuple[str, str], Write] = {}
            for form, split in product(self.formats, self.splits):
                folder, more = ("logprobs", options) if form == "parquet" else ("axolotl_kd", {})
                file = parquet_file(ctx.dist / folder / f"{split}.parquet", _schema(form), **more)
                writers[form, split] = stack.enter_context(file)
            for sample in samples:
                try:
                    rows = [] if sample.status is not Status.OPEN else list(self._rows(sample, seen))
                    split = self.split(sample) if rows else "train"
                except SampleError as error:
                    ctx.discard(sample.failed(self.name, error))
                    continue
                for form, row in rows:
                    writers[form, split](row, msgspec.json.encode(row))
                yield sample
        ctx.report(self.name, dict(sorted(seen.items())))

    def _rows(self, sample: Sample, seen: "Counter[str]") -> Iterator[tuple[str, dict[str, Any]]]:
        for candidate in sample.chosen:
            scores = _own(candidate, sample) if self.scores is None else _given(candidate, self.scores)
            if scores is None:
                remedy = "set decode_profile.logprobs: true, and ask a server that gives them"
                raise SampleError("no_logprobs", f"{sample.source}: an answer without log-probabilities; {remedy}")
            if "parquet" in self.formats:
                seen["rows"] += 1
                yield "parquet", _row(candidate, sample, scores)
            if "axolotl" in self.formats:
                yield from self._axolotl(candidate, sample, scores, seen)

    def _axolotl(
        self, candidate: Candidate, sample: Sample, scores: Scores, seen: "Counter[str]"
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """https://github.com/axolotl-ai-cloud/axolotl, integrations/kd/chat_template.py."""
        if scores.top_ids is None or not scores.k:
            remedy = "set decode_profile: {logprobs: true, token_ids: true, top_logprobs: 20}, with vLLM or llama.cpp"
            raise InputError(f"{self.name}: axolotl needs the ids of each token's alternatives, and has none; {remedy}")
        completion = candidate.completion
        if completion.finish_reason is not FinishReason.STOP:
            seen["axolotl_left_out.cut"] += 1  # the template would end a turn that the teacher did not end
        elif not "".join(scores.tokens).startswith(completion.text):
            seen["axolotl_left_out.text_differs"] += 1  # tokens of thinking, or of a character in pieces
        else:
            seen["axolotl_rows"] += 1
            k, tail = scores.k, self.template_tail
            messages = [{"role": m["role"], "content": m["content"]} for m in candidate.prompt.messages]
            row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": completion.text}]}
            starts = range(0, len(scores.top_ids), k)
            row["target_token_ids"] = [scores.top_ids[at : at + k] for at in starts] + [[*range(k)]] * tail
            row["logprobs"] = [scores.top_logprobs[at : at + k] for at in starts] + [[-math.log(k)] * k] * tail
            yield "axolotl", row | {"fd_id": row_id(sample, candidate)}


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
        logprob_basis=completion.logprob_basis or LogprobBasis.UNKNOWN,
        n_prompt_tokens=max(prompt_tokens) or None,
        tokens=[token.token for token in tokens],
        token_ids=ids if len(ids) == len(tokens) else None,
        token_logprobs=[token.logprob for token in tokens],
        k=k,
        top_tokens=[token for token, _ in tops],
        top_ids=top_ids if len(top_ids) == len(tops) else None,
        top_logprobs=[logprob for _, logprob in tops],
    )


def _given(candidate: Candidate, gate: str) -> Scores | None:
    verdict = candidate.verdict(gate)
    if verdict is None or "logprobs" not in verdict.detail:
        return None
    detail = verdict.detail
    given = detail["basis"], detail["n_prompt_tokens"], detail["tokens"], detail["token_ids"], detail["logprobs"]
    return Scores(*given)


def _row(candidate: Candidate, sample: Sample, scores: Scores) -> dict[str, Any]:
    parameters = candidate.prompt.parameters
    return scores._asdict() | {
        "fd_id": row_id(sample, candidate),
        "fd_candidate_id": candidate.candidate_id,
        "fd_model": candidate.prompt.model,
        "temperature": (parameters.get("options") or {}).get("temperature", parameters.get("temperature")),
        "cut": bool(candidate.cuts),
        "tokens": scores.tokens if scores.token_ids is None else None,
        "top_tokens": scores.top_tokens if scores.top_ids is None else None,
        "seq_logprob": math.fsum(scores.token_logprobs),
    }


def _schema(form: str) -> Any:
    import pyarrow as pa

    text, ids = pa.string(), pa.list_(pa.int32())
    if form == "axolotl":
        turns, floats = pa.list_(pa.struct([("role", text), ("content", text)])), pa.list_(pa.list_(pa.float32()))
        named = {"messages": turns, "target_token_ids": pa.list_(ids), "logprobs": floats, "fd_id": text}
        return pa.schema(list(named.items()))
    texts, halves = pa.list_(text), pa.list_(pa.float16())
    return pa.schema(
        [
            ("fd_id", text), ("fd_candidate_id", text), ("fd_model", text), ("temperature", pa.float64()),
            ("logprob_basis", text), ("k", pa.int32()), ("n_prompt_tokens", pa.int32()), ("cut", pa.bool_()),
            ("token_ids", ids), ("tokens", texts), ("token_logprobs", halves), ("top_ids", ids),
            ("top_tokens", texts), ("top_logprobs", halves), ("seq_logprob", pa.float64()),
        ]
    )  # fmt: skip
