"""What flows through a pipeline: records become samples, samples get candidates, candidates get verdicts.

All of it is frozen; a step returns a changed copy, `replace(candidate, ...)` of `msgspec.structs`. Nothing here knows a
provider, a gate or a file format. The types are msgspec's, which are made and copied in a tenth of the time that frozen
dataclasses take; no cycle ever goes through one, so the collector need not look at them.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from fastdistill.core.canonical import canonical_json, digest, joined_digest, pair_digest
from fastdistill.core.errors import NotAsked, SampleError

Message = Mapping[str, str]
"""`{"role": "system", "user" or "assistant", "content": str}`, as every chat endpoint and trainer writes it."""

PromptColumns: TypeAlias = tuple[str, str, str, str]
"""Provider, model, and the JSON of messages and parameters."""


class Outcome(StrEnum):
    __hash__ = str.__hash__  # Enum's own is Python, and every count asks for it
    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"  # could not judge: neither accepted nor a rejected example


class FinishReason(StrEnum):
    __hash__ = str.__hash__
    STOP = "stop"
    LENGTH = "length"  # cut by max_tokens: the answer is not whole
    CONTENT_FILTER = "content_filter"
    OTHER = "other"


class Verdict(Struct, frozen=True, gc=False):
    """One gate's word on one candidate. `reason` is a code from the gate's closed set."""

    gate: str
    fingerprint: str
    outcome: Outcome
    reason: str
    score: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


class Usage(Struct, frozen=True, gc=False):
    """Tokens of one answer. A prompt that served n answers is counted with the first of them only."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class LogprobBasis(StrEnum):
    """Of which distribution log-probabilities are."""

    RAW = "raw"  # the model's own, at temperature 1
    POST_TEMPERATURE = "post_temperature"  # the one that was sampled from
    UNKNOWN = "unknown"


class TokenLogprob(Struct, frozen=True, gc=False):
    """A token of an answer, and its likeliest alternatives in descending order, itself perhaps among them.

    Ids are of the model's own vocabulary, where the server gives them. Natural logarithms, to 5 decimals: further
    digits are noise of the server's arithmetic, and most of the room that an answer takes.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    id: int | None = None
    top_ids: tuple[int, ...] = ()  # of `top`


class Completion(Struct, frozen=True, gc=False):
    """One answer as a model gave it, thinking kept apart.

    `model` and `build` are what the server says it served: a name, and a digest or fingerprint where it has one.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage = Usage()
    thinking: str | None = None
    model: str | None = None
    build: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    logprob_basis: LogprobBasis | None = None

    @property
    def size(self) -> int:
        """About how many characters its JSON has."""
        tokens = self.logprobs
        scored = 25 * len(tokens) * (1 + len(tokens[0].top)) if tokens else 0
        return len(self.text) + len(self.thinking or "") + scored


