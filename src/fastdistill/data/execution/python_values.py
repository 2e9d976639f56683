"""The value protocol: what crosses between a candidate's process and its tests', and in which form.

Exact types only (built in, and the containers and numbers of the standard library), each rebuilt on either side from
data that JSON can hold; what has a type of its own there is an object with one key, its tag, and a list of parts. A
message is a line of JSON. Imports only the standard library.
"""

import json
import re
import socket
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from operator import index
from typing import Any

_DEEPEST = 60
_WORD = 1 << 63  # longer integers cross as hexadecimal text, which has no limit and costs linear time


class NotPlainError(Exception):
    """A value can't cross; the message says what it is."""


def encode(value: object, depth: int = 0) -> Any:
    """The value as JSON can hold it.

    Raises:
        NotPlainError: it is, or contains, something else than a plain value, or is nested too deeply.
    """
    kind = type(value)
    if depth > _DEEPEST:
        raise NotPlainError("value nested too deeply")
    if kind in _AS_THEY_ARE or (kind is int and -_WORD < value < _WORD):  # type: ignore[operator]
        return value
    if kind is list:
        return [encode(item, depth + 1) for item in value]  # type: ignore[attr-defined]
    if kind in _FORMS:
        return {kind.__name__: [encode(part, depth + 1) for part in _FORMS[kind][0](value)]}
    raise NotPlainError(kind.__name__)


def decode(wire: object, depth: int = 0) -> Any:
    """The value that `encode` was given, or one that an honest `encode` could have been given.

    Raises:
        NotPlainError: no value has this form.
    """
    if depth > _DEEPEST:
        raise NotPlainError("value nested too deeply")
    try:
        if isinstance(wire, list):
            return [decode(item, depth + 1) for item in wire]
        if not isinstance(wire, dict):
            return wire
        ((tag, parts),) = wire.items()
        return _BUILDS[tag]([decode(part, depth + 1) for part in parts])
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise NotPlainError("value in no known form") from error


class Channel:
    """A candidate's or a tester's end of the socket between them."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._lines = self._socket.makefile("rb", 1 << 16)

    def send(self, message: object) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, longest: int = 1 << 32) -> Any:
        """The next message. Raises EOFError, OverflowError for more than `longest` bytes, ValueError for no JSON."""
        line = self._lines.readline(longest + 1)
        if line.endswith(b"\n"):
            return json.loads(line)
        raise OverflowError(f"more than {longest} bytes") if len(line) > longest else EOFError


_Form = tuple[Callable[[Any], Iterable[object]], Callable[[list[Any]], object]]


def _mapping(kind: type) -> _Form:
    return lambda value: chain.from_iterable(value.items()), lambda parts: kind(
        dict(zip(parts[::2], parts[1::2], strict=True))
    )


def _text(write: Callable[[Any], str], read: Callable[[str], object]) -> _Form:
    return lambda value: [write(value)], lambda parts: read(*parts)


_AS_THEY_ARE = {type(None), bool, float, str}
_FORMS: dict[type, _Form] = {
    **{kind: (iter, kind) for kind in (tuple, set, frozenset, deque)},
    **{kind: _mapping(kind) for kind in (dict, OrderedDict, Counter)},
    defaultdict: _mapping(dict),  # it is equal to its dict, and its factory can't cross
    int: _text(hex, lambda text: int(text, 16)),
    complex: (lambda number: [number.real, number.imag], lambda parts: complex(*parts)),
    **{kind: _text(kind.hex, kind.fromhex) for kind in (bytes, bytearray)},
    range: (lambda r: [r.start, r.stop, r.step], lambda parts: range(*parts)),
    Decimal: _text(str, Decimal),
    # Not as text: "1e1000000000" would be a number to compute.
    Fraction: (lambda f: [f.numerator, f.denominator], lambda parts: Fraction(*map(index, parts))),
    **{kind: _text(kind.isoformat, kind.fromisoformat) for kind in (date, time, datetime)},
    timedelta: (lambda span: [span.days, span.seconds, span.microseconds], lambda parts: timedelta(*parts)),
    re.Match: (lambda _: (), lambda _: object()),  # true, and equal to nothing: all that tests of a match ask
}
_BUILDS = {kind.__name__: build for kind, (_, build) in _FORMS.items()}
