"""The value protocol: what crosses between a candidate's process and its tests', and in which form.

Exact types only (built in, and the containers and numbers of the standard library), each rebuilt on either side from
data that JSON can hold; what has a type of its own there is an object with one key, its tag. Frames are a 4-byte
big-endian length and JSON. Imports only the standard library.
"""

import json
import os
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time
from decimal import Decimal
from fractions import Fraction
from typing import Any

_DEEPEST = 60
_HEADER = struct.Struct(">I")
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
    if kind in _SERIES:
        items = [encode(item, depth + 1) for item in value]  # type: ignore[attr-defined]
        return items if kind is list else {kind.__name__: items}
    if kind in _MAPPINGS:
        pairs = [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]  # type: ignore[attr-defined]
        return {kind.__name__: pairs}
    if kind in _TEXTS:
        return {kind.__name__: _TEXTS[kind][0](value)}
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
        ((tag, inner),) = wire.items()
        build = _BUILDS[tag]
        if tag in _TEXT_TAGS:
            return build(inner)
        if tag in _SERIES_TAGS:
            return build(decode(item, depth + 1) for item in inner)
        return build({decode(key, depth + 1): decode(item, depth + 1) for key, item in inner})
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise NotPlainError("value in no known form") from error


def send(descriptor: int, message: object) -> None:
    body = json.dumps(message).encode()
    rest = memoryview(_HEADER.pack(len(body)) + body)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive(descriptor: int, longest: int = 1 << 32) -> Any:
    """The next frame. Raises EOFError, OverflowError for one of more than `longest` bytes, ValueError for no JSON."""
    (size,) = _HEADER.unpack(_read(descriptor, _HEADER.size))
    if size > longest:
        raise OverflowError(f"{size} bytes")
    return json.loads(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


_AS_THEY_ARE = {type(None), bool, float, str}
_SERIES: dict[type, Callable[[Any], Any]] = {kind: kind for kind in (list, tuple, set, frozenset, deque)}
# A defaultdict is equal to its dict, and its factory can't cross.
_MAPPINGS: dict[type, Callable[[Any], Any]] = {
    dict: dict,
    OrderedDict: OrderedDict,
    Counter: Counter,
    defaultdict: dict,
}
_TEXTS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    int: (hex, lambda text: int(text, 16)),
    complex: (repr, complex),
    bytes: (bytes.hex, bytes.fromhex),
    bytearray: (bytearray.hex, bytearray.fromhex),
    range: (lambda r: f"{r.start} {r.stop} {r.step}", lambda text: range(*map(int, text.split()))),
    Decimal: (str, Decimal),
    # Not as decimal text: "1e1000000000" would be a number to compute.
    Fraction: (lambda f: f"{f.numerator:x} {f.denominator:x}", lambda text: Fraction(*_hexadecimals(text))),
    **{kind: (kind.isoformat, kind.fromisoformat) for kind in (date, time, datetime)},
    re.Match: (lambda _: "", lambda _: object()),  # true, and equal to nothing: all that tests of a match ask
}
_BUILDS = {kind.__name__: build for kind, build in (*_SERIES.items(), *_MAPPINGS.items())}
_BUILDS |= {kind.__name__: build for kind, (_, build) in _TEXTS.items()}
_SERIES_TAGS, _TEXT_TAGS = ({kind.__name__ for kind in kinds} for kinds in (_SERIES, _TEXTS))


def _hexadecimals(text: str) -> Iterable[int]:
    return (int(number, 16) for number in text.split())
