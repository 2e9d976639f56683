"""Splits what a teacher said into rationale and answer, and says how well that went. Reads text only."""

import re
from enum import StrEnum
from typing import ClassVar, Literal, NamedTuple

from msgspec.structs import replace
from pydantic import Field

from fastdistill.core.step import Context, Gate, rewritten
from fastdistill.core.types import Candidate, Cut, Outcome, Sample

RATIONALE = "rationale"
"""The kind of cut that a rationale fit for training is kept as."""


class RationaleStatus(StrEnum):
    OK = "ok"
    MISSING = "missing"  # a separator is not there, or they stand the wrong way round
    DOUBLED = "doubled"  # a separator comes again
    EMPTY = "empty"  # nothing in one of the two parts
    TOO_LONG = "too_long"
    LEAKS_GOLD = "leaks_gold"


class SplitRationale(Gate):
    """Takes the rationale out of `### RATIONALE ... ### ANSWER ...`, so that the gates after it see the answer alone.

    A rationale that is `ok` becomes a cut of kind `rationale`, any other one of kind `unusable_rationale`, which is
    never exported; the raw text stays in the completion. The status is the verdict's reason, and it fails a candidate
    only with `require: ok`, for an answer can be right without a rationale.
    """

    version: ClassVar[int] = 3
    rewrites: ClassVar[bool] = True

    rationale_separator: str = Field("### RATIONALE", description="empty: the rationale begins with the text")
    answer_separator: str = Field("### ANSWER", min_length=1)
    max_rationale_chars: int | None = Field(None, gt=0, description="a longer rationale is `too_long`")
    gold_field: str | None = Field(None, description="a rationale with this field's text in it is `leaks_gold`")
    require: Literal["any", "ok"] = "any"

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        gold = _squeezed(sample.record.get(self.gold_field or ""))

        def split(candidate: Candidate) -> Candidate:
            seen = candidate.outcome is Outcome.FAIL or candidate.verdict(self.name) is not None
            return candidate if seen else self._split(candidate, gold)

        return await rewritten(sample, split)

    def _split(self, candidate: Candidate, gold: str) -> Candidate:
        status, rationale, answer, rest = split_rationale(
            candidate.answer, self.rationale_separator, self.answer_separator
        )
        if status is RationaleStatus.OK:
            if self.max_rationale_chars is not None and len(rationale) > self.max_rationale_chars:
                status = RationaleStatus.TOO_LONG
            elif gold and gold in _squeezed(rationale):
                status = RationaleStatus.LEAKS_GOLD
        ok = status is RationaleStatus.OK
        cuts = [Cut(RATIONALE if ok else f"unusable_{RATIONALE}", rationale), *(Cut("prose", text) for text in rest)]
        outcome = Outcome.PASS if ok or self.require == "any" else Outcome.FAIL
        # A flag for each status, so that the report has the rate of each, passed or not.
        verdict = self.verdict(outcome, status, **{f"rationale_{each}": each is status for each in RationaleStatus})
        cuts = [*candidate.cuts, *(cut for cut in cuts if cut.text)]
        return replace(candidate, answer=answer, cuts=tuple(cuts)).judged(verdict)


class Split(NamedTuple):
    status: RationaleStatus
    rationale: str
    answer: str
    rest: tuple[str, ...] = ()  # what stood before and after the two


def split_rationale(text: str, rationale_separator: str, answer_separator: str) -> Split:
    """The two parts of a text, stripped. Without an answer separator the whole text is the answer.

    Separators stand at the beginning of a line, in any case, also in bold and with a colon; of a heading the level does
    not matter. Of a doubled one the first counts: small models go on with a further example of their own.
    """
    rationales = list(_separator(rationale_separator).finditer(text)) if rationale_separator else []
    answers = list(_separator(answer_separator).finditer(text))
    if not answers:
        return Split(RationaleStatus.MISSING, "", text)
    first = answers[0]
    opened = next((mark for mark in rationales if mark.end() <= first.start()), None)
    start, end = opened.span() if opened else (0, 0)
    later = [mark.start() for mark in (*rationales, *answers[1:]) if mark.start() > first.start()]
    stop = min(later, default=len(text))
    rationale, answer = text[end : first.start()].strip(), text[first.end() : stop].strip()
    rest = tuple(piece for piece in (text[:start].strip(), text[stop:].strip()) if piece)
    if rationale_separator and not opened:
        status = RationaleStatus.MISSING
    elif later or len(rationales) > 1:
        status = RationaleStatus.DOUBLED
    else:
        status = RationaleStatus.OK if rationale and answer else RationaleStatus.EMPTY
    return Split(status, rationale, answer, rest)


def rationale_of(candidate: Candidate) -> str | None:
    """The rationale that `SplitRationale` kept, if it is fit for training."""
    return next((cut.text for cut in candidate.cuts if cut.kind == RATIONALE), None)


def _separator(text: str) -> "re.Pattern[str]":
    said = text.lstrip(" \t#") or text
    heading = r"#{2,6}[ \t]*" if "##" in text.removesuffix(said) else text.removesuffix(said)  # one is a comment too
    words = r"[ \t]*".join(map(re.escape, said.split()))
    bold, colon = "[*_]{0,3}", r"[ \t]*[:：]?"
    pattern = rf"^[ \t]*{bold}{heading}{bold}{words}(?!(?<=\w)[^\W_]){colon}{bold}{colon}(?:[ \t]*#+[ \t]*$)?"
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE)


def _squeezed(value: object) -> str:
    return " ".join(value.split()).casefold() if isinstance(value, str) else ""
