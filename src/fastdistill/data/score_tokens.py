"""Scores samples with another model: the log-probabilities that it gives to tokens which it did not sample.

That is what reverse KL needs of a teacher, on a student's samples. It generates nothing, and rejects nothing.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec
from pydantic import Field

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import NotAsked, SampleError
from fastdistill.core.step import Context, Gate
from fastdistill.core.types import Candidate, Draw, LogprobBasis, Outcome, Sample, TokenLogprob, Verdict


class ScoreReason(StrEnum):
    SCORED = "scored"
    CANNOT_SCORE = "cannot_score"


class ScoreTokens(Gate):
    """Has `model` score each candidate's whole answer, as the answer to the same messages; passes what is scored.

    It takes vLLM's `prompt_logprobs` or SGLang's `/generate`; with any other server the run stops and says so. The text
    is tokenised by the scoring model. `same_tokenizer` scores the very token ids that the answer came with instead, its
    end token among them, which makes the values comparable token by token; that is right only if both models have one
    vocabulary.
    """

    model: str = Field("teacher", description="a name under `models:`, of provider vllm or sglang")
    same_tokenizer: bool = Field(
        False, description="score the answer's own token ids; it must have been asked for them"
    )
    top_logprobs: int = Field(0, ge=0, le=20, description="the likeliest tokens to keep beside each, for KD exports")

    def models(self) -> Sequence[str]:
        return (self.model,)

    async def judge(self, candidate: Candidate, sample: Sample, ctx: Context) -> Verdict:
        model, given = ctx.model(self.model), candidate.completion
        what: str | list[int] = given.text
        if self.same_tokenizer:
            what = [token.id for token in given.logprobs or () if token.id is not None]
            if not what or len(what) != len(given.logprobs or ()):
                detail = "no token ids came with the answer; set decode_profile: {logprobs: true, token_ids: true}"
                return self.verdict(Outcome.ERROR, ScoreReason.CANNOT_SCORE, detail=detail)
        if not what:
            return self.verdict(Outcome.ERROR, ScoreReason.CANNOT_SCORE, detail="the answer is empty")
        decode = DecodeProfile(max_tokens=1, top_logprobs=self.top_logprobs)
        prompt = model.prompt(candidate.prompt.messages, decode, {"scored": what})
        (answer,) = await model.generate(prompt, [Draw(0, None)])
        if isinstance(answer, NotAsked):
            raise answer
        if isinstance(answer, SampleError):
            return self.verdict(Outcome.ERROR, ScoreReason.CANNOT_SCORE, detail=str(answer))
        completion, tokens = answer.completion, answer.completion.logprobs or ()
        return self.verdict(
            Outcome.PASS,
            ScoreReason.SCORED,
            basis=completion.logprob_basis or LogprobBasis.UNKNOWN,
            n_prompt_tokens=completion.usage.prompt_tokens - len(tokens),
            tokens=[token.token for token in tokens],
            token_ids=[token.id for token in tokens],
            logprobs=[token.logprob for token in tokens],
            **(_alternatives(completion.text, tokens) if self.top_logprobs else {}),
        )


def _alternatives(before: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The likeliest tokens, flat, `k` for each token, and the ids of what comes before the answer."""
    return {
        "prompt_ids": msgspec.json.decode(before),
        "k": len(tokens[0].top),
        "top_ids": [at for token in tokens for at in token.top_ids],
        "top_logprobs": [logprob for token in tokens for _, logprob in token.top],
    }