class Prompt(Struct, frozen=True, dict=True):
    """What is asked: all that would change the answer but the draw itself.

    `parameters` are the decode parameters exactly as they are meant for the server. Base URLs, time limits and
    concurrency are not here, for they don't change an answer.
    """

    provider: str
    model: str
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Of model, messages and parameters."""
        asked = pair_digest(self.model, canonical_json(self.messages))
        return joined_digest(asked, _once(self.parameters)[1])

    @property
    def columns(self) -> PromptColumns:
        """What a table keeps of it."""
        return self.provider, self.model, _encode(self.messages).decode(), _once(self.parameters)[2]


_encode = msgspec.json.Encoder().encode
_Parameters = tuple[Mapping[str, Any], str, str]
_parameters: dict[int, _Parameters] = {}  # by identity, which stays while they are here


def _once(parameters: Mapping[str, Any]) -> _Parameters:
    """Parameters with their digest and JSON; a step asks with the very same ones again and again."""
    found = _parameters.get(id(parameters))
    if found is None:
        if len(_parameters) >= 64:
            _parameters.clear()
        found = _parameters[id(parameters)] = (parameters, digest(parameters), _encode(parameters).decode())
    return found


class Draw(Struct, frozen=True, gc=False):
    """One answer asked of a prompt: the attempt-th, sampled with this seed (None: the server's own)."""

    attempt: int
    seed: int | None

    def key(self, prompt: Prompt) -> str:
        """The key of the answer in the response store."""
        return joined_digest(prompt.provider, prompt.digest, str(self.seed), str(self.attempt))

    def candidate_id(self, sample_id: str, prompt: Prompt) -> str:
        return joined_digest(sample_id, prompt.digest, str(self.seed), str(self.attempt))


class Answer(Struct, frozen=True, gc=False):
    """A completion and where it lies in the response store."""

    draw: Draw
    key: str
    completion: Completion
    stored: bool  # it was in the store already: nothing was paid for it in this run


class Cut(Struct, frozen=True, gc=False):
    """A piece that a parser took out of an answer, kept so that the raw text can be accounted for."""

    kind: str
    text: str


class Candidate(Struct, frozen=True, gc=False):
    """One answer to one sample on its way through the gates. `answer` is what the gates see."""

    candidate_id: str
    attempt: int
    seed: int | None
    key: str  # of the completion in the response store
    prompt: Prompt
    completion: Completion
    answer: str
    cuts: tuple[Cut, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    score: float | None = None
    step: str = ""  # the step that asked for it

    @property
    def outcome(self) -> Outcome:
        """`fail` if any gate failed it, else `error` if any could not judge, else `pass`."""
        outcome = passed = Outcome.PASS
        for verdict in self.verdicts:
            if verdict.outcome is not passed:
                outcome = verdict.outcome
                if outcome is Outcome.FAIL:
                    break
        return outcome

    def verdict(self, gate: str) -> Verdict | None:
        for verdict in self.verdicts:
            if verdict.gate == gate:
                return verdict
        return None

    def judged(self, verdict: Verdict) -> "Candidate":
        return replace(self, verdicts=(*self.verdicts, verdict))

    def parsed(self, answer: str, cuts: Sequence[Cut]) -> "Candidate":
        """With what a parser left of the answer, and what it took away."""
        return replace(self, answer=answer, cuts=(*self.cuts, *cuts))


class Failure(Struct, frozen=True, gc=False):
    """Something that broke for a sample, kept with it: which step, a reason code, and words for people."""

    step: str
    reason: str
    message: str
    attempt: int | None = None


class Status(StrEnum):
    __hash__ = str.__hash__
    OPEN = "open"
    DUPLICATE = "duplicate"  # left out on purpose, with the reason in `failures`
    CONTAMINATED = "contaminated"  # holds an item of an evaluation file; left out on purpose too
    ELSEWHERE = "elsewhere"  # another shard's; left out on purpose too
    FAILED = "failed"  # a step could not handle it
    SKIPPED = "skipped"  # the run had enough, or could spend no more, before it was done


class Sample(Struct, frozen=True, gc=False):
    """One record on its way. `index` is its place in the input, `source` names it for people (`train.jsonl:17`)."""

    index: int
    source: str
    record: Mapping[str, Any]
    task_id: str = ""
    sample_id: str = ""
    input: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    selection: tuple[str, ...] | None = None  # candidate ids, best first; None: no step has selected
    failures: tuple[Failure, ...] = ()
    status: Status = Status.OPEN

    def with_candidates(self, candidates: Iterable[Candidate]) -> "Sample":
        return replace(self, candidates=tuple(candidates))

    @property
    def accepted(self) -> tuple[Candidate, ...]:
        """Candidates that every gate passed, in order of attempt."""
        return tuple([candidate for candidate in self.candidates if candidate.outcome is Outcome.PASS])

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        """The selected candidates that every gate passed, best first; all accepted ones where no step selects."""
        if self.selection is None:
            return self.accepted
        by_id = {candidate.candidate_id: candidate for candidate in self.candidates}
        chosen = [by_id[candidate_id] for candidate_id in self.selection]
        return tuple([candidate for candidate in chosen if candidate.outcome is Outcome.PASS])

    def failed(self, step: str, error: SampleError) -> "Sample":
        status = Status.SKIPPED if isinstance(error, NotAsked) else Status.FAILED
        return self.left_out(status, Failure(step, error.reason, str(error), error.attempt))

    def left_out(self, status: Status, failure: Failure) -> "Sample":
        return replace(self, status=status, failures=(*self.failures, failure))
