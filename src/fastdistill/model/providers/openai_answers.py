"""What OpenAI-compatible servers answer, as their JSON has it, and the completions that are in it."""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

from msgspec import Raw, Struct
from msgspec.json import Decoder

from fastdistill.core.types import Completion, LogprobBasis, TokenLogprob, Usage
from fastdistill.model.transport import Count, Token, completion, usage_of


def share(total: int, weights: Sequence[int]) -> list[int]:
    """Splits `total` in proportion to `weights`, by largest remainder: whole numbers that sum to it exactly."""
    if not sum(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % whole))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


class _Details(Struct):
    cached_tokens: Count = None  # of the prompt
    reasoning_tokens: Count = None  # of the completion


class _Usage(Struct):
    prompt_tokens: Count = None
    completion_tokens: Count = None
    total_tokens: Count = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None

    @property
    def written(self) -> Count:
        """Gemini and xAI count the thinking in the total alone."""
        read, told, total = self.prompt_tokens or 0, self.completion_tokens or 0, self.total_tokens or 0
        return total - read if read > 0 <= told < total - read else self.completion_tokens


class _Logprobs(Struct):
    content: list[Raw] | None = None  # each a `Token`: all at once, they would be read in one go, and long


class _Part(Struct):
    type: str = ""
    text: str | None = None
    thinking: "str | list[_Part] | None" = None  # Mistral


class _Message(Struct):
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None  # SGLang, DeepSeek, older vLLM
    reasoning: str | None = None  # OpenRouter, vLLM
    refusal: str | None = None

    @property
    def thinking(self) -> str | None:
        apart = self.reasoning_content or self.reasoning
        if apart or not isinstance(self.content, list):
            return apart or None
        return "".join([_text(part.thinking) for part in self.content]) or None


def _text(content: str | list[_Part] | None) -> str:
    """The text of a message, whole or in parts."""
    if isinstance(content, list):
        return "".join([part.text or "" for part in content if part.type in ("text", "output_text")])
    return content or ""


class _Choice(Struct):
    token_ids: list[int] | None = None  # vLLM
    response_token_ids: list[int] | None = None  # SGLang
    index: int = 0
    message: _Message | None = None
    finish_reason: str | None = None
    logprobs: Raw = Raw(b"null")  # `_Logprobs`, or whatever some gateway takes for it
    error: Any = None


