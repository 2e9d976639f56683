"""What a gate's word for its verdict is: a text of a closed set, each of one outcome. The standard library alone."""

from enum import StrEnum
from typing import Literal


class Reason(StrEnum):
    """A base for sets of reasons: `EQUAL = "equal", "pass"`; what says no outcome is a `fail`."""

    __hash__ = str.__hash__  # Enum's own is Python, and every count asks for it

    outcome: Literal["pass", "fail", "error"]
    """`error` means that the candidate could not be judged: it is never held against it."""

    def __new__(cls, word: str, outcome: Literal["pass", "fail", "error"] = "fail") -> "Reason":
        reason = str.__new__(cls, word)
        reason._value_ = word
        reason.outcome = outcome
        return reason
