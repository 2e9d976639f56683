"""Generation: renders a sample's prompt and asks a model for candidates. Knows no provider and no server."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import SampleError
from fastdistill.core.step import Context, SampleStep
from fastdistill.core.types import Answer, Candidate, Draw, Failure, Message, Prompt, Sample
from fastdistill.data.template import compile_template, render

if TYPE_CHECKING:
    from jinja2 import Template


class TextGeneration(SampleStep):
    """Asks `model` for `num_generations` candidates of each sample.

    `template` and `system_prompt` are Jinja templates over the record's fields; a field that is missing fails the
    sample before anything is asked. Each prompt has its own seeds, made of the prompt and `seed`, one after the other
    for its draws, so that samples are drawn independently of each other (`seed: null` leaves it to the server).
    """

    model: str = Field("teacher", description="a name under `models:`")
    num_generations: int = Field(1, ge=1)
    system_prompt: str | None = None
    template: str
    decode_profile: DecodeProfile = DecodeProfile()
    decode_profile_field: str | None = Field(
        "decode_profile", description="where a record has this field, its entries win over the step's profile"
    )
    generation_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="passed on to the server as they are: `options` for Ollama, any field of the body elsewhere",
    )
    seed: int | None = Field(0, ge=0, lt=2**31)

    @field_validator("template", "system_prompt")
    @classmethod
    def _compiles(cls, text: str | None) -> str | None:
        if text is not None:
            compile_template(text)
        return text

    @model_validator(mode="after")
    def _draws_differ(self) -> Self:
        options = self.generation_kwargs.get("options")
        temperature = (options or {}).get("temperature", self.decode_profile.temperature)
        if self.num_generations > 1 and temperature == 0:
            raise ValueError(
                f"temperature 0 would bring the same answer {self.num_generations} times;"
                " raise it, or set num_generations: 1"
            )
        return self

    def models(self) -> Sequence[str]:
        return (self.model,)

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        model = ctx.model(self.model)
        prompt = model.prompt(self.messages(sample), self._profile(sample), self.generation_kwargs)
        first = len(sample.candidates)
        draws = [self._draw(prompt, attempt) for attempt in range(first, first + self.num_generations)]
        answers = await model.generate(prompt, draws)
        candidates = [_candidate(answer, sample, prompt) for answer in answers if isinstance(answer, Answer)]
        failures = [
            Failure(self.name, answer.reason, str(answer), draw.attempt)
            for draw, answer in zip(draws, answers, strict=True)
            if isinstance(answer, SampleError)
        ]
        if not candidates:
            raise SampleError(failures[0].reason, failures[0].message)
        return replace(sample, candidates=(*sample.candidates, *candidates), failures=(*sample.failures, *failures))

    def messages(self, sample: Sample) -> list[Message]:
        """The chat messages of a sample's prompt.

        Raises:
            SampleError: `missing_field`, or `template_error` with what Jinja says.
        """
        messages: list[Message] = []
        if self._system is not None:
            messages.append({"role": "system", "content": render(self._system, sample)})
        messages.append({"role": "user", "content": render(self._user, sample)})
        return messages

    def _draw(self, prompt: Prompt, attempt: int) -> Draw:
        if self.seed is None:
            return Draw(attempt, None)
        return Draw(attempt, (int(prompt.digest[:8], 16) + 1_000_003 * self.seed) % 2**31 + attempt)

    def _profile(self, sample: Sample) -> DecodeProfile:
        own = sample.record.get(self.decode_profile_field) if self.decode_profile_field else None
        if own is None:
            return self.decode_profile
        place = f"{sample.source}: field {self.decode_profile_field!r}"
        if not isinstance(own, Mapping):
            raise SampleError("bad_decode_profile", f'{place} must be an object like {{"temperature": 0.7}}')
        try:
            return DecodeProfile.model_validate(self.decode_profile.model_dump() | dict(own))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SampleError("bad_decode_profile", f"{place}: {where}: {first['msg']}") from error

    @cached_property
    def _user(self) -> "Template":
        return compile_template(self.template)

    @cached_property
    def _system(self) -> "Template | None":
        return None if self.system_prompt is None else compile_template(self.system_prompt)


def _candidate(answer: Answer, sample: Sample, prompt: Prompt) -> Candidate:
    return Candidate(
        candidate_id=answer.draw.candidate_id(sample.sample_id, prompt),
        attempt=answer.draw.attempt,
        seed=answer.draw.seed,
        key=answer.key,
        prompt=prompt,
        completion=answer.completion,
        answer=answer.completion.text,
    )
