"""Writes log-probabilities of the chosen answers' tokens, for distillation. Knows no server and no tokenizer.

They are those of the whole answer as it was sampled, before any parser, and are not renormalised: what is missing to 1
is the mass beyond the `k` likeliest.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, Self

import msgspec
from pydantic import Field, model_validator

from fastdistill.core.errors import InputError, SampleError
from fastdistill.core.step import Context, StreamStep
from fastdistill.core.types import Candidate, FinishReason, LogprobBasis, Sample, Status
from fastdistill.data.export.dataset import Write, parquet_file, row_id

_HALF = ("token_logprobs", "top_logprobs")


class Scores(NamedTuple):
    """Log-probabilities of one sequence of T tokens; the alternatives, k for each token, flat and row by row."""

    basis: str
    n_prompt_tokens: int | None
    tokens: Sequence[str]
    token_ids: Sequence[int] | None
    token_logprobs: Sequence[float]
    k: int = 0
    top_tokens: Sequence[str] = ()
    top_ids: Sequence[int] | None = None
    top_logprobs: Sequence[float] = ()


class ExportLogprobs(StreamStep):
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
            options = {"use_dictionary": False, "use_byte_stream_split": [f"{name}.list.element" for name in _HALF]}
            writers: dict[str, Write] = {}
            for form in self.formats:
                folder, more = ("logprobs", options) if form == "parquet" else ("axolotl_kd", {})
                file = parquet_file(ctx.dist / folder / "train.parquet", _schema(form), **more)
                writers[form] = stack.enter_context(file)
            for sample in samples:
                try:
                    rows = [] if sample.status is not Status.OPEN else list(self._rows(sample, seen))
                except SampleError as error:
                    ctx.discard(sample.failed(self.name, error))
                    continue
                for name, row in rows:
                    writers[name](row, msgspec.json.encode(row))
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
            k = scores.k
            tail_ids, tail = [list(range(k))] * self.template_tail, [[-math.log(k)] * k] * self.template_tail
            starts = range(0, len(scores.top_ids), k)
            seen["axolotl_rows"] += 1
            messages = [{"role": m["role"], "content": m["content"]} for m in candidate.prompt.messages]
            yield (
                "axolotl",
                {
                    "messages": [*messages, {"role": "assistant", "content": completion.text}],
                    "target_token_ids": [list(scores.top_ids[at : at + k]) for at in starts] + tail_ids,
                    "logprobs": [list(scores.top_logprobs[at : at + k]) for at in starts] + tail,
                    "fd_id": row_id(sample, candidate),
                },
            )


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
    row = {
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
        "token_logprobs": scores.token_logprobs,
        "top_ids": scores.top_ids,
        "top_tokens": scores.top_tokens if scores.top_ids is None else None,
        "top_logprobs": scores.top_logprobs,
    }
    return row | {"seq_logprob": math.fsum(scores.token_logprobs)}


def _schema(form: str) -> Any:
    import pyarrow as pa

    if form == "axolotl":
        turn = pa.struct([("role", pa.string()), ("content", pa.string())])
        ids, floats = pa.list_(pa.list_(pa.int32())), pa.list_(pa.list_(pa.float32()))
        named = [("messages", pa.list_(turn)), ("target_token_ids", ids), ("logprobs", floats), ("fd_id", pa.string())]
        return pa.schema(named)
    types = {"temperature": pa.float64(), "k": pa.int32(), "n_prompt_tokens": pa.int32(), "cut": pa.bool_()}
    types |= dict.fromkeys(("token_ids", "top_ids"), pa.list_(pa.int32()))
    types |= dict.fromkeys(("tokens", "top_tokens"), pa.list_(pa.string()))
    types |= {"seq_logprob": pa.float64(), **dict.fromkeys(_HALF, pa.list_(pa.float16()))}
    texts = ("fd_id", "fd_candidate_id", "fd_model")
    order = [*texts, "temperature", "logprob_basis", "k", "n_prompt_tokens", "cut", "token_ids", "tokens"]
    order += ["token_logprobs", "top_ids", "top_tokens", "top_logprobs", "seq_logprob"]
    return pa.schema([(name, types.get(name, pa.string())) for name in order])
