"""The embedded teacher's engine: requests in, completions out, with continuous batching.

Choices join and leave the running batch at any step. Knows nothing of processes or pipes; `worker` does.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastdistill.core.types import Completion, FinishReason, LogprobBasis, TokenLogprob, Usage
from fastdistill.model.embedded.network import Array, Cache, Decoder, Weights
from fastdistill.model.embedded.wire import Request, Result


@dataclass(slots=True)
class _Job:
    """A request in the engine: how many choices have started, those that are done, and the prompt once computed."""

    request: Request
    prompt: list[int]
    started: int = 0
    choices: dict[int, Completion] = field(default_factory=dict)
    computed: tuple[Cache, Array] | None = None  # and the logits after the prompt


@dataclass(slots=True)
class _Sequence:
    """A choice that is being generated."""

    job: _Job
    index: int
    cache: Cache
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Engine:
    """Continuous batching over one network: `submit` requests at any time, and call `step` while the engine is `busy`.

    A step computes one token for every running choice. At most `slots` choices run at a time, in order of arrival; a
    prompt is computed once for all its choices.
    """

    def __init__(self, weights: Weights, slots: int = 32) -> None:
        self.name = f"embedded-{weights.sha256[:12]}"
        self.tokenizer = weights.tokenizer
        self.context = weights.architecture.context
        self._decoder = Decoder(weights)
        self._slots = slots
        self._waiting: deque[_Job] = deque()
        self._running: list[_Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._running or self._waiting)

    def submit(self, request: Request) -> Result | None:
        """Queue a request; `step` returns its result. That comes at once if the prompt fills the context."""
        prompt = self.tokenizer.encode_chat(request.messages)
        if len(prompt) >= self.context:
            too_long = f"the prompt has {len(prompt)} tokens; the context is {self.context} tokens"
            return Result(request.id, too_long=too_long)
        self._waiting.append(_Job(request, prompt))
        return None

    def cancel(self, id: int) -> None:
        """Forget a request, wherever it is. An unknown id is ignored: its result may be on its way."""
        self._waiting = deque(job for job in self._waiting if job.request.id != id)
        self._running = [sequence for sequence in self._running if sequence.job.request.id != id]

    def step(self) -> list[Result]:
        """Advance every running choice by a token, and start as many more as there are free slots.

        Returns the results that this completed, with the choices in the order of their indices.
        """
        active: list[tuple[_Sequence, Array]] = []
        if self._running:
            logits = self._decoder.forward([(s.tokens[-1:], s.cache) for s in self._running])
            active += zip(self._running, logits, strict=True)
        while self._waiting and len(active) < self._slots:
            active.append(self._start())
        self._running = []
        completed: list[Result] = []
        for sequence, row in active:
            choice = self._extend(sequence, row)
            if choice is None:
                self._running.append(sequence)
                continue
            job = sequence.job
            job.choices[sequence.index] = choice
            if len(job.choices) == job.request.n:
                choices = tuple(job.choices[index] for index in range(job.request.n))
                completed.append(Result(job.request.id, choices))
        return completed

    def _start(self) -> tuple[_Sequence, Array]:
        """The next choice of the first job in the queue, and the logits of its first token."""
        job = self._waiting[0]
        if job.computed is None:
            cache = Cache.empty(self._decoder.shape, len(job.prompt))
            job.computed = cache, self._decoder.forward([(job.prompt, cache)])[0]
        prefix, logits = job.computed
        # Choice i under seed s is choice 0 under seed s + i, as in vLLM.
        seed = job.request.seed
        rng = np.random.default_rng(None if seed is None else seed + job.started)
        capacity = min(len(job.prompt) + job.request.max_tokens, self.context)
        sequence = _Sequence(job, job.started, prefix.copy(capacity), rng)
        job.started += 1
        if job.started == job.request.n:
            self._waiting.popleft()
            job.computed = None
        return sequence, logits

    def _extend(self, sequence: _Sequence, logits: Array) -> Completion | None:
        """Draw the next token of a choice; the choice itself if that ends it."""
        request, tokens = sequence.job.request, sequence.tokens
        token = sample(logits, request, sequence.rng)
        tokens.append(token)
        if request.logprobs:
            sequence.logprobs.append(self._logprob(token, logits, request.top_logprobs))
        ended = token in (self.tokenizer.im_end, self.tokenizer.end_of_text)
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
        cuts = [at for stop in request.stop if (at := text.find(stop)) >= 0]
        full = len(tokens) == request.max_tokens or len(sequence.job.prompt) + len(tokens) == self.context
        if not (ended or cuts or full):
            return None
        reason = FinishReason.STOP if ended or cuts else FinishReason.LENGTH
        return Completion(
            text=text[: min(cuts, default=len(text))],
            finish_reason=reason,
            usage=Usage(len(sequence.job.prompt) if sequence.index == 0 else 0, len(tokens)),
            model=self.name,
            build=self.name,
            logprobs=tuple(sequence.logprobs) if request.logprobs else None,
            logprob_basis=LogprobBasis.RAW if request.logprobs else None,
        )

    def _logprob(self, token: int, logits: Array, top: int) -> TokenLogprob:
        logprobs = log_softmax(logits).round(5)
        best = np.argsort(-logprobs, kind="stable")[:top]
        decode = self.tokenizer.decode
        tops = tuple((decode([int(i)]), float(logprobs[i])) for i in best)
        return TokenLogprob(decode([token]), float(logprobs[token]), tops, token, tuple(map(int, best)))


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """The log-probabilities of logits of shape (vocabulary,)."""
    shifted = logits.astype(np.float64) - logits.max()
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normal


def sample(logits: Array, sampling: Request, rng: np.random.Generator) -> int:
    """Draw a token from logits of shape (vocabulary,). One uniform number is used up, none if greedy."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = log_softmax(logits) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())  # of the likeliest token's, until a draw needs their sum
    probabilities[probabilities < sampling.min_p] = 0
    if sampling.top_k > 0 or sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        ranked = probabilities[order]
        ranked[sampling.top_k or len(ranked) :] = 0
        ranked /= ranked.sum()
        before = np.cumsum(ranked) - ranked
        probabilities[order[(ranked == 0) | (before >= sampling.top_p)]] = 0
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
