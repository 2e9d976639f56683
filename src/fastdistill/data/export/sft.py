"""Writes the chosen answers as rows for supervised fine-tuning, with their rationales where the student learns them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from fastdistill.core.types import Candidate, Outcome, Sample
from fastdistill.data.export.dataset import FD_COLUMNS, Example, Export, Messages, Shape, candidate_columns
from fastdistill.data.rationale import rationale_of

ANSWERS = frozenset({Shape.MESSAGES, Shape.PROMPT_COMPLETION, Shape.OPENAI_SFT})
PROMPTS = frozenset({Shape.PROMPT})


class ExportSFT(Export):
    """Writes each sample's chosen candidates to `sft/` and `sft_pc/` of the data set, and passes every sample on.

    The `prompt` shape is one row of `prompts/` for each sample that was asked, accepted or not: what a trainer that
    samples by itself needs. With a `target` other than `answer_only` the rationales that `SplitRationale` kept are
    learnt too ("Distilling Step-by-Step", arXiv:2305.02301): `multitask` writes a row for the answer, with `[label]`
    in the system turn, and one for the rationale, with `[rationale]`; `concat` writes one row with both.
    """

    version: ClassVar[int] = 2

    writes: ClassVar[frozenset[Shape]] = ANSWERS | PROMPTS

    shapes: tuple[Shape, ...] = Field((Shape.MESSAGES, Shape.PROMPT_COMPLETION), min_length=1)
    target: Literal["answer_only", "multitask", "concat"] = "answer_only"
    difficulty_quotas: dict[Annotated[float, Field(ge=0, le=1)], Annotated[int, Field(ge=0)] | None] = Field(
        default_factory=dict,
        description="by the upper edge of a bin of difficulty (share of failed candidates): samples written, at most",
    )
    concat_format: str = Field(
        "### RATIONALE\n{rationale}\n\n### ANSWER\n{answer}", description="the assistant's turn of `concat`"
    )

    @field_validator("concat_format")
    @classmethod
    def _knows_its_fields(cls, text: str) -> str:
        try:
            text.format(rationale="", answer="")
        except (LookupError, AttributeError) as error:
            raise ValueError(f"{error} is unknown; {{rationale}} and {{answer}} are known, {{{{ is a brace") from error
        return text

    def gates(self) -> Sequence[str]:
        return () if self.target == "answer_only" else ("SplitRationale",)

    def columns(self, shape: Shape) -> tuple[str, ...]:
        if shape is Shape.PROMPT:
            return ("fd_sample_id", "fd_task_id")
        return FD_COLUMNS if self.target == "answer_only" else (*FD_COLUMNS, "fd_part")

    def examples(self, sample: Sample, seen: "Counter[str]") -> Iterator[Example]:
        if Shape.PROMPT in self.shapes and sample.candidates:
            columns = {"fd_sample_id": sample.sample_id, "fd_task_id": sample.task_id} | self.kept(sample)
            yield Example(PROMPTS, self.prompt(sample, sample.candidates[0]), [], columns)
        turns = [(candidate, turn) for candidate in sample.chosen for turn in self._turns(sample, candidate)]
        if not turns:
            if sample.chosen:
                seen["left_out_no_rationale"] += 1
            return
        if self.difficulty_quotas and not self._within_quota(sample, seen):
            return
        for candidate, (part, prompt, text) in turns:
            columns = candidate_columns(sample, candidate) | self.kept(sample)
            if part is not None:
                columns["fd_part"] = part
                columns["fd_id"] += f"#{part}"
            yield Example(ANSWERS, prompt, [{"role": "assistant", "content": text}], columns)
            seen["rows" if part is None else f"{part}_rows"] += 1

    def _within_quota(self, sample: Sample, seen: "Counter[str]") -> bool:
        """Whether the bin of a sample's difficulty has room for it; it is counted there."""
        failed = sum(candidate.outcome is Outcome.FAIL for candidate in sample.candidates)
        difficulty = failed / (failed + len(sample.accepted))
        edge = min((edge for edge in self.difficulty_quotas if difficulty <= edge), default=None)
        if edge is None:
            return True
        quota = self.difficulty_quotas[edge]
        room = quota is None or seen[f"difficulty_to_{edge:g}"] < quota
        seen[f"difficulty_to_{edge:g}" if room else f"left_out_difficulty_to_{edge:g}"] += 1
        return room

    def _turns(self, sample: Sample, candidate: Candidate) -> Iterator[tuple[str | None, Messages, str]]:
        """What a row is a part of, its prompt, and what is learnt to be said."""
        prompt = self.prompt(sample, candidate)
        if self.target == "answer_only":
            yield None, prompt, candidate.answer
            return
        rationale = rationale_of(candidate)
        if self.target == "multitask":
            yield "label", _tagged(prompt, "[label]"), candidate.answer
            if rationale is not None:
                yield "rationale", _tagged(prompt, "[rationale]"), rationale
        elif rationale is not None:
            yield "concat", prompt, self.concat_format.format(rationale=rationale, answer=candidate.answer)


def _tagged(prompt: Messages, tag: str) -> Messages:
    """The prompt with the task's tag before its system turn, or as its system turn."""
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": tag}, *prompt]
    return [{"role": "system", "content": f"{tag} {prompt[0]['content']}"}, *prompt[1:]]
