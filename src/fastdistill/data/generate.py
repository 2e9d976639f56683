"""Generation: renders a sample's prompt and asks a model for candidates. Knows no provider and no server."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import cycle, islice
from typing import Any, ClassVar, Literal, Self

from msgspec.structs import replace
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.errors import BudgetSpent, NotAsked, SampleError, together
from fastdistill.core.step import Context, Model, SampleStep
from fastdistill.core.types import Answer, Candidate, Draw, Failure, Message, Prompt, Sample
from fastdistill.data.template import Template, compile_template, render

_HOPELESS = {BudgetSpent.code, "gold_invalid"}
"""Reasons for which no further answer could be accepted: a judge has no budget left, the record's gold is broken."""


class Until(BaseModel, frozen=True, extra="forbid"):
    """Stop asking for candidates of a sample once enough are accepted.

    Candidates are asked for in waves of `wave`, and a wave is judged when all of it has arrived: which answers are
    kept depends on what the gates say and on the order of attempts, never on which answer was fast.
    """

    accepted: int = Field(1, ge=1, description="accepted candidates that are enough for a sample")
    wave: int = Field(1, ge=1, description="candidates asked for at a time")
    siblings: Literal["keep", "cancel"] = Field(
        "keep", description="cancel: call off the rest of a wave once enough of its first ones are accepted"
    )


