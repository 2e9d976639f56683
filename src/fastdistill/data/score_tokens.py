"""Scores samples with another model: the log-probabilities that it gives to tokens which it did not sample.

That is what reverse KL needs of a teacher, on a student's samples. It generates nothing, and rejects nothing.
"""

from collections.abc import Sequence
from enum import StrEnum

from pydantic import Field

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import NotAsked, SampleError
from fastdistill.core.step import Context, Gate
from fastdistill.core.types import Answer, Candidate, Draw, LogprobBasis, Outcome, Sample, Verdict


class ScoreReason(StrEnum):
    SCORED = "scored"
    CANNOT_SCORE = "cannot_score"


class ScoreTokens(Gate):
    """Has `model` score each candidate's whole answer, as the answer to the same messages; passes what is scored.

    It takes vLLM's `prompt_logprobs`; with any other server the run stops and says so. The text is tokenised by the
    scoring model. `same_tokenizer` scores the very token ids that the answer came with instead, its end token among
    them, which makes the values comparable token by token; that is right only if both models have one vocabulary.
    """

    model: str = Field("teacher", description="a name under `models:`, of provider vllm")
    same_tokenizer: bool = Field(
        False, description="score the answer's own token ids; it must have been asked for them"
    )

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
        prompt = model.prompt(candidate.prompt.messages, DecodeProfile(max_tokens=1), {"scored": what})
        (answer,) = await model.generate(prompt, [Draw(0, None)])
        if isinstance(answer, NotAsked):
            raise answer
        if isinstance(answer, SampleError):
            return self.verdict(Outcome.ERROR, ScoreReason.CANNOT_SCORE, detail=str(answer))
        return self._scored(answer)

    def _scored(self, answer: Answer) -> Verdict:
        completion = answer.completion
        tokens = completion.logprobs
        if tokens is None:
            return self.verdict(Outcome.ERROR, ScoreReason.CANNOT_SCORE, detail="the answer has no log-probabilities")
        return self.verdict(
            Outcome.PASS,
            ScoreReason.SCORED,
            basis=completion.logprob_basis or LogprobBasis.UNKNOWN,
            n_prompt_tokens=completion.usage.prompt_tokens - len(tokens),
            tokens=[token.token for token in tokens],
            token_ids=[token.id for token in tokens],
            logprobs=[token.logprob for token in tokens],
        )