class ChatAnswer(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    error: Any = None


class _Read(Struct, frozen=True):
    input_tokens: Count = None
    output_tokens: Count = None


class Decided(Struct):
    answers: dict[str, Any]
    diagnostics: dict[str, Any] = {}
    usage: _Read = _Read()
    model: str | None = None


class _Score(Struct):
    logprob: float
    decoded_token: str | None = None


class _Scored(Struct):
    prompt_logprobs: list[Raw] = []


_Told = tuple[float | None, int, str | None]
"""A log-probability, None for the first token of a request, the token's id, and its text."""


class VLLMScores(Struct):
    choices: list[_Scored]

    def of(self, ids: Sequence[int], k: int) -> list[TokenLogprob]:
        """The tokens that end the prompt, with `k` alternatives each; those of which nothing is told are left out."""
        rows = [_decode_scores(row) or {} for choice in self.choices for row in choice.prompt_logprobs[-len(ids) :]]
        told = [{at: (score.logprob, at, score.decoded_token) for at, score in row.items()} for row in rows]
        return [_token(row[at], row.values(), k) for at, row in zip(ids, told, strict=False) if at in row]


class _MetaInfo(Struct):
    input_token_logprobs: list[_Told] = []
    input_top_logprobs: list[list[_Told] | None] = []


class SGLangScores(Struct):
    meta_info: _MetaInfo

    def of(self, ids: Sequence[int], k: int) -> list[TokenLogprob]:
        """As `VLLMScores.of`."""
        rows, tops = self.meta_info.input_token_logprobs[-len(ids) :], self.meta_info.input_top_logprobs[-len(ids) :]
        told = zip(ids, rows, tops or [None] * len(rows), strict=False)
        return [_token(row, top or [], k) for at, row, top in told if row[0] is not None and row[1] == at]


def _token(told: _Told, others: Iterable[_Told], k: int) -> TokenLogprob:
    tops = sorted([(value, at, text or "") for value, at, text in others if value is not None], reverse=True)[:k]
    pairs, ids = tuple((text, round(value, 5)) for value, _, text in tops), tuple(at for _, at, _ in tops)
    return TokenLogprob(told[2] or "", round(told[0] or 0.0, 5), pairs, told[1], ids)


class TokenIds(Struct):
    tokens: list[int]


class ListedModel(Struct):
    id: str
    owned_by: str | None = None
    max_model_len: int | None = None  # vLLM, SGLang
    context_length: int | None = None  # OpenRouter
    context_window: int | None = None  # Groq
    meta: dict[str, Any] | None = None  # llama.cpp; `n_ctx` is the context of one slot

    @property
    def context(self) -> int | None:
        return self.max_model_len or self.context_length or self.context_window or (self.meta or {}).get("n_ctx")


class ListedModels(Struct):
    data: list[ListedModel]


class Props(Struct):
    """Of llama.cpp."""

    total_slots: int


decode_answer = Decoder(ChatAnswer).decode
_decode_logprobs = Decoder(_Logprobs | None).decode
_decode_token = Decoder(Token).decode
_decode_scores = Decoder(dict[int, _Score] | None).decode


def completions_of(answer: ChatAnswer, n: int, basis: LogprobBasis = LogprobBasis.UNKNOWN) -> list[Completion]:
    """Up to `n` completions, in the order of their index."""
    choices = [choice for choice in answer.choices or () if choice.message is not None and not choice.error]
    if len(choices) > 1:
        choices = sorted(choices, key=lambda choice: choice.index)[:n]
    tokens = [*map(_tokens, choices)]
    usages = _usages(answer.usage or _Usage(), choices, tokens)
    return [*map(_completion, repeat(answer), choices, tokens, usages, repeat(basis))]


def _completion(
    answer: ChatAnswer, choice: _Choice, tokens: list[Token] | None, usage: Usage, basis: LogprobBasis
) -> Completion:
    message = choice.message or _Message()
    text = _text(message.content)
    finish = "content_filter" if message.refusal and not text else choice.finish_reason
    told: dict[str, Any] = {"model": answer.model, "build": answer.system_fingerprint}
    told["logprob_basis"] = basis if tokens is not None else None
    return completion(text, message.thinking, tokens, finish=finish, usage=usage, **told)


def _tokens(choice: _Choice) -> list[Token] | None:
    """Those with log-probabilities. What can't be read costs only itself, for the rest is paid for and of use."""
    try:
        told = _decode_logprobs(choice.logprobs)
        if told is None or told.content is None:
            return None
        tokens = [*map(_decode_token, told.content)]
    except ValueError:  # msgspec's are, and Unicode's
        return None
    ids = choice.token_ids or choice.response_token_ids or ()
    if len(tokens) == len(ids):
        for token, number in zip(tokens, ids, strict=True):
            token.id = number
    return tokens


def _usages(usage: _Usage, choices: Sequence[_Choice], tokens: Sequence[list[Token] | None]) -> list[Usage]:
    """One for each choice; they sum to what was reported, which is all that the server tells.

    Completion tokens go by the number of tokens with logprobs, or else by length; the prompt goes with the first.
    """
    cached = (usage.prompt_tokens_details or _Details()).cached_tokens
    thought = (usage.completion_tokens_details or _Details()).reasoning_tokens
    whole = usage_of(usage.prompt_tokens, usage.written, cached, thought)
    if len(choices) < 2:
        return [whole]
    counted = [len(each) for each in tokens if each is not None]
    messages = [choice.message or _Message() for choice in choices]
    written = [len(_text(message.content)) + len(message.thinking or "") for message in messages]
    completions = share(whole.completion_tokens, counted if len(counted) == len(choices) else written)
    thoughts = share(whole.reasoning_tokens, completions)
    others = [0] * (len(choices) - 1)
    return list(map(Usage, [whole.prompt_tokens, *others], completions, [whole.cached_tokens, *others], thoughts))


def basis_of(token: TokenLogprob, hot: TokenLogprob | None) -> LogprobBasis:
    """What two alternatives of a first token say that were asked for at temperatures 1 and 2.

    After temperature their log-probabilities are half as far apart; the model's own stay as they are.
    """
    cold, warm = dict(token.top), dict(hot.top if hot else ())
    both = sorted((name for name in cold if name in warm), key=lambda name: cold[name])
    if len(both) < 2 or (gap := cold[both[-1]] - cold[both[0]]) < 0.1:
        return LogprobBasis.UNKNOWN
    ratio = (warm[both[-1]] - warm[both[0]]) / gap
    if abs(ratio - 1) < 0.05:
        return LogprobBasis.RAW
    return LogprobBasis.POST_TEMPERATURE if abs(ratio - 0.5) < 0.05 else LogprobBasis.UNKNOWN


def begins_an_object(text: str) -> bool | None:
    """Whether the first tokens of an answer keep to the schema; None if they are blank, which says nothing."""
    begun = text.lstrip()
    return begun.startswith("{") if begun else None