class TextGeneration(SampleStep):
    """Asks a model for `num_generations` candidates of each sample, or for fewer if `until` is met before.

    `teachers` is a ladder: the first model answers, and after `escalate_after` waves without enough accepted answers
    the next one does. The waves of one whose own budget is spent bring nothing.

    `template` and `system_prompt` are Jinja templates over the record's fields; a field that is missing fails the
    sample before anything is asked. Of a list of templates each draw takes the next, and of a list of temperatures
    the next once all templates have had their turn. Each prompt has its own seeds,
    made of the prompt and `seed`, one after the other for its draws, so that samples are drawn independently of each
    other (`seed: null` leaves it to the server).
    """

    version: ClassVar[int] = 3
    rewrites: ClassVar[bool] = False

    model: str = Field("teacher", description="a name under `models:`")
    teachers: tuple[str, ...] = Field((), description="names under `models:` in place of `model`, the weakest first")
    escalate_after: int = Field(2, ge=1, description="waves that each of the `teachers` but the last has")
    num_generations: int = Field(1, ge=1, description="candidates of a sample, at most")
    until: Until | None = None
    system_prompt: str | None = None
    template: str | tuple[str, ...] = Field(min_length=1)
    decode_profile: DecodeProfile = DecodeProfile()
    decode_profile_field: str | None = Field(
        "decode_profile", description="where a record has this field, its entries win over the step's profile"
    )
    generation_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="passed on to the server as they are: `options` for Ollama, any field of the body elsewhere",
    )
    seed: int | None = Field(0, ge=0, lt=2**31)

    _only: ClassVar[int | None] = None
    """The one attempt of a step that races, which has it in its own `__dict__`: pydantic's private ones are slow."""

    @field_validator("template", "system_prompt")
    @classmethod
    def _compiles(cls, text: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for each in (text,) if isinstance(text, str) else text or ():
            compile_template(each)
        return text

    @field_validator("generation_kwargs")
    @classmethod
    def _leaves_ours_alone(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if ours := sorted(fields.keys() & {"model", "messages", "n", "seed", "stream"}):
            raise ValueError(f"{', '.join(ours)} can't be set here: the pipeline says it in its own fields")
        return fields

    @model_validator(mode="after")
    def _draws_differ(self) -> Self:
        if self.teachers and self.until is None:
            raise ValueError("teachers needs until, like {accepted: 1}: it says when a sample has enough")
        if twice := sorted(name for name, count in Counter(self.teachers).items() if count > 1):
            raise ValueError(
                f"teachers: {', '.join(twice)} is there twice; `escalate_after` says how often each is asked"
            )
        if self.teachers and self.teachers[-1] not in map(self._teacher, range(self.num_generations)):
            raise ValueError(
                f"teachers: {self.teachers[-1]} is never asked, for its turn is after num_generations:"
                f" {self.num_generations}; raise that, or lower escalate_after or until.wave"
            )
        options = self.generation_kwargs.get("options") or {}
        ways = islice(cycle(self._own_ways), self.num_generations)
        greedy = Counter(variant for variant, p in ways if options.get("temperature", p.temperature) == 0)
        if (same := max(greedy.values(), default=0)) > 1:
            raise ValueError(
                f"temperature 0 would bring the same answer {same} times; raise it, or set num_generations: 1"
            )
        return self

    def models(self) -> Sequence[str]:
        return self.teachers or (self.model,)

    def wants_more(self, sample: Sample) -> bool:
        if self.until is None or len(sample.accepted) >= self.until.accepted:
            return False
        hopeless = any(v.reason in _HOPELESS for c in sample.candidates for v in c.verdicts)
        return not hopeless and _asked(sample, self.name) < self.num_generations

    def race(self, sample: Sample) -> "Sequence[TextGeneration]":
        if self._only is not None or not self.until or self.until.siblings == "keep" or not self.wants_more(sample):
            return ()
        return [self.model_copy(update={"_only": attempt}) for attempt in self._attempts(sample)]

    def is_stored(self, sample: Sample, ctx: Context) -> bool:
        attempts, ways = self._attempts(sample), self._ways(sample)
        model = ctx.model(self._teacher(attempts[0]))
        prompt = self._prompt(model, sample, *ways[attempts[0] % len(ways)])
        return model.stored(prompt, self._draws(prompt, attempts))

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        attempts = self._attempts(sample)
        if not attempts or (attempts[0] and not self.wants_more(sample) and self._only is None):
            return sample  # another step wanted more
        teacher = self._teacher(attempts[0])
        asked = await self._ask(ctx.model(teacher), sample, attempts)
        step = self.name
        candidates = [_candidate(each, sample, prompt, step) for prompt, _, each in asked if isinstance(each, Answer)]
        if len(candidates) == len(asked):
            return replace(sample, candidates=(*sample.candidates, *candidates))
        errors = [(each, draw.attempt) for _, draw, each in asked if isinstance(each, SampleError)]
        failures = [Failure(self.name, error.reason, str(error), attempt) for error, attempt in errors]
        if not candidates and not sample.candidates:
            error = errors[0][0]
            error.attempt = self._only
            to_come = range(attempts.stop, self.num_generations)
            if isinstance(error, BudgetSpent):  # others may have some left
                ends = all(self._teacher(attempt) == teacher for attempt in to_come)
            else:
                ends = isinstance(error, NotAsked) or (self._only is None and not to_come)
            if ends:
                raise error
        return replace(sample, candidates=(*sample.candidates, *candidates), failures=(*sample.failures, *failures))

    def prompts(self, sample: Sample, ctx: Context) -> list[Prompt]:
        """What each of the models would be asked, with each of the templates and temperatures.

        Raises:
            SampleError: as `messages`; or the record's decode profile is no profile.
        """
        ways = self._ways(sample)
        return [self._prompt(ctx.model(name), sample, *way) for name in self.models() for way in ways]

    def _prompt(self, model: Model, sample: Sample, variant: int, profile: DecodeProfile) -> Prompt:
        return model.prompt(self.messages(sample, variant), profile, self.generation_kwargs, sample)

    def _ways(self, sample: Sample) -> list[tuple[int, DecodeProfile]]:
        """The template and the temperature of the attempts, which take turns; the templates change first."""
        own = sample.record.get(self.decode_profile_field) if self.decode_profile_field else None
        return self._own_ways if own is None else self._ways_with(self._profile(own, sample))

    def _ways_with(self, profile: DecodeProfile) -> list[tuple[int, DecodeProfile]]:
        return [(variant, each) for each in profile.each for variant in range(len(self._users))]

    async def _ask(
        self, model: Model, sample: Sample, attempts: range
    ) -> list[tuple[Prompt, Draw, Answer | SampleError]]:
        """What came of each attempt, in their order."""
        ways = self._ways(sample)
        count = len(ways)
        if count == 1 or len(attempts) == 1:  # as a rule; it needs no task of its own
            prompt = self._prompt(model, sample, *ways[attempts[0] % count])
            draws = self._draws(prompt, attempts)
            drawn = await model.generate(prompt, draws)
            return [*zip([prompt] * len(draws), draws, drawn, strict=True)]
        asked = []
        for at in {attempt % count: None for attempt in attempts}:
            prompt = self._prompt(model, sample, *ways[at])
            asked.append((prompt, self._draws(prompt, [a for a in attempts if a % count == at])))
        # What was paid for comes home, also where one of the prompts is refused for good.
        answers = await together(*(model.generate(*each) for each in asked))
        found = [
            (prompt, draw, answer)
            for (prompt, draws), drawn in zip(asked, answers, strict=True)
            for draw, answer in zip(draws, drawn, strict=True)
        ]
        return sorted(found, key=lambda each: each[1].attempt)

    def messages(self, sample: Sample, variant: int = 0) -> list[Message]:
        """The chat messages of a sample's prompt, made with one of the templates.

        Raises:
            SampleError: `missing_field`, or `template_error` with what Jinja says.
        """
        user = {"role": "user", "content": render(self._users[variant], sample)}
        system = self._system
        if isinstance(system, Template):
            return [{"role": "system", "content": render(system, sample)}, user]
        return [*system, user]

    def _attempts(self, sample: Sample) -> range:
        """The attempts of the next wave."""
        if self._only is not None:
            return range(self._only, self._only + 1)
        first = _asked(sample, self.name)
        if self.until is None:
            return range(first, self.num_generations)
        return range(first, min(first + self.until.wave, self.num_generations))

    def _teacher(self, attempt: int) -> str:
        if not self.teachers:
            return self.model
        wave = 0 if self.until is None else attempt // self.until.wave
        models = self.teachers
        return models[min(wave // self.escalate_after, len(models) - 1)]

    def _draws(self, prompt: Prompt, attempts: Sequence[int]) -> list[Draw]:
        if self.seed is None:
            return [Draw(attempt, None) for attempt in attempts]
        seeds = (int(prompt.digest[:8], 16) + 1_000_003 * self.seed) % 2**31
        return [Draw(attempt, seeds + attempt) for attempt in attempts]

    def _profile(self, own: object, sample: Sample) -> DecodeProfile:
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
    def _own_ways(self) -> list[tuple[int, DecodeProfile]]:
        return self._ways_with(self.decode_profile)

    @cached_property
    def _users(self) -> list[Template]:
        templates = (self.template,) if isinstance(self.template, str) else self.template
        return [compile_template(template) for template in templates]

    @cached_property
    def _system(self) -> Template | Sequence[Message]:
        """The system prompt: a template, or the message that it is for every sample, if there is one."""
        text = self.system_prompt
        if text is None:
            return ()
        return compile_template(text) if "{" in text else ({"role": "system", "content": text},)


def _candidate(answer: Answer, sample: Sample, prompt: Prompt, step: str) -> Candidate:
    draw, said = answer.draw, answer.completion
    name = draw.candidate_id(sample.sample_id, prompt)
    return Candidate(name, draw.attempt, draw.seed, answer.key, prompt, said, said.text, step=step)


def _asked(sample: Sample, step: str) -> int:
    """How many candidates the step has asked for so far, those that never came among them."""
    if not sample.candidates and not sample.failures:  # at first
        return 0
    came = [c for c in sample.candidates if c.step == step]
    return len(came) + len([f for f in sample.failures if f.step == step and f.attempt is not None])
